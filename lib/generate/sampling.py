"""From logits to the next token: every row of a batch by its own settings, without sorting, the
same whatever the batch.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lib.files import UserError

# stop tokens per row that the device knows; the host finds any more when a chunk is back
STOPS = 8
# alternatives reported with a token when a row asks for any
TOP = 20

# what each setting must lie between
BOUNDS = dict(
    max_tokens=(1, 2**31 - 1),
    temperature=(0, 1e6),
    top_k=(0, 2**31 - 1),
    top_p=(0, 1),
    min_p=(0, 1),
    repetition_penalty=(1e-3, 1e3),
    logprobs=(0, TOP),
    seed=(-(2**63), 2**64 - 1),
)


@dataclass(frozen=True)
class Sampling:
    """How one row is to be written. Changing any of it compiles nothing.

    temperature 0 and top_p 0 are greedy. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are
    off. A row ends after max_tokens, at a token in `stop`, or before any of `stop_strings`, none of
    which is returned; keep_stop returns the stop token that the row chose, with its logprob.
    logprobs: how many alternatives, TOP at most, to report with each token. Raises UserError.
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
    keep_stop: bool = False

    def __post_init__(self):
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name} must be from {low:g} to {high:g}, got {value}")
        if "" in self.stop_strings:
            raise UserError("a stop string is empty: it would stop everything, so leave it out")


# ---- the state of rows ---------------------------------------------------------------------------


def empty_rows(slots: int, vocab: int) -> dict:
    """The state of `slots` rows, none alive: the token to feed next, counts made and left,
    settings, tokens seen.
    """

    def full(value, *shape):
        return np.full((slots, *shape), value)

    rows = dict(
        token=full(np.int32(0)),
        alive=full(False),
        made=full(np.int32(0)),
        left=full(np.int32(0)),
        seed=full(np.uint32(0)),
        temperature=full(np.float32(0)),
        top_k=full(np.int32(0)),
        top_p=full(np.float32(1)),
        min_p=full(np.float32(0)),
        penalty=full(np.float32(1)),
        filtered=full(False),
        top=full(False),
        stop=full(np.int32(-1), STOPS),
        seen=full(False, vocab),
    )
    # copies, for they are donated; made on the host, where nothing has to be compiled for that
    return jax.device_put(rows, may_alias=False)


def new_row(prompt: list[int], s: Sampling, vocab: int) -> dict:
    """One row of that state, about to be written after `prompt`."""
    # the repetition penalty counts the prompt too
    seen = np.zeros(vocab, bool)
    seen[prompt] = True

    stop = np.full(STOPS, -1, np.int32)
    stop[: len(s.stop)] = sorted(s.stop)[:STOPS]

    # whether any filter leaves tokens out: if no row's does, they are skipped
    is_cut = 0 < s.top_k < vocab or s.top_p < 1 or s.min_p > 0
    return dict(
        token=np.int32(prompt[-1]),
        alive=np.bool_(True),
        made=np.int32(0),
        left=np.int32(s.max_tokens),
        seed=np.uint32(s.seed % 2**32),
        temperature=np.float32(s.temperature),
        top_k=np.int32(min(s.top_k, vocab)),
        # 0 leaves the likeliest token alone
        top_p=np.float32(max(s.top_p, 1e-9)),
        min_p=np.float32(s.min_p),
        penalty=np.float32(s.repetition_penalty),
        filtered=np.bool_(s.temperature > 0 and is_cut),
        top=np.bool_(s.logprobs > 0),
        stop=stop,
        seen=seen,
    )


def step_rows(rows, token_B, took_B, sampled_B):
    """The state after the rows in took_B took token_B; those that chose it themselves (sampled_B)
    may stop at it.
    """
    step_B = took_B.astype(jnp.int32)
    # a row ends at a stop token of its own choice, or when nothing is left to write
    is_stop_B = (token_B[:, None] == rows["stop"]).any(-1)
    stopped_B = sampled_B & is_stop_B
    ended_B = took_B & (stopped_B | (rows["left"] <= 1))
    is_token_BV = jnp.arange(rows["seen"].shape[1]) == token_B[:, None]
    return rows | dict(
        token=jnp.where(took_B, token_B, rows["token"]),
        made=rows["made"] + step_B,
        left=rows["left"] - step_B,
        alive=rows["alive"] & ~ended_B,
        seen=rows["seen"] | (took_B[:, None] & is_token_BV),
    )


# ---- the choice ----------------------------------------------------------------------------------


def sample(logits_BV, rows):
    """One token id per row: penalty, temperature, top_k, top_p (Holtzman et al. 2019), min_p, then
    a draw by the row's own key.

    The key depends on the row's seed and on how many tokens it has made, on nothing else. The draw
    is the maximum of logits plus Gumbel noise: a draft model that draws by the same noise mostly
    draws the same token (see lib.generate.speculative).
    """
    V = logits_BV.shape[-1]

    def noise(seed, made):
        key = jax.random.fold_in(jax.random.key(seed), made)
        return jax.random.gumbel(key, (V,))

    def draw(x_BV):
        temperature_B = jnp.maximum(rows["temperature"], 1e-6)
        hot_BV = x_BV / temperature_B[:, None]
        # filters only where a row asks for one
        hot_BV = jax.lax.cond(
            jnp.any(rows["filtered"]),
            lambda hot_BV: filtered(hot_BV, rows),
            lambda hot_BV: hot_BV,
            hot_BV,
        )
        # the largest of logits plus Gumbel noise is a draw; rows of temperature 0 go without
        noisy_BV = hot_BV + jax.vmap(noise)(rows["seed"], rows["made"])
        is_drawn_B1 = rows["temperature"][:, None] > 0
        return argmax(jnp.where(is_drawn_B1, noisy_BV, x_BV))

    # a batch of greedy rows needs no noise at all
    anyone_draws = jnp.any(rows["temperature"] > 0)
    return jax.lax.cond(anyone_draws, draw, argmax, penalized(logits_BV, rows))


def penalized(logits_BV, rows):
    """Logits, those of tokens that a row has seen made less: positive ones divided, negative ones
    multiplied (Keskar et al. 2019).
    """
    penalty_BV = jnp.where(rows["seen"], rows["penalty"][:, None], 1.0)
    return jnp.where(logits_BV > 0, logits_BV / penalty_BV, logits_BV * penalty_BV)


def filtered(x_BV, rows):
    """The logits that top_k, then top_p, then min_p leave, -inf for the others; whatever ties with
    the last one kept stays too.
    """
    p_BV = jax.nn.softmax(x_BV, axis=-1)

    # the k likeliest
    k_B = jnp.where(rows["top_k"] > 0, rows["top_k"], p_BV.shape[-1])
    kth_B = _least(p_BV, lambda keep_BV: keep_BV.sum(-1) >= k_B)
    p_BV = jnp.where(p_BV >= kth_B[:, None], p_BV, 0)

    # of those the likeliest that make up the share top_p
    share_B = rows["top_p"] * p_BV.sum(-1)

    def is_enough(keep_BV):
        kept_B = jnp.where(keep_BV, p_BV, 0).sum(-1)
        return kept_B >= share_B

    nucleus_B = _least(p_BV, is_enough)
    nucleus_B = jnp.where(rows["top_p"] < 1, nucleus_B, 0)

    # and of those, what is not too far below the likeliest
    least_B = jnp.maximum(nucleus_B, rows["min_p"] * p_BV.max(-1))
    is_left_BV = (p_BV > 0) & (p_BV >= least_B[:, None])
    return jnp.where(is_left_BV, x_BV, -jnp.inf)


def _least(p_BV, enough):
    """Per row the largest t for which enough(p >= t), by bisection: floats from 0 to 1 are ordered
    as their bits are.

    Thirty passes over the vocabulary cost less than sorting it, and no k has to be known when
    compiling.
    """

    def as_float(bits_B):
        return jax.lax.bitcast_convert_type(bits_B, jnp.float32)

    def halve(_, bounds):
        low_B, high_B = bounds
        middle_B = low_B + (high_B - low_B + 1) // 2
        good_B = enough(p_BV >= as_float(middle_B)[:, None])
        low_B = jnp.where(good_B, middle_B, low_B)
        high_B = jnp.where(good_B, high_B, middle_B - 1)
        return low_B, high_B

    # the bits of 1.0; one step for each of them
    one = 0x3F800000
    B = len(p_BV)
    bounds = (jnp.zeros(B, jnp.int32), jnp.full(B, one, jnp.int32))
    low_B, _ = jax.lax.fori_loop(0, one.bit_length(), halve, bounds)
    return as_float(low_B)


def argmax(x_BV):
    """The first index of each row's maximum: twice a plain reduction, which XLA:CPU turns into
    vector code, unlike its argmax.
    """
    V = x_BV.shape[-1]
    index_V = jnp.arange(V, dtype=jnp.int32)
    is_max_BV = x_BV == x_BV.max(-1, keepdims=True)
    return jnp.where(is_max_BV, index_V, V - 1).min(-1)


def top_alternatives(logits, lse, wanted):
    """(ids, logprobs) of the TOP likeliest tokens, last axis TOP; zeros and -inf where not wanted
    or the vocabulary is smaller.
    """
    # a small vocabulary's results are filled up to TOP
    k = min(TOP, logits.shape[-1])
    pad = [(0, 0)] * (logits.ndim - 1) + [(0, TOP - k)]
    shape = (*logits.shape[:-1], TOP)

    def likeliest(logits):
        values, ids = jax.lax.top_k(logits, k)
        logprobs = values - lse[..., None]
        return jnp.pad(ids, pad), jnp.pad(logprobs, pad, constant_values=-jnp.inf)

    def nothing(logits):
        return jnp.zeros(shape, jnp.int32), jnp.full(shape, -jnp.inf)

    return jax.lax.cond(wanted, likeliest, nothing, logits)
