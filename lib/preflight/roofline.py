"""How long a training step must take at least: its work by component, against what a chip can do.

The work comes from shapes alone (`account`), or from a compiled program (`hlo.analyse`) with what
its opaque kernels do added (`add_kernels`). A bound assumes full speed of whatever binds, so
nothing can beat it; what else there is (vector work, waiting, latency) only adds.
"""

import math
from typing import NamedTuple

import jax

from lib.chips import Chip
from lib.config import Config, round_up
from lib.model.cache import RING
from lib.model.kernels import block_size
from lib.model.transformer import group_size
from lib.params import count_params, is_spec, param_specs
from lib.preflight.hlo import COMPONENTS, Work, sent_bytes
from lib.preflight.memory import config_of_share, kept_per_token

# attention that keeps its scores on chip
KERNELS = ("splash", "pallas")

# how often the layers' forward pass is run again in backward
RECOMPUTED = {"none": 0, "dots": 0, "layer": 1}


class Account(NamedTuple):
    """What a step does on one device: work by component, and the bytes that it sends."""

    components: dict[str, Work]
    sent: float


class Bound(NamedTuple):
    """The least time of a component and what it waits for: compute, memory, network, or nothing."""

    seconds: float
    binds: str
    flops: float
    bytes: float


class Split(NamedTuple):
    """How many devices share the rows (data, fsdp) and each layer's parts (tensor)."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def rows(self) -> int:
        """Devices with rows of their own."""
        return self.data * self.fsdp

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor


# ---- kernels -------------------------------------------------------------------------------------


def visits(length: int, window: int, block: int) -> int:
    """How many blocks of keys all blocks of queries look at, of a row of `length` tokens."""
    total = 0
    for i in range(length // block):
        first = max(0, i * block - window) // block
        total += i - first + 1
    return total


def kernel_work(config: Config, kernel: str, matrix_unit: int = 1) -> Work:
    """What one attention kernel of every layer does for one row, as the mean over layers.

    Blocks that the mask cuts are computed whole. bytes are only those that re-reading keys and
    values (backward: queries and their gradients) for every block adds to reading each operand
    once.
    """
    # pairs of blocks that the mask leaves, as the mean over layers
    length, heads, width = config.sequence_len, config.n_head, config.head_dim
    block = block_size(config.attention_name, length, config.attention_block)
    pairs = sum(visits(length, w, block) for w in config.windows) / config.n_layer
    filled = math.ceil(width / matrix_unit) * matrix_unit

    # products of a pair of blocks that sum over the head width, and that sum over positions
    forward = kernel.endswith(("fwd", "forward"))
    over_width, over_block = (1, 1) if forward else (2, 3)
    flops = 2 * pairs * block * block * heads * width
    reread = max(0, pairs * block - length)
    return Work(
        flops=flops * (over_width + over_block),
        busy=flops * (over_width / (width / filled) + over_block),
        bytes=reread * 2 * heads * width * config.dtype.itemsize,
    )


def add_kernels(
    components: dict[str, Work],
    kernels: dict[str, int],
    config: Config,
    rows: float,
    matrix_unit: int,
    tensor: int = 1,
):
    """Add what a program's kernels do to its attention.

    rows: of one microbatch on one device; tensor: devices that share the heads.
    """
    for name, runs in kernels.items():
        work = kernel_work(config, name, matrix_unit)
        times = runs * rows / tensor
        components["attention"].add(work.flops * times, work.busy * times, work.bytes * times)


# ---- a step from shapes --------------------------------------------------------------------------


def account(
    config: Config, matrix_unit: int = 1, split: Split | None = None, strategy: str = "dp"
) -> Account:
    """What a step does per device, from shapes alone.

    Traffic counts every wide array as written once and read by each product that needs it; LOG.md
    has the error against compiled programs.
    """
    split = split or Split()
    components = {name: Work() for name in COMPONENTS}
    _add_attention(components["attention"], config, split, matrix_unit)
    _add_mlp(components["mlp"], config, split)
    _add_head(components["head+loss"], config, split)
    _add_embedding(components["embedding"], config, split)
    _add_optimizer(components["optimizer"], config, split, strategy)
    _add_between(components["other"], config, split)
    return Account(components, _sent(config, split, strategy))


def _product(work: Work, flops: float, bytes: float):
    """Add a product whose summed axis fills the matrix unit."""
    work.add(flops, flops, bytes)


def _tokens(config: Config, split: Split) -> float:
    """Tokens of a step on each device."""
    return config.total_batch_size / split.rows


def _passes(config: Config) -> int:
    """How often a layer's arrays are gone through: forward, twice backward, and recomputed."""
    return 3 + RECOMPUTED[config.remat]


def _weight_bytes(config: Config, count: int) -> int:
    """Traffic of `count` weights: read forward and backward, their gradient written."""
    return count * config.accumulate * _passes(config) * config.dtype.itemsize


def _add_attention(work: Work, config: Config, split: Split, matrix_unit: int):
    """Projections of all layers, and attention itself."""
    layers, width, itemsize = config.n_layer, config.n_embd, config.dtype.itemsize
    tokens, tensor, again = _tokens(config, split), split.tensor, RECOMPUTED[config.remat]
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim

    # projections
    weights = width * (2 * q + 2 * kv)
    recomputed = 2 * q * width if config.remat == "dots" else 2 * weights * again
    arrays = tokens * itemsize * _passes(config) * (5 * width * tensor + 6 * (q + kv))
    flops = layers * tokens * (6 * weights + recomputed) / tensor
    _product(work, flops, layers * (_weight_bytes(config, weights) + arrays) / tensor)

    # scores of all pairs, in float32, written or read four times in all
    if config.attention_name not in KERNELS:
        pairs = sum(min(w, config.sequence_len) + 1 for w in config.windows)
        flops = (12 + 4 * again) * pairs * tokens * q / tensor
        _product(work, flops, 4 * 4 * pairs * tokens * config.n_head / tensor)
        return

    # kernels keep them on chip; splash writes the log-sum-exp 128 times in float32
    rows = layers * tokens / config.sequence_len
    kernels = {"fwd": 1 + again, "dkv": 1}
    one = {"attention": work}
    add_kernels(one, kernels, config, rows, matrix_unit, tensor)
    lanes = 512 if config.attention_name == "splash" else 4
    work.add(bytes=layers * tokens * config.n_head * lanes * 2 / tensor)


def _add_mlp(work: Work, config: Config, split: Split):
    """The two or three wide products of all layers."""
    # two or three products of the width and the mlp's own
    layers, width, wide = config.n_layer, config.n_embd, config.mlp_dim
    tokens, tensor, again = _tokens(config, split), split.tensor, RECOMPUTED[config.remat]
    weights = (3 if config.mlp == "swiglu" else 2) * width * wide

    # most stay on the chip, but not what devices that share a layer send each other
    narrow_arrays = _passes(config) * width * (5 * tensor if tensor > 1 else 2)
    wide_arrays = (8 + 2 * again) * wide
    arrays = tokens * config.dtype.itemsize * (narrow_arrays + wide_arrays)
    flops = layers * tokens * (6 + 2 * again) * weights / tensor
    _product(work, flops, layers * (_weight_bytes(config, weights) + arrays) / tensor)


def _add_head(work: Work, config: Config, split: Split):
    """Logits and their loss, in chunks."""
    width, vocabulary, itemsize = config.n_embd, config.padded_vocab, config.dtype.itemsize
    tokens = _tokens(config, split)
    chunks = math.ceil(tokens / config.accumulate / config.loss_chunk)

    # each chunk reads the head twice; its gradient mostly stays on the chip between chunks
    weights = config.accumulate * width * vocabulary * (chunks * 2 * itemsize + 8)
    # written, while a TPU adds up, and read by both products of their gradient
    logits = tokens * vocabulary * 3 * itemsize / split.tensor
    _product(work, 6 * tokens * width * vocabulary / split.tensor, weights + logits)


def _add_embedding(work: Work, config: Config, split: Split):
    """Lines looked up, and their gradients."""
    looked_up = _tokens(config, split) * config.n_embd
    work.add(bytes=looked_up * (4 + 3 * config.dtype.itemsize + 8))


def _add_between(work: Work, config: Config, split: Split):
    """What lies between components: sums of gradients, value embeddings, what a scan stacks."""
    itemsize, tokens = config.dtype.itemsize, _tokens(config, split)
    counts = count_params(config)

    # float32 sums over microbatches, of all that is not only looked up
    if config.accumulate > 1:
        summed = (counts["blocks"] / split.tensor + counts["head"]) / split.fsdp
        work.add(bytes=config.accumulate * summed * (8 + itemsize))

    # lines turned there and back, their gradients as well, and added to float32 sums
    lines = len(config.value_layers) * config.n_kv_head * config.head_dim / split.tensor
    work.add(bytes=tokens * lines * (8 * itemsize + 20))

    # a scan cuts what it kept out of its stacks: each is written once more, and read
    if group_size(config)[1]:
        share = config_of_share(config, split.rows, split.tensor)
        work.add(bytes=tokens * kept_per_token(share, split.tensor) * itemsize * 2)


def _add_optimizer(work: Work, config: Config, split: Split, strategy: str):
    """Muon's orthogonalised matrices, and AdamW for the rest."""
    shared = split.devices if strategy in ("zero", "fsdp", "tp") else 1
    itemsize = config.dtype.itemsize
    for spec in jax.tree.leaves(param_specs(config), is_leaf=is_spec):
        size = math.prod(spec.shape)
        if spec.group != "matrix" or config.optimizer != "muon":
            work.add(bytes=28 * size / shared)
            continue
        layers = spec.shape[0]
        rows = math.prod(spec.shape[1 : 1 + spec.n_in])
        flops = layers * polar_work((rows, size // layers // rows), itemsize)
        _product(work, flops / split.devices, size * (20 + 16 * itemsize + 8) / split.devices)


def polar_work(shape: tuple[int, int], itemsize: int) -> float:
    """FLOPs to orthogonalise one matrix, as Muon does."""
    # five iterations on the smaller side's square, in float32 on a reduced matrix where it is long
    short, long = sorted(shape)
    if itemsize == 4 and long >= 2 * short:
        return 2 * short * short * long * 2 + 5 * 2 * 3 * short**3 + 4 * 2 * short**3
    return 5 * (4 * short * short * long + 2 * short**3)


def _sent(config: Config, split: Split, strategy: str) -> float:
    """Bytes that each device sends in a step, as a ring needs."""
    if split.devices == 1:
        return 0.0
    # every strategy sums gradients over its replicas
    count = count_params(config)["total"]
    gradients = 4 * count / split.tensor
    summed = sent_bytes("all-reduce", gradients, split.data)

    if strategy == "tp":
        # in each layer four sums over activations, there and back, and what is recomputed
        sums = config.n_layer * (4 if config.remat == "none" else 5)
        activations = _tokens(config, split) * config.n_embd * config.dtype.itemsize
        return summed + sums * sent_bytes("all-reduce", activations, split.tensor)
    if strategy == "fsdp":
        # weights are gathered forward and backward, their gradients scattered, each microbatch
        share = config.dtype.itemsize * count / split.fsdp
        gathered = 2 * sent_bytes("all-gather", share, split.fsdp)
        scattered = sent_bytes("reduce-scatter", 4 * count, split.fsdp)
        replicas = sent_bytes("all-reduce", gradients / split.fsdp, split.data)
        return config.accumulate * (gathered + scattered) + replicas
    return summed


# ---- decoding ------------------------------------------------------------------------------------


def decode_bytes(config: Config, rows: int, length: int, int8: bool = False) -> dict[str, int]:
    """Bytes that one token for each of `rows` rows cannot do without, by part: weights are read
    once for all rows, lines of tables and caches for each. What stays on a chip from one token to
    the next counts as well.

    length: tokens that a cache holds, of which a layer reads as many as its ring has.
    """
    itemsize, layers = config.dtype.itemsize, config.n_layer
    weight = 1 if int8 else itemsize
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    mlp_matrices = 3 if config.mlp == "swiglu" else 2
    slots = sum(min(length, round_up(window + 1, RING)) for window in config.windows)
    lines = config.n_embd + len(config.value_layers) * kv
    return {
        "attention weights": weight * layers * config.n_embd * 2 * (q + kv),
        "mlp weights": weight * layers * config.n_embd * config.mlp_dim * mlp_matrices,
        "head": weight * config.n_embd * config.padded_vocab,
        "tables": itemsize * rows * lines,
        "caches": itemsize * rows * slots * 2 * kv,
    }


# ---- the bound -----------------------------------------------------------------------------------


def bound(components: dict[str, Work], chip: Chip, sent: float = 0.0) -> dict[str, Bound]:
    """The bound of each component, and under "step" their sum, which the slowest binds.

    sent: bytes that a device sends over the network. Components follow one another; within one,
    compute, memory and network overlap fully.
    """
    # each component waits for what takes it longest
    bounds = {}
    for name, work in components.items():
        times = {"compute": work.busy / chip.flops, "memory": work.bytes / chip.bandwidth}
        if name == "collectives" and sent:
            times["network"] = sent / chip.network
        binds = max(times, key=lambda resource: times[resource])
        seconds = times[binds]
        bounds[name] = Bound(seconds, binds if seconds else "", work.flops, work.bytes)

    # and the step for all of them, one after the other
    slowest = max(bounds, key=lambda name: bounds[name].seconds)
    bounds["step"] = Bound(
        seconds=sum(b.seconds for b in bounds.values()),
        binds=slowest,
        flops=sum(b.flops for b in bounds.values()),
        bytes=sum(b.bytes for b in bounds.values()),
    )
    return bounds


def mfu(config: Config, seconds: float, chip: Chip, chips: int = 1) -> float:
    """The model's FLOPs (Config.flops_per_token) of a step over what `chips` could do meanwhile."""
    return config.flops_per_token * config.total_batch_size / seconds / chip.flops / chips
