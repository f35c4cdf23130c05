"""Files from elsewhere: those of the Hugging Face Hub through its own client, others checked by
their hash.

The Hub's client brings what people expect of it: a cache under HF_HOME that all programs share,
downloads that are resumed, mirrors (HF_ENDPOINT), gated and private sets (HF_TOKEN or a login), and
HF_HUB_OFFLINE. Added here is patience with a busy server, told while it lasts, and errors in one
sentence.
"""

import contextlib
import fcntl
import random
import socket
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib import runtime
from lib.files import UserError, first_line, read_json, replacing, sha256, write_json, writing

CACHE = ".cache"
# Attempts before a download is given up; a server that says that it is busy gets twice as many.
TRIES = 5
BACKOFF = 1.0  # seconds between attempts, then doubled
LONGEST_PAUSE = 300  # seconds; a server may ask for a longer one
# the branch on which the Hub keeps a parquet copy of every data set
PARQUET = "refs/convert/parquet"


# ---- patience ----------------------------------------------------------------------------------


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, or behind what caused it."""
    while error is not None:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None) or getattr(error, "code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def asked_pause(error: BaseException | None) -> float:
    """Seconds that a busy server asks to wait ("Retry-After"), at most LONGEST_PAUSE."""
    while error is not None:
        headers = getattr(getattr(error, "response", error), "headers", None) or {}
        text = headers.get("Retry-After") or ""
        if text.isdigit():
            return min(float(text), LONGEST_PAUSE)
        error = error.__cause__
    return 0.0


def patiently(what: str, attempt: Callable[[], Any], tries: int = 0) -> Any:
    """What `attempt` returns, tried again where the network or a busy server fails.

    what: to be downloaded, for messages. tries: 0 for TRIES. UserError where it cannot be had.
    """
    tries, failures = tries or TRIES, 0
    while True:
        try:
            with writing(what):
                return attempt()
        except UserError:
            raise
        except Exception as e:
            refuse(what, e)
            status, failures = status_of(e), failures + 1
            busy = status == 429 or (status or 0) >= 500
            if failures >= (2 * tries if busy else tries):
                raise UserError(f"cannot download {what}: {final_words(status, e)}") from e
            pause = min(BACKOFF * 2**failures, 60) * random.uniform(0.5, 1)
            pause = max(asked_pause(e), pause)
            if pause > 2:
                why = f"the server answers {status}" if status else "no connection"
                tell(f"{what}: {why}, trying again in {pause:.0f} s")
            time.sleep(pause)


def refuse(what: str, error: Exception):
    """Raise a UserError for what waiting does not mend."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        raise UserError(
            f"{what} is not in the cache, and HF_HUB_OFFLINE forbids to download it: unset that, or"
            " load it once with a network"
        ) from error

    status = status_of(error)
    if status in (401, 403):
        raise UserError(
            f"cannot download {what}: the server answered {status}; a private or gated set needs a"
            " Hub token that may read it (set HF_TOKEN), and its conditions accepted on its page"
        ) from error
    if status and 400 <= status < 500 and status not in (408, 416, 429):
        raise UserError(f"cannot download {what}: the server answered {status}") from error


def final_words(status: int | None, error: BaseException) -> str:
    if status == 429:
        return (
            "the server still answers 429 (too many requests): wait some minutes and run again, or"
            " set HF_TOKEN, which raises the limit"
        )
    if status:
        return f"the server still answers {status}: run again later, what came is kept"
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{first_line(error)}; check the network and run again, what came is kept"


def tell(sentence: str):
    """Say something that is no result, where it disturbs no output and looks like no error."""
    in_kernel = runtime.shell() is not None
    print(sentence, file=sys.stdout if in_kernel else sys.stderr, flush=True)


# ---- the Hub -----------------------------------------------------------------------------------


def knock():
    """Raise a ConnectionError at once where the Hub is out of reach: its client would try for half
    a minute.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=10).close()
    except OSError as e:
        raise ConnectionError(f"{address.hostname} cannot be reached ({first_line(e)})") from None


def hub_file(repo: str, name: str, revision: str = "main", tries: int = 0) -> Path:
    """A file of a data set on the Hub, from the shared cache or downloaded into it.

    What is in the cache is taken without a question to the Hub.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    place: Any = dict(repo_id=repo, filename=name, repo_type="dataset", revision=revision)
    cached = try_to_load_from_cache(**place)
    if isinstance(cached, str):
        return Path(cached)

    def download() -> str:
        knock()
        return hf_hub_download(**place)

    return Path(patiently(f"{name} of {repo}", download, tries))


def hub_parquet(repo: str, config: str, split: str, cache_dir=CACHE) -> list[Path]:
    """The parquet files of one split of a data set, in order. Their list is kept, for days without
    a network.
    """
    # Two tries: without a network a dozen tasks should not take minutes to say so.
    listing = Path(cache_dir, "hub", repo, config, f"{split}.json")
    if not listing.exists():
        what = f"the list of {repo}'s files ({config}, {split})"
        names = patiently(what, lambda: _listed(repo, f"{config}/{split}"), tries=2)
        if not names:
            raise UserError(
                f"{repo} has no parquet files for {config}, {split}: does it have that split?"
            )
        write_json(listing, names)
    names = read_json(listing, list)
    return [hub_file(repo, name, PARQUET) for name in names]


def _listed(repo: str, folder: str) -> list[str]:
    from huggingface_hub import HfApi

    knock()
    tree = HfApi().list_repo_tree(repo, folder, revision=PARQUET, repo_type="dataset")
    return sorted(entry.path for entry in tree if entry.path.endswith(".parquet"))


# ---- others ------------------------------------------------------------------------------------


def fetch(url: str, path, digest: str = "", tries: int = 0):
    """Download a file unless `path` is there; its size, and its SHA-256 where `digest` is given,
    are checked.
    """
    path = Path(path)
    if path.exists():
        return
    with writing(path), contextlib.ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(open(path.with_name(path.name + ".lock"), "w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run on this machine may want the same file
        if not path.exists():
            patiently(url, lambda: _fetch_once(url, path, digest), tries)


def _fetch_once(url: str, path: Path, digest: str):
    with replacing(path) as part, urllib.request.urlopen(url, timeout=30) as response:
        length = response.headers["Content-Length"]
        bar = runtime.progress(
            total=int(length) if length else None,
            unit="B",
            unit_scale=True,
            desc=path.name,
            leave=False,
        )
        with open(part, "wb") as f, bar:
            while chunk := response.read(1 << 20):
                f.write(chunk)
                bar.update(len(chunk))
        size = part.stat().st_size
        if length and size != int(length):
            raise ConnectionError(f"the connection closed after {size} of {length} bytes")
        if digest and sha256(part) != digest:
            raise UserError(
                f"{url} is not the file that was expected (its SHA-256 differs): it was changed"
                " there,"
                " or on the way"
            )
