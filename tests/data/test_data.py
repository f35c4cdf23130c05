"""lib/data/: splits, readers, downloads from a misbehaving server, token cache, packing, cursors,"
" prefetch."""

import collections
import contextlib
import errno
import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from lib import data, files
from lib.data import download, readers, sources, streams
from lib.data import packing as packing_rules
from lib.data import tokens as token_files
from lib.data.tokenizer import PATTERN, Tokenizer
from lib.files import UserError
from tests.helpers import programs

ROOT = Path(__file__).parents[2]
PARITY = ROOT / "tests/golden"
PACKING_DATA = json.loads((PARITY / "packing.json").read_text())
BOS = 0


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat and the cat sat"], 270)


def make_tokens(lengths, identity="corpus", shards=2):
    """Documents of the given lengths (bos included) in which every token but bos is unique."""
    ids, mark = [], 1
    for n in lengths:
        ids.append(np.r_[BOS, np.arange(mark, mark + n - 1)].astype(np.uint32))
        mark += n - 1
    parts = [ids[i::shards] for i in range(shards)]
    made = [data.TokenShard(np.concatenate(part), [len(part)], 0) for part in parts]
    return data.Tokens(identity, BOS, tuple(partial(lambda shard: shard, shard) for shard in made))


def lognormal(n, seed=0, mean=4.0, longest=2000):
    return np.clip(np.random.RandomState(seed).lognormal(mean, 1.0, n), 2, longest).astype(int)


def seen(items):
    """All ids that batches show, padding left out."""
    rows = np.concatenate([np.c_[x[:, :1], y] for x, y, _ in items])
    rows[(rows[:, 0] == BOS) & (rows[:, 1] < 0), 0] = -1  # a row of padding only
    return rows[rows >= 0]


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


def corpus(folder, n=60, suffix=".txt"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / f"{i}{suffix}").write_text(f"document {i}\n" * (i % 7 + 1))
    # more bytes than characters
    (folder / f"0{suffix}").write_text("dócument 0 €\n", encoding="utf-8")
    return str(folder)


# ---- packing


@pytest.mark.parametrize("name", PACKING_DATA["runs"])
def test_reference_packing_equals_parity(name, monkeypatch):
    run, rows = PACKING_DATA["runs"][name], load_file(PARITY / "packing_rows.safetensors")
    shards = PACKING_DATA["shards"]
    shards = shards[:-1] if run["split"] == "train" else shards[-1:]
    made = []
    for shard in shards:
        docs, size = shard["token_ids_with_bos"], shard["row_group_size"]
        groups = [len(docs[i : i + size]) for i in range(0, len(docs), size)]
        made.append(
            data.TokenShard(np.concatenate([np.array(d, np.uint16) for d in docs]), groups, 0)
        )
    tokens = data.Tokens(
        "parity", docs[0][0], tuple(partial(lambda shard: shard, shard) for shard in made)
    )
    order = partial(packing_rules._row_groups, at_once=run["tokenizer_batch_size"])
    monkeypatch.setitem(data.PACKING, "reference", data.PACKING["reference"]._replace(order=order))
    start = partial(
        data.batches,
        tokens,
        run["B"],
        run["T"],
        packing="reference",
        buffer_size=run["buffer_size"],
        host_index=run["rank"],
        host_count=run["world_size"],
    )
    cursor = None
    # the reference resumes with an empty buffer behind the row group it has read last
    if state := run["resume_state"]:
        index = sum(made[state["pq_idx"]].groups[: state["rg_idx"] + 1])
        cursor = next(start())[2] | dict(
            epoch=state["epoch"], shard=state["pq_idx"], index=index, waiting=[]
        )
    for i, (inputs, targets, cursor) in enumerate(  # noqa: B020
        itertools.islice(start(cursor=cursor), run["num_batches"])
    ):
        np.testing.assert_array_equal(inputs, rows[f"{name}.inputs"][i])
        np.testing.assert_array_equal(targets, rows[f"{name}.targets"][i])
        # the last document read lies in the row group that the reference reports
        if run["world_size"] == 1:
            ends = np.cumsum(made[cursor["shard"]].groups)
            group = int(np.searchsorted(ends, cursor["index"]))
            assert run["state_after_each_batch"][i] == dict(
                pq_idx=cursor["shard"], rg_idx=group, epoch=cursor["epoch"]
            )


@pytest.mark.parametrize("packing", data.PACKING)
@pytest.mark.parametrize("sequence_len", [1, 16, 64])
def test_rows_and_conservation(packing, sequence_len):
    lengths = lognormal(150, longest=700)  # many longer than the context
    tokens = make_tokens(lengths)
    items = list(data.batches(tokens, 4, sequence_len, packing=packing, loop=False, buffer_size=30))
    for inputs, targets, cursor in items:  # noqa: B007
        assert (
            inputs.shape == targets.shape == (4, sequence_len)
            and inputs.dtype == targets.dtype == np.int32
        )
        real = targets[:, :-1] >= 0
        np.testing.assert_array_equal(targets[:, :-1][real], inputs[:, 1:][real])
        assert packing == "stream" or (inputs[:, 0] == BOS).all()
    cells = seen(items)
    ids = cells[cells != BOS]
    assert ids.size == np.unique(ids).size  # nothing twice
    assert (lengths - 1).sum() - ids.size == cursor["discarded"]
    assert cursor["cells"] == cells.size + cursor["padding"]
    if packing == "reference":
        lost = (lengths - 1).sum() - ids.size
        assert lost > 0 and data.waste(cursor)["discarded"] == lost / lengths.sum()
    else:
        assert cursor["discarded"] == 0 and (cells == BOS).sum() == len(lengths) + cursor["added"]


def test_bestfit_wastes_little_and_keeps_documents_whole():
    lengths = lognormal(4000, mean=4.6)
    tokens, width = make_tokens(lengths), 257
    whole = {
        int(start): n
        for start, n in zip(np.cumsum(lengths - 1) - lengths + 2, lengths)
        if n <= width
    }
    kept = 0
    for inputs, targets, cursor in data.batches(tokens, 8, 256, loop=False):  # noqa: B007
        for row in np.c_[inputs, np.where(targets[:, -1:] < 0, BOS, targets[:, -1:])]:
            begins = np.flatnonzero(row == BOS)
            pieces = zip(begins, np.diff(begins, append=row.size))
            kept += sum(whole.get(int(row[i + 1]), 0) == n for i, n in pieces if n > 1)
    cost = data.waste(cursor)
    assert cost["discarded"] == 0 and cost["added"] < 0.01 and cost["padding"] < 0.01
    assert kept > 0.97 * len(whole)


@pytest.mark.parametrize("packing", ["bestfit", "stream"])
def test_no_piece_waits_for_ever(packing):
    # Whole rows come without end; only as the oldest does the short document begin a row.
    tokens = make_tokens([17] * 20 + [9], shards=1)
    rows = data.batches(tokens, 1, 16, packing=packing, buffer_size=5)
    shown = np.concatenate([x[0] for x, _, _ in itertools.islice(rows, 30)])
    assert np.isin(np.arange(20 * 16 + 1, 20 * 16 + 9), shown).all()


def test_document_far_longer_than_context_is_spread_over_the_epoch():
    tokens = make_tokens([5000] + [20] * 500, shards=1)
    share = [
        np.mean((x > 0) & (x < 5000))
        for x, _, _ in data.batches(tokens, 4, 32, loop=False, buffer_size=100)
    ]
    assert (
        max(share[: len(share) // 2]) > 0.2
        and min(share[:-1]) < 0.9
        and np.argmax(np.array(share) > 0) < 3
    )


@pytest.mark.parametrize("packing", data.PACKING)
def test_resume_is_exact_at_every_batch_through_epochs(packing):
    tokens = make_tokens(lognormal(40, longest=200))
    start = partial(data.batches, tokens, 2, 48, packing=packing, buffer_size=12, seed=3)
    items = list(itertools.islice(start(), 60))
    assert items[-1][2]["epoch"] >= 2
    for at in range(0, 50, 7):
        cursor = json.loads(json.dumps(items[at][2]))
        assert cursor == items[at][2] and len(json.dumps(cursor)) < 2000
        for (x, y, c), (x2, y2, c2) in zip(items[at + 1 : at + 8], start(cursor=cursor)):
            np.testing.assert_array_equal(x, x2)
            np.testing.assert_array_equal(y, y2)
            assert c == c2


@pytest.mark.parametrize("packing", data.PACKING)
def test_hosts_read_everything_once_together(packing):
    lengths = np.full(90, 17)  # whole rows, so that the reference loses nothing either
    tokens = make_tokens(lengths)
    tokens = data.Tokens(
        "corpus", BOS, tuple(partial(lambda s: s._replace(groups=[9] * 5), s) for s in tokens)
    )
    start = partial(data.batches, tokens, 1, 16, packing=packing, host_count=3, loop=False)
    parts = [seen(start(host_index=i)) for i in range(3)]
    ids = np.concatenate(parts)
    ids = np.sort(ids[ids != BOS])
    np.testing.assert_array_equal(ids, np.arange(1, 90 * 16 + 1))
    assert min(map(len, parts)) > 0.2 * ids.size


def test_epochs_and_seeds_are_permuted_and_deterministic():
    tokens = make_tokens([17] * 40)

    def first(**kw):
        return seen(itertools.islice(data.batches(tokens, 4, 16, buffer_size=1, **kw), 10))

    assert (first() == first()).all()
    assert (first() != first(seed=1)).any()
    two = [x for x, _, _ in itertools.islice(data.batches(tokens, 4, 16, buffer_size=1), 20)]
    assert (
        sorted(np.ravel(two[:10])) == sorted(np.ravel(two[10:]))
        and (np.ravel(two[:10]) != np.ravel(two[10:])).any()
    )


@pytest.mark.parametrize("packing", ["bestfit", "stream"])
def test_every_seed_and_epoch_has_an_order_of_its_own(packing):
    tokens = make_tokens([17] * 40)
    orders = []
    for seed in (0, 1, 2):
        rows = data.batches(tokens, 4, 16, packing=packing, buffer_size=1, seed=seed)
        firsts = [x[:, 1] for x, _, _ in itertools.islice(rows, 30)]
        orders += [np.concatenate(firsts[i : i + 10]) for i in (0, 10, 20)]
    for order in orders:
        assert sorted(order) == sorted(orders[0])
    # Two random orders of 40 agree in one place on average.
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 10


def test_foreign_cursor_is_refused():
    tokens = make_tokens([30] * 10)
    cursor = next(data.batches(tokens, 2, 16))[2]
    changes = [
        ("corpus", dict(tokens=make_tokens([30] * 10, "other"))),
        ("packing", dict(packing="stream")),
        ("batch_size", dict(batch_size=3)),
        ("sequence_len", dict(sequence_len=15)),
        ("seed", dict(seed=1)),
        ("host_count", dict(host_count=2)),
        ("buffer_size", dict(buffer_size=9)),
    ]
    for name, change in changes:
        with pytest.raises(UserError, match=f"made with {name}"):
            data.batches(
                **dict(tokens=tokens, batch_size=2, sequence_len=16, cursor=cursor) | change
            )
    with pytest.raises(UserError, match="format None"):
        data.batches(tokens, 2, 16, cursor={"step": 1})


@pytest.mark.parametrize(
    "bad",
    [
        dict(batch_size=0),
        dict(sequence_len=0),
        dict(buffer_size=0),
        dict(seed=-1),
        dict(host_index=1),
        dict(packing="worst"),
    ],
)
def test_bad_batch_arguments(bad):
    with pytest.raises(UserError, match=next(iter(bad)).split("_")[0]):
        data.batches(**dict(tokens=make_tokens([9, 9]), batch_size=1, sequence_len=8) | bad)


def test_host_without_documents_is_told():
    with pytest.raises(UserError, match="host 5 of 6"):
        next(data.batches(make_tokens([9] * 4), 1, 8, host_index=5, host_count=6))


# ---- prefetch


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetch_pairs_batches_with_cursors_and_ends():
    tokens = make_tokens([40] * 30)
    plain = list(data.batches(tokens, 2, 16, loop=False))
    moved = list(data.prefetch(data.batches(tokens, 2, 16, loop=False), jax.device_put))
    assert len(moved) == len(plain)
    for (x, y, c), (x2, y2, c2) in zip(plain, moved):
        assert (
            isinstance(x2, jax.Array)
            and (x == np.asarray(x2)).all()
            and (y == np.asarray(y2)).all()
            and c == c2
        )
    assert not prefetch_threads()


def test_prefetch_runs_ahead_by_depth_and_closes():
    asked = []

    def endless():
        for i in itertools.count():
            asked.append(i)
            yield i, i, dict(at=i)

    ahead = data.prefetch(endless(), lambda pair: pair, depth=3)
    assert next(ahead) == (0, 0, dict(at=0))
    time.sleep(0.1)
    assert asked == [0, 1, 2, 3]
    ahead.close()
    assert not prefetch_threads()


@pytest.mark.parametrize("where", ["iterator", "put"])
def test_prefetch_raises_in_place(where):
    def items():
        yield 1, 1, "first"
        if where == "iterator":
            raise UserError("boom")
        yield 2, 2, "second"

    def put(pair):
        if where == "put" and pair[0] == 2:
            raise UserError("boom")
        return pair

    ahead = data.prefetch(items(), put)
    assert next(ahead) == (1, 1, "first")
    with pytest.raises(UserError, match="boom"):
        next(ahead)
    assert not prefetch_threads()


# ---- sources, splits, readers


def test_split_is_disjoint_fixed_and_about_one_in_twenty(tmp_path):
    texts = [f"text number {i}" for i in range(2000)] + ["the same text"] * 50
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(dict(text=t)) for t in texts[:1000]))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(dict(text=t)) for t in texts[1000:]))
    train, val = (list(data.documents(str(tmp_path), split)) for split in data.SPLITS)
    assert not set(train) & set(val) and sorted(train + val) == sorted(texts)
    assert 60 < len(val) - val.count("the same text") < 140
    assert train == list(data.documents(str(tmp_path), "train"))
    # names and places do not matter, content does
    os.rename(tmp_path / "a.jsonl", tmp_path / "z.jsonl")
    os.utime(tmp_path / "z.jsonl", (1, 1))
    assert train == list(data.documents(str(tmp_path), "train"))


def test_one_book_is_cut_into_pieces_and_has_both_sides(tmp_path):
    book = "\n\n".join(f"chapter {i} " + "word " * 900 for i in range(40)) + "x" * 50_000
    (tmp_path / "book.txt").write_text(book)
    train, val = (list(data.documents(str(tmp_path / "book.txt"), split)) for split in data.SPLITS)
    assert val and train and sum(map(len, train + val)) == len(book)
    assert max(map(len, train + val)) <= 2 * readers.PIECE_CHARS
    assert "".join(readers.pieces(book)) == book
    assert sum(piece.startswith("chapter") for piece in readers.pieces(book)) > 10


def test_tiny_corpus_has_a_validation_document(tmp_path):
    for n in (2, 3, 5):
        source = corpus(tmp_path / str(n), n)
        train, val = (list(data.documents(source, split)) for split in data.SPLITS)
        assert train and val and len(train) + len(val) == n


def test_readers(tmp_path):
    (tmp_path / "a.md").write_bytes("\ufeffmärkdown".encode())
    (tmp_path / "b.py").write_text("print('hi')")
    messages = [dict(role="user", content="hello"), dict(role="assistant", content="hi")]
    lines = [
        dict(text="line"),
        dict(messages=messages),
        messages,
        dict(text="half \ud800"),
        dict(text=""),
    ]
    (tmp_path / "c.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    rows = pa.table(dict(id=[1, 2, 3], text=["row one", None, "row three"]))
    pq.write_table(rows, tmp_path / "d.parquet", row_group_size=2)
    (tmp_path / "e.bin").write_bytes(b"\x00")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "f.txt").write_text("not read")
    expected = {"märkdown", "print('hi')", "line", "hello\n\nhi", "half ?", "row one", "row three"}
    assert {t for split in data.SPLITS for t in data.documents(str(tmp_path), split)} == expected
    assert set(data.documents(str(tmp_path / "*.parquet"), "train")) < {"row one", "row three"}


def test_stdlib_is_there_without_its_tests():
    shards = data.find_shards("stdlib", "train")
    paths = [Path(file) for shard in shards for file in shard.files]
    folders = {part for path in paths for part in path.parts[-3:-1]}
    assert len(paths) > 300 and not {"test", "tests", "site-packages"} & folders
    assert len({shard.identity for shard in shards + data.find_shards("stdlib", "val")}) == 2 * len(
        shards
    )


def write(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


def table(tmp_path, **columns):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    return str(tmp_path)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: "climbmx", "unknown source 'climbmx'.*stdlib.*climbmix"),
        (lambda p: str(p / "nothing*.txt"), "unknown source"),
        (lambda p: str(p), "no files in"),
        (lambda p: write(p, "a.docx", b"x"), "readable endings are .txt"),
        (lambda p: write(p, "a.txt", b""), "holds 0 different documents"),
        (lambda p: write(p, "a.txt", b"alone"), "holds 1 different documents"),
        (lambda p: write(p, "a.txt", "caf\xe9 au lait".encode("latin-1")), "not UTF-8"),
        (
            lambda p: write(p, "a.jsonl", b'{"text": "a"}\n{"txt": "b"}'),
            "a.jsonl, line 2: expected",
        ),
        (lambda p: write(p, "a.jsonl", b'{"text": "a"}\n{"text": 3}'), "line 2: expected"),
        (lambda p: write(p, "a.jsonl", b'{"text": "a"'), "line 1: not JSON"),
        (
            lambda p: write(p, "a.parquet", b"PAR1 and then nothing"),
            "cannot read .*a.parquet as parquet",
        ),
        (lambda p: table(p, body=["x"], n=[1]), "only {'body': 'string', 'n': 'int64'}"),
        (lambda p: table(p, text=[1, 2]), 'no column "text" of strings'),
    ],
)
def test_bad_sources_are_told_in_a_sentence(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as caught:
        list(data.documents(make(tmp_path), "train"))
    assert "\n" not in str(caught.value)


def test_bad_split():
    with pytest.raises(UserError, match="unknown split 'test': choose one of train, val"):
        data.documents("stdlib", "test")


def test_baselines():
    texts = ["abc " * 100, "déf " * 50]
    result = data.baselines(iter(texts))
    assert (
        result["bytes"] == 400 + 250 and 0 < result["gzip_bpb"] < 1 and 0 < result["xz_bpb"] < 1.5
    )
    assert data.baselines([os.urandom(5000).decode("latin-1")])["gzip_bpb"] > 5


# ---- the Hub


CLIMBMIX = "karpathy/climbmix-400b-shuffle"


@pytest.fixture
def climbmix_hub(hub_server, tmp_path):
    """The stand-in for the Hub with the first shards of a source, and its last."""
    for i in (0, 1, 2, 6542):
        table = pa.table(dict(text=[f"shard {i} text {j}" for j in range(40)]))
        pq.write_table(table, tmp_path / "made.parquet", row_group_size=16)
        hub_server.put(CLIMBMIX, f"shard_{i:05d}.parquet", (tmp_path / "made.parquet").read_bytes())
    return hub_server


def climbmix(split="train", shards=1):
    return list(data.documents("climbmix", split, shards=shards))


def test_hub_download_split_and_offline_reuse(climbmix_hub):
    expected = [f"shard {i} text {j}" for i in range(3) for j in range(40)]
    assert climbmix(shards=3) == expected
    assert climbmix("val") == [f"shard 6542 text {j}" for j in range(40)]
    asked = len(climbmix_hub.log)
    assert asked == 8  # a HEAD and a GET each
    climbmix_hub.close()
    assert climbmix(shards=3) == expected and len(climbmix_hub.log) == asked


@pytest.mark.parametrize(
    "faults",
    [
        [429, 429, 503],
        [None, "truncate"],
        [None, "truncate", "truncate", 500, "truncate"],
        [None, 429, 503],
    ],
)
def test_hub_faults_are_survived(climbmix_hub, faults):
    climbmix_hub.faults += faults
    assert climbmix() == [f"shard 0 text {j}" for j in range(40)]
    assert not climbmix_hub.faults


@pytest.mark.parametrize(
    "fault, message",
    [
        ([401], "401.*HF_TOKEN"),
        ([403], "403.*HF_TOKEN"),
        ([404], "404"),
        ([429] * 100, "429.*HF_TOKEN, which raises the limit"),
        ([503] * 100, "503.*run again"),
    ],
)
def test_hub_refusals_are_told(climbmix_hub, fault, message):
    climbmix_hub.faults += fault
    with pytest.raises(UserError, match=message) as caught:
        climbmix()
    assert "\n" not in str(caught.value)


def test_a_busy_server_is_told_while_it_lasts(climbmix_hub, monkeypatch, capsys):
    monkeypatch.setattr(download, "asked_pause", lambda error: 3.0)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    climbmix_hub.faults += [500] * 12
    climbmix()
    assert "shard_00000.parquet of karpathy" in capsys.readouterr().err


def test_no_network_is_told(climbmix_hub):
    climbmix_hub.close()
    with pytest.raises(UserError, match="cannot download .*check the network"):
        climbmix()


def test_offline_by_choice_is_told(climbmix_hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        climbmix()
    assert not climbmix_hub.log


@pytest.mark.slow
def test_mirror_cache_and_token_are_those_of_the_environment(climbmix_hub, tmp_path):
    code = "from lib import data; print(len(list(data.documents('climbmix', 'val'))))"
    env = os.environ | {
        "HF_ENDPOINT": climbmix_hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_secret",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "40\n", done.stderr
    sent = {headers.get("Authorization") for _, _, headers in climbmix_hub.log}
    assert "Bearer hf_secret" in sent
    assert list((tmp_path / "home/hub").rglob("shard_06542.parquet"))


def test_more_shards_than_there_are_are_all(hub_server, capsys):
    names = [shard.name for shard in data.find_shards("tinystories", "train", 8)]
    assert len(names) == 4 and "all are taken" in capsys.readouterr().err
    assert len(data.find_shards("tinystories", "train", 4)) == 4
    assert len(data.find_shards("tinystories", "val", 8)) == 1
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="at least 1"):
        data.documents("climbmix", "train", shards=0)


def test_download_to_a_full_disk_is_told(climbmix_hub, monkeypatch):
    full = raising(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(UserError, match="the disk is full"):
        climbmix()


def test_fetch_checks_what_came(hub_server, tmp_path):
    body, path = b"a bundle" * 100, tmp_path / "bundle.zip"
    hub_server.files["/bundle.zip"] = body
    url = hub_server.address + "/bundle.zip"
    hub_server.faults += ["truncate", 503]
    data.fetch(url, path, hashlib.sha256(body).hexdigest())
    assert path.read_bytes() == body and len(hub_server.log) == 3
    data.fetch(url, path)
    assert len(hub_server.log) == 3
    with pytest.raises(UserError, match="SHA-256 differs"):
        data.fetch(url, tmp_path / "other.zip", "0" * 64)
    assert not (tmp_path / "other.zip").exists()


def test_hub_tokens_keep_row_groups(climbmix_hub, tmp_path, tokenizer):
    tokens = data.open_tokens("climbmix", "train", tokenizer, shards=2, cache_dir=tmp_path / "c")
    assert [shard.groups for shard in tokens] == [[16, 16, 8]] * 2


# ---- the token cache


def decode(tokens, tokenizer):
    texts = []
    for shard in tokens:
        begins, lengths = shard.spans(tokens.bos)
        texts += [tokenizer.decode(shard.ids[i + 1 : i + n]) for i, n in zip(begins, lengths)]
        assert sum(shard.groups) == len(begins)
    return texts


@pytest.fixture
def inline(monkeypatch):
    """Tokenise in this process, and count how often."""
    calls = []
    monkeypatch.setattr(
        token_files,
        "_tokenise_apart",
        lambda *job: [calls.append(job), token_files._tokenise(*job)],
    )
    return calls


def test_tokens_are_the_documents_in_order(tmp_path, tokenizer):
    source = corpus(tmp_path / "texts")
    for split in data.SPLITS:
        tokens = data.open_tokens(source, split, tokenizer, cache_dir=tmp_path / "cache")
        texts = list(data.documents(source, split))
        assert decode(tokens, tokenizer) == texts
        assert tokens[0].ids.dtype == np.uint16 and sum(s.bytes for s in tokens) == sum(
            len(t.encode()) for t in texts
        )


def test_cache_is_used_and_never_stale(tmp_path, tokenizer, inline):
    source = corpus(tmp_path / "texts")
    start = partial(data.open_tokens, source, "train", cache_dir=tmp_path / "cache")
    first = start(tokenizer)
    assert start(tokenizer).identity == first.identity and len(inline) == 1
    other = Tokenizer.train(["a rather different text, different text"], 270)
    assert start(other).identity != first.identity and len(inline) == 2
    assert decode(start(other), other) == decode(first, tokenizer)
    (path,) = (p for p in Path(source).iterdir() if p.read_text() == "document 1\n" * 2)
    before = path.stat()
    path.write_text("document X\n" * 2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same name, size and time
    assert start(tokenizer).identity != first.identity and len(inline) == 3


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_truncated_cache_is_made_anew(tmp_path, tokenizer, inline, keep):
    source = corpus(tmp_path / "texts")
    start = partial(data.open_tokens, source, "train", tokenizer, cache_dir=tmp_path / "cache")
    texts = decode(start(), tokenizer)
    (path,) = (tmp_path / "cache/tokens").glob("*.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert decode(start(), tokenizer) == texts and path.read_bytes() == whole and len(inline) == 2


@pytest.mark.parametrize("harm", ["zeros", "a bit", "tail of another kind", "deep tail"])
def test_a_cache_whose_content_changed_is_made_anew(tmp_path, tokenizer, inline, harm):
    source = corpus(tmp_path / "texts")
    start = partial(data.open_tokens, source, "train", tokenizer, cache_dir=tmp_path / "cache")
    texts = decode(start(), tokenizer)
    (path,) = (tmp_path / "cache/tokens").glob("*.npy")
    whole = path.read_bytes()
    begin = whole.rindex(b'{"groups"')
    damaged = {
        "zeros": whole[:200] + bytes(64) + whole[264:],
        "a bit": whole[:300] + bytes([whole[300] ^ 1]) + whole[301:],
        "tail of another kind": whole[:begin] + b"[1, 2]",
        "deep tail": whole[:begin] + b"[" * 200_000,
    }[harm]
    path.write_bytes(damaged)
    assert decode(start(), tokenizer) == texts and path.read_bytes() == whole and len(inline) == 2


def test_a_long_wait_for_the_first_shard_shows_a_bar(tmp_path, tokenizer, monkeypatch, capsys):
    def slow(shard, spec, out):
        time.sleep(3)
        token_files._tokenise(shard, spec, out)

    monkeypatch.setattr(token_files, "_tokenise_apart", slow)
    source = corpus(tmp_path / "texts")
    data.open_tokens(source, "train", tokenizer, cache_dir=tmp_path / "cache")
    assert "tokenising" in capsys.readouterr().err


def test_training_starts_with_the_first_shard(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", 400)
    go = threading.Event()

    def slow(shard, spec, out):
        assert shard.name.endswith("[0]") or go.wait(20)
        token_files._tokenise(shard, spec, out)

    monkeypatch.setattr(token_files, "_tokenise_apart", slow)
    tokens = data.open_tokens(
        corpus(tmp_path / "texts"), "train", tokenizer, cache_dir=tmp_path / "cache", workers=1
    )
    assert len(tokens) > 3
    rows = data.batches(tokens, 1, 8, packing="stream")
    next(rows)
    go.set()
    assert len(decode(tokens, tokenizer)) > 40


@pytest.mark.slow
def test_script_without_main_guard_runs_once_and_workers_have_no_jax(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    done = programs.run("read_texts", corpus(tmp_path / "texts"), cwd=tmp_path, timeout=60)
    assert done.stdout.split("\n")[:2] == ["top level", "True"], done.stderr


def test_killed_worker_is_told_and_the_next_run_goes_on(tmp_path, tokenizer, monkeypatch):
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    start = partial(
        data.open_tokens,
        corpus(tmp_path / "texts"),
        "train",
        tokenizer,
        cache_dir=tmp_path / "cache",
    )
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(killed))
        with pytest.raises(UserError, match="killed by signal 9"):
            start()
    assert decode(start(), tokenizer)


@pytest.mark.slow
def test_worker_ends_with_its_parent(tmp_path):
    worker = subprocess.Popen(
        [sys.executable, "-m", "lib.data.tokens"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    long = tmp_path / "long.txt"
    long.write_text("the cat sat on a mat. " * (1 << 20))
    shard = dict(name="s", identity="", files=[str(long)] * 50)
    spec = tmp_path / "t.json"
    Tokenizer.train(["x"], 265).save(spec)
    worker.stdin.write(json.dumps([shard, str(spec), str(tmp_path / "out")]).encode() + b"\n")
    worker.stdin.flush()
    time.sleep(0.5)
    assert worker.poll() is None
    worker.stdin.close()
    assert worker.wait(10) == 1


def test_error_in_a_worker_is_told(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(
        sources, "SHARD_BYTES", 400
    )  # a corpus larger than a shard is not read ahead
    source = corpus(tmp_path / "texts")
    for path in Path(source).iterdir():
        path.write_bytes(path.read_bytes() + b"\xff")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        data.open_tokens(source, "train", tokenizer, cache_dir=tmp_path / "cache")


def test_full_disk_is_told_and_harms_nothing(tmp_path, tokenizer, inline, monkeypatch):
    source = corpus(tmp_path / "texts")
    start = partial(data.open_tokens, source, cache_dir=tmp_path / "cache")
    texts = decode(start("train", tokenizer), tokenizer)

    @contextlib.contextmanager
    # writing to /dev/full fails as on a full disk, with whatever error the writer makes of it
    def full(path):
        with files.writing(path):
            yield Path("/dev/full")

    with monkeypatch.context() as patch:
        patch.setattr(token_files, "replacing", full)
        with pytest.raises(UserError, match="the disk is full"):
            start("val", tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(UserError, match="the disk is full"):
            start("val", tokenizer)
    assert not list(tmp_path.rglob("*.tmp"))
    assert decode(start("train", tokenizer), tokenizer) == texts and start("val", tokenizer)


def test_a_vocabulary_of_more_than_16_bits_keeps_its_ids(tmp_path):
    letters = [bytes([b]) for b in range(256)]
    made_up = [bytes([200, *i.to_bytes(2, "big")]) for i in range(1 << 16)]
    large = Tokenizer(PATTERN, (*letters, *made_up))
    large.save(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("hi")
    shard = sources.Shard("a", "a", (str(tmp_path / "a.txt"),))
    token_files._tokenise(shard, tmp_path / "tokenizer.json", tmp_path / "a.npy")
    ids = token_files._load(tmp_path / "a.npy").ids
    assert ids.tolist() == [256 + (1 << 16), ord("h"), ord("i")]


def test_a_busy_server_is_not_waited_for_longer_than_five_minutes():
    error = ConnectionError("busy")
    for asked, pause in {"7": 7.0, "86400": 300.0, "tomorrow": 0.0}.items():
        error.headers = {"Retry-After": asked}
        assert download.asked_pause(error) == pause


def test_unwritable_cache_is_told(tmp_path, tokenizer, monkeypatch):
    source = corpus(tmp_path / "texts")
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="a file stands"):
        data.open_tokens(source, "train", tokenizer, cache_dir=tmp_path / "taken")
    # simulated, because chmod does not stop root
    monkeypatch.setattr(Path, "mkdir", raising(PermissionError(errno.EACCES, "denied")))
    with pytest.raises(UserError, match="no permission to write"):
        data.open_tokens(source, "train", tokenizer, cache_dir=tmp_path / "fresh")


def test_empty_split_is_told(tmp_path, tokenizer, inline, climbmix_hub):
    pq.write_table(pa.table(dict(text=["", None])), tmp_path / "empty.parquet")
    for path in climbmix_hub.files:
        climbmix_hub.files[path] = (tmp_path / "empty.parquet").read_bytes()
    with pytest.raises(UserError, match="climbmix has no documents in its val split"):
        data.open_tokens("climbmix", "val", tokenizer, cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match="no text to measure on"):
        data.head(data.documents("climbmix", "val"), 1000)


def test_evaluation_set_in_memory(tokenizer):
    texts = [f"document {i}" for i in range(9)]
    assert [len(data.head(iter(texts), size)) for size in (0, 30, 999)] == [1, 3, 9]
    # bytes, not letters
    assert data.head(["\u00e9" * 10] * 9, 30) == ["\u00e9" * 10] * 2
    tokens = data.tokens_of(texts, tokenizer)
    assert decode(tokens, tokenizer) == texts and tokens[0].bytes == 90
    assert tokens.identity != data.tokens_of(texts[:-1], tokenizer).identity


def test_a_shard_that_fails_leaves_the_others_to_be_done(monkeypatch):
    monkeypatch.setattr(token_files, "tokenised", lambda shard, *_: 1 // shard)
    jobs = [token_files.ShardJob(shard, Path("out"), Future()) for shard in (1, 0, 1)]
    token_files._work(collections.deque(jobs), Path("spec"), None)
    assert all(job.done.done() for job in jobs)
    assert [job.done.exception() is None for job in jobs] == [True, False, True]


def test_a_shard_that_could_not_be_brought_is_tried_again(monkeypatch):
    answers = iter([UserError("the network is gone"), "shard 0"])

    def bring(*_):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(streams, "_bring", bring)
    stage = streams._Stage(None, ["the only one"])
    with pytest.raises(UserError, match="network"):
        stage.open(0)
    assert stage.open(0) == stage.open(0) == "shard 0"


def test_texts_at_hand_are_counted_in_bytes():
    tokenizer = Tokenizer.train(["plain bytes"], 265)
    tokens = token_files.tokens_of(["naïve", "東京"], tokenizer)
    assert tokens[0].bytes == 6 + 6 and len(tokens) == 1
