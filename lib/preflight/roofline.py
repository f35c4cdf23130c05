"""How long a training step must take at least: floating-point work, memory traffic and network by component, against what a chip can do.

From shapes alone (`account`), or from a compiled program (lib.hlo) with what its opaque kernels do added (`add_kernels`). A bound
assumes full speed of whatever binds, so nothing can beat it; what else there is (vector work, waiting, latency) only adds.
"""

import math

import jax

from lib.chips import Chip
from lib.config import Config
from lib.model.attention import block_size
from lib.params import count_params, is_spec, param_specs
from lib.preflight.hlo import COMPONENTS

KERNELS = ("splash", "pallas")  # attention that keeps its scores on chip


def _visits(T: int, window: int, block: int) -> int:
    """How many blocks of keys the blocks of queries look at, all together."""
    return sum(i - max(0, i * block - window) // block + 1 for i in range(T // block))


def kernel_work(config: Config, kernel: str, matrix_unit: int = 1) -> dict[str, float]:
    """What one attention kernel of every layer does for one row: {"flops", "busy", "bytes"}, mean over layers.

    Blocks that the mask cuts are computed whole. bytes are only those that re-reading keys and values (backward: queries and their
    gradients) for every block adds to reading each operand once.
    """
    T, N, H = config.sequence_len, config.n_head, config.head_dim
    block = block_size(config.attention_name, T, config.attention_block)
    visits = sum(_visits(T, w, block) for w in config.windows) / config.n_layer
    fill = H / (math.ceil(H / matrix_unit) * matrix_unit)
    # products of a block pair that sum over the head width, and that sum over positions
    over_head, over_block = (1, 1) if kernel.endswith(("fwd", "forward")) else (2, 3)
    pairs = 2 * visits * block * block * N * H
    return dict(
        flops=pairs * (over_head + over_block),
        busy=pairs * (over_head / fill + over_block),
        bytes=max(0, visits * block - T) * 2 * N * H * config.dtype.itemsize,
    )


def add_kernels(
    parts: dict,
    kernels: dict[str, int],
    config: Config,
    rows: int,
    matrix_unit: int,
    tensor: int = 1,
):
    """Add to `parts` (of lib.hlo.analyse) what its kernels do; rows: of one microbatch on one device; tensor: devices that share the heads."""
    for name, runs in kernels.items():
        for key, n in kernel_work(config, name, matrix_unit).items():
            parts["attention"][key] += n * runs * rows / tensor


def polar_work(shape: tuple[int, int], itemsize: int) -> float:
    """FLOPs to orthogonalise one matrix, as lib.optim does."""
    short, long = sorted(shape)
    if itemsize == 4 and long >= 2 * short:
        return 2 * short * short * long * 2 + 5 * 2 * 3 * short**3 + 4 * 2 * short**3
    return 5 * (4 * short * short * long + 2 * short**3)


def account(
    config: Config,
    matrix_unit: int = 1,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    strategy: str = "dp",
) -> dict:
    """`lib.hlo.analyse`'s components and the collectives' bytes, per device and step, from shapes alone.

    Traffic counts every wide array as written once and read by each product that needs it; LOG.md has the error against compiled programs.
    """
    L, D, F, V, T = (
        config.n_layer,
        config.n_embd,
        config.mlp_dim,
        config.padded_vocab,
        config.sequence_len,
    )
    e, A = config.dtype.itemsize, config.accumulate
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    t = config.total_batch_size / (data * fsdp)  # tokens
    devices = data * fsdp * tensor
    parts = {name: dict(flops=0.0, busy=0.0, bytes=0.0) for name in COMPONENTS}

    def add(part, flops, bytes_, summed=matrix_unit):
        parts[part]["flops"] += flops
        parts[part]["busy"] += flops * math.ceil(summed / matrix_unit) * matrix_unit / summed
        parts[part]["bytes"] += bytes_

    again = {"none": 0, "dots": 0, "layer": 1}[config.remat]
    wide = (3 if config.mlp == "swiglu" else 2) * D * F
    attention = D * (2 * q + 2 * kv)
    weights = lambda n: n * A * (3 + again) * e  # read forward and backward, gradient written
    redo = 2 * q * D if config.remat == "dots" else 2 * attention * again
    add(
        "attention",
        L * t * (6 * attention + redo) / tensor,
        L * (weights(attention) + t * e * (3 + again) * (6 * D * tensor + 6 * (q + kv))) / tensor,
    )
    add(
        "mlp",
        L * t * (6 + 2 * again) * wide / tensor,
        L * (weights(wide) + t * e * ((3 + again) * 5 * D * tensor + (8 + 2 * again) * F)) / tensor,
    )
    if config.attention_name in KERNELS:
        for kernel, runs in (("fwd", 1 + again), ("dkv", 1)):
            for key, n in kernel_work(config, kernel, matrix_unit).items():
                parts["attention"][key] += n * runs * L * t / T / tensor
        # splash writes the log-sum-exp 128 times in float32
        lanes = 512 if config.attention_name == "splash" else 4
        add("attention", 0, L * t * config.n_head * lanes * 2 / tensor)
    else:
        # all of a window's scores, in float32, there and back four times
        pairs = sum(min(w, T) + 1 for w in config.windows)
        add(
            "attention",
            (12 + 4 * again) * pairs * t * q / tensor,
            4 * 4 * pairs * t * config.n_head / tensor,
        )
    chunks = math.ceil(t / A / config.loss_chunk) * A
    add(
        "head+loss",
        6 * t * D * V / tensor,
        chunks * D * V * (2 * e + 8) + t * V * (12 + 3 * e) / tensor,
    )
    add("embedding", 0, t * D * (4 + 3 * e + 8) + A * V * D * 8)
    n = count_params(config)
    if A > 1:
        add("other", 0, A * 3 * 4 * n["total"] / (fsdp * tensor))
    share = devices if strategy in ("zero", "fsdp", "tp") else 1
    for spec in jax.tree.leaves(param_specs(config), is_leaf=is_spec):
        size = math.prod(spec.shape)
        if spec.group == "matrix" and config.optimizer == "muon":
            rows = math.prod(spec.shape[1 : 1 + spec.n_in])
            add(
                "optimizer",
                spec.shape[0] * polar_work((rows, size // spec.shape[0] // rows), e) / devices,
                size * (20 + 16 * e + 8) / devices,
            )
        else:
            add("optimizer", 0, 28 * size / share)
    ring = lambda size, n: size * (n - 1) / n
    grads, body = 4 * n["total"] / tensor, e * n["total"]
    sent = {
        "dp": 2 * ring(grads, data),
        "zero": 2 * ring(grads, data),
        "tp": 2 * ring(grads, data) + 4 * 2 * L * ring(t * D * e, tensor),
        "fsdp": A * (2 * ring(body, fsdp) + ring(4 * n["total"], fsdp))
        + 2 * ring(grads / fsdp, data),
    }[strategy]
    return dict(components=parts, sent=sent if devices > 1 else 0.0)


def bound(parts: dict, chip: Chip, sent: float = 0.0) -> dict:
    """{component: {"seconds", "binds", "flops", "bytes"}} and the sum under "step": the least time, and what it waits for.

    sent: bytes that a device sends over the network. Components follow one another; within one, compute, memory and network overlap fully.
    """
    out = {}
    for name, part in parts.items():
        times = dict(compute=part["busy"] / chip.flops, memory=part["bytes"] / chip.bandwidth)
        if name == "collectives" and sent:
            times["network"] = sent / chip.network
        binds = max(times, key=times.get)
        out[name] = dict(
            seconds=times[binds],
            binds=binds if times[binds] else "",
            flops=part["flops"],
            bytes=part["bytes"],
        )
    slowest = max(out, key=lambda k: out[k]["seconds"])
    return out | {
        "step": dict(
            seconds=sum(x["seconds"] for x in out.values()),
            binds=slowest,
            flops=sum(x["flops"] for x in out.values()),
            bytes=sum(x["bytes"] for x in out.values()),
        )
    }


def mfu(config: Config, seconds: float, chip: Chip, chips: int = 1) -> float:
    """The model's FLOPs (Config.flops_per_token) in a step of `seconds`, over what the chips could do."""
    return config.flops_per_token * config.total_batch_size / seconds / chip.flops / chips
