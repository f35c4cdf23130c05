"""Which laws a sweep's trials can tell, fitted, or a sentence on why there are none."""

import itertools

from lib.files import UserError
from lib.sweeps import scaling, space, texts
from lib.sweeps.tables import budget_table


def fit_laws(spec: dict, runs: list[dict]) -> tuple[dict, list[str]]:
    """(laws, what to print) of what this sweep varies. laws: {"isoflop": fit, "parametric": fit}
    of sizes at several budgets, {"series": fit} of a series of sizes.
    """
    varied = space.varied(spec)
    if "depth" not in varied:
        return {}, [
            "No law: this sweep does not vary depth. "
            "The presets miniseries and isoflop train several sizes."
        ]

    # one size after another, each on as much as it needs
    if "target_flops" not in varied:
        return _try("series", scaling.series, runs, texts.series_text)

    # several sizes at several budgets: parabolas, and from the same runs one formula for all
    laws, lines = _try("isoflop", scaling.isoflop, runs, texts.isoflop_text)
    if not laws:
        return laws, lines
    lines.insert(0, budget_table(laws["isoflop"]))
    more, sentence = _try("parametric", scaling.parametric, runs, texts.parametric_text)
    return laws | more, lines + sentence


def _try(name: str, fit, runs: list[dict], text) -> tuple[dict, list[str]]:
    """({name: what `fit` makes of the runs}, [it in words]), or ({}, [why it cannot be had])."""
    try:
        law = fit(runs)
    except UserError as e:
        return {}, [f"No {name} law yet: {e}."]
    return {name: law}, [text(law)]


def ablations(spec: dict, trials) -> tuple[list[dict], str]:
    """(paired differences, why there are none or how to read them)."""
    if "without" not in space.varied(spec):
        why = "Nothing was left out: this sweep does not vary `without`, the preset ablate does."
        return [], why
    rows = scaling.paired(trials)
    if len(rows) < 2:
        why = "No pair yet: the whole model and one without a part must finish, all else the same."
        return [], why
    return rows, (
        "delta: without the part minus the whole model with all else the same "
        "(positive: the part helps)\n"
        "low, high: 95 % interval, Student's t over pairs"
    )


def single_change(trials, goal: str = "minimize") -> tuple | None:
    """(the best trial, the best one that differs from it in a single parameter, that parameter's
    name), or None.
    """
    sign = 1 if goal == "minimize" else -1
    scored = [t for t in trials if t.scored]
    scored.sort(key=lambda t: sign * t.value)

    # pairs in the order of their better one
    for better, other in itertools.combinations(scored, 2):
        changed = []
        for name, value in better.assignment.items():
            if other.assignment.get(name) != value:
                changed.append(name)
        if len(changed) == 1:
            return better, other, changed[0]
    return None


def plain(laws: dict) -> dict:
    """The laws as JSON keeps them: without their bootstrap draws."""
    kept = {}
    for name, law in laws.items():
        kept[name] = {k: v for k, v in law.items() if k != "draws"}
        # a NamedTuple would lose the names of its fields
        if "budgets" in law:
            kept[name]["budgets"] = [budget._asdict() for budget in law["budgets"]]
    return kept
