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
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.data.corpus import check_tokenizer, corpus_of, is_records
from lib.data.download import CACHE
from lib.data.regions import warn_if_far
from lib.data.sources import Shard, digest_of, fetch_shard, find_shards, groups_of
from lib.data.streams import RecordShard, open_shards
from lib.data.tokenizer import Tokenizer
from lib.files import UserError, replacing
from lib.home import Shelf
from lib.runtime import show_waiting

FORMAT = 1  # of token shards and cursors; raise it when either changes meaning


class TokenShard(NamedTuple):
    """ids: 1-D uint16/uint32 memory map of documents, each starting with the bos id and holding no
    other one.
    """

    ids: np.ndarray
    groups: list[int]  # documents per row group (parquet) or file
    bytes: int  # of the documents as UTF-8

    @property
    def size(self) -> int:
        """Tokens in all."""
        return self.ids.size

    def spans(self, bos: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each document begins, and how many tokens it has, bos included."""
        begins = np.flatnonzero(self.ids == bos)
        return begins, np.diff(begins, append=self.ids.size)

    def pieces(self, begins, lengths) -> Iterator[np.ndarray]:
        """The tokens of these places, in this order."""
        places = zip(np.asarray(begins).tolist(), np.asarray(lengths).tolist())
        return (self.ids[begin : begin + length] for begin, length in places)


@dataclass(frozen=True)
class Tokens:
    """The token shards of one split: `tokens[i]` waits until shard i is there; iterating waits for
    each in turn.
    """

    identity: str
    bos: int
    shards: tuple[Callable[[], TokenShard | RecordShard], ...]
    # tokens of each shard, where that is known before it is opened
    sizes: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> TokenShard | RecordShard:
        return self.shards[i]()


@dataclass(frozen=True)
class ShardJob:
    """One shard on its way into the cache."""

    shard: Shard
    out: Path
    done: Future


def open_tokens(
    source: str,
    split: str,
    tokenizer: Tokenizer,
    *,
    shards: int = 8,
    cache_dir=CACHE,
    workers: int | None = None,
    shelf: Shelf | None = None,
) -> Tokens:
    """The tokens of one side of a source, returned when the first shard is ready; the rest follows
    in the background.

    Arguments as in `documents`; workers: processes that download and tokenise (default: one per
    core, at most 8). Shards are cached by content and tokenizer, and made anew where a cache file
    is damaged. shelf: a home that keeps them too (`lib.home`). A corpus of records
    (`lib.data.corpus`) is tokenised already, and read where it is.
    """
    if is_records(source):
        return _open_records(source, split, tokenizer)
    parts = find_shards(source, split, shards, cache_dir)
    folder = Path(cache_dir, "tokens").absolute()
    spec = folder / f"tokenizer-{tokenizer.fingerprint[:16]}.json"
    if not spec.exists():
        tokenizer.save(spec)

    jobs = []
    for shard in parts:
        key = digest_of(json.dumps([FORMAT, tokenizer.fingerprint, shard.identity]))[:32]
        jobs.append(ShardJob(shard, folder / f"{key}.npy", Future()))

    waiting = collections.deque(jobs)
    for _ in range(min(len(jobs), workers or min(os.cpu_count() or 1, 8))):
        threading.Thread(target=_work, args=(waiting, spec, shelf), daemon=True).start()

    identity = _identity(tokenizer, [shard.identity for shard in parts])
    tokens = Tokens(identity, tokenizer.bos, tuple(job.done.result for job in jobs))
    weakref.finalize(tokens, waiting.clear)  # nobody reads on: leave the rest undone

    _show_waiting(jobs, source)
    return _not_empty(tokens, source, split)


def _open_records(source: str, split: str, tokenizer: Tokenizer) -> Tokens:
    """The tokens of a corpus of records: to whoever reads them, the same as those of the text that
    it was made from.
    """
    corpus = corpus_of(source)
    check_tokenizer(corpus, tokenizer)
    warn_if_far(corpus.address)
    entries = corpus.of(split)
    sizes = tuple(entry.tokens for entry in entries)
    identity = _identity(tokenizer, [entry.identity for entry in entries])
    tokens = Tokens(identity, tokenizer.bos, open_shards(corpus, split), sizes)
    return _not_empty(tokens, source, split)


def _identity(tokenizer: Tokenizer, shards: list[str]) -> str:
    """What a cursor knows these tokens by."""
    return digest_of(json.dumps([FORMAT, tokenizer.fingerprint, shards]))


def _not_empty(tokens: Tokens, source: str, split: str) -> Tokens:
    sizes = tokens.sizes or (shard.size for shard in tokens)
    if not any(sizes):
        raise UserError(
            f"{source} has no documents in its {split} split: give it more, or choose another"
            " source"
        )
    return tokens


def _work(waiting: collections.deque[ShardJob], spec: Path, shelf: Shelf | None):
    """Do one job after another until none waits; what goes wrong is told to whoever reads the
    shard.
    """
    while True:
        try:
            job = waiting.popleft()
        except IndexError:
            return
        try:
            job.done.set_result(tokenised(job.shard, spec, job.out, shelf))
        except BaseException as e:
            job.done.set_exception(e)
            continue
        if shelf:
            shelf.keep(job.out)


def tokenised(shard: Shard, spec: Path, out: Path, shelf: Shelf | None = None) -> TokenShard:
    """A shard's tokens, from the file `out`; made in a process of its own where it isn't there, nor
    at home on a shelf.

    spec: the tokenizer's file. A shard of the Hub is downloaded first.
    """
    tokens = _load(out)
    if tokens is None and shelf:
        tokens = shelf.bring(out, _load)
    if tokens is None:
        _tokenise_apart(fetch_shard(shard), spec, out)
        tokens = _load(out)
    if tokens is None:
        raise UserError(f"cannot read back {out}: the disk is failing, so choose another folder")
    return tokens


def _show_waiting(jobs: list[ShardJob], source: str):
    """Wait for the first shard, with a bar where that takes more than two seconds."""
    show_waiting(
        lambda seconds: bool(wait([jobs[0].done], timeout=seconds).done),
        lambda: sum(job.done.done() for job in jobs),
        total=len(jobs),
        unit=" shards",
        desc=f"tokenising {source}",
    )


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
    behind the array, which holds the array's checksum.
    """
    try:
        ids = np.load(path, mmap_mode="r")
        with open(path, "rb") as f:
            f.seek(ids.offset + ids.nbytes)
            tail = json.load(f)
        if tail["crc"] != zlib.crc32(ids.data):
            return None
        # A view, because slicing a np.memmap is slow.
        return TokenShard(ids.view(np.ndarray), list(tail["groups"]), int(tail["bytes"]))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
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
    job = json.dumps([asdict(shard), str(spec), str(out)])
    output = ""
    # Where it died early, its last words and return code tell why.
    with contextlib.suppress(BrokenPipeError), worker:
        assert worker.stdin and worker.stdout
        try:
            worker.stdin.write(job + "\n")
            worker.stdin.flush()
        finally:
            output = worker.stdout.read()
    if worker.returncode == 3:
        raise UserError(output.splitlines()[-1])
    if worker.returncode < 0:
        raise UserError(
            f"the worker tokenising {shard.name} was killed by signal {-worker.returncode}, most"
            " often for lack of memory: run again, finished shards are kept"
        )
    if worker.returncode:
        raise RuntimeError(f"tokenising {shard.name} failed:\n{output}")


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
    # Not np.save, which hides that a disk is full.
    with replacing(out) as tmp, open(tmp, "wb") as f:
        np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(ids))
        f.write(ids.data)
        tail = dict(groups=groups, bytes=size, crc=zlib.crc32(ids.data))
        f.write(json.dumps(tail).encode())


if __name__ == "__main__":  # a worker of `_tokenise_apart`
    job_shard, *job_paths = json.loads(sys.stdin.readline())
    threading.Thread(target=lambda: sys.stdin.read() or os._exit(1), daemon=True).start()
    try:
        _tokenise(Shard(**job_shard), *map(Path, job_paths))
    except UserError as error:
        print(error, flush=True)
        sys.exit(3)
