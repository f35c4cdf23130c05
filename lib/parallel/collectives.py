"""Where devices talk in a step, by name; without a layout each of these is the identity.

The forward and backward pass is written for one device's share (`jax.shard_map`) and says itself
where devices talk: `gather` brings the rest of a weight (fsdp), `enter` and `leave` bracket what is
split over heads and mlp width (tp, Megatron: arXiv 1909.08053), `reduce_gradients` ends it, once a
step. Only the optimizer is left to XLA's partitioner: `each_layer` says how.

The layout in force is read without being handed over: `share_of` and `optimizer_on` set it while a
step is traced, so that the model needs no argument for it. The only other thing of this kind in
`lib` is whether kernels are traced for a TPU that isn't there (`lib.model.kernels`).
"""

import contextlib
import functools
from contextvars import ContextVar

import jax
import jax.numpy as jnp

from lib.config import Config
from lib.parallel.layout import AXES, BATCH, Layout
from lib.params import is_spec, named_specs, param_specs

# (Layout, {parameter name: PartitionSpec}) while a share is traced
_share: ContextVar[tuple[Layout, dict] | None] = ContextVar("share", default=None)

# the Layout whose devices share out the optimizer's matrices
_spread: ContextVar[Layout | None] = ContextVar("spread", default=None)


@contextlib.contextmanager
def share_of(layout: Layout, config: Config):
    """Within it, code is traced for one device's share of `layout`, under jax.shard_map."""
    partitions = {name: layout.partition(spec) for name, spec in named_specs(config)}
    token = _share.set((layout, partitions))
    try:
        yield
    finally:
        _share.reset(token)


# ---- weights: fsdp -------------------------------------------------------------------------------


def gather(name: str, w, stacked: bool = False) -> jax.Array:
    """The whole of a weight of which this device holds a part; backward scatters its gradient.

    stacked: the weight's layer axis is gone.
    """
    share = _share.get()
    if share is None:
        return w
    _, partitions = share
    partition = tuple(partitions[name])[stacked:]
    for axis, over in enumerate(partition):
        if over == "fsdp":
            w = _gather(w, axis)
    return w  # pyright: ignore[reportReturnType]  (partial hides what custom_vjp returns)


def is_gathered(name: str) -> bool:
    """Whether this device holds only a part of a weight, which `gather` would complete."""
    share = _share.get()
    # a weight that this model does not have is nowhere
    return share is not None and "fsdp" in tuple(share[1].get(name, ()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(w, axis):
    return jax.lax.all_gather(w, "fsdp", axis=axis, tiled=True)


def _gather_forward(w, axis):
    return _gather(w, axis), None


def _gather_backward(axis, _, g):
    # in float32 whatever the compute dtype: in bfloat16 a sum over many devices loses small ones
    return (_scatter(g.astype(jnp.float32), "fsdp", axis).astype(g.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def _scatter(g, over: str, axis: int):
    """This device's part, along `axis`, of the sum of `g` over the mesh axis `over`."""
    scatter = functools.partial(jax.lax.psum_scatter, axis_name=over, tiled=True)
    # Few heads, which fill no register, among the inner axes: libtpu would sum all of it everywhere
    # (4 heads), or fail (1). So those axes are one while it is scattered.
    if axis == g.ndim - 1 == 2:
        flat = g.reshape(-1, g.shape[2])
        return scatter(flat, scatter_dimension=1).reshape(*g.shape[:2], -1)
    if axis < g.ndim - 2 and g.shape[-2] % 8:
        flat = g.reshape(*g.shape[:-2], -1)
        shape = *g.shape[:axis], -1, *g.shape[axis + 1 :]
        return scatter(flat, scatter_dimension=axis).reshape(shape)
    return scatter(g, scatter_dimension=axis)


# ---- activations: tp -----------------------------------------------------------------------------


def _tensor_size() -> int:
    share = _share.get()
    return 1 if share is None else share[0].size("tensor")


def is_split() -> bool:
    """Whether work splits over a tensor axis: where it does not, `enter` and `leave` do nothing."""
    return _tensor_size() > 1


@jax.custom_vjp
def _enter(x):
    return x


@jax.custom_vjp
def _leave(x):
    return jax.lax.psum(x, "tensor")


_enter.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.psum(g, "tensor"),))
_leave.defvjp(lambda x: (_leave(x), None), lambda _, g: (g,))


def enter(x):
    """Where work on a replicated `x` splits over the tensor axis: its gradient is summed there."""
    return _enter(x) if is_split() else x


def leave(x):
    """Where partial results of split work are summed; the gradient passes as it is."""
    return _leave(x) if is_split() else x


def own_part(x, axis: int = 0):
    """This device's equal part of `x` along `axis`, of those over the tensor axis."""
    parts = _tensor_size()
    if parts == 1:
        return x
    size = x.shape[axis] // parts
    start = jax.lax.axis_index("tensor") * size
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


# ---- gradients and the optimizer -----------------------------------------------------------------


def reduce_gradients(layout: Layout, config: Config, grads):
    """Sum each gradient over the devices that saw other rows.

    Where the optimizer's state is split (zero), a device keeps only the part that it needs there.
    """

    def reduce(spec, g):
        partition = layout.partition(spec)
        over = [axis for axis in BATCH if axis not in partition and layout.size(axis) > 1]
        for axis, state in enumerate(layout.state_partition(spec, spec.shape)):
            if state in over and state == "data":
                g = _scatter(g, "data", axis)
                over.remove("data")
        return jax.lax.psum(g, tuple(over)) if over else g

    return jax.tree.map(reduce, param_specs(config), grads, is_leaf=is_spec)


@contextlib.contextmanager
def optimizer_on(layout: Layout | None):
    """Within it, `each_layer` shares its work out among the layout's devices."""
    token = _spread.set(layout)
    try:
        yield
    finally:
        _spread.reset(token)


def each_layer(fn, x_LIO):
    """fn of a stack of matrices; several devices each do some of the stack instead of all of it.

    Where the stack is not split by layers already (zero, if the devices divide it), all get the
    whole of it first: the partitioner finds no better way from another split. Zero layers fill up a
    stack that the devices do not divide.
    """
    layout = _spread.get()
    if layout is None or layout.mesh.size == 1:
        return fn(x_LIO)
    constrain = jax.lax.with_sharding_constraint
    own, everywhere = layout.sharding(AXES), layout.sharding()

    n_layer = x_LIO.shape[0]
    missing = -n_layer % layout.mesh.size
    if layout.strategy != "zero" or missing:
        x_LIO = jnp.pad(constrain(x_LIO, everywhere), ((0, missing), (0, 0), (0, 0)))
    result = constrain(fn(constrain(x_LIO, own)), own)
    return constrain(result, everywhere)[:n_layer]
