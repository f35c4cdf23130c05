"""Open weights of the Llama family as our parameters: nothing is lost, all of ours works on them.

What their architecture has beyond ours is folded away: norm weights go into the matrices that read
the normed stream, and the halves of each head change places, because our rotations turn the other
way. What ours has beyond theirs is switched off in the config.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lib.config import REFERENCE_BATCH, Config
from lib.files import UserError
from lib.interop.folding import swap_halves

# model_type of a config.json: whether it norms queries and keys
MODEL_TYPES = {"llama": False, "qwen3": True}
# fields that add to the computation, with the values that add nothing
PLAIN = dict(
    attention_bias=(False, None),
    mlp_bias=(False, None),
    use_sliding_window=(False, None),
    hidden_act=("silu",),
)
NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def config_from_llama(settings: dict, sequence_len: int = 0) -> Config:
    """Our Config of a model whose config.json, as a dict, says `settings`.

    sequence_len: the context to use, at most theirs, which is taken by default. Training fields
    keep their defaults as far as they divide, but AdamW trains it on, as it was trained before.
    UserError names what we cannot hold.
    """
    _check_plain(settings)
    # the context: theirs, or as much of it as is asked for
    theirs = settings.get("max_position_embeddings", Config.sequence_len)
    length = sequence_len or theirs
    if length > theirs:
        raise UserError(f"sequence_len={length} is beyond the model's context of {theirs} tokens")
    heads = settings["num_attention_heads"]
    # about as many tokens a step as our own models take
    rows = max(1, REFERENCE_BATCH // length // Config.microbatch) * Config.microbatch
    return Config(
        vocab_size=settings["vocab_size"],
        sequence_len=length,
        n_layer=settings["num_hidden_layers"],
        n_embd=settings["hidden_size"],
        n_head=heads,
        n_kv_head=settings.get("num_key_value_heads") or heads,
        head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
        mlp="swiglu",
        mlp_dim=settings["intermediate_size"],
        window_pattern="L",
        rope_base=float(_rope(settings).get("rope_theta", 10_000.0)),
        qk_norm=MODEL_TYPES[settings["model_type"]],
        qk_scale=1.0,
        softcap=0.0,
        resid_scales=False,
        x0_scales=False,
        value_embeds=False,
        smear=False,
        backout=False,
        tied_head=bool(settings.get("tie_word_embeddings")),
        embed_norm=False,
        norm_eps=float(settings.get("rms_norm_eps", 1e-6)),
        total_batch_size=rows * length,
        optimizer="adamw",
    )


def _rope(settings: dict) -> dict:
    """What a config.json says of rotations, in its new form or in its old one."""
    new = settings.get("rope_parameters") or {}
    old = settings.get("rope_scaling") or {}
    theta = {"rope_theta": settings["rope_theta"]} if "rope_theta" in settings else {}
    return old | theta | new


def _check_plain(settings: dict):
    """UserError for a config of an architecture, or of a part, that we have not."""
    kind = settings.get("model_type")
    if kind == "gpt2":
        raise UserError(
            "GPT-2 cannot be imported: it has learned positions and LayerNorm with biases, "
            "where this model has rotations and RMSNorm without weights"
        )
    if kind not in MODEL_TYPES:
        names = ", ".join(MODEL_TYPES)
        raise UserError(f"cannot import a model of type {kind!r}: its type must be one of {names}")
    # of a type that we know: whole, and without parts that we have not
    missing = [name for name in NEEDED if name not in settings]
    if missing:
        raise UserError(f"its config.json lacks {', '.join(missing)}: get the whole of it")
    for field, values in PLAIN.items():
        if settings.get(field, values[0]) not in values:
            raise UserError(f"cannot import a model with {field}={settings[field]}")
    rope_type = _rope(settings).get("rope_type", _rope(settings).get("type", "default"))
    if rope_type != "default":
        raise UserError(
            f"cannot import a model whose rotations are scaled (rope_type={rope_type}): "
            "only plain rotations are known here"
        )


# ---- weights -------------------------------------------------------------------------------------


def from_llama(state: dict[str, np.ndarray], config: Config) -> tuple[dict, Config]:
    """(our parameters, config) from a state dict in transformers' names, float32.

    The config comes back with a head of its own where the last norm's weights part a tied head from
    the embedding, and with the scale that norms of queries and keys had.
    """
    # tables of rotations are no weights
    state = {name: array for name, array in state.items() if not name.endswith("inv_freq")}
    state = {name.removeprefix("model."): array for name, array in state.items()}
    layers = [_layer(state, config, i) for i in range(config.n_layer)]
    stacks = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    if config.qk_norm:
        config = config.replace(qk_scale=_norm_scale(state, config))

    # the tables; a head that is not there is the embedding
    embed = _take(state, "embed_tokens.weight", (config.vocab_size, config.n_embd))
    final_norm = _take(state, "norm.weight", (config.n_embd,))
    head = embed
    if "lm_head.weight" in state:
        head = _take(state, "lm_head.weight", embed.shape)
    elif not config.tied_head:
        raise UserError("the weights lack lm_head.weight, and its config.json ties no head to them")
    if state:
        names = ", ".join(sorted(state)[:5])
        raise UserError(f"the weights hold {names} ({len(state)} in all), unknown in its type")

    # the last norm's weights go into the head, which may part it from the embedding
    tied = config.tied_head and bool(np.all(final_norm == 1)) and np.array_equal(head, embed)
    config = config.replace(tied_head=tied)
    params: dict[str, Any] = {"embed": _padded(embed, config), "blocks": stacks}
    if not tied:
        params["head"] = _padded(head * final_norm, config).T
    return jax.tree.map(jnp.asarray, params), config


def _take(state: dict, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the state dict, out of it; UserError where it is missing or of another shape."""
    if name not in state:
        raise UserError(f"the weights lack {name}: get all files of the model")
    array = np.asarray(state.pop(name), np.float32)
    if array.shape != shape:
        raise UserError(f"{name} has shape {array.shape} where its config.json asks for {shape}")
    return array


def _layer(state: dict, config: Config, i: int) -> dict[str, np.ndarray]:
    """The matrices of one layer, with the norms before them folded in."""
    D, F, H = config.n_embd, config.mlp_dim, config.head_dim
    N, K = config.n_head, config.n_kv_head
    attn, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"

    def inputs_first(name, norm, *outputs):
        """A matrix (outputs, inputs) turned, its outputs spelled out, what it reads scaled."""
        weight = _take(state, f"{name}.weight", (math.prod(outputs), D))
        return (weight * norm).T.reshape(D, *outputs)

    # each norm's weights go into the matrices that read what it norms
    before_attn = _take(state, f"layers.{i}.input_layernorm.weight", (D,))
    before_mlp = _take(state, f"layers.{i}.post_attention_layernorm.weight", (D,))
    return dict(
        wq=swap_halves(inputs_first(f"{attn}.q_proj", before_attn, N, H)),
        wk=swap_halves(inputs_first(f"{attn}.k_proj", before_attn, K, H)),
        wv=inputs_first(f"{attn}.v_proj", before_attn, K, H),
        wo=_take(state, f"{attn}.o_proj.weight", (D, N * H)).T.reshape(N, H, D),
        w_in=inputs_first(f"{mlp}.up_proj", before_mlp, F),
        w_gate=inputs_first(f"{mlp}.gate_proj", before_mlp, F),
        w_out=_take(state, f"{mlp}.down_proj.weight", (D, F)).T,
    )


def _norm_scale(state: dict, config: Config) -> float:
    """The one number that the weights of all norms of queries and keys come to."""
    shape = (config.head_dim,)
    # of each layer the weights for queries, then those for keys
    pairs = []
    for i in range(config.n_layer):
        queries = _take(state, f"layers.{i}.self_attn.q_norm.weight", shape)
        keys = _take(state, f"layers.{i}.self_attn.k_norm.weight", shape)
        pairs += [queries, keys]
    uniform = all(np.all(weights == weights[0]) for weights in pairs)
    # only their product counts: it scales the scores
    products = {float(q[0] * k[0]) for q, k in zip(pairs[::2], pairs[1::2])}
    if not uniform or len(products) > 1 or min(products) <= 0:
        raise UserError(
            "cannot import a model whose norms of queries and keys (q_norm, k_norm) have learned "
            "weights of their own: here they share one scale"
        )
    return math.sqrt(products.pop())


def _padded(table_VD: np.ndarray, config: Config) -> np.ndarray:
    """A table with rows of zeros up to the padded vocabulary."""
    return np.pad(table_VD, ((0, config.padded_vocab - len(table_VD)), (0, 0)))


def revocabulary(params: dict, config: Config, theirs: np.ndarray) -> tuple[dict, Config]:
    """(parameters, config) for another order of tokens.

    theirs[i] is the old id of the new id i, or -1 for a token that the model never met: it begins
    as the mean of those that it knows.
    """
    config = config.replace(vocab_size=len(theirs))
    known = theirs[theirs >= 0]

    def reorder(table_VD):
        table_VD = np.asarray(table_VD)
        rows = table_VD[np.maximum(theirs, 0)]
        rows[theirs < 0] = table_VD[known].mean(axis=0)
        return _padded(rows, config)

    params = params | {"embed": jnp.asarray(reorder(params["embed"]))}
    if "head" in params:
        params["head"] = jnp.asarray(reorder(params["head"].T).T)
    return params, config
