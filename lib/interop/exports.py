"""From a run to a file that another program opens."""

from pathlib import Path

from lib.files import UserError, choose, local_path, write_atomic
from lib.interop import gguf_file, huggingface, litert, onnx_files, stablehlo
from lib.interop.proof import Proof
from lib.runs import load_model

# name of a format: (params, config, tokenizer, path) -> Proof; adding one is one entry
FORMATS = {
    "transformers": huggingface.export,
    "gguf": gguf_file.export,
    "onnx": onnx_files.export,
    "litert": litert.export,
    "stablehlo": stablehlo.export,
    "stablehlo_inside": stablehlo.export_inside,
}
# the folder of a run that they are written to, by default
FOLDER = "exports"
# beside it, what its proof has shown
PROOF = ".txt"


def export_run(run, format: str, stage: str = "", ckpt: str = "", out="") -> Proof:
    """Write a model of a run folder in one of FORMATS and prove it: what the proof showed.

    stage, ckpt: as in `load_model`. out: the folder to write, which may not hold anything; by
    default RUN/exports/FORMAT, where an earlier export is replaced once this one is proved.
    """
    write = choose("export format", format, FORMATS)
    if out:
        _check_free(local_path(out))
    model = load_model(run, ckpt, stage)
    path = local_path(out) if out else Path(run) / FOLDER / format
    shown = write(model.params, model.config, model.tokenizer, path)
    if not out:
        write_atomic(path.with_suffix(PROOF), shown.table() + "\n")
    return shown


def _check_free(path: Path):
    """UserError where something stands that an export would take the place of."""
    holds_something = path.is_dir() and (not path.name or any(path.iterdir()))
    if holds_something or (path.exists() and not path.is_dir()):
        raise UserError(f"--out {path} is there already: name a folder that is new, or empty")
