"""The state of rows and the parts of a choice, by hand: small enough to be worked out on paper."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from lib.files import UserError
from lib.generate import Sampling, sampling
from lib.generate.decode import Chunk, empty_chunk

# setting: the least and the most that it may be, and a step beyond
BOUNDS = {
    "max_tokens": (1, 2**31 - 1, 1),
    "temperature": (0, 1e6, 0.1),
    "top_k": (0, 2**31 - 1, 1),
    "top_p": (0, 1, 0.001),
    "min_p": (0, 1, 0.001),
    "repetition_penalty": (1e-3, 1e3, 0.0005),
    "logprobs": (0, 20, 1),
    "seed": (-(2**63), 2**64 - 1, 1),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_settings_at_their_bounds_and_beyond(name):
    low, high, step = BOUNDS[name]
    for value in (low, high):
        assert getattr(Sampling(**{"max_tokens": 1, name: value}), name) == value
    for value in (low - step, high + step, float("nan")):
        with pytest.raises(UserError, match=f"{name} must be from"):
            Sampling(**{"max_tokens": 1, name: value})


def test_settings_that_nobody_gave_change_nothing():
    plain = Sampling(5)
    assert (plain.temperature, plain.top_k, plain.top_p, plain.min_p) == (1.0, 0, 1.0, 0.0)
    assert (plain.repetition_penalty, plain.seed, plain.logprobs) == (1.0, 0, 0)
    assert plain.stop == plain.stop_strings == () and plain.keep_stop is False


# ---- rows ----------------------------------------------------------------------------------------


def test_empty_rows_are_dead_and_neutral():
    rows = sampling.empty_rows(3, 7)
    neutral = {name: 0 for name in ("token", "alive", "made", "left", "seed", "temperature")}
    neutral |= {name: 0 for name in ("top_k", "min_p", "filtered", "top", "seen")}
    neutral |= {"top_p": 1, "penalty": 1, "stop": -1}
    assert set(rows) == set(neutral)
    for name, value in neutral.items():
        assert (np.asarray(rows[name]) == value).all(), name
        assert rows[name].shape == (3, *{"stop": (8,), "seen": (7,)}.get(name, ()))
    # a new row fits into them
    for name, value in sampling.new_row([1], Sampling(1), 7).items():
        assert (np.shape(value), np.asarray(value).dtype) == (
            rows[name].shape[1:],
            rows[name].dtype,
        )


def test_a_new_row_by_hand():
    settings = Sampling(
        9, 0.5, top_k=3, top_p=0.25, min_p=0.125, repetition_penalty=2, seed=5, stop=(6, 4)
    )
    row = sampling.new_row([1, 2, 2], settings, 7)
    assert row["seen"].tolist() == [False, True, True, False, False, False, False]
    assert row["stop"].tolist() == [4, 6, -1, -1, -1, -1, -1, -1]
    plain = {name: value.item() for name, value in row.items() if np.ndim(value) == 0}
    assert plain == dict(
        token=2, alive=True, made=0, left=9, seed=5, temperature=0.5, top_k=3, top_p=0.25
    ) | dict(min_p=0.125, penalty=2.0, filtered=True, top=False)


def test_what_a_row_may_ask_for_at_its_ends():
    row = lambda **given: sampling.new_row([1], Sampling(1, **given), 7)
    # whether anything is left out
    for given, cut in (
        ({}, False),
        ({"top_k": 1}, True),
        ({"top_k": 6}, True),
        ({"top_k": 7}, False),
        ({"top_p": 0.999}, True),
        ({"min_p": 0.001}, True),
        ({"min_p": 0.1, "temperature": 0}, False),
    ):
        assert row(**given)["filtered"] == cut, given
    assert row(top_k=2**31 - 1)["top_k"] == 7
    assert 0 < row(top_p=0)["top_p"] < 1e-8
    for seed, same in ((-1, 2**32 - 1), (2**32 + 3, 3), (2**32 - 1, 2**32 - 1)):
        assert row(seed=seed)["seed"] == same
    # the device knows the eight smallest; the host finds the others
    many = tuple(range(19, 9, -1))
    assert row(stop=many)["stop"].tolist() == list(range(10, 18))
    assert row(stop=many[:8])["stop"].tolist() == list(range(12, 20))


def test_rows_end_at_their_own_stops_only_and_when_nothing_is_left():
    row = sampling.new_row([0], Sampling(3, stop=(0, 5)), 7)
    rows = {name: jnp.stack([jnp.asarray(value)] * 5) for name, value in row.items()}
    rows["left"] = jnp.array([3, 3, 3, 1, 1])
    token = jnp.array([5, 0, 4, 4, 4])
    took = jnp.array([True, True, True, True, False])
    own = jnp.array([True, False, True, True, True])
    rows = sampling.step_rows(rows, token, took, own)
    assert rows["alive"].tolist() == [False, True, True, False, True]
    assert rows["left"].tolist() == [2, 2, 2, 0, 1] and rows["made"].tolist() == [1, 1, 1, 1, 0]
    assert rows["token"].tolist() == [5, 0, 4, 4, 0]
    assert [np.flatnonzero(seen).tolist() for seen in rows["seen"]] == [
        [0, 5],
        [0],
        [0, 4],
        [0, 4],
        [0],
    ]


# ---- the choice ----------------------------------------------------------------------------------


def test_penalties_by_hand():
    rows = dict(seen=jnp.array([[True, True, True, False]]), penalty=jnp.array([4.0]))
    logits = jnp.array([[2.0, -2.0, 0.0, 3.0]])
    assert sampling.penalized(logits, rows).tolist() == [[0.5, -8.0, 0.0, 3.0]]


def kept(p, **settings):
    """The tokens that the filters leave of these shares."""
    rows = dict(top_k=0, top_p=1.0, min_p=0.0) | settings
    rows = {name: jnp.array([value]) for name, value in rows.items()}
    logits = jnp.log(jnp.array([p], jnp.float32))
    left = sampling.filtered(logits, rows)
    assert set(np.asarray(left - logits)[0].tolist()) <= {0.0, -np.inf}
    return np.flatnonzero(np.isfinite(left[0])).tolist()


def test_filters_by_hand():
    half = [0.0625, 0.5, 0.125, 0.0625, 0.25]
    assert kept(half) == [0, 1, 2, 3, 4]
    assert kept(half, top_k=1) == [1] and kept(half, top_k=3) == [1, 2, 4]
    # those that tie with the last stay too
    assert kept(half, top_k=4) == kept(half, top_k=5) == [0, 1, 2, 3, 4]
    # just enough is enough, and one that is exactly so far below stays
    assert kept(half, top_p=0.5) == [1] and kept(half, top_p=0.5001) == [1, 4]
    assert kept(half, min_p=0.25) == [1, 2, 4] and kept(half, min_p=0.2501) == [1, 4]
    assert kept(half, min_p=1.0) == [1]
    # top_p is a share of what top_k has left: two thirds of 0.75 are the first alone
    assert kept(half, top_k=2, top_p=0.66) == [1] and kept(half, top_k=2, top_p=0.67) == [1, 4]
    assert kept([0.25] * 4, top_p=0.1) == [0, 1, 2, 3]


def has_so_many(count, keep_BV):
    return keep_BV.sum(-1) >= count


def test_the_largest_threshold_that_is_enough():
    p = jnp.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    for count, least in ((1, [0.5, 1.0]), (2, [0.25, 0.0]), (3, [0.25, 0.0])):
        enough = functools.partial(has_so_many, count)
        # a CPU takes what is below the least normal number for 0
        np.testing.assert_allclose(sampling._least(p, enough), least, atol=1e-37)


def test_of_equal_maxima_the_first():
    x = jnp.array([[1.0, 3.0, 3.0], [-5.0, -6.0, -5.0], [0.0, 0.0, 1.0], [-jnp.inf, 0.0, 0.0]])
    chosen = sampling.argmax(x)
    assert chosen.tolist() == [1, 0, 2, 1] and chosen.dtype == jnp.int32


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_alternatives_of_a_small_vocabulary_are_filled_up(shape):
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.25, 0.5, 0.25])), (*shape, 3))
    lse = jnp.full(shape, 1.0)
    ids, logprobs = sampling.top_alternatives(logits, lse, jnp.array(True))
    assert ids.shape == logprobs.shape == (*shape, 20)
    ids, logprobs = ids.reshape(-1, 20), logprobs.reshape(-1, 20)
    assert ids[:, :3].tolist() == [[1, 0, 2]] * len(ids) and not ids[:, 3:].any()
    np.testing.assert_allclose(logprobs[:, :3], np.log([[0.5, 0.25, 0.25]] * len(ids)) - 1)
    assert np.isneginf(logprobs[:, 3:]).all()
    ids, logprobs = sampling.top_alternatives(logits, lse, jnp.array(False))
    assert ids.shape == (*shape, 20) and not ids.any() and np.isneginf(logprobs).all()


def test_a_chunk_in_which_nothing_is_written():
    chunk = empty_chunk(2, 3)
    assert chunk.id.tolist() == [[-1] * 3] * 2 and chunk.logprob.tolist() == [[0.0] * 3] * 2
    assert chunk.top_id.shape == chunk.top_logprob.shape == (2, 3, 20)
    assert isinstance(chunk, Chunk) and (int(chunk.drafted), int(chunk.accepted)) == (0, 0)
