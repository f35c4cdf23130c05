"""Will it fit? A training step's memory from shapes alone, and the layout that follows from it."""

import functools
import math

import jax

from lib.config import Config, divisible_batch
from lib.files import UserError, choose
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
    if layout is not None:
        return _estimate_share(config, layout)
    parameters = 4 * count_params(config)["total"]
    tokens = config.microbatch * config.sequence_len

    # the loss sees its logits in chunks, each with its gradient
    logit_bytes = config.padded_vocab * (4 + config.dtype.itemsize)
    return dict(
        parameters=parameters,
        optimizer=_optimizer_bytes(_shape_of_state(config)),
        gradients=_gradient_bytes(config, parameters),
        activations=tokens * _kept_per_token(config) * config.dtype.itemsize,
        logits=min(config.loss_chunk, tokens) * logit_bytes,
    )


def _estimate_share(config: Config, layout: Layout) -> dict[str, int]:
    """`estimate_memory` of one device of a layout."""
    share = config_of_share(config, layout.size(*BATCH), layout.size("tensor"))
    one = estimate_memory(share)
    state = state_template(config, layout)
    parameters = held_bytes(state.params)
    fsdp = layout.size("fsdp")
    replicas = 1 if layout.strategy == "dp" else layout.size("data")
    gradients = _gradient_bytes(config, parameters) - spared_bytes(share, replicas) // fsdp
    return dict(
        parameters=parameters,
        optimizer=held_bytes(state.opt_state),
        gradients=gradients + gathered_bytes(config, fsdp),
        activations=one["activations"],
        logits=one["logits"],
    )


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


def _gradient_bytes(config: Config, parameters: int) -> int:
    """Those of a microbatch, and where there are several of them their sum as well."""
    return parameters * (2 if config.accumulate > 1 else 1)


def spared_bytes(share: Config, replicas: int) -> int:
    """Those of a microbatch's gradients, the embedding's and the head's, that are not there where
    replicas share the optimizer's work: a fit to compiled steps of zero and tp (LOG.md).
    """
    if replicas == 1 or share.accumulate == 1:
        return 0
    counts = count_params(share)
    return 4 * (counts["embed"] + counts["head"])


def gathered_bytes(config: Config, fsdp: int) -> int:
    """Those of what devices that each hold a part have whole at a time: the head's gradient and one
    table, in float32.
    """
    return 8 * config.padded_vocab * config.n_embd if fsdp > 1 else 0


def _kept_per_token(config: Config) -> int:
    """Numbers that backward keeps of each token of a microbatch.

    In each layer everything (none), the matrix products (dots) or the input (layer); with the
    last two also the whole of the one layer that it is recomputing.
    """
    heads = (config.n_head + 2 * config.n_kv_head) * config.head_dim
    attended = config.n_head * config.head_dim
    mlp_products = (2 if config.mlp == "swiglu" else 1) * config.mlp_dim
    products = config.n_embd + heads + attended + mlp_products
    whole = 2 * (products + config.n_embd + config.mlp_dim)

    per_layer = {"none": whole, "dots": products, "layer": config.n_embd}[config.remat]
    recomputed = 0 if config.remat == "none" else whole
    return per_layer * config.n_layer + 4 * config.n_embd + recomputed


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
