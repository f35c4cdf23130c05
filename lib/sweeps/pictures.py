"""Plots of a sweep; each function takes trials (or fits) and draws one figure.

Colours mean the same everywhere: a trial's colour is its result (dark is better), grey is pruned or
failed, black is the best.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lib.pictures import styled, subplots, whole_ticks
from lib.sweeps import scaling, space
from lib.sweeps.tables import best_of

GREY = "0.68"

# ---- the search ----------------------------------------------------------------------------------


def _ladder(trials, goal: str) -> Callable:
    """A function from a value to a colour, dark for good ones.

    It goes by rank, so that one bad trial does not bleach the rest.
    """
    import matplotlib

    sign = 1 if goal == "minimize" else -1
    values = np.array(sorted(sign * t.value for t in trials if t.scored))
    colours = matplotlib.colormaps["viridis"]
    return lambda value: colours(0.9 * np.searchsorted(values, sign * value) / max(len(values), 1))


@styled
def best_so_far(trials, spec: dict):
    """Every trial's result in the order they ended, and the best so far."""
    ended = [t for t in trials if t.ended or t.state in ("done", "pruned")]
    ended.sort(key=lambda t: t.ended or t.number)
    places = list(enumerate(ended, 1))
    done = [(i, t.value) for i, t in places if t.scored]
    pruned = [
        (i, [*t.reports.values()][-1]) for i, t in places if t.state == "pruned" and t.reports
    ]
    failed = [i for i, t in places if t.state == "failed"]

    figure, axis = subplots(size=(6, 3.4))
    if pruned:
        axis.scatter(*zip(*pruned), color=GREY, s=18, label=f"pruned ({len(pruned)})")
    if done:
        numbers, values = map(np.array, zip(*done))
        _staircase(axis, numbers, values, spec["metric"]["goal"])
    for i in failed:
        label = f"failed ({len(failed)})" if i == failed[0] else None
        axis.axvline(i, color="C3", alpha=0.4, linewidth=1, label=label)
    axis.set(title="best so far", xlabel="trials ended", ylabel=spec["metric"]["name"])
    whole_ticks(axis.xaxis)
    if done or pruned or failed:
        axis.legend()
    return figure


def _staircase(axis, x, y, goal: str):
    """Results as dots, and the best of them so far as a line."""
    minimize = goal == "minimize"
    best = np.minimum.accumulate(y) if minimize else np.maximum.accumulate(y)
    axis.scatter(x, y, color="C0", s=20, label=f"finished ({len(x)})", zorder=3)
    axis.step(x, best, where="post", color="black", label="best so far")
    # far-off trials would flatten the rest
    if minimize and len(y) > 4:
        least, spread = y.min(), np.quantile(y, 0.9) - y.min()
        top = min(axis.get_ylim()[1], least + 3 * spread + 1e-9)
        axis.set_ylim(least - 0.1 * spread - 1e-9, top)


@styled
def curves(trials, spec: dict):
    """Training loss and validated metric over steps; pruned and failed runs in grey, the best in
    black.
    """
    goal, metric = spec["metric"]["goal"], spec["metric"]["name"]
    colour, best = _ladder(trials, goal), best_of(trials, goal)
    figure, (losses, scores) = subplots(1, 2, size=(5, 3.4))
    for t in sorted(trials, key=lambda t: t.state == "done"):
        style = _style(t, t is best, colour)
        if t.curve:
            losses.plot(*zip(*t.curve), **style)
        if t.reports:
            steps = [int(step) for step in t.reports]
            scores.plot(steps, list(t.reports.values()), "o-", markersize=2.5, **style)

    grey = sum(not t.scored and bool(t.reports or t.curve) for t in trials)
    title = f"{metric} (grey: {grey} pruned, failed or running)" if grey else metric
    losses.set(title="training loss", xlabel="step", ylabel="nats per token")
    scores.set(title=title, xlabel="step", ylabel=metric)
    _fit_height(losses, [loss for t in trials for _, loss in t.curve])
    _fit_height(scores, [value for t in trials for value in t.reports.values()])
    whole_ticks(losses.xaxis)
    whole_ticks(scores.xaxis)
    return figure


def _style(trial, is_best: bool, colour: Callable) -> dict:
    if is_best:
        return dict(color="black", linewidth=1.8, zorder=5)
    if trial.scored:
        return dict(color=colour(trial.value), linewidth=0.9, alpha=0.8, zorder=3)
    return dict(color=GREY, linewidth=0.9, zorder=2)


def _fit_height(axis, values: list[float]):
    """Leave out the highest fiftieth:

    a run that blew up must not squeeze all others into a line.
    """
    values = [value for value in values if math.isfinite(value)]
    if values:
        low, high = min(values), np.quantile(values, 0.98)
        axis.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.1 * (high - low) + 1e-9)


class Scale(NamedTuple):
    """One axis of parallel coordinates."""

    place: Callable  # a value -> where on the axis, from 0 to 1
    ticks: list[tuple[float, str]]


def _listed_scale(values: list) -> Scale:
    """Values in the order in which the sweep lists them."""
    order = {repr(value): i for i, value in enumerate(values)}
    top = max(len(order) - 1, 1)
    names = [f"{v:.3g}" if isinstance(v, float) else str(v) or "(none)" for v in values]
    return Scale(
        lambda value: order.get(repr(value), 0) / top,
        [(i / top, name) for i, name in enumerate(names)],
    )


def _range_scale(p: dict, drawn: list[float]) -> Scale:
    """Numbers between bounds, logarithmic where they were drawn so."""
    low, high = p.get("min", min(drawn)), p.get("max", max(drawn))
    if p["distribution"] == "log_uniform":
        low, high = math.exp(low), math.exp(high)
    logarithmic = "log" in p["distribution"] and low > 0
    to = math.log if logarithmic else float
    back = math.exp if logarithmic else float
    start, length = to(low), (to(high) - to(low)) or 1
    quarters = [k / 4 for k in range(5)]
    return Scale(
        lambda value: (to(value) - start) / length,
        [(share, f"{back(start + length * share):.3g}") for share in quarters],
    )


def _result_scale(values: list[float]) -> Scale:
    """Results; what is far worse than most stands just above the top."""
    low = min(values)
    high = max(np.quantile(values, 0.9), low + 1e-9)
    quarters = [k / 4 for k in range(5)]
    return Scale(
        lambda value: min(max((value - low) / (high - low), 0), 1.04),
        [(share, f"{low + (high - low) * share:.3f}") for share in quarters],
    )


@styled
def parallel(trials, spec: dict):
    """Parallel coordinates: one line per trial through its parameters to its result."""
    goal, metric = spec["metric"]["goal"], spec["metric"]["name"]
    colour, best = _ladder(trials, goal), best_of(trials, goal)
    scales = {}
    for name, p in space.varied(spec).items():
        drawn = [t.assignment[name] for t in trials] or [0.0]
        scales[name] = _listed_scale(p["values"]) if "values" in p else _range_scale(p, drawn)
    names = list(scales)
    result = _result_scale([t.value for t in trials if t.scored] or [0.0, 1.0])

    figure, axis = subplots(size=(max(6, 1.6 * (len(names) + 1)), 3.8))
    for t in sorted(trials, key=lambda t: (t is best, t.state == "done")):
        heights = [scales[name].place(t.assignment[name]) for name in names]
        if t.scored:
            heights.append(result.place(t.value))
        axis.plot(range(len(heights)), heights, **_style(t, t is best, colour))
    for i, scale in enumerate([*scales.values(), result]):
        _draw_scale(axis, i, scale)

    turn = 12 if len(names) > 4 else 0
    axis.set_xticks(range(len(names) + 1), [*names, metric], fontsize=8, rotation=turn)
    axis.set(yticks=[], ylim=(-0.06, 1.08), xlim=(-0.1, len(names) + 0.35))
    axis.set(title="parameters and result (black: best, grey: not finished)")
    axis.grid(False)
    axis.spines["left"].set_visible(False)
    return figure


def _draw_scale(axis, x: float, scale: Scale):
    axis.axvline(x, color="black", linewidth=0.8)
    box = dict(facecolor="white", edgecolor="none", alpha=0.75, pad=0.5)
    for y, text in scale.ticks:
        axis.text(x + 0.03, y, text, fontsize=7, va="center", zorder=6, bbox=box)


@styled
def importance(shares: dict):
    """Bars of `suggest.importance`."""
    shares = dict(sorted(shares.items(), key=lambda item: item[1]))
    figure, axis = subplots(size=(5, max(2.0, 0.35 * len(shares) + 1)))
    axis.barh(list(shares), list(shares.values()), color="C0")
    axis.set(title="what makes a trial good", xlim=(0, None))
    axis.set(xlabel="share of what decides about the better half")
    return figure


@styled
def compared(first, second, spec: dict, name: str):
    """Two trials over each other, labelled by their one difference:

    training loss and metric by step.
    """
    figure, (losses, scores) = subplots(1, 2, size=(5, 3.4))
    for t, colour in ((first, "black"), (second, "C1")):
        label = f"{name}={t.assignment[name]}"
        if t.curve:
            losses.plot(*zip(*t.curve), color=colour, label=label)
        if t.reports:
            scores.plot(list(t.reports), list(t.reports.values()), "o-", color=colour, label=label)
    losses.set(title="training loss", xlabel="step", ylabel="nats per token")
    scores.set(title=spec["metric"]["name"], xlabel="step")
    losses.legend()
    whole_ticks(losses.xaxis)
    whole_ticks(scores.xaxis)
    return figure


# ---- scaling -------------------------------------------------------------------------------------


def _log(axis, which="x"):
    """Logarithmic, with labels at 1, 2 and 5 times powers of ten only: more would overlap."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name in which:
        getattr(axis, f"set_{name}scale")("log")
        ticks = getattr(axis, f"{name}axis")
        ticks.set_major_locator(LogLocator(subs=(1, 3)))
        ticks.set_major_formatter(
            FuncFormatter(lambda v, _: f"{v:.0e}".replace("e+0", "e").replace("e+", "e"))
        )
        ticks.set_minor_formatter(NullFormatter())


def _colours(n):
    import matplotlib

    return [matplotlib.colormaps["viridis"](0.1 + 0.75 * i / max(n - 1, 1)) for i in range(n)]


@styled
def isoflop(fit: dict, metric: str):
    """Loss against size, one parabola per budget, stars at their minima."""
    figure, axis = subplots(size=(6, 4))
    for b, colour in zip(fit["budgets"], _colours(len(fit["budgets"]))):
        N, L = np.array([(run["N"], run["L"]) for run in b.runs]).T
        axis.plot(N, L, "o", color=colour, markersize=4, label=f"{b.target:.2g} FLOPs")
        x = np.linspace(np.log(N.min()), np.log(N.max()), 100)
        axis.plot(np.exp(x), np.polyval(b.coefficients, x), color=colour, linewidth=1)
        if b.inside:
            axis.plot(b.N, b.L, "*", color=colour, markeredgecolor="black", markersize=13, zorder=5)
    _log(axis)
    axis.set(title="equal compute, different sizes", ylabel=metric)
    axis.set(xlabel="parameters (blocks and head)")
    axis.legend(title="budget")
    return figure


@styled
def frontier(fit: dict, params: dict | None = None):
    """The best size and number of tokens against compute:

    minima of the parabolas, their power laws, the parametric fit's.
    """
    figure, axes = subplots(1, 3, size=(4.4, 3.6))
    C = np.array([b.C for b in fit["budgets"]])
    line = np.geomspace(C.min() / 1.5, C.max() * 4, 60)
    expected = _expected(fit, params, line)
    labels = ("best size (parameters)", "best number of tokens", "loss at the best")
    for j, (axis, name, label) in enumerate(zip(axes, "NDL", labels)):
        for b in fit["budgets"]:
            if b.inside:
                axis.plot([b.C] * 2, getattr(b, f"{name}_interval"), color="C0", linewidth=1)
                axis.plot(b.C, getattr(b, name), "o", color="C0", markersize=5)
        law = fit[f"{name}_opt"]
        if math.isfinite(law["p"]):
            low, high = law["p_interval"]
            text = f"C^{law['p']:.2f}  [{low:.2f}, {high:.2f}]"
            axis.plot(line, law["k"] * line ** law["p"], color="C0", label=text)
        if expected is not None:
            axis.plot(line, expected[j], "--", color="C1", label="parametric fit")
        _log(axis, "xy" if name != "L" else "x")
        axis.set(xlabel="FLOPs", title=label)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    return figure


def _expected(fit: dict, params: dict | None, line):
    """(N, D, L) of the parametric fit along `line`; None without one, or where it has lost itself
    and would only stretch the axes.
    """
    if not params or params["alpha"] <= 0 or params["beta"] <= 0:
        return None
    sizes = [run["N"] for b in fit["budgets"] for run in b.runs]
    expected = scaling.frontier(params, line)
    near = min(sizes) / 30 < expected[0].min() and expected[0].max() < max(sizes) * 30
    return expected if near else None


@styled
def series(runs, fit: dict, metric: str):
    """A series of growing models and L = E + k C^-p with its bootstrap band."""
    figure, axis = subplots(size=(5.5, 3.8))
    C = np.array([r["C"] for r in runs])
    line = np.geomspace(C.min() / 1.2, C.max() * 4, 80)

    def at(f: dict):
        return f["E"] + f["k"] * line ** -f["p"]

    axis.fill_between(
        line,
        *np.quantile([at(f) for f in fit["draws"]], [0.025, 0.975], axis=0),
        color="C0",
        alpha=0.15,
        linewidth=0,
    )
    axis.plot(line, at(fit), color="C0", label=f"{fit['E']:.3f} + k C^-{fit['p']:.3f}")
    axis.plot(C, [r["L"] for r in runs], "o", color="black", markersize=4, label="runs")
    _log(axis)
    axis.set(xlabel="FLOPs", ylabel=metric, title="growing together: size and tokens")
    axis.legend()
    return figure


@styled
def predicted(rows: list[dict], metric: str):
    """Predicted against actual for runs that the fit has not seen."""
    figure, axis = subplots(size=(4, 3.8))
    actual, guess = np.array([r["actual"] for r in rows]), np.array([r["predicted"] for r in rows])
    low, high = (
        np.nan_to_num([r["low"] for r in rows], nan=0),
        np.nan_to_num([r["high"] for r in rows], nan=0),
    )
    low, high = np.where(low > 0, low, guess), np.where(high > 0, high, guess)
    axis.errorbar(
        actual,
        guess,
        yerr=[np.maximum(guess - low, 0), np.maximum(high - guess, 0)],
        fmt="o",
        color="C0",
        markersize=4,
        elinewidth=1,
        capsize=2,
    )
    ends = [min(actual.min(), guess.min()), max(actual.max(), guess.max())]
    pad = 0.08 * (ends[1] - ends[0]) or 0.01
    axis.plot(
        [ends[0] - pad, ends[1] + pad], [ends[0] - pad, ends[1] + pad], color="black", linewidth=0.8
    )
    axis.set(title="the largest, never fitted", xlabel=f"actual {metric}", ylabel="predicted")
    return figure


# ---- ablations -----------------------------------------------------------------------------------


@styled
def ablation(rows: list[dict], metric: str):
    """Bars of `scaling.paired`:

    what the model loses without each part, with 95 % intervals over seeds.
    """
    rows = [r for r in rows if r["part"] != ""]
    figure, axis = subplots(size=(6, max(2.2, 0.34 * len(rows) + 1)))
    for i, r in enumerate(rows):
        sure = math.isfinite(r["low"]) and (r["low"] > 0 or r["high"] < 0)
        axis.barh(i, r["delta"], color=("C3" if r["delta"] > 0 else "C2") if sure else GREY)
        if math.isfinite(r["low"]):
            axis.plot([r["low"], r["high"]], [i, i], color="black", linewidth=1)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [f"without {r['part']}" for r in rows])
    axis.set(
        title="grey: the interval over seeds includes zero",
        xlabel=f"change of {metric} (right is worse)",
    )
    return figure
