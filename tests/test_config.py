"""The dial against the reference's scaling rules, and the sentence that each bad value gets."""

import math

import pytest

from lib.config import PRESETS, Config
from lib.files import UserError
from lib.params import count_params
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


@pytest.mark.parametrize("text", ["", "[1]", "{not json", '{"n_layers": 3}'])
def test_a_foreign_file_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError):
        Config.load(tmp_path / "config.json")
    with pytest.raises(UserError, match="no config at"):
        Config.load(tmp_path / "elsewhere.json")


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
    "no depth": (lambda: Config.from_depth(0), "depth must be at least 1"),
    "no heads": (lambda: Config.from_heads(0), "n_head must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_get_one_sentence(case):
    make, sentence = BAD[case]
    with pytest.raises(UserError, match=sentence) as e:
        make()
    assert "\n" not in str(e.value)


def test_a_config_is_static_and_hashable():
    assert hash(Config.from_depth(4)) == hash(Config.from_depth(4))
    assert Config.from_depth(4).replace(seed=1) != Config.from_depth(4)
    assert math.isclose(Config(total_batch_size=2**17).batch_lr_scale, 0.5)
