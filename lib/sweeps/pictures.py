"""Tables, CSV files and plots of a sweep; each function takes trials (and fits) and makes one thing.

Colours mean the same everywhere: a trial's colour is its result (dark is better), grey is pruned or failed, black is the best.
"""

import csv
import io
import math

import numpy as np

from lib.files import write_atomic
from lib.pictures import subplots
from lib.sweeps import scaling, space

GREY = "0.68"


def best_of(trials, goal: str = "minimize"):
    """The finished trial with the best finite value, or None."""
    done = [
        t for t in trials if t.state == "done" and t.value is not None and math.isfinite(t.value)
    ]
    return (min if goal == "minimize" else max)(done, key=lambda t: t.value, default=None)


# ---- CSV -------------------------------------------------------------------------------------------------------------------


def write_csv(path, rows: list[dict]):
    """Rows as CSV, columns in the order in which they first come."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, out.getvalue())


def trial_rows(trials) -> list[dict]:
    """One flat row per trial: what it was, how it ended, its numbers."""
    return [
        dict(
            number=t.number,
            id=t.id,
            state=t.state,
            value=t.value,
            **t.assignment,
            tries=t.tries,
            worker=t.worker,
            reason=t.reason,
            **{k: v for k, v in t.facts.items() if k not in t.assignment},
        )
        for t in trials
    ]


def curve_rows(trials) -> list[dict]:
    """One row per trial and validation, and per kept point of the training loss."""
    who = lambda t: dict(number=t.number, id=t.id, state=t.state)
    return [
        who(t) | dict(step=int(step), metric=value)
        for t in trials
        for step, value in t.reports.items()
    ] + [who(t) | dict(step=step, train_loss=loss) for t in trials for step, loss in t.curve]


# ---- tables ------------------------------------------------------------------------------------------------------------------


def table(rows: list[dict], formats: dict | None = None) -> str:
    """Rows as aligned text; formats: {column: format spec} for numbers."""
    if not rows:
        return "(nothing yet)"
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(row, name):
        v = row.get(name)
        if isinstance(v, float):
            return "" if math.isnan(v) else format(v, (formats or {}).get(name, ".5g"))
        return "" if v is None else str(v)

    texts = [columns] + [[cell(row, name) for name in columns] for row in rows]
    wide = [max(len(t[i]) for t in texts) for i in range(len(columns))]
    number = [any(isinstance(row.get(name), int | float) for row in rows) for name in columns]
    return "\n".join(
        "  ".join(
            t[i].rjust(wide[i]) if number[i] else t[i].ljust(wide[i]) for i in range(len(columns))
        ).rstrip()
        for t in texts
    )


def leaders(trials, goal: str = "minimize", count: int = 10) -> str:
    """The best finished trials."""
    done = sorted(
        (t for t in trials if t.state == "done" and t.value is not None),
        key=lambda t: t.value,
        reverse=goal == "maximize",
    )
    return table(
        [
            dict(number=t.number, value=t.value, **t.assignment, seconds=t.facts.get("seconds"))
            for t in done[:count]
        ],
        dict(value=".4f", seconds=".1f"),
    )


# ---- the search --------------------------------------------------------------------------------------------------------------


def _ladder(trials, goal):
    """A function from a value to a colour, dark for good ones, scaled by rank so that one bad trial does not bleach the rest."""
    import matplotlib

    values = sorted(
        (t.value for t in trials if t.state == "done" and t.value is not None),
        reverse=goal == "maximize",
    )
    colours = matplotlib.colormaps["viridis"]
    return lambda value: colours(
        np.searchsorted(
            np.array(values) * (1 if goal == "minimize" else -1),
            value * (1 if goal == "minimize" else -1),
        )
        / max(len(values), 1)
        * 0.9
    )


def best_so_far(trials, spec: dict):
    """Every trial's result in the order they ended, and the best so far."""
    goal, metric = spec["metric"]["goal"], spec["metric"]["name"]
    ended = sorted(
        (t for t in trials if t.ended or t.state in ("done", "pruned")),
        key=lambda t: t.ended or t.number,
    )
    figure, axis = subplots(size=(6, 3.4))
    done = [
        (i, t.value) for i, t in enumerate(ended, 1) if t.state == "done" and t.value is not None
    ]
    pruned = [
        (i, list(t.reports.values())[-1])
        for i, t in enumerate(ended, 1)
        if t.state == "pruned" and t.reports
    ]
    failed = [i for i, t in enumerate(ended, 1) if t.state == "failed"]
    if pruned:
        axis.scatter(*zip(*pruned), color=GREY, s=18, label=f"pruned ({len(pruned)})")
    if done:
        x, y = map(np.array, zip(*done))
        axis.scatter(x, y, color="C0", s=20, label=f"finished ({len(done)})", zorder=3)
        axis.step(
            x,
            (np.minimum if goal == "minimize" else np.maximum).accumulate(y),
            where="post",
            color="black",
            label="best so far",
        )
        span = (
            np.quantile(y, 0.9) - y.min() if goal == "minimize" else y.max() - np.quantile(y, 0.1)
        )
        if goal == "minimize" and len(y) > 4:  # far-off trials would flatten the rest
            axis.set_ylim(
                y.min() - 0.1 * span - 1e-9, min(axis.get_ylim()[1], y.min() + 3 * span + 1e-9)
            )
    for i in failed:
        axis.axvline(
            i,
            color="C3",
            alpha=0.4,
            linewidth=1,
            label=f"failed ({len(failed)})" if i == failed[0] else None,
        )
    axis.set(title="best so far", xlabel="trials ended", ylabel=metric)
    axis.legend()
    return figure


def curves(trials, spec: dict):
    """Training loss and validated metric over steps; pruned and failed runs in grey, the best in black."""
    goal, metric = spec["metric"]["goal"], spec["metric"]["name"]
    colour, best = _ladder(trials, goal), best_of(trials, goal)
    figure, axes = subplots(1, 2, size=(5, 3.4))
    shown = 0
    for t in sorted(trials, key=lambda t: t.state == "done"):
        done = t.state == "done" and t.value is not None
        style = (
            dict(color="black", linewidth=1.8, zorder=5)
            if t is best
            else dict(color=colour(t.value), alpha=0.8, zorder=3)
            if done
            else dict(color=GREY, linewidth=0.9, zorder=2)
        )
        shown += not done and bool(t.reports or t.curve)
        if t.curve:
            axes[0].plot(*zip(*t.curve), **style | dict(linewidth=style.get("linewidth", 0.9)))
        if t.reports:
            axes[1].plot(
                list(map(int, t.reports)), list(t.reports.values()), "o-", markersize=2.5, **style
            )
    axes[0].set(title="training loss", xlabel="step", ylabel="nats per token")
    axes[1].set(
        title=f"{metric} (grey: {shown} pruned, failed or running)" if shown else metric,
        xlabel="step",
        ylabel=metric,
    )
    for axis, ys in (
        (axes[0], [y for t in trials for _, y in t.curve]),
        (axes[1], [y for t in trials for y in t.reports.values()]),
    ):
        ys = [y for y in ys if math.isfinite(y)]
        if ys:  # a run that blew up must not squeeze all others into a line
            low, high = min(ys), np.quantile(ys, 0.98)
            axis.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.1 * (high - low) + 1e-9)
    return figure


def parallel(trials, spec: dict):
    """Parallel coordinates: one line per trial through its parameters to its result."""
    goal, metric, names = spec["metric"]["goal"], spec["metric"]["name"], list(space.varied(spec))
    colour, best = _ladder(trials, goal), best_of(trials, goal)
    done = [t for t in trials if t.state == "done" and t.value is not None]
    axes_of, ticks = {}, {}
    for name in names:
        p = spec["parameters"][name]
        if "values" in p:
            order = {repr(v): i for i, v in enumerate(p["values"])}
            top = max(len(order) - 1, 1)
            axes_of[name] = lambda v, order=order, top=top: order.get(repr(v), 0) / top
            ticks[name] = [
                (i / top, f"{v:.3g}" if isinstance(v, float) else str(v) or "(none)")
                for i, v in enumerate(p["values"])
            ]
        else:
            xs = [t.assignment[name] for t in trials] or [0.0]
            low, high = p.get("min", min(xs)), p.get("max", max(xs))
            if p["distribution"] == "log_uniform":
                low, high = math.exp(low), math.exp(high)
            log = "log" in p["distribution"] and low > 0
            f = (lambda v: math.log(v)) if log else float
            axes_of[name] = lambda v, f=f, a=f(low), b=f(high): (f(v) - a) / ((b - a) or 1)
            ticks[name] = [
                (
                    k / 4,
                    f"{math.exp(f(low) + (f(high) - f(low)) * k / 4) if log else low + (high - low) * k / 4:.3g}",
                )
                for k in range(5)
            ]
    values = [t.value for t in done] or [0.0, 1.0]
    low, high = min(values), max(np.quantile(values, 0.9), min(values) + 1e-9)
    place = lambda v: min(max((v - low) / (high - low), 0), 1.04)
    ticks[metric] = [(k / 4, f"{low + (high - low) * k / 4:.3f}") for k in range(5)]
    figure, axis = subplots(size=(max(6, 1.6 * (len(names) + 1)), 3.8))
    for t in sorted(trials, key=lambda t: (t is best, t.state == "done")):
        ys = [axes_of[name](t.assignment[name]) for name in names]
        if t in done:
            axis.plot(
                range(len(names) + 1),
                ys + [place(t.value)],
                color="black" if t is best else colour(t.value),
                linewidth=2 if t is best else 1,
                alpha=1 if t is best else 0.7,
                zorder=5 if t is best else 3,
            )
        else:
            axis.plot(range(len(names)), ys, color=GREY, linewidth=0.8, alpha=0.7, zorder=2)
    for i, name in enumerate([*names, metric]):
        axis.axvline(i, color="black", linewidth=0.8)
        for y, text in ticks[name]:
            axis.text(
                i + 0.03,
                y,
                text,
                fontsize=7,
                va="center",
                zorder=6,
                bbox=dict(facecolor="white", edgecolor="none", alpha=0.75, pad=0.5),
            )
    axis.set_xticks(
        range(len(names) + 1), [*names, metric], fontsize=8, rotation=12 if len(names) > 4 else 0
    )
    axis.set(
        yticks=[],
        ylim=(-0.06, 1.08),
        xlim=(-0.1, len(names) + 0.35),
        title="parameters and result (black: best, grey: not finished)",
    )
    axis.grid(False)
    axis.spines["left"].set_visible(False)
    return figure


def importance(shares: dict):
    """Bars of `space.importance`."""
    shares = dict(sorted(shares.items(), key=lambda item: item[1]))
    figure, axis = subplots(size=(5, max(2.0, 0.35 * len(shares) + 1)))
    axis.barh(list(shares), list(shares.values()), color="C0")
    axis.set(
        title="what makes a trial good",
        xlabel="share of what decides about the better half",
        xlim=(0, None),
    )
    return figure


# ---- scaling -----------------------------------------------------------------------------------------------------------------


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


def isoflop(fit: dict, metric: str):
    """Loss against size, one parabola per budget, stars at their minima."""
    figure, axis = subplots(size=(6, 4))
    for b, colour in zip(fit["budgets"], _colours(len(fit["budgets"]))):
        N = np.array([r["N"] for r in b["runs"]])
        axis.plot(
            N,
            [r["L"] for r in b["runs"]],
            "o",
            color=colour,
            markersize=4,
            label=f"{b['target']:.2g} FLOPs",
        )
        x = np.linspace(np.log(N.min()), np.log(N.max()), 100)
        axis.plot(np.exp(x), np.polyval(b["coefficients"], x), color=colour, linewidth=1)
        if b["inside"]:
            axis.plot(
                b["N"], b["L"], "*", color=colour, markeredgecolor="black", markersize=13, zorder=5
            )
    _log(axis)
    axis.set(
        title="equal compute, different sizes", xlabel="parameters (blocks and head)", ylabel=metric
    )
    axis.legend(title="budget")
    return figure


def frontier(fit: dict, params: dict | None = None):
    """The best size and number of tokens against compute: minima of the parabolas, their power laws, the parametric fit's."""
    figure, axes = subplots(1, 3, size=(4.4, 3.6))
    inside = [b for b in fit["budgets"] if b["inside"]]
    C = np.array([b["C"] for b in fit["budgets"]])
    line = np.geomspace(C.min() / 1.5, C.max() * 4, 60)
    sizes = [r["N"] for b in fit["budgets"] for r in b["runs"]]
    expected = (
        scaling.frontier(params, line)
        if params and params["alpha"] > 0 and params["beta"] > 0
        else None
    )
    if expected is not None and not (
        min(sizes) / 30 < expected[0].min() and expected[0].max() < max(sizes) * 30
    ):
        expected = None  # a fit that has lost itself would only stretch the axes
    for j, (axis, name, label) in enumerate(
        zip(axes, "NDL", ("best size (parameters)", "best number of tokens", "loss at the best"))
    ):
        for b in inside:
            low, high = b[f"{name}_interval"]
            axis.plot([b["C"]] * 2, [low, high], color="C0", linewidth=1)
            axis.plot(b["C"], b[name], "o", color="C0", markersize=5)
        law = fit[f"{name}_opt"]
        if math.isfinite(law["p"]):
            low, high = law["p_interval"]
            axis.plot(
                line,
                law["k"] * line ** law["p"],
                color="C0",
                label=f"C^{law['p']:.2f}  [{low:.2f}, {high:.2f}]",
            )
        if expected is not None:
            axis.plot(line, expected[j], "--", color="C1", label="parametric fit")
        _log(axis, "xy" if name != "L" else "x")
        axis.set(xlabel="FLOPs", title=label)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    return figure


def series(runs, fit: dict, metric: str):
    """A series of growing models and L = E + k C^-p with its bootstrap band."""
    figure, axis = subplots(size=(5.5, 3.8))
    C = np.array([r["C"] for r in runs])
    line = np.geomspace(C.min() / 1.2, C.max() * 4, 80)
    at = lambda f: f["E"] + f["k"] * line ** -f["p"]
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


# ---- ablations -----------------------------------------------------------------------------------------------------------------


def ablation(rows: list[dict], metric: str):
    """Bars of `scaling.paired`: what the model loses without each part, with 95 % intervals over seeds."""
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


def ablation_table(rows: list[dict]) -> str:
    """`scaling.paired` as text."""
    return table(
        [
            dict(
                part=f"without {r['part']}" if r["part"] else "whole model",
                mean=r["mean"],
                delta=r["delta"],
                low=r["low"],
                high=r["high"],
                seeds=r["pairs"],
                steps=r["steps"],
                seconds=r["seconds"],
            )
            for r in rows
        ],
        dict(mean=".4f", delta="+.4f", low="+.4f", high="+.4f", seconds=".1f"),
    )
