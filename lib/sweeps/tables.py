"""Tables and CSV files of a sweep: text for a screen, and rows that other programs read."""

import csv
import io
import math

from lib.files import write_atomic


def best_of(trials, goal: str = "minimize"):
    """The finished trial with the best finite value, or None."""
    best = min if goal == "minimize" else max
    return best((t for t in trials if t.scored), key=lambda t: t.value, default=None)


# ---- CSV -----------------------------------------------------------------------------------------


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
    rows = []
    for t in trials:
        row = dict(number=t.number, id=t.id, state=t.state, value=t.value) | t.assignment
        row |= dict(tries=t.tries, worker=t.worker, reason=t.reason)
        rows.append(row | {k: v for k, v in t.facts.items() if k not in t.assignment})
    return rows


def curve_rows(trials) -> list[dict]:
    """One row per trial and validation, and per kept point of the training loss."""
    rows = []
    for t in trials:
        who = dict(number=t.number, id=t.id, state=t.state)
        rows += [who | dict(step=int(step), metric=value) for step, value in t.reports.items()]
    for t in trials:
        who = dict(number=t.number, id=t.id, state=t.state)
        rows += [who | dict(step=step, train_loss=loss) for step, loss in t.curve]
    return rows


# ---- text ----------------------------------------------------------------------------------------


def table(rows: list[dict], formats: dict | None = None) -> str:
    """Rows as aligned text; formats: {column: format spec} for numbers."""
    if not rows:
        return "(nothing yet)"
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns]
    lines += [[_cell(row.get(name), name, formats or {}) for name in columns] for row in rows]

    # numbers stand at the right of their column, texts at the left
    for i, name in enumerate(columns):
        width = max(len(line[i]) for line in lines)
        is_number = any(isinstance(row.get(name), int | float) for row in rows)
        for line in lines:
            line[i] = line[i].rjust(width) if is_number else line[i].ljust(width)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _cell(value, name: str, formats: dict) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return "" if math.isnan(value) else format(value, formats.get(name, ".5g"))


def leaders(trials, goal: str = "minimize", count: int = 10) -> str:
    """The best finished trials."""
    scored = [t for t in trials if t.scored]
    scored.sort(key=lambda t: t.value, reverse=goal == "maximize")
    rows = [
        dict(number=t.number, value=t.value, **t.assignment, seconds=t.facts.get("seconds"))
        for t in scored[:count]
    ]
    return table(rows, dict(value=".4f", seconds=".1f"))


def budget_table(fit: dict) -> str:
    """`scaling.isoflop` as text: the best size at each budget."""
    rows = [
        {
            "target": b.target,
            "N": b.N,
            "D": b.D,
            "L": b.L,
            "N interval": span(b.N_interval),
            "tokens/N": b.D / b.N,
            "inside": str(b.inside),
        }
        for b in fit["budgets"]
    ]
    formats = {"target": ".3g", "N": ",.0f", "D": ",.0f", "L": ".4f", "tokens/N": ".1f"}
    return table(rows, formats)


def held_out_table(rows: list[dict]) -> str:
    """`scaling.held_out` as text."""
    formats = dict(N=",.0f", D=",.0f", C=".3g", error="+.2%")
    formats |= dict.fromkeys(("actual", "predicted", "low", "high"), ".4f")
    return table(rows, formats)


def ablation_table(rows: list[dict]) -> str:
    """`scaling.paired` as text."""
    shown = [
        dict(
            part=f"without {row['part']}" if row["part"] else "whole model",
            mean=row["mean"],
            delta=row["delta"],
            low=row["low"],
            high=row["high"],
            seeds=row["pairs"],
            steps=row["steps"],
            seconds=row["seconds"],
        )
        for row in rows
    ]
    return table(shown, dict(mean=".4f", delta="+.4f", low="+.4f", high="+.4f", seconds=".1f"))


def span(pair) -> str:
    """An interval in brackets."""
    return f"[{pair[0]:.3g}, {pair[1]:.3g}]"
