"""A model as two functions of plain arrays with the weights inside, as ONNX and LiteRT hold them.

- forward: tokens (B, T) -> logits (B, T, V)
- step: token (1,), length (1,), last (1,), a cache -> logits (1, V) and what comes after. A cache
  begins as zeros, with length 0 and last -1; outputs are handed back as inputs in order.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lib import model
from lib.config import Config
from lib.files import UserError
from lib.interop import proof

# bytes of weights that one file can hold, and a little air
LARGEST = 1.9e9


class PlainFunctions(NamedTuple):
    """Both functions, and what step takes: its shapes, and a name for each."""

    forward: Callable
    step: Callable
    step_inputs: list[jax.ShapeDtypeStruct]
    step_names: list[str]


def plain(params, config: Config) -> PlainFunctions:
    """A model's functions, computing in float32."""
    config = proof.exact(config)

    def forward(tokens_BT):
        return model.forward(params, config, tokens_BT)[0]

    def step(token, length, last, *rings):
        keys, values = list(rings[: config.n_layer]), list(rings[config.n_layer :])
        cache = model.Cache(keys, values, length, last)
        logits_BTV, cache = model.forward(params, config, token[:, None], cache)
        return logits_BTV[:, 0], cache.length, cache.last, *cache.k, *cache.v

    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    state = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in empty_cache(config)]
    return PlainFunctions(forward, step, [token, *state], ["token", *state_names(config.n_layer)])


def state_names(n_layer: int) -> list[str]:
    """What a step hands on, by name: length, last, the rings of keys and of values."""
    rings = [f"{kind}{i}" for kind in "kv" for i in range(n_layer)]
    return ["length", "last", *rings]


def empty_cache(config: Config) -> list[np.ndarray]:
    """What the first step is given behind its token: length, last, the rings of keys and values."""
    cache = model.init_cache(proof.exact(config), 1, config.sequence_len)
    return [np.asarray(part) for part in (cache.length, cache.last, *cache.k, *cache.v)]


def greedy(step: Callable, config: Config) -> list[int]:
    """The likeliest tokens that a file's step writes after `greedy_prompt`, one by one."""
    prompt, count = proof.greedy_prompt(config)
    state = empty_cache(config)
    written: list[int] = []
    # first what was given, then what was written
    for i in range(len(prompt) + count - 1):
        token = prompt[i] if i < len(prompt) else written[-1]
        logits_BV, *state = step(np.array([token], np.int32), *state)
        if i >= len(prompt) - 1:
            written.append(int(logits_BV[0].argmax()))
    return written


def check_size(params, config: Config, what: str):
    """Raise UserError where the weights are more than one file of a format can hold."""
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    if size > LARGEST:
        raise UserError(
            f"n_layer={config.n_layer}, n_embd={config.n_embd} and vocab_size={config.vocab_size} "
            f"make {size / 1e9:.1f} GB of weights, and one {what} file holds 2 GB at most: export "
            "stablehlo, which keeps them beside it"
        )
