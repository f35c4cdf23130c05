"""Who holds which part: a mesh of devices, and what each strategy splits over it.

A strategy is a set of rules from the axes of a parameter's Spec to the axes of the mesh. Where the
devices then talk is in `collectives`.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lib.config import Config, divisible_batch
from lib.files import UserError, choose
from lib.parallel.hosts import from_each
from lib.params import Spec, is_spec, named_specs, param_specs

AXES = ("data", "fsdp", "tensor")

# the mesh axes over which rows of a batch are split
BATCH = ("data", "fsdp")

# Strategy: axis of a Spec -> axis of the mesh over which parameters are split. One mesh axis splits
# one axis of an array, the first listed here that the array has. "state" is no axis of a Spec: the
# optimizer's state is split over that mesh axis beyond what the parameters are.
RULES = {
    "dp": {},
    "zero": {"state": "data"},
    "fsdp": {"embed": "fsdp", "vocab": "fsdp", "state": "data"},
    "tp": {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "state": "data"},
}

# where all devices go unless told
MESH_AXIS = {"dp": "data", "zero": "data", "fsdp": "fsdp", "tp": "tensor"}


@dataclass(frozen=True)
class Layout:
    """A mesh with axes AXES and the strategy whose rules apply on it. Hashable and static."""

    mesh: Mesh
    strategy: str

    def size(self, *axes: str) -> int:
        """How many devices the named mesh axes span."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def partition(self, spec: Spec) -> P:
        """How a parameter is split."""
        return partition(self.strategy, self.mesh.shape, spec)

    def state_partition(self, spec: Spec, shape: tuple[int, ...]) -> P:
        """How an array of optimizer state is split.

        Like its parameter, where it has that axis, and over "state" on the first axis it divides.
        """
        split: list[str | None] = [
            over if size == full else None
            for over, size, full in zip(self.partition(spec), shape, spec.shape)
        ]
        over = RULES[self.strategy].get("state")
        if over and self.size(over) > 1:
            for i, size in enumerate(shape):
                if split[i] is None and size % self.size(over) == 0:
                    split[i] = over
                    break
        return P(*split)

    def sharding(self, *axes) -> NamedSharding:
        return NamedSharding(self.mesh, P(*axes))

    @property
    def batch(self) -> NamedSharding:
        """Of a batch (B, T): rows over the data and fsdp axes."""
        return self.sharding(BATCH)


def partition(strategy: str, sizes: Mapping[str, int], spec: Spec) -> P:
    """How a strategy splits a parameter over mesh axes of these sizes."""
    split: list[str | None] = [None] * len(spec.shape)
    for axis, over in RULES[strategy].items():
        if axis in spec.axes and over not in split and sizes.get(over, 1) > 1:
            split[spec.axes.index(axis)] = over
    return P(*split)


# ---- making one ----------------------------------------------------------------------------------


def make_layout(
    strategy: str, config: Config, devices=None, mesh: dict[str, int] | None = None
) -> Layout:
    """The layout of `strategy` on `devices` (default: all there are), checked against `config`.

    mesh: devices per mesh axis, e.g. {"data": 2, "tensor": 4}; without it all go to the strategy's
    own axis. UserError says what does not divide.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    sizes = check_layout(strategy, config, devices.size, mesh)
    layout = Layout(_mesh(devices, [sizes.get(axis, 1) for axis in AXES]), strategy)
    if jax.process_count() > 1 and devices.flat[0].platform == "cpu":
        _introduce(layout)
    return layout


def _mesh(devices, shape: list[int]) -> Mesh:
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    everything = np.asarray(jax.devices())
    if devices.size == everything.size and (devices == everything).all():
        # this one knows the chips' neighbours
        return jax.make_mesh(shape, AXES, axis_types=kinds)
    return Mesh(devices.reshape(shape), AXES, axis_types=kinds)


def check_layout(
    strategy: str, config: Config, count: int, mesh: dict[str, int] | None = None
) -> dict[str, int]:
    """Sizes of the mesh axes of `make_layout` on so many devices; UserError says what does not
    divide. Needs no device.
    """
    choose("sharding strategy", strategy, RULES)
    sizes = {MESH_AXIS[strategy]: count} if mesh is None else mesh
    _check_mesh(strategy, sizes, count)
    _check_config(strategy, sizes, config)
    return sizes


def _check_mesh(strategy: str, sizes: dict[str, int], count: int):
    for axis in sizes:
        choose("mesh axis", axis, AXES)
    needed = math.prod(sizes.values())
    if needed != count or min(sizes.values()) < 1:
        written = " x ".join(f"{axis}={n}" for axis, n in sizes.items())
        raise UserError(
            f"a mesh of {written} needs {needed} devices, and there are {count}: "
            "choose sizes whose product that is"
        )
    used = {*RULES[strategy].values(), "data"}
    for axis, n in sizes.items():
        if n > 1 and axis not in used:
            raise UserError(
                f"strategy {strategy} splits nothing over the mesh axis {axis}={n}: "
                f"use {' or '.join(sorted(used))}"
            )


def _check_config(strategy: str, sizes: dict[str, int], config: Config):
    """UserError where the devices do not divide the config's rows, heads, or a parameter's axis."""
    ways = math.prod(sizes.get(axis, 1) for axis in BATCH)
    tensor = sizes.get("tensor", 1)
    if config.microbatch % ways:
        change = divisible_batch(config, ways)
        cure = " and ".join(f"{name}={value}" for name, value in change.items())
        raise UserError(
            f"microbatch={config.microbatch} rows cannot be split over {ways} devices of the mesh "
            f"axes {' and '.join(BATCH)}: use {cure}, or fewer devices there"
        )
    if config.n_kv_head % tensor or config.mlp_dim % tensor or config.sequence_len % tensor:
        raise UserError(
            f"the tensor axis of {tensor} devices must divide n_kv_head={config.n_kv_head}, "
            f"mlp_dim={config.mlp_dim} and sequence_len={config.sequence_len}: "
            "use a smaller tensor axis, or more key/value heads"
        )
    for name, spec in named_specs(config):
        for axis, n, over in zip(spec.axes, spec.shape, partition(strategy, sizes, spec)):
            if over and n % sizes[over]:
                raise UserError(
                    f"axis {axis} of {name} has {n} entries, which the {over} axis of "
                    f"{sizes[over]} devices does not divide: "
                    "use another mesh, or a size that it divides"
                )


def _introduce(layout: Layout):
    """Connect the processes of each group that will talk, now that all are here.

    Gloo, with which CPUs talk, connects a group when it first talks and gives up after 30 seconds,
    in which not all may have compiled.
    """
    axes = [axis for axis in AXES if layout.size(axis) > 1]
    for count in range(1, len(axes) + 1):
        for group in itertools.combinations(axes, count):
            meet = _meeting(layout, group)
            from_each("introduced", "".join(group))
            jax.block_until_ready(meet())


def _meeting(layout: Layout, group: tuple[str, ...]):
    """A compiled program in which the devices along the mesh axes of `group` talk once."""

    def total():
        return jax.lax.psum(sum(map(jax.lax.axis_index, group)), group)

    share = jax.shard_map(total, mesh=layout.mesh, in_specs=(), out_specs=P(), check_vma=False)
    return jax.jit(share).lower().compile()


# ---- arrays on it --------------------------------------------------------------------------------


def param_shardings(layout: Layout, config: Config) -> dict:
    """A NamedSharding for each parameter."""
    return jax.tree.map(
        lambda spec: NamedSharding(layout.mesh, layout.partition(spec)),
        param_specs(config),
        is_leaf=is_spec,
    )


def state_shardings(layout: Layout, config: Config, template):
    """NamedShardings for a TrainState like `template`.

    Parameters and moments as the strategy splits them; all else on every device.
    """

    def moments(tree):
        return jax.tree.map(
            lambda spec, a: NamedSharding(layout.mesh, layout.state_partition(spec, a.shape)),
            param_specs(config),
            tree,
            is_leaf=is_spec,
        )

    everywhere = jax.tree.map(lambda _: layout.sharding(), template)
    m, v = moments(template.opt_state.m), moments(template.opt_state.v)
    return everywhere._replace(
        params=param_shardings(layout, config),
        opt_state=everywhere.opt_state._replace(m=m, v=v),
    )


def put_batch(layout: Layout | None, rows_BT, whole: bool = False):
    """A batch, or a tree of them, on its devices.

    Each process gives its own rows, or with `whole` all of them give all the same rows.
    """
    if layout is None:
        return jax.device_put(rows_BT)

    def put(rows):
        shape = rows.shape if whole else None
        return jax.make_array_from_process_local_data(layout.batch, np.asarray(rows), shape)

    return jax.tree.map(put, rows_BT)


def whole(layout: Layout | None, params, dtype=None):
    """Parameters on one device of each process, for what is not written for a share.

    That is sampling and CORE. Without a layout they stay as they are. dtype: of the matrices, which
    halves what they take; decoding and evaluation read them in the compute dtype anyway.
    """
    if layout is None:
        return params

    def cast(a):
        return a.astype(dtype) if dtype is not None and a.ndim > 1 else a

    gather = jax.jit(lambda tree: jax.tree.map(cast, tree), out_shardings=layout.sharding())
    return jax.tree.map(lambda a: a.addressable_data(0), gather(params))


def equal(a, b) -> bool:
    """Whether two trees of arrays on the same devices are the same, bit for bit, everywhere."""

    def parts(x):
        if isinstance(x, jax.Array):
            return [np.asarray(shard.data) for shard in x.addressable_shards]
        return [np.asarray(x)]

    def same(x, y):
        return all(map(np.array_equal, parts(x), parts(y)))

    here = all(map(same, jax.tree.leaves(a), jax.tree.leaves(b)))
    return all(from_each("equal", here))
