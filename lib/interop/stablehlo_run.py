"""Runs a model from StableHLO files with jax alone, none of the code that trained it.

`python run.py 12 7 99` goes on from these token ids. Needs jax, flatbuffers and safetensors.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export
from safetensors.numpy import load_file

folder = Path(__file__).parent


def function(name: str):
    """One of the exported functions, for this machine's device."""
    data = bytearray((folder / f"{name}.stablehlo").read_bytes())
    return jax.jit(export.deserialize(data).call)


def weights() -> list[dict]:
    """What a function takes first: the weights, by name, on the device; none if they are inside."""
    path = folder / "weights.safetensors"
    return [jax.device_put(load_file(path))] if path.exists() else []


def write(ids: list[int], count: int) -> list[int]:
    """The `count` likeliest tokens that follow `ids`, one by one."""
    params, step = weights(), function("step")
    cache = function("start")()
    written: list[int] = []
    # first what was given, then what was written
    for i in range(len(ids) + count - 1):
        token = ids[i] if i < len(ids) else written[-1]
        logits_V, cache = step(*params, cache, jnp.int32(token))
        if i >= len(ids) - 1:
            written.append(int(logits_V.argmax()))
    return written


if __name__ == "__main__":
    print(write([int(word) for word in sys.argv[1:]], 20))
