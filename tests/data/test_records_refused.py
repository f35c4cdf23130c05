"""lib/data/records.py, streams.py, regions.py: what can't be, in one sentence and in time."""

import json
import os
import time
from pathlib import Path

import pytest

from lib import data, files
from lib.data import corpus as corpora
from lib.data import record_files, records, regions
from lib.data.tokenizer import Tokenizer
from lib.files import UserError
from tests.helpers import buckets

# servers of buckets
pytestmark = pytest.mark.slow

pytest.importorskip("grain", reason="no grain: pip install -e '.[grain]'")
pytest.importorskip("array_record", reason="no array_record: pip install -e '.[grain]'")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat " * 50], 270)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A text of ten documents, and the tokenizer of a run."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer.save(folder / "tokenizer.json")
    (folder / "text").mkdir()
    for i in range(10):
        (folder / "text" / f"{i}.txt").write_text(f"the cat sat on mat {i} " * 30)
    return folder


@pytest.fixture
def write(folder, monkeypatch):
    """Writes the text to an address; what is tokenised is counted."""
    count = []

    def tokenise(*job):
        count.append(job)
        return data.tokens._tokenise(*job)

    monkeypatch.setattr("lib.data.tokens._tokenise_apart", tokenise)
    monkeypatch.setattr("lib.data.sources.SHARD_BYTES", 1_000)

    def write(to, tokenizer=folder, text=folder / "text", worker="1/1"):
        options = dict(processes=1, cache_dir=str(folder / "cache"))
        records.write(str(text), to, str(tokenizer), worker, **options)

    write.count = count
    return write


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 2.0)
    for module in (corpora, record_files):
        monkeypatch.setattr(module, "FILE_SECONDS", 2.0)


@pytest.mark.parametrize("worker", ["0/4", "5/4", "3", "a/b", "-1/4", "1/0"])
def test_a_worker_out_of_range(worker, write, tmp_path):
    with pytest.raises(UserError, match=f"worker {worker} is out of range"):
        write(str(tmp_path / "c"), worker=worker)
    assert not (tmp_path / "c").exists()


def test_another_tokenizer_another_text_or_damage(write, folder, tmp_path, tokenizer):
    corpus = str(tmp_path / "corpus")
    write(corpus)
    other = Tokenizer.train(["zebra crossing " * 99], 270)
    other.save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="was made with tokenizer .* this run has"):
        data.open_tokens(f"records:{corpus}", "train", other)
    before = len(write.count)
    with pytest.raises(UserError, match="with another tokenizer"):
        write(corpus, tokenizer=tmp_path)
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    with pytest.raises(UserError, match="with another text"):
        write(corpus, text=tmp_path / "other.jsonl")
    assert len(write.count) == before

    # one byte of a record, of an index, and the manifest
    shard = next(Path(corpus).glob("tokens-train-*.array_record"))
    _flip(shard, shard.stat().st_size // 2)
    with pytest.raises(UserError, match="does not match its checksum: write it again"):
        records.check(corpus)
    index = next(Path(corpus).glob("tokens-train-00000*.index.npz"))
    _flip(index, -1)
    with pytest.raises(UserError, match="does not match its checksum: write it again"):
        data.open_tokens(f"records:{corpus}", "train", tokenizer)[0]
    # a stranger's manifest, whose files would lead out of the folder that they are copied to
    manifest = Path(corpus) / "manifest.json"
    sound = json.loads(manifest.read_text())
    (first,) = [name for name in sound["shards"][0]["files"] if name.endswith(".array_record")]
    for change in (
        dict(files={"../../out": "0"}),
        dict(name="../x"),
        dict(documents="9"),
        dict(tokens=None),
        dict(split="test"),
        dict(files=[first]),
    ):
        shards = [sound["shards"][0] | change, *sound["shards"][1:]]
        manifest.write_text(json.dumps(sound | dict(shards=shards)))
        with pytest.raises(UserError, match="manifest.json is damaged"):
            records.check(corpus)
    for change in (dict(dtype="O"), dict(source=None), dict(shards=None), dict(shards=[1])):
        manifest.write_text(json.dumps(sound | change))
        with pytest.raises(UserError, match="manifest.json is damaged"):
            records.check(corpus)
    manifest.write_text("{}")
    with pytest.raises(UserError, match="format None"):
        data.open_tokens(f"records:{corpus}", "train", tokenizer)


def _flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_nothing_there(scheme, write, tokenizer):
    with buckets.bucket(scheme) as place:
        with pytest.raises(UserError, match="nothing holds no corpus: check the bucket"):
            data.open_tokens(f"records:{place}/nothing", "train", tokenizer)
        with pytest.raises(UserError, match="names no corpus"):
            list(data.documents("records:", "train"))
        with pytest.raises(UserError, match="has no tokenizer yet"):
            write(f"{place}/nothing", tokenizer="")
        with pytest.raises(UserError, match="no such bucket"):
            write(f"{scheme}://unknown-bucket/corpus")
        with pytest.raises(UserError, match="holds no corpus: check the bucket"):
            data.open_tokens(f"records:{scheme}://unknown-bucket/c", "train", tokenizer)
    assert not write.count


def test_a_bucket_of_google_that_vanishes_midway(write, tokenizer, impatient, monkeypatch):
    """One sentence, in seconds, for readers and writers."""
    monkeypatch.setattr("lib.data.streams.KEPT", 2)
    with buckets.google() as server:
        corpus = "gs://bucket/corpus"
        write(corpus)
        tokens = data.open_tokens(f"records:{corpus}", "train", tokenizer)
        reading = data.batches(tokens, 1, 64, buffer_size=2)
        next(reading)
        buckets.kill(server)
        with pytest.raises(UserError, match=f"{corpus}.*(did not answer|cannot reach)"):
            for _ in range(10_000):
                next(reading)
        with pytest.raises(UserError, match=f"{corpus} did not answer in 2 s"):
            write(corpus)


def test_no_permission_at_amazon(write, tokenizer, monkeypatch):
    """Whoever may read and not write learns it before anything is tokenised."""
    import boto3

    with buckets.amazon() as address:
        policy = dict(
            Version="2012-10-17",
            Statement=[
                dict(Effect="Allow", Action=["s3:Get*", "s3:List*", "s3:Head*"], Resource="*")
            ],
        )
        users = boto3.client("iam")
        users.create_user(UserName="reader")
        users.put_user_policy(
            UserName="reader", PolicyName="read", PolicyDocument=json.dumps(policy)
        )
        key = users.create_access_key(UserName="reader")["AccessKey"]
        # from now on the server asks who one is
        _post(f"{address}/moto-api/reset-auth", b"0")
        try:
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
            with pytest.raises(UserError, match="your login may not do that there"):
                write("s3://bucket/corpus")
        finally:
            _post(f"{address}/moto-api/reset-auth", b"Infinity")
    assert not write.count


def _post(address, content):
    import urllib.request

    # as it comes, not as a form
    headers = {"Content-Type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(address, content, headers), timeout=10).close()


def test_no_permission_at_google(write):
    """The answer that Google gives to a login that may read and not write."""

    def answer(method, path):
        if method == "GET":
            return 404, b"{}"
        return 403, b'{"error": {"code": 403, "message": "no storage.objects.create access"}}'

    with buckets.answering(answer) as address, buckets.asked_at(gs=address):
        with pytest.raises(UserError, match="your login may not do that there"):
            write("gs://bucket/corpus")
    assert not write.count


def test_no_credentials_at_amazon(write, monkeypatch, tmp_path):
    with buckets.amazon():
        for name in [name for name in os.environ if name.startswith("AWS_") and "KEY" in name]:
            monkeypatch.delenv(name)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(UserError, match="Unable to locate credentials.*check .* your login"):
            write("s3://bucket/corpus")
    assert not write.count


def test_no_credentials_at_google(write):
    """The answer that Google gives to whoever shows no login."""
    said = b'{"error": {"code": 401, "message": "Anonymous caller does not have access"}}'
    with buckets.answering(lambda *_: (401, said)) as address, buckets.asked_at(gs=address):
        with pytest.raises(UserError, match="Anonymous caller.*check the address, your login"):
            write("gs://bucket/corpus")
    assert not write.count


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_store_that_says_nothing_is_given_up(write, tokenizer, impatient, scheme):
    begun = time.monotonic()
    with buckets.silent() as address, buckets.asked_at(**{scheme: address}):
        for work in (
            lambda: write(f"{scheme}://bucket/corpus"),
            lambda: data.open_tokens(f"records:{scheme}://bucket/corpus", "train", tokenizer),
        ):
            with pytest.raises(UserError, match="did not answer in 2 s: check .* your login"):
                work()
    assert time.monotonic() - begun < 20 and not write.count


def test_packages_that_are_missing(monkeypatch, write, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "array_record.python.array_record_module", None)
    with pytest.raises(UserError, match="pip install 'array_record"):
        write(str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()


# ---- near or far -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def near():
    with buckets.google():
        yield "gs://bucket/corpus"


@pytest.mark.parametrize("zone, far", [("us-central1-a", False), ("europe-west4-b", True)])
def test_a_bucket_of_google_in_another_region(monkeypatch, capsys, near, zone, far):
    with buckets.answering(lambda *_: (200, f"projects/1/zones/{zone}".encode())) as address:
        monkeypatch.setattr(regions, "ZONE", address)
        regions.warn_if_far(near)
    told = capsys.readouterr().err
    assert ("lies in US-CENTRAL1 and this machine in europe-west4" in told) == far
    assert bool(told) == far


@pytest.mark.parametrize("zone, far", [("eu-west-1a", False), ("us-east-1b", True)])
def test_a_bucket_of_amazon_in_another_region(monkeypatch, capsys, zone, far):
    def answer(method, path):
        return 200, b"token" if method == "PUT" else zone.encode()

    with buckets.amazon("eu-west-1"), buckets.answering(answer) as address:
        monkeypatch.setattr(regions, "AMAZON", address + "/")
        regions.warn_if_far("s3://bucket/corpus")
    told = capsys.readouterr().err
    assert ("lies in eu-west-1 and this machine in us-east-1" in told) == far
    assert bool(told) == far


@pytest.mark.parametrize(
    "bucket, machine, far",
    [
        ("US", "us-east5", False),
        ("EU", "us-east5", True),
        ("NAM4", "europe-west4", False),
        ("US-CENTRAL1", "us-central1", False),
        ("US-CENTRAL1", "us-central10", True),
        ("us-east-1", "", False),
    ],
)
def test_what_is_far(bucket, machine, far):
    assert regions.is_far(bucket, machine) == far


def test_where_nothing_is_known_nothing_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(regions, "ZONE", "http://127.0.0.1:9/")
    regions.warn_if_far("gs://bucket/corpus")
    regions.warn_if_far(str(tmp_path))
    assert capsys.readouterr().err == ""
