"""The loop: dispatch a step, read the one before, look whether training still goes well.

A CPU that computes a step while it is asked for it has its numbers at once: they are read then.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import jax

from lib.config import Config
from lib.files import UserError
from lib.train.optim import lr_multiplier
from lib.train.step import TrainState

# after warm-up, so many nats above the lowest running mean of the loss is an explosion
EXPLODE = 3.0
CURE = "resume from the last checkpoint with lower learning rates or a longer warm-up"


class LossWatch:
    """Tells when a loss has gone bad. One for each model that is trained, also in a population."""

    def __init__(self, config: Config, explode: float = EXPLODE):
        self.warmup_steps = config.warmup_steps
        self.explode = explode
        self.mean = math.nan  # running, so that one odd batch moves it little
        self.lowest = math.inf

    def complaint(self, step: int, loss: float, grad_norm: float) -> str:
        """What is wrong after this step, empty while all is well."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"training diverged: loss {loss}, gradient norm {grad_norm} at step {step}"

        self.mean = loss if math.isnan(self.mean) else 0.9 * self.mean + 0.1 * loss
        self.lowest = min(self.lowest, self.mean)
        if step > self.warmup_steps and self.mean > self.lowest + self.explode:
            return (
                f"training exploded: loss {loss:.2f} at step {step}, after its running mean "
                f"had come down to {self.lowest:.2f}"
            )
        return ""


def lr_at(config: Config, step: int) -> float:
    """What the schedule multiplied every learning rate by in this step, counted from 1."""
    schedule = (config.warmup_steps, config.warmdown_ratio, config.final_lr_frac)
    return float(lr_multiplier(step - 1, config.num_steps, *schedule))


def _is_there(number) -> bool:
    """Whether reading a number would not wait: it is plain, or its device has computed it."""
    return not hasattr(number, "is_ready") or number.is_ready()


class Step(NamedTuple):
    """What `steps` yields.

    `state` and `cursor` are there only where `pause(step)` asked for them.
    """

    step: int  # steps taken so far
    metrics: dict
    state: TrainState | None
    cursor: dict | None


def steps(
    step_fn: Callable,
    state: TrainState,
    batches: Iterator,
    config: Config,
    *,
    pause: Callable[[int], bool] = lambda step: False,
    explode: float = EXPLODE,
) -> Generator[Step, None, None]:
    """Train to config.num_steps, yielding each step's metrics one step late so that the device
    never waits, or at once where they are there.

    batches: yields (inputs_BT, targets_BT, cursor after this batch). pause(n): whether the caller
    wants the state after n steps (to evaluate, sample or save); that step is waited for. Metrics:
    loss (nats/token), grad_norm, lr (multiplier), tokens_per_s, step_time (s).
    Raises UserError when the loss or gradient is not finite, or when after warm-up the loss's
    running mean is `explode` nats above its lowest; the state of such a step is never yielded, so
    a good checkpoint is never overwritten by a broken one.
    """
    done = int(state.step)
    watch = LossWatch(config, explode)
    waiting = None  # (number, metrics) of a step that was dispatched and not yet read
    clock = time.perf_counter()

    def read(step, metrics):
        nonlocal clock
        # here the host waits for the device
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        now = time.perf_counter()
        elapsed, clock = now - clock, now
        if complaint := watch.complaint(step, loss, grad_norm):
            raise UserError(f"{complaint}; {CURE}")
        return dict(
            loss=loss,
            grad_norm=grad_norm,
            lr=lr_at(config, step),
            step_time=elapsed,
            tokens_per_s=config.total_batch_size / elapsed,
        )

    while done < config.num_steps:
        inputs_BT, targets_BT, cursor = next(batches)
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
            state, metrics = step_fn(state, inputs_BT, targets_BT)
        done += 1

        # the step before this one has finished meanwhile
        if waiting is not None:
            yield Step(waiting[0], read(*waiting), None, None)
        waiting = (done, metrics)

        if pause(done) or done == config.num_steps:
            yield Step(done, read(*waiting), state, cursor)
            waiting = None
            # what the caller did with the state is not this step's time
            clock = time.perf_counter()
        elif _is_there(metrics["loss"]):
            yield Step(done, read(*waiting), None, None)
            waiting = None
