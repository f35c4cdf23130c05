"""Many devices: a mesh, what each strategy splits over it, and the few collectives of a step, by name.

A strategy is a set of rules from the axes of a parameter's Spec to the axes of the mesh. The forward and backward pass is written for one
device's share (`jax.shard_map`) and says itself where devices talk: `gather` brings the rest of a weight (fsdp), `enter` and `leave`
bracket what is split over heads and mlp width (tp, Megatron: arXiv:1909.08053), `reduce_gradients` ends it, once a step. Without a
layout all of them are the identity, so that there is one model. Only the optimizer is left to XLA's partitioner.
"""

import atexit
import contextlib
import functools
import itertools
import json
import math
import os
import socket
import sys
import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lib.config import Config, divisible_batch
from lib.files import UserError, choose, first_line
from lib.params import Spec, is_spec, named_specs, param_specs

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the mesh axes over which rows of a batch are split
# Strategy: axis of a Spec -> axis of the mesh over which parameters are split. One mesh axis splits one axis of an array, the first listed
# here that the array has. "state" is no axis of a Spec: the optimizer's state is split over that mesh axis beyond what the parameters are.
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
        return math.prod(self.mesh.shape[a] for a in axes)

    def partition(self, spec: Spec) -> P:
        """How a parameter is split."""
        out = [None] * len(spec.shape)
        for axis, over in RULES[self.strategy].items():
            if axis in spec.axes and over not in out and self.size(over) > 1:
                out[spec.axes.index(axis)] = over
        return P(*out)

    def state_partition(self, spec: Spec, shape: tuple[int, ...]) -> P:
        """How an array of optimizer state is split: like its parameter (where it has that axis) and over "state" on the first axis it divides."""
        out = [
            over if n == full else None
            for over, n, full in zip(self.partition(spec), shape, spec.shape)
        ]
        over = RULES[self.strategy].get("state")
        if over and self.size(over) > 1:
            for i, n in enumerate(shape):
                if out[i] is None and n % self.size(over) == 0:
                    out[i] = over
                    break
        return P(*out)

    def sharding(self, *axes) -> NamedSharding:
        return NamedSharding(self.mesh, P(*axes))

    @property
    def batch(self) -> NamedSharding:
        """Of a batch (B, T): rows over the data and fsdp axes."""
        return self.sharding(BATCH)


def make_layout(
    strategy: str, config: Config, devices=None, mesh: dict[str, int] | None = None
) -> Layout:
    """The layout of `strategy` on `devices` (default: all there are), checked against `config`.

    mesh: devices per mesh axis, e.g. {"data": 2, "tensor": 4}; without it all go to the strategy's own axis. UserError says what does not divide.
    """
    choose("sharding strategy", strategy, RULES)
    devices = np.asarray(jax.devices() if devices is None else devices)
    mesh = {MESH_AXIS[strategy]: devices.size} if mesh is None else mesh
    for axis in mesh:
        choose("mesh axis", axis, AXES)
    shape = [mesh.get(a, 1) for a in AXES]
    if math.prod(shape) != devices.size or min(shape) < 1:
        raise UserError(
            f"a mesh of {' x '.join(f'{a}={n}' for a, n in mesh.items())} needs {math.prod(shape)} devices, and there are {devices.size}: "
            "choose sizes whose product that is"
        )
    used = {over for over in RULES[strategy].values()} | {"data"}
    for axis, n in mesh.items():
        if n > 1 and axis not in used:
            raise UserError(
                f"strategy {strategy} splits nothing over the mesh axis {axis}={n}: use {' or '.join(sorted(used))}"
            )
    if devices.size == len(jax.devices()) and (devices == np.asarray(jax.devices())).all():
        # knows the chips' neighbours
        built = jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    else:
        built = Mesh(devices.reshape(shape), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    layout = Layout(built, strategy)
    rows, tensor = layout.size(*BATCH), layout.size("tensor")
    if config.microbatch % rows:
        change = divisible_batch(config, rows)
        cure = " and ".join(f"{name}={value}" for name, value in change.items())
        raise UserError(
            f"microbatch={config.microbatch} rows cannot be split over {rows} devices of the mesh "
            f"axes {' and '.join(BATCH)}: use {cure}, or fewer devices there"
        )
    if config.n_kv_head % tensor or config.mlp_dim % tensor or config.sequence_len % tensor:
        raise UserError(
            f"the tensor axis of {tensor} devices must divide n_kv_head={config.n_kv_head}, mlp_dim={config.mlp_dim} and "
            f"sequence_len={config.sequence_len}: use a smaller tensor axis, or more key/value heads"
        )
    for name, spec in named_specs(config):
        for axis, n, over in zip(spec.axes, spec.shape, layout.partition(spec)):
            if over and n % layout.size(over):
                raise UserError(
                    f"axis {axis} of {name} has {n} entries, which the {over} axis of {layout.size(over)} devices does not divide: "
                    "use another mesh, or a size that it divides"
                )
    if jax.process_count() > 1 and devices.flat[0].platform == "cpu":
        _introduce(layout)
    return layout


def _introduce(layout: Layout):
    """Connect the processes of each group that will talk, now that all are here.

    Gloo, with which CPUs talk, connects a group when it first talks and gives up after 30 seconds, in which not all may have compiled.
    """
    axes = [a for a in AXES if layout.size(a) > 1]
    for group in itertools.chain.from_iterable(
        itertools.combinations(axes, n) for n in range(1, len(axes) + 1)
    ):
        total = (
            jax.jit(
                jax.shard_map(
                    lambda: jax.lax.psum(sum(map(jax.lax.axis_index, group)), group),
                    mesh=layout.mesh,
                    in_specs=(),
                    out_specs=P(),
                    check_vma=False,
                )
            )
            .lower()
            .compile()
        )
        from_each("introduced", "".join(group))
        jax.block_until_ready(total())


def param_shardings(layout: Layout, config: Config) -> dict:
    """A NamedSharding for each parameter."""
    return jax.tree.map(
        lambda s: NamedSharding(layout.mesh, layout.partition(s)),
        param_specs(config),
        is_leaf=is_spec,
    )


def state_shardings(layout: Layout, config: Config, template):
    """NamedShardings for a TrainState like `template`: parameters, optimizer state; all else on every device."""
    specs = param_specs(config)
    moments = lambda tree: jax.tree.map(
        lambda s, a: NamedSharding(layout.mesh, layout.state_partition(s, a.shape)),
        specs,
        tree,
        is_leaf=is_spec,
    )
    everywhere = jax.tree.map(lambda _: layout.sharding(), template)
    return everywhere._replace(
        params=param_shardings(layout, config),
        opt_state=everywhere.opt_state._replace(
            m=moments(template.opt_state.m), v=moments(template.opt_state.v)
        ),
    )


def put_batch(layout: Layout | None, rows_BT, whole: bool = False):
    """A batch, or a tree of them, on its devices. Each process gives its own rows, or with `whole` all of them give all the same rows."""
    if layout is None:
        return jax.device_put(rows_BT)
    put = lambda a: jax.make_array_from_process_local_data(
        layout.batch, np.asarray(a), a.shape if whole else None
    )
    return jax.tree.map(put, rows_BT)


def whole(layout: Layout | None, params, dtype=None):
    """Parameters on one device of each process, for what is not written for a share: sampling, CORE. Without a layout as they are.

    dtype: of the matrices, which halves what they take; decoding and evaluation read them in the compute dtype anyway.
    """
    if layout is None:
        return params
    cast = lambda a: a.astype(dtype) if dtype is not None and a.ndim > 1 else a
    everywhere = jax.jit(lambda tree: jax.tree.map(cast, tree), out_shardings=layout.sharding())(
        params
    )
    return jax.tree.map(lambda a: a.addressable_data(0), everywhere)


def equal(a, b) -> bool:
    """Whether two trees of arrays on the same devices are the same bit for bit, on all processes."""
    parts = lambda x: (
        [np.asarray(s.data) for s in x.addressable_shards]
        if isinstance(x, jax.Array)
        else [np.asarray(x)]
    )
    mine = all(
        np.array_equal(p, q)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
        for p, q in zip(parts(x), parts(y))
    )
    return all(from_each("equal", mine))


# ---- inside one device's share ---------------------------------------------------------------------------------------

# (Layout, {parameter name: PartitionSpec}) while a share is traced
_layout = ContextVar("layout", default=None)


@contextlib.contextmanager
def share_of(layout: Layout, config: Config):
    """Within it, code is traced for one device's share of `layout`, under jax.shard_map."""
    token = _layout.set(
        (layout, {name: layout.partition(spec) for name, spec in named_specs(config)})
    )
    try:
        yield
    finally:
        _layout.reset(token)


def gather(name: str, w, stacked: bool = False):
    """The whole of a weight of which this device holds a part (fsdp). stacked: its layer axis is gone. Backward scatters the summed gradient."""
    if _layout.get() is None:
        return w
    for axis, over in enumerate(tuple(_layout.get()[1][name])[stacked:]):
        if over == "fsdp":
            w = _gather(w, axis)
    return w


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(w, axis):
    return jax.lax.all_gather(w, "fsdp", axis=axis, tiled=True)


# summed in float32 whatever the compute dtype: a sum over many devices in bfloat16 would lose the small ones
_gather.defvjp(
    lambda w, axis: (_gather(w, axis), None),
    lambda axis, _, g: (_scatter(g.astype(jnp.float32), "fsdp", axis).astype(g.dtype),),
)


def _scatter(g, over: str, axis: int):
    """This device's part, along `axis`, of the sum of `g` over the mesh axis `over`."""
    scatter = functools.partial(jax.lax.psum_scatter, axis_name=over, tiled=True)
    # few heads, which fill no register, among the inner axes: libtpu would sum all of it everywhere (4 heads), or fail (1)
    if axis == g.ndim - 1 == 2:
        return scatter(g.reshape(-1, g.shape[2]), scatter_dimension=1).reshape(*g.shape[:2], -1)
    if axis < g.ndim - 2 and g.shape[-2] % 8:
        return scatter(g.reshape(*g.shape[:-2], -1), scatter_dimension=axis).reshape(
            *g.shape[:axis], -1, *g.shape[axis + 1 :]
        )
    return scatter(g, scatter_dimension=axis)


def _tensor() -> int:
    return 1 if _layout.get() is None else _layout.get()[0].size("tensor")


@jax.custom_vjp
def _enter(x):
    return x


@jax.custom_vjp
def _leave(x):
    return jax.lax.psum(x, "tensor")


_enter.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.psum(g, "tensor"),))
_leave.defvjp(lambda x: (_leave(x), None), lambda _, g: (g,))


def enter(x):
    """Where work on a replicated `x` splits over the tensor axis: the identity; its gradient is summed over the devices."""
    return _enter(x) if _tensor() > 1 else x


def leave(x):
    """Where partial results of split work come together: summed over the tensor axis; the gradient passes as it is."""
    return _leave(x) if _tensor() > 1 else x


def own_part(x, axis: int = 0):
    """This device's equal part of `x` along `axis`, of those over the tensor axis."""
    n = _tensor()
    if n == 1:
        return x
    size = x.shape[axis] // n
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("tensor") * size, size, axis)


def reduce_gradients(layout: Layout, config: Config, grads):
    """Sum each gradient over the devices that saw other rows; over "state" only the part that the optimizer there needs is kept (zero)."""

    def leaf(spec, g):
        over = [a for a in BATCH if a not in layout.partition(spec) and layout.size(a) > 1]
        for axis, state in enumerate(layout.state_partition(spec, spec.shape)):
            if state in over and state == "data":
                g = _scatter(g, "data", axis)
                over.remove("data")
        return jax.lax.psum(g, tuple(over)) if over else g

    return jax.tree.map(leaf, param_specs(config), grads, is_leaf=is_spec)


# ---- the optimizer, which XLA partitions --------------------------------------------------------------------------------

# the Layout whose devices share out the optimizer's matrices
_spread = ContextVar("spread", default=None)


@contextlib.contextmanager
def optimizer_on(layout: Layout | None):
    """Within it, `each_layer` shares its work out among the layout's devices."""
    token = _spread.set(layout)
    try:
        yield
    finally:
        _spread.reset(token)


def each_layer(fn, x_LIO):
    """fn of a stack of matrices; on several devices each does some of the stack instead of all doing the same work.

    Where the stack is not split by layers already (zero, if the devices divide it), all get the whole of it first: the partitioner finds no
    better way from another split. Zero layers fill up a stack that the devices do not divide.
    """
    layout = _spread.get()
    if layout is None or layout.mesh.size == 1:
        return fn(x_LIO)
    to = jax.lax.with_sharding_constraint
    own, everywhere = layout.sharding(AXES), layout.sharding()
    L, short = x_LIO.shape[0], -x_LIO.shape[0] % layout.mesh.size
    if layout.strategy != "zero" or short:
        x_LIO = jnp.pad(to(x_LIO, everywhere), ((0, short), (0, 0), (0, 0)))
    return to(to(fn(to(x_LIO, own)), own), everywhere)[:L]


# ---- hosts -------------------------------------------------------------------------------------------------------------


def start_hosts(coordinator: str = "", count: int = 0, index: int = -1, timeout: float = 300.0):
    """Join all processes of a job into one JAX program; call before anything else uses JAX's devices.

    Without arguments the cluster says who is who, as a TPU pod slice, Slurm or MPI do. Else: coordinator is "host:port" of process 0, reachable
    from all, count the number of processes and index this one's, from 0. A process that does not come within `timeout` seconds is named
    in the UserError that all others get; JAX itself would abort them.
    """
    # process 0 may have an upload to finish
    more = dict(initialization_timeout=int(timeout), shutdown_timeout_seconds=3600)
    if not coordinator:
        try:
            jax.distributed.initialize(**more)
            return _watch()
        except (ValueError, RuntimeError) as e:
            raise UserError(
                f"cannot find the other hosts by myself ({first_line(e)}): name the coordinator as host:port, the number of processes and "
                "this one's index"
            ) from e
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or count < 1 or not 0 <= index < count:
        raise UserError(
            f"coordinator {coordinator!r}, process {index} of {count}: give host:port of process 0, and an index from 0 below the number of processes"
        )
    _roll_call((host, int(port)), count, index, timeout)
    jax.distributed.initialize(coordinator, count, index, **more)
    _watch()


def _roll_call(address, count: int, index: int, timeout: float):
    """Return when all processes are there; UserError names the ones that are not."""
    deadline = time.monotonic() + timeout
    left = lambda: max(deadline - time.monotonic(), 0.01)
    where = f"{address[0]}:{address[1]}"
    if index:
        while True:
            try:
                with socket.create_connection(address, timeout=left()) as s:
                    s.sendall(b"%d\n" % index)
                    s.settimeout(left() + 5)  # process 0 knows better who is missing
                    answer = s.makefile().readline().strip()
                break
            except OSError as e:
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"process 0 of {count} never answered at {where} ({first_line(e)}): start it, and check address and firewall"
                    ) from e
                time.sleep(0.1)
    else:
        try:
            server = socket.create_server(("", address[1]))
        except OSError as e:
            raise UserError(
                f"process 0 cannot listen at {where} ({first_line(e)}): take another port"
            ) from e
        joined = {}
        with server, contextlib.ExitStack() as stack:
            while len(joined) < count - 1 and time.monotonic() < deadline:
                server.settimeout(left())
                # time is up, or a stranger at the port
                with contextlib.suppress(OSError, ValueError):
                    peer = stack.enter_context(server.accept()[0])
                    peer.settimeout(min(left(), 5))
                    said = int(peer.makefile().readline(16))
                    if 0 < said < count:
                        joined[said] = peer
            missing = ", ".join(str(i) for i in range(1, count) if i not in joined)
            answer = f"process {missing} of {count} never joined" if missing else "go"
            for peer in joined.values():
                with contextlib.suppress(OSError):  # it has gone by itself
                    peer.sendall(f"{answer}\n".encode())
                    peer.recv(1)  # it closes first, which leaves the port free for JAX
    if answer != "go":
        raise UserError(
            f"{answer or 'process 0 stopped while waiting for the others'} within {timeout:.0f} s at {where}: "
            "start all processes, each with its own index, and check that they reach process 0"
        )


# What processes say to each other beside the arrays goes through the key-value store that process 0 keeps for all (no public name yet).

FAILED, STOP = "rawchat/failed", "rawchat/stop"
PATIENCE = 3600  # seconds to wait for the others' words: one may be downloading
_failing = threading.Event()
_said = {}  # how often something was said under a name


def _store():
    """The key-value store of a job of several processes, or None."""
    return (
        jax._src.distributed.global_state.client
        if jax.distributed.is_initialized() and jax.process_count() > 1
        else None
    )


def from_each(name: str, value) -> list:
    """The JSON-able values that all processes give under `name`, in their order; waits for all."""
    store = _store()
    if store is None:
        return [value]
    _said[name] = _said.get(name, -1) + 1
    key = f"rawchat/{name}/{_said[name]}"
    store.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    return [
        json.loads(store.blocking_key_value_get(f"{key}/{i}", PATIENCE * 1000))
        for i in range(jax.process_count())
    ]


def from_first(name: str, make):
    """make() of process 0, JSON-able, which alone calls it; waits for it."""
    return from_each(name, None if jax.process_index() else make())[0]


def check_same(what: str, value: dict):
    """UserError on all processes if one has other entries in `value`, such as from other flags: they would wait for each other for ever."""
    said = from_each(what, value)
    for i, other in enumerate(said):
        if differ := [k for k, v in other.items() if said[0].get(k) != v]:
            raise UserError(
                f"process {i} has other {what} than process 0 ({differ[0]}: {other[differ[0]]!r}, not {said[0].get(differ[0])!r}): "
                "give all processes the same"
            )


def stop_together(step: int, wanted: bool) -> bool:
    """Whether all processes stop after `step`, about which all must ask, step by step: two steps after the first where one wanted to.

    None is further ahead: it asks about a step once it has read the numbers of the one before, for which all must have started that.
    """
    store = _store()
    if store is None:
        return wanted
    if wanted:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
            store.key_value_set(STOP + "/at", str(step + 2))
    return any(step >= int(at) for _, at in store.key_value_dir_get(STOP))


def end_all(error):
    """End this process of several because of `error`, and with it the others, which else would wait for it in a collective for ever."""
    store = _store()
    if store is None:
        return
    _failing.set()
    # another failed first, or process 0 is gone
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        store.key_value_set(
            FAILED + "/why", f"process {jax.process_index()} stopped: {first_line(error)}"
        )
    _exit()


def _exit():
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(3)  # the others ask once a second, and with process 0 the store goes
    os._exit(2)  # an orderly exit waits for the others


def _watch():
    """Look, in the background, whether another process has left, and follow it."""
    done = threading.Event()

    def look():
        while not done.wait(1.0):
            try:
                why = _store().key_value_dir_get(FAILED)
            # the job is over, or process 0 died: JAX ends us then
            except (jax.errors.JaxRuntimeError, AttributeError):
                return
            if why and not _failing.is_set():
                print(f"Error: {why[0][1]}", file=sys.stderr)
                _exit()

    watcher = threading.Thread(target=look, daemon=True)
    if _store() is not None:
        watcher.start()
        atexit.register(lambda: (done.set(), watcher.join()))
