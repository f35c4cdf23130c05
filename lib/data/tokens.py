"""From documents to token shards on disk: worker processes tokenise, a cache keeps what they
made.
"""

import collections
import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.data.download import CACHE, HUB
from lib.data.sources import Shard, digest_of, fetch_shard, find_shards, groups_of
from lib.data.tokenizer import Tokenizer
from lib.files import UserError, replacing

FORMAT = 1  # of token shards and cursors; raise it when either changes meaning


class TokenShard(NamedTuple):
    """ids: 1-D uint16/uint32 memory map of documents, each starting with the bos id and holding no
    other one.
    """

    ids: np.ndarray
    groups: list[int]  # documents per row group (parquet) or file
    bytes: int  # of the documents as UTF-8


@dataclass(frozen=True)
class Tokens:
    """The token shards of one split: `tokens[i]` waits until shard i is there; iterating waits for
    each in turn.
    """

    identity: str
    bos: int
    shards: tuple[Callable[[], TokenShard], ...]

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> TokenShard:
        return self.shards[i]()


def open_tokens(
    source: str,
    split: str,
    tokenizer: Tokenizer,
    *,
    shards: int = 8,
    cache_dir=CACHE,
    workers: int | None = None,
    hub: str = HUB,
    hub_token: str | None = None,
) -> Tokens:
    """The tokens of one side of a source, returned when the first shard is ready; the rest follows
    in the background.

    Arguments as in `documents`; workers: processes that download and tokenise (default: one per
    core, at most 8). Shards are cached by content and tokenizer, and made anew where a cache file
    is damaged.
    """
    found = find_shards(source, split, shards, cache_dir)
    folder = Path(cache_dir, "tokens").absolute()
    spec = folder / f"tokenizer-{tokenizer.fingerprint[:16]}.json"
    if not spec.exists():
        tokenizer.save(spec)
    jobs, futures = collections.deque(), []
    for shard in found:
        out = folder / (
            digest_of(json.dumps([FORMAT, tokenizer.fingerprint, shard.identity]))[:32] + ".npy"
        )
        futures.append(future := Future())
        if ready := _load(out):
            future.set_result(ready)
        else:
            jobs.append((shard, out, future))

    def work():
        while jobs:
            with contextlib.suppress(IndexError):  # another thread took the last one
                shard, out, future = jobs.popleft()
                try:
                    fetch_shard(shard, hub, hub_token)
                    _tokenise_apart(shard, spec, out)
                    future.set_result(_load(out))
                except BaseException as e:
                    future.set_exception(e)

    for _ in range(min(len(jobs), workers or min(os.cpu_count() or 1, 8))):
        threading.Thread(target=work, daemon=True).start()
    identity = digest_of(
        json.dumps([FORMAT, tokenizer.fingerprint, [shard.identity for shard in found]])
    )
    tokens = Tokens(identity, tokenizer.bos, tuple(future.result for future in futures))
    weakref.finalize(tokens, jobs.clear)  # nobody reads on: leave the rest undone
    if not any(shard.ids.size for shard in tokens):
        raise UserError(
            f"{source} has no documents in its {split} split: give it more, or choose another source"
        )
    return tokens


def spans(shard: TokenShard, bos: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each document of a shard begins, and how many tokens it has, bos included."""
    begins = np.flatnonzero(shard.ids == bos)
    return begins, np.diff(begins, append=shard.ids.size)


def tokens_of(texts: list[str], tokenizer: Tokenizer) -> Tokens:
    """Tokens of texts at hand, in memory: what `open_tokens` gives for a source, for a fixed
    evaluation set.
    """
    ids = np.array([i for row in tokenizer.encode_batch(texts, bos=True) for i in row], np.uint32)
    shard = TokenShard(ids, [len(texts)], sum(len(text.encode()) for text in texts))
    return Tokens(
        digest_of(json.dumps([FORMAT, tokenizer.fingerprint, texts])),
        tokenizer.bos,
        (lambda: shard,),
    )


def _load(path: Path) -> TokenShard | None:
    """A cached shard, or None where it is missing or damaged: a .npy file with a line of JSON
    behind the array.
    """
    try:
        ids = np.load(path, mmap_mode="r")
        with open(path, "rb") as f:
            f.seek(ids.offset + ids.nbytes)
            # a view, because slicing a np.memmap is slow
            return TokenShard(ids.view(np.ndarray), **json.load(f))
    except (OSError, EOFError, ValueError):
        return None


def _tokenise_apart(shard: Shard, spec: Path, out: Path):
    """Run `_tokenise` in a fresh interpreter: it needs no `__main__` guard, no fork of a process
    that runs JAX, no GIL.

    The worker lives only while its standard input is open, so it ends with this process however
    that ends; its own session keeps Ctrl-C from it, so that an interrupted run can still save its
    state.
    """
    worker = subprocess.Popen(
        [sys.executable, "-m", "lib.data.tokens"],
        cwd=Path(__file__).resolve().parents[2],
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    # where it died early, its last words and return code tell why
    with contextlib.suppress(BrokenPipeError), worker:
        try:
            worker.stdin.write(json.dumps([asdict(shard), str(spec), str(out)]) + "\n")
            worker.stdin.flush()
        finally:
            said = worker.stdout.read()
    if worker.returncode == 3:
        raise UserError(said.splitlines()[-1])
    if worker.returncode < 0:
        raise UserError(
            f"the worker tokenising {shard.name} was killed by signal {-worker.returncode}, most often for"
            " lack of memory: run again, finished shards are kept"
        )
    if worker.returncode:
        raise RuntimeError(f"tokenising {shard.name} failed:\n{said}")


def _tokenise(shard: Shard, spec: Path, out: Path):
    """Write what `_load` reads."""
    tokenizer = Tokenizer.load(spec)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    ids, groups, size = [np.empty(0, dtype)], [], 0
    for texts in groups_of(shard):
        ids += [np.array(tokenizer.encode(text, bos=True), dtype) for text in texts]
        groups.append(len(texts))
        size += sum(len(text.encode()) for text in texts)
    ids = np.concatenate(ids)
    # not np.save, which hides that a disk is full
    with replacing(out) as tmp, open(tmp, "wb") as f:
        np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(ids))
        f.write(ids.data)
        f.write(json.dumps(dict(groups=groups, bytes=size)).encode())


if __name__ == "__main__":  # a worker of `_tokenise_apart`
    job_shard, *job_paths = json.loads(sys.stdin.readline())
    threading.Thread(target=lambda: sys.stdin.read() or os._exit(1), daemon=True).start()
    try:
        _tokenise(Shard(**job_shard), *map(Path, job_paths))
    except UserError as error:
        print(error, flush=True)
        sys.exit(3)
