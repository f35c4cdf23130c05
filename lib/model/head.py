"""From the last layer to logits, and to a loss that never holds the logits of all tokens."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lib.config import Config
from lib.model.linear import narrow_linear, written_out
from lib.parallel.collectives import gather

# exp of a logit this large, summed over any vocabulary, is far from float32's largest number
NO_OVERFLOW = 60.0


def head_matrix(params, config: Config):
    """The head (D, V), or its int8 form; a tied one is the embedding, turned."""
    # int8 gives a tied model a head of its own
    if config.tied_head and "head" not in params:
        head = gather("embed", params["embed"]).T
        # XLA:CPU has no product of bfloat16 with float32 results that turns an operand
        return written_out(head) if config.operand_dtype != config.dtype else head
    return gather("head", params["head"])


def logits(params, config: Config, x_BTD):
    """What the head makes of `hidden`'s output: float32 (..., V)."""
    with jax.named_scope("head"):
        return _logits(x_BTD, head_matrix(params, config), config)


def _logits(x, head, config: Config):
    """Float32 logits over the true vocabulary, soft-capped."""
    return _of_scores(_scores(x, head, config, jnp.float32), config)


def _scores(x, head, config: Config, dtype):
    """The head's product over the padded vocabulary, in `dtype`."""
    if isinstance(head, dict):
        x_CD = x.reshape(-1, x.shape[-1])
        scores_CV = narrow_linear("CD,DV->CV", x_CD, head, dtype)
        return scores_CV.reshape(*x.shape[:-1], -1)
    operands = x.astype(config.operand_dtype), head.astype(config.operand_dtype)
    return jnp.matmul(*operands, preferred_element_type=dtype)


def _of_scores(scores, config: Config):
    """Logits from what the head's product wrote."""
    return _capped(scores[..., : config.vocab_size], config)


def _capped(scores, config: Config):
    """Scores in float32, soft-capped."""
    logits = scores.astype(jnp.float32)
    # XLA may drop a rounding inside a fusion: said here, all who read the scores read the same
    if scores.dtype.itemsize < 4:
        rounded = jnp.finfo(scores.dtype)
        logits = jax.lax.reduce_precision(logits, rounded.nexp, rounded.nmant)
    if config.softcap:
        logits = config.softcap * jnp.tanh(logits / config.softcap)
    return logits


# ---- the loss, a chunk of tokens at a time -------------------------------------------------------


def losses_by_token(x_BTD, head, targets_BT, config: Config):
    """Cross-entropy in nats of each token (B, T), 0 where the target is negative; not meant for
    gradients.
    """
    head = head if isinstance(head, dict) else head.astype(config.operand_dtype)

    def chunk(_, x_CD, t_C):
        return None, _loss_of(_scores(x_CD, head, config, jnp.float32), t_C, config)[0]

    skip = config.skip_ignored
    return _over_chunks(chunk, None, x_BTD, targets_BT, config.loss_chunk, skip)[1]


def logprobs_by_token(x_BTD, head_DV, targets_BT, config: Config) -> tuple[Any, Any]:
    """Log-probability of each target and entropy of the whole distribution, (B, T) in nats; 0 where
    the target is negative.

    For gradients too: the logits of one chunk of tokens at a time are made again on the way back.
    """
    head_DV = head_DV.astype(config.operand_dtype)

    @jax.checkpoint
    def chunk(_, x_CD, t_C):
        scores_CV = _scores(x_CD, head_DV, config, jnp.float32)
        loss_C, lse_C = _loss_of(scores_CV, t_C, config)
        logits_CV = _of_scores(scores_CV, config)
        p_CV = jnp.exp(logits_CV - lse_C[:, None])
        entropy_C = lse_C - jnp.sum(p_CV * logits_CV, axis=-1)
        return None, (-loss_C, jnp.where(t_C >= 0, entropy_C, 0.0))

    return _over_chunks(chunk, None, x_BTD, targets_BT, config.loss_chunk)[1]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def summed_loss(x_BTD, head_DV, targets_BT, config: Config) -> Any:
    """Sum of cross-entropies over targets >= 0, holding the logits of one chunk of tokens at a
    time; float32 logits, but in the compute dtype where it is differentiated.
    """
    return losses_by_token(x_BTD, head_DV, targets_BT, config).sum()


def _over_chunks(body, carry, x_BTD, targets_BT, chunk: int, skip: bool = False) -> tuple[Any, Any]:
    """`body` on M chunks of C tokens, one after another: (carry, x_CD, t_C) -> (carry, results).

    Gives the last carry, and the results, arrays (C, ...), by token: (B, T, ...). The last chunk is
    filled up with ignored targets. skip: tokens with a target come first, and chunks without any
    are left out, their results being 0; not for gradients through it.
    """
    x, t = x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.reshape(-1)
    tokens = len(t)
    chunk = min(chunk, tokens)
    skip = skip and chunk < tokens
    if skip:
        order = jnp.argsort(t < 0, stable=True)
        x, t = x[order], t[order]
    short = -tokens % chunk
    if short:
        x = jnp.pad(x, ((0, short), (0, 0)))
        t = jnp.pad(t, (0, short), constant_values=-1)
    x_MCD, t_MC = x.reshape(-1, chunk, x.shape[-1]), t.reshape(-1, chunk)

    if len(t_MC) == 1:
        carry, results = body(carry, x_MCD[0], t_MC[0])
        results = jax.tree.map(lambda a: a[None], results)
    elif skip:
        chunks = (t_MC >= 0).any(axis=1).sum()
        carry, results = _scan_first(chunks, body, carry, x_MCD, t_MC)
    else:
        carry, results = jax.lax.scan(lambda c, xt: body(c, *xt), carry, (x_MCD, t_MC))

    def by_token(a):
        a = a.reshape(-1, *a.shape[2:])[:tokens]
        if skip:
            a = a[jnp.argsort(order)]
        return a.reshape(*targets_BT.shape, *a.shape[1:])

    return carry, jax.tree.map(by_token, results)


def _scan_first(count, body, carry, x_MCD, t_MC) -> tuple[Any, Any]:
    """`jax.lax.scan` over the first `count` chunks; the other results are 0."""
    shapes = jax.eval_shape(body, carry, x_MCD[0], t_MC[0])[1]
    zeros = jax.tree.map(lambda a: jnp.zeros((len(t_MC), *a.shape), a.dtype), shapes)

    def step(m, state):
        carry, results = state
        carry, result = body(carry, x_MCD[m], t_MC[m])
        return carry, jax.tree.map(lambda a, part: a.at[m].set(part), results, result)

    return jax.lax.fori_loop(0, count, step, (carry, zeros))


def _loss_of(scores_CV, t_C, config: Config):
    """Loss of each token of a chunk (C,), 0 where the target is negative, and the log-sum-exp of
    its logits.
    """
    logits_CV = _capped(scores_CV, config)
    lse_C = _log_sum_exp(_filled(logits_CV, -jnp.inf, config), config)
    # picked, then capped: the other way round XLA writes all capped logits down
    target_C1 = jnp.maximum(t_C, 0)[:, None]
    picked_C = _capped(jnp.take_along_axis(scores_CV, target_C1, axis=-1)[:, 0], config)
    return jnp.where(t_C >= 0, lse_C - picked_C, 0.0), lse_C


def _filled(logits_CV, value: float, config: Config):
    """The same with `value` in the padding of the vocabulary.

    Masked, not cut away: that would end a TPU's fusion with the matmul.
    """
    columns = logits_CV.shape[-1]
    if columns == config.vocab_size:
        return logits_CV
    return jnp.where(jnp.arange(columns) < config.vocab_size, logits_CV, value)


def _log_sum_exp(logits_CV, config: Config):
    """log sum exp of each row. Where a soft-cap bounds the logits no sum can overflow: that saves
    the pass over all of them that looks for the largest.
    """
    if 0 < config.softcap <= NO_OVERFLOW:
        return jnp.log(jnp.exp(logits_CV).sum(axis=-1))
    return jax.nn.logsumexp(logits_CV, axis=-1)


def _summed_loss_forward(x_BTD, head_DV, targets_BT, config: Config):
    """The loss and, while a chunk's logits are at hand, its gradients: backward has only to scale
    them.
    """
    on_tpu, elsewhere = (
        partial(_loss_and_gradients, config=config, is_tpu=is_tpu) for is_tpu in (True, False)
    )
    return jax.lax.platform_dependent(x_BTD, head_DV, targets_BT, tpu=on_tpu, default=elsewhere)


def _loss_and_gradients(x_BTD, head_DV, targets_BT, config: Config, is_tpu: bool):
    """Summed loss, and its gradients to x (B, T, D) and the head (D, V).

    On a TPU XLA fuses elementwise work into a matmul's inputs. So there the gradient of logits is
    never written: both matmuls that need it compute it as they read. Elsewhere it is written once.
    """
    head = head_DV.astype(config.operand_dtype)

    def chunk(head_grad, x_CD, t_C):
        # in the compute dtype, as nanochat has them: they are most of what the loss moves
        scores_CV = _scores(x_CD, head, config, config.dtype)
        loss_C, lse_C = _loss_of(scores_CV, t_C, config)

        def gradient(scores_CV, lse_C):
            logits_CV = _capped(scores_CV, config)
            # softmax minus one-hot; compared, not scattered, so that it stays in the fusion
            hit_CV = jnp.arange(scores_CV.shape[-1]) == t_C[:, None]
            d_CV = jnp.exp(logits_CV - lse_C[:, None]) - hit_CV
            # through the softcap's tanh
            if config.softcap:
                d_CV = d_CV * (1 - jnp.square(logits_CV / config.softcap))
            d_CV = _filled(d_CV, 0.0, config)
            return jnp.where(t_C[:, None] >= 0, d_CV, 0).astype(head.dtype)

        # summed over chunks in float32, whatever the compute dtype
        d_CV = gradient(_read_again(scores_CV), lse_C)
        head_grad += _head_gradient(x_CD, d_CV)
        if is_tpu:
            # behind a second, distinct barrier, or XLA would write the first and share it
            d_CV = gradient(*jax.lax.optimization_barrier((scores_CV, lse_C)))
        x_grad = jnp.einsum("CV,DV->CD", d_CV, head, preferred_element_type=x_CD.dtype)
        return head_grad, (loss_C, x_grad)

    zero = jnp.zeros(head_DV.shape, jnp.float32)
    skip = config.skip_ignored
    head_grad, (losses, x_grad) = _over_chunks(
        chunk, zero, x_BTD, targets_BT, config.loss_chunk, skip
    )
    return losses.sum(), (x_grad, head_grad)


def _read_again(scores_CV):
    """The same for a second use; narrow ones behind a barrier, or XLA may write one capped float32
    copy for both: to read what is bfloat16 twice moves less.
    """
    is_narrow = scores_CV.dtype.itemsize < 4
    return jax.lax.optimization_barrier(scores_CV) if is_narrow else scores_CV


def _head_gradient(x_CD, d_CV):
    """(D, V) in float32, of operands in the dtype of `d_CV`."""
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    if x_CD.dtype != d_CV.dtype:
        x_DC = written_out(x_CD.astype(d_CV.dtype).T)
        return product("DC,CV->DV", x_DC, d_CV)
    return product("CD,CV->DV", x_CD, d_CV)


def _summed_loss_backward(config, saved, g):
    x_grad, head_grad = saved
    return (g * x_grad).astype(x_grad.dtype), g * head_grad, None


summed_loss.defvjp(_summed_loss_forward, _summed_loss_backward)
