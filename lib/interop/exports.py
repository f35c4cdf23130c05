"""From a run to a file that another program opens."""

from pathlib import Path

from lib.files import choose, local_path, write_atomic
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

    stage, ckpt: as in `load_model`. out: the path to write; RUN/exports/FORMAT by default. What
    stood there is replaced only by an export that its proof has held.
    """
    write = choose("export format", format, FORMATS)
    model = load_model(run, ckpt, stage)
    path = local_path(out) if out else Path(run) / FOLDER / format
    shown = write(model.params, model.config, model.tokenizer, path)
    if not out:
        write_atomic(path.with_suffix(PROOF), shown.table() + "\n")
    return shown
