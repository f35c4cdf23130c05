"""The attention that a picture shows is the model's own."""

import jax
import numpy as np
import pytest

from lib import model
from lib.config import Config
from lib.model import looking, transformer
from lib.params import init_params

CONFIG = Config.from_depth(
    3,
    n_embd=64,
    n_head=4,
    n_kv_head=2,
    head_dim=16,
    vocab_size=64,
    sequence_len=512,
    compute_dtype="float32",
    attention="einsum",
)


@pytest.fixture(scope="module")
def params():
    """Weights without zeros, which would hide what attention does."""
    leaves, structure = jax.tree.flatten(init_params(0, CONFIG))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [0.2 * jax.random.normal(key, a.shape) for key, a in zip(keys, leaves)]
    return jax.tree.unflatten(structure, drawn)


def test_weights_are_shares_of_what_a_query_may_see(params):
    tokens = jax.random.randint(jax.random.key(2), (2, 300), 0, 64)
    layers = looking.attention_weights(params, CONFIG, tokens)
    assert len(layers) == 3 and CONFIG.windows == (128, 128, 512)
    for weights, window in zip(layers, CONFIG.windows):
        assert weights.shape == (2, 4, 300, 300)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        distance = np.arange(300)[:, None] - np.arange(300)
        hidden = (distance < 0) | (distance > window)
        assert (weights[..., hidden] == 0).all() and (weights[..., ~hidden] > 0).all()


def test_the_stream_that_it_follows_is_the_model_s(params, monkeypatch):
    """The last layer's output leads to the very logits of forward."""
    outputs = []
    layer = looking._layer

    def spy(*args):
        x, weights = layer(*args)
        outputs.append(x)
        return x, weights

    monkeypatch.setattr(looking, "_layer", spy)
    tokens = jax.random.randint(jax.random.key(3), (1, 40), 0, 64)
    looking.attention_weights(params, CONFIG, tokens)

    @jax.jit
    def both(last, second):
        """Logits of the stream, and the model's."""
        normed = transformer.final_norm(last, second, params, CONFIG)
        followed = transformer.logits(params, CONFIG, normed)
        return followed, model.forward(params, CONFIG, tokens)[0]

    followed, wanted = both(outputs[-1], outputs[1])
    np.testing.assert_allclose(followed, wanted, atol=1e-4)
