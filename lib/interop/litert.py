"""A model as LiteRT (TFLite) files, for phones and small boards; no TensorFlow is needed for it.

The two functions of `plain.py`, each with the weights inside and twice: as float32, which is proved
to be our model, and with the matrices in int8, whose cost is measured. A forward takes one row, as
long as the context. The signature `serving_default` names what goes in and out: tokens and logits;
token, length, last, k0.., v0.. and logits, length, last, k0.., v0...
"""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lib.config import Config
from lib.data.sources import documents
from lib.data.tokenizer import Tokenizer
from lib.evals import bits
from lib.files import UserError, first_line
from lib.interop import proof
from lib.interop.packages import optional
from lib.interop.plain import check_size, greedy, plain, state_names
from lib.interop.tokenizer_files import write_tokenizer

FORMAT = "litert"
EXTRA = "litert"
SIGNATURE = "serving_default"
# int8 is measured on so many tokens of text, in rows as long as the context
MEASURED = 4096
LEAST_ROWS = 2


def export(params, config: Config, tokenizer: Tokenizer, folder) -> proof.Proof:
    """Write the folder, prove it with LiteRT's interpreter, then put it in place.

    UserError where the weights are more than one file can hold.
    """
    optional(EXTRA, "litert_converter", "ai_edge_litert", "ai_edge_quantizer")
    check_size(params, config, "LiteRT")
    return proof.proved(
        folder,
        lambda draft: write(params, config, tokenizer, draft),
        lambda draft: prove(params, config, tokenizer, draft),
    )


def write(params, config: Config, tokenizer: Tokenizer, folder: Path):
    """Both functions in float32 and in int8, and the tokenizer for the `tokenizers` library."""
    functions = plain(params, config)
    row = jax.ShapeDtypeStruct((1, config.sequence_len), jnp.int32)
    names = functions.step_names
    after = ["logits", *names[1:]]
    _convert(functions.forward, [row], (["tokens"], ["logits"]), folder / "forward.tflite")
    _convert(functions.step, functions.step_inputs, (names, after), folder / "step.tflite")
    for name in ("forward", "step"):
        _quantize(folder / f"{name}.tflite", folder / f"{name}_int8.tflite")
    write_tokenizer(tokenizer, folder, config.sequence_len)


def _convert(function: Callable, inputs: list, names: tuple[list, list], path: Path):
    """Write a function of given input shapes as a file; names: of its inputs and its outputs."""
    ir, passes, api = optional(
        EXTRA,
        "litert_converter.mlir.ir",
        "litert_converter.mlir.passmanager",
        "litert_converter.mlir._mlir_libs.converter_api_ext",
    )
    # the compiler's language as text, which both understand whatever their versions
    program = jax.jit(function).lower(*inputs).as_text("stablehlo")
    context = ir.Context()
    api.prepare_mlir_context(context)
    try:
        with context:
            module = ir.Module.parse(program)
            api.set_signature(module.operation, SIGNATURE, *names)
            api.run_convert_to_tfl_passes(module, passes.PassManager(), api.ConvertToTFLConfig())
            data = api.export_flatbuffer_to_bytes(module.operation)
    except Exception as e:
        raise UserError(f"litert-converter cannot convert this model: {first_line(e)}") from e
    path.write_bytes(data)


def _quantize(path: Path, out: Path):
    """Write a file once more with its matrices in int8, one scale for each output channel."""
    quantizer, recipe = optional(EXTRA, "ai_edge_quantizer.quantizer", "ai_edge_quantizer.recipe")
    # it talks while it works
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        work = quantizer.Quantizer(str(path))
        # matrices in int8, what goes through them too while it does, all else in float32
        work.load_quantization_recipe(recipe.dynamic_wi8_afp32())
        data = work.quantize().quantized_model
    out.write_bytes(data)


# ---- the proof -----------------------------------------------------------------------------------


def opened(path: Path, inputs: list[str], outputs: list[str]) -> Callable:
    """run(*inputs) -> outputs of a file, by LiteRT's interpreter on the CPU."""
    (interpreter,) = optional(EXTRA, "ai_edge_litert.interpreter")
    try:
        session = interpreter.Interpreter(model_path=str(path))
        runner = session.get_signature_runner(SIGNATURE)
    except Exception as e:
        raise UserError(f"LiteRT cannot open {path.name}: {first_line(e)}") from e

    def run(*arrays):
        results = runner(**dict(zip(inputs, arrays, strict=True)))
        return [results[name] for name in outputs]

    return run


def opened_forward(path: Path) -> Callable:
    """tokens_BT -> logits_BTV of a file: it takes them row by row."""
    run = opened(path, ["tokens"], ["logits"])

    def forward(tokens_BT: np.ndarray) -> np.ndarray:
        parts = [run(row[None].astype(np.int32))[0] for row in tokens_BT]
        return np.concatenate(parts)

    return forward


def opened_step(path: Path, config: Config) -> Callable:
    """The step of a file, as `greedy` takes it."""
    state = state_names(config.n_layer)
    return opened(path, ["token", *state], ["logits", *state])


def prove(params, config: Config, tokenizer: Tokenizer, folder: Path) -> proof.Proof:
    """Run the files by LiteRT: float32 is compared with our model, int8 is measured beside it."""
    tokens_BT = np.random.default_rng(0).integers(config.vocab_size, size=(2, config.sequence_len))
    forward = opened_forward(folder / "forward.tflite")
    difference, bound = proof.apart(proof.our_logits(params, config, tokens_BT), forward(tokens_BT))
    ours = proof.our_greedy(params, config)
    written = greedy(opened_step(folder / "step.tflite", config), config)

    small = greedy(opened_step(folder / "step_int8.tflite", config), config)
    same, count = proof.agreeing(ours, small)
    cost = measured(forward, opened_forward(folder / "forward_int8.tflite"), config, tokenizer)
    whole, less = [proof.folder_size(folder / f"step{kind}.tflite") for kind in ("", "_int8")]
    return proof.Proof(
        format=f"{FORMAT} (forward and step, float32 and int8)",
        path=folder,
        bytes=proof.folder_size(folder),
        seconds=0.0,
        difference=difference,
        bound=bound,
        greedy=proof.agreeing(ours, written),
        measured=(
            ("int8 size", f"{less / 1e6:,.1f} MB instead of {whole / 1e6:,.1f} (step)"),
            ("int8 bits per byte", cost),
            ("int8 greedy tokens equal", f"{same} of {count}"),
        ),
        lost=(
            "int8 holds matrices alone, tables of embeddings stay in float32",
            "a forward takes one row, as long as the context",
            "weights are in all files; seen running on cpu alone",
        ),
    )


def measured(forward: Callable, small: Callable, config: Config, tokenizer: Tokenizer) -> str:
    """What int8 costs: bits per byte of both forwards on one text, and how often they agree."""
    rows = text_rows(config, tokenizer)
    equal = 0
    nats: list[tuple[float, float]] = []
    sizes: list[int] = []
    # row by row, for the logits of all would be large
    for row in rows:
        inputs_BT, targets_T = row[None, :-1], row[1:]
        both = [forward(inputs_BT)[0], small(inputs_BT)[0]]
        bytes_T = bits.target_bytes(targets_T, tokenizer.token_bytes)
        whole, less = [_nats(logits_TV, targets_T, bytes_T > 0) for logits_TV in both]
        nats.append((whole, less))
        sizes.append(int(bytes_T.sum()))
        equal += int((both[0].argmax(-1) == both[1].argmax(-1)).sum())

    before, after = [bits.ratio_bits(column, sizes)[0] for column in zip(*nats)]
    if not np.isfinite(after):
        raise UserError(
            f"the {FORMAT} export was not kept: in int8 this model gives no probabilities"
        )
    tokens = len(rows) * config.sequence_len
    return (
        f"{after:.4f} instead of {before:.4f} on {tokens:,} tokens of the stdlib, "
        f"{equal / tokens:.1%} of the likeliest tokens equal"
    )


def _nats(logits_TV, targets_T, is_text_T) -> float:
    """The sum of losses over the targets that stand for text."""
    logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV, axis=-1))
    chosen_T = np.take_along_axis(logprobs_TV, targets_T[:, None], axis=-1)[:, 0]
    return -float(chosen_T[is_text_T].sum())


def text_rows(config: Config, tokenizer: Tokenizer) -> np.ndarray:
    """Held-out text of the stdlib as rows of ids (B, T + 1)."""
    B = max(LEAST_ROWS, MEASURED // config.sequence_len)
    width = config.sequence_len + 1
    ids: list[int] = []
    for document in documents("stdlib", "val"):
        ids += tokenizer.encode(document, bos=True)
        if len(ids) >= B * width:
            break
    # a context longer than all of that text: from the beginning again
    return np.resize(np.array(ids, np.int32), (B, width))
