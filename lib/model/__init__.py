"""The transformer: parameters and tokens become logits or a loss, the same code for training and
for decoding.

`transformer.py` is the model, to be read in one sitting; beside it stand its attention
(`attention.py`, and TPU kernels in `kernels.py`), its linear layer, its head with the loss, the
cache that decoding reads, int8 (`decoding.py`), a CPU's products of a few rows (`few_rows.py`)
and a GPU's turning of heads (`rotary_gpu.py`) and norms of the stream (`norm_gpu.py`).
"""

from lib.model.cache import Cache, init_cache
from lib.model.decoding import decoding_params, quantized
from lib.model.head import logits
from lib.model.transformer import (
    block,
    forward,
    hidden,
    loss_fn,
    loss_sums,
    token_logprobs,
    token_losses,
)
from lib.params import init_params

__all__ = [
    "Cache",
    "block",
    "decoding_params",
    "forward",
    "hidden",
    "init_cache",
    "init_params",
    "logits",
    "loss_fn",
    "loss_sums",
    "quantized",
    "token_logprobs",
    "token_losses",
]
