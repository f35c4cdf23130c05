"""What runs on the device: prompts into the cache, and many tokens in one dispatch.

B counts the rows of the cache and b those that are picked out of it, C the tokens of a dispatch.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lib import model
from lib.config import Config
from lib.generate.sampling import TOP, sample, step_rows, top_alternatives
from lib.model.cache import Cache, pick_rows, put_rows


class Chunk(NamedTuple):
    """What one dispatch wrote: ids (B, C), -1 where a row wrote nothing, logprobs, alternatives.

    drafted, accepted: how many tokens speculative decoding tried, and how many it kept.
    """

    id: Any
    logprob: Any
    top_id: Any  # (B, C, TOP)
    top_logprob: Any
    drafted: Any
    accepted: Any


def empty_chunk(B: int, C: int) -> Chunk:
    """A Chunk of at most C tokens in which nothing is written yet."""
    return Chunk(
        id=jnp.full((B, C), -1, jnp.int32),
        logprob=jnp.zeros((B, C)),
        top_id=jnp.zeros((B, C, TOP), jnp.int32),
        top_logprob=jnp.zeros((B, C, TOP)),
        drafted=jnp.int32(0),
        accepted=jnp.int32(0),
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_cache(config: Config, slots: int, length: int, spare: int) -> Cache:
    """`model.init_cache` as one program: one for each kind of array takes longer to start."""
    return model.init_cache(config, slots, length, spare)


@partial(jax.jit, donate_argnums=0)
def set_rows(rows, slots_b, new):
    """Overwrite the rows `slots_b` (those outside are ignored) with the entries of `new`."""
    changed = dict(rows)
    for name, value in new.items():
        changed[name] = rows[name].at[slots_b].set(value, mode="drop")
    return changed


@partial(jax.jit, donate_argnums=0)
def repeat_rows(cache: Cache, source_B) -> Cache:
    """A cache whose row i is a copy of row source_B[i]."""
    return pick_rows(cache, source_B)


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(params, config: Config, cache: Cache, rows_b, tokens_bT, fresh) -> Cache:
    """Feed tokens_bT (-1 behind the end of a row) to some rows, emptied before if `fresh`."""
    part = pick_rows(cache, rows_b)
    # a ring is emptied by forgetting how much is in it
    part = part._replace(
        length=jnp.where(fresh, 0, part.length),
        last=jnp.where(fresh, -1, part.last),
    )
    _, part = model.hidden(params, config, tokens_bT, part)
    return put_rows(cache, rows_b, part)


@partial(jax.jit, static_argnames=("config", "pause"), donate_argnames=("cache", "rows"))
def decode(params, config: Config, cache: Cache, rows, forced_BC, count, *, pause: int):
    """Up to `count` tokens for every row that is alive; over early when no row can go on.

    rows: their state, as `sampling.empty_rows` has it. forced_BC: ids that a row must take at step
    i instead of its own choice, or -1. A row that writes the token `pause` waits for the next call.
    Returns (cache, rows, Chunk).
    """
    B, C = forced_BC.shape

    def go_on(carry):
        i, _, rows, waiting_B, _ = carry
        active_B = rows["alive"] & ~waiting_B
        return (i < count) & jnp.any(active_B)

    def one(carry):
        i, cache, rows, waiting_B, chunk = carry
        active_B = rows["alive"] & ~waiting_B

        # every row's newest token goes in; rows that rest are fed padding
        fed_B1 = jnp.where(active_B, rows["token"], -1)[:, None]
        logits_BTV, cache = model.forward(params, config, fed_B1, cache)
        logits_BV = logits_BTV[:, 0]
        force_B = forced_BC[:, i]

        # the row's own choice, unless a tool's answer is due
        token_B = jnp.where(force_B >= 0, force_B, sample(logits_BV, rows))

        # its log-probability, and the alternatives if any row asks for them
        lse_B = jax.nn.logsumexp(logits_BV, axis=-1)
        picked_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)
        logprob_B = picked_B1[:, 0] - lse_B
        wanted = jnp.any(rows["top"] & active_B)
        top_id, top_logprob = top_alternatives(logits_BV, lse_B, wanted)

        # column i of what is handed out
        chunk = chunk._replace(
            id=chunk.id.at[:, i].set(jnp.where(active_B, token_B, -1)),
            logprob=chunk.logprob.at[:, i].set(logprob_B),
            top_id=chunk.top_id.at[:, i].set(top_id),
            top_logprob=chunk.top_logprob.at[:, i].set(top_logprob),
        )

        rows = step_rows(rows, token_B, active_B, force_B < 0)
        waiting_B |= active_B & (token_B == pause)
        return i + 1, cache, rows, waiting_B, chunk

    nobody_B = jnp.zeros(B, bool)
    carry = (0, cache, rows, nobody_B, empty_chunk(B, C))
    _, cache, rows, _, chunk = jax.lax.while_loop(go_on, one, carry)
    return cache, rows, chunk
