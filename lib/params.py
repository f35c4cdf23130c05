"""One Spec per weight, and all that follows from it: initial values, counts, templates."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lib.config import SMEAR_CHANNELS, VALUE_GATE_CHANNELS, Config


@dataclass(frozen=True)
class Spec:
    """A weight before it exists. Block weights are stacked: their first axis is "layer".

    init: ("normal", std) | ("uniform", low, high) | ("linear", first, last) over the layer axis |
    ("constant", value). group: the optimizer group. n_in: how many axes after the layer axis are
    inputs of the matrix; the rest are outputs.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: tuple
    group: str
    n_in: int = 1


def _uniform(bound: float) -> tuple:
    return "uniform", -bound, bound


def param_specs(c: Config) -> dict:
    """The parameter tree of a config as Specs; parts that are switched off are absent."""
    L, D, N, K, H, F, V, Lv = (
        c.n_layer,
        c.n_embd,
        c.n_head,
        c.n_kv_head,
        c.head_dim,
        c.mlp_dim,
        c.padded_vocab,
        len(c.value_layers),
    )
    s = math.sqrt(3 / D)  # uniform bound with the variance 1/D
    zero = ("constant", 0.0)

    blocks = {
        "wq": Spec((L, D, N, H), ("layer", "embed", "heads", "head"), _uniform(s), "matrix"),
        "wk": Spec((L, D, K, H), ("layer", "embed", "kv_heads", "head"), _uniform(s), "matrix"),
        "wv": Spec((L, D, K, H), ("layer", "embed", "kv_heads", "head"), _uniform(s), "matrix"),
        "wo": Spec((L, N, H, D), ("layer", "heads", "head", "embed"), zero, "matrix", n_in=2),
        "w_in": Spec((L, D, F), ("layer", "embed", "mlp"), _uniform(0.4 * s), "matrix"),
        "w_out": Spec((L, F, D), ("layer", "mlp", "embed"), zero, "matrix"),
    }
    if c.mlp == "swiglu":
        blocks["w_gate"] = Spec((L, D, F), ("layer", "embed", "mlp"), _uniform(0.4 * s), "matrix")
    if c.resid_scales:
        blocks["resid_scale"] = Spec((L,), ("layer",), ("linear", 1.15, 1.05), "resid")
    if c.x0_scales:
        blocks["x0_scale"] = Spec((L,), ("layer",), ("linear", 0.20, 0.05), "x0")
    if c.value_embeds:
        blocks["value_gate"] = Spec(
            (Lv, VALUE_GATE_CHANNELS, K),
            ("layer", None, "kv_heads"),
            ("uniform", 0.0, 0.02),
            "matrix",
        )
    # a tied table is a head first: what it embeds is normed at once, so its rate can be the head's.
    # New layers add nothing, so at first a token's own logit is D times this scale: so small that
    # nothing is foreseen yet (LOG.md)
    embed = (("normal", 2.5 / D), "head") if c.tied_head else (("normal", 0.8), "embed")
    specs = {"embed": Spec((V, D), ("vocab", "embed"), *embed), "blocks": blocks}
    if not c.tied_head:
        specs["head"] = Spec((D, V), ("embed", "vocab"), ("normal", 0.001), "head")
    if c.value_embeds:
        specs["value_embeds"] = Spec(
            (Lv, V, K, H), ("layer", "vocab", "kv_heads", "head"), _uniform(s), "value_embed"
        )
    if c.smear:
        specs["smear"] = {
            "gate": Spec((SMEAR_CHANNELS,), (None,), ("uniform", 0.0, 0.02), "smear"),
            "scale": Spec((), (), zero, "smear"),
        }
    if c.backout:
        specs["backout"] = Spec((), (), ("constant", 0.2), "smear")
    return specs


def is_spec(x) -> bool:
    return isinstance(x, Spec)


def path_name(path) -> str:
    """A tree path as "blocks.wq"."""
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def named_specs(config: Config) -> list[tuple[str, Spec]]:
    """(name, Spec) of every parameter."""
    flat, _ = jax.tree_util.tree_flatten_with_path(param_specs(config), is_leaf=is_spec)
    return [(path_name(path), spec) for path, spec in flat]


def _init_leaf(key, name: str, spec: Spec):
    # the key depends on the leaf's name alone: adding a part changes no other part
    for letter in name.encode():
        key = jax.random.fold_in(key, letter)
    kind, *args = spec.init
    if kind == "constant":
        return jnp.full(spec.shape, args[0], jnp.float32)
    if kind == "linear":
        first, last = args
        return jnp.linspace(first, last, spec.shape[0], dtype=jnp.float32)
    stacked = spec.axes[:1] == ("layer",)
    shape = spec.shape[1:] if stacked else spec.shape

    def draw(key):
        if kind == "normal":
            return args[0] * jax.random.normal(key, shape)
        return jax.random.uniform(key, shape, minval=args[0], maxval=args[1])

    if not stacked:
        return draw(key)
    # one key per layer: the first layers of a deeper model start like those of a shallower one of
    # the same width
    return jnp.stack([draw(jax.random.fold_in(key, i)) for i in range(spec.shape[0])])


def init_params(key, config: Config) -> dict:
    """Float32 parameters for `config`, a pure function of `key` (a PRNG key or an int seed) and
    each leaf's name.
    """
    key = jax.random.key(key) if isinstance(key, int) else key
    return jax.tree_util.tree_map_with_path(
        lambda path, spec: _init_leaf(key, path_name(path), spec),
        param_specs(config),
        is_leaf=is_spec,
    )


def templates(config: Config) -> dict:
    """ShapeDtypeStructs in the shape of the parameters: nothing is allocated."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), param_specs(config), is_leaf=is_spec
    )


def count_params(config: Config) -> dict[str, int]:
    """Parameter counts by part: embed, value_embeds, head, blocks (matrices), scalars, total."""
    counts = dict(embed=0, value_embeds=0, head=0, blocks=0, scalars=0)
    part = {"embed": "embed", "value_embed": "value_embeds", "head": "head", "matrix": "blocks"}
    for spec in jax.tree.leaves(param_specs(config), is_leaf=is_spec):
        counts[part.get(spec.group, "scalars")] += math.prod(spec.shape)
    return counts | {"total": sum(counts.values())}


def unstack(params, config: Config):
    """The same parameters with blocks as a list of one dict per layer and value_embeds as {layer:
    table}.

    Split, not indexed: its gradient is one concatenation rather than a padded sum per layer.
    """

    def split(stack):
        return [part[0] for part in jnp.split(stack, stack.shape[0])]

    parts = {name: split(stack) for name, stack in params["blocks"].items()}
    gates = dict(zip(config.value_layers, parts.pop("value_gate", [])))
    blocks = [{name: part[i] for name, part in parts.items()} for i in range(config.n_layer)]
    for i, gate in gates.items():
        blocks[i]["value_gate"] = gate
    tables = {}
    if config.value_embeds:
        tables = dict(zip(config.value_layers, split(params["value_embeds"])))
    return params | {"blocks": blocks, "value_embeds": tables}
