"""From logits to the next token: every row of a batch by its own settings, without sorting, the
same whatever the batch.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lib.files import UserError

STOPS = 8  # stop tokens per row that the device knows; the host finds any more when a chunk is back
TOP = 20  # alternatives reported with a token when a row asks for any


@dataclass(frozen=True)
class Sampling:
    """How one row is to be written. Changing any of it compiles nothing.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off. A row ends
    after max_tokens, at a token in `stop`, or before any of `stop_strings`, none of which is
    returned. logprobs: how many alternatives, TOP at most, to report with each token. Raises
    UserError.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    logprobs: int = 0

    def __post_init__(self):
        bounds = dict(
            max_tokens=(1, 2**31 - 1),
            temperature=(0, 1e6),
            top_k=(0, 2**31 - 1),
            min_p=(0, 1),
            repetition_penalty=(1e-3, 1e3),
            logprobs=(0, TOP),
            seed=(-(2**63), 2**64 - 1),
        )
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(
                    f"{name} must be from {low:g} to {high:g}, got {getattr(self, name)}"
                )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if "" in self.stop_strings:
            raise UserError("a stop string is empty: it would stop everything, so leave it out")


def empty_rows(slots: int, vocab: int) -> dict:
    """The state of `slots` rows, none alive: the token to feed next, counts made and left,
    settings, tokens seen.
    """
    full = lambda value, *shape: jnp.full((slots, *shape), value)  # an array each: they are donated
    counts = {name: full(np.int32(0)) for name in ("token", "made", "left", "top_k")}
    flags = {name: full(False) for name in ("alive", "filtered", "top")}
    reals = {
        name: full(np.float32(value))
        for name, value in dict(temperature=0, top_p=1, min_p=0, penalty=1).items()
    }
    return dict(
        **counts,
        **flags,
        **reals,
        seed=full(np.uint32(0)),
        stop=full(np.int32(-1), STOPS),
        seen=full(False, vocab),
    )


def new_row(prompt: list[int], s: Sampling, vocab: int) -> dict:
    """One row of that state, about to be written after `prompt`."""
    seen = np.zeros(vocab, bool)
    seen[prompt] = True
    stop = np.full(STOPS, -1, np.int32)
    stop[: len(s.stop)] = sorted(s.stop)[:STOPS]
    filtered = s.temperature > 0 and (0 < s.top_k < vocab or s.top_p < 1 or s.min_p > 0)
    return dict(
        token=np.int32(prompt[-1]),
        alive=np.bool_(True),
        made=np.int32(0),
        left=np.int32(s.max_tokens),
        seed=np.uint32(s.seed % 2**32),
        temperature=np.float32(s.temperature),
        top_k=np.int32(min(s.top_k, vocab)),
        top_p=np.float32(s.top_p),
        min_p=np.float32(s.min_p),
        penalty=np.float32(s.repetition_penalty),
        filtered=np.bool_(filtered),
        top=np.bool_(s.logprobs > 0),
        stop=stop,
        seen=seen,
    )


def argmax(x_BV):
    """The first index of each row's maximum: twice a plain reduction, which XLA:CPU turns into
    vector code, unlike its argmax.
    """
    V = x_BV.shape[-1]
    return jnp.where(
        x_BV == x_BV.max(-1, keepdims=True), jnp.arange(V, dtype=jnp.int32), V - 1
    ).min(-1)


def _least(p_BV, enough):
    """Per row the largest t for which enough(p >= t), by bisection: floats from 0 to 1 are ordered
    as their bits are.

    Thirty passes over the vocabulary cost less than sorting it, and no k has to be known when
    compiling.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low + 1) // 2
        good = enough(p_BV >= jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None])
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    one = 0x3F800000  # the bits of 1.0
    low, _ = jax.lax.fori_loop(
        0,
        one.bit_length(),
        halve,
        (jnp.zeros(len(p_BV), jnp.int32), jnp.full(len(p_BV), one, jnp.int32)),
    )
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _filtered(x_BV, rows):
    """The logits that top_k, then top_p, then min_p leave, -inf for the others; whatever ties with
    the last one kept stays too.
    """
    p = jax.nn.softmax(x_BV, axis=-1)
    k = jnp.where(rows["top_k"] > 0, rows["top_k"], p.shape[-1])
    p = jnp.where(p >= _least(p, lambda keep: keep.sum(-1) >= k)[:, None], p, 0)
    share = rows["top_p"] * p.sum(-1)
    nucleus = _least(p, lambda keep: jnp.where(keep, p, 0).sum(-1) >= share)
    least = jnp.maximum(jnp.where(rows["top_p"] < 1, nucleus, 0), rows["min_p"] * p.max(-1))
    return jnp.where((p > 0) & (p >= least[:, None]), x_BV, -jnp.inf)


def penalized(logits_BV, rows):
    """Logits, those of tokens that a row has seen made less: positive ones divided, negative ones
    multiplied (Keskar et al. 2019).
    """
    by = jnp.where(rows["seen"], rows["penalty"][:, None], 1.0)
    return jnp.where(logits_BV > 0, logits_BV / by, logits_BV * by)


def sample(logits_BV, rows):
    """One token id per row: penalty, temperature, top_k, top_p (Holtzman et al. 2019), min_p, then
    a draw by the row's own key.

    The key depends on the row's seed and on how many tokens it has made, on nothing else. The draw
    is the maximum of logits plus Gumbel noise: a draft model that draws by the same noise mostly
    draws the same token (see lib.speculative).
    """

    def draw(x):
        noise = lambda seed, made: jax.random.gumbel(
            jax.random.fold_in(jax.random.key(seed), made), x.shape[1:]
        )
        hot = x / jnp.maximum(rows["temperature"], 1e-6)[:, None]
        hot = jax.lax.cond(
            jnp.any(rows["filtered"]), lambda hot: _filtered(hot, rows), lambda hot: hot, hot
        )
        return argmax(
            jnp.where(
                rows["temperature"][:, None] > 0,
                hot + jax.vmap(noise)(rows["seed"], rows["made"]),
                x,
            )
        )

    return jax.lax.cond(jnp.any(rows["temperature"] > 0), draw, argmax, penalized(logits_BV, rows))


def step_rows(rows, token_B, took_B, sampled_B):
    """The state after the rows in took_B took token_B; those that chose it themselves (sampled_B)
    may stop at it.
    """
    step_B = took_B.astype(jnp.int32)
    stopped_B = sampled_B & (token_B[:, None] == rows["stop"]).any(-1)
    hit_BV = jnp.arange(rows["seen"].shape[1]) == token_B[:, None]
    return rows | dict(
        token=jnp.where(took_B, token_B, rows["token"]),
        made=rows["made"] + step_B,
        left=rows["left"] - step_B,
        alive=rows["alive"] & ~(took_B & (stopped_B | (rows["left"] <= 1))),
        seen=rows["seen"] | (took_B[:, None] & hit_BV),
    )


def top_alternatives(logits, lse, wanted):
    """(ids, logprobs) of the TOP likeliest tokens, last axis TOP; zeros and -inf where not wanted
    or the vocabulary is smaller.
    """
    k = min(TOP, logits.shape[-1])
    pad = [(0, 0)] * (logits.ndim - 1) + [(0, TOP - k)]

    def found(logits):
        values, ids = jax.lax.top_k(logits, k)
        return jnp.pad(ids, pad), jnp.pad(values - lse[..., None], pad, constant_values=-jnp.inf)

    shape = (*logits.shape[:-1], TOP)
    nothing = lambda logits: (jnp.zeros(shape, jnp.int32), jnp.full(shape, -jnp.inf))
    return jax.lax.cond(wanted, found, nothing, logits)
