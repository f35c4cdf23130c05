"""Scaling laws and paired differences from finished trials, with intervals, by numpy and scipy alone.

A run is a dict with N (parameters of blocks and head), D (training tokens), C (training FLOPs) and L (the loss, here bits per
byte). Intervals are 95 % percentile intervals of a bootstrap over residuals, seeded, so that the same runs give the same numbers.
"""

import math

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
        if t.state == "done"
        and t.value is not None
        and math.isfinite(t.value)
        and "scaling_params" in t.facts
    ]


def interval(draws, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of finite draws, (nan, nan) where fewer than half of them are."""
    draws = np.asarray(draws, float)
    good = draws[np.isfinite(draws)]
    if len(good) * 2 < max(len(draws), 1):
        return math.nan, math.nan
    return tuple(float(x) for x in np.quantile(good, [(1 - level) / 2, (1 + level) / 2]))


# ---- approach 2: a parabola per budget, power laws through their minima ----------------------------------------------------


def parabola(N, L) -> dict:
    """Least squares L = a + b (ln N - m)^2: {"N", "L", "coefficients" of ln N, "inside"}, N nan where it has no minimum
    anywhere near.

    inside: whether the minimum lies between the smallest and the largest N, where it is measured rather than guessed.
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


def isoflop(runs, draws: int = DRAWS, seed: int = 0) -> dict:
    """Parabolas per budget and the power laws through them: how the best size and the best number of tokens grow with compute.

    {"budgets": [{C, N, D, L, inside, coefficients, N_interval, runs}], "N_opt": {k, p, p_interval}, "D_opt": …, "L_opt": …}. D at a
    minimum comes from a power law of D in N through that budget's runs (at fixed C it nearly is one). Budgets with fewer than four
    sizes are left out. N_opt and D_opt use the budgets whose minimum lies inside the sizes trained, and say how many those are.
    """
    rng = np.random.default_rng(seed)
    rows, spreads = [], []
    for C, members in budgets(runs).items():
        N, D, L = (np.array([m[k] for m in members], float) for k in "NDL")
        if len(set(N)) < 4:
            continue
        fit = parabola(N, L)
        tokens = power_law(N, D)
        predicted = np.polyval(fit["coefficients"], np.log(N))
        residual = (L - predicted) * math.sqrt(len(N) / (len(N) - 3))
        residual = residual - residual.mean()
        again = [parabola(N, predicted + rng.choice(residual, len(N))) for _ in range(draws)]
        at = lambda n: tokens[0] * n ** tokens[1]
        rows.append(
            dict(
                C=float(np.mean([m["C"] for m in members])),
                target=C,
                N=fit["N"],
                D=at(fit["N"]),
                L=fit["L"],
                inside=fit["inside"],
                coefficients=fit["coefficients"],
                N_interval=interval([a["N"] for a in again]),
                D_interval=interval([at(a["N"]) for a in again]),
                L_interval=interval([a["L"] for a in again]),
                runs=members,
            )
        )
        spreads.append([(a["N"], at(a["N"]), a["L"]) for a in again])
    if not rows:
        raise UserError(
            "a parabola takes four sizes at one budget: none has so many finished runs yet"
        )
    used = [i for i, r in enumerate(rows) if r["inside"]]
    result = dict(budgets=rows, used=len(used))
    for j, name in enumerate(("N", "D", "L")):
        C = [rows[i]["C"] for i in used]
        k, p = power_law(C, [rows[i][name] for i in used])
        powers = [power_law(C, [spreads[i][d][j] for i in used])[1] for d in range(draws)]
        result[f"{name}_opt"] = dict(k=k, p=p, p_interval=interval(powers))
    return result


# ---- approach 3: L(N, D) = E + A / N^alpha + B / D^beta --------------------------------------------------------------------


def _huber(r, delta):
    small = np.abs(r) <= delta
    return np.where(small, 0.5 * r * r, delta * (np.abs(r) - 0.5 * delta)), np.where(
        small, r, delta * np.sign(r)
    )


def _objective(theta, n, d, l, delta):
    """Huber loss of log L and its gradient; theta = (log E, log A, alpha, log B, beta), n and d being logs around their means."""
    terms = np.stack([np.full_like(n, theta[0]), theta[1] - theta[2] * n, theta[3] - theta[4] * d])
    top = terms.max(axis=0)
    weights = np.exp(terms - top)
    total = weights.sum(axis=0)
    loss, slope = _huber(top + np.log(total) - l, delta)
    share = weights / total
    grad = np.array(
        [
            (slope * share[0]).sum(),
            (slope * share[1]).sum(),
            -(slope * share[1] * n).sum(),
            (slope * share[2]).sum(),
            -(slope * share[2] * d).sum(),
        ]
    )
    return loss.sum() / delta, grad / delta


def _minimise(theta, n, d, l, delta):
    from scipy.optimize import minimize

    limits = [(-12, 6), (-12, 6), (0.0, 3.0), (-12, 6), (0.0, 3.0)]
    return minimize(
        _objective,
        theta,
        (n, d, l, delta),
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
    """Fit of L = E + A/N^alpha + B/D^beta by Huber loss on logs, L-BFGS from a grid of starts (arXiv:2203.15556, appendix D.3).

    {"E", "A", "alpha", "B", "beta", "a" = beta/(alpha+beta), the power of compute in the best N, "error" (root mean square of the
    relative error), "intervals": {name: (low, high)}}. The objective is divided by delta, so that L-BFGS's own tolerances bite late.
    Raises UserError below six runs.
    """
    if len({(r["N"], r["D"]) for r in runs}) < 6:
        raise UserError(
            f"five constants cannot be fitted to {len(runs)} run(s): six or more with different N and D are needed"
        )
    n, d, l = (np.log(np.array([r[k] for r in runs], float)) for k in "NDL")
    at_n, at_d = n.mean(), d.mean()
    n, d = n - at_n, d - at_d
    starts = [
        (l.min() + e, l.min() - 1, alpha, l.min() - 1, beta)
        for e in (-2.0, -0.7, -0.1)
        for alpha in (0.2, 0.6)
        for beta in (0.2, 0.6)
    ]
    best = min((_minimise(np.array(s), n, d, l, delta) for s in starts), key=lambda r: r.fun)

    def constants(theta):
        alpha, beta = theta[2], theta[4]
        E, A, B = (
            math.exp(theta[0]),
            math.exp(theta[1] + alpha * at_n),
            math.exp(theta[3] + beta * at_d),
        )
        return dict(
            E=E,
            A=A,
            alpha=float(alpha),
            B=B,
            beta=float(beta),
            a=float(beta / (alpha + beta)) if alpha + beta else math.nan,
        )

    fit = constants(best.x)
    expected = np.log(predict(fit, np.exp(n + at_n), np.exp(d + at_d)))
    residual, rng = l - expected, np.random.default_rng(seed)
    wide = residual * math.sqrt(len(l) / max(len(l) - 5, 1))
    again = [
        constants(_minimise(best.x, n, d, expected + rng.choice(wide, len(l)), delta).x)
        for _ in range(draws)
    ]
    return fit | dict(
        error=float(np.sqrt(np.mean(np.expm1(residual) ** 2))),
        intervals={k: interval([a[k] for a in again]) for k in fit},
        draws=again,
    )


def frontier(fit: dict, C) -> tuple:
    """(N, D, L) of the best split of C FLOPs by a parametric fit, with C = 6 N D."""
    C = np.asarray(C, float)
    G = (fit["alpha"] * fit["A"] / (fit["beta"] * fit["B"])) ** (1 / (fit["alpha"] + fit["beta"]))
    N = G * (C / 6) ** fit["a"]
    return N, C / 6 / N, predict(fit, N, C / 6 / N)


# ---- one series: L = E + k C^-p ----------------------------------------------------------------------------------------------


def series(runs, draws: int = DRAWS, seed: int = 0) -> dict:
    """Fit of L = E + k C^-p (E not below 0) to runs of growing compute, by least squares on logs: {"E", "k", "p", "intervals"}.

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
        best = None
        for p in np.geomspace(0.02, 2, 120):
            basis = np.stack([np.ones_like(x), x**-p], axis=1)
            (E, k), _ = nnls(basis / L[:, None], np.ones_like(L))
            miss = float(np.sum(np.log(np.maximum(basis @ [E, k], 1e-12) / L) ** 2))
            best = min(best or (math.inf,), (miss, E, k * C.min() ** p, p))
        return dict(E=float(best[1]), k=float(best[2]), p=float(best[3]))

    found, rng = fit(L), np.random.default_rng(seed)
    expected = found["E"] + found["k"] * C ** -found["p"]
    residual = np.log(L / expected) * math.sqrt(len(L) / max(len(L) - 3, 1))
    again = [fit(expected * np.exp(rng.choice(residual, len(L)))) for _ in range(draws // 4)]
    return found | dict(intervals={k: interval([a[k] for a in again]) for k in found}, draws=again)


# ---- did it know? --------------------------------------------------------------------------------------------------------------


def held_out(runs, draws: int = 100) -> list[dict]:
    """Predicted against actual for the largest budget, by fits that saw only the smaller ones.

    With several sizes per budget (isoflop) by the parametric fit, else (miniseries) by `series`. Rows: N, D, C, actual, predicted,
    low, high (of the prediction, constants' uncertainty only), error (relative). [] when what is left is too little to fit.
    """
    groups = budgets(runs)
    many = any(len({r["N"] for r in g}) > 1 for g in groups.values())
    if not many:
        groups = {}
        for r in runs:
            groups.setdefault(r["N"], []).append(r)
        groups = dict(sorted(groups.items()))
    if len(groups) < 2:
        return []
    *rest, last = groups.values()
    rest = [r for g in rest for r in g]
    try:
        fit = parametric(rest, draws=draws) if many else series(rest, draws=4 * draws)
    except UserError:
        return []
    value = (
        (lambda f, r: float(predict(f, r["N"], r["D"])))
        if many
        else (lambda f, r: float(f["E"] + f["k"] * r["C"] ** -f["p"]))
    )
    rows = []
    for r in last:
        low, high = interval([value(f, r) for f in fit["draws"]])
        rows.append(
            dict(
                N=float(r["N"]),
                D=float(r["D"]),
                C=float(r["C"]),
                actual=r["L"],
                predicted=value(fit, r),
                low=low,
                high=high,
                error=value(fit, r) / r["L"] - 1,
            )
        )
    return rows


# ---- ablations -------------------------------------------------------------------------------------------------------------------


def paired(trials, by: str = "without", base="", over: str = "seed") -> list[dict]:
    """What leaving out each part costs: the difference to the whole model with the same seed, averaged over seeds.

    Rows sorted by the difference: part, delta, low, high (Student's t over the pairs), pairs, mean (of the metric), steps, seconds.
    The interval is nan with a single pair. Ten parts at 95 % mean that one in two such tables has an interval that misses.
    """
    from scipy.stats import t as student

    done = [
        t
        for t in trials
        if t.state == "done"
        and t.value is not None
        and math.isfinite(t.value)
        and by in t.assignment
    ]
    baseline = {t.assignment.get(over): t for t in done if t.assignment[by] == base}
    rows = []
    for part in dict.fromkeys(t.assignment[by] for t in done):
        members = [t for t in done if t.assignment[by] == part]
        deltas = [
            t.value - baseline[s].value
            for t in members
            if (s := t.assignment.get(over)) in baseline
        ]
        if part == base or not deltas:
            if part != base:
                continue
            deltas = [0.0]
        n, mean = len(deltas), float(np.mean(deltas))
        half = (
            float(student.ppf((1 + LEVEL) / 2, n - 1) * np.std(deltas, ddof=1) / math.sqrt(n))
            if n > 1
            else math.nan
        )
        if part == base:
            half = 0.0
        rows.append(
            dict(
                part=part,
                delta=mean,
                low=mean - half,
                high=mean + half,
                pairs=n if part != base else len(members),
                mean=float(np.mean([t.value for t in members])),
                steps=members[0].facts.get("steps"),
                seconds=float(np.mean([t.facts.get("seconds", math.nan) for t in members])),
            )
        )
    return sorted(rows, key=lambda r: (r["part"] != base, r["delta"]))
