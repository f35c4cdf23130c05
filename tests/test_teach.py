"""The phases that 04's forms ask for."""

import pytest

from lib import teach
from lib.config import Config
from lib.train.finetune import MIXTURES

DEMO = Config.preset("cpu_demo")


@pytest.mark.parametrize(
    "source, kind", [("stdlib", "embedded"), ("notes/*.md", "embedded"), ("climbmix", "nanochat")]
)
def test_mixtures_go_with_the_models_text(source, kind):
    asked = dict(mid=("auto", 1.0, 0.0), sft=("auto", 1.0, 0.0))
    phases = teach.open_phases(source, DEMO, "refuse", **asked)
    wanted = [(stage, MIXTURES[f"{kind}_{stage}"]) for stage in asked]
    assert [(phase.stage, phase.mixture) for phase in phases] == wanted


@pytest.mark.parametrize(
    "preset, shares", [("cpu_demo", [0.25, 0.08]), ("colab_free_v5e", [1.0, 0.3])]
)
def test_rates_go_with_the_size_of_the_batches(preset, shares):
    asked = dict(mid=("auto", 1.0, 0.0), sft=("auto", 1.0, 0.0))
    phases = teach.open_phases("stdlib", Config.preset(preset), "refuse", **asked)
    assert [phase.lr for phase in phases] == shares


def test_what_is_asked_of_a_phase_is_taken():
    (phase,) = teach.open_phases(
        "stdlib", DEMO, "skip", mid=("none", 1.0, 0.0), sft=("spelling", 2.0, 0.7)
    )
    assert (phase.stage, phase.mixture) == ("sft", {"spelling": 1.0})
    assert (phase.epochs, phase.lr, phase.bad_lines) == (2.0, 0.7, "skip")
