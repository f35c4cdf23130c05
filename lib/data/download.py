"""Files from elsewhere, whole and checked: resumed where they broke off, with patience for a busy
server.
"""

import contextlib
import http.client
import os
import random
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

from lib.files import UserError, writing

CACHE = ".cache"
HUB = "https://huggingface.co"
# attempts without progress before a download gives up; seconds between them, then doubled
TRIES, BACKOFF = 5, 1.0


def fetch(url: str, path, token: str | None = None, tries: int = TRIES):
    """Download a file unless `path` is there: resumes a partial one, checks the size, backs off
    when it must.

    token: for the Hub, sent to no host that it redirects to. tries: attempts without progress
    before it gives up; a server that answers that it is busy gets more. UserError where the file
    cannot be had.
    """
    import fcntl

    from tqdm import tqdm

    path = Path(path)
    if path.exists():
        return
    part, failures, patience = path.with_name(path.name + ".part"), 0, tries
    with writing(part), contextlib.ExitStack() as stack:
        part.parent.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(open(path.with_name(path.name + ".lock"), "w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run on this machine may want the same file
        while not path.exists():
            have = part.stat().st_size if part.exists() else 0
            request = urllib.request.Request(
                url, headers={"Range": f"bytes={have}-"} if have else {}
            )
            if token:  # unredirected: the Hub redirects to a storage host that must not see it
                request.add_unredirected_header("Authorization", f"Bearer {token}")
            pause, before, tries = 0.0, have, patience
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    have = have if response.status == 206 else 0
                    length = response.headers["Content-Length"]
                    total = have + int(length) if length else None
                    bar = tqdm(
                        total=total,
                        initial=have,
                        unit="B",
                        unit_scale=True,
                        desc=path.name,
                        leave=False,
                    )
                    with open(part, "ab" if have else "wb") as f, bar:
                        while chunk := response.read(1 << 20):
                            f.write(chunk)
                            have += len(chunk)
                            bar.update(len(chunk))
                if total in (None, have):
                    os.replace(part, path)
                    break
                problem = f"the connection closed after {have} of {total} bytes"
            except urllib.error.HTTPError as e:
                problem = f"the server answered {e.code} {e.reason}"
                if e.code in (401, 403):
                    raise UserError(
                        f"{url}: {problem}; the Hub token is wrong, or a private data set needs one"
                    ) from e
                if e.code == 416:  # the partial file does not belong to what is there now
                    part.unlink()
                elif e.code != 429 and e.code < 500:
                    raise UserError(f"cannot download {url}: {problem}") from e
                # a busy server needs more patience
                asked, tries = e.headers["Retry-After"] or "", 2 * TRIES
                pause = min(float(asked), 300) if asked.isdigit() else 0.0
            except (
                urllib.error.URLError,
                http.client.HTTPException,
                ssl.SSLError,
                ConnectionError,
                TimeoutError,
            ) as e:
                problem = str(getattr(e, "reason", e)) or type(e).__name__
            failures = 0 if have > before else failures + 1
            if failures >= tries:
                raise UserError(
                    f"cannot download {url}: {problem}; check the network and run again, what came is kept"
                )
            time.sleep(max(pause, min(BACKOFF * 2**failures, 60) * random.uniform(0.5, 1)))
