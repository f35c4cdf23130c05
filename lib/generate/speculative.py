"""Draft several tokens ahead, check them all in one forward: the same text, fewer passes over the
weights.

Leviathan et al. (2023) keep the distribution by accepting and redrawing with matched probabilities.
Here the model's own choice at every place is drawn as ever, by the noise that belongs to that place
(lib.generate.sampling), and a draft is accepted if it equals that choice. So what is written is
what would have been written without drafts, token by token, at any temperature; and a draft model
that draws by the same noise is right about as often as the matched probabilities would allow.

A round has four steps: propose (a draft model, or the row's own text), verify (one forward over all
drafts), accept (the drafts that equal the model's choices) and commit (cache, rows and output).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lib import model
from lib.config import Config
from lib.generate.decode import Chunk, empty_chunk
from lib.generate.sampling import sample, step_rows, top_alternatives
from lib.model.cache import Cache, newest_token


class State(NamedTuple):
    """What a round changes.

    caches: of the model and, where there is one, of the draft model. rows: their sampling states;
    without a draft model rows["history"] holds the tokens of each row.
    """

    made_B: Any  # tokens written in this dispatch
    waiting_B: Any  # whether the row has written the pausing token
    caches: list[Cache]
    rows: dict
    chunk: Chunk


class Verified(NamedTuple):
    """What the model makes of the drafts: its choice at each place, if all before are right."""

    choice_BT: Any
    logits_BTV: Any
    cache: Cache


@partial(
    jax.jit,
    static_argnames=("configs", "pause", "speculate"),
    donate_argnames=("caches", "rows"),
)
def decode(
    params, configs: tuple[Config, ...], caches, rows, forced_BC, count, *, pause, speculate
):
    """What lib.generate.decode's `decode` does, with `speculate` tokens drafted per round.

    params, configs and caches are those of the model and, where there is one, of the draft model.
    Returns (caches, rows, Chunk).
    """
    B, C = forced_BC.shape
    # a round looks at the drafts and at the token behind them
    padded_BC = jnp.pad(forced_BC, ((0, 0), (0, speculate + 1)), constant_values=-1)
    steps = jnp.arange(speculate + 1)

    def active(state):
        return state.rows["alive"] & ~state.waiting_B & (state.made_B < count)

    def one_round(state: State) -> State:
        active_B = active(state)
        # what a tool's answer forces at the places of this round
        places_BT = state.made_B[:, None] + steps
        force_BT = jnp.take_along_axis(padded_BC, places_BT, axis=1)

        # drafts, the model's own choices, and how many of these stand
        draft_BG, draft_caches = propose(params, configs, state, active_B, force_BT)
        tokens_BT = jnp.concatenate([state.rows["token"][:, None], draft_BG], axis=1)
        verified = verify(params[0], configs[0], state, active_B, tokens_BT, force_BT)
        choice_BT = verified.choice_BT
        kept_B = accept(state, draft_BG, choice_BT, force_BT, pause, C - state.made_B)
        kept_B = kept_B * active_B

        # what was read in vain is forgotten
        caches = []
        for cache, before in zip([verified.cache, *draft_caches], state.caches):
            caches.append(cut_back(cache, before, tokens_BT, kept_B))

        newest_B = newest_token(choice_BT, kept_B, choice_BT[:, 0])
        paused_B = (kept_B > 0) & (newest_B == pause)
        return State(
            made_B=state.made_B + kept_B,
            waiting_B=state.waiting_B | paused_B,
            caches=caches,
            rows=commit_rows(state, choice_BT, force_BT, kept_B, newest_B),
            chunk=commit_chunk(state, verified, kept_B, active_B),
        )

    start = State(
        made_B=jnp.zeros(B, jnp.int32),
        waiting_B=jnp.zeros(B, bool),
        caches=list(caches),
        rows=rows,
        chunk=empty_chunk(B, C),
    )
    end = jax.lax.while_loop(lambda state: active(state).any(), one_round, start)
    return end.caches, end.rows, end.chunk


# ---- propose -------------------------------------------------------------------------------------


def propose(params, configs, state: State, active_B, force_BT):
    """(drafts (B, G), the draft model's caches with them in it); what a tool forces is taken."""
    # by the draft model, where there is one
    if len(configs) > 1:
        rows = state.rows | dict(alive=active_B)
        draft_BG, cache = _draft(params[1], configs[1], state.caches[1], rows, force_BT)
        return draft_BG, [cache]

    # else from the row's own text
    count = force_BT.shape[1] - 1
    length_B = state.caches[0].length
    draft_BG = look_up(state.rows["history"], length_B, state.rows["token"], count)
    force_BG = force_BT[:, :count]
    return jnp.where(force_BG >= 0, force_BG, draft_BG), []


def look_up(history_BL, length_B, token_B, count: int):
    """Drafts from a row's own text: what followed the last time its newest tokens stood there
    (prompt lookup; Saxena 2023).

    history_BL holds the row's tokens and length_B counts those before token_B, the newest. A match
    of the last three is preferred to one of two or one, then the latest. (B, count); nonsense where
    nothing matches, which costs nothing but being wrong.
    """
    B, L = history_BL.shape
    place = jnp.arange(L)

    def agrees(n):
        # whether the token n places before is the one that stands n before the newest
        newest_B1 = jnp.maximum(length_B[:, None] - n, 0)
        earlier_BL = jnp.roll(history_BL, n, axis=1)
        return earlier_BL == jnp.take_along_axis(history_BL, newest_B1, axis=1)

    # where the newest token stood before, and whether one or two before it agree too
    one = (history_BL == token_B[:, None]) & (place < length_B[:, None])
    two = one & agrees(1) & (place > 0)
    three = two & agrees(2) & (place > 1)

    # the longest match, and of those the latest
    matched = one + two.astype(jnp.int32) + three
    best_B = jnp.argmax(jnp.where(one, matched * L + place, 0), axis=1)

    # what followed there
    following_BG = best_B[:, None] + 1 + jnp.arange(count)
    following_BG = jnp.minimum(following_BG, L - 1)
    return jnp.take_along_axis(history_BL, following_BG, axis=1)


def _draft(params, config: Config, cache: Cache, rows, force_BT):
    """A draft model's tokens for every row, each drawn as the row would draw, and its cache."""
    drafts = []
    # once more than needed: should all be right, the cache must hold the last one too
    for force_B in force_BT.T:
        fed_B1 = jnp.where(rows["alive"], rows["token"], -1)[:, None]
        logits_BTV, cache = model.forward(params, config, fed_B1, cache)
        token_B = sample(logits_BTV[:, 0], rows)
        token_B = jnp.where(force_B >= 0, force_B, token_B)
        drafts.append(token_B)
        # no draft ends a row
        never = jnp.zeros_like(rows["alive"])
        rows = rows | dict(left=rows["left"] + 1)
        rows = step_rows(rows, token_B, rows["alive"], never)
    return jnp.stack(drafts[:-1], axis=1), cache


# ---- verify, accept ------------------------------------------------------------------------------


def verify(params, config: Config, state: State, active_B, tokens_BT, force_BT) -> Verified:
    """One forward over the newest token and the drafts, and what the row chooses at each place."""
    fed_BT = jnp.where(active_B[:, None], tokens_BT, -1)
    logits_BTV, cache = model.forward(params, config, fed_BT, state.caches[0])
    B, T, V = logits_BTV.shape

    # places are rows of a wider batch, each of which has made and seen the drafts before it
    wide = {}
    for name, state_B in state.rows.items():
        if name != "history":
            wide[name] = jnp.repeat(state_B, T, axis=0)
    is_token_BTV = jax.nn.one_hot(tokens_BT, V, dtype=jnp.int8)
    drafted_BTV = jnp.cumsum(is_token_BTV, axis=1) > 0
    made_BT = state.rows["made"][:, None] + jnp.arange(T)
    wide["made"] = made_BT.reshape(-1)
    wide["seen"] = wide["seen"] | drafted_BTV.reshape(-1, V)

    # the row's own choice at each place, unless a tool's answer is due
    choice_X = sample(logits_BTV.reshape(-1, V), wide)
    choice_BT = choice_X.reshape(B, T)
    choice_BT = jnp.where(force_BT >= 0, force_BT, choice_BT)
    return Verified(choice_BT, logits_BTV, cache)


def accept(state: State, draft_BG, choice_BT, force_BT, pause: int, room_B):
    """How many of the choices stand: those behind right drafts and the one after them, up to a stop
    or pause and within what is left.
    """
    # drafts up to the first wrong one
    G = draft_BG.shape[1]
    is_right_BG = draft_BG == choice_BT[:, :G]
    right_B = jnp.cumprod(is_right_BG, axis=1).sum(axis=1)

    # the first choice behind which the row writes nothing more
    is_stop_BT = (choice_BT[..., None] == state.rows["stop"][:, None]).any(-1)
    own_stop_BT = (force_BT < 0) & is_stop_BT
    ends_BT = own_stop_BT | (choice_BT == pause)
    first_end_B = jnp.where(ends_BT.any(1), jnp.argmax(ends_BT, axis=1), G)

    # the choice behind the last right draft is the model's own, so it stands too
    kept_B = jnp.minimum(right_B, first_end_B) + 1
    return jnp.minimum(kept_B, jnp.minimum(state.rows["left"], room_B))


# ---- commit --------------------------------------------------------------------------------------


def cut_back(cache: Cache, before: Cache, tokens_BT, kept_B) -> Cache:
    """A cache that has taken tokens_BT, with only the first `kept` of them left in it."""
    last_B = newest_token(tokens_BT, kept_B, before.last)
    return cache._replace(length=before.length + kept_B, last=last_B)


def commit_rows(state: State, choice_BT, force_BT, kept_B, newest_B) -> dict:
    """The rows after the choices that stand, as if they had been made one by one."""
    rows = state.rows
    B, T = choice_BT.shape
    steps = jnp.arange(T)
    kept_BT = steps < kept_B[:, None]

    # the text that drafts are looked up in
    if "history" in rows:
        # places beyond the history are dropped
        place_BT = state.caches[0].length[:, None] + 1 + steps
        place_BT = jnp.where(kept_BT, place_BT, rows["history"].shape[1])
        row_B1 = jnp.arange(B)[:, None]
        history = rows["history"].at[row_B1, place_BT].set(choice_BT, mode="drop")
        rows = rows | dict(history=history)

    # all but the newest here, the newest as ever
    took_B = kept_B > 0
    V = rows["seen"].shape[1]
    kept_BTV = jax.nn.one_hot(choice_BT, V, dtype=jnp.int8) * kept_BT[..., None]
    rows = rows | dict(
        made=rows["made"] + kept_B - took_B,
        left=rows["left"] - kept_B + took_B,
        seen=rows["seen"] | kept_BTV.any(1),
    )
    own_B = newest_token(force_BT, kept_B, force_BT[:, 0]) < 0
    return step_rows(rows, newest_B, took_B, own_B)


def commit_chunk(state: State, verified: Verified, kept_B, active_B) -> Chunk:
    """The output with the choices that stand behind what was written before."""
    chunk = state.chunk
    B, T = verified.choice_BT.shape
    C = chunk.id.shape[1]
    steps = jnp.arange(T)
    # columns beyond the chunk are dropped
    kept_BT = steps < kept_B[:, None]
    column_BT = jnp.where(kept_BT, state.made_B[:, None] + steps, C)
    row_B1 = jnp.arange(B)[:, None]

    def put(old, new):
        return old.at[row_B1, column_BT].set(new, mode="drop")

    # log-probabilities of the choices, and alternatives if any row asks for them
    logits_BTV = verified.logits_BTV
    choice_BT = verified.choice_BT
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    picked_BT1 = jnp.take_along_axis(logits_BTV, choice_BT[..., None], axis=-1)
    picked_BT = picked_BT1[..., 0]
    wanted = jnp.any(state.rows["top"] & active_B)
    top_id, top_logprob = top_alternatives(logits_BTV, lse_BT, wanted)

    # of what is kept all but the last were drafts
    return Chunk(
        id=put(chunk.id, choice_BT),
        logprob=put(chunk.logprob, picked_BT - lse_BT),
        top_id=put(chunk.top_id, top_id),
        top_logprob=put(chunk.top_logprob, top_logprob),
        drafted=chunk.drafted + (T - 1) * active_B.sum(),
        accepted=chunk.accepted + jnp.maximum(kept_B - 1, 0).sum(),
    )
