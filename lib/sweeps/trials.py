"""Training trials: the very steps of 02_train, so that a trial is the run that 02 would make of its Config.

Trials of equal shapes share one compiled step (lib.optim.compile_key). Those of equal horizon may also train at once, as one
program over a leading axis (`train_population`), which pays where one small model leaves the chip idle.
"""

import contextlib
import functools
import json
import math
import shutil
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lib import data, evals
from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.files import UserError, first_line
from lib.params import count_params
from lib.preflight.memory import estimate_memory
from lib.sweeps import space
from lib.train import checkpoint
from lib.train import step as train
from lib.train.optim import compile_key, lr_multiplier

# of space.SETTINGS
DEFAULTS = dict(source="stdlib", packing="bestfit", shards=8, eval_bytes=200_000, evals=10)
CURVE = 120  # points of the training loss kept for pictures
# failures in a row that no one foresaw after which a worker stops: then it is not the trials
UNEXPECTED = 3


class Bench:
    """What all trials of a worker share: the tokenizer, opened data, the device's memory, how often checkpoints are made.

    memory: bytes, inf for unknown. save_seconds: a trial longer than this leaves a checkpoint that often and goes on from it
    when another worker takes it over. cache_dir as in lib.data.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        memory: float = math.inf,
        save_seconds: float = 600.0,
        cache_dir=data.CACHE,
    ):
        self.tokenizer, self.memory, self.save_seconds, self.cache_dir = (
            tokenizer,
            memory,
            save_seconds,
            cache_dir,
        )
        self.unexpected = 0
        self._tokens = functools.cache(
            lambda source, shards: data.open_tokens(
                source, "train", tokenizer, shards=shards, cache_dir=cache_dir
            )
        )
        self._validation = functools.cache(
            lambda source, shards, size: data.tokens_of(
                data.head(data.documents(source, "val", shards=shards, cache_dir=cache_dir), size),
                tokenizer,
            )
        )

    def prepare(self, assignment: dict) -> tuple[Config, dict]:
        """(Config, settings) of a whole assignment; UserError, before anything is compiled, for one that cannot be trained."""
        assignment = {"vocab_size": self.tokenizer.vocab_size} | assignment
        settings = DEFAULTS | {k: assignment[k] for k in space.SETTINGS if k in assignment}
        if (
            settings.get("tokenizer", self.tokenizer.fingerprint[:16])
            != self.tokenizer.fingerprint[:16]
        ):
            raise UserError(
                "this run folder has another tokenizer than the sweep: make it with the same settings of 01_tokenizer, "
                "or copy tokenizer.json from where the sweep was started"
            )
        config = space.config_of(assignment)
        if config.vocab_size != self.tokenizer.vocab_size:
            raise UserError(
                f"vocab_size={config.vocab_size}, but the run's tokenizer has {self.tokenizer.vocab_size}"
            )
        needs = sum(estimate_memory(config).values())
        if needs > 1.5 * self.memory:  # the estimate errs by less than that
            raise UserError(
                f"needs about {needs / 2**30:.1f} GiB, {self.memory / 2**30:.1f} are there: lower microbatch or depth, "
                "or set remat"
            )
        return config, settings

    def batches(self, config: Config, settings: dict, cursor=None):
        """Training batches on the device, as 02_train makes them."""
        rows = config.total_batch_size // config.sequence_len
        return data.prefetch(
            data.batches(
                self._tokens(settings["source"], settings["shards"]),
                rows,
                config.sequence_len,
                packing=settings["packing"],
                cursor=cursor,
                seed=config.seed,
            ),
            jax.device_put,
        )

    def validate(self, params, config: Config, settings: dict) -> dict:
        """{"val_bpb", "val_loss"} on the same text for every trial; compiled once per shape, whatever the rates."""
        tokens = self._validation(settings["source"], settings["shards"], settings["eval_bytes"])
        rows = data.batches(
            tokens, config.microbatch, config.sequence_len, packing=settings["packing"], loop=False
        )
        score = evals.bits_per_byte(params, compile_key(config), rows, self.tokenizer.token_bytes)
        return dict(val_bpb=score.bpb, val_loss=score.loss)


# ---- before any compute is spent ---------------------------------------------------------------------------------------------


def plan(spec: dict, bench: Bench, most: int = 512, sample: int = 64) -> dict:
    """What a sweep will take, from shapes alone: trials (inf without an end), shapes, validations per trial (evals),
    FLOPs per trial, the impossible combinations, and `middle`, the (Config, settings) of median FLOPs.
    UserError when nothing can be trained.

    A sweep of more than `most` combinations is judged by `sample` random draws.
    """
    if space.size(spec) <= most:
        assignments = space.grid(spec)
    else:
        rng = np.random.default_rng(0)
        assignments = [
            {name: space.draw(p, rng) for name, p in space.varied(spec).items()}
            for _ in range(sample)
        ]
    good, reasons = [], {}
    for assignment in assignments:
        try:
            good.append(bench.prepare(space.constants(spec) | assignment))
        except UserError as e:
            reasons[str(e)] = reasons.get(str(e), 0) + 1
    if not good:
        raise UserError(
            f"none of {len(assignments)} combinations of this sweep can be trained: {next(iter(reasons))}"
        )
    flops = [c.flops_per_token * c.total_batch_size * c.num_steps for c, _ in good]
    return dict(
        trials=space.limit(spec),
        sampled=len(assignments),
        shapes=len({compile_key(c) for c, _ in good}),
        evals=good[0][1]["evals"],
        invalid=sum(reasons.values()),
        reasons=reasons,
        flops=float(np.mean(flops)),
        flops_least=min(flops),
        flops_most=max(flops),
        middle=good[int(np.argsort(flops)[len(flops) // 2])],
    )


def time_one(config: Config, settings: dict, bench: Bench, steps: int = 4) -> dict:
    """{"compile_seconds", "flops_per_s"} of a trial, its validations counted in, from some of its steps and one validation."""
    step_fn, state, clock = (
        train.make_train_step(config),
        train.init_state(config),
        time.perf_counter(),
    )
    with contextlib.closing(bench.batches(config, settings)) as batches:
        state, metrics = step_fn(state, *next(batches)[:2])
        jax.block_until_ready(metrics)
        bench.validate(state.params, config, settings)
        compiled, times = time.perf_counter(), []
        for _ in range(steps):
            begun = time.perf_counter()
            state, metrics = step_fn(state, *next(batches)[:2])
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    bench.validate(state.params, config, settings)
    validation = time.perf_counter() - begun
    seconds = config.num_steps * float(np.median(times)) + settings["evals"] * validation
    return dict(
        compile_seconds=compiled - clock,
        flops_per_s=config.flops_per_token * config.total_batch_size * config.num_steps / seconds,
    )


# ---- one trial ----------------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How training one trial ended. state: done, pruned, failed, lost (another's now) or free (interrupted)."""

    state: str
    values: dict = {}  # of the last validation
    reason: str = ""
    curve: list = []
    facts: dict = {}


def facts_of(config: Config, steps: int, seconds: float) -> dict:
    """Numbers about a trial that fits and tables use. flops and tokens are those really trained."""
    counts, tokens = count_params(config), steps * config.total_batch_size
    return dict(
        params=counts["total"],
        scaling_params=config.scaling_params,
        tokens=tokens,
        flops=tokens * config.flops_per_token,
        steps=steps,
        num_steps=config.num_steps,
        seconds=round(seconds, 2),
        n_layer=config.n_layer,
        n_embd=config.n_embd,
    )


def _every(config: Config, settings: dict) -> int:
    return max(1, config.num_steps // settings["evals"])


def train_trial(
    config: Config,
    settings: dict,
    bench: Bench,
    *,
    report: Callable = lambda step, values: "",
    poll: Callable = lambda: "",
    stop: Callable = lambda: False,
    folder=None,
) -> Outcome:
    """Train one trial to its end, or until `report` (at validations) or `poll` (at steps) says why not, or `stop` says so.

    folder: where checkpoints of a long trial go, and where one is found again. Raises what train.steps raises.
    """
    every, step_fn, clock = (
        _every(config, settings),
        train.make_train_step(config),
        time.perf_counter(),
    )
    saved = checkpoint.latest(folder) if folder and folder.exists() else None
    cursor, curve, reports, before = None, [], [], 0.0
    if saved:
        state, meta = checkpoint.restore(saved, train.state_template(config))
        cursor, curve, reports, before = (
            meta["cursor"],
            meta["curve"],
            meta["reports"],
            meta["seconds"],
        )
        for n, values in reports:
            if why := report(n, values):
                return Outcome(why, values, "", curve, facts_of(config, n, before))
    else:
        state = train.init_state(config)
    last, spaced, saved_at = config.num_steps, max(1, config.num_steps // CURVE), time.monotonic()
    due = lambda: folder is not None and time.monotonic() - saved_at > bench.save_seconds
    pause = lambda n: n % every == 0 or n == last or stop() or due()
    values, why, n = reports[-1][1] if reports else {}, "", int(state.step)
    save = None
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(contextlib.closing(bench.batches(config, settings, cursor)))
        loop = stack.enter_context(
            contextlib.closing(train.steps(step_fn, state, batches, config, pause=pause))
        )
        for step in loop:
            n = step.step
            if n % spaced == 0 or n == last:
                curve.append([n, step.metrics["loss"]])
            if step.state is not None and (n % every == 0 or n == last):
                values = {k: step.metrics[k] for k in ("loss", "lr")} | bench.validate(
                    step.state.params, config, settings
                )
                reports.append([n, values])
                told = report(n, values)
                why = told if n < last else ""  # at the end pruning would save nothing
            why = why or (poll() if n < last else "")
            if why:
                break
            if step.state is not None and n < last and (stop() or due()):
                if folder is not None:
                    save = save or stack.enter_context(checkpoint.Saver(folder, keep=1))
                    save.save(
                        n,
                        step.state,
                        dict(
                            config=config.to_dict(),
                            cursor=step.cursor,
                            curve=curve,
                            reports=reports,
                            seconds=before + time.perf_counter() - clock,
                        ),
                    )
                    saved_at = time.monotonic()
                if stop():
                    why = "free"
                    break
    return Outcome(
        why or "done", values, "", curve, facts_of(config, n, before + time.perf_counter() - clock)
    )


# ---- several at once -------------------------------------------------------------------------------------------------------


def together(config: Config) -> Config:
    """Trials with equal answers can train as one population: equal shapes and equal horizon."""
    return compile_key(config).replace(num_steps=config.num_steps)


@functools.cache
def population_step(key: Config, shared: bool):
    """The training step with a leading axis over members; `shared` batches come without it."""

    def step(state, inputs_BT, targets_BT):
        fold = lambda a: a.reshape(-1, key.microbatch, key.sequence_len)
        return train.train_step(state, fold(inputs_BT), fold(targets_BT), key)

    return jax.jit(jax.vmap(step, in_axes=(0, None, None) if shared else 0), donate_argnums=0)


def train_population(
    configs: list[Config],
    settings: dict,
    bench: Bench,
    *,
    report: Callable = lambda i, step, values: "",
    poll: Callable = lambda i: "",
    stop: Callable = lambda: False,
    explode: float = 3.0,
) -> list[Outcome]:
    """`train_trial` for several Configs in one program: rates, schedules, decay and seeds differ along its leading axis.

    Members with one seed read the same batches. A member that is stopped or diverges is computed on but no longer listened to;
    its neighbours do not feel it. Checkpoints are not made.
    """
    if len({together(c) for c in configs}) > 1:
        raise ValueError("these trials differ in shape or horizon")
    config, P, clock = configs[0], len(configs), time.perf_counter()
    every, last, shared = (
        _every(config, settings),
        config.num_steps,
        len({c.seed for c in configs}) == 1,
    )
    step_fn = population_step(compile_key(config), shared)
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(train.init_state(c) for c in configs))
    outcomes: list[Outcome | None] = [None] * P
    curves, values = [[] for _ in configs], [{} for _ in configs]
    usual, best = np.full(P, np.nan), np.full(P, np.inf)
    spaced = max(1, last // CURVE)

    def settle(i, why, n, reason=""):
        outcomes[i] = Outcome(
            why,
            values[i],
            reason,
            curves[i],
            facts_of(configs[i], n, time.perf_counter() - clock) | dict(population=P),
        )

    def read(n, metrics):
        losses, norms = np.asarray(metrics["loss"], np.float64), np.asarray(metrics["grad_norm"])
        for i in range(P):
            if outcomes[i] is not None:
                continue
            if n % spaced == 0 or n == last:
                curves[i].append([n, float(losses[i])])
            usual[i] = losses[i] if np.isnan(usual[i]) else 0.9 * usual[i] + 0.1 * losses[i]
            best[i] = min(best[i], usual[i])
            if not (np.isfinite(losses[i]) and np.isfinite(norms[i])):
                settle(
                    i,
                    "failed",
                    n,
                    f"training diverged: loss {losses[i]}, gradient norm {norms[i]} at step {n}",
                )
            elif n > configs[i].warmup_steps and usual[i] > best[i] + explode:
                settle(
                    i,
                    "failed",
                    n,
                    f"training exploded: loss {losses[i]:.2f} at step {n}, after its running mean had come down "
                    f"to {best[i]:.2f}",
                )

    with contextlib.ExitStack() as stack:
        feeds = [
            stack.enter_context(contextlib.closing(bench.batches(c, settings)))
            for c in (configs[:1] if shared else configs)
        ]
        waiting = None
        for n in range(1, last + 1):
            rows = [next(feed)[:2] for feed in feeds]
            inputs, targets = rows[0] if shared else map(jnp.stack, zip(*rows))
            state, metrics = step_fn(state, inputs, targets)
            if waiting is not None:
                read(*waiting)
            waiting = (n, metrics)
            if n % every == 0 or n == last:
                read(*waiting)
                waiting = None
                for i in (i for i in range(P) if outcomes[i] is None):
                    lr = float(
                        lr_multiplier(
                            n - 1,
                            last,
                            configs[i].warmup_steps,
                            configs[i].warmdown_ratio,
                            configs[i].final_lr_frac,
                        )
                    )
                    params = jax.tree.map(lambda a: a[i], state.params)
                    values[i] = dict(loss=float(metrics["loss"][i]), lr=lr) | bench.validate(
                        params, configs[i], settings
                    )
                    why = report(i, n, values[i])
                    if n == last or why:
                        settle(i, "done" if n == last else why, n)
            for i in (i for i in range(P) if outcomes[i] is None):
                if why := poll(i) or ("free" if stop() else ""):
                    settle(i, why, n)
            if all(outcomes):
                break
    return outcomes


# ---- a worker's turn -------------------------------------------------------------------------------------------------------


def run(
    driver, taken: list, bench: Bench, *, stop: Callable = lambda: False, say=print
) -> list[tuple]:
    """Train what `driver.take` gave, tell the driver how each ended, and return [(trial, Outcome)].

    A bad combination, a loss that diverges, memory that runs out and anything unforeseen end that trial as failed, with the
    reason, and nothing else; only the third unforeseen error in a row is raised.
    """
    metric, ended, ready = driver.spec["metric"]["name"], [], []

    def finish(trial, outcome):
        if outcome.state == "free":
            driver.free(trial)
        elif outcome.state == "lost":
            say(f"{trial.id}: another worker has it now, left to that one")
            driver.drop(trial)
        else:
            driver.end(
                trial,
                outcome.state,
                outcome.values.get(metric) if outcome.state != "failed" else None,
                outcome.reason,
                outcome.curve,
                **outcome.facts,
            )
        if outcome.state in ("done", "pruned", "failed"):
            shutil.rmtree(_folder(driver, trial).parent, ignore_errors=True)
        ended.append((trial, outcome))

    for trial in taken:
        try:
            ready.append((trial, *bench.prepare(space.constants(driver.spec) | trial.assignment)))
        except UserError as e:
            finish(trial, Outcome("failed", reason=str(e)))
    groups = {}
    for item in ready:
        groups.setdefault((together(item[1]), json.dumps(item[2], sort_keys=True)), []).append(item)
    for group in groups.values():
        if len(group) > 1:
            members = [trial for trial, _, _ in group]
            outcomes = guarded(
                lambda: train_population(
                    [config for _, config, _ in group],
                    group[0][2],
                    bench,
                    stop=stop,
                    poll=lambda i: driver.poll(members[i]),
                    report=lambda i, n, values: driver.report(members[i], n, values),
                ),
                bench,
                say,
            )
            if not isinstance(outcomes, Outcome):
                for trial, outcome in zip(members, outcomes):
                    finish(trial, outcome)
                continue
            if "memory" not in outcomes.reason:
                for trial in members:
                    finish(trial, outcomes)
                continue
            say(f"{len(group)} at once do not fit ({outcomes.reason}): one after another")
        for trial, config, settings in group:
            if stop():
                finish(trial, Outcome("free"))
                continue
            finish(
                trial,
                guarded(
                    lambda: train_trial(
                        config,
                        settings,
                        bench,
                        stop=stop,
                        poll=lambda: driver.poll(trial),
                        folder=_folder(driver, trial),
                        report=lambda n, values: driver.report(trial, n, values),
                    ),
                    bench,
                    say,
                ),
            )
    return ended


def _folder(driver, trial):
    return driver.book.folder / "trials" / trial.id / "checkpoints"


def guarded(function, bench: Bench, say=print):
    """What `function` returns, or the Outcome of a failed trial for what it raises."""
    try:
        result = function()
        bench.unexpected = 0
        return result
    except UserError as e:
        return Outcome("failed", reason=str(e))
    except Exception as e:
        if (
            isinstance(e, MemoryError)
            or "RESOURCE_EXHAUSTED" in str(e)
            or "Out of memory" in str(e)
        ):
            return Outcome("failed", reason=f"out of memory: {first_line(e)[:300]}")
        bench.unexpected += 1
        if bench.unexpected >= UNEXPECTED:
            raise
        say(traceback.format_exc())
        return Outcome("failed", reason=f"{type(e).__name__}: {first_line(e)[:300]}")
