"""The dial against the reference's scaling rules, and the sentence that each bad value gets."""

import math
import os
import re

import jax
import pytest

from lib.config import PRESETS, Config, divisible_batch
from lib.files import UserError
from lib.params import count_params
from lib.preflight.memory import choose_layout
from tests.helpers.golden import load

SCALING = load("scaling.json")
NAMES = {"target_param_data_ratio": "tokens_per_param"}


@pytest.mark.parametrize("case", [k for k in SCALING if k != "base_train_defaults"])
def test_one_dial_derives_what_the_reference_derives(case):
    want = SCALING[case]
    c = Config.from_depth(
        want["depth"], **{NAMES.get(k, k): v for k, v in want["overrides"].items()}
    )
    assert (c.n_layer, c.n_embd, c.n_head, c.n_kv_head, c.head_dim) == tuple(
        want[k] for k in ("n_layer", "n_embd", "n_head", "n_kv_head", "head_dim")
    )
    assert list(c.windows) == [left for left, _ in want["window_sizes"]]
    assert (c.scaling_params, c.flops_per_token) == (
        want["scaling_params"],
        want["estimate_flops_per_token"],
    )
    assert (c.target_tokens, c.reference_tokens) == (want["target_tokens"], want["D_ref"])
    assert (c.total_batch_size, c.num_steps) == (want["total_batch_size"], want["num_iterations"])
    assert c.batch_lr_scale == pytest.approx(want["batch_lr_scale"], rel=1e-9)
    assert c.scaled_weight_decay == pytest.approx(want["weight_decay_scaled"], rel=1e-9)
    counts, theirs = count_params(c), want["param_counts"]
    assert (
        counts["embed"],
        counts["value_embeds"],
        counts["head"],
        counts["blocks"],
        counts["scalars"],
        counts["total"],
    ) == tuple(
        theirs[k]
        for k in ("wte", "value_embeds", "lm_head", "transformer_matrices", "scalars", "total")
    )


def test_both_sides_of_the_dial_meet():
    assert Config.from_heads(6) == Config.from_depth(12)
    wide = Config.from_heads(4, head_dim=256, aspect_ratio=64)
    assert (wide.n_embd, wide.n_layer, wide.n_head) == (1024, 16, 4)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_take_overrides(name):
    c = Config.preset(name, seed=7)
    assert c.seed == 7 and c.total_batch_size % (c.microbatch * c.sequence_len) == 0
    assert Config.from_dict(c.to_dict()) == c


def test_every_part_of_the_model_is_used_by_some_preset():
    configs = [Config.preset(name) for name in PRESETS]
    for part in (
        "qk_norm",
        "resid_scales",
        "x0_scales",
        "value_embeds",
        "smear",
        "backout",
        "tied_head",
    ):
        assert {getattr(c, part) for c in configs} == {True, False}, part
    assert {c.mlp for c in configs} == {"relu2", "gelu", "swiglu"} and {
        c.optimizer for c in configs
    } == {"muon", "adamw"}
    assert {c.n_head == c.n_kv_head for c in configs} == {True, False} and {
        c.window_pattern for c in configs
    } == {"SSSL", "L"}
    assert {c.head_dim for c in configs} >= {128, 256} and {c.softcap for c in configs} == {
        0.0,
        15.0,
    }


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_files_round_trip(tmp_path, suffix):
    c = Config.from_depth(4, mlp="swiglu", softcap=0, num_steps=3)
    c.save(tmp_path / f"config.{suffix}")
    assert Config.load(tmp_path / f"config.{suffix}") == c


@pytest.mark.parametrize("text", ["", "[1]", "{not json", '{"n_layers": 3}', "[" * 100_000])
def test_a_foreign_file_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError):
        Config.load(tmp_path / "config.json")
    with pytest.raises(UserError, match="no config at"):
        Config.load(tmp_path / "elsewhere.json")
    # nobody writes into this pipe: opening it would wait for ever
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="no ordinary file"):
        Config.load(tmp_path / "pipe.json")


BAD = {
    "unknown field": (lambda: Config.from_depth(4, n_layers=2), "n_layers.*choose one of.*n_layer"),
    "unknown preset": (lambda: Config.preset("huge"), "'huge'.*cpu_demo"),
    "unknown mlp": (lambda: Config(mlp="relu"), "relu2"),
    "unknown optimizer": (lambda: Config(optimizer="sgd"), "muon"),
    "unknown attention": (lambda: Config(attention="flash"), "flash.*splash"),
    "unknown dtype": (lambda: Config(compute_dtype="fp8"), "bfloat16"),
    "unknown remat": (lambda: Config(remat="all"), "layer"),
    "wrong type": (lambda: Config(n_layer=2.5), "n_layer must be int"),
    "boolean for a count": (lambda: Config(n_layer=True), "n_layer must be int"),
    "text for a number": (lambda: Config(matrix_lr="fast"), "matrix_lr must be float"),
    "zero": (lambda: Config(n_layer=0), "n_layer must be at least 1"),
    "heads that don't divide": (
        lambda: Config(n_head=6, n_kv_head=4),
        "n_kv_head=4.*n_head=6.*use n_kv_head=3",
    ),
    "odd head width": (lambda: Config(head_dim=127), "use 128"),
    "window letters": (lambda: Config(window_pattern="SXL"), "S .short. and L .long."),
    "batch that doesn't divide": (
        lambda: Config(total_batch_size=500_000),
        "500000.*use total_batch_size=499712",
    ),
    "rows that a kernel can't take": (
        lambda: Config(attention="splash", sequence_len=1000, total_batch_size=4000),
        "multiple of 128.*use sequence_len=1024",
    ),
    "too narrow for the gates": (lambda: Config(n_embd=16), "n_embd=16.*24 channels"),
    "layers beyond count": (lambda: Config(n_layer=10**8), "n_layer=100000000.*10000"),
    "a dial beyond count": (lambda: Config.from_depth(10**8), "n_layer=100000000.*10000"),
    "heads beyond count": (
        lambda: Config(n_head=10**9, n_kv_head=10**9 - 1),
        "use n_kv_head=500000000",
    ),
    "not a number": (lambda: Config(matrix_lr=math.nan), "matrix_lr must be a finite number"),
    "rows for a kernel that holds whole heads": (
        lambda: Config(attention="pallas", sequence_len=16500, total_batch_size=66000),
        "multiple of 128.*use sequence_len=16384",
    ),
    "heads of no width": (lambda: Config.from_depth(2, head_dim=0), "head_dim must be at least 1"),
    "no rows": (lambda: Config.preset("nanochat_d12", microbatch=0), "microbatch must be at"),
    "no batch": (lambda: Config.from_depth(2, total_batch_size=0), "total_batch_size must be at"),
    "no horizon": (
        lambda: Config.preset("nanochat_d12", tokens_per_param=0),
        "tokens_per_param must be above 0",
    ),
    "positions that do not turn": (lambda: Config(rope_base=0.0), "rope_base must be above 0"),
    "scores of nothing": (lambda: Config(qk_scale=0.0), "qk_scale must be above 0"),
    "rates that go up the loss": (lambda: Config(final_lr_frac=-1.0), "final_lr_frac must be 0 or"),
    "weights that grow": (lambda: Config(weight_decay=-1.0), "weight_decay must be 0 or more"),
    "no depth": (lambda: Config.from_depth(0), "depth must be at least 1"),
    "no heads": (lambda: Config.from_heads(0), "n_head must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_get_one_sentence(case):
    make, sentence = BAD[case]
    with pytest.raises(UserError, match=sentence) as e:
        make()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("ways", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("grow", [False, True])
def test_advice_for_several_devices_holds_at_once(ways, grow):
    """Whatever the batch is, after one change nothing is left to complain about."""
    for microbatch, accumulate in ((1, 1), (4, 2), (4, 3), (6, 5), (7, 1)):
        rows = microbatch * accumulate
        config = Config(sequence_len=64, microbatch=microbatch, total_batch_size=64 * rows)
        changed = config.replace(**divisible_batch(config, ways, grow))
        assert divisible_batch(changed, ways, grow) == {}
        assert changed.total_batch_size // 64 % ways == 0
        assert grow or changed.microbatch % ways == 0


def test_advice_for_three_devices_is_the_least_change():
    config = Config(sequence_len=64, microbatch=4, total_batch_size=512)
    assert divisible_batch(config, 3, grow=True) == {"total_batch_size": 768}
    assert divisible_batch(config, 3) == {"microbatch": 6, "total_batch_size": 384}
    assert divisible_batch(config.replace(total_batch_size=768), 3) == {"microbatch": 3}
    # rows in sixes and in ninths are rows in eighteens
    config = Config(sequence_len=64, microbatch=6, total_batch_size=24 * 64)
    assert divisible_batch(config, 9, grow=True) == {"total_batch_size": 18 * 64}


@pytest.mark.parametrize("grow", [False, True])
def test_taking_the_advice_of_a_mesh_leads_out_of_the_circle(grow):
    config = Config(sequence_len=64, microbatch=4, total_batch_size=512)
    with pytest.raises(UserError, match="cannot be split over 3 devices") as told:
        choose_layout(config, "dp", {"data": 3}, grow=grow)
    advice = re.findall(r"(\w+)=(\d+)", str(told.value).split(": use ")[1])
    config = config.replace(**{name: int(value) for name, value in advice})
    # what is left to say is that this machine has not so many
    with pytest.raises(UserError, match="needs 3 devices"):
        choose_layout(config, "dp", {"data": 3}, grow=grow)


def test_a_config_is_static_and_hashable():
    assert hash(Config.from_depth(4)) == hash(Config.from_depth(4))
    assert Config.from_depth(4).replace(seed=1) != Config.from_depth(4)
    assert jax.tree.leaves(Config.from_depth(4)) == [], "no leaf of a pytree: static under jit"
    assert math.isclose(Config(total_batch_size=2**17).batch_lr_scale, 0.5)


def test_a_short_window_is_rounded_up_to_whole_tiles():
    config = Config(sequence_len=1088, microbatch=1, total_batch_size=1088)
    assert config.windows[0] == 384, "a quarter is 272"
