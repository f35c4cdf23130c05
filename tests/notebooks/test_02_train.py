"""02 on several devices and in several processes, and with CORE measured while it trains."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from lib.train.metrics import read_jsonl
from tests.helpers import ROOT, programs
from tests.helpers.golden import load
from tests.helpers.notebooks import (
    SMOKE,
    TINY,
    check_products,
    save_tokenizer,
    script,
    words_of,
)

pytestmark = pytest.mark.slow
SHARED = SMOKE["02_train"] | dict(
    num_steps=30,
    eval_every=30,
    sample_every=30,
    save_every=15,
    overrides=TINY.replace("total_batch_size=256 microbatch=4", "total_batch_size=1024"),
)


def start_02(workdir, devices=1, hosts=None, **settings):
    """02 as a script on virtual devices; hosts: (port, how many, which one)."""
    if hosts:
        settings |= dict(
            coordinator=f"127.0.0.1:{hosts[0]}",
            host_count=hosts[1],
            host_index=hosts[2],
            join_timeout=60,
        )
    return subprocess.Popen(
        [sys.executable, ROOT / "02_train.py", *words_of(SHARED | settings)],
        cwd=workdir,
        env=programs.environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*jobs, code=0):
    """What they printed and complained of, each having ended with `code`."""
    try:
        said = [job.communicate(timeout=240) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [code] * len(jobs), "\n".join(
        out[-2000:] + err[-2000:] for out, err in said
    )
    return [(re.sub(r"\[Gloo\].*\n", "", out), err) for out, err in said]


def start_two(workdir, second=None, **settings):
    """02 in two processes; `second` are settings of the second alone."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [
        start_02(workdir, hosts=(port, 2, i), **settings | own)
        for i, own in enumerate(({}, second or {}))
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder to work in, rows of metrics) of thirty steps on one device."""
    workdir = tmp_path_factory.mktemp("shared")
    save_tokenizer(workdir / "runs" / "alone")
    out = finish(start_02(workdir, run="alone"))[0][0]
    assert "devices     one" in out
    for run in ("eight", "shards", "two", "wrong"):
        (workdir / "runs" / run).mkdir()
        shutil.copy(workdir / "runs" / "alone" / "tokenizer.json", workdir / "runs" / run)
    return workdir, read_jsonl(workdir / "runs" / "alone" / "metrics.jsonl")


# settings, and what the sentence says
REFUSED = [
    (dict(mesh="data:8"), "mesh 'data:8' is not of the form data=2 fsdp=4"),
    (dict(mesh="pipe=8"), "unknown mesh axis 'pipe'"),
    (dict(strategy="fsdp", mesh="fsdp=4"), "needs 4 devices, and there are 8"),
    (
        dict(overrides=SHARED["overrides"] + " microbatch=4"),
        "microbatch=4 rows cannot be split over 8 devices",
    ),
    (
        dict(coordinator="127.0.0.1:1", host_count=2),
        "coordinator '127.0.0.1:1', process -1 of 2: give process 0's host:port, and an index",
    ),
    (
        dict(host_count=2, host_index=0),
        "process 0 of 2 does not know the others: give coordinator",
    ),
]


@pytest.fixture(scope="module")
def eight(alone):
    """How 02 on eight devices ends, ([by two strategies], [with each of REFUSED]); all in one
    process.
    """
    settings = [
        dict(run="eight"),
        dict(run="shards", strategy="fsdp", mesh="data=2 fsdp=4"),
        *(dict(run="wrong") | changes for changes, _ in REFUSED),
    ]
    runs = [(ROOT / "02_train.py", *words_of(SHARED | each)) for each in settings]
    ends = programs.run_scripts(*runs, devices=8, cwd=alone[0], timeout=480)
    return ends[:2], ends[2:]


def check_curve(run, alone, rtol=2e-3):
    """The same batches, their sums in another order: the rounding grows by the step."""
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in alone]
    np.testing.assert_allclose(
        [row["loss"] for row in rows], [row["loss"] for row in alone], rtol=rtol
    )
    np.testing.assert_allclose(
        [row["loss"] for row in rows[:4]], [row["loss"] for row in alone[:4]], rtol=5e-5
    )
    np.testing.assert_allclose(rows[-1]["val_bpb"], alone[-1]["val_bpb"], rtol=rtol)


def test_02_on_eight_devices_equals_one_and_goes_on_there(alone, eight):
    workdir, wanted = alone
    (zero, fsdp), _ = eight
    for done in (zero, fsdp):
        assert done.returncode == 0 and "FAIL" not in done.stdout, done.stdout + done.stderr
    assert "devices     zero: it fits" in zero.stdout
    assert "(1 x 16 rows, 2 a device)" in zero.stdout
    check_curve(workdir / "runs" / "eight", wanted)
    assert "devices     fsdp: asked for" in fsdp.stdout

    run = workdir / "runs" / "shards"
    check_curve(run, wanted)
    shutil.rmtree(run / "checkpoints" / "step_00000030")
    out = finish(start_02(workdir, run="shards"))[0][0]
    assert "at step 15 of 30" in out and "devices     one" in out
    check_curve(run, wanted)


def test_02_in_two_processes_stops_and_goes_on_as_one(alone):
    """One of them is told to stop:

    both do after the same step, and go on from there. 04 uses what they have trained.
    """
    workdir, wanted = alone
    run = workdir / "runs" / "two"
    jobs = start_two(workdir, run="two")
    while not (run / "metrics.jsonl").exists() or len(read_jsonl(run / "metrics.jsonl")) < 2:
        assert all(job.poll() is None for job in jobs), finish(*jobs)
        time.sleep(0.01)
    jobs[1].send_signal(signal.SIGTERM)
    (_, first), (out, second) = finish(*jobs, code=130)  # as after Ctrl-C
    stopped = [
        int(re.search(r"Error: stopped at step (\d+) and saved", err)[1]) for err in (first, second)
    ]
    assert (
        stopped[0] == stopped[1] < 30
        and (run / "checkpoints" / f"step_{stopped[0]:08d}").exists()
        and out == ""
    )

    (first, _), (out, _) = finish(*start_two(workdir, run="two"))
    assert f"at step {stopped[0]} of 30" in first and "FAIL" not in first and out == ""
    check_curve(run, wanted)
    assert {"opt_state.0-of-2.safetensors", "opt_state.1-of-2.safetensors"} < {
        p.name for p in (run / "checkpoints" / "step_00000030").iterdir()
    }
    assert json.loads((run / "results.json").read_text())["devices"] == 2

    tuned = script(
        ROOT / "04_eval_chat.py",
        *words_of(SMOKE["04_eval_chat"] | dict(run="two", mid="none", tasks="none")),
        cwd=workdir,
    )
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    check_products("02_train", run)
    assert (run / "sft").exists()


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_02_refuses_what_cannot_be_shared_out(eight, case):
    _, refusals = eight
    done, (_, said) = refusals[case], REFUSED[case]
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1


def test_a_process_with_other_settings_ends_all(alone):
    (_, first), (_, second) = finish(
        *start_two(alone[0], run="wrong", second=dict(num_steps=31)), code=2
    )
    for err in (first, second):
        assert "process 1 has other settings than process 0 (num_steps: 31, not 30)" in err


def test_core_is_measured_while_training_and_again_by_04(tmp_path):
    """With flags, in metrics.jsonl and in the record, alike; and a bundle that is not there stops a
    run before it computes.
    """
    files = load("core.json")["bundle_files"]
    # one of each kind
    shown = [
        task
        for task in yaml.safe_load(files["core.yaml"])["icl_tasks"]
        if task["num_fewshot"] == [0]
    ]
    for name, text in (files | {"core.yaml": yaml.safe_dump({"icl_tasks": shown})}).items():
        (tmp_path / "bundle" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bundle" / name).write_text(text)
    run = tmp_path / "runs" / "core"
    save_tokenizer(run)
    settings = SMOKE["02_train"] | dict(
        run="core", core_every=2, core_limit=4, core_bundle=tmp_path / "bundle"
    )
    lost = script(
        ROOT / "02_train.py",
        *words_of(settings | dict(core_bundle=tmp_path / "nowhere")),
        cwd=tmp_path,
    )
    assert (
        lost.returncode == 2
        and "no CORE bundle at" in lost.stderr
        and not (run / "metrics.jsonl").exists()
    )
    done = script(ROOT / "02_train.py", *words_of(settings), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_jsonl(run / "metrics.jsonl")
    assert [(row["step"], "core" in row, "val_bpb" in row, "samples" in row) for row in rows] == [
        # a first sample comes after the first step already
        (1, False, False, True),
        # a checkpoint is rated by a validation of its own step
        (2, True, True, False),
        (3, False, False, False),
        (4, True, True, True),
    ]

    settings = SMOKE["04_eval_chat"] | dict(
        run="core",
        mid="none",
        sft_mixture="none",
        tasks="none",
        core_bundle=tmp_path / "bundle",
        core_items=4,
    )
    done = script(ROOT / "04_eval_chat.py", *words_of(settings), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((run / "evals" / "base.json").read_text())
    assert record["core"]["score"] == pytest.approx(rows[-1]["core"]) and record["core"]["partial"]
    assert {f"core/{name}" for name in record["core"]["tasks"]} == set(record["tasks"]) and len(
        record["tasks"]
    ) == 3
    assert all(entry["contamination"]["n"] == entry["n"] == 4 for entry in record["tasks"].values())
    assert "CORE of a part" in (run / "report.md").read_text()
