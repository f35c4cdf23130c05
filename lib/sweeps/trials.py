"""Training trials: the very steps of 02_train, so that a trial is the run that 02 would make of its
Config.

Trials of equal shapes share one compiled step (lib.train.optim.compile_key). Those of equal horizon
may also train at once, as one program (lib.sweeps.population).
"""

import contextlib
import functools
import json
import math
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from lib import data, evals, train
from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.files import UserError, first_line
from lib.home import Shelf
from lib.params import count_params
from lib.preflight.memory import estimate_memory
from lib.sweeps import journal, space
from lib.train import checkpoint
from lib.train.optim import compile_key

# of space.SETTINGS
DEFAULTS = dict(source="stdlib", packing="bestfit", shards=8, eval_bytes=200_000, evals=10)
# points of the training loss kept for pictures
CURVE = 120
# failures in a row that no one foresaw after which a worker stops: then it is not the trials
UNEXPECTED = 3


class Bench:
    """What all trials of a worker share: the tokenizer, opened data, the device's memory, how often
    checkpoints are made.

    memory: bytes, inf for unknown. save_seconds: a trial longer than this leaves a checkpoint that
    often and goes on from it when another worker takes it over. cache_dir, shelf: as in lib.data.
    then() is called after each such checkpoint and each trial: there is something new that could be
    lost.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        memory: float = math.inf,
        save_seconds: float = 600.0,
        cache_dir=data.CACHE,
        then: Callable[[], object] = lambda: None,
        shelf: Shelf | None = None,
    ):
        self.tokenizer, self.memory = tokenizer, memory
        self.save_seconds, self.cache_dir = save_seconds, cache_dir
        self.then, self.shelf = then, shelf
        self.unexpected = 0  # failures in a row that no one foresaw
        self._training = functools.cache(self._open_training)
        self._validation = functools.cache(self._open_validation)

    def _open_training(self, source: str, shards: int):
        return data.open_tokens(
            source,
            "train",
            self.tokenizer,
            shards=shards,
            cache_dir=self.cache_dir,
            shelf=self.shelf,
        )

    def _open_validation(self, source: str, shards: int, size: int):
        documents = data.documents(source, "val", shards=shards, cache_dir=self.cache_dir)
        # refuses an empty split
        texts = data.head(documents, size)
        return data.tokens_of(texts, self.tokenizer)

    def prepare(self, assignment: dict) -> tuple[Config, dict]:
        """(Config, settings) of a whole assignment; UserError, before anything is compiled, for one
        that cannot be trained.
        """
        vocab_size = self.tokenizer.vocab_size
        assignment = {"vocab_size": vocab_size} | assignment
        settings = DEFAULTS | {k: assignment[k] for k in space.SETTINGS if k in assignment}

        # bits per byte of two tokenizers could be compared, losses and token counts could not
        fingerprint = self.tokenizer.fingerprint[:16]
        if settings.get("tokenizer", fingerprint) != fingerprint:
            raise UserError(
                "this run folder has another tokenizer than the sweep: "
                "make it with the same settings of 01_tokenizer, "
                "or copy tokenizer.json from where the sweep was started"
            )
        config = space.config_of(assignment)
        if config.vocab_size != vocab_size:
            raise UserError(
                f"vocab_size={config.vocab_size}, but the run's tokenizer has {vocab_size}"
            )

        # what surely does not fit: the estimate errs by less than a half
        needed = sum(estimate_memory(config).values())
        if needed > 1.5 * self.memory:
            raise UserError(
                f"needs about {needed / 2**30:.1f} GiB, {self.memory / 2**30:.1f} are there: "
                "lower microbatch or depth, or set remat"
            )
        return config, settings

    def batches(self, config: Config, settings: dict, cursor=None):
        """Training batches on the device, as 02_train makes them."""
        tokens = self._training(settings["source"], settings["shards"])
        rows_per_step = config.total_batch_size // config.sequence_len
        rows = data.batches(
            tokens,
            rows_per_step,
            config.sequence_len,
            packing=settings["packing"],
            cursor=cursor,
            seed=config.seed,
        )
        return data.prefetch(rows, jax.device_put)

    def check_held_out(self, settings: dict):
        """UserError where there is no text to validate on."""
        self._validation(settings["source"], settings["shards"], settings["eval_bytes"])

    def validate(self, params, config: Config, settings: dict) -> dict:
        """{"val_bpb", "val_loss"} on the same text for every trial; compiled once per shape,
        whatever the rates.
        """
        tokens = self._validation(settings["source"], settings["shards"], settings["eval_bytes"])
        rows = data.batches(
            tokens, config.microbatch, config.sequence_len, packing=settings["packing"], loop=False
        )
        score = evals.bits_per_byte(params, compile_key(config), rows, self.tokenizer.token_bytes)
        return dict(val_bpb=score.bpb, val_loss=score.loss)


# ---- before any compute is spent -----------------------------------------------------------------


class SweepPlan(NamedTuple):
    """What a sweep will take, known from shapes alone."""

    trials: float  # inf for a sweep without an end
    sampled: int  # combinations that were looked at
    shapes: int  # programs to compile
    evals: int  # validations per trial
    reasons: dict[str, int]  # why combinations are impossible, and how many are for that
    flops: float  # per trial, the mean
    flops_least: float
    flops_most: float
    middle: tuple[Config, dict]  # Config and settings of the trial with the median FLOPs
    texts: list[dict]  # settings, one of each kind of text

    @property
    def invalid(self) -> int:
        """How many of the sampled combinations cannot be trained."""
        return sum(self.reasons.values())


def plan(spec: dict, bench: Bench, most: int = 512, sample: int = 64) -> SweepPlan:
    """What a sweep will take, from shapes alone. UserError when nothing can be trained.

    A sweep of more than `most` combinations is judged by `sample` random draws.
    """
    if space.size(spec) <= most:
        assignments = space.grid(spec)
    else:
        rng = np.random.default_rng(0)
        varied = space.varied(spec)
        assignments = []
        for _ in range(sample):
            assignments.append({name: space.draw(p, rng) for name, p in varied.items()})

    # what can be trained, and why the rest cannot
    prepared, reasons = [], {}
    for assignment in assignments:
        try:
            prepared.append(bench.prepare(space.constants(spec) | assignment))
        except UserError as e:
            reasons[str(e)] = reasons.get(str(e), 0) + 1
    if not prepared:
        first = next(iter(reasons))
        raise UserError(
            f"none of {len(assignments)} combinations of this sweep can be trained: {first}"
        )

    # one entry for each program to compile, and for each text to read
    shapes, texts, flops = set(), {}, []
    for config, settings in prepared:
        shapes.add(compile_key(config))
        texts[settings["source"], settings["shards"], settings["eval_bytes"]] = settings
        flops.append(flops_of(config))
    _, settings = prepared[0]
    return SweepPlan(
        trials=space.limit(spec),
        sampled=len(assignments),
        shapes=len(shapes),
        evals=settings["evals"],
        reasons=reasons,
        flops=float(np.mean(flops)),
        flops_least=min(flops),
        flops_most=max(flops),
        middle=prepared[int(np.argsort(flops)[len(flops) // 2])],
        texts=list(texts.values()),
    )


def flops_of(config: Config):
    """What training a trial to its end takes."""
    return config.flops_per_token * config.total_batch_size * config.num_steps


class Timing(NamedTuple):
    """What one trial took to compile, and how fast it trains, validations counted in."""

    compile_seconds: float
    flops_per_s: float


def time_one(config: Config, settings: dict, bench: Bench, steps: int = 4) -> Timing:
    """Time a trial by some of its steps and one validation."""
    started = time.perf_counter()
    step_fn, state = train.make_train_step(config), train.init_state(config)
    with contextlib.closing(bench.batches(config, settings)) as batches:
        # the first step and the first validation compile
        inputs, targets = next(batches)[:2]
        state, metrics = step_fn(state, inputs, targets)
        jax.block_until_ready(metrics)
        bench.validate(state.params, config, settings)
        compile_seconds = time.perf_counter() - started

        # the others cost what they will cost all along
        times = []
        for _ in range(steps):
            begun = time.perf_counter()
            inputs, targets = next(batches)[:2]
            state, metrics = step_fn(state, inputs, targets)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    bench.validate(state.params, config, settings)
    validation = time.perf_counter() - begun

    stepping = config.num_steps * float(np.median(times))
    seconds = stepping + settings["evals"] * validation
    return Timing(compile_seconds, flops_of(config) / seconds)


# ---- one trial -----------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How training one trial ended.

    state: done, pruned, failed, lost (another's now) or free (interrupted).
    """

    state: str
    values: dict = {}  # of the last validation
    reason: str = ""
    curve: list = []
    facts: dict = {}


def facts_of(config: Config, steps: int, seconds: float) -> dict:
    """Numbers about a trial that fits and tables use. flops and tokens are those really trained."""
    tokens = steps * config.total_batch_size
    return dict(
        params=count_params(config)["total"],
        scaling_params=config.scaling_params,
        tokens=tokens,
        flops=tokens * config.flops_per_token,
        steps=steps,
        num_steps=config.num_steps,
        seconds=round(seconds, 2),
        n_layer=config.n_layer,
        n_embd=config.n_embd,
    )


def every(config: Config, settings: dict) -> int:
    """How many steps lie between two validations."""
    return max(1, config.num_steps // settings["evals"])


def train_trial(
    config: Config,
    settings: dict,
    bench: Bench,
    *,
    report: Callable = lambda step, values: "",
    saved: Callable = lambda step: None,
    poll: Callable = lambda: "",
    stop: Callable = lambda: False,
    folder=None,
) -> Outcome:
    """Train one trial to its end, or until `report` (at validations) or `poll` (at steps) says why
    not, or `stop` says so.

    folder: where checkpoints of a long trial go, and where one is found again; `saved` hears of
    each. Raises what train.steps raises.
    """
    run = train.TrainingRun(
        config,
        feed=lambda cursor: bench.batches(config, settings, cursor),
        folder=folder or Path(),  # nothing is written there: a trial has no metrics of its own
        store=folder,
        identity=settings,
        past=_past(folder),
    )
    progress = Progress(run)
    # tell again what was measured: the one who judges may not have heard of it
    for n, values in progress.reports:
        if why := report(n, values):
            return progress.outcome(why, n)

    validate = train.Measurement(
        lambda params: bench.validate(params, config, settings), every(config, settings)
    )
    saving = train.Saving(
        every=0,
        seconds=max(bench.save_seconds, 1e-9),  # 0 means never there, and always here
        keep=1,
        at_end=False,
        then=lambda step, path: saved(step),
    )
    n = run.done
    stepping = run.steps([validate], saving, writers=None, stop=stop, signals=False)
    with contextlib.closing(stepping):
        for step in stepping:
            n = step.step
            values = progress.note(step)
            # after a validation the trial may have to stop; at the end that would save nothing
            why = report(n, values) if values else ""
            if n < config.num_steps and (why := why or poll()):
                return progress.outcome(why, n)
    return progress.outcome("done" if n == config.num_steps else "free", n)


class Progress:
    """What a trial has come to, kept in its checkpoints: whoever takes it over goes on with it."""

    def __init__(self, run: train.TrainingRun):
        self.config, self.notes = run.config, run.notes
        # points of the training loss, and [step, values] of every validation
        self.curve = self.notes.setdefault("curve", [])
        self.reports = self.notes.setdefault("reports", [])
        self.before, self.clock = self.notes.get("seconds", 0.0), time.perf_counter()

    @property
    def seconds(self) -> float:
        """Spent on it by all of its workers."""
        return self.before + time.perf_counter() - self.clock

    def note(self, step: train.Step) -> dict:
        """Take in a step; its values where it was validated."""
        self.notes["seconds"] = self.seconds
        last = self.config.num_steps
        if step.step % max(1, last // CURVE) == 0 or step.step == last:
            self.curve.append([step.step, step.metrics["loss"]])
        if "val_bpb" not in step.metrics:
            return {}
        values = {name: step.metrics[name] for name in ("loss", "lr", "val_bpb", "val_loss")}
        self.reports.append([step.step, values])
        return values

    def outcome(self, state: str, n: int) -> Outcome:
        """How it ended, after step `n`."""
        values = self.reports[-1][1] if self.reports else {}
        facts = facts_of(self.config, n, self.seconds)
        return Outcome(state, values, "", self.curve, facts)


def _past(folder) -> train.Past | None:
    """The checkpoint that another worker, or an earlier turn of this one, has left of a trial."""
    path = checkpoint.latest(folder) if folder and folder.exists() else None
    return train.Past(path, checkpoint.read_meta(path), [], False) if path else None


# ---- a worker's turn -----------------------------------------------------------------------------


def together(config: Config) -> Config:
    """A key: trials with equal ones have equal shapes and horizons, so they can train as one
    population.
    """
    return compile_key(config).replace(num_steps=config.num_steps)


def work(
    driver, bench: Bench, count: int, at_once: int, stop: Callable[[], bool]
) -> Iterator[tuple]:
    """Take trials and train them, yielding (trial, Outcome) of each, until none is left.

    count: how many to end at most (0: no bound). at_once: trials of equal shape that train as one
    program. The driver is closed whatever happens.
    """
    ended = 0
    try:
        while (count == 0 or ended < count) and not stop():
            size = min(at_once, count - ended) if count else at_once
            taken = driver.take(size, stop=stop)
            if not taken:
                break
            for trial, outcome in run(driver, taken, bench, stop=stop):
                ended += outcome.state in journal.ENDS
                yield trial, outcome
    finally:
        driver.close()


def run(
    driver, taken: list, bench: Bench, *, stop: Callable = lambda: False, say=print
) -> list[tuple]:
    """Train what `driver.take` gave, tell the driver how each ended, and return [(trial, Outcome)].

    A bad combination, a loss that diverges, a result that is no number, memory that runs out and
    anything unforeseen end that trial as failed, with the reason, and nothing else; only the third
    unforeseen error in a row is raised.
    """
    # trials that can be one program, together; impossible ones end here
    ended, groups = [], {}
    for trial in taken:
        try:
            config, settings = bench.prepare(space.constants(driver.spec) | trial.assignment)
        except UserError as e:
            outcome = _settle(driver, trial, Outcome("failed", reason=str(e)), say)
            ended.append((trial, outcome))
            continue
        kind = together(config), json.dumps(settings, sort_keys=True)
        groups.setdefault(kind, []).append((trial, config, settings))

    metric = driver.spec["metric"]["name"]
    for group in groups.values():
        outcomes = None
        if len(group) > 1:
            outcomes = _train_together(driver, group, bench, stop, say)
        for i, (trial, config, settings) in enumerate(group):
            if outcomes is not None:
                outcome = outcomes[i]
            elif stop():
                outcome = Outcome("free")
            else:
                outcome = _train_alone(driver, trial, config, settings, bench, stop=stop, say=say)

            # the driver hears it, and a worker with whom everything fails stops
            outcome = _measured(outcome, metric, settings, bench)
            ended.append((trial, _settle(driver, trial, outcome, say)))
            bench.then()
            _give_up(bench, outcome)
    return ended


def _train_alone(driver, trial, config, settings, bench: Bench, *, stop, say) -> Outcome:
    """The outcome of one trial, checkpoints in its folder."""

    def saved(step: int):
        driver.saved(trial, step)
        bench.then()

    # what it has to say goes to the driver, under its name
    job = functools.partial(
        train_trial,
        config,
        settings,
        bench,
        report=functools.partial(driver.report, trial),
        saved=saved,
        poll=functools.partial(driver.poll, trial),
        stop=stop,
        folder=_folder(driver, trial),
    )
    return guarded(job, bench, say)


def _train_together(driver, group: list, bench: Bench, stop, say) -> list[Outcome] | None:
    """The outcomes of a population; None where it does not fit into memory, so that each is to be
    trained alone.
    """
    from lib.sweeps.population import train_population

    members, configs, all_settings = zip(*group)
    job = functools.partial(
        train_population,
        list(configs),
        all_settings[0],
        bench,
        report=lambda i, n, values: driver.report(members[i], n, values),
        poll=lambda i: driver.poll(members[i]),
        stop=stop,
    )
    outcomes = guarded(job, bench, say)
    if not isinstance(outcomes, Outcome):
        return outcomes

    # one outcome for all: the program itself failed
    failure = outcomes
    if "memory" not in failure.reason:
        return [failure] * len(group)
    say(f"{len(group)} at once do not fit ({failure.reason}): one after another")
    return None


def _measured(outcome: Outcome, metric: str, settings: dict, bench: Bench) -> Outcome:
    """`outcome`, or a failed one where it is done and its result is no number that could be
    compared.
    """
    if outcome.state == "failed":
        return outcome
    value = outcome.values.get(metric)
    comparable = value is not None and math.isfinite(value)
    if comparable or outcome.state != "done":
        bench.unexpected = 0
        return outcome
    bench.unexpected += 1
    reason = f"its {metric} is {value}: is there held-out text in {settings['source']}?"
    return outcome._replace(state="failed", reason=reason)


def _give_up(bench: Bench, outcome: Outcome):
    """UserError once so many results in a row were no numbers that it cannot be the trials."""
    if bench.unexpected >= UNEXPECTED:
        raise UserError(
            f"{UNEXPECTED} trials in a row failed, the last one because {outcome.reason}"
        )


def _settle(driver, trial, outcome: Outcome, say) -> Outcome:
    """Tell the driver how a trial ended, and remove the checkpoints of one that did."""
    # unfinished: anyone's now, or another's
    if outcome.state == "free":
        driver.free(trial)
    elif outcome.state == "lost":
        say(f"{trial.id}: another worker has it now, left to that one")
        driver.drop(trial)
    else:
        # the last value of a failed trial is none to compare with
        value = None
        if outcome.state != "failed":
            value = outcome.values.get(driver.spec["metric"]["name"])
        driver.end(
            trial,
            outcome.state,
            value,
            outcome.reason,
            outcome.curve,
            **outcome.facts,
        )
        shutil.rmtree(_folder(driver, trial).parent, ignore_errors=True)
    return outcome


def _folder(driver, trial):
    return driver.book.folder / "trials" / trial.id / "checkpoints"


def guarded(function: Callable, bench: Bench, say=print):
    """What `function` returns, or the Outcome of a failed trial for what it raises."""
    try:
        return function()
    except UserError as e:
        return Outcome("failed", reason=str(e))
    except Exception as e:
        # what one combination is too large for is no sign that something is broken
        if _out_of_memory(e):
            return Outcome("failed", reason=f"out of memory: {first_line(e)[:300]}")
        # nobody foresaw it: once is bad luck, three times in a row is not
        bench.unexpected += 1
        if bench.unexpected >= UNEXPECTED:
            raise
        say(traceback.format_exc())
        return Outcome("failed", reason=f"{type(e).__name__}: {first_line(e)[:300]}")


def _out_of_memory(error: Exception) -> bool:
    """Whether an error of Python's or of the device's is about memory."""
    text = str(error)
    if isinstance(error, MemoryError):
        return True
    return "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
