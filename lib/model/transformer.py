"""The transformer, to be read beside the papers: one block, and one forward for training, prefill
and decoding.

A decoder-only GPT with rotary embeddings, grouped heads and windows. What departs from the
textbook: queries and keys are normalised (`qk_norm`); each layer scales its input and mixes the
embedding back in (`resid_scales`, `x0_scales`); the values of every other layer get an embedding of
the token (`value_embeds`); each embedding is mixed with the one before it (`smear`); a share of the
middle layer's output is subtracted before the head (`backout`).

Letters of a name are its axes: B batch, T position, D width, F mlp width, N query heads, K
key/value heads, H head width, V vocabulary. `gather`, `enter`, `leave` and `own_part` do nothing on
one device; over a mesh they are where the devices talk (lib.parallel).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lib.config import SMEAR_CHANNELS, VALUE_GATE_CHANNELS, Config
from lib.model import norm_gpu, rotary_gpu
from lib.model.attention import ATTENTION, CUDNN_FORWARD
from lib.model.cache import Cache, advance, cached_attention
from lib.model.decoding import cast_matrices, is_for_few_rows, is_unstacked
from lib.model.head import head_matrix, logits, logprobs_by_token, losses_by_token, summed_loss
from lib.model.kernels import BLOCKS, RESIDUAL_NAME
from lib.model.linear import grad_barrier, linear, merge_heads, scaled
from lib.model.tables import token_embedding, value_embeddings
from lib.parallel.collectives import enter, gather, is_split, leave, own_part
from lib.params import unstack

# what remat="dots" keeps beside each layer's input (q and k normed and rotated): backward
# recomputes norms, activations and the attention's output projection (3 % of a step for a tenth of
# the memory), no wide matrix product, and attention only for attention=jax without cuDNN
SAVED = ("q", "k", "v", RESIDUAL_NAME, "mlp_in", "mlp_gate")


def kept_by_dots(primitive, *args, **params) -> bool:
    """What remat="dots" keeps, as `jax.checkpoint` asks: what has a name in SAVED, and what cuDNN's
    attention gives, which only jax could name.
    """
    if primitive.name == CUDNN_FORWARD:
        return True
    return jax.checkpoint_policies.save_only_these_names(*SAVED)(primitive, *args, **params)


# ---- parts ---------------------------------------------------------------------------------------


def rms_norm(x, eps: float = Config.norm_eps):
    """x / rms(x) over the last axis, without weights; the usual eps is float32's machine epsilon,
    as PyTorch's is.
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype)


def rope_tables(positions, config: Config):
    """(cos, sin with the sign of its half), each (*positions.shape, 1, H), in the compute dtype as
    nanochat has them.
    """
    half = config.head_dim // 2
    frequency = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos = jnp.cos(angle).astype(config.dtype)
    sin = jnp.sin(angle).astype(config.dtype)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, -sin], axis=-1)


def rotate(x_BTNH, cos, sin):
    """Rotary embedding over split halves, by minus the angle (nanochat's sign; Su et al. 2021)."""
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    # XLA:CPU takes three passes for the halves one by one
    return x_BTNH * cos + jnp.concatenate([second, first], axis=-1) * sin


def turned(x_BTNH, rope, config: Config, name: str):
    """Queries or keys, rotated to their positions, normalised (`qk_norm`), sharpened (`qk_scale`);
    remat="dots" keeps them under `name`.

    Rotation leaves lengths as they are, so the norm is taken of what comes in: nothing turned is
    read again for it.
    """
    if not config.qk_norm:
        return checkpoint_name(rotate(x_BTNH, *rope) * config.qk_scale, name)
    return normed_rotation(x_BTNH, *rope, config.qk_scale, config.norm_eps, name)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def normed_rotation(x_BTNH, cos, sin, scale: float, eps: float, name: str) -> Any:
    """Heads rotated, then divided by their root mean square and multiplied by `scale`.

    Its gradient is computed from the output, which is kept for attention's gradient anyway, and one
    factor a head: the input is not kept, and backward only rotates the gradient back.
    """
    return _normed_rotation_forward(x_BTNH, cos, sin, scale, eps, name)[0]


def _normed_rotation_forward(x_BTNH, cos, sin, scale, eps, name):
    if rotary_gpu.fits(x_BTNH, cos):
        y_BTNH, factor = rotary_gpu.forward(x_BTNH, cos, sin, scale, eps)
    else:
        x32 = x_BTNH.astype(jnp.float32)
        factor = scale * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
        y_BTNH = (rotate(x_BTNH, cos, sin).astype(jnp.float32) * factor).astype(x_BTNH.dtype)
    y_BTNH, factor = checkpoint_name((y_BTNH, factor), name)
    return y_BTNH, (y_BTNH, factor, cos, sin)


def _normed_rotation_backward(scale, eps, name, kept, dy_BTNH):
    y_BTNH, factor, cos, sin = kept
    if rotary_gpu.fits(y_BTNH, cos):
        return rotary_gpu.backward(y_BTNH, dy_BTNH, factor, cos, sin, scale), None, None
    y32, dy32 = y_BTNH.astype(jnp.float32), dy_BTNH.astype(jnp.float32)
    # what of the gradient would only change a head's length is taken away, the rest rotated back
    along = jnp.mean(y32 * dy32, axis=-1, keepdims=True) / (scale * scale)
    dx32 = factor * (dy32 - y32 * along)
    return rotate(dx32.astype(y_BTNH.dtype), cos, -sin), None, None


normed_rotation.defvjp(_normed_rotation_forward, _normed_rotation_backward)


def full_attention(config: Config, window: int):
    """What a block attends with over whole rows: attend(q, k, v) -> (o, None), by the configured
    implementation.
    """
    implementation = ATTENTION[config.attention_name]
    visible = window if window < config.sequence_len else None
    options = {}
    if config.attention_block and config.attention_name in BLOCKS:
        options["block"] = config.attention_block
    # the mixed mode is for CPUs, whose attention this is
    if config.attention_name == "einsum":
        options["operands"] = config.operand_dtype

    def attend(q_BTNH, k_BSKH, v_BSKH):
        return implementation(q_BTNH, k_BSKH, v_BSKH, visible, **options), None

    return attend


# ---- the block -----------------------------------------------------------------------------------


def block(x_BTD, x0_BTD, w, ve_BTKH, config: Config, rope, attend):
    """One layer: (the residual stream after it, what `attend` kept).

    w and ve_BTKH: the weights and value embeddings of this layer only. attend(q, k, v) -> (o, kept)
    is `full_attention` in training and `cached_attention` in decoding: the block doesn't know
    which.
    """
    x_BTD, w = grad_barrier((x_BTD, w))
    w = {name: gather(f"blocks.{name}", a, stacked=True) for name, a in w.items()}

    # learned scales of the stream and of the embedding that is mixed back in
    if config.resid_scales:
        x_BTD = scaled(w["resid_scale"], x_BTD)
    if config.x0_scales:
        x_BTD = x_BTD + scaled(w["x0_scale"], x0_BTD)

    with jax.named_scope("attn"):
        # read by queries, keys and values
        x_BTD, h_BTDs = summed_norm(x_BTD, None, config, readers=3)
        out_BTD, kept = self_attention(h_BTDs, w, ve_BTKH, config, rope, attend)
        out_BTD = leave(out_BTD)
    with jax.named_scope("mlp"):
        x_BTD, (h_BTD,) = summed_norm(x_BTD, out_BTD, config, readers=1)
        x_BTD = x_BTD + leave(mlp(h_BTD, w, config))
    return x_BTD, kept


def summed_norm(x_BTD, added_BTD, config: Config, readers: int):
    """(x + added, a tuple with its norm for each of its readers); `added` may be None.

    All of the tuple are one array. Where a GPU's kernels take it, each reader's gradient comes back
    by itself and is summed in the norm's own pass.
    """
    # split over a tensor axis, the devices would sum each reader's gradient
    if not is_split() and norm_gpu.fits(x_BTD):
        return norm_gpu.summed_norm(x_BTD, added_BTD, config.norm_eps, readers)
    if added_BTD is not None:
        x_BTD = x_BTD + added_BTD
    return x_BTD, (enter(rms_norm(x_BTD, config.norm_eps)),) * readers


def self_attention(h_BTDs, w, ve_BTKH, config: Config, rope, attend):
    """Queries, keys and values of a normed stream, given once for each of them, attended and
    projected back: (out (B, T, D), what was kept).
    """
    q_in_BTD, k_in_BTD, v_in_BTD = h_BTDs
    with jax.named_scope("qkv"):
        q_BTNH = linear("BTD,DNH->BTNH", q_in_BTD, w["wq"])
        k_BTKH = linear("BTD,DKH->BTKH", k_in_BTD, w["wk"])
        v_BTKH = checkpoint_name(linear("BTD,DKH->BTKH", v_in_BTD, w["wv"]), "v")

    # every other layer: the token's own embedding, let in by a gate per head between 0 and 3
    if ve_BTKH is not None:
        with jax.named_scope("value_embed"):
            gate_in_BTC = v_in_BTD[..., :VALUE_GATE_CHANNELS]
            gate_BTK = 3 * jax.nn.sigmoid(jnp.einsum("BTC,CK->BTK", gate_in_BTC, w["value_gate"]))
            v_BTKH = v_BTKH + scaled(gate_BTK[..., None], ve_BTKH)

    with jax.named_scope("rope"):
        q_BTNH = turned(q_BTNH, rope, config, "q")
        k_BTKH = turned(k_BTKH, rope, config, "k")

    with jax.named_scope("attention"):
        o_BTNH, kept = attend(q_BTNH, k_BTKH, v_BTKH)
    with jax.named_scope("attention_out"):
        return merge_heads(o_BTNH, w["wo"]), kept


def mlp(h_BTD, w, config: Config):
    """Two linear layers around an activation: squared ReLU, GELU, or SwiGLU with a third matrix as
    its gate.
    """
    a_BTF = checkpoint_name(linear("BTD,DF->BTF", h_BTD, w["w_in"]), "mlp_in")
    if config.mlp == "relu2":
        a_BTF = jnp.square(jax.nn.relu(a_BTF))
    elif config.mlp == "gelu":
        a_BTF = jax.nn.gelu(a_BTF)
    else:
        gate_BTF = checkpoint_name(linear("BTD,DF->BTF", h_BTD, w["w_gate"]), "mlp_gate")
        # XLA would make the gate's gradient anew, of two arrays, in each product that reads it
        gate_BTF, a_BTF = grad_barrier((gate_BTF, a_BTF))
        a_BTF = jax.nn.silu(gate_BTF) * a_BTF
    return linear("BTF,FD->BTD", a_BTF, w["w_out"])


# ---- before the layers ---------------------------------------------------------------------------


def embed(params, config: Config, tokens_BT, last_B=None):
    """Token embeddings, normed (`embed_norm`), each with a gated share of the one before it
    (`smear`).

    last_B: the token before each row's first, where the rows are continued; -1, or None for all,
    where there is none.
    """

    def look_up(ids):
        x = token_embedding(params, ids, config)
        return rms_norm(x, config.norm_eps) if config.embed_norm else x

    x_BTD = look_up(tokens_BT)
    if not config.smear:
        return x_BTD

    # the embedding before each position, zeros before the first of all
    if last_B is None:
        before_BTD = jnp.pad(x_BTD[:, :-1], ((0, 0), (1, 0), (0, 0)))
    else:
        last_B1 = last_B[:, None]
        nothing = jnp.zeros((), config.dtype)  # of this type in every converter too
        first_B1D = jnp.where(last_B1[..., None] >= 0, look_up(last_B1), nothing)
        before_BTD = jnp.concatenate([first_B1D, x_BTD[:, :-1]], axis=1)

    gate_C = params["smear"]["gate"].astype(config.dtype)
    gate_BT = jax.nn.sigmoid(x_BTD[..., :SMEAR_CHANNELS] @ gate_C)
    share_BT = scaled(params["smear"]["scale"], gate_BT)
    return x_BTD + scaled(share_BT[..., None], before_BTD)


# ---- the layers ----------------------------------------------------------------------------------


def group_size(config: Config) -> tuple[int, int]:
    """(layers per scanned group, groups): the longest run of equal groups from layer 0; what is
    left is unrolled.
    """
    period = math.lcm(len(config.window_pattern), 2 if config.value_embeds else 1)
    groups = config.n_layer // period
    # the last layer is always long, whatever the pattern says
    if groups and config.windows[: groups * period] != config.windows[:period] * groups:
        groups -= 1
    return period, groups if config.scan_layers and groups > 1 else 0


def layers(x_BTD, params, tokens_BT, config: Config, rope):
    """All layers over whole rows: (the last one's output, the middle one's for backout)."""
    x0_BTD = x_BTD
    with jax.named_scope("value_embed"):
        ve = value_embeddings(params, tokens_BT, config)

    def layer(x_BTD, w, ve_BTKH, window, pick=None):
        # with `pick`, w and ve_BTKH are a whole group's, from which it takes this layer's
        attend = full_attention(config, window)

        def run(x_BTD, x0_BTD, w, ve_BTKH):
            # cut out of its group here, where backward does it again: a cut made outside would be
            # kept beside the group, which doubles all weights
            if pick:
                w, ve_BTKH = pick(w, ve_BTKH)
            return block(x_BTD, x0_BTD, w, ve_BTKH, config, rope, attend)[0]

        # a scan keeps forward from backward anyway; a barrier as well would have each kept array
        # copied out of its stack
        prevent_cse = pick is None
        if config.remat == "layer":
            run = jax.checkpoint(run, prevent_cse=prevent_cse)
        elif config.remat == "dots":
            run = jax.checkpoint(run, policy=kept_by_dots, prevent_cse=prevent_cse)
        return run(x_BTD, x0_BTD, w, ve_BTKH)

    middle_BTD = jnp.zeros_like(x_BTD) if config.backout else None
    first = 0
    period, groups = group_size(config)
    if groups and not is_unstacked(params):
        x_BTD, middle_BTD = scan_groups(x_BTD, middle_BTD, params["blocks"], ve, config, layer)
        first = groups * period

    # the others one by one, which is all of them where nothing is scanned
    if first < config.n_layer and not is_unstacked(params):
        params = unstack({**params, "value_embeds": ve}, config)
        ve = params["value_embeds"]
    for i in range(first, config.n_layer):
        with jax.named_scope(f"layer{i}"):
            x_BTD = layer(x_BTD, params["blocks"][i], ve.get(i), config.windows[i])
        if i == config.n_layer // 2:
            middle_BTD = x_BTD
    return x_BTD, middle_BTD


def scan_groups(x_BTD, middle_BTD, blocks, ve, config: Config, layer):
    """The layers that come in equal groups, one group compiled and scanned: (x, the middle layer's
    output if it is here).
    """
    period, groups = group_size(config)
    value_layers = [i for i in config.value_layers if i < period]
    middle_group, middle = divmod(config.n_layer // 2, period)

    def fold(stack, per_group):
        return stack[: groups * per_group].reshape(groups, per_group, *stack.shape[1:])

    per_group = {name: period for name in blocks} | {"value_gate": len(value_layers)}
    weights = {name: fold(stack, per_group[name]) for name, stack in blocks.items()}
    values = fold(ve, len(value_layers)) if config.value_embeds else None

    def cut(i):
        """What takes layer i's weights and value embeddings from those of its group."""

        def pick(weights, values):
            w = {name: stack[i] for name, stack in weights.items() if name != "value_gate"}
            if i not in value_layers:
                return w, None
            nth = value_layers.index(i)
            return w | {"value_gate": weights["value_gate"][nth]}, values[nth]

        return pick

    def group(carry, group_inputs):
        x_BTD, middle_BTD = carry
        weights, values, number = group_inputs
        for i in range(period):
            x_BTD = layer(x_BTD, weights, values, config.windows[i], cut(i))
            if config.backout and i == middle:
                middle_BTD = jnp.where(number == middle_group, x_BTD, middle_BTD)
        return (x_BTD, middle_BTD), None

    inputs = weights, values, jnp.arange(groups)
    carry, _ = jax.lax.scan(group, (x_BTD, middle_BTD), inputs)
    return carry


# ---- the whole -----------------------------------------------------------------------------------


def hidden(params, config: Config, tokens_BT, cache: Cache | None = None) -> tuple[Any, Any]:
    """The final normed residual stream (B, T, D) that the head reads, and the cache with these
    tokens added.
    """
    if cache is not None:
        return continued(params, config, tokens_BT, cache)
    with jax.named_scope("embed"):
        x_BTD = embed(params, config, tokens_BT)
    # once for all layers, so that their stacked gradients are held in their dtype too
    params = params | {"blocks": cast_matrices(params["blocks"], config.operand_dtype)}
    rope = rope_tables(jnp.arange(tokens_BT.shape[1]), config)
    x_BTD, middle_BTD = layers(x_BTD, params, tokens_BT, config, rope)
    return final_norm(x_BTD, middle_BTD, params, config), None


def continued(params, config: Config, tokens_BT, cache: Cache):
    """`hidden` where tokens_BT (-1 behind the end of a row) continue the rows of a cache."""
    real_BT = tokens_BT >= 0
    tokens_BT = jnp.maximum(tokens_BT, 0)
    with jax.named_scope("embed"):
        x_BTD = embed(params, config, tokens_BT, cache.last)
    params = params | {"blocks": cast_matrices(params["blocks"], config.dtype)}
    if not is_unstacked(params):
        params = unstack(params, config)

    # each row goes on where it stopped; padding has no position
    position_BT = cache.length[:, None] + jnp.arange(tokens_BT.shape[1])
    rope = rope_tables(position_BT, config)
    position_BT = jnp.where(real_BT, position_BT, -1)

    ve = value_embeddings(params, tokens_BT, config)
    through = cached_blocks(x_BTD, params["blocks"], ve, config, rope, cache, position_BT)
    x_BTD, middle_BTD, keys, values = through
    cache = advance(cache, keys, values, tokens_BT, real_BT)
    return final_norm(x_BTD, middle_BTD, params, config), cache


def cached_blocks(x_BTD, blocks: list, ve: dict, config: Config, rope, cache: Cache, position_BT):
    """All blocks over tokens that continue a cache, at positions that are negative for padding:
    (the last one's output, the middle one's, the new rings of keys, those of values).
    """
    x0_BTD, middle_BTD = x_BTD, None
    keys, values = [], []
    for i, w in enumerate(blocks):
        # as one matrix: XLA:CPU would transpose the weight for every token
        if not isinstance(w["wo"], dict):
            w = w | {"wo": w["wo"].reshape(-1, w["wo"].shape[-1])}
        ring = cache.k[i], cache.v[i]
        attend = cached_attention(
            *ring, position_BT, cache.length, config.windows[i], is_for_few_rows(w["wo"])
        )
        x_BTD, (k, v) = block(x_BTD, x0_BTD, w, ve.get(i), config, rope, attend)
        keys.append(k)
        values.append(v)
        if i == config.n_layer // 2:
            middle_BTD = x_BTD
    return x_BTD, middle_BTD, keys, values


def final_norm(x_BTD, middle_BTD, params, config: Config):
    """The stream without its learned share of the middle layer's output, normed."""
    if config.backout:
        x_BTD = x_BTD - scaled(params["backout"], middle_BTD)
    return rms_norm(x_BTD, config.norm_eps)


def forward(params, config: Config, tokens_BT, cache: Cache | None = None) -> tuple[Any, Any]:
    """Logits (B, T, V) in float32 after `tokens_BT`, and the updated cache (None without one).

    Without a cache this is the training forward over whole rows. With one (see `init_cache`) the
    tokens continue each row: many at once to prefill, one at a time to decode. Rows that get fewer
    are padded behind with -1, which adds nothing to the cache and whose logits mean nothing. TPU
    kernels are compiled as `kernels.compiled_kernels` says.
    """
    x_BTD, cache = hidden(params, config, tokens_BT, cache)
    return logits(params, config, x_BTD), cache


# ---- losses --------------------------------------------------------------------------------------


def loss_sums(params, config: Config, tokens_BT, targets_BT) -> tuple[Any, Any]:
    """(sum of losses, number of targets >= 0): what gradient accumulation adds up.

    Traced for one device's share of a mesh, it sums over the share's rows and over its part of each
    row (tensor axis).
    """
    x_BTD, _ = hidden(params, config, tokens_BT)
    with jax.named_scope("loss"):
        x_BTD = own_part(enter(x_BTD), axis=1)
        targets_BT = own_part(targets_BT, axis=1)
        total = summed_loss(x_BTD, enter(head_matrix(params, config)), targets_BT, config)
    return total, jnp.sum(targets_BT >= 0)


def loss_fn(params, config: Config, tokens_BT, targets_BT):
    """Mean cross-entropy in nats over targets >= 0 (0 when there are none), and {"loss_sum",
    "count"}.
    """
    total, count = loss_sums(params, config, tokens_BT, targets_BT)
    return total / jnp.maximum(count, 1), {"loss_sum": total, "count": count}


def token_losses(params, config: Config, tokens_BT, targets_BT):
    """Cross-entropy in nats per token (B, T) in float32, 0 where the target is negative; not meant
    for gradients.
    """
    x_BTD, _ = hidden(params, config, tokens_BT)
    return losses_by_token(x_BTD, head_matrix(params, config), targets_BT, config)


def token_logprobs(params, config: Config, tokens_BT, targets_BT) -> tuple[Any, Any]:
    """Log-probability of each target and entropy of what was foreseen there, (B, T) in nats, 0
    where the target is negative; for gradients too.
    """
    x_BTD, _ = hidden(params, config, tokens_BT)
    return logprobs_by_token(x_BTD, head_matrix(params, config), targets_BT, config)
