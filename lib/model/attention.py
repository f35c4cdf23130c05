"""Causal attention with windows and grouped heads: four implementations of one function.

Each entry of ATTENTION is `(q_BTNH, k_BSKH, v_BSKH, window=None, **options) -> o_BTNH` for training
and prefill, where S = T. Scores are scaled by 1/sqrt(H) inside. A query at i sees keys j with i -
window <= j <= i; window None means all of the past. Query head n reads key/value head n // (N/K).
Softmax is in float32 whatever the inputs are.
"""

import contextlib
import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lib.config import check_attention
from lib.files import UserError
from lib.model.kernels import MASKED, RESIDUAL_NAME, pallas, splash
from lib.model.linear import written_out


def einsum(
    q_BTNH, k_BSKH, v_BSKH, window: int | None = None, *, block: int | None = None, operands=None
):
    """Attention in einsums, each block of queries against only the blocks of keys it can see.

    block: positions per block, default an eighth of T but at least 128 (fastest on CPU at T = 512
    and 2048). operands: the dtype in which products multiply, default that of the queries.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    G = N // K
    block = block or max(128, T // 8)
    # Heads before positions: XLA's CPU matmul is 1.6 times faster than on the interleaved order.
    # The queries of a group share their keys, so they are just more rows (R = T G, position by
    # position) of the same matrices.
    q_BTKGH = q_BTNH.reshape(B, T, K, G, H)
    q_BKRH = q_BTKGH.swapaxes(1, 2).reshape(B, K, -1, H)
    k_BKSH = k_BSKH.swapaxes(1, 2)
    v_BKSH = v_BSKH.swapaxes(1, 2)
    operands = operands or q_BTNH.dtype
    o_BKRH = cast(Any, _blocked(q_BKRH, k_BKSH, v_BKSH, window, block, operands))

    # and back
    o_BKTGH = o_BKRH.reshape(B, K, T, G, H)
    return o_BKTGH.swapaxes(1, 2).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _blocked(q_BKRH, k_BKSH, v_BKSH, window, block, operands):
    o_BKRH, _ = _blocked_forward(q_BKRH, k_BKSH, v_BKSH, window, block, operands)
    return o_BKRH


def _blocked_scores(q_BKRH, k_BKSH, window, block):
    """For each block of queries: its rows and its keys, as slices, and all their scores, MASKED
    where not visible.
    """
    T, H = k_BKSH.shape[2:]
    G = q_BKRH.shape[2] // T
    scale = 1 / math.sqrt(H)
    reach = T if window is None else window
    for start in range(0, T, block):
        # these queries see the blocks of keys from the first in the window to their own
        end = min(start + block, T)
        oldest = max(0, start - reach)
        first = oldest // block * block
        rows = slice(start * G, end * G)
        keys = slice(first, end)

        # which of those each query sees, known when this is traced
        query = np.repeat(np.arange(start, end), G)
        key = np.arange(first, end)
        distance = query[:, None] - key
        visible = (distance >= 0) & (distance <= reach)

        s_BKRS = _product("BKRH,BKSH->BKRS", q_BKRH[:, :, rows], k_BKSH[:, :, keys])
        yield rows, keys, jnp.where(visible, s_BKRS * scale, MASKED)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _blocked_forward(q_BKRH, k_BKSH, v_BKSH, window, block, operands):
    """o, and what backward needs."""
    dtype = q_BKRH.dtype
    q_BKRH, k_BKSH, v_BKSH = (a.astype(operands) for a in (q_BKRH, k_BKSH, v_BKSH))
    outs, lses = [], []
    for _, keys, s_BKRS in _blocked_scores(q_BKRH, k_BKSH, window, block):
        # softmax, and the log of its sum for backward
        top_BKR1 = s_BKRS.max(-1, keepdims=True)
        p_BKRS = jnp.exp(s_BKRS - top_BKR1)
        total_BKR1 = p_BKRS.sum(-1, keepdims=True)
        # divided after the product: there are fewer outputs than probabilities
        v = v_BKSH[:, :, keys]
        weighed_BKRH = _product("BKRS,BKSH->BKRH", p_BKRS.astype(v.dtype), v)
        outs.append(weighed_BKRH / total_BKR1)
        lses.append(top_BKR1 + jnp.log(total_BKR1))

    # named, so that rematerialization can keep them
    o_BKRH = jnp.concatenate(outs, 2).astype(dtype)
    o_BKRH = checkpoint_name(o_BKRH, RESIDUAL_NAME)
    lse_BKR1 = checkpoint_name(jnp.concatenate(lses, 2), RESIDUAL_NAME)
    return o_BKRH, (q_BKRH, k_BKSH, v_BKSH, o_BKRH, lse_BKR1)


def _blocked_backward(window, block, operands, residuals, do_BKRH):
    """Recomputing the probabilities is faster on CPU than reading them back, and holds none."""
    q_BKRH, k_BKSH, v_BKSH, o_BKRH, lse_BKR1 = residuals
    scale = 1 / math.sqrt(q_BKRH.shape[-1])
    # what softmax's gradient takes away: each query's o times do
    delta_BKR1 = _product("BKRH,BKRH->BKR", o_BKRH, do_BKRH)[..., None]
    dtype = do_BKRH.dtype
    do_BKRH = do_BKRH.astype(operands)
    over_rows = _over_rows_mixed if dtype != operands else _over_rows

    # a block of queries each, and of keys
    dq: list = []
    dk: list = []
    dv: list = []
    for rows, keys, s_BKRS in _blocked_scores(q_BKRH, k_BKSH, window, block):
        q = q_BKRH[:, :, rows]
        k = k_BKSH[:, :, keys]
        v = v_BKSH[:, :, keys]
        do = do_BKRH[:, :, rows]

        # probabilities again, and through softmax the gradient of the scores
        p_BKRS = jnp.exp(s_BKRS - lse_BKR1[:, :, rows])
        dp_BKRS = _product("BKRH,BKSH->BKRS", do, v)
        ds_BKRS = scale * p_BKRS * (dp_BKRS - delta_BKR1[:, :, rows])
        ds_BKRS = ds_BKRS.astype(q.dtype)

        # queries are complete at once; keys are seen by several blocks of queries
        dq.append(_product("BKRS,BKSH->BKRH", ds_BKRS, k))
        dk_BKSH = over_rows(ds_BKRS, q)
        _add_blocks(dk, dk_BKSH, keys.start, block)
        dv_BKSH = over_rows(p_BKRS.astype(do.dtype), do)
        _add_blocks(dv, dv_BKSH, keys.start, block)

    return (
        jnp.concatenate(dq, 2).astype(dtype),
        jnp.concatenate(dk, 2).astype(dtype),
        jnp.concatenate(dv, 2).astype(dtype),
    )


def _over_rows(w_BKRS, a_BKRH):
    """(B, K, S, H): for each key the sum over the rows of its queries, weighed."""
    return _product("BKRS,BKRH->BKSH", w_BKRS, a_BKRH)


def _over_rows_mixed(w_BKRS, a_BKRH):
    """`_over_rows` of bfloat16 on a CPU."""
    w_BKSR = written_out(w_BKRS.swapaxes(2, 3))
    return _product("BKSR,BKRH->BKSH", w_BKSR, a_BKRH)


def _add_blocks(parts: list, new_BKSH, start: int, block: int):
    """Add to each block of keys its part of a gradient that begins at key `start`.

    Each block of queries is the first to see its last block of keys: there is one more of them.
    """
    parts.append(0.0)
    for j in range(start // block, len(parts)):
        begin = j * block - start
        parts[j] += new_BKSH[:, :, begin:][:, :, :block]


_blocked.defvjp(_blocked_forward, _blocked_backward)


# the forward pass of cuDNN's attention, as jax calls it
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"


def jax_sdpa(q_BTNH, k_BSKH, v_BSKH, window: int | None = None):
    """`jax.nn.dot_product_attention`: cuDNN flash attention where it can do this, XLA elsewhere."""
    # so many keys to the left of each query, none to the right
    local_window = None if window is None else (window, 0)
    attend = functools.partial(
        jax.nn.dot_product_attention,
        q_BTNH,
        k_BSKH,
        v_BSKH,
        is_causal=True,
        local_window_size=local_window,
    )
    if _has_cudnn_flash(q_BTNH.dtype):
        # jax's answer to a head width that this GPU lacks
        with contextlib.suppress(NotImplementedError):
            return attend(implementation="cudnn")
    return attend(implementation="xla")


def _has_cudnn_flash(dtype) -> bool:
    """16-bit inputs on a GPU that has it."""
    return dtype in (jnp.bfloat16, jnp.float16) and is_ampere()


def is_ampere() -> bool:
    """Whether this is an NVIDIA GPU of compute capability 8.0 or more."""
    device = jax.devices()[0]
    return (
        device.platform == "gpu"
        and "cuda" in device.client.platform_version
        and float(device.compute_capability) >= 8
    )


# ---- by name -------------------------------------------------------------------------------------


def checked(name: str, attend):
    """`attend` with its sizes checked when it is traced; a window that covers the whole sequence
    becomes None.
    """

    @functools.wraps(attend)
    def attend_checked(q_BTNH, k_BSKH, v_BSKH, window: int | None = None, **options):
        _, T, N, H = q_BTNH.shape
        _, S, K, _ = k_BSKH.shape
        if S != T:
            raise UserError(
                f"attention got {T} queries and {S} keys: it is for training and prefill, "
                "where they are equal"
            )
        sizes = dict(sequence_len=T, head_dim=H, n_head=N, n_kv_head=K)
        check_attention(name, **sizes, window=window)

        # without a window there is less to compute
        if window is not None and window >= T - 1:
            window = None
        return attend(q_BTNH, k_BSKH, v_BSKH, window, **options)

    return attend_checked


IMPLEMENTATIONS = {
    "einsum": einsum,
    "jax": jax_sdpa,
    "splash": splash,
    "pallas": pallas,
}
ATTENTION = {name: checked(name, attend) for name, attend in IMPLEMENTATIONS.items()}
