"""Bits per byte against the reference's numbers."""

import math

import numpy as np
import pytest
from conftest import load, parity_model

from lib import evals


@pytest.mark.parametrize("case", ["val", "val_masked", "only_special_targets"])
def test_bits_per_byte_matches_the_reference(case):
    config, params = parity_model("T")
    data, want = load("bpb.safetensors"), load("bpb.json")[case]
    batches = list(zip(data[f"{case}.inputs"], data[f"{case}.targets"]))
    got = evals.bits_per_byte(params, config, batches, data["token_bytes"])
    assert got["bytes"] == want["total_bytes"]
    assert got["bpb"] == pytest.approx(float(want["bpb"]), rel=1e-5) and got["nats"] == pytest.approx(want["total_nats"], rel=1e-5)
    for (x, y), losses in zip(batches, data[f"{case}.losses"]):
        np.testing.assert_allclose(evals.token_losses(params, config, x, y), np.where(y >= 0, losses, 0), atol=5e-5)


def test_standard_error_covers_the_spread_of_resampled_rows():
    rng = np.random.default_rng(0)
    bpb = lambda nats, size: nats.sum() / (math.log(2) * size.sum())
    nats, size = rng.gamma(20, 1, 400), rng.integers(5, 15, 400)
    draws = [rng.integers(0, 400, 400) for _ in range(500)]
    spread = np.std([bpb(nats[d], size[d]) for d in draws])
    assert evals.ratio_bits(nats, size)[1] == pytest.approx(spread, rel=0.15)


def test_only_so_many_batches_are_read():
    config, params = parity_model("T")
    data = load("bpb.safetensors")

    def endless():
        while True:
            yield data["val.inputs"][0], data["val.targets"][0], {}

    once = evals.bits_per_byte(params, config, endless(), data["token_bytes"], max_batches=1)
    assert evals.bits_per_byte(params, config, endless(), data["token_bytes"], max_batches=3)["bpb"] == pytest.approx(once["bpb"])
