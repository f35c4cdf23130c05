"""Rotation and norm of queries and keys as kernels for a GPU: one pass over memory each way.

XLA takes a pass for the sums of squares and another for what they divide, and on the way back two
and more: 1.4 % of a training step on an H200 (LOG.md). The formulas are those of
`transformer.normed_rotation`, in float32 throughout. Letters are those of the transformer, and X is
rows: one head of one token each. Written in Pallas for Triton, imported where a kernel is made.
"""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp

from lib.config import Config
from lib.model.attention import is_ampere
from lib.model.gpu_trial import told_fault

# heads that one program turns: enough bytes in flight, few enough registers
ROWS = 32


def fits(x_BTNH, cos) -> bool:
    """Whether the kernels can turn these heads, here: a whole number of programs, halves a power of
    two wide, 16 at least, all rows at the positions of one `cos` (T, 1, H).
    """
    H = x_BTNH.shape[-1]
    half = H // 2
    is_power = half >= 16 and half & (half - 1) == 0
    heads = math.prod(x_BTNH.shape[:-1])
    return cos.ndim == 3 and is_power and heads % ROWS == 0 and is_ampere() and not fault(H)


@cache
def fault(H: int) -> str:
    """Why this GPU does without the kernels for heads of this width, which is told once; "" where
    they compile and agree with the formulas they stand for.
    """
    from lib.model.transformer import rms_norm, rope_tables, rotate

    scale, eps = Config.qk_scale, Config.norm_eps

    def tables(x):
        config = Config(head_dim=H, compute_dtype=str(x.dtype))
        return rope_tables(jnp.arange(64), config)

    def by_kernels(x, dy):
        cos, sin = tables(x)
        y, factor = forward(x, cos, sin, scale, eps)
        return y, backward(y, dy, factor, cos, sin, scale)

    def by_formulas(x, dy):
        cos, sin = tables(x)
        y, pull = jax.vjp(lambda x: scale * rms_norm(rotate(x, cos, sin), eps), x)
        return y, *pull(dy)

    what = "queries and keys are turned"
    return told_fault(what, by_kernels, by_formulas, shapes=[(1, 64, 2, H)] * 2)


def forward(x_BTNH, cos, sin, scale: float, eps: float, interpret: bool = False):
    """(heads turned, normed and multiplied by `scale`, the factor of each (B, T, N, 1))."""
    B, T, N, H = x_BTNH.shape
    kernel = partial(_forward, shape=(N, T), scale=scale, eps=eps)
    x_XH = x_BTNH.reshape(-1, H)
    results = (
        jax.ShapeDtypeStruct(x_XH.shape, x_XH.dtype),
        jax.ShapeDtypeStruct(x_XH.shape[:1], jnp.float32),
    )
    y_XH, factor_X = _call(kernel, [x_XH], [cos, sin], results, interpret)
    return y_XH.reshape(x_BTNH.shape), factor_X.reshape(B, T, N, 1)


def backward(y_BTNH, dy_BTNH, factor, cos, sin, scale: float, interpret: bool = False):
    """The gradient of what came in, from what went out, its gradient, and the factors."""
    _, T, N, H = y_BTNH.shape
    kernel = partial(_backward, shape=(N, T), scale=scale)
    arrays = [y_BTNH.reshape(-1, H), dy_BTNH.reshape(-1, H), factor.reshape(-1)]
    result = jax.ShapeDtypeStruct(arrays[0].shape, y_BTNH.dtype)
    return _call(kernel, arrays, [cos, sin], result, interpret).reshape(y_BTNH.shape)


def _call(kernel, arrays: list, tables: list, results, interpret: bool):
    """`kernel` on ROWS rows of arrays and results at a time, with the angles of all positions."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def rows_of(a):
        blocks = ROWS, *a.shape[1:]
        return pl.BlockSpec(blocks, lambda i: (i, *[0] * (a.ndim - 1)))

    # (T, H / 2): the second half is the first again, that of sin with the other sign
    tables = [t.reshape(len(t), -1)[:, : t.shape[-1] // 2] for t in tables]
    whole = [pl.BlockSpec(t.shape, lambda i: (0, 0)) for t in tables]
    call = pl.pallas_call(
        kernel,
        grid=(len(arrays[0]) // ROWS,),
        in_specs=[*map(rows_of, arrays), *whole],
        out_specs=jax.tree.map(rows_of, results),
        out_shape=results,
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    )
    return call(*arrays, *tables)


def _halves(ref):
    """Both halves of a block of heads, in float32."""
    half = ref.shape[-1] // 2
    return ref[:, :half].astype(jnp.float32), ref[:, half:].astype(jnp.float32)


def _write_halves(ref, first, second):
    half = ref.shape[-1] // 2
    ref[:, :half] = first.astype(ref.dtype)
    ref[:, half:] = second.astype(ref.dtype)


def _angles(cos_ref, sin_ref, shape: tuple[int, int]):
    """cos and sin of this program's rows. shape: (N, T); row (b T + t) N + n is head n of t."""
    from jax.experimental import pallas as pl

    row = pl.program_id(0) * ROWS + jnp.arange(ROWS)
    N, T = shape
    position = row // N % T
    column = jnp.arange(cos_ref.shape[-1])
    where = position[:, None], column[None, :]
    return cos_ref[where].astype(jnp.float32), sin_ref[where].astype(jnp.float32)


def _forward(x_ref, cos_ref, sin_ref, y_ref, factor_ref, *, shape, scale, eps):
    cos, sin = _angles(cos_ref, sin_ref, shape)
    first, second = _halves(x_ref)
    # rotation leaves lengths as they are
    mean_square = (first * first + second * second).sum(axis=1) / x_ref.shape[-1]
    factor = scale * jax.lax.rsqrt(mean_square + eps)
    factor_ref[:] = factor
    factor = factor[:, None]
    turned = first * cos + second * sin, second * cos - first * sin
    _write_halves(y_ref, turned[0] * factor, turned[1] * factor)


def _backward(y_ref, dy_ref, factor_ref, cos_ref, sin_ref, dx_ref, *, shape, scale):
    cos, sin = _angles(cos_ref, sin_ref, shape)
    y1, y2 = _halves(y_ref)
    dy1, dy2 = _halves(dy_ref)
    # what of the gradient would only change a head's length is taken away, the rest rotated back
    dot = (y1 * dy1 + y2 * dy2).sum(axis=1)
    along = dot / (y_ref.shape[-1] * scale * scale)
    along = along[:, None]
    factor = factor_ref[:][:, None]
    d1, d2 = factor * (dy1 - y1 * along), factor * (dy2 - y2 * along)
    _write_halves(dx_ref, d1 * cos - d2 * sin, d2 * cos + d1 * sin)
