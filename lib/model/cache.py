"""The cache that decoding reads: keys and values of each layer in rings as long as the layer's
window.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lib.config import Config
from lib.model import few_rows

# slots of a ring come in multiples of this: whole vector registers
RING = 16
# the score of a key that can't be seen; finite, so that a padding query makes no NaN
UNSEEN = -1e30


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
            # a query sees itself and its window; what may be cut back lies behind
            needed = window + 1 + spare
            slots = -(-needed // RING) * RING
            slots = min(length, slots)
            shape = (batch * config.n_kv_head, slots, config.head_dim)
            rings.append(jnp.zeros(shape, config.dtype))
        return rings

    return Cache(
        k=empty_rings(),
        v=empty_rings(),
        length=jnp.zeros(batch, jnp.int32),
        last=jnp.full(batch, -1, jnp.int32),
    )


# ---- rows of a cache -----------------------------------------------------------------------------


def pick_rows(cache: Cache, rows_b) -> Cache:
    """The given rows of a cache, as one of b rows; numbers beyond the last row give any row."""
    B = len(cache.length)
    rows_b = jnp.minimum(rows_b, B - 1)

    def pick(a):
        # a ring leads with K entries for each row
        rest = a.shape[1:]
        by_row = a.reshape(B, -1, *rest)
        return by_row[rows_b].reshape(-1, *rest)

    return jax.tree.map(pick, cache)


def put_rows(cache: Cache, rows_b, part: Cache) -> Cache:
    """The cache with the given rows replaced by those of `part`; numbers beyond the last row are
    ignored.
    """
    B = len(cache.length)
    b = len(rows_b)

    def put(a, new):
        # a ring leads with K entries for each row, as in pick_rows
        rest = a.shape[1:]
        by_row = a.reshape(B, -1, *rest)
        new_by_row = new.reshape(b, -1, *rest)
        by_row = by_row.at[rows_b].set(new_by_row, mode="drop")
        return by_row.reshape(a.shape)

    return jax.tree.map(put, cache, part)


def advance(cache: Cache, k: list, v: list, tokens_BT, real_BT) -> Cache:
    """The cache after tokens_BT (where real_BT; padding is behind) whose keys and values are in the
    new rings.
    """
    new_B = real_BT.sum(axis=1, dtype=cache.length.dtype)
    return Cache(
        k=k,
        v=v,
        length=cache.length + new_B,
        last=newest_token(tokens_BT, new_B, cache.last),
    )


def newest_token(tokens_BT, count_B, otherwise_B):
    """The last of each row's first `count` tokens; `otherwise` where that is none."""
    place_B1 = jnp.maximum(count_B - 1, 0)[:, None]
    newest_B1 = jnp.take_along_axis(tokens_BT, place_B1, axis=1)
    newest_B = newest_B1[:, 0]
    return jnp.where(count_B > 0, newest_B, otherwise_B)


# ---- attention -----------------------------------------------------------------------------------


def cached_attention(k_ring, v_ring, position_BT, length_B, window: int, for_few_rows=False):
    """What a block attends with while decoding: attend(q, k, v) -> (o, (k_ring, v_ring)) with the
    new ones written.

    position_BT: of the queries, negative for padding. length_B: tokens in the rings before.
    for_few_rows: whether `lib.model.few_rows` may multiply.
    """

    def attend(q_BTNH, k_BTKH, v_BTKH):
        S = k_ring.shape[1]
        new_k = write_ring(k_ring, k_BTKH, position_BT, length_B)
        new_v = write_ring(v_ring, v_BTKH, position_BT, length_B)

        if q_BTNH.shape[1] == 1:
            # what the one new token overwrote is outside its window
            keys = [new_k]
            values = [new_v]
            held_BS = held_positions(length_B + 1, S)
        else:
            # the last of many may overwrite what the first must see:
            # look at the ring as it was, and at the new ones
            keys = [k_ring, as_ring(k_BTKH, k_ring)]
            values = [v_ring, as_ring(v_BTKH, v_ring)]
            before_BS = held_positions(length_B, S)
            held_BS = jnp.concatenate([before_BS, position_BT], axis=1)

        o_BTNH = attend_held(q_BTNH, keys, values, position_BT, held_BS, window, for_few_rows)
        return o_BTNH, (new_k, new_v)

    return attend


def as_ring(new_BTKH, ring_XSH):
    """New keys or values in the layout and dtype of a ring: (B K, T, H)."""
    B, T, K, H = new_BTKH.shape
    new_BKTH = new_BTKH.astype(ring_XSH.dtype).swapaxes(1, 2)
    return new_BKTH.reshape(B * K, T, H)


def write_ring(ring_XSH, new_BTKH, position_BT, length_B):
    """Put new keys or values at their positions (negative: nowhere) into a ring that holds `length`
    tokens.
    """
    B, T, K, _ = new_BTKH.shape
    S = ring_XSH.shape[1]
    new_XTH = as_ring(new_BTKH, ring_XSH)

    # one token of one row: a slice, far cheaper than a scatter.
    # Padding spoils only the slot whose turn it is, and nobody needs that any more
    if B == T == 1:
        slot = length_B[0] % S
        return jax.lax.dynamic_update_slice(ring_XSH, new_XTH, (0, slot, 0))

    # of more than S new ones the last S stay; slot S is beyond the ring, and dropped
    last_B1 = jnp.max(position_BT, axis=1, keepdims=True)
    stays_BT = (position_BT >= 0) & (position_BT > last_B1 - S)
    slot_BT = jnp.where(stays_BT, position_BT % S, S)

    # each of the B K rings by itself: were a row's K written together, a TPU would turn the whole
    # cache so that they lie side by side, and back
    ring_X1 = jnp.arange(B * K)[:, None]
    slot_XT = jnp.repeat(slot_BT, K, axis=0)
    return ring_XSH.at[ring_X1, slot_XT].set(new_XTH, mode="drop")


def held_positions(length_B, S: int):
    """(B, S): which position each slot of a ring holds once a row has `length` tokens; negative
    where it is empty.
    """
    last_B1 = length_B[:, None] - 1
    age_BS = (last_B1 - jnp.arange(S)) % S
    return last_B1 - age_BS


def attend_held(q_BTNH, keys, values, position_BT, held_BS, window: int, for_few_rows=False):
    """Attention of queries over keys at positions held_BS (negative: none), `window` back at most.

    keys and values are lists of (B K, S, H), one behind the other in held_BS; they are not joined,
    to save copying a cache.
    """
    B, T, N, H = q_BTNH.shape
    K = keys[0].shape[0] // B
    G = N // K

    # the queries in a ring's layout; M: the G query heads of a group, then T
    q_BTKGH = q_BTNH.reshape(B, T, K, -1, H)
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    q_XMH = q_BKGTH.reshape(B * K, -1, H)

    # scores, the parts joined
    parts = [_scores(q_XMH, k_XSH, for_few_rows) for k_XSH in keys]
    s_XMS = jnp.concatenate(parts, axis=-1)
    s_BKGTS = s_XMS.reshape(B, K, G, T, -1) / math.sqrt(H)

    # probabilities over what each query may see
    distance_BTS = position_BT[:, :, None] - held_BS[:, None]
    in_window_BTS = (distance_BTS >= 0) & (distance_BTS <= window)
    visible_BTS = in_window_BTS & (held_BS >= 0)[:, None]
    s_BKGTS = jnp.where(visible_BTS[:, None, None], s_BKGTS, UNSEEN)
    p_BKGTS = jax.nn.softmax(s_BKGTS, axis=-1)

    # values, weighed part by part and added up
    p_XMS = p_BKGTS.reshape(B * K, G * T, -1).astype(values[0].dtype)
    parts = jnp.split(p_XMS, [values[0].shape[1]], axis=-1)
    weighed = []
    for p, v_XSH in zip(parts, values):
        weighed.append(_weighed(p, v_XSH, for_few_rows))
    o_XMH = weighed[0]
    for more in weighed[1:]:
        o_XMH = jnp.add(o_XMH, more)

    # back to the layout of the queries
    o_BKGTH = o_XMH.reshape(B, K, G, T, H)
    o_BTKGH = o_BKGTH.transpose(0, 3, 1, 2, 4)
    return o_BTKGH.reshape(B, T, N, H)


def _scores(q_XMH, k_XSH, for_few_rows: bool):
    """Products of queries and keys, in float32."""
    if for_few_rows and _are_few(q_XMH, k_XSH):
        return few_rows.products(q_XMH, k_XSH)
    return jnp.einsum("XMH,XSH->XMS", q_XMH, k_XSH, preferred_element_type=jnp.float32)


def _weighed(p_XMS, v_XSH, for_few_rows: bool):
    """Values weighed by probabilities."""
    if for_few_rows and _are_few(p_XMS, v_XSH):
        return few_rows.products_by_input(p_XMS, v_XSH)
    return jnp.einsum("XMS,XSH->XMH", p_XMS, v_XSH)


def _are_few(x_XMI, ring_XSH) -> bool:
    """Whether these are for `lib.model.few_rows`: few rows, and a ring in float32."""
    return x_XMI.shape[1] <= few_rows.MOST_ROWS and ring_XSH.dtype == jnp.float32
