"""What was pushed comes back: one revision of a repository, whole, or nothing.

Files come into a hidden folder beside the run, where a pull that was cut off goes on, and take
their place when all of them are there and bear the checksums of their list.
"""

import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from lib import hub
from lib.data.tokenizer import FILE, Tokenizer
from lib.files import UserError, read_json, sha256, write_json, writing
from lib.interop.exports import FOLDER, FORMATS
from lib.interop.hub_push import FORMAT, KINDS, MANIFEST
from lib.runs import STAGES
from lib.train import checkpoint
from lib.train.records import FILE as CHECKPOINT_FILE

# where a pulled run notes what it is
ORIGIN = "pulled.json"


class Contents(NamedTuple):
    """What a repository holds of ours; files: their sizes and checksums, {} where it lists none."""

    kind: str
    stage: str
    export: str
    files: dict[str, dict]


def pull(source: str, run, token: str | None = None) -> str:
    """Bring hf:USER/NAME or hf:USER/NAME@REVISION into a run folder; what came, as a sentence.

    UserError where the run has such a thing already, where the repository is none of ours, and
    where a file is not what its list says.
    """
    wanted, run = hub.parse(source), Path(run)
    staging = run.with_name(f".{run.name}.pull")
    with hub.reaching(f"cannot pull {wanted.name}", token), writing(run):
        # a branch may move on while its files come
        pinned = hub.Revision(wanted.repo, hub.commit_of(wanted, token))
        names = hub.names(pinned, token)
        contents = _contents(pinned, names, token)
        target = _target(run, contents)
        hub.download(pinned, contents.files, staging, token)
        size = _check(pinned, staging, contents.files)
        _settle(staging, contents, run, target)
    if not (run / ORIGIN).exists():
        write_json(run / ORIGIN, {"source": pinned.name})
    return (
        f"pulled the {contents.export or contents.kind} of {pinned.name} into {target}: "
        f"{len(contents.files)} files, {size / 1e6:,.1f} MB"
    )


def _contents(source: hub.Revision, names: list[str], token: str | None) -> Contents:
    """What a revision holds; UserError where that is nothing of ours."""
    if MANIFEST in names:
        with tempfile.TemporaryDirectory() as folder:
            hub.download(source, [MANIFEST], Path(folder), token)
            return _listed(source, read_json(Path(folder, MANIFEST), cure="push it again"))
    # 02 uploads checkpoints without a list: they have one of their own
    if "meta.json" in names and FILE in names:
        files = [name for name in names if CHECKPOINT_FILE.fullmatch(name)]
        return Contents("model", "base", "", {name: {} for name in ["meta.json", FILE, *files]})
    if FILE in names and "config.json" not in names:
        return Contents("tokenizer", "", "", {FILE: {}})
    raise UserError(
        f"{source.name} holds no run, model or tokenizer that was pushed from here: open weights "
        f"come in by python -m lib.interop import --source hf:{source.repo}"
    )


def _listed(source: hub.Revision, manifest: dict[str, Any]) -> Contents:
    """The contents that a list names, after a look at every word of it."""
    kind, files = manifest.get("kind"), manifest.get("files") or {}
    stage, export = manifest.get("stage") or "", manifest.get("export") or ""
    # words of a later version, or of somebody who wrote the list by hand
    sound = manifest.get("format") == FORMAT and kind in KINDS and _are_entries(files)
    if not sound or stage not in ("", *STAGES) or export not in ("", *FORMATS):
        raise UserError(
            f"{MANIFEST} of {source.name} lists nothing that is known here: update the code, or "
            "push again"
        )
    # a list of a stranger's may point anywhere
    for name in files:
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise UserError(
                f"{MANIFEST} of {source.name} lists the file {name!r} outside it: don't trust it"
            )
    return Contents(str(kind), stage, export, files)


def _are_entries(files) -> bool:
    """Whether these are files by name, each with what is told of it."""
    return bool(files) and isinstance(files, dict) and all(map(_is_entry, files.values()))


def _is_entry(entry) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha256"), str)


def _target(run: Path, contents: Contents) -> Path:
    """Where it goes; UserError where something stands there."""
    if contents.kind == "tokenizer":
        target = run / FILE
    elif contents.kind == "export":
        target = run / FOLDER / contents.export
    else:
        target = run
    if target.exists():
        raise UserError(f"{target} is there already: choose another --run, or move it away")
    return target


def _check(source: hub.Revision, staging: Path, files: dict[str, dict]) -> int:
    """Compare what came with its list; how many bytes came.

    What is damaged is taken away, so that the next pull fetches it anew.
    """
    total = 0
    for name, entry in files.items():
        path = staging / name
        total += path.stat().st_size
        if entry and sha256(path) != entry.get("sha256"):
            path.unlink()
            raise UserError(
                f"{name} of {source.name} is not what its list says: pull again, and if it "
                "stays so don't use this revision"
            )
    return total


def _settle(staging: Path, contents: Contents, run: Path, target: Path):
    """Give what came its place, by one renaming."""
    # notes of the Hub's client on what it has fetched
    shutil.rmtree(staging / ".cache", ignore_errors=True)
    _leave_only(staging, contents.files)
    if contents.kind == "tokenizer":
        Tokenizer.load(staging / FILE)
        run.mkdir(parents=True, exist_ok=True)
        os.replace(staging / FILE, target)
        shutil.rmtree(staging)
        return
    if contents.kind == "model":
        _as_run(staging, contents)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(staging, target)


def _leave_only(folder: Path, names: Collection[str]):
    """Remove all other files, which a pull of something else has left, and folders without any."""
    # what lies deeper first, so that folders are empty when their turn comes
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif path.is_file() and path.relative_to(folder).as_posix() not in names:
            path.unlink()


def _as_run(folder: Path, contents: Contents):
    """Turn a checkpoint and a tokenizer that lie in a folder into a run folder."""
    meta = checkpoint.read_meta(folder)
    config = meta.get("config")
    if not isinstance(config, dict) or not isinstance(meta.get("step"), int):
        raise UserError("the checkpoint that came tells no config: push it again")
    # as load_model looks for them
    place = (
        folder / STAGES[contents.stage or "base"] / Path(checkpoint.path_of("", meta["step"])).name
    )
    place.mkdir(parents=True)
    for name in contents.files:
        if name != FILE:
            os.replace(folder / name, place / name)
    write_json(folder / "config.json", config)
