"""The cache that decoding reads: keys and values of each layer in rings as long as the layer's
window.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lib.config import Config

RING = 16  # slots of a ring come in multiples of this: whole vector registers
UNSEEN = (
    -1e30
)  # the score of a key that can't be seen; finite, so that a padding query makes no NaN


class Cache(NamedTuple):
    """What a batch of rows has read so far.

    k, v: per layer (B K, S, H). Position p of a row lies in slot p mod S of its ring.
    length: (B,) tokens that each row has read.
    last: (B,) the newest of them, -1 where there is none.
    """

    k: list
    v: list
    length: jax.Array
    last: jax.Array


def init_cache(config: Config, batch: int, length: int, spare: int = 0) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens.

    A layer's S is its window and a little more; `length` where that is less. A row may be cut back
    by up to `spare` tokens (always, while it holds no more than S) by setting its `length` and
    `last`.
    """

    def empty_rings():
        rings = []
        for window in config.windows:
            slots = min(length, -(-(window + 1 + spare) // RING) * RING)
            shape = batch * config.n_kv_head, slots, config.head_dim
            rings.append(jnp.zeros(shape, config.dtype))
        return rings

    return Cache(
        k=empty_rings(),
        v=empty_rings(),
        length=jnp.zeros(batch, jnp.int32),
        last=jnp.full(batch, -1, jnp.int32),
    )


def pick_rows(cache: Cache, rows_b) -> Cache:
    """The given rows of a cache, as one of b rows; numbers beyond the last row give any row."""
    B = len(cache.length)
    rows_b = jnp.minimum(rows_b, B - 1)

    def pick(a):
        # a ring leads with K entries for each row
        return a.reshape(B, -1, *a.shape[1:])[rows_b].reshape(-1, *a.shape[1:])

    return jax.tree.map(pick, cache)


def put_rows(cache: Cache, rows_b, part: Cache) -> Cache:
    """The cache with the given rows replaced by those of `part`; numbers beyond the last row are
    ignored.
    """
    B, b = len(cache.length), len(rows_b)

    def put(a, new):
        by_row, new = a.reshape(B, -1, *a.shape[1:]), new.reshape(b, -1, *a.shape[1:])
        return by_row.at[rows_b].set(new, mode="drop").reshape(a.shape)

    return jax.tree.map(put, cache, part)


def advance(cache: Cache, k: list, v: list, tokens_BT, real_BT) -> Cache:
    """The cache after tokens_BT (where real_BT; padding is behind) whose keys and values are in the
    new rings.
    """
    new_B = real_BT.sum(axis=1, dtype=cache.length.dtype)
    return Cache(k, v, cache.length + new_B, newest_token(tokens_BT, new_B, cache.last))


def newest_token(tokens_BT, count_B, otherwise_B):
    """The last of each row's first `count` tokens; `otherwise` where that is none."""
    place_B1 = jnp.maximum(count_B - 1, 0)[:, None]
    newest_B = jnp.take_along_axis(tokens_BT, place_B1, axis=1)[:, 0]
    return jnp.where(count_B > 0, newest_B, otherwise_B)


# ---- attention -----------------------------------------------------------------------------------


def cached_attention(k_ring, v_ring, position_BT, length_B, window: int):
    """What a block attends with while decoding: attend(q, k, v) -> (o, (k_ring, v_ring)) with the
    new ones written.

    position_BT: of the queries, negative for padding. length_B: tokens in the rings before.
    """

    def attend(q_BTNH, k_BTKH, v_BTKH):
        slots = k_ring.shape[1]
        new_k = write_ring(k_ring, k_BTKH, position_BT, length_B)
        new_v = write_ring(v_ring, v_BTKH, position_BT, length_B)
        if q_BTNH.shape[1] == 1:
            # what the one new token overwrote is outside its window
            keys, values = [new_k], [new_v]
            held_BS = held_positions(length_B + 1, slots)
        else:
            # the last of many may overwrite what the first must see:
            # look at the ring as it was, and at the new ones
            keys, values = [k_ring, as_ring(k_BTKH, k_ring)], [v_ring, as_ring(v_BTKH, v_ring)]
            held_BS = jnp.concatenate([held_positions(length_B, slots), position_BT], axis=1)
        o_BTNH = attend_held(q_BTNH, keys, values, position_BT, held_BS, window)
        return o_BTNH, (new_k, new_v)

    return attend


def as_ring(new_BTKH, ring_XSH):
    """New keys or values in the layout and dtype of a ring: (B K, T, H)."""
    B, T, K, H = new_BTKH.shape
    return new_BTKH.astype(ring_XSH.dtype).swapaxes(1, 2).reshape(B * K, T, H)


def write_ring(ring_XSH, new_BTKH, position_BT, length_B):
    """Put new keys or values at their positions (negative: nowhere) into a ring that holds `length`
    tokens.
    """
    B, T, K, H = new_BTKH.shape
    S = ring_XSH.shape[1]
    new_BTKH = new_BTKH.astype(ring_XSH.dtype)
    if B == T == 1:
        # padding spoils only the slot whose turn it is, and nobody needs that any more
        slot = length_B[0] % S
        return jax.lax.dynamic_update_slice(ring_XSH, new_BTKH[0].swapaxes(0, 1), (0, slot, 0))
    # of more than S new ones the last S stay; slot S is beyond the ring, and dropped
    last_B1 = jnp.max(position_BT, axis=1, keepdims=True)
    stays_BT = (position_BT >= 0) & (position_BT > last_B1 - S)
    slot_BT = jnp.where(stays_BT, position_BT % S, S)
    row_B1 = jnp.arange(B)[:, None]
    ring_BKSH = ring_XSH.reshape(B, K, S, H).at[row_B1, :, slot_BT].set(new_BTKH, mode="drop")
    return ring_BKSH.reshape(ring_XSH.shape)


def held_positions(length_B, S: int):
    """(B, S): which position each slot of a ring holds once a row has `length` tokens; negative
    where it is empty.
    """
    last_B1 = length_B[:, None] - 1
    return last_B1 - (last_B1 - jnp.arange(S)) % S


def attend_held(q_BTNH, keys, values, position_BT, held_BS, window: int):
    """Attention of queries over keys at positions held_BS (negative: none), `window` back at most.

    keys and values are lists of (B K, S, H), one behind the other in held_BS; they are not joined,
    to save copying a cache.
    """
    B, T, N, H = q_BTNH.shape
    K = keys[0].shape[0] // B
    # M: the G query heads of a group, then T
    q_XMH = q_BTNH.reshape(B, T, K, -1, H).transpose(0, 2, 3, 1, 4).reshape(B * K, -1, H)

    # scores, the parts joined
    product = functools.partial(
        jnp.einsum, "XMH,XSH->XMS", q_XMH, preferred_element_type=jnp.float32
    )
    s_XMS = jnp.concatenate([product(k_XSH) for k_XSH in keys], axis=-1)
    s_BKGTS = s_XMS.reshape(B, K, N // K, T, -1) / math.sqrt(H)

    # probabilities over what each query may see
    distance_BTS = position_BT[:, :, None] - held_BS[:, None]
    visible_BTS = (distance_BTS >= 0) & (distance_BTS <= window) & (held_BS >= 0)[:, None]
    p_BKGTS = jax.nn.softmax(jnp.where(visible_BTS[:, None, None], s_BKGTS, UNSEEN), axis=-1)

    # values, weighed part by part
    p_XMS = p_BKGTS.reshape(B * K, N // K * T, -1).astype(values[0].dtype)
    parts = jnp.split(p_XMS, [values[0].shape[1]], axis=-1)
    weighed = [jnp.einsum("XMS,XSH->XMH", p, v_XSH) for p, v_XSH in zip(parts, values)]
    o_XMH = functools.reduce(jnp.add, weighed)
    return o_XMH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
