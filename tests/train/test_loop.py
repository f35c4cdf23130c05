"""The loop's guards and its clock, on steps that only pretend to train."""

import itertools
import time
import types

import numpy as np
import pytest

from lib.config import Config
from lib.files import UserError
from lib.train import LossWatch, lr_at, steps
from lib.train.step import TrainState

CONFIG = Config(num_steps=12, warmup_steps=5)


def pretend(losses, norms=None):
    """A step function that reports these losses and gradient norms, one after the other."""
    numbers = zip(losses, norms or itertools.repeat(1.0))

    def step_fn(state, inputs_BT, targets_BT):
        loss, norm = next(numbers)
        return state, dict(loss=np.float32(loss), grad_norm=np.float32(norm))

    return step_fn


def loop(step_fn, **settings):
    state = TrainState({}, {}, np.int32(0))
    batches = ((None, None, {"n": n}) for n in itertools.count(1))
    return steps(step_fn, state, batches, CONFIG, **settings)


def test_a_gradient_that_is_no_number_stops_though_the_loss_is_finite():
    norms = [1.0] * 6 + [np.nan] * 6
    seen = []
    with pytest.raises(UserError, match="diverged: loss 2.0, gradient norm nan at step 7"):
        for step in loop(pretend([2.0] * 12, norms), pause=lambda n: True):
            seen.append(step.step)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_spike_within_warm_up_does_not_stop():
    losses = [2.0] + [50.0] * 4 + [2.0] * 7
    high = [4.0, *losses[1:]]
    # after warm-up the running mean has to be down again, so it is watched with a wide limit
    assert len(list(loop(pretend(high), explode=100.0))) == 12

    watch = LossWatch(CONFIG)
    during = [watch.complaint(n, loss, 1.0) for n, loss in enumerate(losses[:5], 1)]
    assert during == [""] * 5 and watch.mean > watch.lowest + watch.explode
    assert "exploded: loss 50.00 at step 6" in watch.complaint(6, 50.0, 1.0)


def test_the_lowest_mean_is_what_an_explosion_is_measured_from():
    watch = LossWatch(CONFIG, explode=1.0)
    for n in range(1, 40):
        assert watch.complaint(n, 3.0, 1.0) == ""
    # 0.9 * 3 + 0.1 * 12.9 = 3.99 is within a nat of the lowest mean, one more such batch is not
    assert watch.complaint(40, 12.9, 1.0) == ""
    assert "come down to 3.00" in watch.complaint(41, 12.9, 1.0)
    # nor is one lucky batch a height to fall from
    watch = LossWatch(CONFIG, explode=1.0)
    losses = [3.0] * 10 + [0.5] + [3.0] * 10
    assert not any(watch.complaint(n, loss, 1.0) for n, loss in enumerate(losses, 1))


def test_a_steps_time_is_its_own(monkeypatch):
    ticks = map(float, itertools.count())
    monkeypatch.setattr("lib.train.loop.time", types.SimpleNamespace(perf_counter=ticks.__next__))
    assert [step.metrics["step_time"] for step in loop(pretend([2.0] * 12))] == [1.0] * 12


def test_what_happens_in_a_pause_is_no_step_time():
    times = []
    for step in loop(pretend([2.0] * 12), pause=lambda n: n == 4):
        times.append(step.metrics["step_time"])
        assert step.metrics["tokens_per_s"] == CONFIG.total_batch_size / times[-1]
        if step.state is not None and step.step == 4:
            time.sleep(0.5)
    assert len(times) == 12 and max(times) < 0.25


def test_the_rate_of_a_step():
    # warm-up over five steps; the last step stands one before the end of the way down
    assert [lr_at(CONFIG, n) for n in (1, 3, 5)] == [0.2, 0.6, 1.0]
    left = 1 / 8  # of 0.65 * 12 steps, rounded
    assert lr_at(CONFIG, 12) == pytest.approx(left + (1 - left) * CONFIG.final_lr_frac)


def test_a_loop_goes_on_from_the_step_of_its_state():
    batches = ((n, -n, {"n": n}) for n in itertools.count(1))
    state, given = TrainState({}, {}, np.int32(9)), []

    def step_fn(state, inputs, targets):
        given.append((inputs, targets))
        return state, dict(loss=2.0, grad_norm=1.0)

    seen = list(steps(step_fn, state, batches, CONFIG, pause=lambda n: n == 10))
    assert [step.step for step in seen] == [10, 11, 12] and given == [(1, -1), (2, -2), (3, -3)]
    assert [step.cursor for step in seen] == [{"n": 1}, None, {"n": 3}]
    assert [step.state is state for step in seen] == [True, False, True]
    assert [step.metrics["lr"] for step in seen] == [lr_at(CONFIG, n) for n in (10, 11, 12)]
    done = TrainState({}, {}, np.int32(12))
    assert list(steps(step_fn, done, batches, CONFIG)) == []


def test_a_watch_by_hand():
    watch = LossWatch(CONFIG)
    assert np.isnan(watch.mean) and watch.lowest == np.inf and watch.explode == 3.0
    assert watch.complaint(1, 4.0, 1.0) == "" and (watch.mean, watch.lowest) == (4.0, 4.0)
    assert watch.complaint(2, 2.0, 1.0) == "" and watch.mean == watch.lowest == pytest.approx(3.8)
    assert watch.complaint(3, 9.0, 1.0) == "" and watch.lowest == pytest.approx(3.8)
    for loss, norm in ((np.inf, 1.0), (np.nan, 1.0), (1.0, np.inf)):
        assert watch.complaint(4, loss, norm).startswith("training diverged")
    assert watch.mean == pytest.approx(0.9 * 3.8 + 0.9), "a number that is none moves nothing"
