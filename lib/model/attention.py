"""Causal attention with windows and grouped heads: four implementations of one function.

Each entry of ATTENTION is `(q_BTNH, k_BSKH, v_BSKH, window=None, **options) -> o_BTNH` for training
and prefill, where S = T. Scores are scaled by 1/sqrt(H) inside. A query at i sees keys j with i -
window <= j <= i; window None means all of the past. Query head n reads key/value head n // (N/K).
Softmax is in float32 whatever the inputs are.
"""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lib.config import check_attention
from lib.files import UserError
from lib.model.kernels import MASKED, RESIDUAL_NAME, pallas, splash


def einsum(q_BTNH, k_BSKH, v_BSKH, window: int | None = None, *, block: int | None = None):
    """Attention in einsums, each block of queries against only the blocks of keys it can see.

    block: positions per block, default an eighth of T but at least 128 (fastest on CPU at T = 512
    and 2048).
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # Heads before positions: XLA's CPU matmul is 1.6 times faster than on the interleaved order.
    # The queries of a group share their keys, so they are just more rows (R = T G, position by
    # position) of the same matrices.
    q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, -1, H)
    o_BKRH = _blocked(
        q_BKRH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), window, block or max(128, T // 8)
    )
    return o_BKRH.reshape(B, K, T, N // K, H).swapaxes(1, 2).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _blocked(q_BKRH, k_BKSH, v_BKSH, window, block):
    return _blocked_forward(q_BKRH, k_BKSH, v_BKSH, window, block)[0]


def _blocked_scores(q_BKRH, k_BKSH, window, block):
    """For each block of queries: its rows and its keys, as slices, and all their scores, MASKED
    where not visible.
    """
    T, H = k_BKSH.shape[2:]
    G = q_BKRH.shape[2] // T
    for start in range(0, T, block):
        end, first = (
            min(start + block, T),
            0 if window is None else max(0, start - window) // block * block,
        )
        rows, keys = slice(start * G, end * G), slice(first, end)
        distance = np.repeat(np.arange(start, end), G)[:, None] - np.arange(first, end)
        visible = (distance >= 0) & (distance <= (T if window is None else window))
        s_BKRS = _product("BKRH,BKSH->BKRS", q_BKRH[:, :, rows], k_BKSH[:, :, keys]) * (
            1 / math.sqrt(H)
        )
        yield rows, keys, jnp.where(visible, s_BKRS, MASKED)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _blocked_forward(q_BKRH, k_BKSH, v_BKSH, window, block):
    outs, lses = [], []
    for _, keys, s_BKRS in _blocked_scores(q_BKRH, k_BKSH, window, block):
        top = s_BKRS.max(-1, keepdims=True)
        p_BKRS = jnp.exp(s_BKRS - top)
        total = p_BKRS.sum(-1, keepdims=True)
        outs.append(
            _product("BKRS,BKSH->BKRH", p_BKRS.astype(v_BKSH.dtype), v_BKSH[:, :, keys]) / total
        )
        lses.append(top + jnp.log(total))
    o_BKRH = checkpoint_name(jnp.concatenate(outs, 2).astype(q_BKRH.dtype), RESIDUAL_NAME)
    lse_BKR1 = checkpoint_name(jnp.concatenate(lses, 2), RESIDUAL_NAME)
    return o_BKRH, (q_BKRH, k_BKSH, v_BKSH, o_BKRH, lse_BKR1)


def _blocked_backward(window, block, residuals, do_BKRH):
    """Recomputing the probabilities is faster on CPU than reading them back, and holds none of
    them.
    """
    q_BKRH, k_BKSH, v_BKSH, o_BKRH, lse_BKR1 = residuals
    scale = 1 / math.sqrt(q_BKRH.shape[-1])
    delta_BKR1 = _product("BKRH,BKRH->BKR", o_BKRH, do_BKRH)[..., None]
    dq, dk, dv = [], [], []
    for rows, keys, s_BKRS in _blocked_scores(q_BKRH, k_BKSH, window, block):
        q, k, v, do = (
            q_BKRH[:, :, rows],
            k_BKSH[:, :, keys],
            v_BKSH[:, :, keys],
            do_BKRH[:, :, rows],
        )
        p_BKRS = jnp.exp(s_BKRS - lse_BKR1[:, :, rows])
        dp_BKRS = _product("BKRH,BKSH->BKRS", do, v)
        ds_BKRS = (scale * p_BKRS * (dp_BKRS - delta_BKR1[:, :, rows])).astype(q.dtype)
        dq.append(_product("BKRS,BKSH->BKRH", ds_BKRS, k))
        for parts, new in (
            (dk, _product("BKRS,BKRH->BKSH", ds_BKRS, q)),
            (dv, _product("BKRS,BKRH->BKSH", p_BKRS.astype(do.dtype), do)),
        ):
            # this block of queries is the first to see the last of these blocks of keys
            parts.append(0.0)
            for j in range(keys.start // block, len(parts)):
                parts[j] += new[:, :, j * block - keys.start :][:, :, :block]
    return tuple(
        jnp.concatenate(x, 2).astype(like.dtype)
        for x, like in ((dq, q_BKRH), (dk, k_BKSH), (dv, v_BKSH))
    )


_blocked.defvjp(_blocked_forward, _blocked_backward)


def jax_sdpa(q_BTNH, k_BSKH, v_BSKH, window: int | None = None):
    """`jax.nn.dot_product_attention`: cuDNN flash attention where it can do this, XLA elsewhere."""
    attend = functools.partial(
        jax.nn.dot_product_attention,
        q_BTNH,
        k_BSKH,
        v_BSKH,
        is_causal=True,
        local_window_size=None if window is None else (window, 0),
    )
    if _has_cudnn_flash(q_BTNH.dtype):
        # jax's answer to a head width that this GPU lacks
        with contextlib.suppress(NotImplementedError):
            return attend(implementation="cudnn")
    return attend(implementation="xla")


def _has_cudnn_flash(dtype) -> bool:
    """16-bit inputs on an NVIDIA GPU of compute capability 8.0 or more."""
    device = jax.devices()[0]
    return (
        dtype in (jnp.bfloat16, jnp.float16)
        and device.platform == "gpu"
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
        (_, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
        if S != T:
            raise UserError(
                f"attention got {T} queries and {S} keys: it is for training and prefill, "
                "where they are equal"
            )
        sizes = dict(sequence_len=T, head_dim=H, n_head=N, n_kv_head=K)
        check_attention(name, **sizes, window=window)
        if window is not None and window >= T - 1:
            window = None
        return attend(q_BTNH, k_BSKH, v_BSKH, window, **options)

    return attend_checked


IMPLEMENTATIONS = {"einsum": einsum, "jax": jax_sdpa, "splash": splash, "pallas": pallas}
ATTENTION = {name: checked(name, attend) for name, attend in IMPLEMENTATIONS.items()}
