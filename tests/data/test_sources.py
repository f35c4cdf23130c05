"""lib/data/sources.py, readers.py: the split by rank, parts of large files, refusals, manifests."""

import gzip
import json
import os
import random
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import data, runtime
from lib.data import readers, sources
from lib.data.tokenizer import Tokenizer
from lib.files import UserError


def text_of_words(size: int, seed: int) -> str:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randrange(2, 9))) for _ in range(500)]
    lines = []
    while size > 0:
        lines.append(" ".join(rng.choices(words, k=12)))
        size -= len(lines[-1]) + 1
    return "\n".join(lines)


def write_corpus(folder, form: str, texts: list[str]) -> str:
    folder.mkdir()
    if form == "jsonl":
        (folder / "a.jsonl").write_text("\n".join(json.dumps(dict(text=t)) for t in texts))
    elif form == "parquet":
        pq.write_table(pa.table(dict(text=texts)), folder / "a.parquet", row_group_size=16)
    elif form == "one text":
        (folder / "a.txt").write_text("\n\n".join(texts))
    else:
        for i, text in enumerate(texts):
            (folder / f"{i}.txt").write_text(text)
    return str(folder)


def share_of_val(source: str, cache) -> float:
    sizes = {}
    for split in data.SPLITS:
        texts = data.documents(source, split, cache_dir=cache)
        sizes[split] = sum(len(text.encode()) for text in texts)
    assert sizes["train"] and sizes["val"]
    return sizes["val"] / sum(sizes.values())


# ---- the split


@pytest.mark.parametrize("form", ["jsonl", "parquet", "one text", "texts"])
@pytest.mark.parametrize("count, size", [(10, 200_000), (300, 2000), (40, 30_000)])
def test_one_twentieth_is_held_out_whatever_the_form(tmp_path, form, count, size):
    texts = [text_of_words(size, seed) for seed in range(count)]
    source = write_corpus(tmp_path / "texts", form, texts)
    assert 0.04 < share_of_val(source, tmp_path / "cache") < 0.06


@pytest.mark.parametrize("form", ["jsonl", "parquet", "texts"])
@pytest.mark.parametrize("count", [2, 3, 19])
def test_a_few_short_documents_leave_one_to_measure_on(tmp_path, form, count):
    source = write_corpus(tmp_path / "texts", form, [f"document {i}" for i in range(count)])
    val = list(data.documents(source, "val", cache_dir=tmp_path / "cache"))
    assert len(val) == 1


def test_one_document_that_is_most_of_the_text_is_not_what_is_held_out(tmp_path):
    for seed in range(5):
        texts = [text_of_words(500, i) for i in range(150)] + [text_of_words(300_000, 1000 + seed)]
        source = write_corpus(tmp_path / str(seed), "jsonl", texts)
        assert share_of_val(source, tmp_path / "cache") < 0.06


def test_files_that_no_reader_knows_are_told(tmp_path, capsys):
    """As where a data set lies packed beside the page about it."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text("About it.\n\nAnd more about it.\n")
    (folder / "more.txt").write_text("Something else.\n")
    list(data.documents(str(folder), "train", cache_dir=tmp_path / "cache"))
    assert "left out" not in capsys.readouterr().err
    for name in ("a.jsonl.gz", "b.jsonl.gz", "c.html", "LICENSE"):
        (folder / name).write_text("packed")
    for split in ("train", "val"):
        list(data.documents(str(folder), split, cache_dir=tmp_path / "cache"))
    said = capsys.readouterr().err
    assert "2 files are read, 4 are left out (2 .gz, 1 .html, 1 license)" in said
    assert said.count("left out") == 1


def test_copies_of_a_text_are_on_one_side(tmp_path):
    texts = ["said by everybody"] * 400 + [f"said once, {i}" for i in range(200)]
    source = write_corpus(tmp_path / "texts", "jsonl", texts)
    train, val = (list(data.documents(source, split)) for split in data.SPLITS)
    assert not set(train) & set(val) and sorted(train + val) == sorted(texts)
    assert write_corpus(tmp_path / "two", "jsonl", ["a", "a", "a", "b"])
    sides = [set(data.documents(str(tmp_path / "two"), split)) for split in data.SPLITS]
    assert sorted(map(len, sides)) == [1, 1]


def test_where_there_is_no_text_nothing_is_measured():
    with pytest.raises(UserError, match="no text to measure on"):
        data.head(iter([]), 1000)


# ---- large files


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(sources, "KEPT_BYTES", 1)
    monkeypatch.setattr(readers, "GROUP_CHARS", 5000)
    monkeypatch.setattr(readers, "GROUP_PIECES", 2)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "one text"])
def test_a_large_file_is_read_in_parts_that_are_the_whole(tmp_path, small_parts, form):
    texts = [text_of_words(3000, seed) + " naïve 東京" for seed in range(200)]
    source = write_corpus(tmp_path / "texts", form, texts)
    for split in data.SPLITS:
        shards = data.find_shards(source, split, cache_dir=tmp_path / "cache")
        whole = [shard.files[0] for shard in shards]
        assert len(shards) > 8 and len(set(whole)) == 1
        assert len({shard.identity for shard in shards}) == len(shards)
    found = sorted(
        text
        for split in data.SPLITS
        for text in data.documents(source, split, cache_dir=tmp_path / "cache")
    )
    expected = readers.pieces("\n\n".join(texts)) if form == "one text" else texts
    assert found == sorted(expected)


def test_a_look_at_a_file_is_kept_and_made_anew_where_it_is_damaged(
    tmp_path, small_parts, monkeypatch
):
    source = write_corpus(tmp_path / "texts", "jsonl", [text_of_words(900, i) for i in range(200)])
    looks = []
    look_at = sources.look_at
    monkeypatch.setattr(sources, "look_at", lambda *args: looks.append(args) or look_at(*args))

    def identities():
        found = data.find_shards(source, "train", cache_dir=tmp_path / "cache")
        return [shard.identity for shard in found]

    first = identities()
    assert identities() == first and len(looks) == 1
    (kept,) = (tmp_path / "cache/looks").iterdir()
    kept.write_bytes(kept.read_bytes()[:-40])
    assert identities() == first and len(looks) == 2
    # whole as a file, but of other lengths
    with np.load(kept) as arrays:
        short = {name: arrays[name] for name in arrays} | dict(hashes=arrays["hashes"][1:])
    np.savez(kept, **short)
    assert identities() == first and len(looks) == 3


def test_one_long_text_is_not_read_in_silence(tmp_path, monkeypatch, capsys):
    """A bar stands there while a document is under way, not first when it is over."""
    source = write_corpus(tmp_path / "texts", "one text", [text_of_words(20_000, 1)])
    monkeypatch.setattr(runtime, "BAR_AFTER", 0)
    monkeypatch.setattr(runtime, "LOOK_EVERY", 0.01)
    shown = []
    look_at = sources.look_at

    def slowly(*args):
        deadline = time.monotonic() + 10
        while "reading" not in "".join(shown) and time.monotonic() < deadline:
            time.sleep(0.02)
            shown.append(capsys.readouterr().err)
        return look_at(*args)

    monkeypatch.setattr(sources, "look_at", slowly)
    data.find_shards(source, "train", cache_dir=tmp_path / "cache")
    assert f"reading {source}" in "".join(shown)


@pytest.mark.slow
def test_parts_are_tokenised_apart(tmp_path, small_parts):
    texts = [text_of_words(3000, seed) for seed in range(120)]
    source = write_corpus(tmp_path / "texts", "jsonl", texts)
    tokenizer = Tokenizer.train(texts[:3], 300)
    tokens = data.open_tokens(source, "train", tokenizer, cache_dir=tmp_path / "cache")
    train = list(data.documents(source, "train", cache_dir=tmp_path / "cache"))
    assert len(tokens) > 5
    assert sum(shard.bytes for shard in tokens) == sum(len(text) for text in train)
    ids = np.concatenate([shard.ids for shard in tokens])
    assert tokenizer.decode(ids[ids != tokenizer.bos]) == "".join(train)


# ---- others' files


def test_documents_without_text_are_left_out_and_counted(tmp_path, capsys):
    records = [dict(text=f"text {i}") for i in range(30)]
    lines = [*map(json.dumps, records), '{"text": null}', '{"text": ""}', '{"messages": []}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.table(dict(text=["row", None, "", "row 2"])), tmp_path / "b.parquet")
    found = [t for split in data.SPLITS for t in data.documents(str(tmp_path), split)]
    assert len(found) == 32 and all(found)
    assert "5 documents without text are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "caf\xe9"}', r"a.jsonl is not UTF-8 text \(line 2001"),
        (b"[" * 200_000, "a.jsonl, line 2001: not JSON that can be read"),
        (b'{"text": 5}', "a.jsonl, line 2001: expected"),
        (b'{"messages": "hi"}', "a.jsonl, line 2001: expected"),
        (b"5", "a.jsonl, line 2001: expected"),
        (b"null", "a.jsonl, line 2001: expected"),
    ],
)
def test_one_bad_line_is_named_before_anything_is_trained(tmp_path, line, message):
    lines = [json.dumps(dict(text=f"text {i}")).encode() for i in range(2000)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, line, b'{"text": "the last"}']))
    with pytest.raises(UserError, match=message) as caught:
        data.find_shards(str(tmp_path), "train", cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_users_parquet_is_not_to_be_deleted(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="cannot read .*a.parquet") as caught:
        data.documents(str(tmp_path), "train")
    assert "delete" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="no files in"):
        data.documents(str(tmp_path), "train")
    with pytest.raises(UserError, match="no ordinary file"):
        data.read_chats(tmp_path / "a.jsonl")


def test_packed_lines_are_read(tmp_path):
    chats = [[dict(role="user", content="hi"), dict(role="assistant", content="ho")]]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(chats[0]).encode()))
    assert data.read_chats(tmp_path / "a.jsonl.gz") == chats
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"x" * 5000)[:-20])
    with pytest.raises(UserError, match="cannot read .*b.jsonl.gz"):
        data.read_chats(tmp_path / "b.jsonl.gz")


# ---- the same text again


def test_the_same_files_are_the_same_text_however_they_are_spelt(tmp_path, monkeypatch):
    write_corpus(tmp_path / "texts", "texts", [f"document {i}" for i in range(30)])
    old = data.manifest(str(tmp_path / "texts"))
    identities = [s.identity for s in data.find_shards(str(tmp_path / "texts"), "train")]
    monkeypatch.chdir(tmp_path)
    for spelling in ("texts", "texts/", "./texts", "texts/../texts", "texts/*.txt", "tex*/*"):
        assert data.changes(old, data.manifest(spelling)) == ""
        assert [s.identity for s in data.find_shards(spelling, "train")] == identities
    (tmp_path / "texts").rename(tmp_path / "moved")
    assert data.changes(old, data.manifest("moved")) == ""


def test_what_changed_is_told_by_name(tmp_path):
    folder = tmp_path / "texts"
    source = write_corpus(folder, "texts", [f"document {i}" for i in range(30)])
    old = data.manifest(source)
    (folder / "3.txt").write_text("rewritten")
    (folder / "4.txt").unlink()
    for i in range(30, 36):
        (folder / f"{i}.txt").write_text(f"new {i}")
    told = data.changes(old, data.manifest(source))
    assert "added: 30.txt, 31.txt, 32.txt and 3 more" in told
    assert "removed: 4.txt" in told and "changed: 3.txt" in told and "start afresh" in told


def test_a_run_goes_on_with_the_same_text_alone(tmp_path):
    run, source = tmp_path / "run", write_corpus(tmp_path / "texts", "texts", ["a", "b", "c"])
    run.mkdir()
    data.check_text(run, source, 8, resumed=True)  # of a run that remembers none
    data.check_text(run, source, 8, resumed=False)
    data.check_text(run, source + "/*.txt", 8, resumed=True)
    (tmp_path / "texts/3.txt").write_text("d")
    with pytest.raises(UserError, match="added: 3.txt.*if_exists=fresh"):
        data.check_text(run, source, 8, resumed=True)
    data.check_text(run, source, 8, resumed=False)
    data.check_text(run, source, 8, resumed=True)


def test_another_python_is_told(monkeypatch):
    new = data.manifest("stdlib")
    assert data.changes(new, new) == ""
    old = new | dict(python="3.11.0", files=dict(new["files"], **{"os.py": "0" * 16}))
    told = data.changes(old, new)
    assert "of Python" in told and "of 3.11.0" in told and "run with that Python" in told
    assert "another source" in data.changes(data.manifest("climbmix"), new)
    assert data.changes(data.manifest("climbmix"), data.manifest("climbmix")) == ""


def test_tables_of_code_pages_teach_nothing():
    files = data.manifest("stdlib")["files"]
    assert "encodings/cp1252.py" not in files and "encodings/utf_8.py" in files
    assert 500 < len(files)


# ---- how often a text is read


def test_epochs_of_a_plan():
    assert data.epochs(400, 100) == (4.0, "")
    passes, warning = data.epochs(1000, 100)
    assert passes == 10 and "10.0 passes over 100 tokens" in warning
    assert data.epochs(5, 0)[1]


def test_a_file_beside_others_is_another_shard(tmp_path, monkeypatch):
    """What else is there decides what of a file is held out, so its cached tokens differ too."""
    monkeypatch.setattr(sources, "SHARD_BYTES", 1000)
    # of one length, so that only the hashes differ
    same = [text_of_words(1300, seed)[:1200] for seed in range(30)]
    shards = {}
    for name, other in (("one", 100), ("two", 200)):
        rest = [text_of_words(1300, other + seed)[:1200] for seed in range(30)]
        folder = write_corpus(tmp_path / name, "files", [])
        for part, texts in (("a", same), ("b", rest)):
            lines = [json.dumps(dict(text=text)) for text in texts]
            (tmp_path / name / f"{part}.jsonl").write_text("\n".join(lines))
        shards[name] = data.find_shards(folder, "train")
    first, second = ({(s.longest, s.last_hash) for s in shards[name]} for name in shards)
    assert first != second, "the rule held out others"
    together = [{s.identity for s in shards[name]} for name in shards]
    assert not together[0] & together[1]
