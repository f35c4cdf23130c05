"""Tables and CSV files of a sweep: text for a screen, and rows that other programs read."""

import csv
import io
import math

from lib.files import write_atomic


def best_of(trials, goal: str = "minimize"):
    """The finished trial with the best finite value, or None."""
    scored = [t for t in trials if t.scored]
    best = min if goal == "minimize" else max
    return best(scored, key=lambda t: t.value, default=None)


# ---- CSV -----------------------------------------------------------------------------------------


def write_csv(path, rows: list[dict]):
    """Rows as CSV, columns in the order in which they first come."""
    columns = columns_of(rows)
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, out.getvalue())


def columns_of(rows: list[dict]) -> list[str]:
    """The columns of all rows, in the order in which they first come."""
    columns = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    return list(columns)


def trial_rows(trials) -> list[dict]:
    """One flat row per trial: what it was, how it ended, its numbers."""
    rows = []
    for t in trials:
        row = dict(number=t.number, id=t.id, state=t.state, value=t.value)
        row |= t.assignment
        row |= dict(tries=t.tries, worker=t.worker, reason=t.reason)

        # a fact of the name of a parameter would say the same in other words
        row |= {name: fact for name, fact in t.facts.items() if name not in t.assignment}
        rows.append(row)
    return rows


def curve_rows(trials) -> list[dict]:
    """One row per trial and validation, then one per kept point of the training loss."""
    validations, points = [], []
    for t in trials:
        trial = dict(number=t.number, id=t.id, state=t.state)
        for step, value in t.reports.items():
            validations.append(trial | dict(step=int(step), metric=value))
        for step, loss in t.curve:
            points.append(trial | dict(step=step, train_loss=loss))
    return validations + points


# ---- text ----------------------------------------------------------------------------------------


def table(rows: list[dict], formats: dict | None = None) -> str:
    """Rows as aligned text; formats: {column: format spec} for numbers."""
    if not rows:
        return "(nothing yet)"
    columns = columns_of(rows)
    lines = [list(columns)]
    for row in rows:
        lines.append([_cell(row.get(name), name, formats or {}) for name in columns])

    # numbers stand at the right of their column, texts at the left
    for i, name in enumerate(columns):
        width = max(len(line[i]) for line in lines)
        is_number = any(isinstance(row.get(name), int | float) for row in rows)
        for line in lines:
            line[i] = line[i].rjust(width) if is_number else line[i].ljust(width)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _cell(value, name: str, formats: dict) -> str:
    """A value as text; what is not known is empty."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return ""
    return format(value, formats.get(name, ".5g"))


def leaders(trials, goal: str = "minimize", count: int = 10) -> str:
    """The best finished trials."""
    # with their parameters, so that one can be trained again
    scored = [t for t in trials if t.scored]
    scored.sort(key=lambda t: t.value, reverse=goal == "maximize")
    rows = []
    for t in scored[:count]:
        seconds = t.facts.get("seconds")
        rows.append(dict(number=t.number, value=t.value, **t.assignment, seconds=seconds))
    return table(rows, dict(value=".4f", seconds=".1f"))


def budget_table(fit: dict) -> str:
    """`scaling.isoflop` as text: the best size at each budget."""
    # a budget whose minimum is not inside is shown, and not used
    rows = []
    for budget in fit["budgets"]:
        row = {
            "target": budget.target,
            "N": budget.N,
            "D": budget.D,
            "L": budget.L,
            "N interval": span(budget.N_interval),
            "tokens/N": budget.D / budget.N,
            "inside": str(budget.inside),
        }
        rows.append(row)
    formats = {"target": ".3g", "N": ",.0f", "D": ",.0f", "L": ".4f", "tokens/N": ".1f"}
    return table(rows, formats)


def held_out_table(rows: list[dict]) -> str:
    """`scaling.held_out` as text."""
    formats = dict(N=",.0f", D=",.0f", C=".3g", error="+.2%")
    formats |= dict.fromkeys(("actual", "predicted", "low", "high"), ".4f")
    return table(rows, formats)


def ablation_table(rows: list[dict]) -> str:
    """`scaling.paired` as text."""
    shown = []
    for row in rows:
        part = f"without {row['part']}" if row["part"] else "whole model"
        line = dict(
            part=part,
            mean=row["mean"],
            delta=row["delta"],
            low=row["low"],
            high=row["high"],
            seeds=row["pairs"],
            steps=row["steps"],
            seconds=row["seconds"],
        )
        shown.append(line)

    # a difference always with its sign
    formats = dict.fromkeys(("delta", "low", "high"), "+.4f")
    return table(shown, formats | dict(mean=".4f", seconds=".1f"))


def span(pair) -> str:
    """An interval in brackets."""
    return f"[{pair[0]:.3g}, {pair[1]:.3g}]"
