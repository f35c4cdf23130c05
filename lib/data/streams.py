"""A corpus of array_record files, on a disk or in a bucket, read through Grain.

The source `records:gs://bucket/corpus` reads what `python -m lib.data.records` has written. A
corpus in a bucket is brought shard by shard, the next one while this one is read: one long transfer
costs a bucket less time and money than a hundred thousand small ones. From the disk Grain reads the
documents in the order that packing asks for, so batches and cursors are those of the local path,
bit for bit.
"""

import collections
import functools
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from lib.data.corpus import (
    Entry,
    RecordCorpus,
    bring,
    corpus_of,
    record_begins,
    tokenizer_in,
)
from lib.files import (
    UserError,
    first_line,
    in_background,
    is_remote,
    join,
    local_path,
    reading,
    sha256,
)

BLOCK = 64  # pieces that are read together
THREADS, AHEAD = 4, 8  # that read blocks, and blocks that wait to be asked for
KEPT = 16  # shards of a remote corpus that stay on this machine's disk


def package() -> Any:
    """The module `grain`; UserError where it, or array_record below it, is not installed."""
    try:
        import array_record  # noqa: F401  # pyright: ignore[reportMissingImports]
        import grain  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UserError(
            f"records are read with Grain ({e}): pip install 'grain>=0.2.12' 'array_record>=0.8'"
        ) from e
    return grain


# ---- one shard -----------------------------------------------------------------------------------


class RecordShard:
    """A shard on this machine's disk; what `lib.data.tokens.TokenShard` is for a memory map.

    lengths: tokens of each document. groups: documents per row group of what it was made from.
    """

    def __init__(self, folder: Path, entry: Entry, dtype: str):
        grain = package()
        lengths, self.groups = _read_index(folder, entry)
        self.path = folder / f"{entry.name}.array_record"
        self.bytes = entry.bytes
        self.lengths = lengths.astype(np.int64)
        self.begins = self.lengths.cumsum() - self.lengths
        self.record_begins = record_begins(self.lengths)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        try:
            self.records = grain.sources.ArrayRecordDataSource([str(self.path)])
            count = len(self.records)
        except (RuntimeError, OSError, ValueError) as e:
            raise UserError(f"cannot read {self.path} ({first_line(e)}): write it again") from e
        if count != entry.records or self.size != entry.tokens:
            raise UserError(
                f"{self.path} holds {count} records of {entry.records}: it is damaged, so write it"
                " again"
            )

    @property
    def size(self) -> int:
        """Tokens in all."""
        return int(self.lengths.sum())

    def spans(self, bos: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each document begins, and how many tokens it has, bos included."""
        return self.begins, self.lengths

    def pieces(self, begins, lengths) -> Iterator[np.ndarray]:
        """The tokens of these places, in this order, read ahead by Grain's threads."""
        grain = package()
        blocks = _Blocks(self, np.asarray(begins, np.int64), np.asarray(lengths, np.int64))
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
        for block in grain.MapDataset.source(blocks).to_iter_dataset(options):
            yield from block


class _Blocks:
    """Pieces of a shard by the block, as a source for Grain: one read for many of them."""

    def __init__(self, shard: RecordShard, begins: np.ndarray, lengths: np.ndarray):
        self.shard, self.begins, self.lengths = shard, begins, lengths

    def __len__(self) -> int:
        return -(-len(self.begins) // BLOCK)

    def __getitem__(self, i: int) -> list[np.ndarray]:
        shard = self.shard
        chosen = slice(i * BLOCK, (i + 1) * BLOCK)
        begins, lengths = self.begins[chosen], self.lengths[chosen]
        firsts = np.searchsorted(shard.record_begins, begins, "right") - 1
        lasts = np.searchsorted(shard.record_begins, begins + lengths - 1, "right") - 1
        spans = [np.arange(first, last + 1) for first, last in zip(firsts, lasts)]

        # a record that several pieces lie in is read once
        numbers = np.unique(np.concatenate(spans))
        try:
            raw = shard.records.__getitems__(numbers.tolist())
        except (RuntimeError, OSError, ValueError, IndexError) as e:
            raise UserError(f"cannot read {shard.path} ({first_line(e)}): write it again") from e
        records = {int(n): np.frombuffer(data, shard.dtype) for n, data in zip(numbers, raw)}

        pieces = []
        for begin, length, span in zip(begins, lengths, spans):
            parts = [records[int(number)] for number in span]
            ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
            offset = begin - shard.record_begins[span[0]]
            pieces.append(ids[offset : offset + length])
        return pieces


def _read_index(folder: Path, entry: Entry) -> tuple[np.ndarray, list[int]]:
    """The lengths of a shard's documents and of its groups, compared with their checksum."""
    path = folder / f"{entry.name}.index.npz"
    with reading(path):
        digest = sha256(path)
    if digest != entry.files[path.name]:
        raise UserError(f"{path} does not match its checksum: write it again")
    with np.load(path) as arrays:
        return arrays["lengths"], arrays["groups"].tolist()


# ---- a corpus, shard by shard --------------------------------------------------------------------


class _Stage:
    """Brings shards of a remote corpus to this machine's disk, the next one ahead of time."""

    def __init__(self, corpus: RecordCorpus, entries: list[Entry]):
        self.corpus, self.entries = corpus, entries
        self.folder = tempfile.TemporaryDirectory(prefix="records-")
        self.lock = threading.Lock()
        # on the disk or under way, by use, the newest last
        self.shards: collections.OrderedDict[int, Future] = collections.OrderedDict()

    def open(self, i: int) -> RecordShard:
        """Shard i, waited for where it is still under way."""
        with self.lock:
            shard = self._begin(i)
            self._begin((i + 1) % len(self.entries))
            while len(self.shards) > KEPT:
                self._forget(next(iter(self.shards)))
        try:
            return shard.result()
        except BaseException:
            # asked for again, it is tried again
            with self.lock:
                self.shards.pop(i, None)
            raise

    def _begin(self, i: int) -> Future:
        if i not in self.shards:
            entry, folder = self.entries[i], Path(self.folder.name)
            self.shards[i] = in_background(lambda: _bring(self.corpus, entry, folder))
        self.shards.move_to_end(i)
        return self.shards[i]

    def _forget(self, i: int):
        self.shards.pop(i)
        for name in self.entries[i].files:
            # whoever still reads it has it open
            Path(self.folder.name, name).unlink(missing_ok=True)


def _bring(corpus: RecordCorpus, entry: Entry, folder: Path) -> RecordShard:
    """Copy a shard's files into a folder, compare their checksums and open it."""
    for name, digest in entry.files.items():
        bring(corpus.address, name, folder / name)
        if sha256(folder / name) != digest:
            raise UserError(
                f"{join(corpus.address, name)} does not match its checksum: write it again"
            )
    return RecordShard(folder, entry, corpus.dtype)


def open_shards(corpus: RecordCorpus, split: str) -> tuple[Callable[[], RecordShard], ...]:
    """For each shard of a split a function that opens it."""
    package()
    entries = corpus.of(split)
    if is_remote(corpus.address):
        stage = _Stage(corpus, entries)
        return tuple(functools.partial(stage.open, i) for i in range(len(entries)))

    @functools.cache
    def opened(i: int) -> RecordShard:
        return RecordShard(local_path(corpus.address), entries[i], corpus.dtype)

    return tuple(functools.partial(opened, i) for i in range(len(entries)))


def texts_of(source: str, split: str) -> Iterator[str]:
    """The documents of one side of a corpus, as text."""
    corpus = corpus_of(source)
    tokenizer = tokenizer_in(corpus)
    for open_one in open_shards(corpus, split):
        shard = open_one()
        for ids in shard.pieces(shard.begins, shard.lengths):
            yield tokenizer.decode(ids[1:].tolist())


def manifest_of(source: str) -> dict:
    """What a run remembers of such a text, wherever it stands."""
    corpus = corpus_of(source)
    files = {f"{entry.name}.array_record": entry.identity[:16] for entry in corpus.entries}
    return dict(source="records", files=files)
