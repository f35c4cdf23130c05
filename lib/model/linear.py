"""The linear layer, for weights in floats or int8, stored by inputs or by outputs, with gradients
that are cheap to schedule.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lib.model import few_rows


def linear(spec: str, x, w) -> Any:
    """`jnp.einsum(spec, x, w)` for a weight in floats, or in int8 with a scale per output.

    Operands are multiplied in the weight's dtype, results come in that of `x`: float32 `x` and
    bfloat16 weights are the mixed mode.

    An int8 weight is {"int8": (outputs..., inputs), "scale": (outputs...)}, as `decoding.quantized`
    makes it; one in floats may be {"by_output": (outputs..., inputs)}, as `decoding.by_outputs`
    makes it; and {"few_rows": (outputs..., inputs)} is any of them for a CPU, with its "scale" if
    it has one, as `decoding.for_few_rows` makes it.
    """
    if not isinstance(w, dict):
        return _float_linear(spec, x, w)
    if "by_output" in w:
        return _by_output_linear(spec, x, w["by_output"])
    return narrow_linear(spec, x, w, x.dtype)


def narrow_linear(spec: str, x, w, dtype) -> Any:
    """`linear` for a weight in int8 or one for few rows, with results in `dtype`."""
    if "few_rows" in w:
        stored, y_MO = w["few_rows"], _few_rows_linear(x, w)
    else:
        stored, y_MO = w["int8"], _int8_linear(x, w)
    return _in_shape(y_MO.astype(dtype), spec, x, list(stored.shape[:-1]))


def merge_heads(o_BTNH, wo):
    """The attention's output projection (B, T, D); `wo` is (N, H, D), or (N H, D) where decoding
    merged it.
    """
    if isinstance(wo, dict) or wo.ndim == 3:
        return linear("BTNH,NHD->BTD", o_BTNH, wo)
    B, T, _, _ = o_BTNH.shape
    o_BTX = o_BTNH.reshape(B, T, -1)
    return linear("BTX,XD->BTD", o_BTX, wo)


@jax.custom_vjp
def grad_barrier(tree):
    """Identity whose gradients must all be there before any of them is used.

    Around a layer it makes backward finish the layer's weight gradients before it goes on to the
    layer below. Left alone, XLA's TPU scheduler puts them off and keeps the wide activations of
    several layers alive for them.
    """
    return tree


def _grad_barrier_forward(tree):
    return tree, None


def _grad_barrier_backward(_, grads):
    return (jax.lax.optimization_barrier(grads),)


grad_barrier.defvjp(_grad_barrier_forward, _grad_barrier_backward)


@jax.custom_vjp
def scaled(scale, x):
    """`x` times learned scales, in the dtype of `x`: one number, or one for each of some axes.

    The gradient of a scale is a sum over all that it scales. It is taken in float32: in bfloat16
    a sum over a whole batch would lose most of its terms.
    """
    return scale.astype(x.dtype) * x


def _scaled_forward(scale, x):
    return scaled(scale, x), (scale, x)


def _scaled_backward(saved, g):
    scale, x = saved
    products = g.astype(jnp.float32) * x.astype(jnp.float32)
    # the axes along which the scale is one number
    missing = x.ndim - scale.ndim
    single = [missing + i for i, size in enumerate(scale.shape) if size == 1]
    total = products.sum((*range(missing), *single)).reshape(scale.shape)
    return total.astype(scale.dtype), scale.astype(x.dtype) * g


scaled.defvjp(_scaled_forward, _scaled_backward)


def written_out(a):
    """A turned operand as a copy in its own order.

    XLA:CPU multiplies bfloat16 half as fast where it turns an operand within the product. A flat
    copy hides from it that this one was turned.
    """
    flat = jax.lax.optimization_barrier(a.reshape(-1))
    return flat.reshape(a.shape)


# ---- floats --------------------------------------------------------------------------------------
#
# XLA:CPU transposes a copy of a product's first operand. Autodiff's order of the weight gradient
# makes that the mlp's wide activations, so it is written here with the smaller operand first.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _float_linear(spec: str, x, w):
    return _float_linear_forward(spec, x, w)[0]


def _float_linear_forward(spec, x, w):
    operand = x.astype(w.dtype)
    y = jnp.einsum(spec, operand, w, preferred_element_type=x.dtype)
    return y, (operand, w)


def _float_linear_backward(spec, saved, g):
    x, w = saved
    product = partial(jnp.einsum, preferred_element_type=g.dtype)
    mixed = g.dtype != w.dtype
    g = g.astype(w.dtype)
    xs, ws, ys = spec.replace("->", ",").split(",")
    x_grad = product(f"{ys},{ws}->{xs}", g, w)

    # the weight's gradient, the smaller of x and g in front
    x_first = x.size <= g.size
    first, a, second, b = (xs, x, ys, g) if x_first else (ys, g, xs, x)
    if mixed:
        # what is summed over goes behind
        behind = "".join(sorted(first, key=lambda letter: letter in second))
        a = written_out(jnp.einsum(f"{first}->{behind}", a))
        first = behind
    if x_first:
        w_grad = product(f"{first},{second}->{ws}", a, b)
        return x_grad, w_grad.astype(w.dtype)
    # the order of axes that a product with g in front gives
    turned = "".join(letter for letter in ys + xs if letter in ws)
    w_grad = product(f"{first},{second}->{turned}", a, b)
    # without the barrier XLA turns the operands round again
    w_grad = jax.lax.optimization_barrier(w_grad)
    return x_grad, jnp.einsum(f"{turned}->{ws}", w_grad).astype(w.dtype)


_float_linear.defvjp(_float_linear_forward, _float_linear_backward)


# ---- weights with their outputs first, for decoding ----------------------------------------------


def _by_output_linear(spec: str, x, w):
    """The product with a weight (outputs..., inputs)."""
    *outputs, inputs = w.shape
    x_MI = x.reshape(-1, inputs).astype(w.dtype)
    w_OI = w.reshape(-1, inputs)
    y_MO = jnp.einsum("MI,OI->MO", x_MI, w_OI, preferred_element_type=x.dtype)
    return _in_shape(y_MO, spec, x, outputs)


def _few_rows_linear(x, w):
    """The product with a weight as narrow as it is stored, in float32 whatever `x` is."""
    inputs = w["few_rows"].shape[-1]
    x_MI = x.reshape(-1, inputs).astype(jnp.float32)
    w_OI = w["few_rows"].reshape(-1, inputs)
    if len(x_MI) <= few_rows.MOST_ROWS:
        y_MO = few_rows.product(x_MI, w_OI)
    else:
        y_MO = x_MI @ w_OI.astype(jnp.float32).T
    if "scale" in w:
        y_MO = y_MO * w["scale"].reshape(-1)
    return y_MO


def _int8_linear(x, w):
    """The product with a weight that is widened as it is read, in float32; rows M, outputs O,
    inputs I.
    """
    inputs = w["int8"].shape[-1]
    x_MI = x.reshape(-1, inputs)
    w_OI = w["int8"].reshape(-1, inputs)
    # the barrier keeps XLA from converting all weights once, before the decoding loop, and reading
    # them wide
    x_MI, w_OI = jax.lax.optimization_barrier((x_MI, w_OI))
    if len(x_MI) == 1:
        # one row as a sum: XLA:CPU converts on the fly there; before a product it writes the
        # converted weight out
        products_OI = x_MI.astype(jnp.float32) * w_OI.astype(jnp.float32)
        y_MO = products_OI.sum(-1)[None]
    else:
        y_MO = jnp.matmul(x_MI, w_OI.astype(x.dtype).T, preferred_element_type=jnp.float32)
    return y_MO * w["scale"]


def _in_shape(y_MO, spec: str, x, outputs: list[int]):
    """A product's rows as the spec has them: the leading axes of x, as many as the result has
    beside the weight's outputs.
    """
    result = spec.split("->")[1]
    leading = x.shape[: len(result) - len(outputs)]
    return y_MO.reshape(*leading, *outputs)
