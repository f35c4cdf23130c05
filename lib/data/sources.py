"""From text to batches: sources -> documents -> token shards on disk -> packed rows with an exact cursor -> device.

A source is a list of shards; a shard is a few files that one worker process reads, keeps one side of the split of, and
tokenises into the cache. Nothing here imports JAX: `prefetch` is given the function that moves a batch.
"""

import bisect
import collections
import contextlib
import glob
import hashlib
import http.client
import itertools
import json
import os
import random
import ssl
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.data.tokenizer import Tokenizer
from lib.files import UserError, choose, replacing, sha256, writing

CACHE = ".cache"
HUB = "https://huggingface.co"
SPLITS = ("train", "val")
FORMAT = 1  # of token shards and cursors; raise it when either changes meaning
SHARD_BYTES = 8 << 20  # small files share a shard up to about this size
VAL_EVERY = 20  # one document in 20 is held out, chosen by the hash of its text
# fewer text files than this are cut into pieces, else a single book could not be split
FEW_FILES = 100
PIECE_CHARS = 8192
# attempts without progress before a download gives up; seconds between them, then doubled
TRIES, BACKOFF = 5, 1.0


# ---- files -> documents


@dataclass(frozen=True)
class Shard:
    """What one worker tokenises. `identity` names the content, not the place: it decides cache keys and cursors."""

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
    """Cut a text behind a blank line, else a line, into pieces of one to two PIECE_CHARS, the last maybe less."""
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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _held_out(digest: str) -> bool:
    return int(digest[:8], 16) % VAL_EVERY == 0


def _groups(shard: Shard) -> Iterator[list[str]]:
    """The documents of a shard that belong to its side of the split, in the lists that its files come in."""
    for file in shard.files:
        try:
            for texts in READERS[Path(file).suffix.lower()](file, shard.cut):
                if shard.split:
                    digests = [_digest(text) for text in texts]
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
    """Shards of local files, in the order of their content's hash, which mixes them and does not depend on names."""
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
        found = {_digest(text) for texts in _groups(whole) for text in texts}
        if len(found) < 2:
            raise UserError(
                f"{where} holds {len(found)} different documents: it takes two, one for validation"
            )
        held_out = "" if any(map(_held_out, found)) else min(found)
    shards = []
    for part in parts:
        identities, names = zip(*part)
        identity = _digest(json.dumps([identities, split, cut, held_out]))
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
    """Parquet shards of a Hub data set that comes shuffled: the last one validates, the first `shards` train."""
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
    """The shards of a named or local source. Local files are read once to hash them; nothing is downloaded yet."""
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


def _fetch(shard: Shard, hub: str, token: str | None):
    """Download a Hub shard unless it is there."""
    if shard.url:
        fetch(f"{hub}/{shard.url}", shard.files[0], token)


def fetch(url: str, path, token: str | None = None, tries: int = TRIES):
    """Download a file unless `path` is there: resumes a partial one, checks the size, backs off when it must.

    token: for the Hub, sent to no host that it redirects to. tries: attempts without progress before it gives up; a server that
    answers that it is busy gets more. UserError where the file cannot be had.
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

    source: a name in SOURCES, or a local file, folder or glob of .txt .md .py .jsonl .parquet. split: "train" or "val",
    which never share a document. shards: how many training shards of a Hub source; they are downloaded on the way.
    """
    found = find_shards(source, split, shards, cache_dir)

    def read():
        pool = ThreadPoolExecutor(4)
        try:
            for shard, _ in zip(
                found, pool.map(lambda shard: _fetch(shard, hub, hub_token), found)
            ):
                for texts in _groups(shard):
                    yield from texts
        finally:
            pool.shutdown(cancel_futures=True)

    return read()


def baselines(texts: Iterable[str]) -> dict:
    """{"bytes", "gzip_bpb", "xz_bpb"}: bits per byte that `gzip -9` and `xz -9` need for the joined texts in UTF-8."""
    import gzip
    import lzma

    data = "".join(texts).encode()
    bits = lambda packed: 8 * len(packed) / max(len(data), 1)
    return dict(
        bytes=len(data),
        gzip_bpb=bits(gzip.compress(data, 9)),
        xz_bpb=bits(lzma.compress(data, preset=9)),
    )


# ---- documents -> token shards


class TokenShard(NamedTuple):
    """ids: 1-D uint16/uint32 memory map of documents, each starting with the bos id and holding no other one."""

    ids: np.ndarray
    groups: list[int]  # documents per row group (parquet) or file
    bytes: int  # of the documents as UTF-8


@dataclass(frozen=True)
class Tokens:
    """The token shards of one split: `tokens[i]` waits until shard i is there; iterating waits for each in turn."""

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
    """The tokens of one side of a source, returned when the first shard is ready; the rest follows in the background.

    Arguments as in `documents`; workers: processes that download and tokenise (default: one per core, at most 8).
    Shards are cached by content and tokenizer, and made anew where a cache file is damaged.
    """
    found = find_shards(source, split, shards, cache_dir)
    folder = Path(cache_dir, "tokens").absolute()
    spec = folder / f"tokenizer-{tokenizer.fingerprint[:16]}.json"
    if not spec.exists():
        tokenizer.save(spec)
    jobs, futures = collections.deque(), []
    for shard in found:
        out = folder / (
            _digest(json.dumps([FORMAT, tokenizer.fingerprint, shard.identity]))[:32] + ".npy"
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
                    _fetch(shard, hub, hub_token)
                    _tokenise_apart(shard, spec, out)
                    future.set_result(_load(out))
                except BaseException as e:
                    future.set_exception(e)

    for _ in range(min(len(jobs), workers or min(os.cpu_count() or 1, 8))):
        threading.Thread(target=work, daemon=True).start()
    identity = _digest(
        json.dumps([FORMAT, tokenizer.fingerprint, [shard.identity for shard in found]])
    )
    tokens = Tokens(identity, tokenizer.bos, tuple(future.result for future in futures))
    weakref.finalize(tokens, jobs.clear)  # nobody reads on: leave the rest undone
    if not any(shard.ids.size for shard in tokens):
        raise UserError(
            f"{source} has no documents in its {split} split: give it more, or choose another source"
        )
    return tokens


def head(texts: Iterable[str], size: int) -> list[str]:
    """The first texts, whole, until they have `size` bytes of UTF-8; at least one."""
    taken = []
    for text in texts:
        taken.append(text)
        size -= len(text.encode())
        if size <= 0:
            break
    return taken


def tokens_of(texts: list[str], tokenizer: Tokenizer) -> Tokens:
    """Tokens of texts at hand, in memory: what `open_tokens` gives for a source, for a fixed evaluation set."""
    ids = np.array([i for row in tokenizer.encode_batch(texts, bos=True) for i in row], np.uint32)
    shard = TokenShard(ids, [len(texts)], sum(len(text.encode()) for text in texts))
    return Tokens(
        _digest(json.dumps([FORMAT, tokenizer.fingerprint, texts])), tokenizer.bos, (lambda: shard,)
    )


def _load(path: Path) -> TokenShard | None:
    """A cached shard, or None where it is missing or damaged: a .npy file with a line of JSON behind the array."""
    try:
        ids = np.load(path, mmap_mode="r")
        with open(path, "rb") as f:
            f.seek(ids.offset + ids.nbytes)
            # a view, because slicing a np.memmap is slow
            return TokenShard(ids.view(np.ndarray), **json.load(f))
    except (OSError, EOFError, ValueError):
        return None


def _tokenise_apart(shard: Shard, spec: Path, out: Path):
    """Run `_tokenise` in a fresh interpreter: it needs no `__main__` guard, no fork of a process that runs JAX, no GIL.

    The worker lives only while its standard input is open, so it ends with this process however that ends; its own
    session keeps Ctrl-C from it, so that an interrupted run can still save its state.
    """
    worker = subprocess.Popen(
        [sys.executable, "-m", "lib.data.sources"],
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
    for texts in _groups(shard):
        ids += [np.array(tokenizer.encode(text, bos=True), dtype) for text in texts]
        groups.append(len(texts))
        size += sum(len(text.encode()) for text in texts)
    ids = np.concatenate(ids)
    # not np.save, which hides that a disk is full
    with replacing(out) as tmp, open(tmp, "wb") as f:
        np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(ids))
        f.write(ids.data)
        f.write(json.dumps(dict(groups=groups, bytes=size)).encode())


# ---- token shards -> rows


def _spans(shard: TokenShard, bos: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each document of a shard begins, and how many tokens it has, bos included."""
    begins = np.flatnonzero(shard.ids == bos)
    return begins, np.diff(begins, append=shard.ids.size)


def _shuffled_pieces(shard, bos, sequence_len, host, hosts, rng):
    """Documents cut to the context's length, so that a long one neither blocks the buffer nor fills whole batches."""
    begins, lengths = _spans(shard, bos)
    counts = np.maximum(1, -(-(lengths - 1) // sequence_len))
    offsets = (np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)) * sequence_len
    mine = rng.permutation(offsets.size)[host::hosts]
    pieces = np.minimum(sequence_len, np.repeat(lengths - 1, counts) - offsets) + 1
    return (np.repeat(begins, counts) + offsets)[mine], pieces[mine], range(1, mine.size + 1)


def _shuffled_documents(shard, bos, sequence_len, host, hosts, rng):
    begins, lengths = _spans(shard, bos)
    mine = rng.permutation(begins.size)[host::hosts]
    return begins[mine], lengths[mine], range(1, mine.size + 1)


def _row_groups(shard, bos, sequence_len, host, hosts, rng, at_once=128):
    """Documents as they come; each host reads every hosts-th row group, and takes `at_once` of it into the buffer."""
    begins, lengths = _spans(shard, bos)
    ends = np.cumsum(shard.groups)
    mine = [np.arange(end - size, end) for size, end in zip(shard.groups, ends)][host::hosts]
    stops = [
        min(i // at_once * at_once + at_once, group.size) - i
        for group in mine
        for i in range(group.size)
    ]
    mine = np.concatenate([np.empty(0, int), *mine])
    return begins[mine], lengths[mine], np.arange(mine.size) + np.array(stops, int)


class Packing(NamedTuple):
    """How rows are made. A piece that does not fit is cut: the longest, or the shortest where the rest is lost."""

    # pieces of a shard: where they begin, their lengths, and up to which to read on from each
    order: Callable
    oldest_first: bool  # start a row with the piece that has waited longest, not with the longest
    # of a piece that was cut: "bos" puts it back behind a bos, "plain" as it is, "drop" loses it
    rest: str
    # pieces to choose from, where the caller's buffer_size does not apply
    buffer: int | None = None


PACKING = {
    # Loses nothing, costs one bos per cut. Because of `oldest_first` no piece waits for ever; because the longest is
    # cut, most often one that is a part of a document already, nearly all documents that fit the context stay whole.
    "bestfit": Packing(_shuffled_pieces, oldest_first=True, rest="bos"),
    # The algorithm of nanochat, row for row.
    "reference": Packing(_row_groups, oldest_first=False, rest="drop"),
    # Documents one after another, cut wherever a row ends.
    "stream": Packing(_shuffled_documents, oldest_first=True, rest="plain", buffer=1),
}


def batches(
    tokens: Tokens,
    batch_size: int,
    sequence_len: int,
    *,
    packing: str = "bestfit",
    cursor: dict | None = None,
    host_index: int = 0,
    host_count: int = 1,
    seed: int = 0,
    buffer_size: int = 1000,
    loop: bool = True,
) -> Iterator[tuple[np.ndarray, np.ndarray, dict]]:
    """Packed batches: (inputs_BT int32, targets_BT int32, the cursor after this batch), for ever or for one epoch.

    A row holds sequence_len + 1 tokens and starts with bos (but for "stream"); inputs drop its last, targets its first
    token. The cursor is JSON: give it back with the same arguments and the very batches that would have come follow.
    Each epoch has its own order, from `seed`. host_count hosts together read everything once an epoch, each its part.
    When `loop` is false, the last rows are filled with targets -1, and hosts may differ in their number of batches.
    """
    mode = choose("packing", packing, PACKING)
    if (
        min(batch_size, sequence_len, buffer_size) < 1
        or not 0 <= host_index < host_count
        or not 0 <= seed < 1 << 32
    ):
        raise UserError(
            f"batch_size {batch_size}, sequence_len {sequence_len} and buffer_size {buffer_size} must be at"
            f" least 1, host_index {host_index} below host_count {host_count}, seed {seed} in 32 bits"
        )
    settings = dict(
        format=FORMAT,
        corpus=tokens.identity,
        packing=packing,
        batch_size=batch_size,
        sequence_len=sequence_len,
        host_index=host_index,
        host_count=host_count,
        seed=seed,
        buffer_size=buffer_size,
    )
    position = dict(epoch=1, shard=0, index=0, waiting=[], cells=0, discarded=0, padding=0, added=0)
    for name, value in settings.items() if cursor else ():
        if cursor.get(name) != value:
            raise UserError(
                f"cannot resume the data: the cursor was made with {name} {cursor.get(name)!r}, now it is "
                f"{value!r}; restore that, or start a new run"
            )
    return _batches(tokens, mode, settings, position | (cursor or {}), loop)


def _batches(tokens, mode, settings, position, loop):
    batch_size, sequence_len, seed = (
        settings["batch_size"],
        settings["sequence_len"],
        settings["seed"],
    )
    host_index, host_count = settings["host_index"], settings["host_count"]
    buffer_size, width, bos = mode.buffer or settings["buffer_size"], sequence_len + 1, tokens.bos
    epoch, place, index = position["epoch"], position["shard"], position["index"]
    stats = {name: position[name] for name in ("cells", "discarded", "padding", "added")}
    # A piece is (shard, begin, length), and known by its age: an arrival number that only grows.
    waiting, by_length, arrivals = {}, [], itertools.count()  # age -> piece; sorted (length, -age)
    # pieces of the current shard, how far to read them at once; ids of each shard
    order, stops, ids = None, (), {}
    idle = False  # nothing has come since this epoch began

    def add(piece):
        age = next(arrivals)
        waiting[age] = piece
        bisect.insort(by_length, (piece[2], -age))

    def top_up():
        nonlocal epoch, place, index, order, stops, idle
        while len(waiting) < buffer_size and (loop or epoch == 1):
            if order is None:
                # its numbers never change with numpy's version
                rng = np.random.RandomState([seed, epoch, place])
                begins, lengths, stops = mode.order(
                    tokens[place], bos, sequence_len, host_index, host_count, rng
                )
                order = begins.tolist(), lengths.tolist()
                ids[place] = tokens[place].ids
            if index < len(stops):
                for begin, length in zip(*(column[index : stops[index]] for column in order)):
                    add((place, begin, length))
                index, idle = int(stops[index]), False
            else:
                order, index, place = None, 0, place + 1
                if place == len(tokens):
                    if idle:
                        raise UserError(
                            f"no documents for host {host_index} of {host_count}: give a larger corpus"
                        )
                    epoch, place, idle = epoch + 1, 0, True

    def fill(row) -> int:
        at = 0
        while at < width:
            top_up()
            if not waiting:
                break
            # the longest that fits, of these the oldest
            i = bisect.bisect_right(by_length, (width - at, 1)) - 1
            if at == 0 and mode.oldest_first:
                age = next(iter(waiting))
                i = bisect.bisect_left(by_length, (waiting[age][2], -age))
            elif i < 0 and mode.rest == "drop":
                # the shortest, of these the oldest
                i = bisect.bisect_right(by_length, (by_length[0][0], 1)) - 1
            age = -by_length.pop(i)[1]  # -1 is the longest
            shard, begin, length = waiting[age]
            n = min(length, width - at)
            row[at : at + n] = ids[shard][begin : begin + n]
            if mode.rest == "bos":
                stats["added"] += int(row[at] != bos or n == 1)
                row[at] = bos
            at += n
            if n == length or mode.rest == "drop":
                del waiting[age]
                stats["discarded"] += length - n
            else:  # the rest keeps its age; a bos takes the place of the last token used
                n -= mode.rest == "bos"
                waiting[age] = shard, begin + n, length - n
                bisect.insort(by_length, (length - n, -age))
        return at

    for shard, begin, length in zip(*[iter(position["waiting"])] * 3):
        add((shard, begin, length))
        ids[shard] = tokens[shard].ids
    while True:
        rows = np.full((batch_size, width), bos, np.int32)
        filled = [fill(row) for row in rows]
        if not any(filled):
            return
        inputs, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
        for target, n in zip(targets, filled):
            target[max(n - 1, 0) :] = -1
        stats["cells"] += rows.size
        stats["padding"] += rows.size - sum(filled)
        flat = list(itertools.chain.from_iterable(waiting.values()))
        yield (
            inputs,
            targets,
            settings | dict(epoch=epoch, shard=place, index=index, waiting=flat) | stats,
        )


def waste(cursor: dict) -> dict:
    """What packing has cost so far: share of source tokens "discarded", of cells that are "padding" or "added" bos."""
    source = cursor["cells"] - cursor["padding"] - cursor["added"] + cursor["discarded"]
    return dict(
        discarded=cursor["discarded"] / max(source, 1),
        padding=cursor["padding"] / cursor["cells"],
        added=cursor["added"] / cursor["cells"],
    )


def prefetch(iterator: Iterator[tuple], put: Callable, depth: int = 2) -> Iterator[tuple]:
    """The items of `batches`, arrays moved by `put((inputs, targets))` (such as jax.device_put), `depth` items ahead.

    Runs in one background thread that ends with this generator. Errors of `iterator` and `put` surface in their place.
    """

    def step():
        *arrays, cursor = next(iterator, (None,))
        return arrays and (*put(tuple(arrays)), cursor)

    pool = ThreadPoolExecutor(1, "prefetch")
    try:
        ahead = collections.deque(pool.submit(step) for _ in range(depth))
        while item := ahead.popleft().result():
            ahead.append(pool.submit(step))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":  # a worker of `_tokenise_apart`
    job_shard, *job_paths = json.loads(sys.stdin.readline())
    threading.Thread(target=lambda: sys.stdin.read() or os._exit(1), daemon=True).start()
    try:
        _tokenise(Shard(**job_shard), *map(Path, job_paths))
    except UserError as error:
        print(error, flush=True)
        sys.exit(3)
