"""Runs, models, tokenizers and exports to the Hub and back, with the Hub's own client against a
stand-in that breaks off, asks for patience and refuses.
"""

import json
import re
import shutil

import numpy as np
import pytest

from lib import hub
from lib.config import Config
from lib.data.tokenizer import FILE
from lib.files import UserError, write_json
from lib.interop.hub_pull import pull
from lib.interop.hub_push import MANIFEST, Wish, push
from lib.runs import load_model, stages
from lib.train import checkpoint
from tests.helpers.models import config_of, random_params, tokenizer

# a Hub, and processes that are killed
pytestmark = pytest.mark.slow

TOKEN = "hf_secret"
REPO = "me/small"


@pytest.fixture(scope="module")
def trained() -> tuple[dict, Config]:
    config = config_of("llama", n_layer=2, n_embd=32, n_head=2, mlp_dim=64)
    return random_params(config), config


@pytest.fixture
def run(tmp_path, trained):
    """A run as 02 and 04 leave it: two checkpoints of base, one of sft, figures and samples."""
    params, config = trained
    folder = tmp_path / "runs" / "mine"
    tokenizer().save(folder / FILE)
    meta = dict(
        config=config.to_dict(),
        tokenizer=tokenizer().fingerprint,
        settings=dict(source="tinystories", packing="bestfit", shards=8),
    )
    state = {"params": params, "opt_state": {"m": np.ones(3, np.float32)}}
    for step in (1, 2):
        checkpoint.save(folder / "checkpoints", step, state, meta, metric=2.0)
    taught = meta | dict(settings=dict(mixture={"smoltalk": 1.0, "arithmetic": 2.0}))
    other = {"params": random_params(config, seed=3), "opt_state": {"m": np.zeros(2, np.float32)}}
    checkpoint.save(folder / "sft", 5, other, taught)
    config.save(folder / "config.json")
    marks = dict(gsm=dict(score=0.5, stderr=0.06, n=64, baseline=0.0))
    write_json(
        folder / "evals" / "sft.json",
        dict(stage="sft", time="2026-11-01T10:00:00", tasks=marks, seed=0),
    )
    results = dict(params=1234, steps=2, val_bpb=1.25, val_bpb_stderr=0.01)
    write_json(folder / "results.json", results | dict(samples=["Once upon a time"]))
    (folder / ".checksums.json").write_text("{}")
    (folder / "old-1").mkdir()
    (folder / "old-1" / "results.json").write_text("{}")
    return folder


def test_a_model_goes_and_comes_back_and_is_the_same(run, model_hub, trained, tmp_path):
    pushed = push(run, REPO, "model", Wish(stage="base"), token=TOKEN)
    files = set(model_hub.repos[REPO])
    assert files == {"README.md", MANIFEST, "meta.json", "params.safetensors", FILE}
    assert REPO in model_hub.private
    assert {authorization for _, authorization in model_hub.posts} == {f"Bearer {TOKEN}"}

    # by the revision that the command names
    source = re.search(r"--source (\S+) --run mine$", pushed.told("mine"))
    assert source and source[1].endswith(pushed.commit)
    told = pull(source[1], tmp_path / "runs" / "back", TOKEN)
    assert "pulled the model" in told
    model = load_model(tmp_path / "runs" / "back")
    assert model.stage == "base" and model.meta["step"] == 2 and model.config == trained[1]
    np.testing.assert_array_equal(model.params["embed"], trained[0]["embed"])
    assert not list((tmp_path / "runs").glob(".*"))


def test_a_pushed_model_is_loaded_from_where_it_is(run, model_hub, monkeypatch, trained):
    """As the card says: one line, at a revision that is pinned."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pushed = push(run, REPO, "model", Wish(stage="base"), token=TOKEN)
    push(run, REPO, "model", Wish(stage="sft"), token=TOKEN)
    model = load_model("", ckpt=f"hf://{REPO}@{pushed.commit}")
    assert model.meta["step"] == 2
    np.testing.assert_array_equal(model.params["embed"], trained[0]["embed"])
    assert load_model("", ckpt=f"hf://{REPO}").meta["step"] == 5


def test_a_whole_run_goes_and_comes_back(run, model_hub, tmp_path):
    push(run, REPO, "run", token=TOKEN)
    files = set(model_hub.repos[REPO])
    assert "checkpoints/step_00000002/opt_state.safetensors" in files
    assert "sft/step_00000005/params.safetensors" in files
    assert not [name for name in files if "step_00000001" in name or "old-1" in name]
    assert ".checksums.json" not in files

    pull(REPO, tmp_path / "runs" / "back", TOKEN)
    back = tmp_path / "runs" / "back"
    assert stages(back) == ["base", "sft"]
    assert (back / "results.json").read_bytes() == (run / "results.json").read_bytes()
    source = json.loads((back / "pulled.json").read_text())["source"]
    assert source == f"hf:{REPO}@{model_hub.heads[REPO]}"
    # and is pushed again from there: what has not changed is not sent
    sent = len(model_hub.puts)
    push(back, REPO, "run", token=TOKEN)
    assert len(model_hub.puts) == sent


def test_a_tokenizer_and_an_export(run, model_hub, tmp_path):
    push(run, "me/words", "tokenizer", token=TOKEN)
    pull("hf:me/words", tmp_path / "runs" / "other", TOKEN)
    assert (tmp_path / "runs/other" / FILE).read_bytes() == (run / FILE).read_bytes()
    with pytest.raises(UserError, match="tokenizer.json is there already"):
        pull("hf:me/words", tmp_path / "runs" / "other", TOKEN)

    with pytest.raises(UserError, match="has no gguf export: python -m lib.interop export"):
        push(run, "me/gguf", "export", Wish(format="gguf"), token=TOKEN)
    folder = run / "exports" / "gguf"
    folder.mkdir(parents=True)
    (folder / "model.gguf").write_bytes(b"GGUF")
    folder.with_suffix(".txt").write_text("largest logit difference  1.0e-06")
    push(run, "me/gguf", "export", Wish(format="gguf"), token=TOKEN)
    assert model_hub.repos["me/gguf"]["model.gguf"] == b"GGUF"
    card = model_hub.repos["me/gguf"]["README.md"].decode()
    assert "1.0e-06" in card and "hf download me/gguf model.gguf" in card
    pull("hf:me/gguf", tmp_path / "runs" / "other", TOKEN)
    assert (tmp_path / "runs/other/exports/gguf/model.gguf").read_bytes() == b"GGUF"


def test_the_card_says_what_it_is(run, model_hub):
    push(run, REPO, "run", token=TOKEN)
    card = model_hub.repos[REPO]["README.md"].decode()
    assert card.startswith("---\nlicense: other\n")
    for words in (
        f"pull --source hf:{REPO} --run mine",
        "CDLA-Sharing 1.0",
        "sft was trained on smoltalk, arithmetic",
        "1.2500 ± 0.0100",
        "50.0 ± 6.0",
        "Plan and outcome",
        "Once upon a time",
        "Configuration",
    ):
        assert words in card, words
    assert "svg" not in card and "Dots" not in card


def test_a_killed_upload_leaves_the_old_revision_and_goes_on(run, model_hub, tmp_path):
    push(run, REPO, "run", token=TOKEN)
    old = model_hub.heads[REPO]
    config = Config.load(run / "config.json")
    params = random_params(config, seed=2)
    meta = checkpoint.read_meta(run / "checkpoints")
    meta = {key: value for key, value in meta.items() if key not in ("step", "metric")}
    state = {"params": params, "opt_state": {"m": np.zeros(3, np.float32)}}
    checkpoint.save(run / "checkpoints", 3, state, meta)

    # the line breaks in the middle of a file, as often as the client tries
    model_hub.upload_faults["put"] = [None] + ["die"] * 200
    sent = len(model_hub.puts)
    with pytest.raises(UserError, match="cannot push to hf:me/small .*check the name and the net"):
        push(run, REPO, "run", token=TOKEN)
    assert model_hub.heads[REPO] == old and len(model_hub.puts) == sent + 1
    pull(f"hf:{REPO}", tmp_path / "runs" / "before", TOKEN)
    assert load_model(tmp_path / "runs/before", stage="base").meta["step"] == 2

    # the second try sends what had not arrived, and no more
    model_hub.upload_faults["put"] = []
    push(run, REPO, "run", token=TOKEN)
    assert len(model_hub.puts) == len(set(model_hub.puts))
    pull(f"hf:{REPO}", tmp_path / "runs" / "after", TOKEN)
    assert load_model(tmp_path / "runs/after", stage="base").meta["step"] == 3
    # and the old revision is what it was
    pull(f"hf:{REPO}@{old}", tmp_path / "runs" / "old", TOKEN)
    assert load_model(tmp_path / "runs/old", stage="base").meta["step"] == 2


@pytest.mark.parametrize("verb", ["create", "preupload", "batch", "put", "commit"])
def test_a_hub_that_asks_for_patience_is_asked_again(run, model_hub, verb):
    model_hub.upload_faults[verb] = [429, 503]
    push(run, REPO, "model", token=TOKEN)
    assert model_hub.commits == 1


def test_a_commit_whose_answer_was_lost_is_one(run, model_hub, tmp_path):
    model_hub.upload_faults["commit"] = ["die after"]
    push(run, REPO, "model", token=TOKEN)
    pull(REPO, tmp_path / "runs" / "back", TOKEN)
    assert load_model(tmp_path / "runs" / "back").meta["step"] == 5


def test_a_hub_that_stays_busy_is_one_sentence(run, model_hub):
    model_hub.upload_faults["commit"] = [429] * 50
    with pytest.raises(UserError, match="cannot push to hf:me/small .*try again in some minutes"):
        push(run, REPO, "model", token=TOKEN)
    assert set(model_hub.repos[REPO]) == set()


def test_a_busy_hub_is_asked_three_times_and_no_more(monkeypatch):
    asked, waits = [], []

    def call():
        asked.append(1)
        raise ConnectionError("cut")

    monkeypatch.setattr(hub.time, "sleep", waits.append)
    with pytest.raises(ConnectionError):
        hub.patiently(call)
    assert len(asked) == 3 and waits == [2.0, 4.0]


def test_refusals_name_the_token(run, model_hub, tmp_path):
    model_hub.refused = True
    with pytest.raises(UserError, match="cannot push .*the secret HF_TOKEN .*write access"):
        push(run, REPO, token="hf_wrong")
    model_hub.refused = False
    push(run, REPO, token=TOKEN)
    with pytest.raises(UserError, match="cannot pull hf:me/small .*HF_TOKEN"):
        pull(f"hf:{REPO}", tmp_path / "runs" / "back")
    with pytest.raises(UserError, match="cannot pull hf:me/nothing"):
        pull("hf:me/nothing", tmp_path / "runs" / "back", TOKEN)
    with pytest.raises(UserError, match="cannot pull hf:me/small@v9 .*the revision"):
        pull(f"hf:{REPO}@v9", tmp_path / "runs" / "back", TOKEN)
    assert not (tmp_path / "runs" / "back").exists()


def test_a_pull_that_breaks_off_goes_on(run, model_hub, tmp_path):
    push(run, REPO, "run", token=TOKEN)
    model_hub.faults = [None] * 12 + [403]
    back = tmp_path / "runs" / "back"
    with pytest.raises(UserError, match="cannot pull hf:me/small"):
        pull(REPO, back, TOKEN)
    assert not back.exists()
    before = len([entry for entry in model_hub.log if entry[0] == "GET" and "resolve" in entry[1]])
    pull(REPO, back, TOKEN)
    fetched = [entry for entry in model_hub.log if entry[0] == "GET" and "resolve" in entry[1]]
    files = json.loads(model_hub.repos[REPO][MANIFEST])["files"]
    assert before > 1 and len(fetched) <= len(files) + 2
    assert stages(back) == ["base", "sft"]


def test_a_pull_takes_nothing_of_one_that_broke_off_before(run, model_hub, tmp_path):
    """Of another repository, under the same name: its stages are not this one's."""
    push(run, "me/first", "run", token=TOKEN)
    for stage in ("sft", "evals"):
        shutil.rmtree(run / stage)
    push(run, "me/second", "run", token=TOKEN)
    back = tmp_path / "runs" / "back"
    model_hub.faults = [None] * 20 + [403]
    with pytest.raises(UserError):
        pull("me/first", back, TOKEN)
    model_hub.faults = []
    assert list(back.with_name(".back.pull").rglob("sft/*")), "it broke off behind the other stage"

    pull("me/second", back, TOKEN)
    listed = set(json.loads(model_hub.repos["me/second"][MANIFEST])["files"])
    there = {path.relative_to(back).as_posix() for path in back.rglob("*") if path.is_file()}
    assert there == listed | {"pulled.json"} and not (back / "sft").exists()


def test_what_is_not_as_listed_is_not_kept(run, model_hub, tmp_path):
    push(run, REPO, "model", token=TOKEN)
    files = dict(model_hub.repos[REPO])
    files["params.safetensors"] = files["params.safetensors"][:-1] + b"!"
    model_hub.put_commit(REPO, files)
    with pytest.raises(UserError, match="params.safetensors of hf:me/small@.* not what its list"):
        pull(REPO, tmp_path / "runs" / "back", TOKEN)
    # a list that points elsewhere, and one that names what is not there
    for name, message in (("../evil", "don't trust it"), ("gone.json", "cannot pull")):
        manifest = json.loads(files[MANIFEST])
        manifest["files"][name] = dict(bytes=1, sha256="0")
        model_hub.put_commit(REPO, files | {MANIFEST: json.dumps(manifest).encode()})
        with pytest.raises(UserError, match=message):
            pull(REPO, tmp_path / "runs" / "back", TOKEN)
    assert not (tmp_path / "runs" / "back").exists()


def test_repositories_of_another_kind(run, model_hub, tmp_path):
    model_hub.put_commit("me/llama", {"config.json": b"{}", "model.safetensors": b"x"})
    with pytest.raises(UserError, match="lib.interop import --source hf:me/llama"):
        pull("hf:me/llama", tmp_path / "runs" / "back", TOKEN)
    with pytest.raises(UserError, match="were not pushed from here: choose another name"):
        push(run, "me/llama", private=False, token=TOKEN)
    # a file of ours by its name only: nothing of a stranger's is taken out
    model_hub.put_commit("me/other", {"meta.json": b"{}", "weights.bin": b"x"})
    with pytest.raises(UserError, match="were not pushed from here: choose another name"):
        push(run, "me/other", private=False, token=TOKEN)
    with pytest.raises(UserError, match="me/llama is there and public: pass --public"):
        push(run, "me/llama", token=TOKEN)


def test_what_a_run_does_not_have(run, model_hub, tmp_path):
    with pytest.raises(UserError, match="has no rl checkpoint, only base, sft"):
        push(run, REPO, "model", Wish(stage="rl"), token=TOKEN)
    with pytest.raises(UserError, match="there is no run"):
        push(tmp_path / "runs" / "no", REPO, token=TOKEN)
    with pytest.raises(UserError, match="unknown kind to push 'weights'"):
        push(run, REPO, "weights", token=TOKEN)
    with pytest.raises(UserError, match="write hf:USER/NAME"):
        push(run, "small", token=TOKEN)
    assert model_hub.posts == []


def test_what_02_has_pushed_comes_back_too(run, model_hub, tmp_path):
    """`push_to` uploads a checkpoint and a tokenizer without a list."""
    tokenizer().push_to_hub(REPO, TOKEN)
    path = checkpoint.latest(run / "checkpoints")
    assert checkpoint.upload_to_hub(path, REPO, TOKEN).result(60)
    pull(REPO, tmp_path / "runs" / "back", TOKEN)
    assert load_model(tmp_path / "runs" / "back").meta["step"] == 2
    # and may be pushed over
    push(run, REPO, "model", token=TOKEN)
    assert "opt_state.safetensors" not in model_hub.repos[REPO]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(run, model_hub, tmp_path, monkeypatch):
    push(run, REPO, "model", token=TOKEN)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lib.interop.hub_pull.os.rename", full)
    with pytest.raises(UserError, match="the disk is full"):
        pull(REPO, tmp_path / "runs" / "back", TOKEN)
    assert not (tmp_path / "runs" / "back").exists()


def test_sources():
    assert hub.parse("hf:a/b@c") == hub.parse("hf://a/b@c") == hub.Revision("a/b", "c")
    assert hub.parse("a/b").name == "hf:a/b"
    with pytest.raises(UserError, match="is no repository"):
        hub.parse("hf:a")
