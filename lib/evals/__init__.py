"""Measurements of a trained model: bits per byte here; likelihoods, CORE, chats and how sure all that is beside it."""

import contextlib
import math
from collections.abc import Iterable

import jax
import numpy as np

from lib import model
from lib.config import Config
from lib.files import UserError, first_line

token_losses = jax.jit(model.token_losses, static_argnames="config")


@contextlib.contextmanager
def evaluating(task: str, item):
    """Say which item of which task an exception comes from. It goes on: an item that failed is never scored."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{task} item {item}: {e}") from e
    except Exception as e:
        raise RuntimeError(f"{task} item {item}: {type(e).__name__}: {first_line(e)}") from e


def sum_bits(losses_BT, targets_BT, token_bytes) -> tuple[float, int]:
    """(nats, bytes) over targets that stand for text: ignored targets and special tokens (0 bytes) count for neither."""
    targets = np.asarray(targets_BT)
    size = np.where(targets >= 0, np.asarray(token_bytes)[np.maximum(targets, 0)], 0)
    return float(np.sum(np.asarray(losses_BT, np.float64) * (size > 0))), int(size.sum())


def bits_per_byte(
    params,
    config: Config,
    batches: Iterable,
    token_bytes,
    max_batches: int | None = None,
    losses_of=token_losses,
) -> dict:
    """{"bpb", "stderr", "nats", "bytes", "loss"} over (inputs_BT, targets_BT, ...) batches of one shape.

    Vocabulary-independent: sum of nats / (ln 2 * sum of bytes). token_bytes: raw UTF-8 bytes per token id, 0 for
    specials. Without any bytes bpb is inf. loss: nats per target that stands for text. losses_of: `token_losses`, or several devices'.
    """
    rows = []
    tokens = 0
    for i, (inputs_BT, targets_BT, *_) in enumerate(batches):
        if i == max_batches:
            break
        losses = np.asarray(losses_of(params, config, inputs_BT, targets_BT))
        rows += [
            sum_bits(row, target, token_bytes)
            for row, target in zip(losses, np.asarray(targets_BT))
        ]
        tokens += int(
            (
                np.asarray(token_bytes)[np.maximum(targets_BT, 0)] * (np.asarray(targets_BT) >= 0)
                > 0
            ).sum()
        )
    nats, size = np.array(rows, np.float64).reshape(-1, 2).T
    bpb, stderr = ratio_bits(nats, size)
    return dict(
        bpb=bpb,
        stderr=stderr,
        nats=float(nats.sum()),
        bytes=int(size.sum()),
        loss=float(nats.sum() / max(tokens, 1)),
    )


def ratio_bits(nats, size) -> tuple[float, float]:
    """(bits per byte, its standard error) from nats and bytes per row, rows being independent draws (delta method)."""
    if not size.sum():
        return math.inf, math.inf
    bpb, n = nats.sum() / (math.log(2) * size.sum()), len(nats)
    residual = nats / math.log(2) - bpb * size
    return float(bpb), float(math.sqrt((residual**2).sum() * n / max(n - 1, 1)) / size.sum())
