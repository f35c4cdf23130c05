"""Scaling laws and paired differences from finished trials, with intervals, by numpy and scipy
alone.

A run is a dict with N (parameters of blocks and head), D (training tokens), C (training FLOPs) and
L (the loss, here bits per byte). Intervals are 95 % percentile intervals of a bootstrap over
residuals, seeded, so that the same runs give the same numbers.
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from lib.files import UserError

DRAWS = 400
LEVEL = 0.95


def runs_of(trials) -> list[dict]:
    """The finished trials as runs, their assignment and number with them."""
    return [
        dict(
            t.assignment,
            N=t.facts["scaling_params"],
            D=t.facts["tokens"],
            C=t.facts["flops"],
            L=t.value,
            number=t.number,
        )
        for t in trials
        if t.scored and "scaling_params" in t.facts
    ]


def interval(draws, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of finite draws, (nan, nan) where fewer than half of them are."""
    draws = np.asarray(draws, float)
    good = draws[np.isfinite(draws)]
    if len(good) * 2 < max(len(draws), 1):
        return math.nan, math.nan
    low, high = np.quantile(good, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# ---- approach 2: a parabola per budget, power laws through their minima --------------------------


def parabola(N, L) -> dict:
    """Least squares L = a + b (ln N - m)^2: {"N", "L", "coefficients" of ln N, "inside"}, N nan
    where it has no minimum anywhere near.

    inside: whether the minimum lies between the smallest and the largest N, where it is measured
    rather than guessed.
    """
    x = np.log(np.asarray(N, float))
    a2, a1, a0 = np.polyfit(x, np.asarray(L, float), 2)
    if a2 <= 0:
        return dict(N=math.nan, L=math.nan, coefficients=(a2, a1, a0), inside=False)
    low = -a1 / (2 * a2)
    # a thousand times beyond what was tried: as good as none
    if not x.min() - 7 < low < x.max() + 7:
        return dict(N=math.nan, L=math.nan, coefficients=(a2, a1, a0), inside=False)
    return dict(
        N=float(np.exp(low)),
        L=float(a0 - a1**2 / (4 * a2)),
        coefficients=(a2, a1, a0),
        inside=bool(x.min() <= low <= x.max()),
    )


def power_law(x, y) -> tuple[float, float]:
    """(k, p) of y = k x^p by least squares on logs; (nan, nan) below two points."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    good = np.isfinite(x) & np.isfinite(y)
    if len(set(x[good])) < 2:
        return math.nan, math.nan
    p, k = np.polyfit(np.log(x[good]), np.log(y[good]), 1)
    return float(np.exp(k)), float(p)


def budgets(runs) -> dict:
    """{nominal FLOPs: runs}: by target_flops where the sweep had it, ascending."""
    found = {}
    for r in runs:
        found.setdefault(r.get("target_flops", r["C"]), []).append(r)
    return dict(sorted(found.items()))


class Budget(NamedTuple):
    """The best size at one compute budget, from a parabola through its runs."""

    C: float  # FLOPs, the mean of its runs
    target: float  # FLOPs as asked for
    N: float
    D: float
    L: float
    inside: bool  # whether the minimum lies within the sizes trained
    coefficients: tuple  # of the parabola in ln N
    N_interval: tuple[float, float]
    D_interval: tuple[float, float]
    L_interval: tuple[float, float]
    runs: list[dict]


def isoflop(runs, draws: int = DRAWS, seed: int = 0) -> dict:
    """Parabolas per budget and the power laws through them: how the best size and the best number
    of tokens grow with compute.

    {"budgets": [Budget], "used", "N_opt": {k, p, p_interval}, "D_opt": …, "L_opt": …}. D at a
    minimum comes from a power law of D in N through that budget's runs (at fixed C it nearly is
    one). Budgets with fewer than four sizes are left out. N_opt and D_opt use the budgets whose
    minimum lies inside the sizes trained, and say how many those are.
    """
    rng = np.random.default_rng(seed)
    fitted = [
        _fit_budget(C, members, draws, rng)
        for C, members in budgets(runs).items()
        if len({run["N"] for run in members}) >= 4
    ]
    if not fitted:
        raise UserError(
            "a parabola takes four sizes at one budget: none has so many finished runs yet"
        )

    used = [(budget, spread) for budget, spread in fitted if budget.inside]
    result: dict[str, Any] = dict(budgets=[budget for budget, _ in fitted], used=len(used))
    C = [budget.C for budget, _ in used]
    for j, name in enumerate("NDL"):
        k, p = power_law(C, [getattr(budget, name) for budget, _ in used])
        powers = [power_law(C, [spread[d][j] for _, spread in used])[1] for d in range(draws)]
        result[f"{name}_opt"] = dict(k=k, p=p, p_interval=interval(powers))
    return result


def _fit_budget(target: float, members: list[dict], draws: int, rng) -> tuple[Budget, list]:
    """(Budget, [(N, D, L) of each bootstrap draw]) of the runs at one budget."""
    N, D, L = (np.array([m[k] for m in members], float) for k in "NDL")
    fit = parabola(N, L)
    scale, power = power_law(N, D)

    # the residuals are drawn anew, widened by what three coefficients have taken from them
    predicted = np.polyval(fit["coefficients"], np.log(N))
    residual = (L - predicted) * math.sqrt(len(N) / (len(N) - 3))
    residual = residual - residual.mean()
    again = [parabola(N, predicted + rng.choice(residual, len(N))) for _ in range(draws)]
    spread = [(a["N"], scale * a["N"] ** power, a["L"]) for a in again]
    intervals = [interval(values) for values in zip(*spread)]
    budget = Budget(
        C=float(np.mean([m["C"] for m in members])),
        target=target,
        N=fit["N"],
        D=scale * fit["N"] ** power,
        L=fit["L"],
        inside=fit["inside"],
        coefficients=fit["coefficients"],
        N_interval=intervals[0],
        D_interval=intervals[1],
        L_interval=intervals[2],
        runs=members,
    )
    return budget, spread


# ---- approach 3: L(N, D) = E + A / N^alpha + B / D^beta ------------------------------------------


def _huber(r, delta):
    """(Huber loss of residuals, its slope)."""
    small = np.abs(r) <= delta
    loss = np.where(small, 0.5 * r * r, delta * (np.abs(r) - 0.5 * delta))
    return loss, np.where(small, r, delta * np.sign(r))


def _objective(theta, n, d, logs, delta):
    """Huber loss of log L and its gradient.

    theta = (log E, log A, alpha, log B, beta); n and d are logs around their means.
    """
    terms = np.stack([np.full_like(n, theta[0]), theta[1] - theta[2] * n, theta[3] - theta[4] * d])
    top = terms.max(axis=0)
    weights = np.exp(terms - top)
    total = weights.sum(axis=0)
    loss, slope = _huber(top + np.log(total) - logs, delta)

    # each term's share of the sum is the slope of its logarithm
    of_E, of_A, of_B = slope * weights / total
    gradient = [of_E.sum(), of_A.sum(), -(of_A * n).sum(), of_B.sum(), -(of_B * d).sum()]
    return loss.sum() / delta, np.array(gradient) / delta


def _minimise(theta, n, d, logs, delta):
    from scipy.optimize import minimize

    limits = [(-12, 6), (-12, 6), (0.0, 3.0), (-12, 6), (0.0, 3.0)]
    return minimize(
        _objective,
        theta,
        (n, d, logs, delta),
        jac=True,
        method="L-BFGS-B",
        bounds=limits,
        options=dict(maxiter=500, maxcor=20, ftol=1e-12, gtol=1e-7),
    )


def predict(fit: dict, N, D):
    """The loss that a parametric fit expects of N parameters and D tokens."""
    return (
        fit["E"]
        + fit["A"] / np.asarray(N, float) ** fit["alpha"]
        + fit["B"] / np.asarray(D, float) ** fit["beta"]
    )


def parametric(runs, delta: float = 1e-3, draws: int = 100, seed: int = 0) -> dict:
    """Fit of L = E + A/N^alpha + B/D^beta by Huber loss on logs, L-BFGS from a grid of starts
    (arXiv:2203.15556, appendix D.3).

    {"E", "A", "alpha", "B", "beta", "a" = beta/(alpha+beta), the power of compute in the best N,
    "error" (root mean square of the relative error), "intervals": {name: (low, high)}}. The
    objective is divided by delta, so that L-BFGS's own tolerances bite late. Raises UserError below
    six runs.
    """
    if len({(r["N"], r["D"]) for r in runs}) < 6:
        raise UserError(
            f"five constants cannot be fitted to {len(runs)} run(s): six or more with different N "
            "and D are "
            "needed"
        )
    n, d, logs = (np.log(np.array([r[k] for r in runs], float)) for k in "NDL")
    at_n, at_d = n.mean(), d.mean()
    n, d = n - at_n, d - at_d
    least = logs.min()
    exponents = (0.2, 0.6)
    starts = [
        (least + e, least - 1, alpha, least - 1, beta)
        for e, alpha, beta in itertools.product((-2.0, -0.7, -0.1), exponents, exponents)
    ]
    tried = [_minimise(np.array(start), n, d, logs, delta) for start in starts]
    best = min(tried, key=lambda result: result.fun)

    fit = _constants(best.x, at_n, at_d)
    expected = np.log(predict(fit, np.exp(n + at_n), np.exp(d + at_d)))
    residual, rng = logs - expected, np.random.default_rng(seed)
    wide = residual * math.sqrt(len(logs) / max(len(logs) - 5, 1))
    again = []
    for _ in range(draws):
        resampled = expected + rng.choice(wide, len(logs))
        again.append(_constants(_minimise(best.x, n, d, resampled, delta).x, at_n, at_d))
    return fit | dict(
        error=float(np.sqrt(np.mean(np.expm1(residual) ** 2))),
        intervals={k: interval([a[k] for a in again]) for k in fit},
        draws=again,
    )


def _constants(theta, at_n: float, at_d: float) -> dict:
    """The law's constants from `_objective`'s, whose logs were taken around at_n and at_d."""
    alpha, beta = float(theta[2]), float(theta[4])
    return dict(
        E=math.exp(theta[0]),
        A=math.exp(theta[1] + alpha * at_n),
        alpha=alpha,
        B=math.exp(theta[3] + beta * at_d),
        beta=beta,
        a=beta / (alpha + beta) if alpha + beta else math.nan,
    )


def frontier(fit: dict, C) -> tuple:
    """(N, D, L) of the best split of C FLOPs by a parametric fit, with C = 6 N D."""
    C = np.asarray(C, float)
    G = (fit["alpha"] * fit["A"] / (fit["beta"] * fit["B"])) ** (1 / (fit["alpha"] + fit["beta"]))
    N = G * (C / 6) ** fit["a"]
    return N, C / 6 / N, predict(fit, N, C / 6 / N)


# ---- one series: L = E + k C^-p ------------------------------------------------------------------


def series(runs, draws: int = DRAWS, seed: int = 0) -> dict:
    """Fit of L = E + k C^-p (E not below 0) to runs of growing compute, by least squares on logs:
    {"E", "k", "p", "intervals"}.

    Raises UserError below four different sizes.
    """
    from scipy.optimize import nnls

    C, L = (np.array([r[k] for r in runs], float) for k in "CL")
    if len(set(C)) < 4:
        raise UserError(
            f"three constants cannot be fitted to {len(set(C))} size(s): four or more are needed"
        )
    x = C / C.min()

    def fit(L):  # for each power the rest is linear, and neither constant may be negative
        best: tuple[float, ...] = tuple([math.inf])
        for p in np.geomspace(0.02, 2, 120):
            basis = np.stack([np.ones_like(x), x**-p], axis=1)
            (E, k), _ = nnls(basis / L[:, None], np.ones_like(L))
            miss = float(np.sum(np.log(np.maximum(basis @ [E, k], 1e-12) / L) ** 2))
            best = min(best, (miss, E, k * C.min() ** p, p))
        return dict(E=float(best[1]), k=float(best[2]), p=float(best[3]))

    found, rng = fit(L), np.random.default_rng(seed)
    expected = found["E"] + found["k"] * C ** -found["p"]
    residual = np.log(L / expected) * math.sqrt(len(L) / max(len(L) - 3, 1))
    again = [fit(expected * np.exp(rng.choice(residual, len(L)))) for _ in range(draws // 4)]
    return found | dict(intervals={k: interval([a[k] for a in again]) for k in found}, draws=again)


# ---- did it know? --------------------------------------------------------------------------------


def held_out(runs, draws: int = 100) -> list[dict]:
    """Predicted against actual for the largest budget, by fits that saw only the smaller ones.

    With several sizes per budget (isoflop) by the parametric fit, else (miniseries) by `series`.
    Rows: N, D, C, actual, predicted, low, high (of the prediction, constants' uncertainty only),
    error (relative). [] when what is left is too little to fit.
    """
    groups = budgets(runs)
    several = any(len({r["N"] for r in group}) > 1 for group in groups.values())
    if not several:
        groups = _by_size(runs)
    if len(groups) < 2:
        return []

    *smaller, largest = groups.values()
    seen = list(itertools.chain.from_iterable(smaller))
    try:
        fit = parametric(seen, draws=draws) if several else series(seen, draws=4 * draws)
    except UserError:
        return []

    def value(f: dict, run: dict) -> float:
        if several:
            return float(predict(f, run["N"], run["D"]))
        return float(f["E"] + f["k"] * run["C"] ** -f["p"])

    rows = []
    for run in largest:
        low, high = interval([value(f, run) for f in fit["draws"]])
        predicted = value(fit, run)
        rows.append(
            dict(
                N=float(run["N"]),
                D=float(run["D"]),
                C=float(run["C"]),
                actual=run["L"],
                predicted=predicted,
                low=low,
                high=high,
                error=predicted / run["L"] - 1,
            )
        )
    return rows


def _by_size(runs) -> dict:
    """{parameters: runs}, ascending."""
    groups = {}
    for run in runs:
        groups.setdefault(run["N"], []).append(run)
    return dict(sorted(groups.items()))


# ---- ablations -----------------------------------------------------------------------------------


def paired(trials, by: str = "without", base="", over: str = "seed") -> list[dict]:
    """What leaving out each part costs: the difference to the whole model with the same seed,
    averaged over seeds.

    Rows sorted by the difference: part, delta, low, high (Student's t over the pairs), pairs, mean
    (of the metric), steps, seconds. The interval is nan with a single pair. Ten parts at 95 % mean
    that one in two such tables has an interval that misses.
    """
    done = [t for t in trials if t.scored and by in t.assignment]
    whole = {t.assignment.get(over): t.value for t in done if t.assignment[by] == base}
    rows = []
    for part in dict.fromkeys(t.assignment[by] for t in done):
        members = [t for t in done if t.assignment[by] == part]
        pairs = [t for t in members if t.assignment.get(over) in whole]
        if not pairs:
            continue
        delta, half = _mean_and_half([t.value - whole[t.assignment.get(over)] for t in pairs])
        if part == base:
            delta, half = 0.0, 0.0
        rows.append(
            dict(
                part=part,
                delta=delta,
                low=delta - half,
                high=delta + half,
                pairs=len(pairs),
                mean=float(np.mean([t.value for t in members])),
                steps=members[0].facts.get("steps"),
                seconds=float(np.mean([t.facts.get("seconds", math.nan) for t in members])),
            )
        )
    return sorted(rows, key=lambda row: (row["part"] != base, row["delta"]))


def _mean_and_half(deltas: list[float]) -> tuple[float, float]:
    """(mean, half of its interval by Student's t); the half is nan for a single difference."""
    from scipy.stats import t as student

    n, mean = len(deltas), float(np.mean(deltas))
    if n == 1:
        return mean, math.nan
    quantile = student.ppf((1 + LEVEL) / 2, n - 1)
    return mean, float(quantile * np.std(deltas, ddof=1) / math.sqrt(n))
