"""lib/runs.py: the run folder, its stages and results."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from lib import report, runs
from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.files import UserError, write_json
from lib.params import init_params
from lib.train import checkpoint, records


def test_open_run(tmp_path):
    run = runs.open_run("a.b-1", runs_dir=tmp_path)
    assert run == tmp_path / "a.b-1" and run.is_dir()
    for bad in ("", "../x", "a/b", ".hidden", "a b"):
        with pytest.raises(UserError, match="cannot name a folder"):
            runs.open_run(bad, runs_dir=tmp_path)
    with pytest.raises(UserError, match="no tokenizer.json: run 01_tokenizer.py --run a.b-1 first"):
        runs.open_run("a.b-1", needs="tokenizer.json", runs_dir=tmp_path)
    with pytest.raises(UserError, match="no run with tokenizer.json"):
        runs.open_run("", needs="tokenizer.json", runs_dir=tmp_path)
    (run / "tokenizer.json").write_text("{}")
    assert runs.open_run("", needs="tokenizer.json", runs_dir=tmp_path) == run
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        runs.open_run("file", runs_dir=tmp_path)


def test_the_newest_run_is_the_one_that_changed_last(tmp_path):
    for name, changed in (("a", 2000), ("b", 1000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        os.utime(tmp_path / name / "config.json", (changed, changed))
    assert runs.newest_run(tmp_path) == tmp_path / "a"


def test_of_an_earlier_training_only_what_outlasts_it_is_told_on(tmp_path, capsys):
    told = {"vocab_size": 5, "val_bpb": 1.0, "sft_loss": 2.0}
    first = {"vocab_size": 5, "val_bpb": 1.0}
    # a stage that is begun anew takes those behind it along
    for stage, kept in (("sft", first), ("mid", first), ("base", {"vocab_size": 5})):
        (tmp_path / "results.json").write_text(json.dumps(told))
        old = runs.start_afresh(tmp_path, stage)
        assert json.loads((tmp_path / "results.json").read_text()) == kept
        assert json.loads((old / "results.json").read_text()) == told


def test_set_aside_loses_nothing(tmp_path):
    for n in (1, 2):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "config.json").write_text(str(n))
        old = runs.set_aside(tmp_path, "checkpoints", "config.json", "never-there")
        assert old == tmp_path / f"old-{n}"
        assert (old / "config.json").read_text() == str(n) and (old / "checkpoints").is_dir()
    assert {p.name for p in tmp_path.iterdir()} == {"old-1", "old-2"}


def test_results_table(tmp_path):
    with pytest.raises(UserError, match="no .*results.json: run 01_tokenizer.py"):
        runs.results_table(tmp_path)
    (tmp_path / "results.json").write_text(
        json.dumps(
            dict(
                params=1234567,
                val_bpb=1.23456,
                gzip_bpb=2.5,
                train_tokens_per_s=None,
                more=7,
                nested={"a": 1},
                samples=["def f"],
            )
        )
    )
    table = runs.results_table(tmp_path)
    for line in (
        r"parameters +1,234,567\n",
        r"validation bits per byte +1.2346\n",
        r"gzip -9 .* 2.5000\n",
        r"more +7\n",
        "def f",
    ):
        assert re.search(line, table), line
    assert "nested" not in table and "None" not in table


def test_results_table_sets_stages_side_by_side(tmp_path):
    figures = dict(params=1, base_spelling=0.0, sft_spelling=0.86719, sft_val_loss=0.8)
    (tmp_path / "results.json").write_text(json.dumps(figures))
    table = runs.results_table(tmp_path)
    for line in (
        r"after each stage +base +sft\n",
        r"spelling +0 +0\.8672\n",
        r"val loss {9,}0\.8$",
    ):
        assert re.search(line, table), line
    assert "sft_spelling" not in table


# ---- the model -----------------------------------------------------------------------------------

CONFIG = Config(
    vocab_size=280,
    sequence_len=16,
    n_layer=1,
    n_embd=32,
    n_head=1,
    n_kv_head=1,
    head_dim=32,
    mlp_dim=32,
    total_batch_size=64,
    microbatch=4,
)


@pytest.fixture
def run(tmp_path):
    """A run folder with a tokenizer and `save(step, **meta)`, which leaves a base checkpoint."""
    tokenizer = Tokenizer.train(["some text to learn from"], 280)
    tokenizer.save(tmp_path / "tokenizer.json")
    params = init_params(0, CONFIG)
    own = dict(config=CONFIG.to_dict(), tokenizer=tokenizer.fingerprint)

    def save(step, stage="checkpoints", keep=3, **meta):
        place = tmp_path / stage
        tree = {"params": params, "opt": {"m": np.zeros(2)}}
        return checkpoint.save(place, step, tree, own | meta, keep=keep, metric=step)

    return tmp_path, save


def test_the_model_of_a_run(run):
    folder, save = run
    with pytest.raises(UserError, match="no checkpoint in .*: train one with 02_train.py"):
        runs.load_model(folder)
    first, second, tuned = save(1), save(2), save(1, "sft")
    for ckpt, stage, path in (
        ("", "", tuned),
        ("", "base", second),
        ("best", "base", first),
        (str(first), "", first),
    ):
        model = runs.load_model(folder, ckpt, stage)
        assert (model.path, model.stage) == (str(path), "sft" if path == tuned else "base")
        assert model.config == CONFIG and model.meta["step"] == int(path.name[5:])
    with pytest.raises(UserError, match="has no mid checkpoint, only base, sft"):
        runs.load_model(folder, stage="mid")


@pytest.mark.parametrize(
    "meta, sentence",
    [
        (dict(tokenizer="another"), "trained with another tokenizer"),
        (dict(config=None), "meta.json tells no model's config"),
        (dict(config=CONFIG.to_dict() | dict(n_layer=10**8)), "meta.json: n_layer=100000000"),
        (dict(config=CONFIG.to_dict() | dict(n_layer="2")), "meta.json: .*n_layer"),
        (dict(config=CONFIG.to_dict() | dict(mlp_dim=64)), "does not fit"),
        (dict(config={"colour": 1}), "meta.json: .*colour"),
    ],
)
def test_what_is_no_model_of_this_run_is_one_sentence(run, meta, sentence):
    folder, save = run
    save(1, **meta)
    with pytest.raises(UserError, match=f"step_00000001.*{sentence}") as caught:
        runs.load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_pruned_while_it_is_loaded_is_looked_for_again(run, monkeypatch):
    folder, save = run
    save(1)
    read, more = checkpoint.read_meta, [2, 3]

    def slowly(path):
        if more:
            older = checkpoint.latest(folder / "checkpoints")
            save(more.pop(0))
            shutil.rmtree(older)
        return read(path)

    monkeypatch.setattr(checkpoint, "read_meta", slowly)
    assert runs.load_model(folder).meta["step"] == 3 and not more


def test_a_stage_that_is_damaged_does_not_hide_the_others(run):
    folder, save = run
    base, tuned = save(1), save(2, "sft")
    (tuned / "params.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="stage sft is passed over"):
        assert runs.load_model(folder).path == str(base)
    (base / "params.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="no checkpoint of 1 in"):
        runs.stages(folder)


def test_of_all_checkpoints_only_what_is_loaded_is_hashed(run, monkeypatch):
    """Gigabytes of other stages and of an optimizer's state are nobody's concern here."""
    folder, save = run
    for step in (1, 2):
        save(step)
        save(step, "sft")
    real, hashed = records.sha256, []

    def counted(path):
        hashed.append(Path(path).relative_to(folder).as_posix())
        return real(path)

    monkeypatch.setattr(records, "sha256", counted)
    runs.load_model(folder)
    # once to choose it, once when it is read
    assert hashed == ["sft/step_00000002/params.safetensors"] * 2
    hashed.clear()
    runs.load_model(folder, stage="base")
    assert hashed == ["checkpoints/step_00000002/params.safetensors"] * 2
    hashed.clear()
    checkpoint.read_meta(folder / "checkpoints")
    assert hashed == []
    # to resume needs all of it
    checkpoint.latest(folder / "sft")
    assert "sft/step_00000002/opt.safetensors" in hashed


def test_damaged_results_are_one_sentence(tmp_path):
    (tmp_path / "results.json").write_text("")
    with pytest.raises(UserError, match="results.json: not JSON"):
        runs.results_table(tmp_path)
    for entry in (
        dict(val_bpb="x"),
        dict(params=1.5),
        dict(params=[1]),
        dict(device=3),
        dict(samples=5),
        dict(samples=[1]),
        dict(plan=[]),
    ):
        write_json(tmp_path / "results.json", entry)
        for read in (runs.results_table, report.write):
            with pytest.raises(UserError, match="results.json is damaged, .* is no such figure"):
                read(tmp_path)
    # what was not measured is no damage
    write_json(tmp_path / "results.json", dict(val_bpb=None, samples=None))
    assert runs.results_table(tmp_path) == ""
