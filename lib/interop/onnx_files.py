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

from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.files import UserError, first_line
from lib.interop import proof
from lib.interop.packages import optional
from lib.interop.plain import check_size, greedy, plain
from lib.interop.tokenizer_files import write_tokenizer

FORMAT = "onnx"
EXTRA = "onnx"


def export(params, config: Config, tokenizer: Tokenizer, folder) -> proof.Proof:
    """Write the folder, prove it with onnxruntime, then put it in place.

    UserError where the weights are more than one ONNX file can hold.
    """
    optional(EXTRA, "jax2onnx", "onnxruntime")
    check_size(params, config, "ONNX")
    return proof.proved(
        folder,
        lambda draft: write(params, config, tokenizer, draft),
        lambda draft: prove(params, config, draft),
    )


def write(params, config: Config, tokenizer: Tokenizer, folder: Path):
    """Both functions, and the tokenizer as the `tokenizers` library reads it."""
    functions = plain(params, config)
    rows = jax.ShapeDtypeStruct(("B", config.sequence_len), jnp.int32)
    _convert(functions.forward, [rows], folder / "forward.onnx")
    _convert(functions.step, functions.step_inputs, folder / "step.onnx")
    write_tokenizer(tokenizer, folder, config.sequence_len)


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
    # it warns of each constant that the converter left over, dozens of them
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as e:
        raise UserError(f"onnxruntime cannot open {path.name}: {first_line(e)}") from e
    names = [put.name for put in session.get_inputs()]
    return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def prove(params, config: Config, folder: Path) -> proof.Proof:
    """Run both files by onnxruntime and compare logits and greedy tokens."""
    tokens_BT = np.random.default_rng(0).integers(config.vocab_size, size=(2, config.sequence_len))
    (logits,) = opened(folder / "forward.onnx")(tokens_BT.astype(np.int32))
    difference, bound = proof.apart(proof.our_logits(params, config, tokens_BT), logits)
    written = greedy(opened(folder / "step.onnx"), config)
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
