"""Reinforcement in processes of its own: killed at random moments, on several devices and hosts."""

import json
import random
import re
import socket
import subprocess
import time

import numpy as np
import pytest

from tests.helpers import programs
from tests.parallel.test_sharding import LAYOUTS

pytestmark = pytest.mark.slow
STEPS = 5


def start(devices: int = 1, process: int = 0, **asked) -> subprocess.Popen:
    """tests/programs/reinforce.py, begun."""
    return programs.start(
        "reinforce",
        json.dumps(dict(steps=STEPS) | asked),
        process,
        devices=devices,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def is_step(line: str) -> bool:
    """Whether a line is one of ours; the network library's begin with a word in brackets."""
    return re.match(r"\[\d", line) is not None


def result(job: subprocess.Popen):
    """(lines of steps, what it says at its end)."""
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0, err[-2000:]
    lines, _, told = out.partition("RESULT")
    return [json.loads(line) for line in lines.splitlines() if is_step(line)], told


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbs."""
    lines, told = result(start(folder=str(tmp_path_factory.mktemp("rl") / "whole")))
    return lines, json.loads(told)


def test_killed_at_random_moments_it_goes_on_bit_for_bit(whole, tmp_path):
    lines, told = whole
    folder = str(tmp_path / "killed")
    rng = random.Random(time.time_ns())
    seen = {}
    for _ in range(3):
        job = start(folder=folder)
        # somewhere between a step and the one after the next
        for _ in range(rng.choice([1, 1, 2])):
            line = job.stdout.readline()
            if is_step(line):
                step, *numbers = json.loads(line)
                assert seen.setdefault(step, numbers) == numbers
        time.sleep(rng.random() / 2)
        job.kill()
        job.communicate()

    rest, end = result(start(folder=folder))
    assert json.loads(end)["digest"] == told["digest"]
    seen |= {step: numbers for step, *numbers in rest}
    assert all(seen[step] == numbers for step, *numbers in lines if step in seen)


# relative to all moments: sums of other order in float32
TOLERANCE = 1e-3


def test_every_strategy_takes_the_step_of_one_device():
    """By its moments, which are the gradients of a first step. Its weights would say less: AdamW's
    first step is a gradient's sign, and that of one near 0 is a coin.
    """
    _, told = result(start(8, layouts=LAYOUTS))
    single, *many = np.array(json.loads(told))
    far = np.linalg.norm(single)
    assert far > 0
    for layout, moments in zip(LAYOUTS, many, strict=True):
        assert np.linalg.norm(moments - single) < TOLERANCE * far, layout


def test_two_processes_learn_what_one_learns(whole, tmp_path):
    lines, told = whole
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        hosts = [f"127.0.0.1:{s.getsockname()[1]}", 2]
    jobs = [start(1, process, folder=str(tmp_path / "two"), hosts=hosts) for process in range(2)]
    (two, end), _ = [result(job) for job in jobs]
    # each asked half of the questions, by the same seeds
    assert [step for step, *_ in two] == [step for step, *_ in lines]
    np.testing.assert_allclose(two[0], lines[0], rtol=1e-4)
    params, single = np.array(json.loads(end)["params"]), np.array(told["params"])
    assert np.linalg.norm(params - single) < 0.01 * np.linalg.norm(single)
