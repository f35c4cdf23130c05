"""Parameters as decoding reads them: a dict per layer, in the compute dtype or in int8, on a GPU
and on a CPU with the outputs of each matrix first.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.core import Tracer

from lib.config import Config
from lib.model import few_rows
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

# bytes of weights that a CPU's caches are taken to hold: of 5 MB XLA's products were faster, of
# 17 MB slower (LOG.md)
CACHED = 8 * 2**20


def cast_matrices(tree, dtype):
    """The tree with every matrix in `dtype`; scalars, scales, int8 and what is for few rows stay
    as they are.
    """

    def cast(a):
        if is_for_few_rows(a):
            return a
        is_wide = a.ndim > 1 and a.dtype != jnp.int8
        return a.astype(dtype) if is_wide else a

    return jax.tree.map(cast, tree, is_leaf=is_for_few_rows)


def decoding_params(params, config: Config):
    """The parameters as decoding reads them, to be made once: unstacked, matrices in the compute
    dtype; on a GPU those of the blocks with their outputs first, on a CPU that pays for it all of
    them as `for_few_rows` has them.

    What is so already comes back as it is, not as a copy.
    """
    if is_for_few_rows(params.get("head")):
        return params
    params = _in_compute_dtype(params, config)
    if jax.default_backend() == "gpu":
        return by_outputs(params)
    return for_few_rows(params, config) if _pays_for_few_rows(params, config) else params


def _pays_for_few_rows(params, config: Config) -> bool:
    """Whether these are arrays on one CPU, in int8 or too many for its caches, and
    `lib.model.few_rows` is built.
    """
    matrices = jax.tree.leaves([params["blocks"], head_matrix(params, config)])
    # while a program is traced, nobody knows for which device
    is_traced = any(isinstance(a, Tracer) for a in matrices)
    if is_traced or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return False
    is_int8 = any(a.dtype == jnp.int8 for a in matrices)
    is_large = sum(a.nbytes for a in matrices) > CACHED
    return (is_int8 or is_large) and few_rows.is_built()


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


@partial(jax.jit, static_argnums=1)
def for_few_rows(params, config: Config):
    """Unstacked parameters whose blocks and head have their matrices, in floats or int8, as
    {"few_rows": (outputs..., inputs)}, int8 with its "scale" beside it (`lib.model.few_rows`).

    In the mixed mode those in floats become bfloat16: what is multiplied, as in training.
    """
    blocks = []
    for w in params["blocks"]:
        matrices = {name: w[name] for name in INPUTS if name in w}
        read = {name: _for_few_rows(a, INPUTS[name], config) for name, a in matrices.items()}
        blocks.append(w | read)
    head = _for_few_rows(head_matrix(params, config), 1, config)
    return params | {"blocks": blocks, "head": head}


def _for_few_rows(w, n_in: int, config: Config) -> dict:
    if isinstance(w, dict):
        return {"few_rows": w["int8"], "scale": w["scale"]}
    return {"few_rows": _turned(w, n_in)["by_output"].astype(config.operand_dtype)}


def is_for_few_rows(w) -> bool:
    """Whether a weight is one that `for_few_rows` made."""
    return isinstance(w, dict) and "few_rows" in w


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
