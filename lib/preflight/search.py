"""The fastest way to compute a step that fits: microbatch, attention, recomputation, chunks."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax

from lib import chips
from lib.chips import Slice
from lib.config import Config
from lib.files import UserError
from lib.preflight import roofline
from lib.preflight.cache import CACHE, kept
from lib.preflight.compile import compile_lowered, for_tpu, lower_step
from lib.preflight.estimate import GIB, Report, estimate
from lib.preflight.memory import FILL, peak_bytes

# fields of a config that change how a step is computed, not what
SEARCHED = ("microbatch", "attention", "attention_block", "remat", "loss_chunk")

BLOCKS = (512, 1024, 2048)
LOSS_CHUNKS = (1024, 2048, 4096, 8192)
REMATS = ("none", "dots", "layer")

# of those that fit by estimate, how many are compiled until one does
VERIFIED = 4

# how far above a compiled step's memory the estimate may be (a test compares them)
ERROR = 0.1


class Candidate(NamedTuple):
    """One way to compute the step, its memory in bytes and its least time."""

    microbatch: int
    attention: str
    attention_block: int
    remat: str
    loss_chunk: int
    peak: int
    fits: bool
    seconds: float
    mfu: float

    @property
    def fields(self) -> dict:
        """The config's fields."""
        return {name: getattr(self, name) for name in SEARCHED}


class Search(NamedTuple):
    """best: fields of the fastest that fits, or None; rows: all, best first; checked: compiled."""

    best: dict | None
    rows: list[Candidate]
    checked: list[Candidate]

    def to_dict(self) -> dict:
        """The search as JSON."""
        rows, checked = ([c._asdict() for c in group] for group in (self.rows, self.checked))
        return dict(best=self.best, rows=rows, checked=checked)

    @staticmethod
    def from_dict(fields: dict) -> "Search":
        """The search that `to_dict` wrote."""
        rows, checked = ([Candidate(**c) for c in fields[name]] for name in ("rows", "checked"))
        return Search(fields["best"], rows, checked)


def candidates(config: Config, rows: int = 1, vary: Iterable[str] = SEARCHED) -> list[Config]:
    """Configs that compute the same step otherwise, in the fields `vary`.

    rows: devices that share the rows; a microbatch is a multiple of it.
    """
    # a field that must stay has one option
    options = _options(config, rows)
    for name in SEARCHED:
        if name not in vary:
            options[name] = [getattr(config, name)]

    possible = []
    for values in itertools.product(*(options[name] for name in SEARCHED)):
        # an attention that cannot do these sizes is left out
        with contextlib.suppress(UserError):
            changed = config.replace(**dict(zip(SEARCHED, values)))
            tokens = changed.microbatch // rows * config.sequence_len
            if changed.loss_chunk <= tokens or "loss_chunk" not in vary:
                possible.append(changed)
    return possible


def _options(config: Config, rows: int) -> dict[str, list]:
    """What each searched field may be."""
    # rows of a whole batch, which a microbatch must divide
    length = config.sequence_len
    batch = config.total_batch_size // length
    microbatches = [rows * 2**i for i in range(9)]
    options = {
        "microbatch": [n for n in microbatches if batch % n == 0],
        "attention": [config.attention],
        "attention_block": [0],
        "remat": list(REMATS),
        "loss_chunk": list(LOSS_CHUNKS),
    }
    # kernels come in two kinds, and work in blocks that divide a row
    if config.attention_name in roofline.KERNELS:
        options["attention"] = list(roofline.KERNELS)
        options["attention_block"] = [b for b in BLOCKS if b <= length and length % b == 0]
    return options


def search(
    config: Config,
    where: Slice,
    strategy: str = "dp",
    mesh: dict[str, int] | None = None,
    verify: Callable[[Config], Report] | None = None,
    vary: tuple[str, ...] = SEARCHED,
    margin: float = FILL,
    cache: Path | None = CACHE,
) -> Search:
    """Rank the candidates by their bound, from shapes; those over `margin` of the memory do not
    fit.

    verify: asked about one after the other until one fits, best first; without it the estimate
    decides. vary: the fields that may differ from `config`. The answer is kept in `cache`.
    """
    config = config if config.attention == "jax" else for_tpu(config)

    def answer():
        # all of them from shapes, then the best few by the compiler
        rows = _ranked(config, where, strategy, mesh, vary, margin)
        fitting = [row for row in rows if row.fits]
        if verify is None:
            best = fitting[0].fields if fitting else None
            return Search(best, rows, []).to_dict()
        checked = _checked(config, fitting[:VERIFIED], verify)
        best = checked[-1].fields if checked and checked[-1].fits else None
        return Search(best, rows, checked).to_dict()

    asked = ["search", config.to_dict(), where, strategy, mesh, bool(verify), margin, vary]
    return Search.from_dict(kept(cache, asked, answer))


def _ranked(
    config: Config,
    where: Slice,
    strategy: str,
    mesh: dict[str, int] | None,
    vary: tuple[str, ...],
    margin: float,
) -> list[Candidate]:
    """All candidates, those that fit first, then the fastest, then the smallest."""
    # devices that share the rows
    shards = 1 if strategy == "tp" else where.chips
    if mesh is not None:
        shards = mesh.get("data", 1) * mesh.get("fsdp", 1)

    rows = []
    for candidate in candidates(config, shards, vary):
        report = estimate(candidate, where, strategy, mesh)
        fits = report.peak <= margin * report.available
        rows.append(_candidate(candidate, report, fits))
    return sorted(rows, key=lambda row: (not row.fits, row.seconds, row.peak))


def _candidate(config: Config, report: Report, fits: bool) -> Candidate:
    fields = {name: getattr(config, name) for name in SEARCHED}
    seconds = report.bound["step"].seconds
    return Candidate(**fields, peak=report.peak, fits=fits, seconds=seconds, mfu=report.mfu)


def _checked(config: Config, rows: list[Candidate], verify: Callable) -> list[Candidate]:
    """What `verify` says of the rows, up to the first that fits."""
    checked = []
    for row in rows:
        report = verify(config.replace(**row.fields))
        checked.append(_candidate(config.replace(**row.fields), report, report.fits))
        if report.fits:
            break
    return checked


def undecided(result: Search, available: int) -> list[Candidate]:
    """Candidates that may fit for all that the estimate knows, and are faster than the best: over
    the memory, or its margin, by less than the estimate's error. Of each remat the fastest.
    """
    best = next((row.seconds for row in result.rows if row.fits), float("inf"))
    fastest: dict[str, Candidate] = {}
    for row in result.rows:
        if not row.fits and row.peak <= (1 + ERROR) * available and row.seconds < best:
            fastest.setdefault(row.remat, row)
    return list(fastest.values())


# ---- on the device at hand -----------------------------------------------------------------------


def verify_here(config: Config) -> Report:
    """What the compiler of the device at hand says of `config`, as `search` asks for it."""
    device = jax.local_devices()[0]
    chip = chips.chip(device.device_kind)
    assert chip is not None, "a search needs a device that is in the table"
    where = Slice(device.device_kind, chip, "at hand", 1)
    there = (device.memory_stats() or {}).get("bytes_limit", int(chip.memory))

    # a program that does not fit says how much it would need
    compiled = compile_lowered(lower_step(config, device))
    peak = compiled.needed if compiled.program is None else peak_bytes(compiled.program)
    return dataclasses.replace(estimate(config, where), peak=peak, available=there)


def with_microbatch(
    config: Config, asked: str, device: dict, keep: Iterable[str] = (), before: dict | None = None
) -> Config:
    """`config` with what `asked` says of its microbatch, printing what was found.

    asked: "preset" (as it is), a number, or "auto": the search's answer for this device. device:
    lib.notebook's device_report. keep: names of fields that a search must leave alone. before: the
    config, as a dict, of a run that goes on: its answer then stays.
    """
    if asked == "preset":
        return config
    if asked != "auto":
        if not asked.isdigit():
            raise UserError(f"microbatch={asked!r} must be preset, auto or a number of rows")
        return config.replace(microbatch=int(asked))
    # a run that goes on must not change how it computes
    if before:
        return config.replace(**{name: before[name] for name in SEARCHED if name in before})

    chip = chips.chip(device["kind"])
    if chip is None:
        print(f"microbatch  {config.microbatch}: no search, this device's peak is not in the table")
        return config
    vary = [name for name in SEARCHED if name not in keep]
    if device["platform"] != "tpu":
        # the kernels are a TPU's
        vary = [name for name in vary if not name.startswith("attention")]
        config = config.replace(attention=config.attention_name, compute_dtype=config.dtype.name)

    # each candidate that fits by estimate is compiled here, until one does
    where = Slice(device["kind"], chip, "at hand", 1)
    answer = search(config, where, verify=verify_here, vary=tuple(vary))
    print(search_text(answer, 6))
    if answer.best is None:
        raise UserError(
            "microbatch=auto: nothing that was searched fits this device: take a smaller depth"
        )
    return config.replace(**{name: answer.best[name] for name in vary})


# ---- for people ----------------------------------------------------------------------------------


def search_text(search: Search, show: int = 15) -> str:
    """The best rows of a search, and how many there were."""
    lines = [
        f"{'microbatch':>10} {'attention':>9} {'block':>6} {'remat':>6} {'loss chunk':>10} "
        f"{'GiB':>7} {'fits':>5} {'at least ms':>12} {'MFU <=':>7}"
    ]
    for row in search.rows[:show]:
        how = f"{row.microbatch:10} {row.attention:>9} {row.attention_block:6} {row.remat:>6}"
        fits = "yes" if row.fits else "no"
        needs = f"{row.loss_chunk:10} {row.peak / GIB:7.2f} {fits:>5}"
        lines.append(f"{how} {needs} {1e3 * row.seconds:12.2f} {row.mfu:7.1%}")

    # what came of it
    fitting = sum(row.fits for row in search.rows)
    lines.append(f"{len(search.rows)} searched, {fitting} fit; memory and time from shapes")
    for row in search.checked:
        verdict = "fits" if row.fits else "does not fit"
        lines.append(f"compiled: {_words(row.fields)}: {row.peak / GIB:.2f} GiB, {verdict}")
    best = "none fits: take fewer parameters, or more chips"
    lines.append(f"best: {_words(search.best) if search.best else best}")
    return "\n".join(lines)


def undecided_text(row: Candidate, available: int, command: str) -> str:
    """What to ask the compiler about a candidate that the estimate cannot decide on."""
    return (
        f"undecided: {_words(row.fields)}: {row.peak / GIB:.2f} GiB estimated, of "
        f"{available / GIB:.2f}; the estimate errs by a tenth, so ask the compiler:\n  {command}"
    )


def _words(fields: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())
