"""Several trials trained at once as one program over a leading axis, which pays where a small model
leaves the chip idle.
"""

import contextlib
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lib import train
from lib.config import Config
from lib.sweeps.trials import CURVE, Bench, Outcome, every, facts_of, together
from lib.train import LossWatch, lr_at
from lib.train.loop import EXPLODE
from lib.train.optim import compile_key


@functools.cache
def population_step(key: Config, shared: bool):
    """The training step with a leading axis over members; `shared` batches come without it."""

    def microbatches(array_BT):
        return array_BT.reshape(-1, key.microbatch, key.sequence_len)

    def step(state, inputs_BT, targets_BT):
        return train.train_step(state, microbatches(inputs_BT), microbatches(targets_BT), key)

    # the states are as many as members, the batches perhaps one for all
    in_axes = (0, None, None) if shared else 0
    return jax.jit(jax.vmap(step, in_axes=in_axes), donate_argnums=0)


class Members:
    """What is known of each member of a population while it trains."""

    def __init__(self, configs: list[Config], explode: float):
        self.configs = configs
        # of each: how it ended, points of its loss, what was validated last, who says it diverged
        self.outcomes: list[Outcome | None] = [None] * len(configs)
        self.curves: list[list] = [[] for _ in configs]
        self.values: list[dict] = [{} for _ in configs]
        self.watches = [LossWatch(config, explode) for config in configs]
        self.clock = time.perf_counter()

    def open(self) -> list[int]:
        """The members that are still listened to."""
        return [i for i, outcome in enumerate(self.outcomes) if outcome is None]

    def settle(self, i: int, state: str, n: int, reason: str = ""):
        """End member `i` after step `n`."""
        # the seconds are those of all members: their number is told beside them
        seconds = time.perf_counter() - self.clock
        facts = facts_of(self.configs[i], n, seconds)
        facts |= dict(population=len(self.configs))
        self.outcomes[i] = Outcome(state, self.values[i], reason, self.curves[i], facts)

    def leave(self, n: int, poll: Callable, stop: Callable):
        """End the members that are not wanted any more, or all where the worker stops."""
        for i in self.open():
            why = poll(i)
            if not why and stop():
                why = "free"
            if why:
                self.settle(i, why, n)

    def read(self, n: int, metrics: dict):
        """Take in the losses of step `n`; a member that diverged or exploded ends here."""
        # one transfer for all members
        losses = np.asarray(metrics["loss"], np.float64)
        norms = np.asarray(metrics["grad_norm"])
        last = self.configs[0].num_steps
        is_point = n % max(1, last // CURVE) == 0 or n == last  # of the curve that is drawn
        for i in self.open():
            loss, norm = float(losses[i]), float(norms[i])
            if is_point:
                self.curves[i].append([n, loss])
            reason = self.watches[i].complaint(n, loss, norm)
            if reason:
                self.settle(i, "failed", n, reason)


def train_population(
    configs: list[Config],
    settings: dict,
    bench: Bench,
    *,
    report: Callable = lambda i, step, values: "",
    poll: Callable = lambda i: "",
    stop: Callable = lambda: False,
    explode: float = EXPLODE,
) -> list[Outcome]:
    """`train_trial` for several Configs in one program: rates, schedules, decay and seeds differ
    along its leading axis.

    Members with one seed read the same batches. A member that is stopped or diverges is computed on
    but no longer listened to; its neighbours do not feel it. Checkpoints are not made.
    """
    shapes = {together(config) for config in configs}
    if len(shapes) > 1:
        raise ValueError("these trials differ in shape or horizon")
    interval, last = every(configs[0], settings), configs[0].num_steps
    seeds = {config.seed for config in configs}
    shared = len(seeds) == 1
    step_fn = population_step(compile_key(train.for_training(configs[0])), shared)

    # one state of all members' leaves; the single ones make room
    states = [train.init_state(config) for config in configs]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    del states
    members = Members(configs, explode)

    with contextlib.ExitStack() as stack:
        feeds = []
        for config in configs[:1] if shared else configs:
            feed = contextlib.closing(bench.batches(config, settings))
            feeds.append(stack.enter_context(feed))

        waiting = None  # the numbers of a step are read after the next one was dispatched
        for n in range(1, last + 1):
            state, metrics = step_fn(state, *_rows(feeds, shared))
            if waiting is not None:
                members.read(*waiting)
            waiting = (n, metrics)

            # a validation tells of its step too, so that one is waited for
            if n % interval == 0 or n == last:
                members.read(*waiting)
                waiting = None
                _validate(members, n, metrics, state, settings, bench=bench, report=report)
            members.leave(n, poll, stop)
            if not members.open():
                break
    return [outcome for outcome in members.outcomes if outcome is not None]


def _rows(feeds: list, shared: bool):
    """The next batch: one for all members, or each one's own along a leading axis."""
    batches = [next(feed)[:2] for feed in feeds]
    if shared:
        return batches[0]
    return tuple(jnp.stack(arrays) for arrays in zip(*batches))


def _validate(members: Members, n: int, metrics, state, settings: dict, *, bench: Bench, report):
    """Measure every member that is still listened to, and end those that are told to, or are at
    their end.
    """
    for i in members.open():
        config = members.configs[i]
        params = jax.tree.map(lambda leaf, i=i: leaf[i], state.params)
        loss = float(metrics["loss"][i])
        values = dict(loss=loss, lr=lr_at(config, n))
        members.values[i] = values | bench.validate(params, config, settings)

        # whoever is at the end is done, whatever the report says
        why = report(i, n, members.values[i])
        if n == config.num_steps:
            members.settle(i, "done", n)
        elif why:
            members.settle(i, why, n)
