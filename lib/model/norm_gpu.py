"""Norms of the residual stream as kernels for a GPU: one pass over memory each way.

XLA reads the stream once for the sums of squares and again for what they divide, and on the way
back all gradients twice. Here a sum and its norm are one kernel, and a norm's gradient another. The
formulas are those of `transformer.rms_norm`, in float32 throughout. Letters are those of the
transformer. Written in Pallas for Triton, imported where a kernel is made.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from lib.config import Config
from lib.model.attention import is_ampere
from lib.model.gpu_trial import told_fault

# tokens that one program norms: enough bytes in flight, few enough registers
ROWS = 2


def fits(x_BTD) -> bool:
    """Whether the kernels can norm this stream, here: a row of tokens a whole number of programs,
    which one token is not, and a width that comes apart into a few powers of two.
    """
    T, D = x_BTD.shape[1:]
    return T % ROWS == 0 and D % 64 == 0 and is_ampere() and not fault(D)


@cache
def fault(D: int) -> str:
    """Why this GPU does without the kernels for streams of this width, which is told once; "" where
    they compile and agree with the formulas they stand for.
    """
    from lib.model.transformer import rms_norm

    eps = Config.norm_eps

    def by_kernels(x, added, d_stream, *dh):
        stream, h, factor = forward(x, added, eps)
        return stream, h, backward(h, factor, d_stream, dh)

    def by_formulas(x, added, d_stream, *dh):
        stream = x + added
        h, pull = jax.vjp(lambda stream: rms_norm(stream, eps), stream)
        return stream, h, d_stream + pull(sum(dh))[0]

    what = "the residual stream is normed"
    return told_fault(what, by_kernels, by_formulas, shapes=[(2, 64, D)] * 6)


def summed_norm(x_BTD, added_BTD, eps: float, readers: int) -> Any:
    """(x + added, a tuple with its norm for each of its readers); `added` may be None.

    Readers get the norm one by one so that their gradients come back one by one: the pass that
    needs their sum adds them up. It begins with the norm, which readers keep for their own
    gradients, and a factor a token: the stream is not kept.
    """
    if added_BTD is None:
        return _norm(x_BTD, eps, readers)
    return _summed_norm(x_BTD, added_BTD, eps, readers)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _norm(x_BTD, eps, readers):
    return _norm_forward(x_BTD, eps, readers)[0]


def _norm_forward(x_BTD, eps, readers):
    # XLA takes the sums of squares in the pass that makes x: no kernel would save one
    x32 = x_BTD.astype(jnp.float32)
    factor_BT = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1) + eps)
    h_BTD = (x32 * factor_BT[..., None]).astype(x_BTD.dtype)
    return (x_BTD, (h_BTD,) * readers), (h_BTD, factor_BT)


def _norm_backward(eps, readers, kept, gradients):
    return (backward(*kept, *gradients),)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _summed_norm(x_BTD, added_BTD, eps, readers):
    return _summed_norm_forward(x_BTD, added_BTD, eps, readers)[0]


def _summed_norm_forward(x_BTD, added_BTD, eps, readers):
    stream_BTD, h_BTD, factor_BT = forward(x_BTD, added_BTD, eps)
    return (stream_BTD, (h_BTD,) * readers), (h_BTD, factor_BT)


def _summed_norm_backward(eps, readers, kept, gradients):
    dx_BTD = backward(*kept, *gradients)
    return dx_BTD, dx_BTD


_norm.defvjp(_norm_forward, _norm_backward)
_summed_norm.defvjp(_summed_norm_forward, _summed_norm_backward)


def forward(x_BTD, added_BTD, eps: float, interpret: bool = False):
    """(x + added, that divided by its root mean square, what it was multiplied by for that)."""
    stream = jax.ShapeDtypeStruct(x_BTD.shape, x_BTD.dtype)
    factor = jax.ShapeDtypeStruct(x_BTD.shape[:2], jnp.float32)
    kernel = partial(_forward, eps=eps)
    return _call(kernel, [x_BTD, added_BTD], (stream, stream, factor), interpret)


def backward(h_BTD, factor_BT, d_stream_BTD, dh_BTDs, interpret: bool = False):
    """The gradient of both that were added, from the norm, its factors, the gradient of the sum and
    those of the norm, one from each reader.
    """
    result = jax.ShapeDtypeStruct(h_BTD.shape, h_BTD.dtype)
    return _call(_backward, [h_BTD, factor_BT, d_stream_BTD, *dh_BTDs], result, interpret)


def _call(kernel, arrays: list, results, interpret: bool):
    """`kernel` on ROWS tokens of arrays and results at a time."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def tokens_of(a):
        blocks = None, ROWS, *a.shape[2:]
        return pl.BlockSpec(blocks, lambda i, row: (row, i, *[0] * (a.ndim - 2)))

    B, T = arrays[0].shape[:2]
    call = pl.pallas_call(
        kernel,
        grid=(T // ROWS, B),
        in_specs=[*map(tokens_of, arrays)],
        out_specs=jax.tree.map(tokens_of, results),
        out_shape=results,
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    )
    return call(*arrays)


def _parts(ref) -> list[slice]:
    """A block's width in parts, as Triton knows only powers of two: 1,280 is 1,024 and 256."""
    D = ref.shape[-1]
    parts, start = [], 0
    while start < D:
        width = 1 << (D - start).bit_length() - 1
        parts.append(slice(start, start + width))
        start += width
    return parts


def _read(ref, part: slice):
    return ref[:, part].astype(jnp.float32)


def _forward(x_ref, added_ref, stream_ref, h_ref, factor_ref, *, eps):
    parts = _parts(x_ref)
    stream = []
    for part in parts:
        # rounded as it is kept, so that the norm is that of what others read
        total = (_read(x_ref, part) + _read(added_ref, part)).astype(stream_ref.dtype)
        stream_ref[:, part] = total
        stream.append(total.astype(jnp.float32))
    mean_square = sum((x * x).sum(axis=1) for x in stream) / x_ref.shape[-1]
    factor = jax.lax.rsqrt(mean_square + eps)
    factor_ref[:] = factor
    for part, x in zip(parts, stream):
        h_ref[:, part] = (x * factor[:, None]).astype(h_ref.dtype)


def _backward(h_ref, factor_ref, d_stream_ref, *refs):
    *dh_refs, dx_ref = refs
    parts = _parts(h_ref)
    h = [_read(h_ref, part) for part in parts]
    dh = [sum(_read(ref, part) for ref in dh_refs) for part in parts]
    # what of the gradient would only change a token's length is taken away
    along = sum((a * b).sum(axis=1) for a, b in zip(h, dh)) / h_ref.shape[-1]
    factor, along = factor_ref[:][:, None], along[:, None]
    for part, a, b in zip(parts, h, dh):
        dx = _read(d_stream_ref, part) + factor * (b - a * along)
        dx_ref[:, part] = dx.astype(dx_ref.dtype)
