"""lib/recipes.py: what is trained where nobody said what: preset, text and horizon fit together."""

import pytest

from lib import recipes
from lib.config import PRESETS, Config
from lib.data import SOURCES
from lib.train import changes
from lib.train.finetune import phase_config
from lib.train.optim import compile_key


@pytest.mark.parametrize(
    "platform, kind, count, preset",
    [
        ("cpu", "cpu", 1, "cpu_demo"),
        ("tpu", "TPU v6 lite", 1, "colab_v6e"),
        ("tpu", "TPU v5 lite", 1, "colab_free_v5e"),
        ("tpu", "TPU v5 lite", 8, "colab_v5e"),
        ("gpu", "NVIDIA H200", 1, "gpu"),
        ("gpu", "Tesla T4", 1, "colab_free_t4"),
    ],
)
def test_every_device_gets_a_preset_and_a_reason(platform, kind, count, preset):
    picked, why = recipes.pick_preset(dict(platform=platform, kind=kind, count=count))
    assert picked == preset and picked in PRESETS and why


@pytest.mark.parametrize("preset", PRESETS)
def test_what_suits_a_device_changes_no_result(preset):
    """Only fields with which a run may go on that began without them."""
    gpu, cpu, tpu = (recipes.suited_to(dict(platform=name)) for name in ("gpu", "cpu", "tpu"))
    assert Config.preset(preset, **gpu).scan_layers is False
    assert gpu.keys() | cpu.keys() <= set(changes.HOW)
    assert tpu == {}

    # a CPU compiles one step for pretraining and fine-tuning
    config = Config.preset(preset, **cpu)
    assert compile_key(phase_config(config, 4, 0.5)) == compile_key(config)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("online", [True, False])
def test_every_preset_gets_a_text(preset, online):
    source, why = recipes.pick_text(preset, online)
    assert source in SOURCES and why
    assert online or source == "stdlib"


def test_texts_are_of_presets():
    assert recipes.TEXTS.keys() <= PRESETS.keys()


def test_a_small_text_shortens_the_horizon_to_four_passes():
    config = Config.preset("cpu_demo", num_steps=1000)
    tokens = 100 * config.total_batch_size
    shorter, why = recipes.fit_horizon(config, tokens)
    assert shorter.num_steps == 400 and "400 steps instead of 1,000" in why
    assert recipes.fit_horizon(config, 250 * config.total_batch_size) == (config, "")


def test_shards_hold_the_plan():
    assert recipes.pick_shards("climbmix", 62_500_000) == 1
    assert recipes.pick_shards("climbmix", 62_500_001) == 2
    assert recipes.pick_shards("my/*.txt", 10**12) == 1


def test_the_hub_that_nobody_answers_for_is_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert not recipes.hub_is_reachable(1)
