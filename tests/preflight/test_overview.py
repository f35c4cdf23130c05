"""What is printed of a training before it is compiled."""

import jax
import pytest

from lib.config import Config
from lib.parallel.layout import make_layout
from lib.preflight.overview import memory_line, print_overview, shape_lines
from lib.preflight.plan import Payment

CONFIG = Config.preset("cpu_demo", num_steps=100)


def device(kind, platform, count=1):
    return dict(kind=kind, platform=platform, count=count, memory=16 * 2**30, flops=None)


def test_a_device_that_is_not_in_the_table_has_no_time(capsys):
    plan, memory = print_overview(CONFIG, None, device("cpu", "cpu"), Payment())
    text = capsys.readouterr().out
    assert plan.hours is None and plan.memory_bytes == sum(memory.values())
    assert "time        known after the first steps" in text and "cost" not in text


def test_a_known_one_has_a_bound_a_time_and_a_cost(capsys):
    free = device("TPU v5 lite", "tpu")
    plan, _ = print_overview(CONFIG, None, free, Payment(units=2.0).at("colab"))
    text = capsys.readouterr().out
    assert plan.hours > 0 and plan.units == pytest.approx(2 * plan.hours)
    assert "at best" in text and "of Colab's compute units at 2.00 an hour" in text


def test_the_shape_in_words():
    lines = "\n".join(shape_lines(CONFIG, None))
    tokens = 100 * CONFIG.total_batch_size
    assert f"100 steps x {CONFIG.total_batch_size:,} tokens" in lines
    assert f"= {tokens:,} tokens, {tokens / CONFIG.scaling_params:.1f} per parameter" in lines
    assert f"{CONFIG.flops_per_token * tokens:.3g} FLOPs" in lines
    assert "a device" not in lines

    line = memory_line(dict(parameters=2**30, logits=2**29), 4 * 2**30, None)
    assert line == "memory      parameters 1.00  logits 0.50  = 1.50 GiB estimated, 4.0 GiB there"
    layout = make_layout("dp", CONFIG, jax.devices()[:1])
    rows = f"{CONFIG.microbatch} rows, {CONFIG.microbatch} a device"
    assert rows in "\n".join(shape_lines(CONFIG, layout))
