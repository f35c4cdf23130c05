"""lib/speed.py: counts and bounds by hand; the times themselves are nobody's to test."""

import math
import re

import jax
import pytest

from lib import speed
from lib.chips import V6E, Chip
from lib.config import Config
from lib.files import UserError
from lib.model.attention import ATTENTION
from lib.speed import Attended, MeasuredProduct, Reached

TINY = Config(
    vocab_size=256,
    sequence_len=32,
    n_layer=2,
    n_embd=32,
    n_head=2,
    n_kv_head=1,
    head_dim=16,
    mlp_dim=64,
    microbatch=2,
    total_batch_size=128,
    num_steps=3,
    compute_dtype="float32",
    attention="einsum",
    window_pattern="L",
)


def test_what_was_asked_is_read_before_anything_is_measured():
    assert speed.parse_asked("1 8 64", 0.5) == speed.parse_asked("1,8, 64", 9) == [1, 8, 64]
    for rows in ("", "1 x", "0", "-1", "1.5"):
        with pytest.raises(UserError, match="numbers from 1 on"):
            speed.parse_asked(rows, 0.5)
    for seconds in (0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="above 0"):
            speed.parse_asked("1", seconds)


def test_a_product_counts_two_flops_a_pair():
    assert MeasuredProduct("", "float32", (10, 20, 30), 0.5).flops == 2 * 10 * 20 * 30 / 0.5


def test_the_measured_chip_has_the_best_product_of_its_own_dtype():
    products = [
        MeasuredProduct("slow", "bfloat16", (10, 10, 10), 1.0),
        MeasuredProduct("fast", "bfloat16", (10, 10, 10), 0.5),
        MeasuredProduct("other", "float32", (10, 10, 10), 0.1),
    ]
    ceiling = speed.measured_chip(products, 7.0, "bfloat16")
    assert (ceiling.flops, ceiling.bandwidth) == (4000.0, 7.0)


@pytest.mark.parametrize("mode", ["mixed", "float32", "bfloat16"])
def test_products_are_of_what_training_multiplies(mode, monkeypatch):
    """The mixed mode's are there in it, and only there: of bfloat16, summed in float32."""
    monkeypatch.setattr(speed, "product_shapes", lambda config: {"small": (8, 8, 8)})
    multiplied = {}

    def seconds_of(fn, a, b):
        multiplied[len(multiplied)] = (str(a.dtype), str(b.dtype), str(fn(a, b).dtype))
        return 1.0

    monkeypatch.setattr(speed, "seconds_of", seconds_of)
    config = TINY.replace(compute_dtype=mode)
    measured = [product.dtype for product in speed.products(config)]
    triples = dict(zip(measured, multiplied.values()))
    assert triples["bfloat16"] == ("bfloat16",) * 3 and triples["float32"] == ("float32",) * 3
    assert triples.get("mixed") == (
        ("bfloat16", "bfloat16", "float32") if mode == "mixed" else None
    )
    assert speed.measured_chip(speed.products(config), 1.0, mode).flops == 2 * 8**3


def test_auto_is_measured_as_it_is_trained(monkeypatch):
    auto = TINY.replace(compute_dtype="auto", attention="auto")
    monkeypatch.setattr(speed.train, "for_training", lambda c: c.replace(compute_dtype="mixed"))
    mixed = speed.as_trained(auto)
    assert (mixed.compute_dtype, mixed.attention) == ("mixed", "einsum")
    monkeypatch.setattr(speed.train, "for_training", lambda c: c)
    assert speed.as_trained(auto).compute_dtype == "float32"


def test_each_part_multiplies_what_the_mixed_mode_does():
    for part in speed.parts_of_step(TINY.replace(compute_dtype="mixed")):
        if part.component not in ("attention", "mlp", "head+loss"):
            continue
        text = part.fn.lower(*part.args).as_text()
        operands = re.findall(r"dot_general .*: \(tensor<[\dx]*(\w+)>", text)
        of_bfloat16 = operands.count("bf16")
        # attention sums its gradient's rows in float32
        assert of_bfloat16 >= 3 and operands.count("f32") <= (part.component == "attention")


def test_parts_are_the_step_s_own():
    """Each runs as often as a step does it, and the whole one takes a step."""
    parts = speed.parts_of_step(TINY)
    calls = {part.component: part.calls for part in parts}
    accumulate, layers = 2, 2
    assert TINY.accumulate == accumulate
    assert calls["embedding"] == calls["head+loss"] == accumulate
    assert calls["mlp"] == accumulate * layers and calls["optimizer"] == calls["step"] == 1
    attention = [part.calls for part in parts if part.component == "attention"]
    assert sum(attention) == accumulate * layers

    whole = parts[-1]
    for taken in (1, 2):
        step, metrics = whole.fn(*whole.args)
        assert int(step) == taken and math.isfinite(float(metrics["loss"]))


def test_attention_is_counted_by_its_window():
    """Four layers of a short window to two of the whole row, in two microbatches each."""
    config = TINY.replace(
        n_layer=6, window_pattern="SSL", sequence_len=512, total_batch_size=4 * 512
    )
    attention = [p.calls for p in speed.parts_of_step(config) if p.component == "attention"]
    assert attention == [2 * 4, 2 * 2]


def test_other_is_what_the_parts_leave(monkeypatch):
    seconds = iter([1.0, 2.0, 3.0, 4.0, 5.0, 100.0])  # in the order of parts_of_step
    monkeypatch.setattr(speed, "seconds_of", lambda *args, **kwargs: next(seconds))
    # all windows of so short a row are alike
    reached = {r.component: r for r in speed.components(TINY, V6E)}
    parts = 2 * 1.0 + 4 * 2.0 + 4 * 3.0 + 2 * 4.0 + 5.0
    assert reached["other"].seconds == 100.0 - parts
    assert reached["step"].share == reached["step"].bound / 100.0


def test_advice_is_for_what_loses_most():
    def reached(component, seconds, bound):
        return Reached(component, seconds, bound, "memory", 1.0, 1.0)

    rows = [
        reached("mlp", 3.0, 1.0),
        reached("attention", 10.0, 9.5),
        reached("optimizer", 8.0, 1.0),
        reached("step", 99.0, 1.0),
    ]
    sentences = speed.advice(rows)
    assert [sentence.split(":")[0] for sentence in sentences] == ["optimizer", "mlp"]
    assert "7000.0 ms above its bound" in sentences[0] and "12%" in sentences[0]


def test_attention_that_the_compiler_refuses_is_listed_with_its_reason(monkeypatch):
    def refuse(*args, **kwargs):
        raise UserError("too large\nfor this chip")

    monkeypatch.setitem(ATTENTION, "jax", refuse)
    choices = [("einsum", 0), ("jax", 0), ("einsum", 64)]
    monkeypatch.setattr(speed, "attention_choices", lambda: choices)
    measured = speed.attentions(TINY)
    assert [a.name for a in measured] == ["einsum", "jax"]  # a block of 64 is longer than the row
    assert measured[0].seconds > 0
    assert measured[1] == Attended("jax", 0, 32, None, "too large")


def test_decoding_reads_weights_and_cache():
    (decoded,) = speed.decoding(TINY, [2], tokens=8)
    assert decoded.rows == 2 and decoded.seconds > 0
    layer = 32 * (2 * 32 + 2 * 16) + 2 * 32 * 64
    weights = 4 * (2 * layer + 32 * 256)
    # two rings of 16 + 8 positions for each row and layer, and small gates and scales
    cache = 2 * 4 * 2 * 2 * 24 * 16
    assert weights + cache <= decoded.bytes < 1.2 * (weights + cache)


def test_the_last_figures_are_of_this_chip_and_this_very_config(tmp_path, monkeypatch):
    from lib.files import write_json

    monkeypatch.setattr(speed, "FIGURES", tmp_path)
    assert speed.last_figures(TINY) == {}
    reached = [Reached("mlp", 0.25, 0.1, "memory", 1.0, 1.0)]
    figures = speed.to_dict(Chip("x", 1.0, 2.0, 0), TINY, components=reached)
    write_json(tmp_path / speed.file_name(jax.devices()[0].device_kind), figures)
    assert speed.last_figures(TINY) == {"mlp": 250.0}
    assert speed.last_figures(TINY.replace(mlp_dim=128)) == {}


@pytest.mark.parametrize("kind, name", [("TPU v6 lite", "TPU_v6_lite.json"), ("cpu", "cpu.json")])
def test_the_file_is_named_by_the_chip(kind, name):
    assert speed.file_name(kind) == name
