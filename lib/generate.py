"""Decoding: prefill and token-by-token generation against a preallocated cache, with reproducible sampling."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lib import model
from lib.config import Config
from lib.files import UserError

CHUNK = 8  # tokens decoded per dispatch: few enough to stream smoothly, many enough to hide the dispatch


def sample(logits_BV, keys_B, temperature, top_k: int, top_p):
    """One token id per row. temperature 0 is greedy; top_k 0 and top_p 1 keep everything.

    Order: temperature, then the top_k most likely, then the smallest set of those with probability >= top_p
    (Holtzman et al. 2019). Each row has its own key, so a row's text does not depend on its neighbours.
    """
    V = logits_BV.shape[-1]
    scaled = logits_BV / jnp.maximum(temperature, 1e-6)
    k = V if not 0 < top_k < V else top_k
    values, ids = jax.lax.top_k(scaled, k)  # sorted, so that top_p is a prefix
    p = jax.nn.softmax(values, axis=-1)
    values = jnp.where(jnp.cumsum(p, axis=-1) - p < top_p, values, -jnp.inf)
    pick = jax.vmap(jax.random.categorical)(keys_B, values)
    drawn = jnp.take_along_axis(ids, pick[:, None], axis=-1)[:, 0]
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


@partial(jax.jit, static_argnames=("config", "length", "top_k"))
def _prefill(params, config: Config, prompts_BT, lengths_B, seeds_B, temperature, top_p, *, length: int, top_k: int):
    """Fill a cache of `length` slots from right-padded prompts and draw each row's first token."""
    B = len(lengths_B)
    cache = model.init_cache(config, B, length)
    x_BTD, cache = model.hidden(params, config, prompts_BT, cache)
    rows = jnp.arange(B)
    # padding lies behind each row's length, where no query looks and the next tokens overwrite it
    cache |= {"length": lengths_B, "last": prompts_BT[rows, lengths_B - 1]}
    logits_BV = model.logits(params, config, x_BTD[rows, lengths_B - 1])
    keys_B = jax.vmap(jax.random.key)(seeds_B)
    return cache, sample(logits_BV, jax.vmap(jax.random.fold_in, (0, None))(keys_B, 0), temperature, top_k, top_p)


@partial(jax.jit, static_argnames=("config", "count", "top_k"), donate_argnames="cache")
def _decode(params, config: Config, cache, token_B, done_B, seeds_B, start, temperature, top_p, stop, *,
            count: int, top_k: int):
    """Up to `count` more tokens per row in one dispatch, leaving early once every row has stopped."""
    B = len(token_B)
    keys_B = jax.vmap(jax.random.key)(seeds_B)
    params = model.unstack(params, config)

    def go_on(carry):
        i, _, _, done_B, _ = carry
        return (i < count) & ~jnp.all(done_B)

    def one(carry):
        i, cache, token_B, done_B, out = carry
        logits_BTV, cache = model.forward(params, config, token_B[:, None], cache)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, start + i)
        token_B = sample(logits_BTV[:, -1], keys, temperature, top_k, top_p)
        out = out.at[:, i].set(jnp.where(done_B, -1, token_B))
        return i + 1, cache, token_B, done_B | jnp.isin(token_B, stop), out

    carry = (0, cache, token_B, done_B, jnp.full((B, count), -1, jnp.int32))
    _, cache, token_B, done_B, out = jax.lax.while_loop(go_on, one, carry)
    return cache, token_B, done_B, out


def _bucket(n: int) -> int:
    """The next power of two, at least 16: one compilation serves many prompt lengths."""
    return max(16, 1 << (n - 1).bit_length())


def stream(params, config: Config, prompts: list[list[int]], max_tokens: int, temperature: float = 1.0, top_k: int = 0,
           top_p: float = 1.0, seed: int = 0, stop: tuple[int, ...] = ()) -> Iterator[list[list[int]]]:
    """Generate after each prompt, yielding the new tokens of every row a few at a time.

    prompts: token ids, at least one each; several lengths may be mixed. A row ends before max_tokens at a token in `stop`, which is
    not yielded. Row b draws from seed + b, whatever else is in the batch; the same seed gives the same text.
    """
    if not prompts or not all(prompts):
        raise UserError("a prompt has no tokens: begin it with the tokenizer's <|bos|> at least")
    bad = [t for p in prompts for t in p if not 0 <= t < config.vocab_size]
    if bad:
        raise UserError(f"token {bad[0]} is outside the model's vocabulary of {config.vocab_size}: "
                        "encode with the tokenizer that the model was trained with")
    if max_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise UserError(f"sampling needs max_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got "
                        f"{max_tokens}, {temperature}, {top_k}, {top_p}")
    lengths = np.array([len(p) for p in prompts], np.int32)
    padded = np.zeros((len(prompts), _bucket(int(lengths.max()))), np.int32)
    for row, p in zip(padded, prompts):
        row[: len(p)] = p
    seeds = np.arange(seed, seed + len(prompts), dtype=np.uint32)
    stop = np.array(sorted(stop) or [-1], np.int32)
    top_k = min(top_k, config.vocab_size)
    slots = max(padded.shape[1], _bucket(int(lengths.max()) + max_tokens))
    cache, token_B = _prefill(params, config, padded, lengths, seeds, temperature, top_p, length=slots, top_k=top_k)
    first = np.asarray(token_B)
    done_B = jnp.isin(token_B, stop)
    yield [[] if t in stop else [int(t)] for t in first]
    made = 1
    while made < max_tokens and not bool(jnp.all(done_B)):
        cache, token_B, done_B, out = _decode(params, config, cache, token_B, done_B, seeds, made, temperature, top_p,
                                              stop, count=CHUNK, top_k=top_k)
        rows = np.asarray(out)[:, : max_tokens - made]
        yield [[int(t) for t in row if t >= 0 and t not in stop] for row in rows]
        made += CHUNK


def generate(params, config: Config, prompts: list[list[int]], max_tokens: int, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, seed: int = 0, stop: tuple[int, ...] = ()) -> list[list[int]]:
    """The whole of `stream` at once: for each prompt the list of new token ids, without the prompt."""
    rows = [[] for _ in prompts]
    for new in stream(params, config, prompts, max_tokens, temperature, top_k, top_p, seed, stop):
        for row, ids in zip(rows, new):
            row += ids
    return rows
