"""A corpus of array_record files: what stands in it, and whether it is whole.

`python -m lib.data.records` writes one, in a folder or a bucket; `lib.data.streams` reads it. Each
shard is three files: its records (`tokens-*.array_record`, the ids of a document each), an index
with the documents' lengths, and a note that it is there. The manifest comes last of all, with
counts, checksums and the tokenizer's fingerprint.
"""

import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.data.tokenizer import FILE as TOKENIZER
from lib.data.tokenizer import Tokenizer
from lib.files import UserError, answered, filesystem, join, parse_json, reaching

PREFIX = "records:"  # of a source that is such a corpus
FORMAT = 1
# A longer document is cut into records of so many tokens, so that a piece costs no whole book.
RECORD_TOKENS = 8192
# sides of a text, and types of the ids in its records
SPLITS = ("train", "val")
DTYPES = ("uint16", "uint32")
# what all workers agree on, and what the last one leaves
PLAN, MANIFEST = "corpus.json", "manifest.json"
# bytes of each id, so that bits per byte can be counted without the tokenizer
TOKEN_BYTES = "token_bytes.npy"
# seconds after which a bucket that is still busy with one file is given up
FILE_SECONDS = 600.0


def is_records(source: str) -> bool:
    """Whether a source names a corpus of array_record files."""
    return str(source).startswith(PREFIX)


class Entry(NamedTuple):
    """One shard as the manifest describes it."""

    name: str  # of its files, without their endings
    split: str
    identity: str  # of its content, as the local path knows it
    documents: int
    tokens: int
    bytes: int  # of its documents as UTF-8
    records: int
    files: dict[str, str]  # name: SHA-256


class RecordCorpus(NamedTuple):
    """A corpus that has been written whole."""

    address: str
    source: str  # that it was made from
    fingerprint: str  # of its tokenizer
    dtype: str  # of the ids in its records, little-endian
    entries: tuple[Entry, ...]

    def of(self, split: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.split == split]


def read_whole(address: str, name: str) -> bytes | None:
    """A small file of a corpus; None where there is none."""
    fs, root = filesystem(address)

    def read():
        with reaching(address):
            try:
                return fs.cat_file(f"{root}/{name}")
            except FileNotFoundError:
                return None

    return answered(address, read)


def read_corpus(address: str) -> RecordCorpus:
    """What a corpus holds; UserError where there is none, or where its workers have not ended."""
    manifest = read_whole(address, MANIFEST)
    if manifest is None:
        plan = read_whole(address, PLAN)
        if plan is None:
            raise UserError(
                f"{address} holds no corpus: check the bucket and the name, or write one with "
                f"python -m lib.data.records write --to {address}"
            )
        count = len(parse_json(plan, join(address, PLAN)).get("shards") or ())
        raise UserError(
            f"{address} is not written to its end (all of its {count} shards): run the workers of "
            "python -m lib.data.records write that are missing"
        )
    where = join(address, MANIFEST)
    about = parse_json(manifest, where, cure="write the corpus again")
    if about.get("format") != FORMAT:
        raise UserError(f"{where} is of format {about.get('format')}, not {FORMAT}: write it again")
    try:
        entries = tuple(entry_of(entry) for entry in about["shards"])
        corpus = RecordCorpus(address, about["source"], about["tokenizer"], about["dtype"], entries)
        if corpus.dtype not in DTYPES or not all(isinstance(text, str) for text in corpus[1:4]):
            raise ValueError("source, tokenizer or dtype is none")
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{where} is damaged ({e}): write the corpus again") from e
    return corpus


def entry_of(about: dict) -> Entry:
    """A shard from JSON that may be a stranger's, or damaged; KeyError, TypeError or ValueError."""
    entry = Entry(**about)
    counts = entry.documents, entry.tokens, entry.bytes, entry.records
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        raise ValueError(f"{entry.name} has counts that are none")
    if entry.split not in SPLITS or not isinstance(entry.identity, str):
        raise ValueError(f"{entry.name} is of no side of a text")
    # they become names in a folder of this machine, and must not lead out of it
    own = {f"{entry.name}.array_record", f"{entry.name}.index.npz"}
    if set(entry.files) != own or not re.fullmatch(r"[\w-]+", entry.name):
        raise ValueError(f"{entry.name!r} has files of other names")
    return entry


def corpus_of(source: str) -> RecordCorpus:
    """The corpus that a source names."""
    address = source.removeprefix(PREFIX).rstrip("/")
    if not address:
        raise UserError("records: names no corpus: write records:gs://bucket/corpus, or a path")
    return read_corpus(address)


def tokenizer_in(corpus: RecordCorpus) -> Tokenizer:
    """The tokenizer that a corpus was made with."""
    text = read_whole(corpus.address, TOKENIZER)
    if text is None:
        raise UserError(f"{corpus.address} has lost its {TOKENIZER}: write the corpus again")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, TOKENIZER)
        path.write_bytes(text)
        tokenizer = Tokenizer.load(path)
    check_tokenizer(corpus, tokenizer)
    return tokenizer


def check_tokenizer(corpus: RecordCorpus, tokenizer: Tokenizer):
    """Refuse a tokenizer that the corpus was not made with."""
    if tokenizer.fingerprint != corpus.fingerprint:
        raise UserError(
            f"{corpus.address} was made with tokenizer {corpus.fingerprint[:12]}, and this run has "
            f"{tokenizer.fingerprint[:12]}: begin a new run, which takes the corpus's own, or write"
            " another corpus"
        )


def record_begins(lengths: np.ndarray) -> np.ndarray:
    """Where each record begins, counted in the shard's tokens."""
    begins = lengths.cumsum() - lengths
    counts = -(-lengths // RECORD_TOKENS)
    firsts = np.repeat(counts.cumsum() - counts, counts)
    offsets = (np.arange(counts.sum()) - firsts) * RECORD_TOKENS
    return np.repeat(begins, counts) + offsets


def bring(address: str, name: str, path: Path):
    """Copy a file of a corpus to this machine."""
    fs, root = filesystem(address)

    def get():
        with reaching(join(address, name)):
            fs.get_file(f"{root}/{name}", str(path))

    answered(address, get, FILE_SECONDS)
