"""The estimate of a step's memory, and the choice of a layout that rests on it."""

import types
from typing import Any

import jax
import pytest

from lib.chips import rented
from lib.config import Config
from lib.params import count_params
from lib.preflight import memory
from lib.preflight.compile import for_tpu
from lib.preflight.estimate import estimate
from lib.preflight.memory import estimate_memory
from lib.train.step import init_state, state_template

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


def test_memory_by_hand():
    """Rows of 64 tokens in float32, two at a time, twice a step: 128 tokens."""
    config = TINY.replace(vocab_size=256, loss_chunk=128)
    products = 32 + (2 + 2) * 16 + 32 + 64  # a layer's input, heads, what was attended, the mlp's
    whole = 2 * (products + 32 + 64)
    lines = 16  # of the one layer that has value embeddings
    kept = 4 * 32 + lines
    table, head, blocks = (
        count_params(config)[part] for part in ("value_embeds", "head", "blocks")
    )
    logits = 128 * 256  # a chunk's
    of_a_microbatch = blocks + head

    def numbers(**changes):
        parts = estimate_memory(config.replace(**changes))
        assert parts["gradients"] == parts["parameters"]
        return parts["activations"] / 4

    # both layers differ, so nothing is scanned: what products read and make
    unscanned = products + 2 * 32 + (2 + 2) * 16
    assert numbers() == 128 * (2 * unscanned + kept) + table + logits + head
    assert numbers(remat="dots") == 128 * (2 * products + kept + whole) + table + of_a_microbatch
    assert numbers(remat="layer") == 128 * (2 * 32 + kept + whole) + table + of_a_microbatch

    # four equal ones in two groups are scanned, and all of a layer is stacked
    scanned = dict(n_layer=4, window_pattern="L")
    more = count_params(config.replace(**scanned))["value_embeds"]
    assert numbers(**scanned) == 128 * (4 * whole + kept + lines) + more + logits + head

    # a step of one microbatch needs neither turned tables nor gradients beside their sum
    assert numbers(microbatch=4) == 256 * (2 * unscanned + kept) + logits
    assert numbers(microbatch=4, remat="dots") == 256 * (2 * products + kept + whole)

    # in bfloat16 half of all that but the head's gradient, and matrices once more in it
    assert 2 * numbers(compute_dtype="bfloat16") == numbers() + head + of_a_microbatch


def test_what_fills_more_than_nine_tenths_is_split_further(monkeypatch):
    monkeypatch.setattr(memory.jax, "device_count", lambda: 8)
    monkeypatch.setattr(memory, "_lay_out", lambda config, strategy, *_: (config, strategy))
    monkeypatch.setattr(memory, "_need", lambda *_: (90, "90 bytes"))
    assert memory.choose_layout(TINY, memory=100)[1] == "zero"
    assert memory.choose_layout(TINY, memory=99)[1] == "fsdp"


def test_what_is_given_back_is_held_once():
    sizes = types.SimpleNamespace(
        temp_size_in_bytes=100,
        argument_size_in_bytes=50,
        output_size_in_bytes=50,
        alias_size_in_bytes=40,
    )
    assert memory.peak_bytes(types.SimpleNamespace(memory_analysis=lambda: sizes)) == 160


# rows over two pairs of devices, each layer over the two of a pair
BOTH = "data=2 tensor=2"

PLAIN = dict(remat="dots", microbatch=8, total_batch_size=2**15, value_embeds=False)

# GiB at the peak of each device as libtpu 0.0.52 compiled the step (bfloat16, Muon, T 2048):
# depth, chip, strategy, mesh, what differs from Config.from_depth, GiB
COMPILED = [
    (4, "v6e-1", "dp", "", {}, 0.994),
    (8, "v6e-1", "dp", "", dict(remat="dots"), 3.007),
    (8, "v6e-4", "zero", "", dict(remat="dots", microbatch=16), 2.371),
    (8, "v6e-4", "fsdp", "", dict(remat="dots", microbatch=16), 1.514),
    (12, "v6e-1", "dp", "", dict(value_embeds=False), 6.098),
    (12, "v6e-1", "dp", "", dict(remat="dots"), 6.541),
    (20, "v5e-1", "dp", "", dict(remat="layer", microbatch=1), 14.95),
    (20, "v5e-1", "dp", "", dict(remat="layer", microbatch=2), 15.53),
    (20, "v5e-1", "dp", "", dict(remat="dots", microbatch=1), 15.48),
    (20, "v6e-1", "dp", "", dict(remat="dots"), 19.11),
    (20, "v6e-1", "dp", "", dict(remat="dots", scan_layers=False, loss_chunk=8192), 19.00),
    (24, "v6e-1", "dp", "", dict(remat="dots"), 28.68),
    (24, "v6e-1", "dp", "", dict(remat="dots", scan_layers=False, loss_chunk=4096), 28.12),
    (32, "v6e-8", "fsdp", "", dict(remat="dots", microbatch=32), 17.31),
    (32, "v6e-8", "fsdp", "", dict(remat="layer", microbatch=32), 9.370),
    (4, "v6e-4", "tp", BOTH, dict(microbatch=4, total_batch_size=2**15), 0.577),
    (8, "v6e-4", "tp", "", dict(total_batch_size=2**15), 1.885),
    (8, "v6e-4", "tp", "", dict(remat="dots", microbatch=16, total_batch_size=2**16), 2.529),
    (8, "v6e-4", "tp", BOTH, dict(remat="layer", microbatch=8, total_batch_size=2**15), 1.409),
    (12, "v6e-4", "tp", BOTH, dict(remat="dots", microbatch=8, total_batch_size=2**15), 3.572),
    (16, "v6e-8", "tp", "", dict(remat="dots", microbatch=8, total_batch_size=2**15), 3.857),
    (16, "v6e-4", "zero", "", dict(remat="dots", microbatch=16), 9.375),
    (16, "v6e-4", "fsdp", "", dict(remat="dots", microbatch=16, value_embeds=False), 4.035),
    (16, "v6e-4", "tp", BOTH, PLAIN, 3.875),
    (20, "v6e-4", "tp", BOTH, dict(remat="dots", microbatch=8, total_batch_size=2**15), 9.928),
    (24, "v6e-4", "tp", "", dict(remat="dots", microbatch=8, total_batch_size=2**15), 11.60),
    (32, "v6e-8", "tp", "", dict(remat="layer", microbatch=8, total_batch_size=2**15), 11.64),
]


def test_what_is_brought_together_is_counted_where_parts_are_held():
    """By four devices with a row each: a table, a layer and its gradient, but none turned."""
    many = TINY.replace(vocab_size=1024, microbatch=4, total_batch_size=512)
    fsdp, zero = (estimate(many, rented("v6e-4"), strategy).memory for strategy in ("fsdp", "zero"))
    assert fsdp["gradients"] == zero["gradients"] // 4
    turned, blocks = (4 * count_params(many)[part] for part in ("value_embeds", "blocks"))
    # 1,024 tokens of 32 numbers each, and one of two layers
    together = 4 * 1024 * 32 + 2 * blocks // 2
    assert fsdp["activations"] == zero["activations"] - turned + together

    # of four equal layers a scan takes two at once
    scanned = many.replace(n_layer=4, window_pattern="L")
    [parts, whole] = (memory.working_bytes(scanned, fsdp=n)["activations"] for n in (2, 1))
    turned, blocks = (4 * count_params(scanned)[part] for part in ("value_embeds", "blocks"))
    assert parts == whole - turned + 4 * 1024 * 32 + 2 * blocks // 2


@pytest.mark.parametrize("remat", ["none", "dots", "layer"])
def test_devices_that_share_a_layer_hold_one_stream_more(remat):
    config = TINY.replace(remat=remat)
    [alone, shared] = (memory.working_bytes(config, tensor=n)["activations"] for n in (1, 2))
    assert shared - alone == 128 * 2 * 32 * 4


def test_a_share_of_a_tensor_axis_is_a_model_with_fewer_heads_and_a_narrower_mlp():
    """What is split is halved; the embedding, the head and the stream stay whole."""
    wide = TINY.replace(n_kv_head=2)
    share = memory.config_of_share(wide, rows=2, tensor=2)
    assert (share.n_head, share.n_kv_head, share.mlp_dim, share.n_embd) == (1, 1, 32, 32)
    assert (share.microbatch, share.accumulate) == (1, wide.accumulate)
    # 64 tokens, of which the loss reads half on each device
    assert share.loss_chunk == 32

    held = estimate(wide, rented("v6e-4"), "tp", dict(data=2, tensor=2)).memory
    counts = count_params(wide)
    whole, split = counts["embed"] + counts["head"], counts["value_embeds"] + counts["blocks"]
    assert held["parameters"] == 4 * (whole + counts["scalars"] + split // 2)


@pytest.mark.parametrize(("depth", "chip", "strategy", "mesh", "fields", "gib"), COMPILED)
def test_the_estimate_is_within_a_tenth_of_what_was_compiled(
    depth, chip, strategy, mesh, fields, gib
):
    config = for_tpu(Config.from_depth(depth, **fields))
    report = estimate(config, rented(chip), strategy, memory.parse_mesh(mesh))
    assert abs(report.peak / 2**30 / gib - 1) < 0.10
    assert report.peak == sum(report.memory.values())


def test_zero_counts_gathered_updates_where_little_else_is_held(monkeypatch):
    """One row of 64 tokens: all updates beside the parameters are then the peak."""
    one_row = TINY.replace(microbatch=4, total_batch_size=256, vocab_size=50_000, loss_chunk=1)
    config = for_tpu(one_row, kernels=False)
    zero, dp = (estimate(config, rented("v6e-4"), strategy) for strategy in ("zero", "dp"))
    parameters = zero.memory["parameters"]
    assert dp.memory["gradients"] == parameters
    held = zero.memory["gradients"] + zero.memory["activations"]
    assert held == parameters + parameters // 4
    assert held > parameters + zero.memory["activations"]

    # and so does the choice between zero and fsdp, which asks with a layout
    monkeypatch.setattr(memory, "state_template", lambda config, layout: state_template(config))
    layout: Any = types.SimpleNamespace(
        strategy="zero", size=lambda *axes: 4 if "data" in axes else 1
    )
    assert memory.estimate_memory(config, layout)["gradients"] == zero.memory["gradients"]
