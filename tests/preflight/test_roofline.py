"""Shapes give the work that a step does; a bound is what binds. Figures worked out by hand."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from lib import chips
from lib.config import Config
from lib.files import UserError
from lib.params import count_params
from lib.preflight import cache, roofline
from lib.preflight.compile import for_tpu, question
from lib.preflight.estimate import Report, estimate, make_split, report_text
from lib.preflight.hlo import Work
from lib.preflight.roofline import Bound, Split
from lib.preflight.table import fits_table

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


@pytest.mark.parametrize(
    "T, window, block",
    [(512, 512, 128), (512, 128, 128), (1024, 200, 256), (512, 129, 128), (512, 512, 512)],
)
def test_a_kernel_visits_the_blocks_that_the_mask_leaves(T, window, block):
    i, j = np.arange(T)[:, None], np.arange(T)
    mask = (j <= i) & (i - j <= window)
    blocks = mask.reshape(T // block, block, T // block, block).any((1, 3))
    assert roofline.visits(T, window, block) == blocks.sum()


@pytest.mark.parametrize("mlp", ["relu2", "swiglu"])
def test_shapes_give_the_products_that_the_config_counts(mlp):
    config = Config(**SMALL | dict(remat="none", attention="einsum", n_layer=3, mlp=mlp))
    work = roofline.account(config).components
    expected = config.total_batch_size * 6 * config.scaling_params
    attention = config.total_batch_size * 12 * 128 * sum(w + 1 for w in config.windows)
    assert sum(part.flops for part in work.values()) == pytest.approx(expected + attention)

    narrow = roofline.kernel_work(for_tpu(config).replace(attention="splash"), "fwd", 256)
    # head width 128 half fills a unit of 256 in one product of two
    assert narrow.busy == 1.5 * narrow.flops


@pytest.mark.parametrize("remat, passes", [("none", 3), ("layer", 4)])
def test_weights_are_read_anew_for_each_microbatch(remat, passes):
    once = Config(**SMALL | dict(remat=remat, microbatch=8))
    four = once.replace(microbatch=2)
    work = [roofline.account(config).components for config in (once, four)]

    # three more microbatches read the weights forward (twice where that is done again) and backward
    # and write their gradient, two bytes a number: two layers of 2 x 128 x 512 weights
    assert work[1]["mlp"].bytes - work[0]["mlp"].bytes == 3 * passes * 2 * (2 * 2 * 128 * 512)
    assert work[1]["mlp"].flops == work[0]["mlp"].flops
    # to the float32 sum each of the four adds its bfloat16 gradients, but of tables
    counts = count_params(four)
    summed = 4 * (2 * 4 + 2) * (counts["blocks"] + counts["head"])
    assert work[1]["other"].bytes - work[0]["other"].bytes == summed


def test_between_layers_lie_value_embeddings_and_what_a_scan_stacks():
    """2,048 tokens in bfloat16."""

    def between(**changes):
        config = Config(**SMALL | dict(microbatch=8, n_layer=4, value_embeds=False) | changes)
        return roofline.account(config).components["other"].bytes

    # two layers have lines of 128 numbers: two looks at each in six places, and float32 sums
    tables = between(value_embeds=True, scan_layers=False)
    assert tables - between(scan_layers=False) == 2048 * 2 * 128 * (8 * 2 + 20)
    # four layers' inputs, heads, attended and mlp, and the stream's own, once more there and back
    a_layer = 128 + 3 * 128 + 128 + 512
    assert between(remat="dots") == 2048 * (4 * a_layer + 4 * 128) * 2 * 2
    assert between(remat="dots", scan_layers=False) == 0


def test_a_kernel_by_hand():
    # one head of 128, a row of 256 in blocks of 128: three pairs of blocks under the diagonal
    config = Config(**SMALL | dict(attention_block=128))
    product = 2 * 3 * 128 * 128 * 128
    forward = roofline.kernel_work(config, "splash_mha_fwd", 128)
    backward = roofline.kernel_work(config, "splash_mha_dkv", 128)
    # scores and values; backward the scores again and the gradients of all four
    assert forward.flops == 2 * product and backward.flops == 5 * product
    # keys and values of a third block are read again, two bytes a number
    assert forward.bytes == 2 * 128 * 128 * 2


def test_the_head_is_read_for_each_chunk():
    one = Config(**SMALL | dict(loss_chunk=1024))
    four = one.replace(loss_chunk=256)
    work = [roofline.account(config).components["head+loss"] for config in (one, four)]
    assert work[0].flops == work[1].flops == 6 * 2048 * 128 * 512
    # of two microbatches of 1,024 tokens: eight chunks instead of two, each reads the head twice in
    # bfloat16
    assert work[1].bytes - work[0].bytes == 6 * 128 * 512 * (2 * 2)


def test_adam_moves_28_bytes_a_parameter_and_zero_shares_them():
    config = Config(**SMALL)
    moved = 28 * roofline.count_params(config)["total"]
    for strategy, split, share in [
        ("dp", Split(data=4), 1),
        ("zero", Split(data=4), 4),
        ("fsdp", Split(fsdp=4), 4),
    ]:
        work = roofline.account(config, split=split, strategy=strategy)
        assert work.components["optimizer"].bytes == pytest.approx(moved / share)


@pytest.mark.parametrize(
    "strategy, split, sent",
    [
        # gradients are 4 bytes a parameter; a sum over four devices goes round one and a half times
        ("dp", Split(data=4), lambda n, tokens: 4 * n * 1.5),
        ("zero", Split(data=4), lambda n, tokens: 4 * n * 1.5),
        # two microbatches: weights of 2 bytes come twice, gradients of 4 leave, three quarters each
        ("fsdp", Split(fsdp=4), lambda n, tokens: 2 * (2 * 2 * n + 4 * n) * 0.75),
        # two layers, four sums over 128 activations of 2 bytes, and one that is made again
        ("tp", Split(tensor=4), lambda n, tokens: 2 * 5 * tokens * 128 * 2 * 1.5),
        ("dp", Split(), lambda n, tokens: 0),
    ],
)
def test_what_each_strategy_sends(strategy, split, sent):
    config = Config(**SMALL)
    n = roofline.count_params(config)["total"]
    work = roofline.account(config, split=split, strategy=strategy)
    assert work.sent == pytest.approx(sent(n, 2048))


def test_layers_that_are_kept_whole_are_added_up_four_times():
    whole, dots = (
        roofline.account(Config(**SMALL | dict(remat=remat)), split=Split(tensor=4), strategy="tp")
        for remat in ("none", "dots")
    )
    assert 5 * whole.sent == 4 * dots.sent


def test_what_a_token_reads_by_hand():
    """Two rows of 100 tokens, all of which both layers see; two bytes a number."""
    config = Config(**SMALL)
    parts = roofline.decode_bytes(config, rows=2, length=100)
    assert parts == {
        "attention weights": 2 * 2 * 4 * 128 * 128,
        "mlp weights": 2 * 2 * 2 * 128 * 512,
        "head": 2 * 128 * 512,
        "tables": 2 * 2 * 128,
        "caches": 2 * (2 * 100) * (2 * 2 * 128),
    }
    narrow = roofline.decode_bytes(config, rows=2, length=100, int8=True)
    # lines of tables and caches stay as they are
    halved = ("attention weights", "mlp weights", "head")
    assert narrow == parts | {part: parts[part] // 2 for part in halved}


def test_the_bound_is_what_binds():
    chip = chips.Chip("x", flops=100.0, bandwidth=10.0, memory=1, network=5.0)
    work = {
        "mlp": Work(flops=300, busy=400, bytes=10),
        "embedding": Work(bytes=20),
        "collectives": Work(bytes=10),
        "other": Work(),
    }
    bounds = roofline.bound(work, chip, sent=15)
    assert bounds["mlp"][:2] == (4, "compute")
    assert bounds["embedding"][:2] == (2, "memory")
    assert bounds["collectives"][:2] == (3, "network")
    assert bounds["other"][:2] == (0, "")
    assert bounds["step"] == Bound(seconds=9, binds="mlp", flops=300, bytes=40)


def test_mfu_is_per_chip():
    config = SimpleNamespace(flops_per_token=6, total_batch_size=1000)
    chip = chips.Chip("x", flops=500.0, bandwidth=1.0, memory=1)
    # 6,000 FLOPs in 4 seconds where one chip could do 2,000 and three could do 6,000
    assert roofline.mfu(config, 4, chip) == 3.0
    assert roofline.mfu(config, 4, chip, chips=3) == 1.0


def test_splitting_shares_memory_and_talks():
    config = Config(**SMALL | dict(microbatch=8, total_batch_size=4096))
    one, dp, zero, fsdp = (
        estimate(config, chips.tpu_slice(name), strategy)
        for name, strategy in [
            ("v6e-1", "dp"),
            ("v6e-8", "dp"),
            ("v6e-8", "zero"),
            ("v6e-8", "fsdp"),
        ]
    )
    assert one.sent == 0 < min(dp.sent, zero.sent, fsdp.sent)
    parameters = one.memory["parameters"]
    assert dp.memory["parameters"] == parameters == 8 * fsdp.memory["parameters"]
    assert dp.memory["optimizer"] == pytest.approx(8 * zero.memory["optimizer"], rel=1e-4)
    assert dp.memory["activations"] < one.memory["activations"] / 2

    assert zero.memory == dp.memory | {"optimizer": zero.memory["optimizer"]}
    # zero gathers updates beside its share of the gradients when the rest is gone
    # that is the peak only of large tables and next to no tokens
    few = dict(
        vocab_size=2**16, sequence_len=8, loss_chunk=8, total_batch_size=64, attention="einsum"
    )
    idle = estimate(Config(**SMALL | dict(microbatch=8) | few), chips.tpu_slice("v6e-8"), "zero")
    update = idle.memory["parameters"] + idle.memory["parameters"] // 8
    assert idle.memory["gradients"] + idle.memory["activations"] == update

    # eight chips make a step of the same batch in less time, at an eighth of the MFU per second
    speed = config.total_batch_size / dp.bound["step"].seconds
    assert dp.tokens_per_s == pytest.approx(speed)
    per_chip = config.flops_per_token * speed / 8 / chips.V6E.flops
    assert dp.mfu == pytest.approx(per_chip)


def test_a_report_survives_json_and_unknown_axes_are_named():
    config, where = Config(**SMALL), chips.tpu_slice("v6e-4")
    report = estimate(config, where, "fsdp")
    assert Report.from_dict(report.to_dict()) == report
    assert report.to_dict()["fits"] is True
    assert make_split(config, where, "fsdp", dict(data=2, fsdp=2)) == Split(2, 2, 1)
    with pytest.raises(UserError, match="mesh axis 'rows': choose one of data, fsdp, tensor"):
        estimate(config, where, "dp", dict(rows=4))


def test_what_does_not_fit_is_over_by_what_it_needs_more():
    report = estimate(Config(**SMALL), chips.tpu_slice("v6e-4"), "fsdp")
    report = dataclasses.replace(report, available=32 * 2**30, peak=33 * 2**30)
    assert "fits        NO, over by 1.00 GiB" in report_text(report)
    assert "yes, with 32.00 GiB to spare" in report_text(dataclasses.replace(report, peak=0))


def test_the_table_tells_compiled_from_estimated_and_what_does_not_fit(tmp_path):
    ask = dict(names=("v5e-1", "v6e-8"), depths=(4, 40), cache=tmp_path)
    small, large = fits_table(**ask).splitlines()[2:4]
    assert "**" not in small + large and small.count("~~") == 0
    assert large.split("|")[3].count("~~") == 2 and "fsdp" in large

    # one answer of the compiler
    config = for_tpu(Config.from_depth(4, microbatch=32, remat="dots"))
    where = chips.tpu_slice("v6e-8")
    answer = estimate(config, where, "zero").to_dict() | dict(peak=3 * 2**30)
    cache.kept(tmp_path, question(config, where, "zero"), lambda: answer)
    assert "zero **3.0**, fsdp" in fits_table(**ask).splitlines()[2]
