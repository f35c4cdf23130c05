"""The products of a training step, one by one: what a model computes, and what each part costs."""

import math
from typing import NamedTuple

from lib.config import Config
from lib.params import named_specs

# weight: the product that it takes part in, in the letters of its axes
EINSUMS = {
    "smear.gate": "BTC,C->BT",
    "blocks.wq": "BTD,DNH->BTNH",
    "blocks.wk": "BTD,DKH->BTKH",
    "blocks.wv": "BTD,DKH->BTKH",
    "blocks.wo": "BTNH,NHD->BTD",
    "blocks.w_in": "BTD,DF->BTF",
    "blocks.w_gate": "BTD,DF->BTF",
    "blocks.w_out": "BTF,FD->BTD",
    "blocks.value_gate": "BTC,CK->BTK",
    "head": "BTD,DV->BTV",
    "embed": "BTD,DV->BTV",  # where it is the head too
}


class Product(NamedTuple):
    """A product in the forward pass, with both that backward makes of it."""

    name: str
    einsum: str
    shape: tuple[int, ...]  # of the weight, all layers of it; of the scores in one layer
    flops: int  # per token, forward and backward


def products(config: Config) -> list[Product]:
    """Every product with a weight, and attention's own two; `flops` adds up to flops_per_token.

    A product with W numbers of weight takes 2 W FLOPs a token forward and 4 W backward. Attention
    multiplies queries by keys and probabilities by values: 12 N H FLOPs for each key in the window
    (PaLM, appendix B), causality not deducted.
    """
    # in the order in which a token meets them
    specs = dict(named_specs(config))
    rows = []
    for name, einsum in EINSUMS.items():
        looked_up = name == "embed" and not config.tied_head
        if name in specs and not looked_up:
            shape = specs[name].shape
            rows.append(Product(name, einsum, shape, 6 * math.prod(shape)))

    # scores and their use, layer by layer as far as each one's window reaches
    reach = [min(window, config.sequence_len) for window in config.windows]
    flops = 12 * config.n_head * config.head_dim * sum(reach)
    scores = (config.n_head, config.sequence_len, config.sequence_len)
    behind = next(i for i, row in enumerate(rows) if row.name == "blocks.wo")
    rows.insert(behind, Product("attention", "BTNH,BSNH->BNTS", scores, flops))
    return rows


def products_table(config: Config) -> str:
    """`products` as lines of text, with each one's share of the whole."""
    lines = [f"{'product':18} {'einsum':18} {'weight':22} {'FLOPs a token':>14} {'share':>7}"]
    for product in products(config):
        shape = " x ".join(map(str, product.shape))
        share = product.flops / config.flops_per_token
        name = f"{product.name:18} {product.einsum:18} {shape:22}"
        lines.append(f"{name} {product.flops:>14,} {share:>7.1%}")
    total = sum(product.flops for product in products(config))
    lines.append(f"{'together':60} {total:>14,}")
    return "\n".join(lines)
