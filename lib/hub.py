"""Model repositories of the Hugging Face Hub: made, committed to, read at one revision.

A change is one commit, whatever it holds: large files go up first, and nobody sees any of them
before the commit that names them. An upload that was killed leaves the old revision as it was, and
what it had sent is not sent again.
"""

import contextlib
import errno
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lib.files import ADVICE, UserError, first_line

# how often a commit is tried, and the seconds before the second try; each wait is twice the last
TRIES = 3
WAIT = 2.0

# what the Hub says when it has too much to do, or something fell over
BUSY = (408, 429, 500, 502, 503, 504)

# what advises on tokens
TOKENS = (
    "set the secret HF_TOKEN to a token with write access (https://huggingface.co/settings/tokens)"
)

T = TypeVar("T")


class Revision(NamedTuple):
    """A repository, and which of its revisions is meant; "" for the newest."""

    repo: str
    revision: str

    @property
    def name(self) -> str:
        return f"hf:{self.repo}@{self.revision}" if self.revision else f"hf:{self.repo}"


def parse(text: str) -> Revision:
    """hf:USER/NAME or hf:USER/NAME@REVISION (also hub: and hf://) as a Source."""
    plain = re.sub(r"^(hf|hub):(//)?", "", text.strip())
    repo, _, revision = plain.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"{text} is no repository: write hf:USER/NAME or hf:USER/NAME@REVISION")
    return Revision(repo, revision)


# ---- what goes wrong -----------------------------------------------------------------------------


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, looked for in its causes too."""
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        cause = cause.__cause__
    return None


def advice(error: BaseException, token: str | None = None) -> str:
    """What to do about what the Hub's client raised."""
    status = status_of(error)
    if status in (401, 403) and token:
        return f"the token is wrong, has run out or may not do that: {TOKENS}"
    if status in (401, 403, 404) and not token:
        return f"check the name, and for what is private {TOKENS}"
    if status == 404:
        return "check the name and the revision"
    if status in (409, 412):
        return "somebody else has changed it meanwhile: try again"
    if status == 429:
        return "the Hub asks for patience: try again in some minutes"
    return "check the name and the network"


@contextlib.contextmanager
def reaching(doing: str, token: str | None = None):
    """Turn whatever the Hub or the way to it answers into a UserError that begins with `doing`."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        # a full disk, or a file that is gone, is no matter of the Hub's
        if isinstance(e, OSError) and e.errno in (errno.ENOENT, *ADVICE):
            raise
        raise UserError(f"{doing} ({first_line(e)}): {advice(e, token)}") from e


def patiently(call: Callable[[], T], also_lines: bool = True) -> T:
    """call(), tried again while the Hub is busy and, with `also_lines`, when the line was cut."""
    for n in range(TRIES - 1):
        try:
            return call()
        except Exception as e:
            if status_of(e) not in BUSY and not (also_lines and _is_of_the_line(e)):
                raise
            time.sleep(WAIT * 2**n)
    return call()


def _is_of_the_line(error: BaseException) -> bool:
    """Whether no answer came: a connection refused or cut, in one of the classes for that."""
    cause: BaseException | None = error
    while cause is not None:
        if status_of(cause) is not None:
            return False
        # the client's HTTP library has errors of its own, and was another one in its old versions
        library = type(cause).__module__.partition(".")[0]
        if library.startswith(("httpx", "requests", "urllib3")) or isinstance(
            cause, ConnectionError
        ):
            return True
        cause = cause.__cause__
    return False


# ---- repositories --------------------------------------------------------------------------------


def client(token: str | None) -> Any:
    """The Hub's own client."""
    import huggingface_hub

    return huggingface_hub.HfApi(token=token)


def make(repo: str, token: str | None, private: bool = True):
    """Make a model repository unless it is there already."""
    # it is the first to be asked: without a network that is to be told at once
    patiently(
        lambda: client(token).create_repo(repo, private=private, exist_ok=True), also_lines=False
    )


def commit(
    repo: str,
    files: dict[str, Path],
    gone: Iterable[str],
    message: str,
    token: str | None,
) -> str:
    """Put files (name there: path here) into a repository and take others out, in one commit.

    Returns the commit's id. A commit whose answer was lost is sent again; it changes nothing then.
    """
    import huggingface_hub as hub

    def send() -> str:
        operations: list = [hub.CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [hub.CommitOperationDelete(name) for name in gone]
        return client(token).create_commit(repo, operations, commit_message=message).oid

    return patiently(send)


def commit_of(source: Revision, token: str | None) -> str:
    """The id of the commit that a revision is now: a branch moves on, a commit does not."""
    info = patiently(
        lambda: client(token).model_info(source.repo, revision=source.revision or None)
    )
    return info.sha


def names(source: Revision, token: str | None) -> list[str]:
    """All files of a revision."""
    revision = source.revision or None
    return patiently(lambda: client(token).list_repo_files(source.repo, revision=revision))


def download(source: Revision, files: Iterable[str], folder: Path, token: str | None):
    """Bring files of a revision into a folder, under their names there.

    What is there already is not fetched again, and what was cut off goes on where it was.
    """
    for name in files:
        patiently(
            lambda name=name: client(token).hf_hub_download(
                source.repo, name, revision=source.revision or None, local_dir=folder
            )
        )
