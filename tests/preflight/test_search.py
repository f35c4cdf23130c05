"""The search takes the fastest that fits, believes the compiler, and leaves alone what it must."""

import dataclasses

import pytest

from lib import chips
from lib.config import Config
from lib.files import UserError
from lib.preflight import search as searching
from lib.preflight.__main__ import compile_command, parse
from lib.preflight.estimate import available_bytes, estimate
from lib.preflight.search import (
    SEARCHED,
    search,
    search_text,
    undecided,
    undecided_text,
    with_microbatch,
)
from lib.preflight.table import heat_map

MODEL = Config(
    vocab_size=32768,
    sequence_len=2048,
    n_layer=8,
    n_embd=1024,
    n_head=8,
    n_kv_head=8,
    head_dim=128,
    mlp_dim=4096,
    window_pattern="L",
    microbatch=4,
    total_batch_size=2**17,
    optimizer="adamw",
    value_embeds=False,
    smear=False,
    backout=False,
    attention="splash",
    compute_dtype="bfloat16",
    remat="dots",
    loss_chunk=256,
)
WHERE = chips.tpu_slice("v6e-1")


def answers(*fits):
    """A stand-in for the compiler: whether the first, second, ... config fits; what was asked."""
    asked = []

    def verify(config):
        asked.append(config)
        room = 1 if fits[len(asked) - 1] else 0
        return dataclasses.replace(estimate(MODEL, WHERE), peak=1, available=room)

    return verify, asked


def test_search_takes_the_fastest_that_fits_and_remembers(tmp_path, monkeypatch):
    where = chips.tpu_slice("v5e-1")
    result = search(MODEL, where, cache=tmp_path)
    fitting = [row for row in result.rows if row.fits]
    assert 0 < len(fitting) < len(result.rows)
    assert result.rows[: len(fitting)] == fitting
    assert fitting[0].seconds == min(row.seconds for row in fitting)
    assert fitting[0].fields == result.best
    assert all(row.peak <= 0.9 * where.chip.usable for row in fitting)
    assert {row.attention_block for row in fitting} == {512, 1024, 2048}

    # asked once
    monkeypatch.setattr(searching, "estimate", None)
    assert search(MODEL, where, cache=tmp_path) == result
    assert "searched" in search_text(result)
    heat_map(result).savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("peak, fits", [(900, True), (901, False)])
def test_a_tenth_of_the_memory_is_left_free(monkeypatch, peak, fits):
    report = dataclasses.replace(estimate(MODEL, WHERE), peak=peak, available=1000)
    monkeypatch.setattr(searching, "estimate", lambda *arguments: report)
    result = search(MODEL, WHERE, cache=None, vary=("remat",))
    assert {row.fits for row in result.rows} == {fits}
    assert (result.best is not None) == fits
    # asked for, all of it may be used
    generous = search(MODEL, WHERE, cache=None, vary=("remat",), margin=1.0)
    assert all(row.fits for row in generous.rows)


def test_search_believes_the_compiler_and_leaves_alone_what_it_is_told():
    vary = ("microbatch", "loss_chunk")
    verify, asked = answers(False, False, True)
    result = search(MODEL, WHERE, verify=verify, cache=None, vary=vary)
    assert len(asked) == 3 == len(result.checked)
    assert result.best["microbatch"] == asked[2].microbatch
    kept = {(c.remat, c.attention, c.attention_block) for c in asked}
    assert kept == {(MODEL.remat, MODEL.attention, MODEL.attention_block)}
    assert "does not fit" in search_text(result)

    verify, asked = answers(*[False] * 9)
    nothing = search(MODEL, WHERE, verify=verify, cache=None, vary=("microbatch",))
    assert nothing.best is None and "none fits" in search_text(nothing)
    assert len(asked) == searching.VERIFIED

    # what the estimate rules out is not compiled
    verify, asked = answers(True)
    assert search(MODEL, WHERE, verify=verify, cache=None, margin=1e-9).best is None and not asked


def test_candidates_divide_the_batch_and_need_no_more_loss_than_tokens():
    config = MODEL.replace(total_batch_size=3 * 4 * 2048, microbatch=4)
    microbatches = {c.microbatch for c in searching.candidates(config, rows=2)}
    # of twelve rows, on two devices: 2 and 4; 8 does not divide
    assert microbatches == {2, 4}
    for candidate in searching.candidates(config, rows=2):
        assert candidate.loss_chunk <= candidate.microbatch // 2 * 2048


def test_microbatch_as_asked(capsys):
    cpu = dict(platform="cpu", kind="cpu")
    assert with_microbatch(MODEL, "preset", cpu) is MODEL
    assert with_microbatch(MODEL, "2", cpu).microbatch == 2
    assert with_microbatch(MODEL, "auto", cpu) == MODEL
    assert "no search" in capsys.readouterr().out

    # a run that goes on keeps what it found
    before = MODEL.replace(microbatch=1, remat="none").to_dict()
    changed = with_microbatch(MODEL, "auto", cpu, before=before)
    assert {name: getattr(changed, name) for name in SEARCHED} == {n: before[n] for n in SEARCHED}
    with pytest.raises(UserError, match="preset, auto or a number"):
        with_microbatch(MODEL, "many", cpu)


def test_what_the_estimate_cannot_decide_is_named_with_the_command(tmp_path):
    """Depth 20 on one v5e: nothing fits by estimate, yet the compiler fits dots with one row."""
    where = chips.tpu_slice("v5e-1")
    config = Config.from_depth(20)
    result = search(config, where, vary=("microbatch", "remat", "loss_chunk"), cache=tmp_path)
    available = available_bytes(where.chip)
    rows = undecided(result, available)
    assert result.best is None and {row.remat for row in rows} == {"none", "dots", "layer"}
    assert all(0.9 * available < row.peak <= 1.1 * available for row in rows)
    row = rows[0]
    args = parse(["--depth", "20", "--chip", "v5e-1", "--overrides", "microbatch=8 softcap=20"])
    command = compile_command(args, row.fields)
    assert command.startswith("python -m lib.preflight --depth 20 --overrides 'softcap=20 microb")
    assert command.endswith("--chip v5e-1") and f"remat={row.remat}" in command
    assert command in undecided_text(row, available, command)

    # nor is anything said where the best is the fastest of all
    fastest = min(result.rows, key=lambda row: row.seconds)
    better = fastest._replace(fits=True, seconds=0.0)
    assert undecided(result._replace(rows=[better, *result.rows]), available) == []
