"""Our weights as those of a plain transformer: what other architectures lack goes into matrices.

- `resid_scale` multiplies the stream before each layer. Every reader of the stream norms it first,
  so the stream may be kept at another scale: what is added is divided by the product of all scales
  so far.
- `qk_scale` goes into the query and key matrices, or into the weights of their norms.
- The norm of the embedding goes into its rows, where the architecture has no such norm.
- Our rotary embedding turns by minus the angle: exchanging the halves of a head makes that plus.
"""

from typing import NamedTuple

import numpy as np

from lib.config import Config


class PlainWeights(NamedTuple):
    """Weights of a plain transformer in numpy: explicit head axes, the true vocabulary.

    embed: (V, D) as the table is, not yet normed. head: (D, V). layers: per layer wq (D, N, H),
    wk and wv (D, K, H), wo (N, H, D), w_in and perhaps w_gate (D, F), w_out (F, D).
    """

    embed: np.ndarray
    head: np.ndarray
    layers: list[dict[str, np.ndarray]]


# the matrices of a layer that read the normed stream, but for queries and keys
READERS = ("wv", "w_in", "w_gate")
# the matrices of a layer that add to the stream
WRITERS = ("wo", "w_out")


def fold(params, config: Config) -> PlainWeights:
    """The weights of a config whose other parts are off, with the scales folded in.

    Queries and keys keep their norm where the config has one; `qk_scale` is then left to its
    weights.
    """
    table = np.asarray(params["embed"], np.float32)[: config.vocab_size]
    if config.tied_head:
        head = table.T
    else:
        head = np.asarray(params["head"], np.float32)[:, : config.vocab_size]

    stacks = {name: np.asarray(stack, np.float32) for name, stack in params["blocks"].items()}
    resid_scales = stacks.pop("resid_scale", np.ones(config.n_layer, np.float32))
    layers = [{name: stack[i] for name, stack in stacks.items()} for i in range(config.n_layer)]

    # the scale of our stream over that of the folded one
    stream = 1.0
    for layer, resid_scale in zip(layers, resid_scales):
        stream *= float(resid_scale)
        for name in WRITERS:
            layer[name] = layer[name] / np.float32(stream)
        # a norm keeps the sign of what it norms; of queries and keys both would turn, and cancel
        for name in READERS:
            if name in layer:
                layer[name] = layer[name] * np.float32(np.sign(stream))
        if not config.qk_norm:
            layer["wq"] = layer["wq"] * np.float32(config.qk_scale)
            layer["wk"] = layer["wk"] * np.float32(config.qk_scale)
    return PlainWeights(table, head * np.float32(np.sign(stream)), layers)


def normed_rows(table_VD: np.ndarray, eps: float) -> np.ndarray:
    """An embedding table whose rows are what `rms_norm` makes of them."""
    rows = table_VD.astype(np.float64)
    scale = 1 / np.sqrt(np.mean(rows * rows, axis=-1, keepdims=True) + eps)
    return (rows * scale).astype(np.float32)


def swap_halves(w_DNH: np.ndarray) -> np.ndarray:
    """A query or key matrix for rotations by plus the angle: the halves of each head exchanged."""
    first, second = np.split(w_DNH, 2, axis=-1)
    return np.concatenate([second, first], axis=-1)


def interleave_halves(w_DNH: np.ndarray) -> np.ndarray:
    """A matrix of split halves for rotations of neighbours: (first, second) pairs, one by one."""
    first, second = np.split(w_DNH, 2, axis=-1)
    return np.stack([first, second], axis=-1).reshape(w_DNH.shape)


def as_linear(w: np.ndarray, n_in: int = 1) -> np.ndarray:
    """A weight with explicit axes, `n_in` of them inputs, as torch's (outputs, inputs)."""
    inputs = int(np.prod(w.shape[:n_in]))
    return np.ascontiguousarray(w.reshape(inputs, -1).T)
