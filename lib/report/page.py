"""The report card of a run: one page of HTML that needs nothing else, and the same in Markdown.

A run folder is read into `Run`, that into a list of sections of plain blocks, and those are rendered twice. Nothing is computed anew and
nothing is guessed: what a run has not recorded is left out or said to be missing.
"""

import datetime
import html
import json
import math
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax

from lib.evals import stats
from lib.files import UserError, write_atomic
from lib.runs import STAGES
from lib.train.metrics import column, read_jsonl

# Published elsewhere, to see one's own figures beside: (system, where it stands, {metric: {stage: score from 0 to 1}})
REFERENCES = [
    (
        "GPT-2 1.6B",
        "nanochat README, leaderboard (OpenAI's original checkpoint)",
        {"CORE": {"base": 0.2565}},
    ),
    (
        "nanochat d20, 8×H100, 3h51m",
        "nanochat README of 2025-10-13, table of the $100 run",
        {
            "CORE": {"base": 0.2219},
            "ARC-Challenge": {"mid": 0.2875, "sft": 0.2807},
            "ARC-Easy": {"mid": 0.3561, "sft": 0.3876},
            "GSM8K": {"mid": 0.0250, "sft": 0.0455, "rl": 0.0758},
            "HumanEval": {"mid": 0.0671, "sft": 0.0854},
            "MMLU": {"mid": 0.3111, "sft": 0.3151},
            "ChatCORE": {"mid": 0.0730, "sft": 0.0884},
        },
    ),
    (
        "nanochat d24, 8×H100, 1.65 h",
        "nanochat README, leaderboard of 2026-03-14",
        {"CORE": {"base": 0.2626}},
    ),
    ("nanochat-jax d24, v6e-8, 7.3 h", "published by tucan9389", {"CORE": {"base": 0.274}}),
    ("nanocode d24, v6e-8, 7.8 h", "published by its author", {"CORE": {"base": 0.227}}),
]
EARLIER = 5  # other runs shown beside this one, the newest
SURE = 1.96  # standard errors on each side that hold the true value 19 times in 20


# ---- what a run has --------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Everything that a run folder holds for its report; missing files are empty dicts."""

    name: str
    config: dict
    results: dict
    curves: dict[str, list[dict]]  # stage: rows of its metrics
    records: dict[str, dict]  # stage: evaluation record, in the order of STAGES
    harness: dict[str, dict]  # stage: what lm-evaluation-harness found
    has_tokenizer: bool


def _json(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError
        return found
    except ValueError:
        raise UserError(
            f"{path} is damaged (not a JSON object): delete it, and run again what writes it"
        ) from None


def read(folder) -> Run:
    """The `Run` in a folder with any part of a run's files; UserError for none at all or damaged ones."""
    folder = Path(folder)
    files = {
        stage: (folder if stage == "base" else folder / place) / "metrics.jsonl"
        for stage, place in STAGES.items()
    }
    run = Run(
        folder.name,
        _json(folder / "config.json"),
        _json(folder / "results.json"),
        {stage: read_jsonl(path) for stage, path in files.items() if path.exists()},
        {
            stage: record
            for stage in STAGES
            if (record := _json(folder / "evals" / f"{stage}.json"))
        },
        {
            stage: found
            for stage in STAGES
            if (found := _json(folder / "evals" / f"lm_eval_{stage}.json"))
        },
        (folder / "tokenizer.json").exists(),
    )
    if not any(run[1:]):
        raise UserError(
            f"nothing to report in {folder}: it has no tokenizer.json, config.json, results.json, metrics or evals; "
            "name a run's folder, or make one with 01_tokenizer.py"
        )
    return run


def _earlier(folder: Path) -> tuple[list[Run], list[str]]:
    """(other evaluated runs beside `folder`, newest first; a sentence for each that could not be read)."""
    files = sorted(folder.resolve().parent.glob("*/evals/*.json"), key=lambda p: p.stat().st_mtime)
    found = {p.parents[1]: p.stat().st_mtime for p in files}
    found.pop(folder.resolve(), None)
    runs, unread = [], []
    for other in sorted(found, key=found.get, reverse=True)[:EARLIER]:
        try:
            runs.append(read(other))
        except UserError as e:
            unread.append(f"Run {other.name} is left out: {e}.")
    return runs, unread


def _is_mean(name: str) -> bool:
    return name.startswith(("CORE", "ChatCORE"))


def _key(name: str) -> str:
    """ARC-Easy and arc_easy are one."""
    return re.sub(r"\W|_", "", name).lower()


def _scores(record: dict) -> dict[str, dict]:
    """{task: entry} of a record, CORE and ChatCORE first as tasks of their own, without the tasks that CORE is made of."""
    sums = {}
    for key, name in (("core", "CORE"), ("chatcore", "ChatCORE")):
        # over other tasks or fewer items it is another measure, not to be set beside published ones
        if found := record.get(key):
            other = (
                found.get("partial")
                if key == "core"
                else {*map(_key, found.get("tasks", ()))} != CHATCORE
            )
            sums[name + " of a part" * bool(other)] = {
                "score": found["score"],
                "stderr": found.get("stderr"),
                "baseline": 0.0,
                "n": f"{len(found.get('tasks', ()))} tasks",
                "kind": "centred mean",
            }
    return sums | {
        name: entry
        for name, entry in record.get("tasks", {}).items()
        if entry.get("kind") != "core"
    }


# the tasks that nanochat's is the mean of
CHATCORE = {_key(name) for name in REFERENCES[1][2] if not _is_mean(name)}


def _rated(entry: dict) -> bool:
    """Whether an entry's score is a share from 0 to 1, rather than a perplexity."""
    return entry.get("kind") != "perplexity" and entry.get("baseline") is not None


# ---- words and numbers -----------------------------------------------------------------------------------------------


def _short(x: float) -> str:
    """A number for an axis or a sentence: 13.7k, 0.05, 1.8M."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}{suffix}"
    return f"{x:.3g}"


def _time(seconds: float) -> str:
    for below, size, unit, spec in (
        (10, 1, "s", ".1f"),
        (100, 1, "s", ".0f"),
        (5400, 60, "min", ".1f"),
    ):
        if seconds < below:
            return f"{seconds / size:{spec}} {unit}"
    return f"{seconds / 3600:.2f} h"


def _with_error(value, stderr, scale=1.0, spec=".1f") -> str:
    if value is None:
        return "—"
    return f"{value * scale:{spec}}" + (f" ± {stderr * scale:{spec}}" if stderr is not None else "")


def _score(entry: dict | None) -> str:
    """Percent with its standard error, or a perplexity with its own."""
    if not entry:
        return "—"
    return _with_error(
        entry.get("score"), entry.get("stderr"), *((100, ".1f") if _rated(entry) else (1, ".3g"))
    )


def _percent(share) -> str:
    return "—" if share is None else f"{100 * share:.1f}"


def _value(x) -> str:
    """A setting or a recorded figure as text."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        return "—" if x is None else str(x)
    return f"{x:,}" if isinstance(x, int) else f"{x:,.6g}"


def _source(run: Run) -> str:
    return run.results.get("source", "its text")


def _val_source(run: Run) -> str:
    """The text of which results.json has bits per byte, the model's and the compressors'."""
    return run.results.get("val_source", _source(run))


def _text_bits(run: Run) -> dict[str, dict[str, dict]]:
    """{source: {stage: measurement}}; for a run that only 02 or 04 measured, from its results."""
    found = {}
    for stage, record in run.records.items():
        for source, bits in record.get("bpb", {}).items():
            found.setdefault(source, {})[stage] = bits
    if not found and run.results.get("val_bpb") is not None:
        found[_val_source(run)] = {
            "base": {
                "bpb": run.results["val_bpb"],
                "stderr": run.results.get("val_bpb_stderr"),
                "bytes": run.results.get("val_bytes"),
            }
        }
    return found


def _steps_done(run: Run) -> tuple[int, int]:
    rows = run.curves.get("base", [])
    return (rows[-1]["step"] if rows else run.results.get("steps", 0)), run.config.get(
        "num_steps", 0
    )


def verdict(run: Run) -> str:
    """What came of the run, in one sentence, from nothing but its records."""
    done, asked = _steps_done(run)
    r = run.results
    if not done and not run.records and not _text_bits(run):
        if not run.has_tokenizer:
            return "Nothing is trained or measured yet: this run has only settings."
        size = f" of {r['vocab_size']:,} tokens" if "vocab_size" in r else ""
        fits = (
            f" that takes {r['bytes_per_token']:.2f} bytes of held-out text per token"
            if "bytes_per_token" in r
            else ""
        )
        return (
            f"Only a tokenizer so far, one{size}{fits}; no model is trained and none is measured."
        )
    words = f"A model of {_short(r['params'])} parameters" if "params" in r else "A model"
    tokens = done * run.config.get("total_batch_size", 0) or r.get("train_tokens")
    words += f", trained on {_short(tokens)} tokens of {_source(run)}" if tokens else ""
    parts = [f"training stopped at step {done:,} of {asked:,}"] if done < asked else []
    for source, stages in list(_text_bits(run).items())[:1]:
        # the base model: fine-tuning is for chat, and forgets text
        stage, bits = next(iter(stages.items()))
        xz = (
            f" where xz\u00a0-9 needs {r['xz_bpb']:.3f}"
            if r.get("xz_bpb") and source == _val_source(run)
            else ""
        )
        after = "" if stage == "base" else f" after stage {stage}"
        parts.append(f"it needs {bits['bpb']:.3f} bits per byte of unseen {source}{after}{xz}")
    if run.records:
        stage, record = list(run.records.items())[-1]
        rated = {n: e for n, e in record.get("tasks", {}).items() if _rated(e)}
        if rated:
            above = [
                n
                for n, e in rated.items()
                if e["score"] - e["baseline"] > SURE * (e.get("stderr") or 0)
            ]
            best = max(
                above,
                key=lambda n: (
                    (rated[n]["score"] - rated[n]["baseline"]) / (1 - rated[n]["baseline"])
                ),
                default=None,
            )
            top = f" (most on {best}: {_percent(rated[best]['score'])} %)" if best else ""
            parts.append(
                f"after stage {stage} it is clearly better than guessing on {len(above) or 'none'} of {len(rated)} tasks{top}"
            )
    else:
        parts.append("no task is measured yet")
    return f"{words}: {'; '.join(parts)}."


# ---- charts ----------------------------------------------------------------------------------------------------------
# Positions are percentages and heights are pixels, so that a chart fits any width and its text stays as large as the page's.

LIGHT = (
    "--fg:#1c2430;--muted:#5b6675;--line:#dde2e9;--card:#f6f7f9;--bg:#fff;"
    "--base:#56657a;--mid:#0277b5;--sft:#c2470a;--rl:#14803c;"
)
DARK = (
    "--fg:#e5e9f0;--muted:#98a3b3;--line:#323a46;--card:#1b212a;--bg:#12161c;"
    "--base:#a3b0c2;--mid:#4db8f0;--sft:#fb9a4b;--rl:#55cf7f;"
)
CHART_CSS = (
    "svg{color:var(--fg)}svg text{font:11px system-ui,sans-serif;fill:var(--muted)}"
    "svg .value{fill:var(--fg);paint-order:stroke;stroke:var(--bg);stroke-width:3px}"
    ".grid{stroke:var(--line)}.random,.majority{stroke:var(--muted);stroke-width:1.5}.random{stroke-dasharray:1.5 2.5}"
    ".majority{stroke-dasharray:6 3}polyline{fill:none;vector-effect:non-scaling-stroke;stroke-width:1.8}"
    ".raw{opacity:.35;stroke-width:1}"
    + "".join(f".{s}{{stroke:var(--{s});fill:var(--{s})}}" for s in STAGES)
)


class Chart(NamedTuple):
    title: str
    inner: str  # SVG elements
    height: int  # pixels

    def svg(self, extra="") -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="100%" height="{self.height}" role="img" '
            f'aria-label="{html.escape(self.title)}"{extra}>{self.inner}</svg>'
        )


def _stack(charts: list[Chart]) -> str:
    """One SVG file of several charts below each other, with its own colours for light and dark."""
    y, parts = 0, []
    for chart in charts:
        title = f'<text x="0" y="{y + 18}" class="value">{html.escape(chart.title)}</text>'
        parts.append(title + chart.svg(f' y="{y + 26}"'))
        y += chart.height + 36
    style = f"<style>:root{{{LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{DARK}}}}}{CHART_CSS}</style>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{y}">{style}'
        f'<rect width="100%" height="100%" style="fill:var(--bg)"/>{"".join(parts)}</svg>\n'
    )


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= count)
    return [
        i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _thin(steps: list, values: list, most: int = 300) -> tuple[list, list]:
    """At most `most` points: means of equal pieces."""
    piece = -(-len(steps) // most)
    cut = range(0, len(steps), piece or 1)
    return [steps[min(i + piece, len(steps)) - 1] for i in cut], [
        sum(values[i : i + piece]) / len(values[i : i + piece]) for i in cut
    ]


def _smooth(values: list) -> list:
    """Running mean over a thirtieth of the points around each."""
    half = len(values) // 60
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in around]


def _curve(
    rows: list[dict], stage: str, title: str, names: tuple[str, ...], from_zero: bool
) -> Chart | None:
    """The first of `names` as a line (smoothed, if it has many points), the others as dots; None where no row has any."""
    lines, lost = [], 0
    for name in names:
        steps, values = column(rows, name)
        finite = [
            (s, v) for s, v in zip(steps, values) if isinstance(v, int | float) and math.isfinite(v)
        ]
        lost += len(values) - len(finite)
        lines.append(_thin(*map(list, zip(*finite))) if finite else ([], []))
    shown = [v for _, values in lines for v in values]
    if not shown:
        return None
    low, high = (min(0, *shown, 0) if from_zero else min(shown)), max(shown)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1
    low, high = (low if from_zero else low - pad), high + pad
    first, last = (
        min(s for steps, _ in lines for s in steps),
        max(s for steps, _ in lines for s in steps),
    )
    last = last if last > first else first + 1
    left, top, tall = 12, 6, 140

    def at(step, value):
        return (step - first) / (last - first), (high - value) / (high - low)

    parts = []
    for tick in _ticks(low, high):
        y = top + tall * at(first, tick)[1]
        parts.append(
            f'<line class="grid" x1="{left}%" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 2.5}%" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
        )
    for tick in (t for t in _ticks(first, last) if t == int(t)):
        x = left + (100 - left) * at(tick, low)[0]
        anchor = "end" if x > 96 else "middle"
        parts.append(
            f'<text x="{x:.2f}%" y="{top + tall + 16}" text-anchor="{anchor}">{tick:,.0f}</text>'
        )

    def line(steps, values, kind):
        points = " ".join(f"{1000 * x:.1f},{1000 * y:.1f}" for x, y in map(at, steps, values))
        return f'<polyline class="{kind} {stage}" style="fill:none" points="{points}"/>'

    (steps, values), *others = lines
    smooth = len(values) >= 60 and not from_zero
    inside = (
        line(steps, values, "raw") + line(steps, _smooth(values), "")
        if smooth
        else line(steps, values, "")
    )
    parts.append(
        f'<svg x="{left}%" y="{top}" width="{100 - left}%" height="{tall}" viewBox="0 0 1000 1000" '
        f'preserveAspectRatio="none" overflow="visible">{inside}</svg>'
    )
    for steps, values in others or ([lines[0]] if len(lines[0][0]) < 30 else []):
        for x, y in map(at, steps, values):
            parts.append(
                f'<circle cx="{left + (100 - left) * x:.2f}%" cy="{top + tall * y:.1f}" r="3.2" class="{stage}"/>'
            )
    return Chart(
        title + (f" ({lost} values not finite, left out)" if lost else ""),
        "".join(parts),
        top + tall + 24,
    )


CURVES = [  # title, columns, whether its axis starts at zero
    ("loss, nats/token (dots: validation)", ("loss", "val_loss"), False),
    ("validation, bits per byte", ("val_bpb",), False),
    ("learning rate / its base", ("lr",), True),
    ("throughput, tokens/s", ("tokens_per_s",), True),
    ("reward", ("reward",), True),
    ("CORE while training", ("core",), False),
]


def curves(rows: list[dict], stage: str) -> list[Chart]:
    """The charts of a stage's metrics over its steps."""
    return [
        chart for title, names, zero in CURVES if (chart := _curve(rows, stage, title, names, zero))
    ]


def dots(name: str, stages: dict[str, dict], published: Iterable[float] = ()) -> Chart:
    """One task: each stage's score and the range that holds the true one 19 times in 20, between lines for guessing."""
    values = [e["score"] for e in stages.values()]
    low = min(0.0, math.floor(10 * min(values)) / 10)
    published = list(published)
    row, axis = 20, 16
    tall = row * len(stages) + (14 if published else 0)

    def x(score):
        return f"{100 * (min(max(score, low), 1) - low) / (1 - low):.2f}%"

    parts = [
        f'<line class="grid" x1="{x(t)}" x2="{x(t)}" y1="0" y2="{tall}"/>'
        f'<text x="{x(t)}" y="{tall + 13}" text-anchor="{"start" if t == low else "end" if t == 1 else "middle"}">{100 * t:.0f}'
        f"{' %' if t == 1 else ''}</text>"
        for t in sorted({low, 0, 0.25, 0.5, 0.75, 1})
    ]
    some = next(iter(stages.values()))
    for kind, value in (("random", some.get("baseline")), ("majority", some.get("majority"))):
        if value is not None:
            parts.append(
                f'<line class="{kind}" x1="{x(value)}" x2="{x(value)}" y1="0" y2="{tall}"/>'
            )
    parts += [
        f'<text x="{x(v)}" y="{tall - 2}" text-anchor="middle" class="value">◇</text>'
        for v in published
    ]
    for i, (stage, entry) in enumerate(stages.items()):
        y, score, half = row * i + row / 2, entry["score"], SURE * (entry.get("stderr") or 0)
        right = max(score + half, score + 0.02) < 0.72
        label = f"{stage} {100 * score:.1f}"
        edge = x(score + half) if right else x(score - half)
        parts.append(
            f'<line class="{stage}" x1="{x(score - half)}" x2="{x(score + half)}" y1="{y}" y2="{y}" stroke-width="2.5" opacity=".55"/>'
            f'<circle class="{stage}" cx="{x(score)}" cy="{y}" r="4.5"/>'
            f'<text class="value" x="{edge}" dx="{9 if right else -9}" y="{y + 4}" '
            f'text-anchor="{"start" if right else "end"}">{label}</text>'
        )
    return Chart(name, "".join(parts), tall + axis)


# ---- what the report says --------------------------------------------------------------------------------------------
# Blocks: ("head", words) ("text", sentence) ("list", sentences) ("pairs", [(name, value)]) ("table", heads, rows) ("charts", file, charts)
#         ("samples", [(who, prompt, text)]) ("code", text)


class Own(str):
    """A cell that speaks of this very run, among those of others."""


class Head(str):
    """A first cell that titles the rows below it; the rest of its row is empty."""


def _plan(run: Run) -> list[tuple]:
    """(what, planned, came out) of whatever is recorded."""
    r, plan, rows = run.results, run.results.get("plan", {}), []
    done, asked = _steps_done(run)
    batch = run.config.get("total_batch_size")
    hours = {stage: sum(column(rows, "step_time")[1]) / 3600 for stage, rows in run.curves.items()}
    spent = hours.get("base", 0)
    rate = plan.get("price_per_hour", r.get("price_per_hour"))
    cost = r.get("cost", spent * rate if rate and spent else None)
    money = plan.get("currency", "$")
    for what, planned, outcome in [
        (
            "steps",
            f"{asked:,}" if asked and run.curves else None,
            f"{done:,}" if done and run.curves else None,
        ),
        (
            "tokens",
            _value(plan.get("tokens") or (asked * batch if batch else None)),
            _value(done * batch if batch and done else None),
        ),
        (
            "time of training steps",
            _time(plan["hours"] * 3600) if plan.get("hours") else None,
            _time(spent * 3600) if spent else None,
        ),
        *(
            (f"time of {stage}", None, _time(h * 3600))
            for stage, h in hours.items()
            if h and stage != "base"
        ),
        (
            "memory of a step",
            f"{plan['memory_bytes'] / 2**30:.2f} GiB" if "memory_bytes" in plan else None,
            f"{r['step_memory_bytes'] / 2**30:.2f} GiB" if "step_memory_bytes" in r else None,
        ),
        (
            "cost of training",
            *(None if sum_ is None else f"{money}{sum_:.2f}" for sum_ in (plan.get("cost"), cost)),
        ),
    ]:
        planned, outcome = (None if x == "—" else x for x in (planned, outcome))
        if planned or outcome:
            rows.append((what, planned or "not planned", outcome or "not recorded"))
    return rows


def _score_rows(run: Run) -> tuple[list, list]:
    stages = list(run.records)
    scores = {stage: _scores(record) for stage, record in run.records.items()}
    names = list(dict.fromkeys(name for stage in stages for name in scores[stage]))
    rows = []
    for name in sorted(names, key=lambda n: not _is_mean(n)):
        some = next(scores[s][name] for s in reversed(stages) if name in scores[s])
        rows.append(
            [
                name,
                *(_score(scores[s].get(name)) for s in stages),
                _percent(some.get("baseline")),
                _percent(some.get("majority")),
                _value(some.get("n")),
                some.get("kind", ""),
            ]
        )
    return ["task", *stages, "random", "majority", "items", "kind"], rows


def _beside(run: Run, earlier: list[Run]) -> tuple[list, list, list]:
    """(heads, rows, sources): this run's scores, those of runs beside it and published ones, metric by metric."""
    known = {}  # key: (metric, {whose: {stage: cell}})

    def put(metric, whose, stage, cell):
        known.setdefault(_key(metric), (metric, {}))[1].setdefault(whose, {})[stage] = cell

    for other in [run, *earlier]:
        for stage, record in other.records.items():
            for name, entry in _scores(record).items():
                put(
                    name,
                    Own("this run") if other is run else f"run {other.name}",
                    stage,
                    (Own if other is run else str)(_score(entry)),
                )
    for who, _, metrics in REFERENCES:
        for name, by_stage in metrics.items():
            for stage, score in by_stage.items():
                put(name, who, stage, f"{100 * score:.2f}")
    compared = [
        (metric, lines)
        for metric, lines in known.values()
        if len(lines) > 1 or "this run" not in lines
    ]
    compared.sort(key=lambda item: (not _is_mean(item[0]), "this run" not in item[1]))
    rows = []
    for metric, lines in compared:
        rows.append([Head(metric), *[""] * len(STAGES)])
        rows += [[whose, *(cells.get(s, "—") for s in STAGES)] for whose, cells in lines.items()]
    return ["", *STAGES], rows, [f"{who}: {source}." for who, source, _ in REFERENCES]


def _published(name: str) -> list[float]:
    return [
        v
        for _, _, metrics in REFERENCES
        for metric, by_stage in metrics.items()
        if _key(metric) == _key(name)
        for v in by_stage.values()
    ]


def _bits_rows(run: Run) -> tuple[list, list]:
    found = _text_bits(run)
    stages = [s for s in STAGES if any(s in by_stage for by_stage in found.values())]
    rows = []
    for source, by_stage in found.items():
        bits = {s: by_stage.get(s, {}) for s in stages}
        size = next((b["bytes"] for b in bits.values() if b.get("bytes")), None)
        rows.append(
            [
                source,
                "all",
                *(_with_error(b.get("bpb"), b.get("stderr"), spec=".4f") for b in bits.values()),
                _value(size),
            ]
        )
        kinds = dict.fromkeys(kind for b in bits.values() for kind in b.get("kinds", {}))
        for kind in kinds if len(kinds) > 1 else ():
            cells = [b.get("kinds", {}).get(kind, {}) for b in bits.values()]
            size = next((c["bytes"] for c in cells if c.get("bytes")), None)
            rows.append(
                [
                    "",
                    kind,
                    *(_with_error(c.get("bpb"), c.get("stderr"), spec=".4f") for c in cells),
                    _value(size),
                ]
            )
    for key, label in (("gzip_bpb", "gzip -9"), ("xz_bpb", "xz -9")):
        if rows and run.results.get(key):
            rows.append(
                [
                    _val_source(run),
                    label,
                    f"{run.results[key]:.4f}",
                    *[""] * (len(stages) - 1),
                    _value(run.results.get("val_bytes")),
                ]
            )
    return ["text", "kind", *stages, "bytes"], rows


def _harness_rows(run: Run) -> tuple[list, list]:
    """Metrics of lm-evaluation-harness as it names them, "acc,none" and so on, each with its error."""
    rows = []
    for stage, found in run.harness.items():
        for task, metrics in found.get("results", {}).items():
            for name, value in metrics.items():
                metric, _, by = name.partition(",")
                if isinstance(value, float) and not metric.endswith("_stderr"):
                    error = metrics.get(f"{metric}_stderr,{by}")
                    rows.append(
                        [
                            task,
                            stage,
                            metric,
                            _with_error(
                                value, error if isinstance(error, float) else None, spec=".4f"
                            ),
                            _value(found.get("n-samples", {}).get(task, {}).get("effective")),
                        ]
                    )
    return ["task", "stage", "metric", "value", "items"], rows


def _how_measured(run: Run) -> tuple[list, list]:
    rows = []
    for stage, record in run.records.items():
        for name, e in record.get("tasks", {}).items():
            overlap = e.get("contamination")
            rows.append(
                [
                    stage,
                    name,
                    _value(e.get("n")),
                    _value(e.get("limit")),
                    _value(e.get("seed", record.get("seed"))),
                    "—" if e.get("seconds") is None else _time(e["seconds"]),
                    "—" if e.get("per_second") is None else _short(e["per_second"]),
                    _value(e.get("truncated")),
                    "—"
                    if not overlap
                    else f"{overlap['overlapping']} of {overlap['n']}"
                    + (f" ({overlap['short']} too short to tell)" if overlap.get("short") else ""),
                ]
            )
    return [
        "stage",
        "task",
        "items",
        "limit",
        "seed",
        "time",
        "items/s",
        "cut prompts",
        "seen in training",
    ], rows


def _samples(run: Run) -> list[tuple[str, str, str]]:
    found = [
        (stage, s.get("prompt", ""), s.get("text", ""))
        for stage, record in run.records.items()
        for s in record.get("samples", [])[:4]
    ]
    if not found or "base" not in run.records:
        found = [("base", "", str(text)) for text in run.results.get("samples", [])[:4]] + found
    return found


def _environment(run: Run) -> list[tuple[str, str]]:
    r = run.results
    pairs = [
        ("trained on", r.get("device")),
        ("trained with jax", r.get("jax")),
        ("trained with python", r.get("python")),
        ("trained from commit", r.get("commit")),
    ]
    for stage, record in run.records.items():
        pairs.append(
            (
                f"{stage} measured",
                ", ".join(
                    str(x)
                    for x in (
                        record.get("checkpoint"),
                        record.get("device"),
                        f"jax {record['jax']}" if "jax" in record else None,
                        f"seed {record['seed']}" if "seed" in record else None,
                        record.get("time"),
                    )
                    if x
                ),
            )
        )
    now = datetime.datetime.now(datetime.UTC)
    commit = commit_id()
    return [(k, str(v)) for k, v in pairs if v] + [
        (
            "report written",
            f"{now:%Y-%m-%d %H:%M} UTC, python {platform.python_version()}, jax {jax.__version__}"
            + (f", commit {commit}" if commit else ""),
        )
    ]


def commit_id() -> str:
    """The commit of this code, "-dirty" behind it if changed since; "" without git."""
    if not shutil.which("git"):
        return ""
    asked = subprocess.run(
        ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--exclude", "*"],
        capture_output=True,
        text=True,
    )
    return asked.stdout.strip() if asked.returncode == 0 else ""


def differences(run: Run) -> list[tuple[str, dict[str, dict]]]:
    """(pair of stages, `stats.compare` of their records) for each stage after the first one measured; CORE as a whole."""
    found = []
    for before, after in zip(list(run.records), list(run.records)[1:]):
        compared = stats.compare(run.records[before], run.records[after], (before, after))
        parts = {
            n for n, e in run.records[after].get("tasks", {}).items() if e.get("kind") == "core"
        }
        if compared := {n: c for n, c in compared.items() if n not in parts}:
            found.append((f"From {before} to {after}", compared))
    return found


def _log_block(run: Run, compared: list[tuple[str, dict]]) -> str:
    """What belongs into a LOG: date, setting, outcome, the scores."""
    times = [record["time"][:10] for record in run.records.values() if record.get("time")]
    times += [
        f"{datetime.datetime.fromtimestamp(rows[-1]['time'], datetime.UTC):%Y-%m-%d}"
        for rows in run.curves.values()
        if rows and "time" in rows[-1]
    ]
    r, c = run.results, run.config
    setting = (
        [f"{c['n_layer']} layers × {c['n_embd']}, vocabulary {c['vocab_size']:,}, {c['optimizer']}"]
        if "n_layer" in c
        else []
    )
    setting += [r["preset"]] if "preset" in r else []
    setting += [f"{r['device']}, jax {r['jax']}"] if "device" in r and "jax" in r else []
    lines = [f"## {max(times, default='undated')} · Run {run.name}", "", verdict(run)]
    lines += ["", "; ".join(setting) + "."] if setting else []
    for heads, rows in ((_bits_rows(run)), _score_rows(run)):
        if rows:
            lines += ["", *_md_table(heads, rows)]
    for pair, tasks in compared:
        real = [c.sentence for c in tasks.values() if c.real]
        lines += [
            "",
            f"{pair}, {len(real)} of {len(tasks)} differences are real.",
            *(f"- {sentence}" for sentence in real),
        ]
    return "\n".join(lines)


def sections(
    run: Run, earlier: list[Run] = (), unread: list[str] = ()
) -> list[tuple[str, list[tuple]]]:
    """(title, blocks) in the order of the page; only those that the run has something for."""
    found = []

    def add(title, *blocks):
        if blocks := [b for b in blocks if b[-1]]:
            found.append((title, blocks))

    scores = {
        stage: {n: e for n, e in _scores(record).items() if _rated(e)}
        for stage, record in run.records.items()
    }
    names = sorted(
        dict.fromkeys(n for s in scores.values() for n in s), key=lambda n: not _is_mean(n)
    )
    charts = [
        dots(n, {s: scores[s][n] for s in scores if n in scores[s]}, _published(n)) for n in names
    ]
    compared = differences(run)
    add(
        "Scores",
        ("charts", "scores", charts),
        (
            "text",
            charts
            and "Dots with 95 % ranges. Dotted line: random answers; dashed line: always the commonest answer; ◇: published by others, see below.",
        ),
        ("table", *_score_rows(run)),
        (
            "text",
            run.records
            and "Percent right ± standard error (perplexities: lower is better). CORE and ChatCORE are means of scores "
            "centred on guessing: 0 is chance, 100 perfect; of a part: over other tasks than nanochat's.",
        ),
    )
    add(
        "Is the difference real?",
        *(
            block
            for pair, tasks in compared
            for block in (
                ("head", pair),
                (
                    "list",
                    [c.sentence for c in sorted(tasks.values(), key=lambda c: c.p_adjusted)],
                ),
            )
        ),
    )
    if run.records:
        heads, rows, sources = _beside(run, earlier)
        add(
            "Beside others",
            ("table", heads, rows),
            ("list", [*unread, *sources]),
            (
                "text",
                "Published figures come from other models, data and code: a scale to read one's own by, not a contest.",
            ),
        )
    core = {
        s: record["core"]["tasks"]
        for s, record in run.records.items()
        if record.get("core", {}).get("tasks")
    }
    labels = dict.fromkeys(label for tasks in core.values() for label in tasks)
    add(
        "CORE, task by task",
        (
            "table",
            ["task", *core, "random", "items"],
            [
                [
                    label,
                    *(
                        _with_error(
                            tasks.get(label, {}).get("accuracy"),
                            tasks.get(label, {}).get("stderr"),
                            100,
                        )
                        for tasks in core.values()
                    ),
                    *next(
                        (
                            [_percent(t[label].get("baseline")), _value(t[label].get("n"))]
                            for t in core.values()
                            if label in t
                        )
                    ),
                ]
                for label in labels
            ],
        ),
    )
    add("By lm-evaluation-harness", ("table", *_harness_rows(run)))
    add(
        "Bits per byte",
        ("table", *_bits_rows(run)),
        (
            "text",
            _text_bits(run)
            and "How many bits a byte of unseen text costs, ± standard error: lower is better, whatever the vocabulary.",
        ),
    )
    for stage, rows in run.curves.items():
        add(f"Training: {stage}", ("charts", stage, curves(rows, stage)))
    add("Plan and outcome", ("table", ["", "plan", "outcome"], [list(row) for row in _plan(run)]))
    add("Samples", ("samples", _samples(run)))
    add("How it was measured", ("table", *_how_measured(run)))
    skipped = {}
    for stage, record in run.records.items():
        for task, why in record.get("skipped", {}).items():
            skipped.setdefault((task, why), []).append(stage)
    add(
        "Not measured",
        (
            "list",
            [f"{task} ({', '.join(stages)}): {why}" for (task, why), stages in skipped.items()],
        ),
    )
    tokenizer = [
        ("tokenizer", f"{r['vocab_size']:,} tokens") for r in [run.results] if "vocab_size" in r
    ]
    tokenizer += [
        ("bytes per token", f"{r['bytes_per_token']:.3f}")
        for r in [run.results]
        if "bytes_per_token" in r
    ]
    figures = [
        (k, _value(run.results[k])) for k in ("preset", "source", "params") if k in run.results
    ]
    add(
        "Configuration",
        ("pairs", figures + tokenizer + [(k, _value(v)) for k, v in run.config.items()]),
    )
    add("Environment", ("pairs", _environment(run)))
    add("For the log", ("code", _log_block(run, compared)))
    return found


# ---- Markdown --------------------------------------------------------------------------------------------------------


def _md(text) -> str:
    """One line of text in which no character means anything to Markdown or HTML."""
    return re.sub(r"([\\`*\[\]<|~&])", r"\\\1", " ".join(str(text).split()))


def _md_table(heads, rows) -> list[str]:
    def cell(x):
        return f"**{_md(x)}**" if isinstance(x, Own | Head) else _md(x)

    return [
        f"| {' | '.join(map(_md, heads))} |",
        "|---" * len(heads) + "|",
        *(f"| {' | '.join(map(cell, row))} |" for row in rows),
    ]


def _fenced(text: str, language="text") -> list[str]:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}{language}", text, fence]


def markdown(run: Run, parts: list) -> str:
    lines = [f"# {_md(run.name)}", "", f"**{_md(verdict(run))}**"]
    for title, blocks in parts:
        lines += ["", f"## {_md(title)}"]
        for kind, *content in blocks:
            lines.append("")
            if kind == "head":
                lines.append(f"### {_md(content[0])}")
            elif kind == "text":
                lines.append(_md(content[0]))
            elif kind == "list":
                lines += [f"- {_md(item)}" for item in content[0]]
            elif kind == "pairs":
                lines += _md_table(["", ""], content[0])
            elif kind == "table":
                lines += _md_table(*content)
            elif kind == "charts":
                lines.append(f"![{_md(title)}](plots/report_{content[0]}.svg)")
            elif kind == "samples":
                for who, prompt, text in content[0]:
                    lines += [f"{who}:", "", *_fenced(_clean(prompt + text)), ""]
            elif kind == "code":
                lines += _fenced(content[0], "markdown")
    return _clean("\n".join(lines).rstrip() + "\n")


def _clean(text: str) -> str:
    """Without what a file of text cannot hold or show: control characters, halves of surrogate pairs."""
    text = text.replace("\r\n", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


# ---- HTML ------------------------------------------------------------------------------------------------------------

CSS = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:28px 20px 60px;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:19px;margin:38px 0 12px;padding-top:10px;border-top:1px solid var(--line)}
h3{font-size:13px;font-weight:600;margin:0 0 6px}
ul+h3{margin-top:14px}
.verdict{font-size:18px;line-height:1.45;margin:0;max-width:60em}
.note{color:var(--muted);font-size:13px;max-width:62em}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(255px,100%),1fr));gap:22px 34px}
.charts svg{display:block;overflow:visible}
.wide{overflow-x:auto;margin:14px 0;background:linear-gradient(to left,var(--bg) 40%,transparent) right/40px 100% no-repeat local,
linear-gradient(to left,var(--line),transparent) right/14px 100% no-repeat scroll}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:4px 14px 4px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
td{white-space:nowrap}
td.say{white-space:normal;min-width:11em}
th{color:var(--muted);font-weight:500;font-size:12.5px;white-space:nowrap}
.num{text-align:right}
td:first-child{position:sticky;left:0;background:var(--bg)}
th.head{color:var(--fg);font-weight:600;font-size:13px;padding-top:12px}
dl{columns:3 250px;column-gap:34px;margin:0;font-size:13.5px}
dl div{display:flex;justify-content:space-between;gap:14px;border-bottom:1px solid var(--line);padding:3px 0;break-inside:avoid}
dt{color:var(--muted)}
dd{margin:0;text-align:right;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:10px 12px;margin:0;font:12.5px/1.45 ui-monospace,monospace;
white-space:pre-wrap;overflow-wrap:anywhere;max-height:26em;overflow-y:auto}
pre b{font-weight:600}
pre.log{user-select:all;white-space:pre;overflow-x:auto}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(380px,100%),1fr));gap:16px}
ul{margin:0;padding-left:1.2em;font-size:14px}
li{margin:3px 0;max-width:62em;overflow-wrap:anywhere}
@media(max-width:600px){table{font-size:12.5px}th,td{padding-right:9px}body{padding:18px 14px 40px}h1{font-size:25px}
.verdict{font-size:16px}h2{margin-top:30px}}
@media print{body{max-width:none;padding:0;font-size:11pt}.charts>div,.samples>div,tr,li{break-inside:avoid}h2,h3{break-after:avoid}
pre{max-height:none}pre.log{white-space:pre-wrap}.wide{overflow:visible}table{font-size:9pt}td{white-space:normal}}
"""


def _html_table(heads, rows) -> str:
    text = [
        i == 0 or 2 * sum(bool(re.search(r"[^\W\d_]{2}", str(row[i]))) for row in rows) > len(rows)
        for i in range(len(heads))
    ]
    long = [max(len(str(row[i])) for row in rows) > 30 for i in range(len(heads))]

    def cell(i, x):
        kind = "say" if long[i] else "" if text[i] else "num"
        inside = html.escape(str(x))
        return f'<td class="{kind}">{f"<b>{inside}</b>" if isinstance(x, Own) else inside}</td>'

    top = "".join(
        f'<th class="{"" if text[i] else "num"}">{html.escape(h)}</th>' for i, h in enumerate(heads)
    )
    body = "".join(
        f'<tr><th colspan="{len(heads)}" class="head">{html.escape(row[0])}</th></tr>'
        if isinstance(row[0], Head)
        else f"<tr>{''.join(cell(i, x) for i, x in enumerate(row))}</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def page(run: Run, parts: list) -> str:
    """The whole HTML document; everything that comes from a file is escaped."""
    e = html.escape
    body = [f'<header><h1>{e(run.name)}</h1><p class="verdict">{e(verdict(run))}</p></header>']
    for title, blocks in parts:
        body.append(f"<section><h2>{e(title)}</h2>")
        for kind, *content in blocks:
            if kind == "head":
                body.append(f"<h3>{e(content[0])}</h3>")
            elif kind == "text":
                body.append(f'<p class="note">{e(content[0])}</p>')
            elif kind == "list":
                body.append(f"<ul>{''.join(f'<li>{e(item)}</li>' for item in content[0])}</ul>")
            elif kind == "pairs":
                body.append(
                    f"<dl>{''.join(f'<div><dt>{e(k)}</dt><dd>{e(v)}</dd></div>' for k, v in content[0])}</dl>"
                )
            elif kind == "table":
                body.append(_html_table(*content))
            elif kind == "charts":
                body.append(
                    f'<div class="charts">{"".join(f"<div><h3>{e(c.title)}</h3>{c.svg()}</div>" for c in content[1])}</div>'
                )
            elif kind == "samples":
                cards = [
                    f"<div><h3>{e(who)}</h3><pre><b>{e(prompt)}</b>{e(text)}</pre></div>"
                    for who, prompt, text in content[0]
                ]
                body.append(f'<div class="samples">{"".join(cards)}</div>')
            elif kind == "code":
                body.append(f'<pre class="log">{e(content[0])}</pre>')
        body.append("</section>")
    style = f":root{{color-scheme:light dark;{LIGHT}}}@media screen and (prefers-color-scheme:dark){{:root{{{DARK}}}}}{CHART_CSS}{CSS}"
    return _clean(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{e(run.name)} · report</title><style>{style}</style></head><body>{''.join(body)}</body></html>\n"
    )


def write(folder) -> Path:
    """Write report.html and report.md (its charts in plots/) into a run folder from whatever is there; the page's path.

    UserError where the folder holds no run, or a damaged file.
    """
    folder = Path(folder)
    run = read(folder)
    parts = sections(run, *_earlier(folder))
    for _, blocks in parts:
        for kind, *content in blocks:
            if kind == "charts":
                write_atomic(
                    folder / "plots" / f"report_{content[0]}.svg", _clean(_stack(content[1]))
                )
    write_atomic(folder / "report.md", markdown(run, parts))
    write_atomic(folder / "report.html", page(run, parts))
    return folder / "report.html"
