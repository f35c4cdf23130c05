"""The golden model that writes, engines driven by hand, and one whose every token is known
beforehand.
"""

import functools
import zlib

import jax
import jax.numpy as jnp

from lib import model
from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.generate import Engine, Sampling
from lib.generate.engine import CHUNK
from lib.params import init_params
from lib.sandbox import calculator
from tests.helpers.golden import PARITY, parity_model

PROMPTS = [[491, 275], [491, 327, 270, 32, 73], list(range(40, 60)), [491]]


@functools.cache
def golden():
    return *parity_model("T"), Tokenizer.load(PARITY / "tokenizer.json")


def drain(engine, rows=None, count=CHUNK):
    """Step an engine until it is empty: {slot: all its tokens}, {slot: why it ended}."""
    rows, why = rows or {}, {}
    while engine.writers:
        for slot, (tokens, finish) in engine.step(count).items():
            rows.setdefault(slot, []).extend(tokens)
            why |= {slot: finish} if finish else {}
    return rows, why


def greedy(max_tokens, **settings):
    return Sampling(max_tokens, temperature=0, **settings)


def ids(tokens):
    return [t.id for t in tokens]


def scripted(monkeypatch, scripts):
    """An Engine whose row b wants the id scripts[b][k] at its k-th forward, whatever it is fed."""
    vocab, longest = 500, max(map(len, scripts))
    wishes = jnp.array([s + s[-1:] * (longest - len(s)) for s in scripts])

    def forward(params, config, tokens_BT, cache):
        # prompts of three tokens, of which the last is fed first
        k = jnp.minimum(cache.length - 2, longest - 1)
        logits = 9.0 * jax.nn.one_hot(wishes[jnp.arange(len(k)), k], vocab)
        return logits[:, None], cache._replace(length=cache.length + (tokens_BT[:, 0] >= 0))

    monkeypatch.setattr(model, "forward", forward)
    config = Config(
        vocab_size=vocab,
        n_layer=1,
        n_embd=24,
        n_head=1,
        n_kv_head=1,
        head_dim=2,
        mlp_dim=8,
        window_pattern="L",
        # traced anew
        sequence_len=64,
        microbatch=1,
        total_batch_size=64,
        seed=zlib.crc32(str(scripts).encode()) % 2**31,
    )
    return Engine(init_params(0, config), config, len(scripts), 64, golden()[2], calculator)
