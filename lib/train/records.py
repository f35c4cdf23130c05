"""What checkpoints there are: their records in meta.json, checked, and which is the newest or best.

A training is known by when it began. All its checkpoints carry that, also when it is left and taken
up again, so the newest checkpoint is the last step of the training that began last: a clock that is
set back or ahead meanwhile changes nothing.
"""

import contextlib
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lib.files import (
    Unreachable,
    UserError,
    filesystem,
    is_remote,
    join,
    parse_json,
    reaching,
    read_bytes,
    reading,
    regular,
    sha256,
)

KIND = "rawchat checkpoint"
FORMAT = 1
NAME = re.compile(r"step_\d{8,}")
FILE = re.compile(r"\w+(\.\d+-of-\d+)?\.safetensors")
CURE = "delete this checkpoint and use an older one"

# how often to look again when checkpoints are pruned while they are read
TRIES = 5

T = TypeVar("T")


class Gone(UserError):
    """No checkpoint stands there, or it was pruned while it was read."""


class Record(NamedTuple):
    """What meta.json says of a checkpoint."""

    step: int
    metric: float | None
    time: float  # Unix seconds at which it was written
    began: float  # Unix seconds at which its training began
    files: dict[str, dict]  # name: its size in "bytes" and its "sha256"
    shapes: dict[str, list[int]]  # of the arrays that stand in parts in several files
    meta: dict  # the caller's own

    @property
    def place(self) -> tuple[float, int, float]:
        """Where it stands among the others: a larger place is newer."""
        return self.began, self.step, self.time

    @property
    def told(self) -> dict:
        """The caller's own metadata, with step and metric."""
        return self.meta | {"step": self.step, "metric": self.metric}


def path_of(folder, step: int):
    """Where in `folder` the checkpoint of a step stands."""
    return join(folder, f"step_{step:08d}")


def retried(read: Callable[[], T]) -> T:
    """read(), which is called again when a checkpoint is pruned under its hands."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(Gone):
            return read()
    return read()


# ---- one record ----------------------------------------------------------------------------------


def _is_count(value) -> bool:
    return type(value) is int and value >= 0


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_file(name: str, entry) -> bool:
    """Whether an entry of "files" is a name of ours, with a size and a checksum."""
    if not FILE.fullmatch(name) or not isinstance(entry, dict):
        return False
    checksum = entry.get("sha256")
    is_checksum = isinstance(checksum, str) and re.fullmatch("[0-9a-f]{64}", checksum)
    return bool(is_checksum) and _is_count(entry.get("bytes"))


def _are_files(value) -> bool:
    return isinstance(value, dict) and all(_is_file(*item) for item in value.items())


def _is_shape(value) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _are_shapes(value) -> bool:
    return isinstance(value, dict) and all(map(_is_shape, value.values()))


# entry of meta.json: what it must be
ENTRIES = {
    "step": _is_count,
    "metric": lambda value: value is None or _is_number(value),
    "time": _is_number,
    "began": _is_number,
    "files": _are_files,
    "split": _are_shapes,
    "meta": lambda value: isinstance(value, dict),
}


def read_record(path) -> Record:
    """The record of a checkpoint whose files are all there in full length.

    UserError says what is wrong with it; Gone where nothing stands at `path`.
    """
    with _told_when_gone(path):
        record = _parse(path, _read_meta(path))
        # lengths are cheap to compare; checksums wait until the files are read
        for name, entry in record.files.items():
            size = _size(path, name)
            if size is None:
                raise UserError(f"{path}/{name} is missing: {CURE}")
            if size != entry["bytes"]:
                raise UserError(
                    f"{path}/{name} has {size} bytes instead of {entry['bytes']}: {CURE}"
                )
        return record


def _read_meta(path) -> bytes:
    """The content of meta.json."""
    fs, root = filesystem(path)
    try:
        # a local one might be a pipe, for which nobody should wait
        if not is_remote(path):
            return read_bytes(Path(path, "meta.json"))
        with reaching(path):
            return fs.cat_file(f"{root}/meta.json")
    except UserError as e:
        if isinstance(e.__cause__, FileNotFoundError | NotADirectoryError):
            raise UserError(_no_meta(path)) from None
        raise


def _no_meta(path) -> str:
    return (
        f"{path} is not a checkpoint (no meta.json in it): name a folder step_NNNNNNNN that "
        "rawchat has written"
    )


def _parse(path, content: bytes) -> Record:
    """The record that meta.json holds, every entry checked."""
    damaged = f"{path}/meta.json is damaged"
    try:
        record: Any = parse_json(content, path, expect=None)
    except UserError:
        raise UserError(f"{damaged}: {CURE}") from None

    # whose is it?
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise UserError(
            f"{path} was not written by rawchat: name a folder step_NNNNNNNN that it has written"
        )
    version = record.get("format")
    if not isinstance(version, int):
        raise UserError(f"{damaged} (format): {CURE}")
    if version > FORMAT:
        raise UserError(
            f"{path} has checkpoint format {version}, newer than the {FORMAT} known here: "
            "update rawchat"
        )

    # older ones do not say when their training began: each counts as a training of its own
    record = {"began": record.get("time"), "split": {}} | record
    wrong = [name for name, is_right in ENTRIES.items() if not is_right(record.get(name))]
    if wrong:
        raise UserError(f"{damaged} ({', '.join(wrong)}): {CURE}")
    return Record(*(record[name] for name in ENTRIES))


def _size(path, name: str) -> int | None:
    """The length of a checkpoint's file, None where it is missing."""
    fs, root = filesystem(path)
    with reaching(path):
        try:
            return fs.size(f"{root}/{name}")
        except FileNotFoundError:
            return None


def _is_away(path) -> bool:
    """Whether nothing stands there, not even a link to nothing."""
    with reading(path):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return True
    return False


@contextlib.contextmanager
def _told_when_gone(path):
    """Turn an error met while reading into Gone where the checkpoint is no longer there."""
    try:
        yield
    except (UserError, FileNotFoundError) as e:
        if not is_remote(path) and _is_away(path):
            raise Gone(_no_meta(path)) from e
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path} is missing a file ({e.filename}): {CURE}") from e


@contextlib.contextmanager
def _at_hand(path, files: dict) -> Iterator[Path]:
    """A local folder with these files of a checkpoint; remote ones are fetched for a while."""
    if not is_remote(path):
        yield Path(path)
        return
    fs, root = filesystem(path)
    with tempfile.TemporaryDirectory() as fetched:
        with reaching(path):
            for name in files:
                fs.get_file(f"{root}/{name}", f"{fetched}/{name}")
        yield Path(fetched)


@contextlib.contextmanager
def verified(path, files: dict) -> Iterator[Path]:
    """Yield a local folder with these files of a checkpoint, their checksums compared."""
    with _told_when_gone(path), _at_hand(path, files) as local:
        for name, entry in files.items():
            with reading(f"{path}/{name}"):
                checksum = sha256(regular(local / name))
            if checksum != entry["sha256"]:
                raise UserError(f"{path}/{name} does not match its checksum: {CURE}")
        yield local


# ---- all of a folder -----------------------------------------------------------------------------


def scan(folder) -> list[tuple[Any, Record | UserError]]:
    """(path, record, or the UserError that reading it met) of every checkpoint, newest first.

    Damaged ones come before all others: who can say how new they are?
    """
    return retried(lambda: _scan(folder))


def _scan(folder) -> list[tuple[Any, Record | UserError]]:
    sound, damaged = [], []
    for name in filter(NAME.fullmatch, _names(folder)):
        path = join(folder, name)
        try:
            sound.append((path, read_record(path)))
        except (Gone, Unreachable):
            raise
        except UserError as e:
            damaged.append((path, e))
    # by training and step, whatever the names of the folders say
    return damaged + sorted(sound, key=lambda item: item[1].place, reverse=True)


def _names(folder) -> list[str]:
    """What stands in a folder, which may be missing."""
    fs, root = filesystem(folder)
    with reaching(folder):
        try:
            paths = fs.ls(root, detail=False)
        except FileNotFoundError:
            return []
    return [path.rstrip("/").rpartition("/")[2] for path in paths]


def sound_ones(folder) -> list[tuple[Any, Record]]:
    """(path, record) of every checkpoint that is not visibly damaged, newest first."""
    return [(path, record) for path, record in scan(folder) if isinstance(record, Record)]


def lowest(checkpoints: list[tuple[Any, Record]]):
    """The path with the lowest metric among them, None if none has a metric."""
    rated = [(record.metric, path) for path, record in checkpoints if record.metric is not None]
    if not rated:
        return None
    return min(rated, key=lambda item: item[0])[1]


def part_of(file: str) -> str:
    """The top-level key of the tree that a checkpoint's file holds."""
    return file.partition(".")[0]


def latest(folder, only: str | None = None):
    """Path of the newest sound checkpoint in `folder`, None if there is none.

    Warns about damaged ones that it passes over; UserError if all are. Local files are checked
    against their checksums, remote ones by size (`restore` checks what it fetches). only: the
    top-level key that will be read, so that no other file is hashed; "" where no array will be.
    """
    return retried(lambda: _latest(folder, only))


def _latest(folder, only: str | None):
    checkpoints, error = scan(folder), None
    # the newest first, until one is as it was written
    for path, record in checkpoints:
        try:
            if isinstance(record, UserError):
                raise record
            files = {} if is_remote(path) else record.files
            if only is not None:
                files = {name: entry for name, entry in files.items() if part_of(name) == only}
            with verified(path, files):
                return path
        except (Gone, Unreachable):
            raise
        except UserError as e:
            warnings.warn(f"passing over a checkpoint: {e}", stacklevel=4)
            error = e
    # there are some, and none can be used
    if error:
        raise UserError(f"no checkpoint of {len(checkpoints)} in {folder} can be used ({error})")
    return None


def best(folder):
    """Path of the checkpoint with the lowest metric in `folder`, None if none has a metric."""
    return lowest(sound_ones(folder))


def resolve(path, only: str | None = None):
    """The checkpoint that a path stands for: itself, or the newest below it (`only` as in
    `latest`).
    """
    fs, root = filesystem(path)
    with reaching(path):
        # a checkpoint, a run folder, or a folder of checkpoints
        if NAME.fullmatch(root.rpartition("/")[2]) or fs.exists(f"{root}/meta.json"):
            return path
        folder = path
        if fs.isdir(f"{root}/checkpoints"):
            folder = join(path, "checkpoints")

    newest = latest(folder, only)
    if newest is None:
        raise UserError(
            f"no checkpoint in {path}: train first, or name a run folder, its checkpoints folder "
            "or one of the step_NNNNNNNN in it"
        )
    return newest
