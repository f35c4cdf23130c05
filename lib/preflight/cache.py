"""Answers kept on disk: what was compiled once for minutes is there at once the next time."""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lib.files import UserError, read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "preflight"

# files and rooms of lib that an answer depends on
CODE = ("chips.py", "config.py", "params.py", "model", "parallel", "preflight", "train")


def has_libtpu() -> bool:
    """Whether the TPU's compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def kept(folder: Path | None, question: list, answer: Callable | None = None) -> Any:
    """What `answer()` says, or said when the same question was asked before, as JSON.

    Without `answer` None where the question is new. No folder: nothing is kept.
    """
    if folder is None:
        return answer() if answer else None
    path = _place(folder, question)
    # what is missing or damaged is asked again
    with contextlib.suppress(UserError):
        return read_json(path, expect=None)
    if answer is None:
        return None
    result = json.loads(json.dumps(answer()))
    write_json(path, result)
    return result


def answers(folder: Path | None, kind: str) -> list[tuple[list, Any]]:
    """(question, answer) of all that was asked of this code and kept with its question.

    kind: the question's first word. An answer has its question under "asked".
    """
    if folder is None:
        return []
    known = []
    for path in sorted(Path(folder).glob("*.json")):
        with contextlib.suppress(UserError):
            answer = read_json(path, expect=None)
            asked = answer.get("asked") if isinstance(answer, dict) else None
            # of other code or another compiler it would be another file
            if asked and asked[0] == kind and _place(Path(folder), asked) == path:
                known.append((asked, answer))
    return known


def _place(folder: Path, question: list) -> Path:
    """The file of a question to this code with these versions of jax and libtpu."""
    libtpu = importlib.metadata.version("libtpu") if has_libtpu() else ""
    asked = json.dumps([question, jax.__version__, libtpu], sort_keys=True, default=str)
    digest = hashlib.sha256(asked.encode())

    library = ROOT / "lib"
    for path in sorted(library.rglob("*.py")):
        if path.relative_to(library).parts[0] in CODE:
            digest.update(path.read_bytes())
    return Path(folder) / f"{digest.hexdigest()[:16]}.json"
