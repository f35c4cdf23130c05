"""The estimate of a step's memory, and the choice of a layout that rests on it."""

import jax

from lib.config import Config
from lib.preflight.memory import estimate_memory
from lib.train.step import init_state

TINY = Config(
    vocab_size=100,
    sequence_len=64,
    n_layer=2,
    n_embd=32,
    n_head=2,
    n_kv_head=1,
    head_dim=16,
    mlp_dim=64,
    microbatch=2,
    total_batch_size=256,
    num_steps=20,
    warmup_steps=4,
    loss_chunk=64,
)


def test_memory_estimate_counts_what_is_stored():
    state = init_state(TINY)
    estimate = estimate_memory(TINY)
    assert estimate["parameters"] == sum(a.nbytes for a in jax.tree.leaves(state.params))
    assert estimate["optimizer"] == sum(a.nbytes for a in jax.tree.leaves(state.opt_state))
    assert estimate_memory(TINY.replace(remat="layer"))["activations"] < estimate["activations"]
