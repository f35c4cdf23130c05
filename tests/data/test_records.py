"""lib/data/records.py, streams.py: a corpus in a bucket is the text that it was made from."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from lib import data, files, recipes
from lib.data import corpus as corpora
from lib.data import record_files, records
from lib.data.tokenizer import Tokenizer
from lib.files import UserError
from tests.helpers import buckets

# servers of buckets
pytestmark = pytest.mark.slow

pytest.importorskip("grain", reason="no grain: pip install -e '.[grain]'")
pytest.importorskip("array_record", reason="no array_record: pip install -e '.[grain]'")


@pytest.fixture(scope="module", params=["folder", "gs", "s3"])
def place(request, tmp_path_factory):
    """An address to write to: a folder, a bucket of Google's, one of Amazon's."""
    if request.param == "folder":
        yield str(tmp_path_factory.mktemp("corpora"))
        return
    with buckets.bucket(request.param) as address:
        yield address


@pytest.fixture(scope="module", autouse=True)
def small():
    """Small shards and records, so that a small text has several, tokenised in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.data.sources.SHARD_BYTES", 8_000)
        patch.setattr("lib.data.corpus.RECORD_TOKENS", 300)
        patch.setattr("lib.data.tokens._tokenise_apart", data.tokens._tokenise)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with texts of many lengths, some longer than a record, in files of row groups."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = ["the", "cat", "sat", "naïve", "42", "<|bos|>", "x = y", "\n", "über", "家"]
    for i in range(3):
        texts = [" ".join(rng.choices(words, k=rng.randrange(1, 200))) for _ in range(50)]
        texts[7] = " ".join(rng.choices(words, k=1500))
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, folder / f"{i}.parquet", row_group_size=6)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat, über naïve 42 x = y " * 50], 280)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A folder with the tokenizer, and a cache to share."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def write(text, folder):
    def write(to, worker="1/1"):
        options = dict(processes=1, cache_dir=str(folder / "cache"))
        records.write(text, to, str(folder), worker, **options)

    return write


@pytest.fixture(scope="module")
def corpus(place, write):
    """The text, written by two workers."""
    for worker in ("2/2", "1/2"):
        write(f"{place}/corpus", worker)
    return f"{place}/corpus"


@pytest.fixture(scope="module")
def local(text, tokenizer, tmp_path_factory):
    return data.open_tokens(
        text, "train", tokenizer, cache_dir=tmp_path_factory.mktemp("local"), workers=1
    )


def take(tokens, count, **settings):
    return list(itertools.islice(data.batches(tokens, 2, 64, **settings), count))


def same(first, second):
    """Whether batches and cursors are equal, bit for bit."""
    return all(
        np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) and a[2] == b[2]
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("packing", data.PACKING)
@pytest.mark.parametrize("host, hosts", [(0, 1), (0, 2), (1, 2)])
def test_batches_and_cursors_are_those_of_the_local_path(
    corpus, local, tokenizer, packing, host, hosts
):
    remote = data.open_tokens(f"records:{corpus}", "train", tokenizer)
    assert len(remote) == len(local) > 2 and remote.identity == local.identity
    settings = dict(packing=packing, seed=5, buffer_size=20, host_index=host, host_count=hosts)
    whole = take(local, None, loop=False, **settings)
    assert len(whole) > 20
    assert same(whole, take(remote, None, loop=False, **settings))

    # either goes on from where the other one was
    middle, rest = whole[len(whole) // 2][2], whole[len(whole) // 2 + 1 :]
    assert same(rest, take(remote, None, loop=False, cursor=middle, **settings))
    last = take(remote, None, loop=False, **settings)[len(whole) // 2][2]
    assert same(rest, take(local, None, loop=False, cursor=last, **settings))


def test_later_epochs_and_a_buffer_over_several_shards(corpus, local, tokenizer):
    remote = data.open_tokens(f"records:{corpus}", "train", tokenizer)
    first, second = take(local, 600), take(remote, 600)
    assert same(first, second)
    cursor = second[-1][2]
    assert cursor["epoch"] > 1 and len(set(cursor["waiting"][::3])) > 2
    assert same(take(local, 5, cursor=cursor), take(remote, 5, cursor=cursor))


def test_documents_are_the_text(corpus, text, tmp_path):
    for split in data.SPLITS:
        documents = list(data.documents(f"records:{corpus}", split))
        assert len(documents) > 2
        assert documents == list(data.documents(text, split, cache_dir=tmp_path))


def test_the_manifest_says_what_is_there(corpus, tokenizer, local, capsys):
    manifest = json.loads(corpora.read_whole(corpus, "manifest.json"))
    assert manifest["tokenizer"] == tokenizer.fingerprint
    train = [entry for entry in manifest["shards"] if entry["split"] == "train"]
    assert [entry["tokens"] for entry in train] == [shard.size for shard in local]
    assert [entry["bytes"] for entry in train] == [shard.bytes for shard in local]
    assert manifest["tokens"] == sum(entry["tokens"] for entry in manifest["shards"])
    fs, root = files.filesystem(corpus)
    with fs.open(f"{root}/token_bytes.npy") as f:
        assert np.load(f).tolist() == list(tokenizer.token_bytes)
    records.check(corpus)
    assert f"{manifest['tokens']:,} tokens, all as they were written" in capsys.readouterr().out


def test_a_run_without_a_tokenizer_takes_the_corpus_own(corpus, tokenizer, tmp_path):
    taken = recipes.tokenizer_of(tmp_path, "auto", f"records:{corpus}", {}, False)
    assert taken.fingerprint == tokenizer.fingerprint
    assert data.load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_a_run_knows_its_corpus_wherever_it_stands(corpus, tmp_path):
    data.check_text(tmp_path, f"records:{corpus}", 8, resumed=False)
    data.check_text(tmp_path, f"records:{corpus}/", 8, resumed=True)
    with pytest.raises(UserError, match="another source"):
        data.check_text(tmp_path, "stdlib", 8, resumed=True)


def test_a_shard_is_made_once_and_its_bytes_are_the_same_again(
    write, tmp_path, monkeypatch, capsys
):
    """A worker that was stopped goes on, and what a corpus holds doesn't depend on who wrote it."""
    made = []
    write_shard = record_files.write_shard

    def counting(to, part, shard, tokenizer):
        if len(made) == 2:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(part.name)
        return write_shard(to, part, shard, tokenizer)

    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    monkeypatch.setattr(record_files, "write_shard", counting)
    with pytest.raises(KeyboardInterrupt):
        write(one)
    with pytest.raises(UserError, match="is not written to its end"):
        corpora.read_corpus(one)
    write(one)
    made.remove("stopped")
    assert len(made) == len(set(made)) == len(corpora.read_corpus(one).entries)
    assert "is whole" in capsys.readouterr().out

    write(two, "1/2")
    assert "are left to other workers" in capsys.readouterr().out
    write(two, "2/2")
    names = sorted(path.name for path in Path(one).iterdir())
    assert names == sorted(path.name for path in Path(two).iterdir())
    for name in names:
        assert Path(one, name).read_bytes() == Path(two, name).read_bytes(), name


def test_tasks_of_another_engine(tmp_path, tokenizer):
    """Each task hands its texts on; one that holds nothing is a shard without documents."""
    to = str(tmp_path)
    texts = [["a cat", "", "the mat " * 99], [], ["sat"]]
    for task in (2, 0, 1, 0):
        records.write_texts(texts[task], to, tokenizer, task, 3)
    assert list(data.documents(f"records:{to}", "train")) == ["a cat", "the mat " * 99]
    assert list(data.documents(f"records:{to}", "val")) == ["sat"]
    tokens = data.open_tokens(f"records:{to}", "train", tokenizer)
    assert take(tokens, 3)
    records.check(to)
    with pytest.raises(UserError, match="task 3 of 3 is out of range"):
        records.write_texts([], to, tokenizer, 3, 3)


def test_a_task_that_validates_needs_a_text_and_half_a_character_is_one(tmp_path, tokenizer):
    to = str(tmp_path)
    records.write_texts(["half \ud83d of one"], to, tokenizer, 0, 2)
    with pytest.raises(UserError, match="the last of 2 tasks, whose text validates, has none"):
        records.write_texts([""], to, tokenizer, 1, 2)
    records.write_texts(["sat"], to, tokenizer, 1, 2)
    assert list(data.documents(f"records:{to}", "train")) == ["half ? of one"]
    assert sum(entry.bytes for entry in records.read_corpus(to).entries) == len("half ? of one") + 3
