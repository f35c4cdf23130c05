"""Files that are never half-written, paths and JSON that others wrote, and errors that say what to
do.
"""

import contextlib
import errno
import functools
import glob
import hashlib
import json
import logging
import math
import os
import re
import shlex
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Bad input or surroundings, told in one sentence: what was wrong, where, and what to do.

    Notebooks and commands print only the sentence; everything else is a bug and keeps its
    traceback.
    """


class Unreachable(UserError):
    """A disk or mount does not answer: what stands there may be sound all the same."""


class Interrupted(UserError):
    """Work was left off because someone asked for it; the sentence says how to go on."""

    code = 130  # what a shell expects of a program that Ctrl-C has ended


def choose(kind: str, name: str, options) -> Any:
    """`options[name]`, or a UserError that lists the valid names.

    `options` may also be a plain collection; then it is `name`.
    """
    if name not in options:
        names = ", ".join(sorted(map(str, options)))
        raise UserError(f"unknown {kind} {name!r}: choose one of {names}")
    if isinstance(options, dict):
        return options[name]
    return name


ELSEWHERE = "choose another folder"
# what to do when writing fails with an error of the system
ADVICE = {
    errno.ENOSPC: f"the disk is full: free some space or {ELSEWHERE}, then run again",
    errno.EDQUOT: f"your disk quota is used up: free some space or {ELSEWHERE}, then run again",
    errno.EACCES: f"no permission to write there: {ELSEWHERE}",
    errno.EPERM: f"no permission to write there: {ELSEWHERE}",
    errno.EROFS: f"that file system is read-only: {ELSEWHERE}",
    errno.ENOTDIR: f"a file stands where a folder is needed: move it or {ELSEWHERE}",
    errno.EEXIST: f"a file stands where a folder is needed: move it or {ELSEWHERE}",
    errno.EISDIR: "a folder stands there: name a file in it",
    errno.ENAMETOOLONG: "that name is too long for this file system: take a shorter one",
}


# how the system tells that a place has gone away: a lost Drive or network mount, a broken disk
LOST = {
    errno.EIO,
    errno.ENOTCONN,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
}
COME_BACK = f"the disk or mount that it is on does not answer: mount it again or {ELSEWHERE}"


@contextlib.contextmanager
def writing(path):
    """Turn a full disk, a missing permission, a name clash or a lost mount, met while writing
    `path`, into a UserError.
    """
    try:
        yield
    except OSError as e:
        if e.errno in LOST:
            raise Unreachable(f"cannot reach {path}: {COME_BACK}, then run again") from e
        if e.errno not in ADVICE:
            raise
        raise UserError(f"cannot write {path}: {ADVICE[e.errno]}") from e


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`, which takes its place once all is on the disk.

    On failure it is removed.
    Readers see the old file or the new one, whole, never a part. Works for a file or for a folder
    (a folder that already stands there is swapped out and then removed).
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with writing(path):
            # a device such as /dev/null would be lost to everybody, a pipe to whoever reads it
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise UserError(f"cannot write {path}: it is no ordinary file, name another")
            path.parent.mkdir(parents=True, exist_ok=True)
            yield tmp

            # first the content
            parts = tmp.rglob("*") if tmp.is_dir() else ()
            for part in [tmp, *parts]:
                _fsync(part)

            # then the name: a folder can't be renamed over another that holds something
            if tmp.is_dir() and path.exists():
                old = tmp.with_suffix(".old")
                os.rename(path, old)
                os.rename(tmp, path)
                shutil.rmtree(old)
            else:
                os.replace(tmp, path)

            # a name is lasting only once its folder is on the disk
            _fsync(path.parent)
    finally:
        # unlike a Path, it raises nothing that would hide the error
        if os.path.isdir(tmp):
            shutil.rmtree(tmp, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # it must not hide the error that brought us here
                tmp.unlink()


def _fsync(path):
    """Wait until a file or folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path, data: bytes | str):
    """Write a whole file beside `path`, fsync it and rename it into place."""
    content = data.encode() if isinstance(data, str) else data
    with replacing(path) as tmp:
        tmp.write_bytes(content)


def to_json(obj, indent: int | None = 1) -> str:
    """JSON text as others can read it too.

    A NaN or an infinity, which JSON has not, becomes null.
    """
    return json.dumps(_finite(obj), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(obj):
    """A copy of a JSON-able value with None for what JSON has no number for."""
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_finite(value) for value in obj]
    return obj


def write_json(path, obj):
    """`write_atomic` of indented JSON with a final newline, without NaN and infinities."""
    write_atomic(path, to_json(obj) + "\n")


def update_json(path, **entries) -> dict:
    """Merge `entries` into the JSON object at `path` (made if missing) and return the whole."""
    old = read_json(path) if Path(path).exists() else {}
    write_json(path, old | entries)
    return old | entries


def save_tensors(arrays: dict, path, metadata: dict[str, str] | None = None):
    """Write numpy arrays by name into a safetensors file; OSError where the system refuses."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    options: Any = {"metadata": metadata} if metadata else {}
    try:
        save_file(arrays, path, **options)
    except SafetensorError as e:
        # this is how it tells of a full disk
        if code := re.search(r"os error (\d+)", str(e)):
            raise OSError(int(code[1]), str(e)) from e
        raise


# ---- reading ------------------------------------------------------------------------------------


def parse_json(text: str | bytes, where, expect: type | None = dict, cure: str = "") -> Any:
    """What a JSON text says, or a UserError that names `where` and may end with a `cure`.

    expect: the type that it must have, None for any. NaN and infinities, which older runs have
    written, are read as None.
    """
    cure = f": {cure}" if cure else ""
    # Python's reader knows NaN and Infinity, which are no JSON
    try:
        value = json.loads(text, parse_constant=lambda name: None)
    except RecursionError:
        raise UserError(f"{where}: not JSON that can be read (nested too deeply){cure}") from None
    except ValueError as e:
        raise UserError(f"{where}: not JSON ({first_line(e)}){cure}") from None
    if expect and not isinstance(value, expect):
        kind = {dict: "object", list: "list"}.get(expect, expect.__name__)
        raise UserError(f"{where} is damaged, it holds no JSON {kind}{cure}")
    return value


def read_json(path, expect: type | None = dict, cure: str = "delete it and run again") -> Any:
    """What a JSON file of ours holds; UserError where it is missing, damaged or something else."""
    return parse_json(read_bytes(path), path, expect, cure)


@contextlib.contextmanager
def reading(path):
    """Turn whatever the system says while `path` is read into a UserError."""
    try:
        yield
    except OSError as e:
        if e.errno in LOST:
            raise Unreachable(f"cannot reach {path}: {COME_BACK}, then run again") from e
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e


def regular(path):
    """The path, if it is that of an ordinary file; opening a pipe would hang for ever."""
    with reading(path):
        mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise UserError(f"cannot read {path}: it is no ordinary file")
    return path


def read_bytes(path) -> bytes:
    """A whole file; UserError where it cannot be read."""
    with reading(path):
        return Path(regular(path)).read_bytes()


def read_text(path) -> str:
    """A whole UTF-8 file, a byte order mark left out; UserError where it is anything else."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}): convert it first") from None


# ---- paths as people write them -----------------------------------------------------------------


def local_path(text) -> Path:
    """A path as a person writes it in a form, where no shell has expanded its ~ or $HOME."""
    try:
        path = Path(text).expanduser()
    except RuntimeError as e:
        raise UserError(f"cannot tell whose home {text} is: write the path out ({e})") from e
    # what exists under its literal name is taken, and a variable that is not set is part of a name
    if "$" in str(path) and not path.exists():
        path = Path(os.path.expandvars(path))
    return path


def path_or_address(text) -> Path | str:
    """A path as a person writes it, or an address such as gs://bucket/run, which stays as it is."""
    return str(text) if is_remote(text) else local_path(text)


def find_files(text) -> list[Path]:
    """The files that a path means: a file, all in a folder (below links too), or what a glob
    matches.

    What exists under its literal name is taken, even if the name looks like a glob. In folders,
    hidden files and folders are left out.
    """
    path = local_path(text)
    # what exists comes first
    if path.is_dir():
        return sorted(_walk(path))
    if path.exists():
        return [path] if path.is_file() else []
    matches = map(Path, glob.glob(str(path), recursive=True))
    return sorted(match for match in matches if match.is_file())


def _walk(folder: Path) -> Iterator[Path]:
    """The files below a folder that are not hidden."""
    visited = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        # a link may lead to a folder above it
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)

        # os.walk goes into the folders that are left in this list
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and Path(parent, name).is_file():
                yield Path(parent, name)


def quoted(*words) -> str:
    """A command line to copy into a shell, its words quoted where they need it."""
    return shlex.join(map(str, words))


def sha256(path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def set_aside(folder, *names: str) -> Path:
    """Move what a fresh start would overwrite into FOLDER/old-N, and return that.

    Nothing trained is ever lost.
    """
    number = 1
    while (old := Path(folder) / f"old-{number}").exists():
        number += 1
    old.mkdir()
    for name in names:
        if (Path(folder) / name).exists():
            (old / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).rename(old / name)
    return old


def is_remote(path) -> bool:
    """Whether `path` is an address such as gs://bucket/run, s3://…, hf://user/repo or memory://…"""
    return "://" in str(path)


def join(folder, *names):
    """A path inside a folder: a Path, or a string where it is remote, to keep its "//" as it is."""
    if is_remote(folder):
        return "/".join([str(folder).rstrip("/"), *names])
    return Path(folder, *names)


def first_line(error) -> str:
    """What an exception says, for a sentence of ours: its first line, or else its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# seconds after which a store that says nothing is given up
PATIENCE = 60.0
# addresses of stores whose clients hang where there is no login
BUCKETS = {"gs", "gcs", "s3", "s3a"}


def answered(address, work: Callable[[], Any], seconds: float = 0) -> Any:
    """work(), which asks a store; UserError where that takes longer than `seconds` (0: PATIENCE).

    The clients of buckets try for minutes where there is no network or no login. Whatever hangs is
    left to its thread.
    """
    if not is_remote(address):
        return work()
    answer, seconds = in_background(work), seconds or PATIENCE
    if not wait([answer], timeout=seconds).done:
        raise Unreachable(
            f"{address} did not answer in {seconds:.0f} s: check the address, your login and the"
            " network"
        )
    return answer.result()


def in_background(work: Callable[[], Any]) -> Future:
    """What work() will have given, in a thread that keeps nobody from ending."""
    answer: Future = Future()

    def do():
        try:
            answer.set_result(work())
        except BaseException as e:
            answer.set_exception(e)

    threading.Thread(target=do, name="background", daemon=True).start()
    return answer


@contextlib.contextmanager
def reaching(path):
    """`writing`, and for a remote `path` any other failure (login, network, missing bucket) as a
    UserError too.
    """
    try:
        with writing(path):
            yield
    except UserError:
        raise
    except Exception as e:
        if not is_remote(path):
            raise
        reason, advice = first_line(e), "check the address, your login and the network"
        if isinstance(e, FileNotFoundError):
            reason, advice = "there is no such bucket or file", "check the address"
        # gcsfs has no class for it
        if isinstance(e, PermissionError) or str(e).startswith("Forbidden"):
            advice = "your login may not do that there: ask for the right, or choose another place"
        raise UserError(f"cannot reach {path} ({reason}): {advice}") from e


def filesystem(path):
    """fsspec's file system for a local or remote path, and the path by its rules.

    UserError where it cannot be had.
    """
    import fsspec

    scheme, _, inside = str(path).partition("://")
    if not is_remote(path):
        path = local_path(path)
    if scheme in BUCKETS:
        fs = _store(f"{scheme}://{inside.split('/')[0]}")
        inner = fs._strip_protocol(str(path))
    else:
        with reaching(path):
            fs, inner = fsspec.core.url_to_fs(str(path))
    # others write there too
    fs.invalidate_cache()
    return fs, inner


@functools.cache
def _store(bucket: str):
    """The client of a bucket that has said its first word, whatever that is: who asks it next need
    not fear to hang. It is kept, for finding a login takes a client seconds.
    """
    import fsspec

    # gcsfs tells each failure with a traceback, and we tell it in a sentence
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

    def reach():
        with reaching(bucket):
            fs, root = fsspec.core.url_to_fs(bucket)
        with contextlib.suppress(Exception):
            fs.exists(root)
        return fs

    return answered(bucket, reach)
