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
QUARTERS = (0, 0.25, 0.5, 0.75, 1)  # where an axis has numbers

# ---- the search ----------------------------------------------------------------------------------


def _ladder(trials, goal: str) -> Callable:
    """A function from a value to a colour, dark for good ones.

    It goes by rank, so that one bad trial does not bleach the rest.
    """
    import matplotlib

    sign = 1 if goal == "minimize" else -1
    values = np.array(sorted(sign * t.value for t in trials if t.scored))
    colours = matplotlib.colormaps["viridis"]

    def colour(value):
        rank = np.searchsorted(values, sign * value)
        # the last tenth of the colours is too light on white
        return colours(0.9 * rank / max(len(values), 1))

    return colour


@styled
def best_so_far(trials, spec: dict):
    """Every trial's result in the order they ended, and the best so far."""
    ended = [t for t in trials if t.ended or t.state in ("done", "pruned")]
    ended.sort(key=lambda t: t.ended or t.number)
    done, pruned, failed = _endings(ended)

    figure, axis = subplots(size=(6, 3.4))
    if pruned:
        axis.scatter(*zip(*pruned), color=GREY, s=18, label=f"pruned ({len(pruned)})")
    if done:
        places, values = map(np.array, zip(*done))
        _staircase(axis, places, values, spec["metric"]["goal"])

    # a failed trial has no height: a line where it was, all of them one entry of the legend
    for i in failed:
        label = f"failed ({len(failed)})" if i == failed[0] else None
        axis.axvline(i, color="C3", alpha=0.4, linewidth=1, label=label)

    axis.set(title="best so far", xlabel="trials ended", ylabel=spec["metric"]["name"])
    whole_ticks(axis.xaxis)
    if done or pruned or failed:
        axis.legend()
    return figure


def _endings(trials) -> tuple[list, list, list]:
    """(place, result) of finished trials, (place, last value) of pruned ones, places of failed."""
    done, pruned, failed = [], [], []
    for place, t in enumerate(trials, 1):
        if t.scored:
            done.append((place, t.value))
        elif t.state == "pruned" and t.reports:
            last = list(t.reports.values())[-1]
            pruned.append((place, last))
        elif t.state == "failed":
            failed.append(place)
    return done, pruned, failed


def _staircase(axis, x, y, goal: str):
    """Results as dots, and the best of them so far as a line."""
    minimize = goal == "minimize"
    better = np.minimum if minimize else np.maximum
    best = better.accumulate(y)
    axis.scatter(x, y, color="C0", s=20, label=f"finished ({len(x)})", zorder=3)
    axis.step(x, best, where="post", color="black", label="best so far")

    # far-off trials would flatten the rest
    if minimize and len(y) > 4:
        least = y.min()
        spread = np.quantile(y, 0.9) - least
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

    # finished ones last, so that they lie over the grey
    all_losses, all_scores, grey = [], [], 0
    for t in sorted(trials, key=lambda t: t.state == "done"):
        style = _style(t, t is best, colour)
        if t.curve:
            steps, curve = zip(*t.curve)
            losses.plot(steps, curve, **style)
            all_losses += curve
        if t.reports:
            steps = [int(step) for step in t.reports]
            values = list(t.reports.values())
            scores.plot(steps, values, "o-", markersize=2.5, **style)
            all_scores += values
        if not t.scored and (t.reports or t.curve):
            grey += 1

    title = metric
    if grey:
        title += f" (grey: {grey} pruned, failed or running)"
    losses.set(title="training loss", xlabel="step", ylabel="nats per token")
    scores.set(title=title, xlabel="step", ylabel=metric)
    _fit_height(losses, all_losses)
    _fit_height(scores, all_scores)
    whole_ticks(losses.xaxis)
    whole_ticks(scores.xaxis)
    return figure


def _style(trial, is_best: bool, colour: Callable) -> dict:
    """How a trial's line is drawn: the best in black, finished ones by result, others grey."""
    if is_best:
        return dict(color="black", linewidth=1.8, zorder=5)
    if trial.scored:
        return dict(color=colour(trial.value), linewidth=0.9, alpha=0.8, zorder=3)
    return dict(color=GREY, linewidth=0.9, zorder=2)


def _fit_height(axis, values: list[float]):
    """Leave out the highest fiftieth: a run that blew up must not squeeze all others flat."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return
    low, high = min(values), np.quantile(values, 0.98)
    spread = high - low
    axis.set_ylim(low - 0.05 * spread - 1e-9, high + 0.1 * spread + 1e-9)


class Scale(NamedTuple):
    """One axis of parallel coordinates."""

    place: Callable  # a value -> where on the axis, from 0 to 1
    ticks: list[tuple[float, str]]


def _listed_scale(values: list) -> Scale:
    """Values in the order in which the sweep lists them."""
    order = {repr(value): i for i, value in enumerate(values)}
    top = max(len(order) - 1, 1)
    ticks = [(i / top, _tick_label(value)) for i, value in enumerate(values)]
    return Scale(lambda value: order.get(repr(value), 0) / top, ticks)


def _tick_label(value) -> str:
    """A listed value as its axis names it; an empty text would be no label at all."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value) or "(none)"


def _range_scale(p: dict, drawn: list[float]) -> Scale:
    """Numbers between bounds, logarithmic where they were drawn so."""
    # a normal distribution has no bounds: then what was drawn
    low, high = p.get("min", min(drawn)), p.get("max", max(drawn))
    if p["distribution"] == "log_uniform":  # its bounds are natural logarithms
        low, high = math.exp(low), math.exp(high)

    # the axis is even in `to(value)`; `back` is its inverse
    to, back = float, float
    if "log" in p["distribution"] and low > 0:
        to, back = math.log, math.exp
    start = to(low)
    length = (to(high) - start) or 1
    ticks = [(share, f"{back(start + length * share):.3g}") for share in QUARTERS]
    return Scale(lambda value: (to(value) - start) / length, ticks)


def _result_scale(values: list[float]) -> Scale:
    """Results; what is far worse than most stands just above the top."""
    low = min(values)
    high = max(np.quantile(values, 0.9), low + 1e-9)
    spread = high - low
    ticks = [(share, f"{low + spread * share:.3f}") for share in QUARTERS]

    def place(value):
        share = (value - low) / spread
        return min(max(share, 0), 1.04)

    return Scale(place, ticks)


@styled
def parallel(trials, spec: dict):
    """Parallel coordinates: one line per trial through its parameters to its result."""
    goal, metric = spec["metric"]["goal"], spec["metric"]["name"]
    colour, best = _ladder(trials, goal), best_of(trials, goal)

    # an axis per parameter, and the result's at the right
    scales = {}
    for name, p in space.varied(spec).items():
        drawn = [t.assignment[name] for t in trials] or [0.0]
        scales[name] = _listed_scale(p["values"]) if "values" in p else _range_scale(p, drawn)
    names = list(scales)
    result = _result_scale([t.value for t in trials if t.scored] or [0.0, 1.0])

    # the best last, over all others
    width = max(6, 1.6 * (len(names) + 1))
    figure, axis = subplots(size=(width, 3.8))
    for t in sorted(trials, key=lambda t: (t is best, t.state == "done")):
        heights = [scales[name].place(t.assignment[name]) for name in names]
        if t.scored:
            heights.append(result.place(t.value))
        axis.plot(range(len(heights)), heights, **_style(t, t is best, colour))
    for i, scale in enumerate([*scales.values(), result]):
        _draw_scale(axis, i, scale)

    # many names side by side need to be turned
    turn = 12 if len(names) > 4 else 0
    labels = [*names, metric]
    axis.set_xticks(range(len(labels)), labels, fontsize=8, rotation=turn)

    # each axis has numbers of its own, so that the figure needs none
    axis.set_xlim(-0.1, len(names) + 0.35)
    axis.set_ylim(-0.06, 1.08)
    axis.set(yticks=[])
    axis.set(title="parameters and result (black: best, grey: not finished)")
    axis.grid(False)
    axis.spines["left"].set_visible(False)
    return figure


def _draw_scale(axis, x: float, scale: Scale):
    """A line for the axis, and its numbers in boxes that trials' lines do not cross."""
    axis.axvline(x, color="black", linewidth=0.8)
    box = dict(facecolor="white", edgecolor="none", alpha=0.75, pad=0.5)
    for y, text in scale.ticks:
        axis.text(x + 0.03, y, text, fontsize=7, va="center", zorder=6, bbox=box)


@styled
def importance(shares: dict):
    """Bars of `suggest.importance`."""
    shares = dict(sorted(shares.items(), key=lambda item: item[1]))
    height = max(2.0, 0.35 * len(shares) + 1)
    figure, axis = subplots(size=(5, height))
    axis.barh(list(shares), list(shares.values()), color="C0")
    axis.set(title="what makes a trial good", xlim=(0, None))
    axis.set(xlabel="share of what decides about the better half")
    return figure


@styled
def compared(first, second, spec: dict, name: str):
    """Two trials over each other, labelled by their one difference: training loss and metric."""
    figure, (losses, scores) = subplots(1, 2, size=(5, 3.4))
    for t, colour in ((first, "black"), (second, "C1")):
        label = f"{name}={t.assignment[name]}"
        if t.curve:
            losses.plot(*zip(*t.curve), color=colour, label=label)
        if t.reports:
            steps, values = list(t.reports), list(t.reports.values())
            scores.plot(steps, values, "o-", color=colour, label=label)
    losses.set(title="training loss", xlabel="step", ylabel="nats per token")
    scores.set(title=spec["metric"]["name"], xlabel="step")
    losses.legend()
    whole_ticks(losses.xaxis)
    whole_ticks(scores.xaxis)
    return figure


# ---- scaling -------------------------------------------------------------------------------------


def _log(axis, which="x"):
    """Logarithmic, with labels at 1 and 3 times powers of ten only: more would overlap."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def label(value, position) -> str:
        """3e8 rather than 3e+08."""
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")

    for name in which:
        getattr(axis, f"set_{name}scale")("log")
        ticks = getattr(axis, f"{name}axis")
        ticks.set_major_locator(LogLocator(subs=(1, 3)))
        ticks.set_major_formatter(FuncFormatter(label))
        ticks.set_minor_formatter(NullFormatter())


def _colours(n: int) -> list:
    """So many colours from dark to light, without the lightest."""
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    return [colours(0.1 + 0.75 * i / max(n - 1, 1)) for i in range(n)]


@styled
def isoflop(fit: dict, metric: str):
    """Loss against size, one parabola per budget, stars at their minima."""
    figure, axis = subplots(size=(6, 4))
    fitted = fit["budgets"]
    for budget, colour in zip(fitted, _colours(len(fitted))):
        # the runs as dots
        N = np.array([run["N"] for run in budget.runs])
        L = [run["L"] for run in budget.runs]
        axis.plot(N, L, "o", color=colour, markersize=4, label=f"{budget.target:.2g} FLOPs")

        # their parabola, which is one in ln N
        least, most = np.log(N.min()), np.log(N.max())
        x = np.linspace(least, most, 100)
        fitted_loss = np.polyval(budget.coefficients, x)
        axis.plot(np.exp(x), fitted_loss, color=colour, linewidth=1)

        # and its minimum, where that was measured
        star = dict(color=colour, markeredgecolor="black", markersize=13, zorder=5)
        if budget.inside:
            axis.plot(budget.N, budget.L, "*", **star)
    _log(axis)
    axis.set(title="equal compute, different sizes", ylabel=metric)
    axis.set(xlabel="parameters (blocks and head)")
    axis.legend(title="budget")
    return figure


@styled
def frontier(fit: dict, params: dict | None = None):
    """The best size and number of tokens against compute: minima of the parabolas, their power
    laws, the parametric fit's.
    """
    figure, axes = subplots(1, 3, size=(4.4, 3.6))
    C = np.array([b.C for b in fit["budgets"]])
    line = np.geomspace(C.min() / 1.5, C.max() * 4, 60)
    expected = _expected(fit, params, line)
    labels = ("best size (parameters)", "best number of tokens", "loss at the best")
    inside = [b for b in fit["budgets"] if b.inside]
    if not inside:
        figure.suptitle("no budget is best among its sizes: train smaller and larger ones")

    for j, (axis, name, label) in enumerate(zip(axes, "NDL", labels)):
        # minima with their intervals
        for budget in inside:
            best, interval = getattr(budget, name), getattr(budget, f"{name}_interval")
            axis.plot([budget.C, budget.C], interval, color="C0", linewidth=1)
            axis.plot(budget.C, best, "o", color="C0", markersize=5)

        # the law through them, and what the parametric fit says
        law = fit[f"{name}_opt"]
        if math.isfinite(law["p"]):
            low, high = law["p_interval"]
            text = f"C^{law['p']:.2f}  [{low:.2f}, {high:.2f}]"
            power_law = law["k"] * line ** law["p"]
            axis.plot(line, power_law, color="C0", label=text)
        if expected is not None:
            axis.plot(line, expected[j], "--", color="C1", label="parametric fit")
        _log(axis, "x" if name == "L" else "xy")
        axis.set(xlabel="FLOPs", title=label)
        handles, _ = axis.get_legend_handles_labels()
        if handles:
            axis.legend(fontsize=7)
    return figure


def _expected(fit: dict, params: dict | None, line):
    """(N, D, L) of the parametric fit along `line`; None without one, or where it has lost itself
    and would only stretch the axes.
    """
    if not params or params["alpha"] <= 0 or params["beta"] <= 0:
        return None
    sizes = []
    for budget in fit["budgets"]:
        sizes += [run["N"] for run in budget.runs]

    # it has lost itself thirty times below or above anything that was trained
    expected = scaling.frontier(params, line)
    best_sizes = expected[0]
    above_least = min(sizes) / 30 < best_sizes.min()
    below_most = best_sizes.max() < max(sizes) * 30
    return expected if above_least and below_most else None


@styled
def series(runs, fit: dict, metric: str):
    """A series of growing models and L = E + k C^-p with its bootstrap band."""
    figure, axis = subplots(size=(5.5, 3.8))
    C = np.array([r["C"] for r in runs])
    line = np.geomspace(C.min() / 1.2, C.max() * 4, 80)

    def loss_of(law: dict):
        return law["E"] + law["k"] * line ** -law["p"]

    # the band in which 95 % of the bootstrap's laws run
    drawn = [loss_of(law) for law in fit["draws"]]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    axis.fill_between(line, low, high, color="C0", alpha=0.15, linewidth=0)

    label = f"{fit['E']:.3f} + k C^-{fit['p']:.3f}"
    axis.plot(line, loss_of(fit), color="C0", label=label)
    losses = [run["L"] for run in runs]
    axis.plot(C, losses, "o", color="black", markersize=4, label="runs")
    _log(axis)
    axis.set(xlabel="FLOPs", ylabel=metric, title="growing together: size and tokens")
    axis.legend()
    return figure


@styled
def predicted(rows: list[dict], metric: str):
    """Predicted against actual for runs that the fit has not seen."""
    figure, axis = subplots(size=(4, 3.8))
    actual = np.array([row["actual"] for row in rows])
    guess = np.array([row["predicted"] for row in rows])
    low = np.array([row["low"] for row in rows])
    high = np.array([row["high"] for row in rows])

    # a prediction without an interval has no bar
    low = np.where(low > 0, low, guess)
    high = np.where(high > 0, high, guess)
    below = np.maximum(guess - low, 0)
    above = np.maximum(high - guess, 0)
    axis.errorbar(
        actual,
        guess,
        yerr=[below, above],
        fmt="o",
        color="C0",
        markersize=4,
        elinewidth=1,
        capsize=2,
    )

    # the diagonal, on which a perfect prediction lies
    least = min(actual.min(), guess.min())
    most = max(actual.max(), guess.max())
    pad = 0.08 * (most - least) or 0.01
    ends = [least - pad, most + pad]
    axis.plot(ends, ends, color="black", linewidth=0.8)
    axis.set(title="the largest, never fitted", xlabel=f"actual {metric}", ylabel="predicted")
    return figure


# ---- ablations -----------------------------------------------------------------------------------


@styled
def ablation(rows: list[dict], metric: str):
    """Bars of `scaling.paired`: what the model loses without each part, with 95 % intervals over
    seeds.
    """
    rows = [r for r in rows if r["part"] != ""]
    height = max(2.2, 0.34 * len(rows) + 1)
    figure, axis = subplots(size=(6, height))
    for i, row in enumerate(rows):
        # red where the part helps, green where it harms, grey where nobody knows
        low, high = row["low"], row["high"]
        colour = GREY
        if low > 0 or high < 0:
            colour = "C3" if row["delta"] > 0 else "C2"
        axis.barh(i, row["delta"], color=colour)
        if math.isfinite(low):
            axis.plot([low, high], [i, i], color="black", linewidth=1)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [f"without {r['part']}" for r in rows])
    axis.set(
        title="grey: the interval over seeds includes zero",
        xlabel=f"change of {metric} (right is worse)",
    )
    return figure
