"""Steps match the reference's, accumulation equals one batch, resume is bitwise, and a broken loss
stops the run.
"""

import json
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from lib import train
from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.files import UserError
from lib.train import checkpoint, step
from tests.helpers import programs

TINY = Config(
    vocab_size=100,
    sequence_len=64,
    n_layer=2,
    n_embd=32,
    n_head=2,
    n_kv_head=1,
    head_dim=16,
    mlp_dim=64,
    microbatch=2,
    total_batch_size=256,
    num_steps=20,
    warmup_steps=4,
    loss_chunk=64,
)


def batches(seed=0, rows=4, start=0, structure=True):
    """Endless learnable rows: each token follows from the one before; a cursor counts them."""
    n = start
    while True:
        rng = np.random.default_rng((seed, n))
        x = (
            (rng.integers(0, 100, (rows, 1)) + 7 * np.arange(65)) % 100
            if structure
            else rng.integers(0, 100, (rows, 65))
        )
        n += 1
        yield x[:, :-1].astype(np.int32), x[:, 1:].astype(np.int32), {"n": n}


def run(config, batches, state=None, **kwargs):
    return list(
        train.steps(
            train.make_train_step(config),
            state or train.init_state(config),
            batches,
            config,
            **kwargs,
        )
    )


def test_it_learns_and_yields_every_step_in_order():
    steps = run(TINY, batches())
    assert [s.step for s in steps] == list(range(1, 21))
    assert steps[-1].metrics["loss"] < steps[0].metrics["loss"] - 0.3
    assert (
        all(s.state is None for s in steps[:-1])
        and int(steps[-1].state.step) == 20
        and steps[-1].cursor == {"n": 20}
    )
    assert set(steps[0].metrics) == {"loss", "grad_norm", "lr", "step_time", "tokens_per_s"}
    assert steps[0].metrics["lr"] == pytest.approx(0.25) and steps[-1].metrics["lr"] < 0.2


class Number:
    """A number of a step's that is there when the step was sent, or is not."""

    def __init__(self, value: float, is_ready: bool):
        self.value, self.ready = value, is_ready

    def is_ready(self):
        return self.ready

    def __float__(self):
        return self.value


@pytest.mark.parametrize(
    "is_ready, wanted",
    [
        (False, ["sent", "sent", 1, "sent", 2, 3, "sent", "sent", 4]),
        (True, ["sent", 1, "sent", 2, "sent", 3, "sent", 4, "sent"]),
    ],
)
def test_metrics_are_read_after_the_next_step_was_sent(is_ready, wanted):
    """But where a step is over when it was sent, at once: else the time of one were another's."""
    seconds, calls, state = 0.01, [], train.init_state(TINY)

    def step_fn(*_):
        calls.append("sent")
        if is_ready:
            time.sleep(seconds)
        return state, {name: Number(1.0, is_ready) for name in ("loss", "grad_norm")}

    for s in train.steps(step_fn, state, batches(), TINY, pause=lambda n: n == 3):
        calls.append(s.step)
        if is_ready:
            assert s.metrics["step_time"] >= seconds
    assert calls[:9] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_accumulation_equals_one_big_batch(optimizer):
    """Also when the ignored targets are spread unevenly over microbatches."""
    x, y, _ = next(batches(structure=False))
    y[0, 3:] = -1
    results = []
    for rows in (1, 2, 4):
        config = TINY.replace(microbatch=rows, optimizer=optimizer)
        state, metrics = train.make_train_step(config)(train.init_state(config), x, y)
        results.append((float(metrics["loss"]), float(metrics["grad_norm"]), state.opt_state.m))
    for loss, norm, momentum in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6) and norm == pytest.approx(
            results[0][1], rel=1e-5
        )
        for a, b in zip(jax.tree.leaves(momentum), jax.tree.leaves(results[0][2])):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("value_embeds", [True, False])
def test_layers_taken_apart_give_the_gradients_of_scanned_ones(value_embeds):
    """Summed over two microbatches, in the shapes of the parameters."""
    x, y, _ = next(batches(structure=False))
    results = []
    for scan in (True, False):
        config = TINY.replace(
            n_layer=4, window_pattern="SL", scan_layers=scan, value_embeds=value_embeds
        )
        params = step.init_state(config).params
        rows = x.reshape(2, 2, -1), y.reshape(2, 2, -1)
        results.append(jax.jit(step.summed_gradients, static_argnums=3)(params, *rows, config))
    (loss, count, grads), (wanted_loss, wanted_count, wanted) = results
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-6) and count == wanted_count
    assert jax.tree.structure(grads) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_one_compilation_serves_all_rates_and_steps():
    step._jitted_step.cache_clear()
    for lr in (0.01, 0.02):
        config = TINY.replace(matrix_lr=lr, num_steps=3 + int(lr * 100))
        run(config, batches())
    assert step._jitted_step.cache_info().misses == 1
    assert train.make_train_step(TINY)._cache_size() == 1


@pytest.mark.parametrize("poison", ["nan", "explosion"])
def test_a_broken_loss_stops_before_its_state_is_given_away(poison):
    real = train.make_train_step(TINY)

    def step_fn(state, x, y):
        state, metrics = real(state, x, y)
        bad = np.nan if poison == "nan" else 50.0
        return state, metrics | ({"loss": np.float32(bad)} if int(state.step) == 7 else {})

    seen = []
    with pytest.raises(UserError, match=r"step 7.*(lower learning rates)"):
        for s in train.steps(
            step_fn, train.init_state(TINY), batches(), TINY, pause=lambda n: True
        ):
            seen.append(s.step)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_one_odd_batch_is_no_explosion():
    real = train.make_train_step(TINY)

    def step_fn(state, x, y):
        state, metrics = real(state, x, y)
        return state, metrics | ({"loss": metrics["loss"] + 11} if int(state.step) == 12 else {})

    steps = list(train.steps(step_fn, train.init_state(TINY), batches(), TINY))
    assert len(steps) == TINY.num_steps and steps[11].metrics["loss"] > 12


# ---- whole processes: resume is bitwise, signals save --------------------------------------------


def start(folder, pause=0.0):
    return programs.start("train_small", folder, pause, stdout=subprocess.PIPE)


def printed(process):
    return [json.loads(line) for line in process.communicate(timeout=120)[0].splitlines()]


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    words = ["tea", "sea", "bee", "tree", "free", "see", "a", "the", "green"]
    for i in range(120):
        (tmp_path / f"{i}.txt").write_text(
            " ".join(rng.choice(words, rng.integers(3, 120))) + f" {i}.\n"
        )
    Tokenizer.train((p.read_text() for p in tmp_path.glob("*.txt")), 280).save(
        tmp_path / "tokenizer.json"
    )
    return tmp_path


@pytest.mark.slow
def test_sigterm_saves_the_step_it_was_in_and_a_fresh_process_goes_on_bit_for_bit(
    corpus, tmp_path_factory
):
    straight = printed(start(corpus))
    (corpus / "checkpoints").rename(tmp_path_factory.mktemp("old") / "checkpoints")

    process = start(corpus, pause=0.1)
    lines = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGTERM)
    lines += process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == 0
    [said] = [line for line in lines if "SIGTERM" in line]
    first = [json.loads(line) for line in lines if line.startswith("[")]
    saved = checkpoint.latest(corpus / "checkpoints")
    step = checkpoint.read_meta(saved)["step"]
    assert 3 <= step < 20 and first[-1][0] == step

    second = printed(start(corpus))
    assert [row[0] for row in first[:-1] + second[:-1]] == list(range(1, 21))
    assert first[:-1] + second[:-1] == straight[:-1], "the losses"
    assert second[-1] == straight[-1], "cursor, parameters, optimizer"
