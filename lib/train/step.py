"""The training step, compiled once, and the loop that notebooks, sweeps and tests share."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from lib import model
from lib.config import Config
from lib.files import UserError
from lib.parallel.collectives import optimizer_on, reduce_gradients, share_of
from lib.parallel.layout import AXES, BATCH, Layout, put_batch, state_shardings
from lib.params import is_spec, param_specs
from lib.train.optim import compile_key, lr_multiplier, make_optimizer


class TrainState(NamedTuple):
    """All that a step reads and writes: float32 parameters, optimizer state, number of steps taken."""

    params: Any
    opt_state: Any
    step: jax.Array


def init_state(config: Config, layout: Layout | None = None) -> TrainState:
    """A fresh state, from config.seed alone: the same numbers on any layout of devices, made where they belong."""
    if layout is not None:
        return jax.jit(
            init_state,
            static_argnums=0,
            out_shardings=state_shardings(layout, config, state_template(config)),
        )(config)
    params = model.init_params(jax.random.key(config.seed), config)
    return TrainState(
        params, make_optimizer(config, config.num_steps).init(params), jnp.zeros((), jnp.int32)
    )


def state_template(config: Config, layout: Layout | None = None) -> TrainState:
    """The state's shapes, dtypes and, with a layout, shardings; allocates nothing."""
    template = jax.eval_shape(lambda: init_state(config))
    if layout is None:
        return template
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        template,
        state_shardings(layout, config, template),
    )


def summed_gradients(params, inputs_ABT, targets_ABT, config: Config):
    """(sum of losses, number of targets, gradient of that sum) over A microbatches, added up in float32."""
    grad = jax.value_and_grad(model.loss_sums, has_aux=True)

    def microbatch(total, batch):
        (loss, count), grads = grad(params, config, *batch)
        return jax.tree.map(jnp.add, total, (loss, count, grads)), None

    if inputs_ABT.shape[0] == 1:
        (loss, count), grads = grad(params, config, inputs_ABT[0], targets_ABT[0])
        return loss, count, grads
    zero = (jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(microbatch, zero, (inputs_ABT, targets_ABT))[0]


def _shared_gradients(layout: Layout, params, inputs_BT, targets_BT, config: Config):
    """`summed_gradients` of the global batch: each device its share, then one sum over all."""
    specs = param_specs(config)

    def share(params, inputs_BT, targets_BT):
        fold = lambda a: a.reshape(config.accumulate, -1, config.sequence_len)
        with share_of(layout, config):
            loss, count, grads = summed_gradients(params, fold(inputs_BT), fold(targets_BT), config)
        return *jax.lax.psum((loss, count), AXES), reduce_gradients(layout, config, grads)

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
    """One optimizer step over B rows, config.microbatch of them at a time; returns (new state, {"loss", "grad_norm", "count"}).

    Gradients of summed losses add up in float32 and are divided once by the number of targets, so that A microbatches
    equal one big batch however the ignored targets (negative) are spread, and so do several devices.
    """
    with jax.named_scope("forward_backward"):
        if layout is None:
            fold = lambda a: a.reshape(-1, config.microbatch, config.sequence_len)
            loss, count, grads = summed_gradients(
                state.params, fold(inputs_BT), fold(targets_BT), config
            )
        else:
            loss, count, grads = _shared_gradients(
                layout, state.params, inputs_BT, targets_BT, config
            )
    with jax.named_scope("optimizer"), optimizer_on(layout):
        n = jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g / n, grads)
        updates, opt_state = make_optimizer(config, config.num_steps).update(
            grads, state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": loss / n,
        "grad_norm": jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads))),
        "count": count,
    }
    return TrainState(params, opt_state, state.step + 1), metrics


def make_train_step(config: Config, layout: Layout | None = None) -> Callable:
    """`train_step` for `config`, jitted with the state donated: (state, inputs_BT, targets_BT) -> (state, metrics).

    Configs that differ only in rates and horizon get the same function, so that they compile once. layout: the devices to share the work.
    """
    return _jitted_step(compile_key(config), layout)


@functools.cache
def _jitted_step(config: Config, layout: Layout | None):
    step = functools.partial(train_step, config=config, layout=layout)
    if layout is None:
        return jax.jit(step, donate_argnums=0)
    state = state_shardings(layout, config, state_template(config))
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state, layout.batch, layout.batch),
        out_shardings=(state, layout.sharding()),
    )


@functools.cache
def token_losses_on(layout: Layout) -> Callable:
    """`model.token_losses` on the devices of a layout: (params, config, inputs_BT, targets_BT), all rows on each process -> losses on all."""

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


class Step(NamedTuple):
    """What `steps` yields. `state` and `cursor` are there only where `pause(step)` asked for them."""

    step: int  # steps taken so far
    metrics: dict[str, float]
    state: TrainState | None
    cursor: dict | None


def steps(
    step_fn: Callable,
    state: TrainState,
    batches: Iterator,
    config: Config,
    *,
    pause: Callable[[int], bool] = lambda step: False,
    explode: float = 3.0,
) -> Iterator[Step]:
    """Train to config.num_steps, yielding each step's metrics one step late so that the device never waits.

    batches: yields (inputs_BT, targets_BT, cursor after this batch). pause(n): whether the caller wants the state after
    n steps (to evaluate, sample or save); that step is waited for. Metrics: loss (nats/token), grad_norm, lr (multiplier),
    tokens_per_s, step_time (s).
    Raises UserError when the loss or gradient is not finite, or when after warm-up the loss's running mean is `explode` nats
    above its lowest; the state of such a step is never yielded, so a good checkpoint is never overwritten by a broken one.
    """
    done = int(state.step)
    usual, best = None, math.inf
    waiting = None
    clock = time.perf_counter()

    def read(n, metrics):
        nonlocal clock, usual, best
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        now = time.perf_counter()
        elapsed, clock = now - clock, now
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise UserError(
                f"training diverged: loss {loss}, gradient norm {grad_norm} at step {n}; "
                "resume from the last checkpoint with lower learning rates or a longer warm-up"
            )
        usual = loss if usual is None else 0.9 * usual + 0.1 * loss  # one odd batch moves it little
        best = min(best, usual)
        if n > config.warmup_steps and usual > best + explode:
            raise UserError(
                f"training exploded: loss {loss:.2f} at step {n}, after its running mean had come down to {best:.2f}; "
                "resume from the last checkpoint with lower learning rates or a longer warm-up"
            )
        lr = float(
            lr_multiplier(
                n - 1,
                config.num_steps,
                config.warmup_steps,
                config.warmdown_ratio,
                config.final_lr_frac,
            )
        )
        return dict(
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            step_time=elapsed,
            tokens_per_s=config.total_batch_size / elapsed,
        )

    while done < config.num_steps:
        inputs_BT, targets_BT, cursor = next(batches)
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
            state, metrics = step_fn(state, inputs_BT, targets_BT)
        if waiting is not None:
            yield Step(waiting[0], read(*waiting), None, None)
        done += 1
        waiting = (done, metrics)
        if pause(done) or done == config.num_steps:
            yield Step(done, read(*waiting), state, cursor)
            waiting = None
            clock = time.perf_counter()
