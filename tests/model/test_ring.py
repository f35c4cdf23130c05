"""A ring keeps what its row still sees, whatever the other rows of the batch do meanwhile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib import model
from lib.model import cache
from tests.model.test_model import TINY, tiny_params, tokens

CONFIG = TINY.replace(window_pattern="SL", n_layer=3)
forward = jax.jit(model.forward, static_argnums=1)


@pytest.mark.parametrize("width", [1, 16])
@pytest.mark.parametrize("length", [100, 200])
def test_a_row_that_waits_keeps_its_ring(width, length):
    """Row 1 gets nothing but padding for a while; below and beyond the ring's 144 slots."""
    x = tokens(2, 256)
    params = tiny_params(CONFIG)
    full, _ = forward(params, CONFIG, x)
    cache = model.init_cache(CONFIG, 2, 300)
    assert min(ring.shape[1] for ring in cache.k) == 144
    _, cache = forward(params, CONFIG, x[:, :length], cache)

    # only row 0 goes on
    waiting = np.full((2, width), -1, np.int32)
    for start in range(length, length + 2 * width, width):
        waiting[0] = x[0, start : start + width]
        logits, cache = forward(params, CONFIG, waiting, cache)
        np.testing.assert_allclose(logits[0], full[0, start : start + width], atol=3e-5)
    assert cache.length.tolist() == [length + 2 * width, length]

    # then row 1 does, as if nothing had been
    waiting[0] = -1
    for start in range(length, length + 2 * width, width):
        waiting[1] = x[1, start : start + width]
        logits, cache = forward(params, CONFIG, waiting, cache)
        np.testing.assert_allclose(logits[1], full[1, start : start + width], atol=3e-5)


def test_a_piece_longer_than_a_ring_leaves_its_newest_part():
    """Pieces of 1 to 256 tokens into rings of 144 and 272 slots: slot p mod S holds position p."""
    x = tokens(1, 256)
    params = tiny_params(CONFIG)
    whole = model.init_cache(CONFIG, 1, 300)
    _, whole = forward(params, CONFIG, x, whole)
    pieces = model.init_cache(CONFIG, 1, 300)
    start = 0
    for width in (150, 1, 16, 89):
        _, pieces = forward(params, CONFIG, x[:, start : start + width], pieces)
        start += width
    assert start == 256
    for a, b in zip(whole.k + whole.v, pieces.k + pieces.v):
        np.testing.assert_allclose(a, b, atol=3e-5)
    assert whole.last == pieces.last == x[0, -1]


def test_rows_are_picked_and_put_back_where_they_belong():
    from lib.model.cache import pick_rows, put_rows

    cache = jax.tree.map(
        lambda a: jnp.arange(a.size, dtype=jnp.float32).reshape(a.shape),
        model.init_cache(CONFIG, 3, 32),
    )
    part = pick_rows(cache, np.array([2, 0, 9]))
    assert part.length.tolist() == [2, 0, 2], "beyond the last row any row will do"
    np.testing.assert_array_equal(part.k[0][0], cache.k[0][2])
    changed = jax.tree.map(lambda a: a + 100, part)
    back = put_rows(cache, np.array([1, 9, 9]), changed)
    np.testing.assert_array_equal(back.v[1][1], cache.v[1][2] + 100)
    for row in (0, 2):
        np.testing.assert_array_equal(back.v[1][row], cache.v[1][row])
    assert back.length.tolist() == [0, 102, 2]


def test_new_keys_look_as_in_a_ring():
    """Two rows of five tokens with three heads each."""
    new_BTKH = np.random.default_rng(0).normal(size=(2, 5, 3, 4)).astype(np.float32)
    ring_XSH = jnp.zeros((2 * 3, 5, 4))
    positions_BT = jnp.broadcast_to(jnp.arange(5), (2, 5))
    written = cache.write_ring(ring_XSH, new_BTKH, positions_BT, jnp.zeros(2, jnp.int32))
    np.testing.assert_array_equal(cache.as_ring(new_BTKH, ring_XSH), written)
