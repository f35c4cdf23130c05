"""A model as ONNX, for onnxruntime: in browsers, on phones, from C#, Java and JavaScript.

Two files, each with the weights inside, in float32:

- forward.onnx: tokens (B, T) -> logits (B, T, V), for any number of rows B
- step.onnx: token (1,), length (1,), last (1,), a cache -> logits (1, V) and what comes after. A
  cache begins as zeros, with length 0 and last -1; outputs are handed back as inputs in order.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lib import model
from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.files import UserError, first_line
from lib.interop import proof
from lib.interop.packages import optional
from lib.interop.tokenizer_files import write_tokenizer

FORMAT = "onnx"
EXTRA = "onnx"
LARGEST = 1.9e9  # bytes that one ONNX file can hold, and a little air


def export(params, config: Config, tokenizer: Tokenizer, folder) -> proof.Proof:
    """Write the folder, prove it with onnxruntime, then put it in place.

    UserError where the weights are more than one ONNX file can hold.
    """
    optional(EXTRA, "jax2onnx", "onnxruntime")
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    if size > LARGEST:
        raise UserError(
            f"the weights are {size / 1e9:.1f} GB and one ONNX file holds 2 GB at most: export "
            "stablehlo, which keeps them beside it"
        )
    return proof.proved(
        folder,
        lambda draft: write(params, config, tokenizer, draft),
        lambda draft: prove(params, config, draft),
    )


def write(params, config: Config, tokenizer: Tokenizer, folder: Path):
    """Both functions, and the tokenizer as the `tokenizers` library reads it."""
    config = proof.exact(config)
    token = jax.ShapeDtypeStruct((1,), jnp.int32)

    def forward(tokens_BT):
        return model.forward(params, config, tokens_BT)[0]

    def step(token, length, last, *rings):
        keys, values = list(rings[: config.n_layer]), list(rings[config.n_layer :])
        cache = model.Cache(keys, values, length, last)
        logits_BTV, cache = model.forward(params, config, token[:, None], cache)
        return logits_BTV[:, 0], cache.length, cache.last, *cache.k, *cache.v

    rows = jax.ShapeDtypeStruct(("B", config.sequence_len), jnp.int32)
    rings = [jax.ShapeDtypeStruct(ring.shape, ring.dtype) for ring in empty_cache(config)[2:]]
    _convert(forward, [rows], folder / "forward.onnx")
    _convert(step, [token, token, token, *rings], folder / "step.onnx")
    write_tokenizer(tokenizer, folder, config.sequence_len)


def empty_cache(config: Config) -> list[np.ndarray]:
    """What the first step is given behind its token: length, last, the rings of keys and values."""
    cache = model.init_cache(proof.exact(config), 1, config.sequence_len)
    return [np.asarray(part) for part in (cache.length, cache.last, *cache.k, *cache.v)]


def _convert(function, inputs: list, path: Path):
    """Write a function as an ONNX file; UserError where the converter cannot."""
    (jax2onnx,) = optional(EXTRA, "jax2onnx")
    # it tells of shapes that it has to guess, which onnxruntime does not need
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            converted = jax2onnx.to_onnx(
                function, inputs=inputs, model_name=path.stem, return_mode="proto"
            )
        except Exception as e:
            raise UserError(f"jax2onnx cannot convert this model: {first_line(e)}") from e
    path.write_bytes(converted.SerializeToString())


# ---- the proof -----------------------------------------------------------------------------------


def opened(path: Path) -> Any:
    """run(*inputs) -> outputs of an ONNX file, by onnxruntime on the CPU."""
    (onnxruntime,) = optional(EXTRA, "onnxruntime")
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as e:
        raise UserError(f"onnxruntime cannot open {path.name}: {first_line(e)}") from e
    names = [put.name for put in session.get_inputs()]
    return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def greedy(run, config: Config, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens that follow a prompt, one by one."""
    state = empty_cache(config)
    written: list[int] = []
    # first what was given, then what was written
    for i in range(len(prompt) + count - 1):
        token = prompt[i] if i < len(prompt) else written[-1]
        logits_BV, *state = run(np.array([token], np.int32), *state)
        if i >= len(prompt) - 1:
            written.append(int(logits_BV[0].argmax()))
    return written


def prove(params, config: Config, folder: Path) -> proof.Proof:
    """Run both files by onnxruntime and compare logits and greedy tokens."""
    tokens_BT = np.random.default_rng(0).integers(config.vocab_size, size=(2, config.sequence_len))
    (logits,) = opened(folder / "forward.onnx")(tokens_BT.astype(np.int32))
    difference, bound = proof.apart(proof.our_logits(params, config, tokens_BT), logits)
    prompt, count = proof.greedy_prompt(config)
    written = greedy(opened(folder / "step.onnx"), config, prompt, count)
    return proof.Proof(
        format=f"{FORMAT} (forward and step, float32)",
        path=folder,
        bytes=proof.folder_size(folder),
        seconds=0.0,
        difference=difference,
        bound=bound,
        greedy=proof.agreeing(proof.our_greedy(params, config), written),
        lost=("weights are in both files; seen running on cpu alone",),
    )
