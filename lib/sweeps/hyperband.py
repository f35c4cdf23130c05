"""Hyperband as wandb reads early_terminate: after how many validations a trial is judged, and when
it has to stop.
"""

import math

from lib.files import UserError, choose

ENTRIES = ("min_iter", "max_iter", "s", "eta")
ETA = 3  # one in ETA goes on at each rung


def rungs(spec: dict) -> list[int]:
    """After how many validations a trial is judged; [] for a sweep without early_terminate."""
    entry = spec.get("early_terminate")
    if entry is None:
        return []
    if not isinstance(entry, dict) or entry.get("type") != "hyperband":
        raise UserError(
            "early_terminate must be of type hyperband, with min_iter, or max_iter and s; "
            f"got {entry!r}"
        )
    for name, value in entry.items():
        if name not in ("type", "strict"):
            _check(name, value)

    # upwards from the first rung, or downwards from the whole length
    eta = entry.get("eta", ETA)
    if "min_iter" in entry:
        first = entry["min_iter"]
        counts = [int(first * eta**k) for k in range(30)]
    elif "max_iter" in entry and "s" in entry:
        whole, brackets = entry["max_iter"], int(entry["s"])
        counts = [int(whole / eta**k) for k in range(1, brackets + 1)]
    else:
        raise UserError("early_terminate needs min_iter, or max_iter together with s")
    return sorted({n for n in counts if 1 <= n < 10**6})


def _check(name: str, value):
    """Refuse an entry that hyperband does not have, or one that is no number of a sound size."""
    choose("entry of early_terminate", name, ENTRIES)
    least = 2 if name == "eta" else 1
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not value >= least:
        raise UserError(f"early_terminate {name}={value!r} must be a number of at least {least}")


def should_stop(spec: dict, trials, trial) -> bool:
    """Whether `trial` ends now: at its latest rung its best value so far is not among the best
    1/eta there.

    Asynchronous: a trial is compared with those that have come as far, finished or not, and the
    first to come goes on.
    """
    reached = [rung for rung in rungs(spec) if rung <= len(trial.reports)]
    if not reached:
        return False
    rung = reached[-1]
    sign = 1 if spec["metric"]["goal"] == "minimize" else -1

    def best(t) -> float:
        """The best of the trial's first validations, up to the rung; smaller is better."""
        values = [sign * value for value in list(t.reports.values())[:rung]]
        finite = [value for value in values if math.isfinite(value)]
        return min(finite, default=math.inf)

    # all that have come to this rung, this trial among them
    ranked = sorted(best(t) for t in trials if len(t.reports) >= rung)
    eta = spec["early_terminate"].get("eta", ETA)
    kept = max(1, int(len(ranked) / eta))
    return len(ranked) > 1 and best(trial) > ranked[kept - 1]
