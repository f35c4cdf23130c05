"""Parameters as decoding reads them: a dict per layer, in the compute dtype or in int8, on a GPU
with the outputs of each matrix first.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from lib.config import Config
from lib.model.head import head_matrix
from lib.params import unstack

# the matrices of a block, and how many of their axes are inputs
INPUTS = {
    "wq": 1,
    "wk": 1,
    "wv": 1,
    "wo": 2,
    "w_in": 1,
    "w_gate": 1,
    "w_out": 1,
}


def cast_matrices(tree, dtype):
    """The tree with every matrix in `dtype`; scalars, scales and int8 stay as they are."""

    def cast(a):
        is_wide = a.ndim > 1 and a.dtype != jnp.int8
        return a.astype(dtype) if is_wide else a

    return jax.tree.map(cast, tree)


def decoding_params(params, config: Config):
    """The parameters as decoding reads them, to be made once: unstacked, matrices in the compute
    dtype, on a GPU those of the blocks with their outputs first.

    What is so already comes back as it is, not as a copy.
    """
    params = _in_compute_dtype(params, config)
    return by_outputs(params) if jax.default_backend() == "gpu" else params


def _in_compute_dtype(params, config):
    settled = (jnp.int8, config.dtype)

    def needs_cast(a):
        return a.ndim > 1 and a.dtype not in settled

    leaves = jax.tree.leaves(params)
    if is_unstacked(params) and not any(map(needs_cast, leaves)):
        return params
    return _unstacked(params, config)


@partial(jax.jit, static_argnums=1)
def _unstacked(params, config):
    if not is_unstacked(params):
        params = unstack(params, config)
    return cast_matrices(params, config.dtype)


def by_outputs(params):
    """Unstacked parameters whose blocks have their matrices in floats as {"by_output": (outputs...,
    inputs)}.

    The product of one row is a sum for each output, and a GPU sums along a row of memory twice as
    fast as down a column (`python -m benchmarks.one_token`).
    """
    blocks = []
    for w in params["blocks"]:
        matrices = {name: w[name] for name in INPUTS if name in w}
        turned = {name: _turned(a, INPUTS[name]) for name, a in matrices.items()}
        blocks.append(w | turned)
    return params | {"blocks": blocks}


def _turned(w, n_in: int):
    """A matrix in floats with its outputs first; one that is so already, or int8, as it is."""
    if isinstance(w, dict):
        return w
    inputs, outputs = range(n_in), range(n_in, w.ndim)
    turned = jnp.transpose(w, (*outputs, *inputs))
    return {"by_output": turned.reshape(*turned.shape[: len(outputs)], -1)}


def is_unstacked(params) -> bool:
    """Whether the blocks are a list of one dict per layer."""
    return isinstance(params["blocks"], list)


@partial(jax.jit, static_argnums=1)
def quantized(params, config: Config):
    """The parameters with every matrix of a block, and the head, in int8: for evaluation and
    decoding.

    Weights only: activations keep their dtype, and so do tables that are looked up. A quarter of
    float32's bytes; what that costs in quality and brings in speed is measured by `python -m
    benchmarks.decode`.
    """
    params = unstack(params, config)
    # each block's matrices, as far as it has them; its scales and gates stay
    blocks = []
    for w in params["blocks"]:
        small = dict(w)
        for name, n_in in INPUTS.items():
            if name in w:
                small[name] = _int8(w[name], n_in)
        blocks.append(small)

    # a tied head becomes one of its own, for the embedding stays as it is
    head = _int8(head_matrix(params, config), 1)
    return params | {"blocks": blocks, "head": head}


def _int8(w, n_in: int) -> dict:
    """A matrix as {"int8": (outputs..., inputs), "scale": (outputs,)}; its first n_in axes are
    inputs.
    """
    outputs = w.shape[n_in:]
    w_OI = w.reshape(-1, math.prod(outputs)).T
    # the largest weight of each output becomes 127; an output of zeros is not divided by zero
    largest_O = jnp.abs(w_OI).max(axis=1)
    scale_O = jnp.maximum(largest_O, 1e-30) / 127
    rounded_OI = jnp.round(w_OI / scale_O[:, None])
    int8_OI = rounded_OI.astype(jnp.int8)
    return {"int8": int8_OI.reshape(*outputs, -1), "scale": scale_O}
