"""The training step: from a state and a batch to the next state, compiled once."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from lib import model, runtime
from lib.config import Config
from lib.files import UserError
from lib.model import tables
from lib.model.decoding import cast_matrices
from lib.model.transformer import group_size
from lib.parallel.collectives import is_gathered, optimizer_on, reduce_gradients, share_of
from lib.parallel.layout import (
    AXES,
    BATCH,
    Layout,
    param_shardings,
    put_batch,
    state_shardings,
)
from lib.params import is_spec, param_specs, unstack
from lib.train.optim import compile_key, hyper, make_optimizer


class TrainState(NamedTuple):
    """All that a step reads and writes: float32 parameters, optimizer state, number of steps
    taken.
    """

    params: Any
    opt_state: Any
    step: jax.Array


def init_state(config: Config, layout: Layout | None = None) -> TrainState:
    """A fresh state, from config.seed alone: the same numbers on any layout of devices, made where
    they belong.
    """
    if layout is not None:
        # compiled, so that no device ever holds more than its part
        shardings = state_shardings(layout, config, state_template(config))
        return jax.jit(init_state, static_argnums=0, out_shardings=shardings)(config)
    params = model.init_params(jax.random.key(config.seed), config)
    opt_state = make_optimizer(config, config.num_steps).init(params)
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32))


def state_template(config: Config, layout: Layout | None = None) -> TrainState:
    """The state's shapes, dtypes and, with a layout, shardings; allocates nothing."""
    template = jax.eval_shape(lambda: init_state(config))
    if layout is None:
        return template

    def placed(array, sharding):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(placed, template, state_shardings(layout, config, template))


def with_rates(state: TrainState, config: Config) -> TrainState:
    """The state with rates, schedule and horizon of `config` instead of those it began with.

    An optimizer that goes on with the moments of an earlier stage counts that stage's updates too,
    as Adam's bias correction needs it; so the schedule is moved up by them.
    """
    earlier = int(state.opt_state.step) - int(state.step)
    total = earlier + config.num_steps
    moved = config.replace(warmdown_ratio=config.warmdown_ratio * config.num_steps / total)
    return with_hyper(state, hyper(moved, total))


def with_hyper(state: TrainState, now: dict) -> TrainState:
    """The state with these rates, placed as those before them are."""
    before = state.opt_state.hyper
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), now, before)
    return state._replace(opt_state=state.opt_state._replace(hyper=placed))


def summed_gradients(params, inputs_ABT, targets_ABT, config: Config):
    """(sum of losses, number of targets, gradient of that sum) over A microbatches, added up in
    float32.
    """
    grad = jax.value_and_grad(model.loss_sums, has_aux=True)
    # a single one needs no loop
    if inputs_ABT.shape[0] == 1:
        (loss, count), grads = grad(params, config, inputs_ABT[0], targets_ABT[0])
        return loss, count, grads

    # what all microbatches read, made once for all in the compute dtype
    blocks = cast_matrices(params["blocks"], config.operand_dtype)
    weights = _apart(params | {"blocks": blocks}, config)
    turned = cast_matrices(tables.by_token(weights), config.dtype)

    def microbatch(total, batch):
        inputs_BT, targets_BT = batch
        loss_sum, count_sum, sums = total
        # in place of tables that are only looked up stand the lines that these tokens need
        # (`tables.Lines`), so that their gradients are lines too
        with_lines = tables.looked_up(weights, turned, inputs_BT, config)
        (loss, count), grads = grad(with_lines, config, inputs_BT, targets_BT)
        sums = tables.add_gradients(sums, grads, inputs_BT)
        return (loss_sum + loss, count_sum + count, sums), None

    # the loop carries one sum of each in float32, as the parameters are; `_apart` only takes them
    # apart, so its gradient puts together
    whole, put_together = jax.vjp(lambda params: _apart(params, config), params)
    zeros = tables.by_token(jax.tree.map(jnp.zeros_like, whole))
    zero = (jnp.zeros(()), jnp.zeros((), jnp.int32), zeros)
    loss, count, sums = jax.lax.scan(microbatch, zero, (inputs_ABT, targets_ABT))[0]
    (grads,) = put_together(tables.by_layer(sums, whole))
    return loss, count, tables.as_held(grads)


def _apart(params, config: Config):
    """The parameters, layer by layer where layers are not scanned: of stacks, each microbatch would
    copy every layer's weights out and its gradients in.

    Not where each device holds a part of every weight.
    """
    if group_size(config)[1] or is_gathered("blocks.wq"):
        return params
    return unstack(params, config)


def _shared_gradients(layout: Layout, params, inputs_BT, targets_BT, config: Config):
    """`summed_gradients` of the global batch: each device its share, then one sum over all."""
    specs = param_specs(config)

    def share(params, inputs_BT, targets_BT):
        def fold(a):
            return a.reshape(config.accumulate, -1, config.sequence_len)

        with share_of(layout, config):
            loss, count, grads = summed_gradients(params, fold(inputs_BT), fold(targets_BT), config)
        return *jax.lax.psum((loss, count), AXES), reduce_gradients(layout, config, grads)

    # parameters come split as they are held, gradients leave as the optimizer holds its state
    partition = jax.tree.map(layout.partition, specs, is_leaf=is_spec)
    reduced = jax.tree.map(lambda s: layout.state_partition(s, s.shape), specs, is_leaf=is_spec)
    return jax.shard_map(
        share,
        mesh=layout.mesh,
        in_specs=(partition, P(BATCH), P(BATCH)),
        out_specs=(P(), P(), reduced),
        check_vma=False,
    )(params, inputs_BT, targets_BT)


def train_step(
    state: TrainState, inputs_BT, targets_BT, config: Config, layout: Layout | None = None
):
    """One optimizer step over B rows, config.microbatch of them at a time; returns (new state,
    {"loss", "grad_norm", "count"}).

    Gradients of summed losses add up in float32 and are divided once by the number of targets, so
    that A microbatches equal one big batch however the ignored targets (negative) are spread, and
    so do several devices.
    """
    with jax.named_scope("forward_backward"):
        # sums over all rows: of losses, of targets, of gradients
        if layout is None:
            shape = -1, config.microbatch, config.sequence_len
            rows = inputs_BT.reshape(shape), targets_BT.reshape(shape)
            loss, count, grads = summed_gradients(state.params, *rows, config)
        else:
            loss, count, grads = _shared_gradients(
                layout, state.params, inputs_BT, targets_BT, config
            )
    with jax.named_scope("optimizer"), optimizer_on(layout):
        # means over targets; a batch without any has gradients of zero
        n = jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g / n, grads)
        updates, opt_state = make_optimizer(config, config.num_steps).update(
            grads, state.opt_state, state.params
        )
        if layout is not None:
            # what devices that share the optimizer's work send each other are updates: new
            # parameters would be sent into copies of the old ones, and these kept until then
            whole = param_shardings(layout, config)
            updates = jax.tree.map(jax.lax.with_sharding_constraint, updates, whole)
        params = optax.apply_updates(state.params, updates)
    squares = [jnp.vdot(g, g) for g in jax.tree.leaves(grads)]
    metrics = {"loss": loss / n, "grad_norm": jnp.sqrt(sum(squares)), "count": count}
    return TrainState(params, opt_state, state.step + 1), metrics


def make_train_step(config: Config, layout: Layout | None = None) -> Callable:
    """`train_step` for `config`, jitted with the state donated: (state, inputs_BT, targets_BT) ->
    (state, metrics).

    Configs that differ only in rates and horizon get the same function, so that they compile once.
    layout: the devices to share the work.
    """
    return _jitted_step(compile_key(for_training(config)), layout)


def for_training(config: Config) -> Config:
    """What a step computes with: auto is mixed on a CPU that multiplies bfloat16 (LOG.md).

    Not where jax is asked to leave optimizations out, as the tests do: what they compare should not
    hang on the processor. UserError where mixed is asked for and this jax lacks it.
    """
    if config.compute_dtype == "mixed":
        check_mixed()
    on_cpu = config.compute_dtype == "auto" and jax.default_backend() == "cpu"
    if not on_cpu or jax.config.read("jax_disable_most_optimizations"):
        return config
    if runtime.multiplies_bfloat16() and _refusal_of_mixed() is None:
        return config.replace(compute_dtype="mixed")
    return config


def computed_in(config: Config) -> str:
    """What the steps of a training compute with, in words."""
    dtype = str(config.dtype)
    is_mixed = for_training(config).compute_dtype == "mixed"
    return f"{dtype} with products of bfloat16" if is_mixed else dtype


def check_mixed():
    """Refuse the mixed mode where this jax has no products of bfloat16 with float32 results."""
    if refusal := _refusal_of_mixed():
        raise UserError(
            f"compute_dtype=mixed multiplies bfloat16 into float32, which jax {jax.__version__} "
            "cannot do here: take float32, or a newer jax"
        ) from refusal


def _refusal_of_mixed() -> Exception | None:
    """The error for (B, T, F) times (D, F) summed over F, None where it is computed: a layer's
    gradient needs it, and of all of mixed's products it is the one that older jaxes lack.
    """
    rows, matrix = jnp.ones((2, 8, 8), jnp.bfloat16), jnp.ones((8, 8), jnp.bfloat16)
    try:
        product = jnp.einsum("BTF,DF->BTD", rows, matrix, preferred_element_type=jnp.float32)
        jax.block_until_ready(product)
    except jax.errors.JaxRuntimeError as e:
        return e
    return None


@functools.cache
def _jitted_step(config: Config, layout: Layout | None):
    # the old state's memory is given to the new one
    step = functools.partial(train_step, config=config, layout=layout)
    jit = functools.partial(jax.jit, donate_argnums=0, compiler_options=_compiler_options())
    if layout is None:
        return jit(step)
    state = state_shardings(layout, config, state_template(config))
    return jit(
        step,
        in_shardings=(state, layout.batch, layout.batch),
        out_shardings=(state, layout.sharding()),
    )


def _compiler_options() -> dict:
    """On a GPU products that read the same stay apart: XLA would join what goes in and cut what
    comes out, which costs a pass each, 1.6 % of a step at depth 20 (LOG.md).
    """
    return {"xla_gpu_dot_merger_threshold_mb": "0"} if jax.default_backend() == "gpu" else {}


@functools.cache
def token_losses_on(layout: Layout) -> Callable:
    """`model.token_losses` on the devices of a layout: (params, config, inputs_BT, targets_BT), all
    rows on each process -> losses on all.
    """

    @functools.partial(jax.jit, static_argnums=1, out_shardings=layout.sharding())
    def losses(params, config, inputs_BT, targets_BT):
        def share(*args):
            with share_of(layout, config):
                return model.token_losses(args[0], config, *args[1:])

        partition = jax.tree.map(layout.partition, param_specs(config), is_leaf=is_spec)
        return jax.shard_map(
            share,
            mesh=layout.mesh,
            in_specs=(partition, P(BATCH), P(BATCH)),
            out_specs=P(BATCH),
            check_vma=False,
        )(params, inputs_BT, targets_BT)

    return lambda params, config, *batch: losses(
        params, config, *put_batch(layout, batch, whole=True)
    )
