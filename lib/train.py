"""The training step, compiled once, and the loop that notebooks, sweeps and tests share."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lib import model
from lib.config import Config
from lib.files import UserError
from lib.optim import compile_key, lr_multiplier, make_optimizer
from lib.params import count_params


class TrainState(NamedTuple):
    """All that a step reads and writes: float32 parameters, optimizer state, number of steps taken."""

    params: Any
    opt_state: Any
    step: jax.Array


def init_state(config: Config) -> TrainState:
    """A fresh state, from config.seed alone."""
    params = model.init_params(jax.random.key(config.seed), config)
    return TrainState(params, make_optimizer(config, config.num_steps).init(params), jnp.zeros((), jnp.int32))


def state_template(config: Config) -> TrainState:
    """The state's shapes and dtypes; allocates nothing."""
    return jax.eval_shape(lambda: init_state(config))


def train_step(state: TrainState, inputs_ABT, targets_ABT, config: Config):
    """One optimizer step over A microbatches; returns (new state, {"loss", "grad_norm", "count"}).

    Gradients of summed losses add up in float32 and are divided once by the number of targets, so that A microbatches
    equal one big batch however the ignored targets (negative) are spread.
    """
    grad = jax.value_and_grad(model.loss_sums, has_aux=True)

    def microbatch(total, batch):
        (loss, count), grads = grad(state.params, config, *batch)
        return jax.tree.map(jnp.add, total, (loss, count, grads)), None

    with jax.named_scope("forward_backward"):
        if inputs_ABT.shape[0] == 1:
            (loss, count), grads = grad(state.params, config, inputs_ABT[0], targets_ABT[0])
        else:
            zero = (jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, state.params))
            (loss, count, grads), _ = jax.lax.scan(microbatch, zero, (inputs_ABT, targets_ABT))
    with jax.named_scope("optimizer"):
        n = jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g / n, grads)
        updates, opt_state = make_optimizer(config, config.num_steps).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss / n, "grad_norm": jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads))), "count": count}
    return TrainState(params, opt_state, state.step + 1), metrics


def make_train_step(config: Config) -> Callable:
    """`train_step` for `config`, jitted with the state donated: (state, inputs_BT, targets_BT) -> (state, metrics).

    Batches come as (B, T) with B = A x config.microbatch rows. Configs that differ only in rates and horizon get the
    same function, so that they compile once.
    """
    return _jitted_step(compile_key(config))


@functools.cache
def _jitted_step(config: Config):
    def step(state, inputs_BT, targets_BT):
        fold = lambda a: a.reshape(-1, config.microbatch, config.sequence_len)
        return train_step(state, fold(inputs_BT), fold(targets_BT), config)

    return jax.jit(step, donate_argnums=0)


def estimate_memory(config: Config) -> dict[str, int]:
    """Bytes that a step holds at its peak, by part, from shapes alone; the compiled step knows better.

    Activations are what backward keeps of one microbatch, in each layer everything (none), matrix products (dots) or the input
    (layer), and with the last two the one layer that it is recomputing. LOG.md has the error against the compiler.
    """
    n = 4 * count_params(config)["total"]
    moments = sum(4 * math.prod(a.shape) for a in jax.tree.leaves(jax.eval_shape(lambda: init_state(config).opt_state)))
    D, F, heads = config.n_embd, config.mlp_dim, (config.n_head + 2 * config.n_kv_head) * config.head_dim
    products = D + heads + config.n_head * config.head_dim + (2 if config.mlp == "swiglu" else 1) * F
    whole = 2 * (products + D + F)
    kept = {"none": whole, "dots": products, "layer": D}[config.remat] * config.n_layer + 4 * D
    kept += whole * (config.remat != "none")
    tokens = config.microbatch * config.sequence_len
    logits = 3 * min(config.loss_chunk, tokens) * config.padded_vocab * 4
    return dict(parameters=n, optimizer=moments, gradients=n * (2 if config.accumulate > 1 else 1),
                activations=tokens * kept * config.dtype.itemsize, logits=logits)


class Step(NamedTuple):
    """What `steps` yields. `state` and `cursor` are there only where `pause(step)` asked for them."""

    step: int  # steps taken so far
    metrics: dict[str, float]
    state: TrainState | None
    cursor: dict | None


def steps(step_fn: Callable, state: TrainState, batches: Iterator, config: Config, *,
          pause: Callable[[int], bool] = lambda step: False, explode: float = 3.0) -> Iterator[Step]:
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
            raise UserError(f"training diverged: loss {loss}, gradient norm {grad_norm} at step {n}; "
                            "resume from the last checkpoint with lower learning rates or a longer warm-up")
        usual = loss if usual is None else 0.9 * usual + 0.1 * loss  # one odd batch moves it little
        best = min(best, usual)
        if n > config.warmup_steps and usual > best + explode:
            raise UserError(f"training exploded: loss {loss:.2f} at step {n}, after its running mean had come down to {best:.2f}; "
                            "resume from the last checkpoint with lower learning rates or a longer warm-up")
        lr = float(lr_multiplier(n - 1, config.num_steps, config.warmup_steps, config.warmdown_ratio,
                                 config.final_lr_frac))
        return dict(loss=loss, grad_norm=grad_norm, lr=lr, step_time=elapsed,
                    tokens_per_s=config.total_batch_size / elapsed)

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
