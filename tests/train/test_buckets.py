"""Checkpoints, runs and reports on buckets, with the real clients against servers of our own."""

import numpy as np
import pytest

from lib.home import Mirror, open_home, pull
from lib.report import write
from lib.runs import load_model
from lib.train import checkpoint
from lib.train.records import sound_ones
from tests.helpers import buckets
from tests.helpers.models import config_of, random_params, tokenizer

# servers of buckets
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["gs", "s3"])
def place(request):
    with buckets.bucket(request.param) as address:
        yield address


@pytest.fixture(scope="module")
def trained():
    config = config_of("llama", n_layer=1, n_embd=32, n_head=2, mlp_dim=64)
    return random_params(config), config


def meta(config):
    return dict(config=config.to_dict(), tokenizer=tokenizer().fingerprint)


def test_checkpoints(place, trained):
    params, config = trained
    folder = f"{place}/some/checkpoints"
    for step in (1, 2, 3, 4):
        state = {"params": params, "opt_state": {"m": np.full(3, step, np.float32)}}
        checkpoint.save(folder, step, state, meta(config), keep=2, metric=float(step))
    assert [record.step for _, record in sound_ones(folder)] == [4, 3, 1]
    newest, best = checkpoint.latest(folder), checkpoint.best(folder)
    assert str(newest).endswith("step_00000004") and str(best).endswith("step_00000001")
    state, about = checkpoint.restore(newest)
    np.testing.assert_array_equal(state["params"]["embed"], params["embed"])
    np.testing.assert_array_equal(state["opt_state"]["m"], np.full(3, 4, np.float32))
    assert about["step"] == 4


def test_a_run_and_its_report_go_from_machine_to_machine(place, trained, tmp_path):
    params, config = trained
    home = open_home(f"{place}/home")
    first = home._replace(runs_dir=tmp_path / "1" / "runs")
    second = home._replace(runs_dir=tmp_path / "2" / "runs")
    run = first.runs_dir / "mine"
    run.mkdir(parents=True)
    tokenizer().save(run / "tokenizer.json")
    config.save(run / "config.json")
    checkpoint.save(run / "checkpoints", 7, {"params": params}, meta(config))
    report = write(run)
    mirror = Mirror(first, run)
    mirror.send()
    mirror.wait()

    assert pull(second) == "mine"
    other = second.runs_dir / "mine"
    assert (other / report.name).read_bytes() == report.read_bytes()
    for model in (
        load_model(other),
        load_model(run, f"{place}/home/runs/mine/checkpoints/step_00000007"),
    ):
        assert model.meta["step"] == 7
        np.testing.assert_array_equal(model.params["embed"], params["embed"])
