"""Weights and configs to and from nanochat's: the same numbers under its names and layouts."""

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


def _check_convertible(config: Config):
    """UserError where a part of the model is none of nanochat's."""
    fixed = dict(
        mlp="relu2",
        mlp_dim=4 * config.n_embd,
        head_dim=config.n_embd // config.n_head,
        rope_base=100_000.0,
        qk_norm=True,
        qk_scale=1.2,
        softcap=15.0,
        resid_scales=True,
        x0_scales=True,
        value_embeds=True,
        smear=True,
        backout=True,
        tied_head=False,
        embed_norm=True,
        norm_eps=2.0**-23,
    )
    for field, value in fixed.items():
        ours = getattr(config, field)
        if ours != value:
            raise UserError(
                f"nanochat has no model with {field}={ours}: only {field}={value} converts"
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
    rows = [
        row("transformer.wte.weight", "embed"),
        row("lm_head.weight", "head", linear=True),
        row("smear_gate.weight", "smear.gate", linear=True),
        row("smear_lambda", "smear.scale"),
        row("backout_lambda", "backout"),
        row("resid_lambdas", "blocks.resid_scale"),
        row("x0_lambdas", "blocks.x0_scale"),
    ]
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
        array = _numpy(arrays[name])
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
