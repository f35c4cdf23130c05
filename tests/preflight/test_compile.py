"""A compiler without a chip says what a step needs, and faults are one sentence."""

import fcntl
import json
import math
import os
import subprocess
import sys

import jax
import pytest

from lib.config import Config
from lib.preflight import cache
from lib.preflight import compile as compiling
from lib.preflight.cache import has_libtpu, kept
from lib.preflight.estimate import Report, report_text
from lib.preflight.memory import estimate_memory
from tests.helpers import ROOT, programs

needs_libtpu = pytest.mark.skipif(
    not has_libtpu(),
    reason="compiling for a TPU without one needs the preflight extra: pip install libtpu",
)

# scanned, AdamW
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

# all parts, Muon; one key head, at which libtpu used to fail
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
    microbatch=1,
    total_batch_size=256,
    compute_dtype="bfloat16",
    attention="splash",
    loss_chunk=256,
)


def ask(config, *questions):
    """Answers of tests/programs/preflight_compile.py."""
    request = json.dumps(dict(config=config, ask=questions))
    # as for a real chip, unlike other tests
    env = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    done = programs.run("preflight_compile", request, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.tpu
@needs_libtpu
def test_the_real_step_compiles_for_four_chips_and_too_much_is_named():
    unknown, shape, four, too_big, decode, write, v4, v5p = ask(
        SMALL,
        ("refused", "v99:1x1"),
        ("refused", "v6e:3x3"),
        ("step", "v6e-4", "zero", 4),
        ("step", "v6e-1", "dp", 65536),
        ("decode", 2, 256),
        ("write", 8, 2048, 10),
        ("cores", "v4:2x2x1"),
        ("cores", "v5p:2x2x1"),
    )
    assert "v99:1x1" in unknown and "v6e:3x3" in shape
    assert "\n" not in unknown + shape
    # jax shows a chip of two cores as one device
    assert v4 == [2, 4] and v5p[1] == 4

    memory, bound = four["memory"], four["bound"]
    assert four["fits"] and four["chips"] == 4 and "compiled" in four["source"]
    # Adam's two moments, split by zero
    assert 2 / 4 < memory["optimizer"] / memory["parameters"] < 1.2 * 2 / 4
    assert sum(memory.values()) == four["peak"]
    assert 31 * 2**30 < four["available"] < 32 * 2**30
    tokens, D, F, V = SMALL["total_batch_size"] / 4, 128, 512, 512
    assert bound["mlp"]["flops"] == 6 * tokens * 2 * 2 * D * F
    assert bound["head+loss"]["flops"] == 6 * tokens * D * V
    # two layers, two microbatches, none run again under remat="dots"
    assert four["kernels"] == {"splash_mha_fwd": 4, "splash_mha_dkv": 4}

    kinds = {c["kind"] for c in four["collectives"]}
    assert "all-gather" in kinds and kinds & {"reduce-scatter", "all-reduce"}
    assert four["sent"] > 0 and bound["collectives"]["binds"] == "network"

    assert not too_big["fits"] and too_big["peak"] > too_big["available"]
    largest, what = too_big["buffers"][0]
    assert largest > 2**30 and "bf16[2,65536,256," in what
    text = report_text(Report.from_dict(too_big))
    assert "NO, over by" in text and what in text

    # bytes of blocks and head, each read once for both rows; two operations a number and row: of
    # one token, though many are compiled as a loop
    weights = 2 * (2 * (4 * D * 128 + 2 * D * F) + D * V)
    assert decode["fits"] and weights < decode["bytes"] < 4 * weights
    assert decode["flops"] == 2 * weights
    assert decode["tokens_per_s"] == pytest.approx(2 / decode["seconds"])
    # new keys of several rows are written where they belong: the ring is neither copied nor turned
    moved, ring = write
    assert 0 < moved < 0.01 * ring


@pytest.mark.tpu
@needs_libtpu
def test_a_step_keeps_no_copies_of_its_parameters():
    """Devices that share the optimizer's work send updates, which are added in place."""
    [largest] = ask(SMALL, ("copied", "v6e:2x2", "zero"))
    # a scalar; sent as new parameters they were copied, the head for one
    assert largest == 1


@pytest.mark.tpu
@needs_libtpu
def test_a_loss_writes_its_logits_once_and_narrow():
    """Neither the capped ones in float32 nor their gradient are written, nor do words that only
    fill a vocabulary up change that.
    """
    for vocabulary in (8192, 8150):
        wide = SMALL | dict(vocab_size=vocabulary, loss_chunk=1024)
        assert ask(wide, ("logits",)) == [["bf16"]], vocabulary


@pytest.mark.tpu
@needs_libtpu
def test_a_gate_is_computed_in_three_products():
    """Forward's, its weight's gradient, and once for what all others read."""
    assert ask(SMALL | dict(mlp="swiglu"), ("activated",)) == [3]


@pytest.mark.tpu
@needs_libtpu
def test_a_step_turns_gradients_of_value_embeddings_and_no_table():
    """Left alone XLA copies the tables and both moments, so that they lie as gradients do."""
    tables = SMALL | dict(value_embeds=True, vocab_size=4096, n_layer=4, n_head=8, n_kv_head=8)
    assert ask(tables, ("turned",)) == [[]]


@pytest.mark.tpu
@needs_libtpu
def test_memory_falls_with_chips_and_only_gradients_and_muon_talk():
    dp, fsdp = ask(MESHED, ("step", "v6e-4", "dp", 0), ("step", "v6e-8", "fsdp", 0))
    one = estimate_memory(Config(**MESHED))
    state = one["parameters"] + one["optimizer"]

    def sent(report, kind):
        return sum(c["bytes"] for c in report["collectives"] if c["kind"] == kind)

    # dp: each holds everything; fsdp: an eighth, and what does not divide
    assert dp["memory"]["parameters"] == one["parameters"]
    assert dp["memory"]["optimizer"] == one["optimizer"]
    held = fsdp["memory"]["parameters"] + fsdp["memory"]["optimizer"]
    assert state / 8 < held < 1.1 * state / 8
    assert fsdp["peak"] < dp["peak"]

    # dp: the gradients' one sum, and Muon's orthogonalised matrices; nobody gathers activations
    kinds = {(c["kind"], c["component"]) for c in dp["collectives"]}
    assert {kind for kind, _ in kinds} == {"all-reduce", "all-gather"}
    assert {part for kind, part in kinds if kind == "all-gather"} == {"optimizer"}
    gradients = 2 * 3 / 4 * one["parameters"]
    assert sent(dp, "all-reduce") == pytest.approx(gradients, rel=0.01)
    assert sent(dp, "all-gather") < gradients / 2

    # fsdp: weights come and their gradients go, but no gradient is summed whole on each
    assert {"all-gather", "reduce-scatter"} <= {c["kind"] for c in fsdp["collectives"]}
    assert sent(fsdp, "all-reduce") < 0.2 * fsdp["sent"]


@pytest.mark.parametrize(
    "told, needed",
    [
        ("Ran out of memory in memory space hbm. Used 17.5G of 15.75G hbm.", 17.5 * 2**30),
        ("total hbm usage: required for HLO temporaries (1.5T)", 1.5 * 2**40),
        ("Ran out of memory", math.nan),
    ],
)
def test_what_the_compiler_needed_is_read_from_its_message(told, needed):
    assert compiling._needed_bytes(told) == pytest.approx(needed, nan_ok=True)


@pytest.mark.tpu
@needs_libtpu
def test_a_held_lock_is_one_sentence():
    try:
        lock = open("/tmp/libtpu_lockfile", "a")
    except PermissionError:
        pytest.skip("the lock file of libtpu belongs to another user here")
    with lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        # num_steps: a question that was never asked
        command = ["-m", "lib.preflight", "--depth", "1", "--overrides", "num_steps=7"]
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "0"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 2, done.stderr
    assert "another process holds libtpu's lock" in done.stderr
    assert done.stderr.count("\n") == 1


def test_answers_are_kept_by_question(tmp_path):
    assert kept(tmp_path, ["a", 1]) is None
    assert kept(tmp_path, ["a", 1], lambda: dict(x=(1, 2))) == {"x": [1, 2]}
    assert kept(tmp_path, ["a", 1], lambda: 1 / 0) == {"x": [1, 2]}
    assert kept(tmp_path, ["a", 2]) is None
    assert kept(None, ["a", 1], lambda: 7) == 7
    # a damaged file is asked again
    for path in tmp_path.iterdir():
        path.write_text("{")
    assert kept(tmp_path, ["a", 1], lambda: 5) == 5


def test_other_code_and_other_versions_are_asked_anew(tmp_path, monkeypatch):
    library = tmp_path / "lib"
    (library / "model").mkdir(parents=True)
    (library / "report").mkdir()
    monkeypatch.setattr(cache, "ROOT", tmp_path)

    def is_new():
        answers = []
        kept(tmp_path / "answers", ["a"], lambda: answers.append(1) or 1)
        return bool(answers)

    assert is_new() and not is_new()
    # what the step is made of
    (library / "model" / "head.py").write_text("x = 1")
    assert is_new() and not is_new()
    (library / "config.py").write_text("x = 1")
    assert is_new()
    # and what it is not
    (library / "report" / "page.py").write_text("x = 1")
    assert not is_new()
    monkeypatch.setattr(jax, "__version__", "99.0")
    assert is_new()
