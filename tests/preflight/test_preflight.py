"""A compiler without a chip says what a step needs; what it does is counted right; plans, prices and searches add up; faults are one sentence."""

import fcntl
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from lib import chips
from lib.config import Config
from lib.files import UserError
from lib.preflight import compile as preflight
from lib.preflight import hlo, roofline
from tests.helpers import ROOT, programs

needs_libtpu = pytest.mark.skipif(
    not preflight.has_libtpu(),
    reason="compiling for a TPU without one needs the preflight extra: pip install libtpu",
)
SMALL = dict(
    vocab_size=512,
    sequence_len=256,
    n_layer=2,
    n_embd=128,
    n_head=1,
    n_kv_head=1,
    head_dim=128,
    mlp_dim=512,
    window_pattern="L",
    microbatch=4,
    total_batch_size=2048,
    optimizer="adamw",
    value_embeds=False,
    smear=False,
    backout=False,
    attention="splash",
    compute_dtype="bfloat16",
    remat="dots",
    loss_chunk=256,
)


def python(*args, **env):
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=300,
    )


@needs_libtpu
def test_the_real_step_compiles_for_four_chips_and_too_much_is_named():
    done = programs.run("compile_small", json.dumps(SMALL), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    unknown, shape, four, too_big, decode, (cores, v4, v5p) = map(
        json.loads, done.stdout.splitlines()
    )
    assert "v99:1x1" in unknown and "v6e:3x3" in shape and "\n" not in unknown + shape
    assert (cores, v4, v5p) == (2, 4, 4)  # jax shows a chip of two cores as one device

    assert (
        four["fits"]
        and four["chips"] == 4
        and four["memory"]["optimizer"] < four["memory"]["parameters"]
        and "compiled" in four["source"]
    )
    assert (
        sum(four["memory"].values()) == four["peak"] and 31 * 2**30 < four["available"] < 32 * 2**30
    )
    tokens, D, F, V = SMALL["total_batch_size"] / 4, 128, 512, 512
    assert (
        four["bound"]["mlp"]["flops"] == 6 * tokens * 2 * 2 * D * F
        and four["bound"]["head+loss"]["flops"] == 6 * tokens * D * V
    )
    # two layers, two microbatches, none run again under remat="dots"
    assert four["kernels"] == {"splash_mha_fwd": 4, "splash_mha_dkv": 4}
    kinds = {c["kind"] for c in four["collectives"]}
    assert (
        "all-gather" in kinds
        and kinds & {"reduce-scatter", "all-reduce"}
        and four["sent"] > 0
        and four["bound"]["collectives"]["binds"] == "network"
    )

    assert (
        not too_big["fits"]
        and too_big["peak"] > too_big["available"]
        and too_big["buffers"][0][0] > 2**30
    )
    assert "bf16[2,65536,256," in too_big["buffers"][0][1]
    # bytes of blocks and head, each read once for both rows
    weights = 2 * (2 * (4 * D * 128 + 2 * D * F) + D * V)
    assert (
        decode["fits"]
        and weights < decode["bytes"] < 4 * weights
        and decode["tokens_per_s"] == pytest.approx(2 / decode["seconds"])
    )

    text = preflight.report_text(too_big)
    assert "NO, over by" in text and "bf16[2,65536,256," in text


MESHED = dict(
    vocab_size=2048,
    sequence_len=256,
    n_layer=2,
    n_embd=256,
    n_head=2,
    n_kv_head=1,
    head_dim=128,
    mlp_dim=1024,
    window_pattern="L",
    # all parts, Muon; one key head, at which libtpu used to fail
    compute_dtype="bfloat16",
    attention="splash",
    loss_chunk=256,
)


@needs_libtpu
def test_memory_falls_with_chips_and_only_gradients_and_muon_talk():
    asked = [
        ("v6e-1", "dp"),
        ("v6e-4", "dp"),
        ("v6e-4", "zero"),
        ("v6e-8", "zero"),
        ("v6e-4", "fsdp"),
        ("v6e-8", "fsdp"),
    ]
    done = programs.run("compile_meshes", json.dumps(MESHED), json.dumps(asked), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, dp, *split = map(json.loads, done.stdout.splitlines())
    zero, fsdp = split[:2], split[2:]
    state = lambda r: r["memory"]["parameters"] + r["memory"]["optimizer"]
    assert (
        dp["memory"]["parameters"] == one["memory"]["parameters"]
        and dp["memory"]["optimizer"] == one["memory"]["optimizer"]
    )
    for many in zero, fsdp:
        assert one["peak"] > many[0]["peak"] > many[1]["peak"] and state(one) > state(
            many[0]
        ) > state(many[1])
    for r, n in zip(zero, (4, 8)):
        assert r["memory"]["parameters"] == one["memory"]["parameters"]
        assert (
            one["memory"]["optimizer"] / n
            < r["memory"]["optimizer"]
            < 1.2 * one["memory"]["optimizer"] / n
        )
    for r, n in zip(fsdp, (4, 8)):
        assert state(one) / n < state(r) < 1.1 * state(one) / n

    # dp: the gradients' one sum, and what Muon's orthogonalised matrices need; nobody gathers activations
    kinds = {(c["kind"], c["component"]) for c in dp["collectives"]}
    assert {kind for kind, _ in kinds} == {"all-reduce", "all-gather"} and {
        part for kind, part in kinds if kind == "all-gather"
    } == {"optimizer"}
    gradients = 2 * 3 / 4 * one["memory"]["parameters"]
    assert sum(c["bytes"] for c in dp["collectives"] if c["kind"] == "all-reduce") == pytest.approx(
        gradients, rel=0.01
    )
    assert sum(c["bytes"] for c in dp["collectives"] if c["kind"] == "all-gather") < gradients / 2
    # fsdp: weights come and their gradients go, but no gradient is summed whole on each
    assert {"all-gather", "reduce-scatter"} <= {c["kind"] for c in fsdp[1]["collectives"]}
    assert (
        sum(c["bytes"] for c in fsdp[1]["collectives"] if c["kind"] == "all-reduce")
        < 0.2 * fsdp[1]["sent"]
    )


@needs_libtpu
def test_a_held_lock_is_one_sentence():
    try:
        lock = open("/tmp/libtpu_lockfile", "a")
    except PermissionError:
        pytest.skip("the lock file of libtpu belongs to another user here")
    with lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        done = python(
            "-m",
            "lib.preflight",
            "--depth",
            "1",
            "--overrides",
            "num_steps=7",
            ALLOW_MULTIPLE_LIBTPU_LOAD="0",
        )
    assert (
        done.returncode == 2
        and "another process holds libtpu's lock" in done.stderr
        and done.stderr.count("\n") == 1
    ), done.stderr


def test_without_libtpu_an_estimate_answers_and_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    preflight.main(preflight.Args(depth=4))
    said = capsys.readouterr().out
    assert "nothing was compiled" in said and "cost        $" in said and "check the price" in said
    with pytest.raises(UserError, match="libtpu, which is not installed"):
        preflight.tpu_devices("v6e:1x1")


# ---- counting -----------------------------------------------------------------------------------------------------------

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (p0: bf16[10,64,128], p1: s32[], p2: f32[10,64,128]) -> (f32[64,256], f32[10,64,128]) {
  %p0 = bf16[10,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  %cut = bf16[1,64,128]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  %flat = bf16[64,128]{1,0} bitcast(%cut)
  %w = bf16[128,256]{1,0} constant({...})
  %product = f32[64,256]{1,0} dot(%flat, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/while/body/mlp/dot"}
  %p2 = f32[10,64,128]{2,1,0} parameter(2)
  %piece = f32[1,64,128]{2,1,0} convert(%cut)
  %put = f32[10,64,128]{2,1,0} dynamic-update-slice(%p2, %piece, %p1, %zero, %zero)
  ROOT %both = (f32[64,256]{1,0}, f32[10,64,128]{2,1,0}) tuple(%product, %put)
}

%body (s: (s32[], bf16[10,64,128], f32[10,64,128])) -> (s32[], bf16[10,64,128], f32[10,64,128]) {
  %s = (s32[], bf16[10,64,128]{2,1,0}, f32[10,64,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[10,64,128]{2,1,0} get-tuple-element(%s), index=1
  %kept = f32[10,64,128]{2,1,0} get-tuple-element(%s), index=2
  %f = (f32[64,256]{1,0:T(8,128)S(1)}, f32[10,64,128]{2,1,0}) fusion(%x, %i, %kept), kind=kOutput, calls=%fused
  %g0 = f32[64,256]{1,0:T(8,128)S(1)} get-tuple-element(%f), index=0
  %g1 = f32[10,64,128]{2,1,0} get-tuple-element(%f), index=1
  %sum = f32[64,256]{1,0:T(8,128)S(1)} all-reduce(%g0), replica_groups={{0,1,2,3}}, to_apply=%add, metadata={op_name="jit(step)/attn/psum"}
  ROOT %t = (s32[], bf16[10,64,128]{2,1,0}, f32[10,64,128]{2,1,0}) tuple(%i, %x, %g1)
}

%condition (c: (s32[], bf16[10,64,128], f32[10,64,128])) -> pred[] {
  %c = (s32[], bf16[10,64,128]{2,1,0}, f32[10,64,128]{2,1,0}) parameter(0)
  %bound = s32[] constant(10)
  %at = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%at, %bound), direction=LT
}

ENTRY %main (a: s32[], b: bf16[10,64,128], c: f32[10,64,128]) -> (s32[], bf16[10,64,128], f32[10,64,128]) {
  %a = s32[] parameter(0)
  %b = bf16[10,64,128]{2,1,0} parameter(1)
  %c = f32[10,64,128]{2,1,0} parameter(2)
  %init = (s32[], bf16[10,64,128]{2,1,0}, f32[10,64,128]{2,1,0}) tuple(%a, %b, %c)
  ROOT %loop = (s32[], bf16[10,64,128]{2,1,0}, f32[10,64,128]{2,1,0}) while(%init), condition=%condition, body=%body
}
"""


def test_loops_count_as_often_as_they_run_and_cuts_are_not_wholes():
    found = hlo.analyse(PROGRAM, matrix_unit=256, devices=4)
    mlp = found["components"]["mlp"]
    # 128 summed on a unit of 256
    assert mlp["flops"] == 10 * 2 * 64 * 128 * 256 and mlp["busy"] == 2 * mlp["flops"]
    # a cut of x in, a piece of the kept out, the loop's counter; the product stays on the chip
    assert mlp["bytes"] == 10 * (64 * 128 * 2 + 4 + 64 * 128 * 4)
    (collective,) = found["collectives"]
    assert (
        collective.kind == "all-reduce"
        and collective.times == 10
        and collective.component == "attention"
    )
    assert collective.bytes == 10 * 2 * 64 * 256 * 4 * 3 / 4


@pytest.mark.parametrize(
    "line, flops",
    [
        # D x (N H) with heads as a window over padding: only half of the window's places meet data
        (
            "f32[2,256,2,128]{3,2,1,0} convolution(%l, %r), window={size=1x2 pad=0_0x1_1 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
            2 * 2 * 256 * 256 * 2 * 128,
        ),
        (
            "f32[256,2,128,1]{3,2,1,0} convolution(%k, %m), window={size=2x2 pad=1_1x0_0 rhs_reversal=1x0}, dim_labels=1fb0_1i0o->b0f1",
            2 * 2 * 256 * 256 * 2 * 128,
        ),
    ],
)
def test_products_written_as_convolutions(line, flops):
    op, _ = hlo._op("  %x = " + line)
    types = dict(
        l="bf16[2,256,256,1]", r="bf16[256,2,128,1]", k="bf16[2,256,256,1]", m="bf16[2,256,2,128]"
    )
    assert hlo.products(op, types)[0] == flops


@pytest.mark.parametrize(
    "T, window, block", [(512, 512, 128), (512, 128, 128), (1024, 200, 256), (512, 512, 512)]
)
def test_a_kernel_visits_the_blocks_that_the_mask_leaves(T, window, block):
    i, j = np.arange(T)[:, None], np.arange(T)
    seen = ((j <= i) & (i - j <= window)).reshape(T // block, block, T // block, block).any((1, 3))
    assert roofline._visits(T, window, block) == seen.sum()


def test_shapes_give_the_products_that_the_config_counts():
    config = Config(**SMALL | dict(remat="none", attention="einsum", sequence_len=256, n_layer=3))
    made = roofline.account(config)["components"]
    expected = config.total_batch_size * 6 * config.scaling_params
    attention = config.total_batch_size * 12 * 128 * sum(w + 1 for w in config.windows)
    assert sum(part["flops"] for part in made.values()) == pytest.approx(expected + attention)
    narrow = roofline.kernel_work(preflight.for_tpu(config).replace(attention="splash"), "fwd", 256)
    # head width 128 half fills a unit of 256 in one product of two
    assert narrow["busy"] == 1.5 * narrow["flops"]


def test_the_bound_is_what_binds():
    chip = chips.Chip("x", flops=100.0, bandwidth=10.0, memory=1, network=5.0)
    parts = {
        "mlp": dict(flops=300, busy=400, bytes=10),
        "embedding": dict(flops=0, busy=0, bytes=20),
        "collectives": dict(flops=0, busy=0, bytes=10),
    }
    b = roofline.bound(parts, chip, sent=15)
    assert [(b[k]["seconds"], b[k]["binds"]) for k in parts] == [
        (4, "compute"),
        (2, "memory"),
        (3, "network"),
    ]
    assert b["step"] == dict(seconds=9, binds="mlp", flops=300, bytes=40)


def test_splitting_shares_memory_and_talks():
    config = Config(**SMALL | dict(microbatch=8, total_batch_size=4096))
    one, dp, zero, fsdp = (
        preflight.estimate(config, chips.tpu_slice(name), how)
        for name, how in [("v6e-1", "dp"), ("v6e-8", "dp"), ("v6e-8", "zero"), ("v6e-8", "fsdp")]
    )
    assert one["sent"] == 0 < min(r["sent"] for r in (dp, zero, fsdp))
    assert (
        dp["memory"]["parameters"]
        == one["memory"]["parameters"]
        == 8 * fsdp["memory"]["parameters"]
    )
    assert dp["memory"]["optimizer"] == pytest.approx(8 * zero["memory"]["optimizer"], rel=1e-4)
    assert dp["memory"]["activations"] < one["memory"]["activations"] / 2


def test_the_table_tells_compiled_from_estimated_and_what_does_not_fit(tmp_path):
    ask = dict(names=("v5e-1", "v6e-8"), depths=(4, 40), cache=tmp_path)
    small, large = preflight.fits_table(**ask).splitlines()[2:4]
    assert (
        "**" not in small + large
        and small.count("~~") == 0
        and large.split("|")[3].count("~~") == 2
        and "fsdp" in large
    )
    config, where = (
        preflight.for_tpu(Config.from_depth(4, microbatch=32, remat="dots")),
        chips.tpu_slice("v6e-8"),
    )
    preflight._kept(
        tmp_path,
        preflight._question(config, where, "zero"),
        lambda: dict(peak=3 * 2**30, fits=True),
    )
    assert "zero **3.0**, fsdp" in preflight.fits_table(**ask).splitlines()[2]


# ---- names and money ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, topology, count",
    [
        ("v5e-1", "v5e:1x1", 1),
        ("v6e-4", "v6e:2x2", 4),
        ("v6e-8", "v6e:2x4", 8),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v4-8", "v4:2x2x1", 4),
        ("v6e:4x4", "v6e:4x4", 16),
    ],
)
def test_names_are_topologies(name, topology, count):
    made = chips.tpu_slice(name)
    assert (made.topology, made.chips) == (topology, count)


@pytest.mark.parametrize("name", ["v9-1", "v6e-3", "h100", "v9:1x1", ""])
def test_an_unknown_chip_is_one_sentence_with_the_names(name, capsys):
    with pytest.raises(UserError, match="v6e") as e:
        preflight.main(preflight.Args(depth=4, chip=name))
    assert "\n" not in str(e.value)


def test_plan_and_money():
    config, chip = Config(**SMALL | dict(num_steps=1000)), chips.V6E
    p = preflight.plan(config, chip, 4, mfu=0.5, price=2.0, memory=7)
    assert (
        p["tokens"] == 1000 * 2048
        and p["steps"] == 1000
        and p["memory_bytes"] == 7
        and p["price_per_hour"] == 8
    )
    assert p["hours"] == pytest.approx(
        config.flops_per_token * p["tokens"] / (4 * 0.5 * 918e12) / 3600
    ) and p["cost"] == pytest.approx(8 * p["hours"])
    assert preflight.plan(config, chip, pay="colab", units=4.0)["price_per_hour"] == pytest.approx(
        4 * chips.COLAB_UNIT
    )
    unknown = preflight.plan(config, chip, pay="colab")
    assert "cost" not in unknown and "not known: Colab publishes no rates" in preflight.plan_text(
        unknown
    )
    assert "no spot price" in preflight.plan_text(preflight.plan(config, chips.V4, pay="spot"))
    assert set(preflight.plan(config, None)) == {"tokens", "steps", "mfu", "pay", "prices_of"}
    with pytest.raises(UserError, match="flex-start, on-demand, spot"):
        preflight.plan(config, chip, pay="barter")
    said = preflight.compare(
        p, 2 * p["hours"] * 3600, p["tokens"], config.flops_per_token, 4 * chip.flops
    )
    assert "planned 50% MFU, reached 25.0%" in said and "spent" in said


# ---- search --------------------------------------------------------------------------------------------------------------

MODEL = Config(
    **SMALL
    | dict(
        sequence_len=2048,
        n_layer=8,
        n_embd=1024,
        n_head=8,
        n_kv_head=8,
        mlp_dim=4096,
        vocab_size=32768,
        total_batch_size=2**17,
    )
)


def test_search_takes_the_fastest_that_fits_and_remembers(tmp_path, monkeypatch):
    where = chips.tpu_slice("v5e-1")
    found = preflight.search(MODEL, where, cache=tmp_path)
    good = [r for r in found["rows"] if r["fits"]]
    assert 0 < len(good) < len(found["rows"]) and found["rows"][: len(good)] == good
    assert (
        good[0]["seconds"] == min(r["seconds"] for r in good)
        and {k: good[0][k] for k in preflight.SEARCHED} == found["best"]
    )
    assert all(r["peak"] <= 0.9 * where.chip.usable for r in good) and {
        r["attention_block"] for r in good
    } == {512, 1024, 2048}
    monkeypatch.setattr(preflight, "estimate", None)
    assert preflight.search(MODEL, where, cache=tmp_path) == found  # asked once
    preflight.heat_map(found, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(
        b"\x89PNG"
    ) and "searched" in preflight.search_text(found)


def test_search_believes_the_compiler_and_leaves_alone_what_it_is_told():
    asked = []

    def verify(config):
        asked.append(config)
        return dict(peak=1, fits=len(asked) == 3, bound={"step": {"seconds": 1.0}})

    found = preflight.search(
        MODEL,
        chips.tpu_slice("v6e-1"),
        verify=verify,
        cache=None,
        vary=("microbatch", "loss_chunk"),
    )
    assert (
        len(asked) == 3 == len(found["checked"])
        and found["best"]["microbatch"] == asked[2].microbatch
    )
    assert {(c.remat, c.attention, c.attention_block) for c in asked} == {
        (MODEL.remat, MODEL.attention, MODEL.attention_block)
    }
    nothing = preflight.search(
        MODEL,
        chips.tpu_slice("v6e-1"),
        verify=lambda c: dict(peak=1, fits=False, bound={"step": {"seconds": 1.0}}),
        cache=None,
        vary=("microbatch",),
    )
    assert nothing["best"] is None and "none fits" in preflight.search_text(nothing)


def test_microbatch_as_asked(capsys):
    cpu = dict(platform="cpu", kind="cpu")
    config = Config(**SMALL)
    assert preflight.with_microbatch(config, "preset", cpu) is config
    assert preflight.with_microbatch(config, "2", cpu).microbatch == 2
    assert (
        preflight.with_microbatch(config, "auto", cpu) == config
        and "no search" in capsys.readouterr().out
    )
    before = config.replace(microbatch=1, remat="none").to_dict()
    # a run that goes on keeps what it found
    assert preflight.with_microbatch(config, "auto", cpu, before=before).remat == "none"
    with pytest.raises(UserError, match="preset, auto or a number"):
        preflight.with_microbatch(config, "many", cpu)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(), "say which model"),
        (dict(depth=2, preset="gpu"), "say which model"),
        (dict(depth=2, mesh="data:2"), "data=2"),
        (dict(depth=2, chip="v6e-4", strategy="dpp"), "unknown sharding strategy"),
        (dict(run="none-such"), "no config"),
    ],
)
def test_bad_questions(change, says):
    with pytest.raises(UserError, match=says):
        preflight.main(preflight.Args(estimate=True, **change))


def test_json(capsys):
    preflight.main(preflight.Args(depth=4, chip="v5p-8", strategy="fsdp", estimate=True, json=True))
    said = json.loads(capsys.readouterr().out)
    assert said["chips"] == 4 and said["plan"]["cost"] > 0 and math.isfinite(said["mfu"])
