"""Will it fit? A training step's memory from shapes alone, and the layout that follows from it."""

import functools
import math

import jax

from lib.config import Config, divisible_batch
from lib.files import UserError, choose
from lib.model.transformer import group_size
from lib.parallel.layout import BATCH, MESH_AXIS, RULES, Layout, make_layout
from lib.params import count_params
from lib.train.optim import compile_key
from lib.train.step import init_state, state_template

# share of a device's memory that an estimate may fill:
# the compiler's own figure differs by less than the rest
FILL = 0.9

# ---- how much ------------------------------------------------------------------------------------


def estimate_memory(config: Config, layout: Layout | None = None) -> dict[str, int]:
    """Bytes that a step holds at its peak on each device, by part; the compiled step knows better.

    LOG.md has the error against the compiler.
    """
    if layout is None:
        return dict(
            parameters=4 * count_params(config)["total"],
            optimizer=_optimizer_bytes(_shape_of_state(config)),
            **working_bytes(config),
        )
    state = state_template(config, layout)
    fsdp, tensor = layout.size("fsdp"), layout.size("tensor")
    share = config_of_share(config, layout.size(*BATCH), tensor)
    memory = dict(
        parameters=held_bytes(state.params),
        optimizer=held_bytes(state.opt_state),
        **working_bytes(share, fsdp, tensor),
    )
    return with_updates(memory, layout.size("data")) if layout.strategy == "zero" else memory


def with_updates(memory: dict[str, int], replicas: int) -> dict[str, int]:
    """The parts of a device's memory where so many `replicas` share the optimizer (zero).

    They gather the updates beside their share of the gradients, but only when activations and whole
    gradients are gone: that is the peak only where both were small.
    """
    backward = memory["gradients"] + memory["activations"]
    update = memory["parameters"] + memory["parameters"] // replicas
    return memory | dict(gradients=memory["gradients"] + max(0, update - backward))


def config_of_share(config: Config, rows: int, tensor: int) -> Config:
    """The step of one device, as if it were alone.

    rows: devices that share the rows. tensor: those that share each layer, so that one has a model
    as wide as the whole, but with fewer heads and a narrower mlp; the loss they share by positions.
    """
    microbatch = max(1, config.microbatch // rows)
    kv_heads = max(1, config.n_kv_head // tensor)
    tokens = microbatch * config.sequence_len
    return config.replace(
        microbatch=microbatch,
        total_batch_size=tokens * config.accumulate,
        n_kv_head=kv_heads,
        n_head=kv_heads * (config.n_head // config.n_kv_head),
        mlp_dim=max(1, config.mlp_dim // tensor),
        loss_chunk=min(config.loss_chunk, max(1, tokens // tensor)),
    )


def held_bytes(tree) -> int:
    """Bytes that one device holds of a tree of shapes, sharded or not."""
    total = 0
    for a in jax.tree.leaves(tree):
        shape = a.sharding.shard_shape(a.shape) if a.sharding else a.shape
        total += a.dtype.itemsize * math.prod(shape)
    return total


def working_bytes(share: Config, fsdp: int = 1, tensor: int = 1) -> dict[str, int]:
    """Bytes beside the state, by part: float32 gradients, and under activations all that comes and
    goes at a step's peak.

    share: the step of one device, of `fsdp` that each hold a part of every weight and `tensor` that
    share each layer.
    """
    tokens = share.microbatch * share.sequence_len
    kept = tokens * kept_per_token(share, tensor) * share.dtype.itemsize
    weights = _copied_bytes(share, fsdp) + _gathered_bytes(share, fsdp)

    # a microbatch's peak is at its loss, or where backward is in a layer
    at_peak = max(_loss_bytes(share), _layer_bytes(share, fsdp))
    return dict(
        gradients=4 * count_params(share)["total"] // fsdp,
        activations=kept + weights + at_peak,
    )


def kept_per_token(config: Config, tensor: int) -> int:
    """Numbers that forward keeps of each token of a microbatch.

    Of each layer everything (none), the products of matrices (dots) or the input (layer). Once for
    all layers four streams, and the lines of value embeddings.
    """
    products, heads = _products_per_token(config), _heads_per_token(config)
    if config.remat == "layer":
        per_layer = config.n_embd
    elif config.remat == "dots":
        per_layer = products
    elif group_size(config)[1]:
        # a scan over layers stacks whatever backward asks for
        per_layer = _whole_layer_per_token(config)
    else:
        # without it XLA computes norms and the mlp's activation again; what stays are products,
        # the streams that they read, and heads as attention reads them
        per_layer = products + 2 * config.n_embd + heads

    # devices that share a layer hold one stream more: a fit (LOG.md)
    if tensor > 1:
        per_layer += config.n_embd
    lines = len(config.value_layers) * config.n_kv_head * config.head_dim
    return per_layer * config.n_layer + 4 * config.n_embd + lines


def _copied_bytes(config: Config, fsdp: int) -> int:
    """Bytes of what all microbatches read, made once: matrices in the dtype that they are
    multiplied in, where that is not float32, and value embeddings turned token by token, where a
    device holds whole ones.
    """
    if config.accumulate == 1:
        return 0
    counts = count_params(config)
    narrow = config.operand_dtype.itemsize
    matrices = narrow * (counts["blocks"] + counts["head"]) if narrow < 4 else 0
    turned = config.dtype.itemsize * counts["value_embeds"]
    return matrices // fsdp + (turned if fsdp == 1 else 0)


def _gathered_bytes(config: Config, fsdp: int) -> int:
    """Bytes of what devices that each hold a part have whole at a time: a table in float32, and a
    layer's weights and their gradients, or those of the layers that a scan takes at once.
    """
    if fsdp == 1:
        return 0
    table = config.padded_vocab * config.n_embd
    period, groups = group_size(config)
    layers = count_params(config)["blocks"] * (period if groups else 1) // config.n_layer
    return 4 * table + (4 + config.operand_dtype.itemsize) * layers


def _loss_bytes(config: Config) -> int:
    """Bytes of a chunk of logits, whose gradient a TPU never writes, and of the head's gradient."""
    tokens = min(config.loss_chunk, config.microbatch * config.sequence_len)
    return tokens * config.padded_vocab * config.dtype.itemsize + _head_gradient_bytes(config)


def _layer_bytes(config: Config, fsdp: int) -> int:
    """Bytes of the layer that backward computes again, and of a microbatch's own gradients."""
    again = 0 if config.remat == "none" else _whole_layer_per_token(config)
    tokens = config.microbatch * config.sequence_len
    computed = tokens * again * config.dtype.itemsize
    if config.accumulate == 1:
        return computed
    blocks = config.operand_dtype.itemsize * count_params(config)["blocks"]
    return computed + blocks // fsdp + _head_gradient_bytes(config)


def _head_gradient_bytes(config: Config) -> int:
    """Bytes of a microbatch's gradient of the head, float32, beside the sum of several."""
    return 4 * count_params(config)["head"] if config.accumulate > 1 else 0


def _products_per_token(config: Config) -> int:
    """Numbers of a layer's input, of what its products make, and of what was attended."""
    mlp = (2 if config.mlp == "swiglu" else 1) * config.mlp_dim
    attended = config.n_head * config.head_dim
    return config.n_embd + _heads_per_token(config) + attended + mlp


def _heads_per_token(config: Config) -> int:
    """Numbers of queries, keys and values."""
    return (config.n_head + 2 * config.n_kv_head) * config.head_dim


def _whole_layer_per_token(config: Config) -> int:
    """Numbers of all that a layer makes, products, norms and activations."""
    return 2 * (_products_per_token(config) + config.n_embd + config.mlp_dim)


def _shape_of_state(config: Config) -> Config:
    """The config with defaults for all that its optimizer's state does not depend on."""
    plain = dict(microbatch=1, attention="einsum", attention_block=0, remat="none", loss_chunk=1)
    return compile_key(config.replace(**plain))


@functools.cache
def _optimizer_bytes(config: Config) -> int:
    state = jax.eval_shape(lambda: init_state(config).opt_state)
    return sum(4 * math.prod(a.shape) for a in jax.tree.leaves(state))


def peak_bytes(compiled) -> int:
    """Bytes that a compiled program holds at its peak on each device, as the compiler says."""
    used = compiled.memory_analysis()
    return (
        used.temp_size_in_bytes
        + used.argument_size_in_bytes
        + used.output_size_in_bytes
        - used.alias_size_in_bytes
    )


# ---- on which devices ----------------------------------------------------------------------------


def choose_layout(
    config: Config,
    strategy: str = "auto",
    mesh: dict[str, int] | None = None,
    memory: int = 0,
    grow: bool = True,
) -> tuple[Config, Layout | None, str]:
    """(config, the layout of all devices, why it is that one); one device needs none.

    strategy: of lib.parallel.layout.RULES, or auto: what the mesh's axes name; without a mesh zero
    where its estimate fits FILL of the `memory` bytes of a device, else fsdp. grow:
    config.microbatch is for one device: make it that for each, or the most below it that divides
    the batch. UserError where something does not divide.
    """
    choose("sharding strategy", strategy, ["auto", *RULES])
    if jax.device_count() == 1 and not mesh:
        return config, None, "one, which keeps everything"

    if strategy != "auto":
        why = "asked for"
    elif mesh:
        strategy, why = _strategy_of(mesh), "by the mesh"
    else:
        changed, layout = _lay_out(config, "zero", mesh, grow)
        need, needed = _need(changed, layout, memory)
        if need <= FILL * memory:
            return changed, layout, f"zero: it fits with {needed}"
        strategy, why = "fsdp", f"zero would take {needed}"

    config, layout = _lay_out(config, strategy, mesh, grow)
    return config, layout, f"{strategy}: {why}; {_need(config, layout, memory)[1]}"


def parse_mesh(text: str) -> dict[str, int] | None:
    """Mesh axes and their sizes from "data=2 fsdp=4"; None for an empty text."""
    pairs = [word.partition("=") for word in text.replace(",", " ").split()]
    if not all(size.isdigit() for _, _, size in pairs):
        raise UserError(f"mesh {text!r} is not of the form data=2 fsdp=4")
    return {axis: int(size) for axis, _, size in pairs} or None


def _strategy_of(mesh: dict[str, int]) -> str:
    """The strategy that makes use of the mesh's axes."""
    for strategy, axis in (("tp", "tensor"), ("fsdp", "fsdp")):
        if mesh.get(axis, 1) > 1:
            return strategy
    return "zero"


def _lay_out(config: Config, strategy: str, mesh, grow: bool) -> tuple[Config, Layout]:
    """The layout of a strategy, and the config with a microbatch for all of its devices."""
    sizes = {MESH_AXIS[strategy]: jax.device_count()} if mesh is None else mesh
    ways = math.prod(sizes.get(axis, 1) for axis in BATCH)
    rows = config.total_batch_size // config.sequence_len
    change = divisible_batch(config, ways, grow) if ways > 0 else {}
    if "total_batch_size" in change:
        cure = " and ".join(f"{name}={value}" for name, value in change.items())
        raise UserError(
            f"a batch of {rows} rows cannot be split over {ways} devices: use {cure}, or fewer "
            f"devices on the mesh axes {' and '.join(BATCH)}"
        )
    if grow and ways > 0:
        possible = [m for m in range(1, config.microbatch + 1) if rows % (m * ways) == 0]
        if possible:
            config = config.replace(microbatch=max(possible) * ways)
    return config, make_layout(strategy, config, mesh=mesh)


def _need(config: Config, layout: Layout, memory: int) -> tuple[int, str]:
    """(bytes a device by estimate, the same in words)."""
    need = sum(estimate_memory(config, layout).values())
    return need, f"{need / 2**30:.2f} of {memory / 2**30:.1f} GiB a device, estimated"
