"""The transformer: parameters and tokens become logits or a loss, the same code for training and for decoding.

`transformer.py` is the model, to be read beside the papers.
"""

from lib.model.transformer import (
    decoding_params,
    forward,
    group_size,
    hidden,
    init_cache,
    logits,
    loss_fn,
    loss_sums,
    quantized,
    token_losses,
)
from lib.params import init_params

__all__ = [
    "decoding_params",
    "forward",
    "group_size",
    "hidden",
    "init_cache",
    "init_params",
    "logits",
    "loss_fn",
    "loss_sums",
    "quantized",
    "token_losses",
]
