"""A corpus of array_record files is written: one shard, then the manifest when all are there.

A shard counts once the note beside it is there, and the corpus once its manifest is: whatever ended
in between, nothing half-written is read. The bytes of a file don't depend on who wrote it.
"""

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib.data.corpus import (
    FILE_SECONDS,
    FORMAT,
    MANIFEST,
    PLAN,
    PREFIX,
    TOKEN_BYTES,
    TOKENIZER,
    Entry,
    entry_of,
    read_whole,
    record_begins,
)
from lib.data.tokenizer import Tokenizer
from lib.data.tokens import TokenShard
from lib.files import (
    UserError,
    answered,
    filesystem,
    is_remote,
    join,
    local_path,
    parse_json,
    reaching,
    replacing,
    sha256,
    to_json,
)

# one document a record, to be read in any order; array_record's own words
OPTIONS = "group_size:1,uncompressed"


class CorpusShard(NamedTuple):
    """A shard that a corpus is to have."""

    name: str  # of its files, without their endings
    split: str
    identity: str  # of its content; "" where that is known only once it is made


def part_name(split: str, i: int, count: int) -> str:
    """What the files of a shard are called: of `count` shards the i-th, counted from 0."""
    return f"tokens-{split}-{i:05d}-of-{count:05d}"


def package() -> Any:
    """array_record's module; UserError where it is not installed."""
    try:
        import array_record.python.array_record_module as module  # pyright: ignore
    except ImportError as e:
        raise UserError(
            f"records are written with array_record ({e}): pip install 'array_record>=0.8'"
        ) from e
    return module


# ---- the corpus ----------------------------------------------------------------------------------


def begin(to: str, source: str, tokenizer: Tokenizer, parts: list[CorpusShard]) -> dict:
    """Leave tokenizer and plan for all workers, or see that those there say the same; the plan.

    The first thing that is written is small: it shows whether one may.
    """
    with tempfile.TemporaryDirectory() as folder:
        words, sizes = Path(folder, TOKENIZER), Path(folder, TOKEN_BYTES)
        tokenizer.save(words)
        np.save(sizes, np.asarray(tokenizer.token_bytes))
        for path in (words, sizes):
            _agree(to, path.name, path.read_bytes(), "tokenizer")
    plan = dict(
        format=FORMAT,
        source=source,
        tokenizer=tokenizer.fingerprint,
        dtype=_dtype(tokenizer),
        shards=[[part.name, part.identity] for part in parts],
    )
    _agree(to, PLAN, to_json(plan).encode(), "text")
    return plan


def missing(to: str, parts: list[CorpusShard]) -> list[CorpusShard]:
    """Those shards that are not there yet."""
    fs, root = filesystem(to)

    def names():
        with reaching(to):
            return {path.rstrip("/").rpartition("/")[2] for path in fs.ls(root, detail=False)}

    there = answered(to, names)
    return [part for part in parts if _note(part.name) not in there]


def finish(to: str, plan: dict, parts: list[CorpusShard]):
    """Write the manifest, if this worker was the last one."""
    left = missing(to, parts)
    if left:
        print(
            f"{len(left)} of {len(parts)} shards are left to other workers, such as {left[0].name}"
        )
        return

    def entry(part: CorpusShard) -> dict:
        note, cure = _note(part.name), "delete it, run again"
        about = parse_json(read_whole(to, note) or "", join(to, note), cure=cure)
        try:
            return entry_of(about)._asdict()
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{join(to, note)} is damaged ({e}): {cure}") from e

    with ThreadPoolExecutor(16) as pool:
        entries = list(pool.map(entry, parts))
    totals = {
        count: sum(entry[count] for entry in entries) for count in ("documents", "tokens", "bytes")
    }
    _put_text(to, MANIFEST, to_json(plan | totals | {"shards": entries}))
    print(f"{to} is whole: {totals['documents']:,} documents, {totals['tokens']:,} tokens")
    print(f"read it with --source {PREFIX}{to}")


def _agree(to: str, name: str, content: bytes, what: str):
    """Leave a small file for all workers, or see that the one there says the same."""
    there = read_whole(to, name)
    if there is not None and there != content:
        raise UserError(
            f"{to} is being made with another {what} ({name} differs): give the same one, or "
            "another place"
        )
    if there is None:
        _put_text(to, name, content)


# ---- one shard -----------------------------------------------------------------------------------


def write_shard(to: str, part: CorpusShard, shard: TokenShard, tokenizer: Tokenizer) -> Entry:
    """Send a shard: its records, its index, and last the note that it is there."""
    with tempfile.TemporaryDirectory() as folder:
        entry = _write_files(Path(folder), part, shard, tokenizer)
        for name in entry.files:
            _put(to, name, Path(folder, name))
    _put_text(to, _note(part.name), to_json(entry._asdict()))
    return entry


def _write_files(folder: Path, part: CorpusShard, shard: TokenShard, tokenizer: Tokenizer) -> Entry:
    """Write a shard's records and index into a folder; what the manifest will say of them."""
    _, lengths = shard.spans(tokenizer.bos)
    begins = record_begins(lengths.astype(np.int64)).tolist()
    # the same bytes on every machine
    ids = shard.ids.astype(np.dtype(_dtype(tokenizer)).newbyteorder("<"))

    records = folder / f"{part.name}.array_record"
    writer = package().ArrayRecordWriter(str(records), OPTIONS)
    for begin, end in zip(begins, [*begins[1:], ids.size]):
        writer.write(ids[begin:end].tobytes())
    writer.close()

    index = folder / f"{part.name}.index.npz"
    np.savez(index, lengths=lengths.astype(np.uint32), groups=np.array(shard.groups, np.int64))
    return Entry(
        name=part.name,
        split=part.split,
        identity=part.identity,
        documents=len(lengths),
        tokens=int(ids.size),
        bytes=shard.bytes,
        records=len(begins),
        files={path.name: sha256(path) for path in (records, index)},
    )


def _dtype(tokenizer: Tokenizer) -> str:
    """The smallest type that holds all of a tokenizer's ids."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _note(name: str) -> str:
    """The file that says that a shard is there."""
    return f"{name}.json"


def _put(to: str, name: str, path: Path):
    """Send a file; a reader sees all of it or nothing."""
    if not is_remote(to):
        with replacing(local_path(to) / name) as tmp:
            shutil.copyfile(path, tmp)
        return
    fs, root = filesystem(to)

    def put():
        with reaching(join(to, name)):
            fs.put_file(str(path), f"{root}/{name}")

    answered(to, put, FILE_SECONDS)


def _put_text(to: str, name: str, content: str | bytes):
    """Send a small file of this content."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        _put(to, name, path)
