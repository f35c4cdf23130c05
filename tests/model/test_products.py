"""The table of products adds up to what the plan counts, for every preset and part."""

import pytest

from lib.config import PRESETS, Config
from lib.model.products import products, products_table

TINY = dict(n_embd=64, n_head=2, n_kv_head=1, head_dim=32, vocab_size=512, sequence_len=256)


@pytest.mark.parametrize("preset", PRESETS)
def test_products_add_up_to_flops_per_token(preset):
    config = Config.preset(preset)
    assert sum(product.flops for product in products(config)) == config.flops_per_token


@pytest.mark.parametrize("switch", [dict(mlp="swiglu"), dict(smear=False), dict(tied_head=True)])
def test_parts_that_are_switched_on_or_off_are_counted(switch):
    config = Config.from_depth(3, **TINY, **switch)
    assert sum(product.flops for product in products(config)) == config.flops_per_token


def test_by_hand():
    """One layer: 2 W forward and 4 W backward for each weight; 12 N H for each visible key."""
    plain = dict(value_embeds=False, smear=False, window_pattern="L", mlp_dim=128)
    config = Config.from_depth(1, **TINY, **plain)
    flops = {product.name: product.flops for product in products(config)}
    assert flops["blocks.wq"] == 6 * 64 * 2 * 32
    assert flops["blocks.wk"] == 6 * 64 * 1 * 32
    assert flops["head"] == 6 * 64 * 512
    assert flops["attention"] == 12 * 2 * 32 * 256
    assert "100.0%" not in products_table(config)
    assert products_table(config).splitlines()[-1].split()[-1] == f"{config.flops_per_token:,}"
