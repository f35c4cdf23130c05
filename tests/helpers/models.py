"""Small models of every kind, every weight random, and a tokenizer of their size."""

import functools

import jax

from lib.config import Config
from lib.data.sources import documents
from lib.data.tokenizer import Tokenizer
from lib.params import init_params

SIZES = dict(
    sequence_len=256,
    n_layer=4,
    n_embd=64,
    n_head=4,
    n_kv_head=2,
    head_dim=16,
    mlp_dim=128,
    microbatch=1,
    total_batch_size=256,
    num_steps=1,
    scan_layers=False,
)
SCALED = dict(resid_scales=True, qk_scale=1.2)
# name: (preset, what is other than in the preset)
KINDS = {
    "llama": ("llama_like", {}),
    "llama, scaled": ("llama_like", SCALED),
    "gpt2": ("gpt2_like", {}),
    "arcee": ("gpt2_like", dict(mlp="relu2", tied_head=False, **SCALED)),
    "qwen3": ("llama_like", dict(qk_norm=True, window_pattern="SSSL", **SCALED)),
    "nanochat": ("gpt2_like", dict(mlp="relu2", qk_norm=True, softcap=15.0, resid_scales=True)),
    "whole": ("nanochat_d12", {}),
    "whole, swiglu": ("nanochat_d12", dict(mlp="swiglu", tied_head=True, softcap=0.0)),
}


@functools.cache
def tokenizer() -> Tokenizer:
    """One of 700 ids, which is no multiple of 64: the vocabulary is padded."""
    return Tokenizer.train(documents("stdlib", "train"), 700, max_chars=300_000)


def config_of(kind: str, **changes) -> Config:
    preset, own = KINDS[kind]
    sizes = SIZES | dict(vocab_size=700)
    return Config.from_dict(Config.preset(preset).to_dict() | sizes | own | changes)


def random_params(config: Config, seed: int = 1):
    """Every weight random, so that no part is idle. The stream's scales: near 1, one negative."""
    leaves, tree = jax.tree.flatten(init_params(0, config))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [0.15 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    params = jax.tree.unflatten(tree, leaves)
    if config.resid_scales:
        scales = 1 + params["blocks"]["resid_scale"]
        params["blocks"]["resid_scale"] = scales.at[1].multiply(-1)
    return params
