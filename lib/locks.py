"""File locks: who works in a folder, for as long as that process lives.

The kernel lets go of a lock when its holder ends, however it ends. On a file system without locks
(Drive, buckets mounted as folders) nobody is kept out.
"""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lib.files import UserError, is_remote, writing

NAME = ".lock"


def open_lock(path: Path) -> IO[bytes]:
    """A lock file, open. A link in its place is not followed out of the folder."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as e:
        if e.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise UserError(f"{path} is not a plain file: remove it, then run again") from None
    return os.fdopen(descriptor, "r+b", buffering=0)


def take(file: IO[bytes], wait: bool, shared: bool = False) -> bool | None:
    """True once locked, False where another holds it, None where this file system has no locks.

    shared: only together with others who ask so, as those who merely look.
    """
    import fcntl

    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


@contextlib.contextmanager
def working_in(folder) -> Iterator[None]:
    """Keep all others out of `folder` meanwhile; UserError that names the one who is in it."""
    if is_remote(folder):
        yield
        return
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open_lock(Path(folder) / NAME)
    with file:
        _refuse_second(folder, file, take(file, wait=False))
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # a full disk keeps nobody from working
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
        yield


def check_free(folder):
    """UserError where somebody works in `folder` now: said before any compute is spent."""
    if is_remote(folder) or not (Path(folder) / NAME).exists():
        return
    with writing(folder), open_lock(Path(folder) / NAME) as file:
        _refuse_second(folder, file, take(file, wait=False, shared=True))


def _refuse_second(folder, file: IO[bytes], taken: bool | None):
    if taken is False:
        holder = file.read(200).decode("utf-8", "replace") or "another process"
        raise UserError(
            f"{folder} is being written by {holder}: stop that one, or take another run name"
        )
