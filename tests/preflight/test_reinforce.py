"""What a step of reinforcement needs: more rows, more memory; what is written and what is learnt
from must take the time that their traffic and FLOPs say.
"""

import dataclasses

import pytest

from lib.config import Config
from lib.params import count_params
from lib.preflight.reinforce import Rounds, cache_bytes, group_table, needs, needs_text

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


def test_what_does_not_fit_is_said():
    text = needs_text(asked(), ROUNDS)
    assert "fits        yes" in text and "rollout" in text
    table = group_table("v6e-1", (12, 32), ROUNDS)
    assert len(table.splitlines()) == 4 and "~~" in table.splitlines()[-1]
    assert "~~" not in table.splitlines()[2]
