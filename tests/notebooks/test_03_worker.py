"""A sweep's trial is the run that 02_train makes; 03_worker says in one sentence what is wrong."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT, programs
from tests.helpers.notebooks import CORPUS, SMOKE, save_tokenizer, words_of
from tests.helpers.wandb_server import StandIn

pytestmark = pytest.mark.slow
TINY = SMOKE["02_train"]["overrides"]


def script(name, cwd, env=None, **flags):
    return subprocess.run(
        [sys.executable, ROOT / f"{name}.py", *words_of(flags)],
        cwd=cwd,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | (env or {}),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    save_tokenizer(folder / "runs" / "smoke")
    return folder


@pytest.fixture
def sweep(workdir):
    def write(text, name="mine"):
        (workdir / f"{name}.yaml").write_text(text)
        return dict(run="smoke", source=CORPUS, budget="smoke", sweep=f"{name}.yaml")

    return write


def test_a_trial_is_the_run_that_02_train_makes(workdir, sweep):
    """Same data order, seeds, steps and validation: every loss equal to the last bit."""
    fields = dict(pair.split("=") for pair in TINY.split()) | dict(
        depth=2, num_steps=4, eval_bytes=4000, evals=1
    )
    text = "method: grid\nparameters:\n  matrix_lr: {values: [3e-2]}\n  seed: {values: [7]}\n"
    text += "".join(f"  {name}: {{value: {value}}}\n" for name, value in fields.items())
    done = script("03_worker", workdir, **sweep(text) | dict(budget="cpu_demo"))
    assert done.returncode == 0, done.stdout + done.stderr
    plain = script(
        "02_train", workdir, **SMOKE["02_train"] | dict(overrides=TINY + " matrix_lr=0.03 seed=7")
    )
    assert plain.returncode == 0, plain.stdout + plain.stderr
    rows = [
        json.loads(line) for line in (workdir / "runs/smoke/metrics.jsonl").read_text().splitlines()
    ]
    [folder] = (workdir / "runs/smoke/sweeps").glob("mine-*")
    [end] = [
        e
        for path in (folder / "journal").glob("*.jsonl")
        for e in map(json.loads, path.read_text().splitlines())
        if e["e"] == "end"
    ]
    assert end["curve"] == [[r["step"], r["loss"]] for r in rows]
    assert end["value"] == rows[-1]["val_bpb"]

    # by its id alone; there is nothing left to train
    join = dict(run="smoke", join=folder.name)
    runs = [(ROOT / "03_worker.py", *words_of(flags)) for flags in (join, join | dict(count=-1))]
    again, shown = programs.run_scripts(*runs, cwd=workdir)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "0 trial(s) ended here" in again.stdout
    assert shown.returncode == 0 and "1 done" in shown.stdout


def test_what_to_read_may_stand_in_the_sweep_itself(workdir, sweep):
    texts = f"source: {{values: [{CORPUS!r}, stdlib]}}"
    text = f"method: grid\nparameters: {{depth: {{value: 2}}, {texts}}}"
    done = script("03_worker", workdir, **sweep(text, "texts") | dict(source="", count=-1))
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = (workdir / "runs/smoke/sweeps").glob("texts-*/sweep.json")
    said = json.loads(path.read_text())["sweep"]["parameters"]
    assert said["source"] == {"values": [CORPUS, "stdlib"]} and said["shards"] == {"value": 8}


# a sweep's text, other flags, and what the sentence says
WRONG = [
    ("method: grid", {}, "needs parameters"),
    ("method: [grid", {}, "is not YAML"),
    (
        "parameters: {depth: {value: 1}, matrix_lr: {min: 1e-3, max: 1e-1}}",
        dict(overrides="matrix_lr=0.1"),
        "varies",
    ),
    (
        "method: grid\nparameters: {depth: {values: [1, 2]}, head_dim: {value: 7}}",
        {},
        "none of 2 combinations .* even",
    ),
    (
        "method: grid\nparameters: {depth: {value: 1}}",
        dict(overrides="dept=1"),
        "config field 'dept'",
    ),
    (
        "method: grid\nparameters: {depth: {value: 1}}",
        dict(join="nowhere-123456"),
        "no sweep in",
    ),
    (
        "method: grid\nparameters: {depth: {value: 1}}",
        dict(sweep="nothing"),
        "ablate, isoflop, miniseries, search",
    ),
    (
        "method: grid\nparameters: {depth: {value: 1}}",
        dict(sweep="missing.yaml"),
        "cannot read the sweep missing.yaml",
    ),
    ("method: grid\nparameters: {depth: {value: 1}}", dict(population=0), "population=0"),
    (
        "method: grid\nparameters: {depth: {value: 1}}",
        dict(population=2, driver="wandb"),
        "population=2 needs driver=local",
    ),
]


@pytest.fixture(scope="module")
def refusals(workdir):
    """How 03 ends with each of these."""
    runs = []
    for i, (text, flags, _) in enumerate(WRONG):
        (workdir / f"wrong{i}.yaml").write_text(text)
        sweep = dict(run="smoke", source=CORPUS, budget="smoke", sweep=f"wrong{i}.yaml")
        runs.append((ROOT / "03_worker.py", *words_of(sweep | flags)))
    return programs.run_scripts(*runs, cwd=workdir, timeout=300)


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_what_is_wrong_is_said_before_anything_is_trained(refusals, case):
    done, (_, _, said) = refusals[case], WRONG[case]
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(f"Error: .*{said}", done.stderr) and "Traceback" not in done.stderr


def test_a_wandb_sweep_from_start_to_table_and_joined_from_elsewhere_by_its_id(
    workdir, sweep, tmp_path
):
    pytest.importorskip("wandb")
    server = StandIn()
    env = {
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": "a" * 40,
        "HOME": str(tmp_path),
        "WANDB_DIR": str(tmp_path),
    }
    text = (
        "method: grid\nparameters: {depth: {value: 2}, num_steps: {value: 4}, "
        "matrix_lr: {values: [0.02, 0.05]}, microbatch: {values: [3, 2]}}"
    )
    done = script(
        "03_worker",
        workdir,
        env,
        **sweep(text, "web"),
        driver="wandb",
        project="proj",
        store=tmp_path / "one",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        f"{server.url}/team/proj/sweeps/swp1" in done.stdout and "2 failed, 2 done" in done.stdout
    )
    assert [r["state"] for r in server.runs.values()] == ["failed", "finished"] * 2 and all(
        r["preempting"] for r in server.runs.values()
    )
    assert [len(r["history"]) for r in server.runs.values()] == [0, 2] * 2
    there = script(
        "03_worker",
        workdir,
        env,
        run="smoke",
        driver="wandb",
        join="team/proj/swp1",
        store=tmp_path / "two",
    )
    assert there.returncode == 0, there.stdout + there.stderr
    assert "0 trial(s) ended here" in there.stdout and "2 failed, 2 done" in there.stdout, (
        "everyone's trials, from the server"
    )
    server.shutdown()
