"""Files that are never half-written, and errors that say what to do."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path


class UserError(Exception):
    """Bad input or surroundings, told in one sentence: what was wrong, where, and what to do.

    Notebooks and commands print only the sentence; everything else is a bug and keeps its traceback.
    """


def choose(kind: str, name: str, options):
    """`options[name]`, or a UserError that lists the valid names (`options` may also be a plain collection)."""
    if name not in options:
        raise UserError(
            f"unknown {kind} {name!r}: choose one of {', '.join(sorted(map(str, options)))}"
        )
    return options[name] if isinstance(options, dict) else name


@contextlib.contextmanager
def writing(path):
    """Turn a full disk, a missing permission or a name clash met while writing `path` into a UserError."""
    try:
        yield
    except OSError as e:
        advice = {
            errno.ENOSPC: "the disk is full: free some space or choose another folder, then run again",
            errno.EDQUOT: "your disk quota is used up: free some space or choose another folder, then run again",
            errno.EACCES: "no permission to write there: choose another folder",
            errno.EPERM: "no permission to write there: choose another folder",
            errno.EROFS: "that file system is read-only: choose another folder",
            errno.ENOTDIR: "a file stands where a folder is needed: move it or choose another folder",
            errno.EEXIST: "a file stands where a folder is needed: move it or choose another folder",
        }.get(e.errno)
        if advice is None:
            raise
        raise UserError(f"cannot write {path}: {advice}") from e


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; on success it is fsynced and renamed over `path`, on failure removed.

    Readers see the old file or the new one, whole, never a part. Works for a file or for a folder (a folder
    that already stands there is swapped out and then removed).
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield tmp
            for p in [tmp, *(tmp.rglob("*") if tmp.is_dir() else ())]:
                _fsync(p)
            if tmp.is_dir() and path.exists():
                old = tmp.with_suffix(".old")
                os.rename(path, old)
                os.rename(tmp, path)
                shutil.rmtree(old)
            else:
                os.replace(tmp, path)
            _fsync(path.parent)
    finally:
        if tmp.is_dir():
            shutil.rmtree(tmp, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # it must not hide the error that brought us here
                tmp.unlink()


def _fsync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path, data: bytes | str):
    """Write a whole file beside `path`, fsync it and rename it into place."""
    with replacing(path) as tmp:
        tmp.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path, obj):
    """`write_atomic` of indented JSON with a final newline."""
    write_atomic(path, json.dumps(obj, indent=1, ensure_ascii=False) + "\n")


def update_json(path, **entries) -> dict:
    """Merge `entries` into the JSON object at `path` (made if missing) and return the whole."""
    old = json.loads(Path(path).read_text()) if Path(path).exists() else {}
    write_json(path, old | entries)
    return old | entries


def sha256(path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def set_aside(folder, *names: str) -> Path:
    """Move what a fresh start would overwrite into FOLDER/old-N and return that: nothing trained is ever lost."""
    number = 1
    while (old := Path(folder) / f"old-{number}").exists():
        number += 1
    old.mkdir()
    for name in names:
        if (Path(folder) / name).exists():
            (Path(folder) / name).rename(old / name)
    return old


def is_remote(path) -> bool:
    """Whether `path` is an address such as gs://bucket/run, s3://…, hf://user/repo or memory://…"""
    return "://" in str(path)


def join(folder, *names):
    """A path inside a local folder (as a Path) or a remote one (as a string: a Path would spoil its "//")."""
    return (
        "/".join([str(folder).rstrip("/"), *names]) if is_remote(folder) else Path(folder, *names)
    )


def first_line(error) -> str:
    """What an exception says, for a sentence of ours: its first line, or its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def reaching(path):
    """`writing`, and for a remote `path` any other failure (login, network, missing bucket) as a UserError too."""
    try:
        with writing(path):
            yield
    except UserError:
        raise
    except Exception as e:
        if not is_remote(path):
            raise
        raise UserError(
            f"cannot reach {path} ({first_line(e)}): check the address, your login and the network"
        ) from e


def filesystem(path):
    """fsspec's file system for a local or remote path, and the path by its rules; UserError where it cannot be had."""
    import fsspec

    with reaching(path):
        fs, inner = fsspec.core.url_to_fs(str(path))
        fs.invalidate_cache()
        return fs, inner
