"""What the layers of a model look at: the weights that attention gives to every position."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lib.config import Config
from lib.model.tables import value_embeddings
from lib.model.transformer import block, embed, rope_tables
from lib.params import unstack


def attention_weights(params, config: Config, tokens_BT) -> list[np.ndarray]:
    """Per layer (B, N, T, S): what share of its attention each query gives to each key.

    The model's own block, handed an attention that keeps its weights. For pictures of short texts:
    the weights of all positions are held at once.
    """
    # layer by layer, each handed an attention that gives its weights back
    x0_BTD, blocks, tables, rope = _enter(params, config, jnp.asarray(tokens_BT))
    x_BTD = x0_BTD
    kept = []
    for i, w in enumerate(blocks):
        x_BTD, weights_BNTS = _layer(
            x_BTD, x0_BTD, w, tables.get(i), config, rope, config.windows[i]
        )
        kept.append(np.asarray(weights_BNTS))
    return kept


@functools.partial(jax.jit, static_argnames="config")
def _enter(params, config: Config, tokens_BT):
    """What enters the first layer, as in the model's own forward, and what each layer is given:
    its weights, its values {layer: table}, the rotations.
    """
    x0_BTD = embed(params, config, tokens_BT)
    ve = value_embeddings(params, tokens_BT, config)
    layers = unstack({**params, "value_embeds": ve}, config)
    rope = rope_tables(jnp.arange(tokens_BT.shape[1]), config)
    return x0_BTD, layers["blocks"], layers["value_embeds"], rope


# compiled once for all layers that are alike
@functools.partial(jax.jit, static_argnames=("config", "window"))
def _layer(x_BTD, x0_BTD, w, ve_BTKH, config: Config, rope, window: int):
    """One layer's output, and the weights (B, N, T, S) of its attention."""
    return block(x_BTD, x0_BTD, w, ve_BTKH, config, rope, _keeping(window))


def _keeping(window: int):
    """attend(q, k, v) -> (o, weights) with that window, by the formula."""

    def attend(q_BTNH, k_BSKH, v_BSKH):
        _, T, N, H = q_BTNH.shape
        _, S, K, _ = k_BSKH.shape
        # every query head its own keys and values
        k_BSNH = jnp.repeat(k_BSKH, N // K, axis=2)
        v_BSNH = jnp.repeat(v_BSKH, N // K, axis=2)
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH).astype(jnp.float32)
        scores_BNTS = scores_BNTS / math.sqrt(H)

        # causal, `window` back at most
        distance_TS = jnp.arange(T)[:, None] - jnp.arange(S)
        visible_TS = (distance_TS >= 0) & (distance_TS <= window)
        scores_BNTS = jnp.where(visible_TS, scores_BNTS, -jnp.inf)
        weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
        o_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS.astype(v_BSNH.dtype), v_BSNH)
        return o_BTNH, weights_BNTS

    return attend
