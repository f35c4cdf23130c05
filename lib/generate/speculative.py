"""Guess several tokens ahead, check them all in one forward: the same text, fewer passes over the
weights.

Leviathan et al. (2023) keep the distribution by accepting and redrawing with matched probabilities.
Here the model's own choice at every place is drawn as ever, by the noise that belongs to that place
(lib.sampling), and a guess counts as right if it equals that choice. So what is written is what
would have been written without guessing, token by token, at any temperature; and a draft model that
draws by the same noise is right about as often as the matched probabilities would allow.
"""

from functools import partial

import jax
import jax.numpy as jnp

from lib import model
from lib.config import Config
from lib.generate.sampling import TOP, sample, step_rows, top_alternatives
from lib.model.cache import newest_token


def look_up(history_BL, length_B, token_B, count: int):
    """Guesses from a row's own text: what followed the last time its newest tokens stood there
    (prompt lookup; Saxena 2023).

    history_BL holds the row's tokens and length_B counts those before token_B, the newest. A match
    of the last three is preferred to one of two or one, then the latest. (B, count); nonsense where
    nothing matches, which costs nothing but being wrong.
    """
    B, L = history_BL.shape
    at = jnp.arange(L)
    back = lambda n: jnp.take_along_axis(history_BL, jnp.maximum(length_B[:, None] - n, 0), axis=1)
    one = (history_BL == token_B[:, None]) & (at < length_B[:, None])
    two = one & (jnp.roll(history_BL, 1, axis=1) == back(1)) & (at > 0)
    three = two & (jnp.roll(history_BL, 2, axis=1) == back(2)) & (at > 1)
    best_B = jnp.argmax(jnp.where(one, (one + two.astype(jnp.int32) + three) * L + at, 0), axis=1)
    return jnp.take_along_axis(
        history_BL, jnp.minimum(best_B[:, None] + 1 + jnp.arange(count), L - 1), axis=1
    )


def _draft(params, config: Config, cache, rows, force_BT):
    """A draft model's guesses for every row, each drawn as the row would draw, and its cache with
    all of them in it.
    """
    guesses = []
    # once more than needed: should all be right, the cache must hold the last one too
    for force_B in force_BT.T:
        logits_BTV, cache = model.forward(
            params, config, jnp.where(rows["alive"], rows["token"], -1)[:, None], cache
        )
        guesses.append(jnp.where(force_B >= 0, force_B, sample(logits_BTV[:, 0], rows)))
        rows = step_rows(
            rows | dict(left=rows["left"] + 1),
            guesses[-1],
            rows["alive"],
            jnp.zeros_like(rows["alive"]),
        )
    return jnp.stack(guesses[:-1], axis=1), cache


def _cut_back(cache, before, tokens_BT, kept_B):
    """A cache that has taken tokens_BT, with only the first `kept` of them left in it."""
    last_B = newest_token(tokens_BT, kept_B, before.last)
    return cache._replace(length=before.length + kept_B, last=last_B)


@partial(
    jax.jit, static_argnames=("configs", "pause", "speculate"), donate_argnames=("caches", "rows")
)
def decode(
    params,
    configs: tuple[Config, ...],
    caches,
    rows,
    forced_BC,
    count,
    *,
    pause: int,
    speculate: int,
):
    """What lib.generate.engine's decoding loop does, with `speculate` tokens drafted per round: up
    to `count` tokens for every row alive.

    params, configs and caches are those of the model and, where there is one, of the draft model;
    without it rows["history"] holds the tokens of each row and guesses come from there. Returns
    (caches, rows, out); out also counts tokens "drafted" and "accepted".
    """
    B, C = forced_BC.shape
    G = speculate
    steps = jnp.arange(G + 1)
    row = jnp.arange(B)[:, None]
    out = dict(
        id=jnp.full((B, C), -1, jnp.int32),
        logprob=jnp.zeros((B, C)),
        top_id=jnp.zeros((B, C, TOP), jnp.int32),
        top_logprob=jnp.zeros((B, C, TOP)),
        drafted=jnp.int32(0),
        accepted=jnp.int32(0),
    )

    def active(rows, made_B, waiting_B):
        return rows["alive"] & ~waiting_B & (made_B < count)

    def one(carry):
        made_B, caches, rows, waiting_B, out = carry
        active_B = active(rows, made_B, waiting_B)
        force_BT = jnp.take_along_axis(
            jnp.pad(forced_BC, ((0, 0), (0, G + 1)), constant_values=-1),
            made_B[:, None] + steps,
            axis=1,
        )
        if len(configs) == 1:
            guess_BG, drafted = look_up(rows["history"], caches[0].length, rows["token"], G), []
            guess_BG = jnp.where(force_BT[:, :G] >= 0, force_BT[:, :G], guess_BG)
        else:
            guess_BG, cache = _draft(
                params[1], configs[1], caches[1], rows | dict(alive=active_B), force_BT
            )
            drafted = [cache]
        tokens_BT = jnp.concatenate([rows["token"][:, None], guess_BG], axis=1)
        logits_BTV, checked = model.forward(
            params[0], configs[0], jnp.where(active_B[:, None], tokens_BT, -1), caches[0]
        )
        # what the row chooses at each place if all guesses before it are right: places are rows of
        # a wider batch
        V = logits_BTV.shape[-1]
        wide = {name: jnp.repeat(a, G + 1, axis=0) for name, a in rows.items() if name != "history"}
        guessed_BTV = jnp.cumsum(jax.nn.one_hot(tokens_BT, V, dtype=jnp.int8), axis=1) > 0
        wide |= dict(
            made=(rows["made"][:, None] + steps).reshape(-1),
            seen=wide["seen"] | guessed_BTV.reshape(-1, V),
        )
        choice_BT = sample(logits_BTV.reshape(-1, V), wide).reshape(B, G + 1)
        choice_BT = jnp.where(force_BT >= 0, force_BT, choice_BT)
        right_B = jnp.cumprod(guess_BG == choice_BT[:, :G], axis=1).sum(axis=1)
        # of the right ones, and the one after them, keep those up to a stop or pause and within
        # what is left
        stop_BT = (force_BT < 0) & (choice_BT[..., None] == rows["stop"][:, None]).any(-1) | (
            choice_BT == pause
        )
        first_B = jnp.where(stop_BT.any(1), jnp.argmax(stop_BT, axis=1), G)
        kept_B = (
            jnp.minimum(jnp.minimum(right_B, first_B) + 1, jnp.minimum(rows["left"], C - made_B))
            * active_B
        )
        kept_BT = steps < kept_B[:, None]
        newest_B = jnp.take_along_axis(choice_BT, jnp.maximum(kept_B - 1, 0)[:, None], axis=1)[:, 0]
        forced_B = (
            jnp.take_along_axis(force_BT, jnp.maximum(kept_B - 1, 0)[:, None], axis=1)[:, 0] >= 0
        )
        lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        new = dict(
            id=choice_BT,
            logprob=jnp.take_along_axis(logits_BTV, choice_BT[..., None], axis=-1)[..., 0] - lse_BT,
        )
        new |= dict(
            zip(
                ("top_id", "top_logprob"),
                top_alternatives(logits_BTV, lse_BT, jnp.any(rows["top"] & active_B)),
            )
        )
        column_BT = jnp.where(kept_BT, made_B[:, None] + steps, C)
        tried = dict(
            drafted=out["drafted"] + G * active_B.sum(),
            accepted=out["accepted"] + jnp.maximum(kept_B - 1, 0).sum(),
        )
        out = {
            name: out[name].at[row, column_BT].set(value, mode="drop")
            for name, value in new.items()
        } | tried
        if "history" in rows:
            place_BT = jnp.where(
                kept_BT, caches[0].length[:, None] + 1 + steps, rows["history"].shape[1]
            )
            rows = rows | dict(
                history=rows["history"].at[row, place_BT].set(choice_BT, mode="drop")
            )
        caches = [_cut_back(a, b, tokens_BT, kept_B) for a, b in zip([checked, *drafted], caches)]
        seen = rows["seen"] | (
            jax.nn.one_hot(choice_BT, V, dtype=jnp.int8) * kept_BT[..., None]
        ).any(1)
        took_B = kept_B > 0
        rows = step_rows(
            rows
            | dict(
                made=rows["made"] + kept_B - took_B, left=rows["left"] - kept_B + took_B, seen=seen
            ),
            newest_B,
            took_B,
            ~forced_B,
        )
        return made_B + kept_B, caches, rows, waiting_B | (took_B & (newest_B == pause)), out

    carry = (jnp.zeros(B, jnp.int32), list(caches), rows, jnp.zeros(B, bool), out)
    _, caches, rows, _, out = jax.lax.while_loop(
        lambda c: active(c[2], c[0], c[3]).any(), one, carry
    )
    return caches, rows, out
