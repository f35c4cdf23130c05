"""Weights and configs to and from nanochat's: the same numbers under its names and layouts.

Its model has changed over time. Three forms of it are known here (`FORMS`): that of March 2026 and
later, the first one (published as d20 and d32), and the first one with scales on its stream.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lib.config import REFERENCE_BATCH, Config
from lib.files import UserError, choose
from lib.params import is_spec, param_specs

GPT_CONFIG = (
    "sequence_len",
    "vocab_size",
    "n_layer",
    "n_head",
    "n_kv_head",
    "n_embd",
    "window_pattern",
)


def config_from_nanochat(config: dict) -> Config:
    """The Config of a nanochat model, from its GPTConfig as a dict; training fields keep their
    defaults as far as they divide.
    """
    for name in config:
        choose("nanochat config field", name, GPT_CONFIG)
    # every field, or sizes would be guessed
    missing = [name for name in GPT_CONFIG if name not in config]
    if missing:
        raise UserError(
            f"the nanochat config lacks {', '.join(missing)}: pass every field of its GPTConfig"
        )
    width, heads, length = config["n_embd"], config["n_head"], config["sequence_len"]
    if width % heads:
        raise UserError(f"nanochat config: n_embd={width} is not a multiple of n_head={heads}")
    # about the reference's tokens a step, in whole microbatches
    rows = max(1, REFERENCE_BATCH // length // Config.microbatch) * Config.microbatch
    return Config(
        **config, head_dim=width // heads, mlp_dim=4 * width, total_batch_size=rows * length
    )


# what all of nanochat's models have
ALWAYS = dict(
    mlp="relu2",
    qk_norm=True,
    softcap=15.0,
    tied_head=False,
    embed_norm=True,
    norm_eps=2.0**-23,
)
# name of a form: what else it is, field by field
_new = dict(
    rope_base=100_000.0,
    qk_scale=1.2,
    resid_scales=True,
    x0_scales=True,
    value_embeds=True,
    smear=True,
    backout=True,
)
_first = dict.fromkeys(_new, False) | dict(rope_base=10_000.0, qk_scale=1.0)
FORMS: dict[str, dict[str, Any]] = {
    "new": _new,
    "first": _first,
    "scaled": _first | dict(resid_scales=True, x0_scales=True),
}


def form_of(names) -> str:
    """Which of FORMS a state dict of these names is; UserError for those between them."""
    if "smear_lambda" in names:
        return "new"
    if any(name.startswith(("value_embeds.", "value_embed.")) for name in names):
        raise UserError(
            "this nanochat model is of January to March 2026, between two forms that are known "
            "here: its gates, windows and scales are others; train it with the code of its date"
        )
    return "scaled" if "resid_lambdas" in names else "first"


def read_config(settings: dict, state_dict: dict) -> Config:
    """The Config of a nanochat model of any form, from its GPTConfig and its state dict."""
    form = form_of({name.removeprefix("_orig_mod.") for name in state_dict})
    if form == "new":
        return config_from_nanochat(settings)
    # models older than short windows have no word for them
    config = config_from_nanochat({"window_pattern": "L"} | settings).replace(**FORMS[form])
    if set(config.window_pattern) != {"L"}:
        raise UserError(
            f"this nanochat model of January 2026 has window_pattern={config.window_pattern}: its "
            "short windows are half of the context, ours a quarter"
        )
    return config


def _check_convertible(config: Config):
    """UserError where a part of the model is none of nanochat's, in the form that comes nearest."""

    def against(form: str) -> dict[str, Any]:
        """The fields that are otherwise, with the value that the form has."""
        sizes = dict(mlp_dim=4 * config.n_embd, head_dim=config.n_embd // config.n_head)
        fixed = ALWAYS | sizes | FORMS[form]
        return {name: value for name, value in fixed.items() if getattr(config, name) != value}

    nearest = min(map(against, FORMS), key=len)
    for field, value in nearest.items():
        raise UserError(
            f"nanochat has no model with {field}={getattr(config, field)}: only {field}={value} "
            "converts"
        )


def _layout(config: Config) -> list[tuple]:
    """(nanochat's name, its shape, path in our parameters, index into that stack, whether outputs
    by inputs).
    """
    _check_convertible(config)
    specs = param_specs(config)

    def row(name, path, at: Any = ..., linear=False):
        spec = _get(specs, path)
        shape = spec.shape if at is ... else spec.shape[1:]
        if linear:
            theirs = math.prod(shape[spec.n_in :]), math.prod(shape[: spec.n_in])
        else:
            theirs = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else shape or (1,)
        return name, theirs, path, at, linear

    # the tables, then what stands outside the layers
    rows = [row("transformer.wte.weight", "embed"), row("lm_head.weight", "head", linear=True)]
    if config.smear:
        rows.append(row("smear_gate.weight", "smear.gate", linear=True))
        rows.append(row("smear_lambda", "smear.scale"))
    if config.backout:
        rows.append(row("backout_lambda", "backout"))
    if config.resid_scales:
        rows.append(row("resid_lambdas", "blocks.resid_scale"))
    if config.x0_scales:
        rows.append(row("x0_lambdas", "blocks.x0_scale"))
    # the matrices of each layer
    matrices = {
        "attn.c_q": "wq",
        "attn.c_k": "wk",
        "attn.c_v": "wv",
        "attn.c_proj": "wo",
        "mlp.c_fc": "w_in",
        "mlp.c_proj": "w_out",
    }
    for i in range(config.n_layer):
        rows += [
            row(f"transformer.h.{i}.{name}.weight", f"blocks.{ours}", i, linear=True)
            for name, ours in matrices.items()
        ]
    # the tables and gates of those layers that have value embeddings
    for at, i in enumerate(config.value_layers):
        rows += [
            row(f"value_embeds.{i}.weight", "value_embeds", at),
            row(f"transformer.h.{i}.attn.ve_gate.weight", "blocks.value_gate", at, linear=True),
        ]
    return rows


def _get(tree, path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tree


def _numpy(array) -> np.ndarray:
    if hasattr(array, "detach"):  # torch; numpy knows no bfloat16 of its own
        array = array.detach().cpu().float().numpy()
    return np.asarray(array, np.float32)


def _padded(array: np.ndarray, shape: tuple, config: Config) -> np.ndarray:
    """A table with rows for the vocabulary's padding, which the first models do not have."""
    if array.shape[:1] == (config.vocab_size,) and shape[:1] == (config.padded_vocab,):
        return np.pad(array, [(0, config.padded_vocab - config.vocab_size), (0, 0)])
    return array


def from_nanochat(state_dict: dict, config: Config) -> dict:
    """Our parameters from a nanochat state dict of numpy, torch or jax arrays, compiled
    ("_orig_mod.") or not.
    """
    arrays = {name.removeprefix("_orig_mod."): array for name, array in state_dict.items()}

    # all of them and no other
    layout = _layout(config)
    missing = {row[0] for row in layout} - set(arrays)
    unexpected = set(arrays) - {row[0] for row in layout}
    for kind, names in (("lacks", missing), ("holds unexpected", unexpected)):
        if names:
            raise UserError(
                f"the nanochat state dict {kind} {', '.join(sorted(names)[:5])} ({len(names)} in "
                "all): check that the config is that model's"
            )
    # empty parameters, filled tensor by tensor
    params = jax.tree.map(
        lambda spec: np.empty(spec.shape, np.float32), param_specs(config), is_leaf=is_spec
    )
    for name, shape, path, at, linear in layout:
        array = _padded(_numpy(arrays[name]), shape, config)
        if array.shape != shape:
            raise UserError(
                f"{name} of the nanochat state dict has shape {array.shape} where the config asks "
                f"for {shape}: check that the config is that model's"
            )
        leaf = _get(params, path)
        leaf[at] = (array.T if linear else array).reshape(leaf[at].shape)
    return jax.tree.map(jnp.asarray, params)


def to_nanochat(params: dict, config: Config) -> dict[str, np.ndarray]:
    """The nanochat state dict of our parameters, which `from_nanochat` turns back into them."""
    out = {}
    for name, shape, path, at, linear in _layout(config):
        array = np.asarray(_get(params, path))[at]
        out[name] = np.ascontiguousarray(
            array.reshape(shape[::-1]).T if linear else array.reshape(shape)
        )
    return out
