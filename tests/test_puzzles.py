"""lib/puzzles.py: right solutions pass, wrong and unfinished ones are told, and nothing stops."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from lib.puzzles import PUZZLES, check


def merge(word, pair):
    pieces, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            pieces.append(word[i] + word[i + 1])
            i += 2
        else:
            pieces.append(word[i])
            i += 1
    return tuple(pieces)


def mask(t, s, window):
    return s <= t and (window is None or t - s <= window)


def bits(losses, sizes):
    nats = sum(loss for loss, size in zip(losses, sizes) if size)
    return nats / math.log(2) / sum(sizes)


SOLUTIONS = {"merge": merge, "mask": mask, "bits": bits}


def test_numbers_of_numpy_and_jax_are_numbers():
    def bits_of_jax(losses, sizes):
        return jnp.float32(bits(losses, sizes))

    def mask_of_numpy(t, s, window):
        return np.bool_(mask(t, s, window))

    assert check("bits", bits_of_jax) and check("mask", mask_of_numpy)
    assert not check("bits", lambda losses, sizes: jnp.zeros(2))
    assert not check("mask", lambda t, s, window: np.int64(mask(t, s, window)))


@pytest.mark.parametrize("name", PUZZLES)
def test_a_solution_is_right_and_a_stub_is_not(name, capsys):
    assert check(name, SOLUTIONS[name])
    assert not check(name, lambda *_: None)
    assert not check(name, lambda: None)
    said = capsys.readouterr().out
    assert "right: all" in said and "and should give" in said and "TypeError" in said


def test_a_pair_that_overlaps_itself_is_joined_from_the_left():
    wrong = lambda word, pair: merge(word[::-1], pair[::-1])[::-1]  # noqa: E731
    assert not check("merge", wrong)
