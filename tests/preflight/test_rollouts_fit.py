"""What a step of reinforcement needs: more rows, more memory; what is written and what is learnt
from must take the time that their traffic and FLOPs say.
"""

import dataclasses

import pytest

from lib.chips import tpu_slice
from lib.config import Config
from lib.params import count_params
from lib.preflight.compile import for_tpu
from lib.preflight.estimate import estimate
from lib.preflight.reinforce import (
    Rounds,
    _token_seconds,
    cache_bytes,
    group_table,
    needs,
    needs_text,
)

CONFIG = Config.from_depth(12, microbatch=4, remat="dots", compute_dtype="bfloat16")
ROUNDS = Rounds()


def asked(**changes):
    return needs(CONFIG, "v6e-1", dataclasses.replace(ROUNDS, **changes), compiling=False)


def test_more_answers_need_more_memory_and_time():
    few, many = asked(samples=8), asked(samples=32)
    assert few.fits and many.rollout_bytes > few.rollout_bytes and many.seconds > few.seconds
    # the learner reads a part of them at a time, but four times as many
    assert many.learner_bytes == few.learner_bytes
    assert many.learner == pytest.approx(4 * few.learner)
    assert sum(many.shares().values()) == pytest.approx(1)


def test_the_reference_and_caches_are_counted():
    step = asked()
    parameters = 4 * count_params(CONFIG)["total"]
    length = ROUNDS.prompt + ROUNDS.max_tokens
    caches = cache_bytes(CONFIG, ROUNDS.rows, length)
    assert step.rollout_bytes > 2 * parameters + caches
    assert step.learner_bytes > 2 * parameters
    # a token of every row reads the weights once: never faster than that
    weights = parameters / 2
    assert step.rollout > ROUNDS.max_tokens * 0.5 * weights / 1600e9


def test_a_step_by_hand():
    """Of the estimate of a training step on rows of prompt and answer, four at a time."""
    length = ROUNDS.prompt + ROUNDS.max_tokens
    config = CONFIG.replace(sequence_len=length, total_batch_size=4 * length)
    report = estimate(for_tpu(config), tpu_slice("v6e-1"))
    step = asked()
    # the learner holds the reference beside its own
    assert step.learner_bytes == report.peak + report.memory["parameters"]
    assert step.learner == pytest.approx(ROUNDS.tokens / report.tokens_per_s)
    assert step.reference == pytest.approx(step.learner / 3)
    # keys and values of twelve layers with six heads of 128, two bytes each
    assert cache_bytes(CONFIG, rows=1, length=1) == 12 * 2 * 6 * 128 * 2
    # with enough rows a token waits for its third of a training step's products
    chip = tpu_slice("v6e-1").chip
    took = _token_seconds(CONFIG, report, chip, rows=10**6, bytes_read=0)
    assert took == pytest.approx(1e6 * CONFIG.flops_per_token / 3 / chip.flops)


def test_what_does_not_fit_is_said():
    text = needs_text(asked(), ROUNDS)
    assert "fits        yes" in text and "rollout" in text
    table = group_table("v6e-1", (12, 32), ROUNDS)
    assert len(table.splitlines()) == 4 and "~~" in table.splitlines()[-1]
    assert "~~" not in table.splitlines()[2]
