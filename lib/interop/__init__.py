"""Models leave for other programs, and other people's weights come in, each with a proof.

`python -m lib.interop export` writes a model of a run in one of `FORMATS` and compares it, run by
its own program, with ours before it says so. `families.py` says which architecture holds which
config, `folding.py` turns our weights into theirs, `proof.py` is the comparison; each format has a
file of its own. `python -m lib.interop import` makes a run of open weights (`imports.py`): those of
the Llama family by `llama.py`, their tokenizer by `tokenizer_import.py`. `nanochat.py` reads and
writes nanochat's state dicts. `push` and `pull` carry runs, models, tokenizers and exports to the
Hugging Face Hub and back, with a model card (`card.py`).
"""

from lib.interop.exports import FORMATS, export_run
from lib.interop.families import FAMILIES, fitting, misfits
from lib.interop.hub_pull import pull
from lib.interop.hub_push import push
from lib.interop.imports import import_run
from lib.interop.proof import Proof

__all__ = [
    "FAMILIES",
    "FORMATS",
    "Proof",
    "export_run",
    "fitting",
    "import_run",
    "misfits",
    "pull",
    "push",
]
