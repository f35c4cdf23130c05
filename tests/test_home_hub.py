"""home=hub:USER/NAME with the Hub's own client against a stand-in: two machines, one run."""

import pytest

from lib import home
from lib.files import UserError

TOKEN = lambda: "hf_secret"  # noqa: E731


def machine(path, monkeypatch):
    """Work on a machine of its own: what is relative lies in its folder."""
    path.mkdir(exist_ok=True)
    monkeypatch.chdir(path)
    return home.open_home("hub:me/runs", TOKEN)


def fill(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_a_run_goes_to_the_hub_and_comes_back_on_another_machine(tmp_path, monkeypatch, model_hub):
    here = machine(tmp_path / "one", monkeypatch)
    run = here.runs_dir / "mine"
    fill(run, tokenizer="t", checkpoints__step_1="weights", metrics="a")
    mirror = home.Mirror(here, run, TOKEN)
    mirror.send()
    mirror.wait()
    assert model_hub.repos["me/runs"]["runs/mine/checkpoints/step_1"] == b"weights"
    assert {authorization for _, authorization in model_hub.posts} == {"Bearer hf_secret"}

    there = machine(tmp_path / "two", monkeypatch)
    assert home.pull(there, "", TOKEN) == "mine"
    assert (there.runs_dir / "mine" / "checkpoints" / "step_1").read_text() == "weights"

    # it goes on there; a checkpoint is pruned; the first machine follows
    run = there.runs_dir / "mine"
    fill(run, checkpoints__step_2="more")
    (run / "checkpoints" / "step_1").unlink()
    home.Mirror(there, run, TOKEN).wait()
    assert "runs/mine/checkpoints/step_1" not in model_hub.repos["me/runs"]
    back = machine(tmp_path / "one", monkeypatch)
    home.pull(back, "mine", TOKEN)
    assert (back.runs_dir / "mine" / "checkpoints" / "step_2").read_text() == "more"


def test_nothing_is_sent_twice(tmp_path, monkeypatch, model_hub):
    here = machine(tmp_path / "one", monkeypatch)
    run = here.runs_dir / "mine"
    fill(run, tokenizer="t")
    home.Mirror(here, run, TOKEN).wait()
    before = model_hub.commits
    home.Mirror(here, run, TOKEN).wait()
    assert model_hub.commits == before


def test_a_token_that_may_not_write_is_told_before_compute(tmp_path, monkeypatch, model_hub):
    model_hub.refused = True
    with pytest.raises(UserError, match="cannot use home=hub:me/runs .*token with write access"):
        machine(tmp_path / "one", monkeypatch)
    assert model_hub.repos == {}


def test_two_machines_that_changed_the_same_file_are_told(tmp_path, monkeypatch, model_hub):
    here = machine(tmp_path / "one", monkeypatch)
    fill(here.runs_dir / "mine", metrics="a")
    home.Mirror(here, here.runs_dir / "mine", TOKEN).wait()
    there = machine(tmp_path / "two", monkeypatch)
    home.pull(there, "mine", TOKEN)
    fill(there.runs_dir / "mine", metrics="b")
    home.Mirror(there, there.runs_dir / "mine", TOKEN).wait()

    here = machine(tmp_path / "one", monkeypatch)
    fill(here.runs_dir / "mine", metrics="c")
    with pytest.raises(UserError, match="have both changed since they last agreed"):
        home.pull(here, "mine", TOKEN)
