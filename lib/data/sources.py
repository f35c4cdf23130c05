"""From files to documents: sources by name or path, their shards, the split, and the readers of
each kind of file.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lib.data.download import CACHE, HUB, fetch
from lib.files import UserError, choose, sha256

SPLITS = ("train", "val")
SHARD_BYTES = 8 << 20  # small files share a shard up to about this size
VAL_EVERY = 20  # one document in 20 is held out, chosen by the hash of its text
# fewer text files than this are cut into pieces, else a single book could not be split
FEW_FILES = 100
PIECE_CHARS = 8192


# ---- files -> documents


@dataclass(frozen=True)
class Shard:
    """What one worker tokenises. `identity` names the content, not the place: it decides cache keys
    and cursors.
    """

    name: str
    identity: str
    files: tuple[str, ...]
    split: str = ""  # side to keep by content hash; "" keeps every document
    cut: bool = False
    # hash of the one validation document of a corpus too small to have one by chance
    held_out: str = ""
    url: str = ""  # of the only file, below the Hub's address


def _read_text(path: str, cut: bool) -> Iterator[list[str]]:
    text = Path(path).read_text("utf-8-sig")
    yield list(_pieces(text)) if cut else [text]


def _pieces(text: str) -> Iterator[str]:
    """Cut a text behind a blank line, else a line, into pieces of one to two PIECE_CHARS, the last
    maybe less.
    """
    start = 0
    while start < len(text):
        low, high = start + PIECE_CHARS, start + 2 * PIECE_CHARS
        ends = (text.find(mark, low, high) + len(mark) for mark in ("\n\n", "\n"))
        end = next((end for end in ends if end > low), high)
        yield text[start:end]
        start = end


def _read_jsonl(path: str, cut: bool) -> Iterator[list[str]]:
    def parse(number: int, line: str) -> str:
        try:
            record = json.loads(line)
            messages = record if isinstance(record, list) else record.get("messages")
            text = "\n\n".join(m["content"] for m in messages) if messages else record["text"]
            # JSON can spell half a character, which no tokenizer takes
            return text.encode("utf-8", "replace").decode()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f'{path}, line {number}: expected a JSON object with a string "text" or a list "messages"'
                ' of objects with a string "content"'
            ) from None

    with open(path, encoding="utf-8-sig") as lines:
        texts = (parse(number, line) for number, line in enumerate(lines, 1) if line.strip())
        while group := list(itertools.islice(texts, 1024)):
            yield group


def _read_parquet(path: str, cut: bool) -> Iterator[list[str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = {field.name: str(field.type) for field in file.schema_arrow}
            if columns.get("text") not in ("string", "large_string"):
                raise UserError(
                    f'{path} has no column "text" of strings, only {columns}: rename or convert one'
                )
            for group in range(file.num_row_groups):
                yield [
                    text or "" for text in file.read_row_group(group, ["text"])["text"].to_pylist()
                ]
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise UserError(
            f"cannot read {path} as parquet ({str(e).splitlines()[0]}): delete it and run again"
        ) from e


# How a file becomes lists of documents, by ending: a parquet file's row groups, else some or all of the file at a time.
READERS = {
    ".txt": _read_text,
    ".md": _read_text,
    ".py": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _held_out(digest: str) -> bool:
    return int(digest[:8], 16) % VAL_EVERY == 0


def groups_of(shard: Shard) -> Iterator[list[str]]:
    """The documents of a shard that belong to its side of the split, in the lists that its files
    come in.
    """
    for file in shard.files:
        try:
            for texts in READERS[Path(file).suffix.lower()](file, shard.cut):
                if shard.split:
                    digests = [digest_of(text) for text in texts]
                    sides = [
                        SPLITS[_held_out(digest) or digest == shard.held_out] for digest in digests
                    ]
                    texts = [text for text, side in zip(texts, sides) if side == shard.split]
                yield [text for text in texts if text]
        except UnicodeDecodeError as e:
            raise UserError(
                f"{file} is not UTF-8 text (byte {e.start}): convert it, or leave it out"
            ) from e
        except OSError as e:
            raise UserError(f"cannot read {file}: {e.strerror or e}") from e


# ---- sources -> shards


def _local(paths: list[Path], split: str, where: str) -> list[Shard]:
    """Shards of local files, in the order of their content's hash, which mixes them and does not
    depend on names.
    """
    files = [path for path in paths if path.suffix.lower() in READERS]
    if not files:
        ask = f"none of the {len(paths)} files at" if paths else "no files in"
        raise UserError(f"{ask} {where}: readable endings are {', '.join(READERS)}")
    try:
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(sha256, files))
        sizes = [path.stat().st_size for path in files]
    except OSError as e:
        raise UserError(f"cannot read {e.filename}: {e.strerror}") from e
    parts, room = [], 0
    for digest, path, size in sorted(zip(digests, files, sizes)):
        if room <= 0:
            parts.append([])
            room = SHARD_BYTES
        parts[-1].append((digest + path.suffix.lower(), str(path.absolute())))
        room -= size
    cut, held_out = len(files) < FEW_FILES, ""
    if sum(sizes) <= SHARD_BYTES:
        whole = Shard("", "", tuple(path for _, path in parts[0]), cut=cut)
        found = {digest_of(text) for texts in groups_of(whole) for text in texts}
        if len(found) < 2:
            raise UserError(
                f"{where} holds {len(found)} different documents: it takes two, one for validation"
            )
        held_out = "" if any(map(_held_out, found)) else min(found)
    shards = []
    for part in parts:
        identities, names = zip(*part)
        identity = digest_of(json.dumps([identities, split, cut, held_out]))
        shards.append(Shard(f"{where}[{len(shards)}]", identity, names, split, cut, held_out))
    return shards


def _stdlib(split: str, tests: bool, **_) -> list[Shard]:
    """Source text of the running Python's standard library, every file a document."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "__pycache__"} | (
        set() if tests else {"test", "tests", "idle_test"}
    )
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - skip
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            # some tests are in other encodings on purpose
            with contextlib.suppress(UnicodeDecodeError):
                path.read_text("utf-8")
                paths.append(path)
    return _local(paths, split, f"the standard library ({root})")


def _hub(split: str, shards: int, cache_dir, repo: str, names: list[str]) -> list[Shard]:
    """Parquet shards of a Hub data set that comes shuffled: the last one validates, the first
    `shards` train.
    """
    *train, val = names
    if not 1 <= shards <= len(train):
        raise UserError(
            f"{repo} has {len(train)} training shards, {shards} cannot be used: choose 1 to {len(train)}"
        )
    return [
        Shard(
            name,
            f"{repo}/{name}",
            (str(Path(cache_dir, "hub", repo, name).absolute()),),
            url=f"datasets/{repo}/resolve/main/{name}",
        )
        for name in ([val] if split == "val" else train[:shards])
    ]


# Name -> function (split, shards=, cache_dir=) -> list of Shard. Anything else is a local file, folder or glob.
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
    """The shards of a named or local source. Local files are read once to hash them; nothing is
    downloaded yet.
    """
    choose("split", split, SPLITS)
    if source in SOURCES:
        return SOURCES[source](split, shards=shards, cache_dir=cache_dir)
    path = Path(source).expanduser()
    if path.is_dir():
        hidden = lambda p: any(part.startswith(".") for part in p.relative_to(path).parts)
        paths = [p for p in path.rglob("*") if p.is_file() and not hidden(p)]
    else:
        paths = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
        if not paths:
            raise UserError(
                f"unknown source {str(source)!r}: it is none of {', '.join(SOURCES)}, and no file, folder"
                " or glob that matches a file"
            )
    return _local(paths, split, str(source))


def fetch_shard(shard: Shard, hub: str, token: str | None):
    """Download a Hub shard unless it is there."""
    if shard.url:
        fetch(f"{hub}/{shard.url}", shard.files[0], token)


def documents(
    source: str,
    split: str,
    *,
    shards: int = 8,
    cache_dir=CACHE,
    hub: str = HUB,
    hub_token: str | None = None,
) -> Iterator[str]:
    """The documents of one side of a source, always in the same order.

    source: a name in SOURCES, or a local file, folder or glob of .txt .md .py .jsonl .parquet.
    split: "train" or "val", which never share a document. shards: how many training shards of a Hub
    source; they are downloaded on the way.
    """
    found = find_shards(source, split, shards, cache_dir)

    def read():
        pool = ThreadPoolExecutor(4)
        try:
            for shard, _ in zip(
                found, pool.map(lambda shard: fetch_shard(shard, hub, hub_token), found)
            ):
                for texts in groups_of(shard):
                    yield from texts
        finally:
            pool.shutdown(cancel_futures=True)

    return read()


def baselines(texts: Iterable[str]) -> dict:
    """{"bytes", "gzip_bpb", "xz_bpb"}: bits per byte that `gzip -9` and `xz -9` need for the joined
    texts in UTF-8.
    """
    import gzip
    import lzma

    data = "".join(texts).encode()
    bits = lambda packed: 8 * len(packed) / max(len(data), 1)
    return dict(
        bytes=len(data),
        gzip_bpb=bits(gzip.compress(data, 9)),
        xz_bpb=bits(lzma.compress(data, preset=9)),
    )


def head(texts: Iterable[str], size: int) -> list[str]:
    """The first texts, whole, until they have `size` bytes of UTF-8; at least one."""
    taken = []
    for text in texts:
        taken.append(text)
        size -= len(text.encode())
        if size <= 0:
            break
    return taken
