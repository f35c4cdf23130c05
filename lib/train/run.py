"""A training run: it goes on where it was left, trains, measures, saves, and stops when told to.

Pretraining, each phase of fine-tuning, reinforcement learning and a trial of a sweep are such runs.
What makes them different is handed in: the batches, what is measured, what may not change.

    past = find_past(store, "continue", config, identity, folder, start_afresh)
    run = TrainingRun(config, feed, folder, store, identity, past)
    for step in run.steps([Measurement(validate, every=100)], Saving(every=500)):
        print(step.step, step.metrics["loss"])
    run.finish()
"""

import contextlib
import copy
import dataclasses
import functools
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lib.config import Config
from lib.files import (
    Interrupted,
    UserError,
    choose,
    filesystem,
    first_line,
    is_remote,
    reaching,
)
from lib.interrupts import interruptible
from lib.locks import check_free, working_in
from lib.parallel.hosts import from_each, from_first, stopping_together
from lib.parallel.layout import BATCH, Layout, equal
from lib.train import checkpoint, loop
from lib.train.changes import allowed_changes
from lib.train.due import AT_LEAST_EVERY, Due
from lib.train.metrics import Metrics, trace_window
from lib.train.records import NAME
from lib.train.step import TrainState, init_state, make_train_step, state_template, with_rates

# Where this process has begun afresh: such a start is not set aside when its cell is run again. The
# one thing that this module remembers; `find_past` reads and writes it.
BEGUN_AFRESH: set[str] = set()

# a save that failed is tried again after so many seconds
TRY_AGAIN = 60.0


# ---- what was trained before ---------------------------------------------------------------------


class Past(NamedTuple):
    """The checkpoint that a run goes on from."""

    path: Any
    meta: dict
    changes: list  # [step, what changed there] of all its life, those asked for now included
    new_rates: bool  # whether rates, schedule or horizon are others than before


def portable(config: Config, layout: Layout | None) -> Config:
    """`config` as checkpoints remember it: with the rows that one device takes at a time, so that
    it goes on, is measured and fine-tuned on any number of them.
    """
    ways = layout.size(*BATCH) if layout else 1
    return config.replace(microbatch=config.microbatch // ways)


def find_past(
    store,
    if_exists: str,
    config: Config,
    identity: dict,
    folder,
    start_afresh: Callable[[], object],
) -> Past | None:
    """What was trained in `store` and shall go on; None where a run begins.

    if_exists: "continue"; "fresh", for which `start_afresh` moves away what is there; or "stop",
    which refuses. config, identity: what is asked for now. What may not change (lib.train.changes)
    is refused in a sentence; what may is printed. On several hosts all must call it.
    """
    choose("if_exists", if_exists, ("continue", "fresh", "stop"))
    if jax.process_index() == 0:
        check_free(folder)
    there, path = from_first("checkpoint", lambda: _newest(store, if_exists))
    if not there:
        return None
    if if_exists == "stop":
        raise UserError(
            f"{folder} was trained before: pass if_exists=continue or fresh, or another run"
        )
    if if_exists == "fresh" and not _begun_here(store, path, config, identity):
        from_first("fresh start", lambda: start_afresh() and None)
        BEGUN_AFRESH.add(str(store))
        return None

    meta = checkpoint.read_meta(path)
    changes = allowed_changes(_described(meta), config.to_dict() | identity, folder, meta["step"])
    for change in changes.rates:
        print(f"from step {meta['step']} on, {change}")
    told = meta.get("changes", []) + [[meta["step"], change] for change in changes.rates]
    return Past(path, meta, told, bool(changes.rates))


def _newest(store, if_exists: str) -> tuple[bool, str | None]:
    """(whether there are checkpoints, the newest one); a fresh start gets past damaged ones."""
    try:
        path = checkpoint.latest(store)
    except UserError:
        if if_exists != "fresh":
            raise
        return True, None
    return path is not None, str(path) if path else None


def _begun_here(store, path: str | None, config: Config, identity: dict) -> bool:
    """Whether this process has begun what is there afresh, with these settings: it goes on then."""
    if str(store) not in BEGUN_AFRESH or path is None:
        return False
    with contextlib.suppress(UserError):
        meta = checkpoint.read_meta(path)
        allowed_changes(_described(meta), config.to_dict() | identity, store, meta["step"])
        return True
    return False


def _described(meta: dict) -> dict:
    """Config, settings and tokenizer of a checkpoint, as a run describes itself."""
    if not isinstance(meta.get("config"), dict) or "settings" not in meta:
        raise UserError(
            "the checkpoint there tells no config and settings: it was not written by a training "
            "run; pass if_exists=fresh, or another run"
        )
    meta = {"tokenizer": ""} | meta
    config = Config.from_dict(meta["config"]).to_dict()
    return config | meta["settings"] | {"tokenizer": meta["tokenizer"]}


# ---- what is done besides training ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Something measured of the parameters every so many steps, and at the last one.

    measure(params) returns {name: number or text}, which is logged with the step's loss. by_clock:
    also when ten minutes have passed since it was last done (not on several hosts, whose clocks
    differ). at: single steps more. gives: the name that Saving.metric rates checkpoints by: it is
    measured at each save too.
    """

    measure: Callable[[Any], dict]
    every: int
    by_clock: bool = False
    at: tuple[int, ...] = ()
    gives: str = ""

    def due(self, last: int) -> Due:
        """Tells at which steps it is due, in a run of `last` steps."""
        return Due(self.every, last, _clock(self.by_clock), self.at)


@dataclasses.dataclass(frozen=True)
class Saving:
    """When checkpoints are made, and how many are kept: the `keep` newest, and the best one.

    every: steps. seconds: also when so many have passed (0, and on several hosts: never). metric:
    the measured number that is lowest in the best one. at_end: after the last step too. then(step,
    path) is called once a save is written, on every process. sent_at(): when what outlives this
    machine was sent, by the monotonic clock; inf where saves outlive it as they are.
    """

    every: int
    seconds: float = AT_LEAST_EVERY
    keep: int = 2
    metric: str = "val_bpb"
    at_end: bool = True
    then: Callable[[int, Any], None] = lambda step, path: None
    sent_at: Callable[[], float] = lambda: math.inf


def saved_every(times: int, measured_every: int, last: int) -> int:
    """Steps between saves, about `times` of them in `last` steps, each where the measurement is due
    that a save comes with: at another step it would be taken for the save alone.
    """
    if measured_every * times > last:
        return max(1, last // times)
    return round(last / times / measured_every) * measured_every


def _clock(wanted: bool | float) -> float:
    """Seconds after which something is due by the clock: hosts' clocks differ, so never on
    several.
    """
    if jax.process_count() > 1:
        return 0.0
    return AT_LEAST_EVERY if wanted is True else float(wanted)


# ---- the run -------------------------------------------------------------------------------------


@dataclasses.dataclass
class TrainingRun:
    """A training that can be left and taken up again, in this process or another, bit for bit.

    feed(cursor): a generator of (*arrays of a batch, cursor after it), from where `cursor` (None:
    the beginning) says. folder: for metrics and trace. store: for checkpoints, local or remote;
    None makes none. identity: what a checkpoint remembers besides the config, {"tokenizer":
    fingerprint, setting: value, ...}; `find_past` compares it. begin: makes the first state, where
    it isn't the random one of config.seed. rates: puts a config's own into a state that had others.
    make_step: as lib.train.step.make_train_step. peak_flops: of all devices, for mfu. watch_state:
    every step comes with its state, for a feed that looks at it. notes: JSON-able, kept in
    checkpoints for the caller.
    """

    config: Config
    feed: Callable[[dict | None], Generator]
    folder: Path
    store: Any
    identity: dict
    past: Past | None = None
    layout: Layout | None = None
    begin: Callable[[], TrainState] | None = None
    rates: Callable[[TrainState, Config], TrainState] = with_rates
    make_step: Callable[[Config, Layout | None], Callable] = make_train_step
    peak_flops: float | None = None
    watch_state: bool = False
    notes: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.step_fn = self.make_step(self.config, self.layout)
        self.compile_seconds = 0.0
        self.seconds = 0.0  # of steps, by all processes that worked on it
        self.measured: dict = {}  # the newest value of everything that was measured
        self.cursor: dict | None = None
        self._state: TrainState | None = None
        self._told = False  # whether a signal has come while it trained
        self.saved_at = time.monotonic()  # when the newest state that is saved was there
        self._there = _names(self.store)
        self._remember()

    def _remember(self):
        """Take over what the past says besides its arrays, as copies."""
        meta = copy.deepcopy(self.past.meta) if self.past else {}
        self.cursor = meta.get("cursor")
        self.seconds = meta.get("seconds", 0.0)
        self.measured = meta.get("measured", {})
        # in place: callers hold it
        if self.past or self._state is not None:
            self.notes.clear()
            self.notes.update(meta.get("notes", {}))

    @functools.cached_property
    def template(self) -> TrainState:
        """The state's shapes, dtypes and shardings; allocates nothing."""
        return state_template(self.config, self.layout)

    @property
    def state(self) -> TrainState:
        """The state after the last step that was waited for; the saved one where it is gone, as
        after a Ctrl-C in the middle of a step. Read from disk at first.
        """
        if self._state is None:
            self._state = self._load()
        elif _is_gone(self._state):
            self._remember()
            self._state = self._load()
        return self._state

    def _load(self) -> TrainState:
        if self.past is None:
            return self.begin() if self.begin else init_state(self.config, self.layout)
        state: Any
        state, _ = checkpoint.restore(self.past.path, self.template)
        return self.rates(state, self.config) if self.past.new_rates else state

    @property
    def done(self) -> int:
        """Steps taken so far; loads the state where it isn't there yet."""
        return int(self.state.step)

    @property
    def finished(self) -> bool:
        return self.done >= self.config.num_steps

    def compile(self):
        """Compile the step ahead of the loop; returns jax's compiled program, which knows its
        memory.
        """
        rows = self.config.total_batch_size // self.config.sequence_len
        batch = jax.ShapeDtypeStruct((rows, self.config.sequence_len), np.int32)
        clock = time.perf_counter()
        jitted: Any = self.make_step(self.config, self.layout)
        self.step_fn = jitted.lower(self.template, batch, batch).compile()
        self.compile_seconds = time.perf_counter() - clock
        return self.step_fn

    def steps(
        self,
        measurements: Sequence[Measurement],
        saving: Saving,
        *,
        writers: Sequence[str] | None = ("console",),
        trace: tuple[int, int] = (1, 0),
        stop: Callable[[], bool] = lambda: False,
        signals: bool = True,
    ) -> Generator[loop.Step, None, None]:
        """Train to the last step, yielding each as `loop.steps` does; call it again to go on.

        A step that something was due at comes with its state. Whatever the caller adds to `notes`
        before it asks for the next step is in that step's checkpoint. Ctrl-C, SIGTERM or stop()
        saves and ends it (signals: False leaves signals to the caller). writers: of
        lib.train.metrics, None writes nothing. trace: the first and last step that are profiled.
        Raises what lib.train.loop.steps raises, with the last good checkpoint.
        """
        self._told = False
        self.saved_at = time.monotonic()
        if self.finished:
            return
        with contextlib.ExitStack() as stack:
            self._lock(stack, writers)
            batches = stack.enter_context(contextlib.closing(self.feed(self.cursor)))
            log = self._log(stack, writers, saving)
            saver = _Saver(stack, self, saving)
            flag = stack.enter_context(interruptible() if signals else contextlib.nullcontext())
            told = lambda: flag is not None and flag.stop  # noqa: E731
            # looked at when all else here is over
            stack.callback(lambda: setattr(self, "_told", told()))
            agenda = _Agenda(self, measurements, saver, trace, lambda: told() or stop())
            tick = stack.enter_context(trace_window(self.folder, *trace))
            tick(self.done + 1, self.state)
            stepping = loop.steps(
                self.step_fn, self.state, batches, self.config, pause=agenda.pause
            )
            stack.enter_context(contextlib.closing(stepping))

            for step in self._watched(stepping, saver):
                due = agenda.take(step.step)
                try:
                    self._note(step, due.measure)
                except Exception:
                    saver.rescue(step)
                    raise
                log(step.step, step.metrics)
                yield step
                if due.save:
                    saver.save(step, due.leave)
                saver.look()
                if due.leave:
                    return
                if step.state is not None:
                    tick(step.step + 1, step.state)

    def _lock(self, stack: contextlib.ExitStack, writers):
        """Keep others out of where this run writes; UserError where another has written there
        since the run was opened.
        """
        if jax.process_index():
            return
        places = [self.folder] if writers is not None else []
        # checkpoints elsewhere than below the folder have a lock of their own
        store = None if self.store is None or is_remote(self.store) else Path(self.store)
        if store and not store.resolve().is_relative_to(self.folder.resolve()):
            places.append(store)
        for place in places:
            stack.enter_context(working_in(place))
        if _names(self.store) != self._there:
            raise UserError(
                f"{self.store} was written by another training since this run was opened: run "
                "again to go on from there"
            )
        stack.callback(lambda: setattr(self, "_there", _names(self.store)))

    def _note(self, step: loop.Step, measure: Sequence[Measurement]):
        """Add to a step's numbers what they make, and what is due to be measured of its state."""
        self.seconds += step.metrics["step_time"]
        if self.peak_flops:
            flops = step.metrics["tokens_per_s"] * self.config.flops_per_token
            step.metrics["mfu"] = flops / self.peak_flops
        if step.state is None:
            return
        self._state, self.cursor = step.state, step.cursor
        for one in measure:
            step.metrics.update(one.measure(step.state.params))
        self.measured |= _measured(step.metrics)

    def _log(self, stack: contextlib.ExitStack, writers, saving: Saving) -> Callable:
        """metrics.log, or nothing where no metrics are written."""
        if writers is None:
            return lambda step, values: None
        config = self.config.to_dict()
        done = self.done or None
        last = self.config.num_steps

        def at_risk() -> float:
            return (time.monotonic() - min(self.saved_at, saving.sent_at())) / 60

        metrics = Metrics(
            self.folder, last, list(writers), resumed=done, config=config, at_risk=at_risk
        )
        return stack.enter_context(metrics).log

    def _watched(self, stepping, saver) -> Iterator[loop.Step]:
        """The steps; a training that went bad says from where to go on."""
        try:
            yield from stepping
        except UserError as e:
            with contextlib.suppress(UserError, OSError):
                saver.wait()
            path = self.past and self.past.path
            where = f"the last good one is {path}" if path else "none was saved yet, so start again"
            raise UserError(f"{e} ({where})") from e

    def meta(self, metrics: dict) -> dict:
        """What a checkpoint says besides its arrays."""
        settings = {name: value for name, value in self.identity.items() if name != "tokenizer"}
        return dict(
            config=portable(self.config, self.layout).to_dict(),
            ways=self.layout.size(*BATCH) if self.layout else 1,
            cursor=self.cursor,
            settings=settings,
            tokenizer=self.identity.get("tokenizer", ""),
            loss=metrics["loss"],
            seconds=self.seconds,
            measured=dict(self.measured),
            notes=copy.deepcopy(self.notes),
            changes=self.past.changes if self.past else [],
        )

    def finish(self) -> bool:
        """Wait for all processes, and read the newest checkpoint back: whether it is the state, bit
        for bit (True without a store). Interrupted where the run was stopped, even if it was at its
        end.
        """
        done = self.done
        told, self._told = self._told, False
        told = any(from_each("end", told))  # waits until the last one has written
        if not self.finished:
            if self.past is None:
                raise Interrupted(f"stopped at step {done}, and nothing is saved: run again")
            raise Interrupted(
                f"stopped at step {done} and saved: run again with the same settings "
                "(if_exists=continue) to go on"
            )
        if told:
            raise Interrupted(
                f"stopped after step {done}, the last one: run again with the same settings for "
                "what comes after it"
            )
        if self.past is None:
            return self.store is None
        back, _ = checkpoint.restore(self.past.path, self.template)
        return equal(back, self.state)


def _names(store) -> set[str]:
    """The checkpoints in a store, by name."""
    if store is None or jax.process_index():
        return set()
    fs, root = filesystem(store)
    with reaching(store):
        if not fs.exists(root):
            return set()
        names = {path.rstrip("/").rpartition("/")[2] for path in fs.ls(root, detail=False)}
    return {name for name in names if NAME.fullmatch(name)}


def _is_gone(state) -> bool:
    """Whether its buffers were given to a step that never came back."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def _measured(metrics: dict) -> dict:
    """What a checkpoint keeps of a step's numbers: not what its own steps say anyway."""
    passing = {"loss", "grad_norm", "lr", "step_time", "tokens_per_s", "mfu"}
    return {name: value for name, value in metrics.items() if name not in passing}


class _Todo(NamedTuple):
    """What is done after a step."""

    measure: list[Measurement]
    save: bool
    leave: bool


class _Agenda:
    """Decides what is due after each step, when the loop asks whether to pause there."""

    def __init__(
        self,
        run: TrainingRun,
        measurements: Sequence[Measurement],
        saver: "_Saver",
        trace: tuple[int, int],
        stop: Callable[[], bool],
    ):
        self.run, self.saver, self.stop = run, saver, stop
        self.stop_together = stopping_together()
        self.saving = saving = saver.saving
        self.last = run.config.num_steps
        self.due = [(one, one.due(self.last)) for one in measurements]
        self.save_due = Due(saving.every, self.last, _clock(saving.seconds))
        self.looked_at = (trace[0] - 1, trace[1])  # whole steps are profiled
        self.todo: dict[int, _Todo] = {}

    def pause(self, n: int) -> bool:
        """Whether the state is looked at after step n; remembers for what."""
        wanted = self.stop_together(n, self.stop())
        measure = [one for one, is_due in self.due if is_due(n)]
        save = self.save_due(n) or self.saver.overdue() or wanted
        if n == self.last:
            save = self.saving.at_end
        # a checkpoint is rated by a measurement of its own step, unless there is no time for it
        if save and not wanted:
            rating = [one for one, _ in self.due if one.gives == self.saving.metric]
            measure += [one for one in rating if one not in measure]
        self.todo[n] = _Todo(measure, save, wanted or n == self.last)
        return self.run.watch_state or bool(measure) or save or n in self.looked_at

    def take(self, n: int) -> _Todo:
        """What was remembered for step n."""
        return self.todo.pop(n)


class _Saver:
    """Makes a run's checkpoints.

    A place that fails is told of at the next step and tried again after a while. Where it still
    fails at the end, the checkpoint is kept on this machine, so that nothing trained is lost.
    """

    def __init__(self, stack: contextlib.ExitStack, run: TrainingRun, saving: Saving):
        self.run, self.saving = run, saving
        self.pending: tuple[int, Past] | None = None
        self.begun_at = 0.0  # when the save that is pending was begun
        self.again_at = math.inf
        self.saver: checkpoint.Saver | None = None
        if run.store is None:
            return
        size = checkpoint.nbytes(run.template)
        stack.callback(self._settle)  # after the Saver has written what it was writing
        self.saver = stack.enter_context(checkpoint.Saver(run.store, keep=saving.keep, size=size))

    def overdue(self) -> bool:
        """Whether a save that failed is to be tried again now."""
        return time.monotonic() >= self.again_at

    def save(self, step: loop.Step, leaving: bool):
        """Begin to write the state of a step; when the loop is left, wait for it."""
        if self.saver is None:
            return
        self.again_at = math.inf
        # what the save before this one met is told, and costs this one nothing
        try:
            self.wait()
        except (UserError, OSError) as e:
            self._failed(e, leaving)
        meta = self.run.meta(step.metrics)
        changes = self.run.past.changes if self.run.past else []
        where = checkpoint.path_of(self.run.store, step.step)
        try:
            self.saver.save(step.step, step.state, meta, step.metrics.get(self.saving.metric))
            self.pending = step.step, Past(where, meta, changes, False)
            self.begun_at = time.monotonic()
            if leaving:
                self.wait()
        except (UserError, OSError) as e:
            self._failed(e, leaving)
            if leaving:
                raise UserError(self._keep_here(step, meta, e)) from e

    def rescue(self, step: loop.Step):
        """Save a step whose measurement went wrong: all since the last save would be lost."""
        if step.state is not None and jax.process_count() == 1:
            with contextlib.suppress(Exception):
                self.save(step, leaving=True)

    def look(self):
        """Say at this step, not at the next save, how the one under way has ended."""
        if self.saver is None:
            return
        error = self.saver.failure()
        if isinstance(error, UserError | OSError):
            self._failed(error, leaving=False)
        elif error is not None:
            raise error
        elif self.saver.written() is not None:
            self._tell()

    def wait(self):
        """Return once what was saved last is written; raises what that met."""
        if self.saver is not None:
            self.saver.wait()
            self._tell()

    def _tell(self):
        """Let the run go on from what has been written, and tell who wants to know."""
        if self.pending is not None:
            (step, self.run.past), self.pending = self.pending, None
            self.run.saved_at = self.begun_at
            self.saving.then(step, self.run.past.path)

    def _settle(self):
        """The same when the loop was left, however that was, and the last save has been written."""
        if self.pending is not None:
            with contextlib.suppress(UserError):
                checkpoint.read_meta(self.pending[1].path)
                self._tell()

    def _failed(self, error: Exception, leaving: bool):
        """Tell of a save that failed; on several hosts, which must go on together, raise it."""
        self.pending = None
        if jax.process_count() > 1:
            raise error
        if leaving:
            return
        self.again_at = time.monotonic() + TRY_AGAIN
        warnings.warn(
            f"no checkpoint was written ({first_line(error)}); training goes on, and it is tried "
            f"again in {TRY_AGAIN:.0f} s",
            stacklevel=2,
        )

    def _keep_here(self, step: loop.Step, meta: dict, error: Exception) -> str:
        """Keep the last checkpoint on this machine; the sentence that says where."""
        name = f"kept-{time.strftime('%Y%m%d-%H%M%S')}"
        temporary = Path(tempfile.gettempdir()) / f"rawchat-{os.getpid()}-{name}"
        metric = step.metrics.get(self.saving.metric)
        for folder in (self.run.folder / name, temporary):
            with contextlib.suppress(UserError, OSError):
                path = checkpoint.save(folder, step.step, step.state, meta, metric=metric)
                return (
                    f"{self.run.store} cannot be written ({first_line(error)}): the checkpoint of "
                    f"step {step.step} is in {path}; move it to {self.run.store} and run again"
                )
        return f"step {step.step} could not be saved anywhere: {first_line(error)}"
