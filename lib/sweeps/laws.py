"""Which laws a sweep's trials can tell, fitted, or a sentence on why there are none."""

from lib.files import UserError
from lib.sweeps import scaling, space, texts
from lib.sweeps.tables import budget_table


def fit_laws(spec: dict, runs: list[dict]) -> tuple[dict, list[str]]:
    """({"isoflop" and "parametric", or "series":

    its fit}, what to print) of what this sweep varies.
    """
    varied = space.varied(spec)
    if "depth" not in varied:
        return {}, [
            "No law: this sweep does not vary depth. The presets miniseries and isoflop train "
            "several sizes."
        ]
    if "target_flops" not in varied:
        return _try("series", scaling.series, runs, texts.series_text)

    laws, lines = _try("isoflop", scaling.isoflop, runs, texts.isoflop_text)
    if not laws:
        return laws, lines
    lines.insert(0, budget_table(laws["isoflop"]))
    more, sentence = _try("parametric", scaling.parametric, runs, texts.parametric_text)
    return laws | more, lines + sentence


def _try(name: str, fit, runs: list[dict], text) -> tuple[dict, list[str]]:
    try:
        law = fit(runs)
    except UserError as e:
        return {}, [f"No {name} law yet: {e}."]
    return {name: law}, [text(law)]


def ablations(spec: dict, trials) -> tuple[list[dict], str]:
    """(paired differences, why there are none or how to read them)."""
    if "without" not in space.varied(spec):
        return (
            [],
            "Nothing was left out: this sweep does not vary `without`, the preset ablate does.",
        )
    rows = scaling.paired(trials)
    if len(rows) < 2:
        return (
            [],
            "No pair yet: the whole model and one without a part must finish with one seed.",
        )
    return rows, (
        "delta: without the part minus the whole model of the same seed (positive: the part "
        "helps)\n"
        "low, high: 95 % interval, Student's t over seeds"
    )


def single_change(trials, goal: str = "minimize") -> tuple | None:
    """(the best trial, the best one that differs from it in a single parameter, that parameter's
    name), or None.
    """
    sign = 1 if goal == "minimize" else -1
    scored = sorted((t for t in trials if t.scored), key=lambda t: sign * t.value)
    for i, better in enumerate(scored):
        for other in scored[i + 1 :]:
            changed = [k for k, v in better.assignment.items() if other.assignment.get(k) != v]
            if len(changed) == 1:
                return better, other, changed[0]
    return None


def plain(laws: dict) -> dict:
    """The laws as JSON keeps them: without their bootstrap draws."""
    kept = {}
    for name, law in laws.items():
        kept[name] = {k: v for k, v in law.items() if k != "draws"}
        if "budgets" in law:
            kept[name]["budgets"] = [budget._asdict() for budget in law["budgets"]]
    return kept
