"""From files to documents: sources by name or path, their shards, the split, and what holds of
every file.

Every local file is looked at whole before anything is trained on it: what would be wrong is refused
with file and line, what holds no text is counted and left out, and the hash of each document says
on which side of the split it is.
"""

import hashlib
import json
import os
import sys
import sysconfig
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.data.corpus import SPLITS, is_records
from lib.data.download import CACHE, hub_file, tell
from lib.data.readers import READERS
from lib.data.streams import manifest_of, texts_of
from lib.files import (
    UserError,
    choose,
    find_files,
    local_path,
    read_json,
    replacing,
    sha256,
    write_json,
)
from lib.runtime import show_waiting

SHARD_BYTES = (
    8 << 20
)  # of text: small files share a shard up to about this size, a large one is split
VAL_SHARE = 20  # one in so many bytes of text is held out, chosen by the hash of its documents
# Fewer documents than this are cut into pieces, else a single book could not be split.
FEW_DOCUMENTS = 100
# What a look at a file finds is kept for files of at least so many bytes.
KEPT_BYTES = 1 << 20
# What a run folder remembers its text by.
MANIFEST = "text.json"


@dataclass(frozen=True)
class Shard:
    """What one worker tokenises. `identity` names the content, not the place: it decides cache keys
    and cursors.
    """

    name: str
    identity: str
    files: tuple[str, ...]
    # the side to keep; "" keeps every document
    split: str = ""
    # the documents that are held out: no longer than `longest` bytes, hash at most `last_hash`
    longest: int = 0
    last_hash: int = 0
    # whether documents are cut into pieces
    cut: bool = False
    # from where to where to read the only file, as its reader counts; None for all of it
    part: tuple[int, int] | None = None
    # the Hub's data set that the only file is of, to be downloaded first
    repo: str = ""


def digest_of(text: str) -> str:
    """Hex SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def short_hash(data: bytes) -> int:
    """64 bits of a document's SHA-256: the same for the same text, wherever it stands."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


# ---- documents ---------------------------------------------------------------------------------


def groups_of(shard: Shard) -> Iterator[list[str]]:
    """The documents of a shard that belong to its side of the split, in the lists that its files
    come in.
    """
    begin, end = shard.part or (0, None)
    for file in shard.files:
        read = READERS[Path(file).suffix.lower()]
        for _, texts in read(file, shard.cut, begin, end):
            yield [text for text in texts if text and _belongs(shard, text)]


def _belongs(shard: Shard, text: str) -> bool:
    """Whether a document is on the shard's side of the split."""
    if not shard.split:
        return True
    data = text.encode()
    held_out = len(data) <= shard.longest and short_hash(data) <= shard.last_hash
    return held_out == (shard.split == "val")


class Look(NamedTuple):
    """What a look at one file finds: the hash and size of its documents, and where groups of them
    end.
    """

    hashes: np.ndarray  # uint64, of the documents that hold text
    sizes: np.ndarray  # int64, in bytes
    ends: np.ndarray  # int64 [groups, 2]: the reader's position behind a group, documents so far
    skipped: int  # documents that hold none


def look_at(path: Path, cut: bool, tick: Callable[[int], object] = lambda size: None) -> Look:
    """Read a file whole. UserError names file and line of what could not be trained on."""
    hashes, sizes, ends, skipped = [], [], [], 0
    for position, texts in READERS[path.suffix.lower()](str(path), cut, 0, None):
        read = 0
        for text in texts:
            if not text:
                skipped += 1
                continue
            data = text.encode()
            hashes.append(short_hash(data))
            sizes.append(len(data))
            read += len(data)
        ends.append((position, len(sizes)))
        tick(read)
    return Look(
        np.array(hashes, np.uint64),
        np.array(sizes, np.int64),
        np.array(ends, np.int64).reshape(-1, 2),
        skipped,
    )


def _kept_look(path: Path, digest: str, cut: bool, folder: Path, tick) -> Look:
    """`look_at`, remembered by the content of a file that takes long to read."""
    if path.stat().st_size < KEPT_BYTES:
        return look_at(path, cut, tick)
    kept = folder / f"{digest[:32]}{path.suffix.lower()}{'-cut' * cut}.npz"
    try:
        with np.load(kept) as arrays:
            look = Look(**{name: arrays[name] for name in Look._fields})
        if len(look.hashes) == len(look.sizes) == look.ends[-1, 1]:
            return look._replace(skipped=int(look.skipped))
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile):
        pass  # missing, or damaged
    look = look_at(path, cut, tick)
    with replacing(kept) as tmp, open(tmp, "wb") as f:
        np.savez(f, **look._asdict())
    return look


# ---- local files -> shards ---------------------------------------------------------------------


class Corpus(NamedTuple):
    """Local files in the order of their content's hash, which mixes them and does not depend on
    names.
    """

    where: str
    files: list[Path]
    digests: list[str]
    cache_dir: str | Path
    named: bool  # one of SOURCES, not files of the user's own
    unread: list[Path]  # files beside them that no reader knows

    def looks(self, cut: bool) -> list[Look]:
        """A look at every file, with a bar when that takes long, be it a single large text."""
        folder = Path(self.cache_dir, "looks")
        total = sum(path.stat().st_size for path in self.files)
        read, over = 0, False

        def tick(size: int):
            nonlocal read
            read += size
            if over:
                raise CancelledError

        def look_at_all() -> list[Look]:
            entries = zip(self.files, self.digests)
            return [_kept_look(path, digest, cut, folder, tick) for path, digest in entries]

        # in a thread of its own, for a whole book is one document and ticks when it is over
        pool = ThreadPoolExecutor(1)
        try:
            job = pool.submit(look_at_all)
            show_waiting(
                lambda seconds: not wait([job], timeout=seconds).not_done,
                lambda: read,
                total=total,
                unit="B",
                unit_scale=True,
                desc=f"reading {self.where}",
            )
            return job.result()
        finally:
            # whoever stops waiting, by Ctrl-C, does not leave it reading
            over = True
            pool.shutdown(wait=False)


def _corpus(paths: list[Path], where: str, cache_dir, named: bool = False) -> Corpus:
    files = [path for path in paths if path.suffix.lower() in READERS]
    if not files:
        ask = f"none of the {len(paths)} files at" if paths else "no files in"
        raise UserError(f"{ask} {where}: readable endings are {', '.join(READERS)}")
    digests = _digests(files, where)
    pairs = sorted(zip(digests, files))
    names, digests = [path for _, path in pairs], [digest for digest, _ in pairs]
    unread = [path for path in paths if path.suffix.lower() not in READERS]
    return Corpus(where, names, digests, cache_dir, named, unread)


def _digests(files: list[Path], where: str) -> list[str]:
    """The hash of each file's content, with a bar when that takes long."""
    sizes = {}
    pool = ThreadPoolExecutor()
    try:
        for file in files:
            sizes[pool.submit(sha256, file)] = file.stat().st_size
        show_waiting(
            lambda seconds: not wait(sizes, timeout=seconds).not_done,
            lambda: sum(size for job, size in sizes.items() if job.done()),
            total=sum(sizes.values()),
            unit="B",
            unit_scale=True,
            desc=f"hashing {where}",
        )
        return [job.result() for job in sizes]
    except OSError as e:
        raise UserError(f"cannot read {e.filename}: {e.strerror}") from e
    finally:
        pool.shutdown(cancel_futures=True)


def _held_out(looks: list[Look], where: str) -> tuple[int, int]:
    """(longest, last_hash) of the documents to hold out: by rank of their hash, one twentieth of
    the text, as near as whole documents come to it.

    At least one document, and never all. One that is itself more than the share is not taken while
    others are there.
    """
    hashes = np.concatenate([look.hashes for look in looks])
    sizes = np.concatenate([look.sizes for look in looks])
    different = np.unique(hashes).size
    if different < 2:
        raise UserError(
            f"{where} holds {different} different documents: it takes two, one for validation"
        )

    share = int(sizes.sum()) // VAL_SHARE
    longest = share if (sizes <= share).any() else int(sizes.min())
    fitting = sizes <= longest
    ranked, which = np.unique(hashes[fitting], return_inverse=True)
    behind = np.bincount(which, sizes[fitting]).cumsum()
    count = int(np.abs(behind - share).argmin()) + 1
    # Where all documents fit, one of them is left for training.
    most = ranked.size - int(fitting.all())
    return longest, int(ranked[min(count, most) - 1])


def _local(split: str, corpus: Corpus) -> list[Shard]:
    """The shards of one side of local files."""
    cut = False
    looks = corpus.looks(cut)
    if sum(len(look.hashes) for look in looks) < FEW_DOCUMENTS:
        cut = True
        looks = corpus.looks(cut)
    skipped = sum(look.skipped for look in looks)
    if skipped and split == "train" and not corpus.named:
        tell(f"{corpus.where}: {skipped:,} documents without text are left out")
    if corpus.unread and split == "train" and not corpus.named:
        tell(_unread_text(corpus))

    longest, last_hash = _held_out(looks, corpus.where)
    side = Shard("", "", (), split, longest, last_hash, cut)
    shards = []
    for identities, files, part in _parts(corpus, looks):
        name = f"{corpus.where}[{len(shards)}]"
        content = [identities, part, split, cut, longest, last_hash]
        identity = digest_of(json.dumps(content))
        shards.append(replace(side, name=name, identity=identity, files=files, part=part))
    return shards


def _unread_text(corpus: Corpus) -> str:
    """How many files are left out, by their endings, and what is read."""
    endings = Counter((path.suffix or path.name).lower() for path in corpus.unread)
    most = sorted(endings.items(), key=lambda entry: (-entry[1], entry[0]))[:5]
    counted = ", ".join(f"{count:,} {ending}" for ending, count in most)
    more = ", ..." if len(endings) > 5 else ""
    return (
        f"{corpus.where}: {len(corpus.files):,} files are read, {len(corpus.unread):,} are left "
        f"out ({counted}{more}), for readable endings are {', '.join(READERS)}"
    )


def _parts(corpus: Corpus, looks: list[Look]) -> Iterator[tuple[list, tuple, tuple | None]]:
    """(content, files, part) of shards of about SHARD_BYTES: small files together, a large one in
    parts.
    """
    together: list[tuple[str, str]] = []
    room = SHARD_BYTES
    for path, digest, look in zip(corpus.files, corpus.digests, looks):
        size = int(look.sizes.sum())
        # The reader's kind is part of what a file says.
        entry = (digest + path.suffix.lower(), str(path.absolute()))
        if size > 2 * SHARD_BYTES and len(look.ends) > 1:
            for part in _pieces_of(look):
                yield [entry[0]], (entry[1],), part
            continue
        together.append(entry)
        room -= size
        if room <= 0:
            yield [content for content, _ in together], tuple(name for _, name in together), None
            together, room = [], SHARD_BYTES
    if together:
        yield [content for content, _ in together], tuple(name for _, name in together), None


def _pieces_of(look: Look) -> Iterator[tuple[int, int]]:
    """(begin, end) of the parts of a large file, as its reader counts."""
    behind = look.sizes.cumsum()
    begin, read = 0, 0
    for position, documents in look.ends.tolist():
        size = int(behind[documents - 1]) if documents else 0
        if size - read >= SHARD_BYTES or position == look.ends[-1, 0]:
            yield begin, position
            begin, read = position, size


# ---- sources by name ---------------------------------------------------------------------------


def _stdlib_corpus(tests: bool, cache_dir) -> Corpus:
    """Source text of the running Python's standard library, every file a document.

    Left out are files in other encodings, which some tests are on purpose, and tables of code
    pages: they are a tenth of the files and teach nothing but numbers.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "__pycache__"}
    if not tests:
        skip |= {"test", "tests", "idle_test"}
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - skip
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            if _is_code(path):
                paths.append(path)
    return _corpus(paths, f"the standard library ({root})", cache_dir, named=True)


def _is_code(path: Path) -> bool:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        return False
    table = path.parent.name == "encodings" and ("decoding_table" in text or "decoding_map" in text)
    return not table


def _stdlib(split: str, *, tests: bool, cache_dir=CACHE, **_) -> list[Shard]:
    return _local(split, _stdlib_corpus(tests, cache_dir))


def _hub(split: str, *, repo: str, names: list[str], shards: int = 8, **_) -> list[Shard]:
    """Parquet shards of a Hub data set that comes shuffled: the last one validates, the first
    `shards` train.
    """
    *train, val = names
    if split == "val":
        chosen = [val]
    else:
        if shards < 1:
            raise UserError(f"{shards} training shards leave nothing to train on: take at least 1")
        if shards > len(train):
            tell(f"{repo} has {len(train)} training shards: all are taken, not {shards}")
        chosen = train[:shards]
    return [Shard(name, f"{repo}/{name}", (name,), repo=repo) for name in chosen]


# Name -> function (split, shards=, cache_dir=) -> list of Shard. Anything else is a path.
SOURCES: dict[str, Callable[..., list[Shard]]] = {
    "stdlib": partial(_stdlib, tests=False),
    "stdlib_with_tests": partial(_stdlib, tests=True),
    "climbmix": partial(
        _hub,
        repo="karpathy/climbmix-400b-shuffle",
        names=[f"shard_{i:05d}.parquet" for i in range(6543)],
    ),
    "fineweb_edu": partial(
        _hub,
        repo="karpathy/fineweb-edu-100b-shuffle",
        names=[f"shard_{i:05d}.parquet" for i in range(1823)],
    ),
    "tinystories": partial(
        _hub,
        repo="roneneldan/TinyStories",
        names=[
            "data/train-00000-of-00004-2d5a1467fff1081b.parquet",
            "data/train-00001-of-00004-5852b56a2bd28fd9.parquet",
            "data/train-00002-of-00004-a26307300439e943.parquet",
            "data/train-00003-of-00004-d243063613e5a057.parquet",
            "data/validation-00000-of-00001-869c898b519ad725.parquet",
        ],
    ),
}


def find_shards(source: str, split: str, shards: int = 8, cache_dir=CACHE) -> list[Shard]:
    """The shards of a named or local source. Local files are looked at whole; nothing is downloaded
    yet.
    """
    choose("split", split, SPLITS)
    if source in SOURCES:
        return SOURCES[source](split, shards=shards, cache_dir=cache_dir)
    return _local(split, _corpus(_files_at(source), str(source), cache_dir))


def _files_at(source: str) -> list[Path]:
    files = find_files(source)
    if not files and not local_path(source).is_dir():
        raise UserError(
            f"unknown source {str(source)!r}: it is none of {', '.join(SOURCES)}, and no file,"
            " folder"
            " or glob that matches a file"
        )
    return files


def fetch_shard(shard: Shard) -> Shard:
    """The shard with its file downloaded, if it is one of the Hub's."""
    if not shard.repo:
        return shard
    return replace(shard, files=(str(hub_file(shard.repo, shard.files[0])),))


def documents(source: str, split: str, *, shards: int = 8, cache_dir=CACHE) -> Iterator[str]:
    """The documents of one side of a source, always in the same order.

    source: a name in SOURCES, a local file, folder or glob of .txt .md .py .jsonl .parquet, or
    records: and the place of a corpus that `lib.data.records` has written. split: "train" or "val",
    which never share a document. shards: how many training shards of a Hub source, at most all
    there are; they are downloaded on the way.
    """
    if is_records(source):
        choose("split", split, SPLITS)
        return texts_of(source, split)
    found = find_shards(source, split, shards, cache_dir)

    def read():
        pool = ThreadPoolExecutor(4)
        try:
            for shard in pool.map(fetch_shard, found):
                for texts in groups_of(shard):
                    yield from texts
        finally:
            pool.shutdown(cancel_futures=True)

    return read()


# ---- is it still the same text? ----------------------------------------------------------------


def manifest(source: str, shards: int = 8, cache_dir=CACHE) -> dict:
    """What a run remembers of its text: {"source", "files": {name: hash}}, and of the standard
    library "python".

    Names are relative to the folder that holds all files, so that moving them changes nothing.
    """
    if is_records(source):
        return manifest_of(source)
    if source in ("stdlib", "stdlib_with_tests"):
        corpus = _stdlib_corpus(source != "stdlib", cache_dir)
    elif source in SOURCES:
        return dict(source=source, files={s.name: "" for s in find_shards(source, "train", shards)})
    else:
        corpus = _corpus(_files_at(source), str(source), cache_dir)
    top = os.path.commonpath([path.absolute().parent for path in corpus.files])
    names = [str(path.absolute().relative_to(top)) for path in corpus.files]
    files = {name: digest[:16] for name, digest in sorted(zip(names, corpus.digests))}
    kind = source if source in SOURCES else "files"
    more = dict(python=".".join(map(str, sys.version_info[:3]))) if kind != "files" else {}
    return dict(source=kind, files=files, **more)


def changes(old: dict, new: dict) -> str:
    """What differs between two manifests and what to do about it, in one sentence; "" where the
    text is the same.
    """
    was, now = old["files"], new["files"]
    if old["source"] == new["source"] and sorted(was.values()) == sorted(now.values()):
        if any(was.values()) or was == now:
            return ""
    if old["source"] != new["source"]:
        return (
            f"the text is another source, {new['source']} instead of {old['source']}: give the"
            " former one"
            " to go on, or start afresh"
        )
    if old.get("python") != new.get("python"):
        return (
            f"the text is the standard library of Python {new['python']}, and training began with"
            " that"
            f" of {old['python']}: run with that Python to go on, or start afresh"
        )
    parts = [
        _listed("added", now.keys() - was.keys()),
        _listed("removed", was.keys() - now.keys()),
        _listed("changed", {name for name in was.keys() & now.keys() if was[name] != now[name]}),
    ]
    what = "; ".join(part for part in parts if part)
    return f"the text has changed ({what}): put it back to go on, or start afresh"


def _listed(what: str, names: Iterable[str], most: int = 3) -> str:
    names = sorted(names)
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what}: {', '.join(names[:most])}{more}"


def check_text(folder, source: str, shards: int, resumed: bool, cache_dir=CACHE):
    """Refuse to go on in a run folder with other text than before, and name what differs.

    The text is known by its files' content, so that another spelling of their path, or another
    place, is the same. When the run is not `resumed`, what it reads is remembered.
    """
    path = Path(folder, MANIFEST)
    now = manifest(source, shards, cache_dir)
    if not resumed:
        write_json(path, now)
    elif path.exists():
        told = changes(read_json(path), now)
        if told:
            raise UserError(f"{folder}: {told} (if_exists=fresh, or another run)")


# ---- some of a text, and what packs it ---------------------------------------------------------


def head(texts: Iterable[str], size: int) -> list[str]:
    """The first texts, whole, until they have `size` bytes of UTF-8; at least one.

    UserError where there is no text at all, for nothing can be measured on it.
    """
    taken = []
    for text in texts:
        taken.append(text)
        size -= len(text.encode())
        if size <= 0:
            break
    if not taken:
        raise UserError(
            "there is no text to measure on: the split is empty, give it more documents"
        )
    return taken


def baselines(texts: Iterable[str]) -> dict:
    """{"bytes", "gzip_bpb", "xz_bpb"}: bits per byte that `gzip -9` and `xz -9` need for the joined
    texts in UTF-8.
    """
    import gzip
    import lzma

    data = "".join(texts).encode()

    def bits(packed: bytes) -> float:
        return 8 * len(packed) / max(len(data), 1)

    return dict(
        bytes=len(data),
        gzip_bpb=bits(gzip.compress(data, 9)),
        xz_bpb=bits(lzma.compress(data, preset=9)),
    )
