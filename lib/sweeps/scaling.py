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
from lib.sweeps.space import key

# of the bootstrap
DRAWS = 400
# of all intervals
LEVEL = 0.95


def runs_of(trials) -> list[dict]:
    """The finished trials as runs, their assignment and number with them."""
    runs = []
    for t in trials:
        if not t.scored or "scaling_params" not in t.facts:
            continue
        run = dict(
            t.assignment,
            N=t.facts["scaling_params"],
            D=t.facts["tokens"],
            C=t.facts["flops"],
            L=t.value,
            number=t.number,
        )
        runs.append(run)
    return runs


def best_of_each(runs: list[dict]) -> list[dict]:
    """Of runs of one size, budget and seed the one with the lowest loss: a law is about what can be
    reached, not about the rates that a sweep tried on the way.
    """
    best: dict[tuple, dict] = {}
    for run in runs:
        budget = run.get("target_flops", run["D"])
        alike = (run["N"], budget, run.get("seed"))
        if alike not in best or run["L"] < best[alike]["L"]:
            best[alike] = run
    return list(best.values())


def interval(draws, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of finite draws, (nan, nan) where fewer than half of them are."""
    draws = np.asarray(draws, float)
    good = draws[np.isfinite(draws)]

    # an interval of the few fits that worked would look surer than it is
    if len(good) * 2 < max(len(draws), 1):
        return math.nan, math.nan
    tail = (1 - level) / 2
    low, high = np.quantile(good, [tail, (1 + level) / 2])
    return float(low), float(high)


# ---- approach 2: a parabola per budget, power laws through their minima --------------------------


def parabola(N, L) -> dict:
    """Least squares L = a + b (ln N - m)^2: {"N", "L", "coefficients" of ln N, "inside"}, N nan
    where it has no minimum anywhere near.

    inside: whether the minimum lies between the smallest and the largest N, where it is measured
    rather than guessed.
    """
    x = np.log(np.asarray(N, float))
    coefficients = tuple(np.polyfit(x, np.asarray(L, float), 2))
    a2, a1, a0 = coefficients
    nowhere = dict(N=math.nan, L=math.nan, coefficients=coefficients, inside=False)

    # it opens downwards, or is a straight line
    if a2 <= 0:
        return nowhere
    # a thousand times beyond what was tried: as good as none
    lowest = -a1 / (2 * a2)
    first, last = x.min(), x.max()
    if not first - 7 < lowest < last + 7:
        return nowhere

    return dict(
        N=float(np.exp(lowest)),
        L=float(a0 - a1**2 / (4 * a2)),
        coefficients=coefficients,
        inside=bool(first <= lowest <= last),
    )


def power_law(x, y) -> tuple[float, float]:
    """(k, p) of y = k x^p by least squares on logs; (nan, nan) below two points."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good], y[good]
    if len(set(x)) < 2:
        return math.nan, math.nan

    # on logs the law is a straight line: ln y = ln k + p ln x
    p, log_k = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(log_k)), float(p)


def budgets(runs) -> dict:
    """{nominal FLOPs: runs}: by target_flops where the sweep had it, ascending."""
    groups = {}
    for run in runs:
        nominal = run.get("target_flops", run["C"])
        groups.setdefault(nominal, []).append(run)
    return dict(sorted(groups.items()))


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
    # a parabola through each budget's runs
    rng = np.random.default_rng(seed)
    fitted = []
    for C, members in budgets(runs).items():
        sizes = {run["N"] for run in members}
        if len(sizes) >= 4:
            fitted.append(_fit_budget(C, members, draws, rng))
    if not fitted:
        raise UserError(
            "a parabola takes four sizes at one budget: none has so many finished runs yet"
        )

    # laws through the minima that were measured, not guessed
    used = [(budget, spread) for budget, spread in fitted if budget.inside]
    all_budgets = [budget for budget, _ in fitted]
    result: dict[str, Any] = dict(budgets=all_budgets, used=len(used))
    C = [budget.C for budget, _ in used]
    for j, name in enumerate("NDL"):
        k, p = power_law(C, [getattr(budget, name) for budget, _ in used])

        # the same law through the minima of every bootstrap draw
        powers = []
        for draw in range(draws):
            minima = [spread[draw][j] for _, spread in used]
            _, power = power_law(C, minima)
            powers.append(power)
        result[f"{name}_opt"] = dict(k=k, p=p, p_interval=interval(powers))
    return result


def _fit_budget(target: float, members: list[dict], draws: int, rng) -> tuple[Budget, list]:
    """(Budget, [(N, D, L) of each bootstrap draw]) of the runs at one budget."""
    N, D, L = (_column(members, name) for name in "NDL")
    fit = parabola(N, L)
    scale, power = power_law(N, D)

    # the residuals are drawn anew, widened by what three coefficients have taken from them
    predicted = np.polyval(fit["coefficients"], np.log(N))
    widened = math.sqrt(len(N) / (len(N) - 3))
    residual = (L - predicted) * widened
    residual = residual - residual.mean()

    # each draw's parabola says how sure the minimum is
    spread = []
    for _ in range(draws):
        resampled = parabola(N, predicted + rng.choice(residual, len(N)))
        tokens = scale * resampled["N"] ** power
        spread.append((resampled["N"], tokens, resampled["L"]))
    intervals = [interval(values) for values in zip(*spread)]

    budget = Budget(
        C=float(np.mean(_column(members, "C"))),
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


def _column(runs: list[dict], name: str) -> np.ndarray:
    """One number of every run."""
    return np.array([run[name] for run in runs], float)


# ---- approach 3: L(N, D) = E + A / N^alpha + B / D^beta ------------------------------------------


def _huber(r, delta):
    """(Huber loss of residuals, its slope): squares within delta, straight lines beyond."""
    size = np.abs(r)
    small = size <= delta
    square = 0.5 * r * r
    straight = delta * (size - 0.5 * delta)
    loss = np.where(small, square, straight)
    slope = np.where(small, r, delta * np.sign(r))
    return loss, slope


def _objective(theta, n, d, logs, delta):
    """Huber loss of log L and its gradient.

    theta = (log E, log A, alpha, log B, beta); n and d are logs around their means.
    """
    log_E, log_A, alpha, log_B, beta = theta

    # log L is the log-sum-exp of the law's three terms
    constant = np.full_like(n, log_E)
    of_size = log_A - alpha * n
    of_tokens = log_B - beta * d
    terms = np.stack([constant, of_size, of_tokens])
    top = terms.max(axis=0)
    weights = np.exp(terms - top)
    total = weights.sum(axis=0)
    predicted = top + np.log(total)
    loss, slope = _huber(predicted - logs, delta)

    # each term's share of the sum is the slope of its logarithm
    of_E, of_A, of_B = slope * weights / total
    gradient = [
        of_E.sum(),
        of_A.sum(),
        -(of_A * n).sum(),
        of_B.sum(),
        -(of_B * d).sum(),
    ]
    return loss.sum() / delta, np.array(gradient) / delta


def _minimise(theta, n, d, logs, delta):
    """scipy's result of minimising `_objective` from a start, within bounds."""
    from scipy.optimize import minimize

    log_constant, exponent = (-12, 6), (0.0, 3.0)
    return minimize(
        _objective,
        theta,
        (n, d, logs, delta),
        jac=True,
        method="L-BFGS-B",
        bounds=[log_constant, log_constant, exponent, log_constant, exponent],
        options=dict(maxiter=500, maxcor=20, ftol=1e-12, gtol=1e-7),
    )


def predict(fit: dict, N, D):
    """The loss that a parametric fit expects of N parameters and D tokens."""
    N, D = np.asarray(N, float), np.asarray(D, float)
    of_size = fit["A"] / N ** fit["alpha"]
    of_tokens = fit["B"] / D ** fit["beta"]
    return fit["E"] + of_size + of_tokens


def parametric(runs, delta: float = 1e-3, draws: int = 100, seed: int = 0) -> dict:
    """Fit of L = E + A/N^alpha + B/D^beta by Huber loss on logs, L-BFGS from a grid of starts
    (arXiv:2203.15556, appendix D.3).

    {"E", "A", "alpha", "B", "beta", "a" = beta/(alpha+beta), the power of compute in the best N,
    "error" (root mean square of the relative error), "intervals": {name: (low, high)}}. The
    objective is divided by delta, so that L-BFGS's own tolerances bite late. Raises UserError below
    six runs.
    """
    different = {(run["N"], run["D"]) for run in runs}
    if len(different) < 6:
        raise UserError(
            f"five constants cannot be fitted to {len(runs)} run(s): "
            "six or more with different N and D are needed"
        )

    with _one_thread():
        return _fitted(runs, delta, draws, seed)


def _one_thread():
    """Within it scipy's BLAS computes in one thread. For five constants a second one costs seven
    times the time, waiting.
    """
    # only what is loaded already can be limited
    import scipy.optimize  # noqa: F401
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


def _fitted(runs, delta: float, draws: int, seed: int) -> dict:
    """What `parametric` returns."""
    # logs around their means, so that a constant and its exponent pull less on each other
    n, d, logs = (np.log(_column(runs, name)) for name in "NDL")
    at_n, at_d = n.mean(), d.mean()
    n, d = n - at_n, d - at_d

    # the objective has several valleys: the lowest of those reached from all starts is the fit
    starts = map(np.array, _starts(logs.min()))
    tried = [_minimise(start, n, d, logs, delta) for start in starts]
    best = min(tried, key=lambda result: result.fun)
    fit = _constants(best.x, at_n, at_d)

    # how sure the constants are: fits to residuals drawn anew, from the best fit on
    N, D = np.exp(n + at_n), np.exp(d + at_d)
    expected = np.log(predict(fit, N, D))
    residual = logs - expected
    widened = residual * math.sqrt(len(logs) / max(len(logs) - 5, 1))
    rng = np.random.default_rng(seed)
    again = []
    for _ in range(draws):
        resampled = expected + rng.choice(widened, len(logs))
        refitted = _minimise(best.x, n, d, resampled, delta)
        again.append(_constants(refitted.x, at_n, at_d))

    relative_error = np.expm1(residual)
    return fit | dict(
        error=float(np.sqrt(np.mean(relative_error**2))),
        intervals=_intervals(fit, again),
        draws=again,
    )


def _starts(least: float) -> list[tuple]:
    """Where the parametric fit begins: constants below the smallest log loss, exponents as seen
    in practice.
    """
    below, exponents = (-2.0, -0.7, -0.1), (0.2, 0.6)
    starts = []
    for e, alpha, beta in itertools.product(below, exponents, exponents):
        starts.append((least + e, least - 1, alpha, least - 1, beta))
    return starts


def _intervals(fit: dict, draws: list[dict]) -> dict:
    """{constant: its interval} over the fits of a bootstrap."""
    return {name: interval([draw[name] for draw in draws]) for name in fit}


def _constants(theta, at_n: float, at_d: float) -> dict:
    """The law's constants from `_objective`'s, whose logs were taken around at_n and at_d."""
    log_E, log_A, alpha, log_B, beta = map(float, theta)
    return dict(
        E=math.exp(log_E),
        A=math.exp(log_A + alpha * at_n),
        alpha=alpha,
        B=math.exp(log_B + beta * at_d),
        beta=beta,
        a=beta / (alpha + beta) if alpha + beta else math.nan,
    )


def frontier(fit: dict, C) -> tuple:
    """(N, D, L) of the best split of C FLOPs by a parametric fit, with C = 6 N D."""
    C = np.asarray(C, float)
    alpha, beta = fit["alpha"], fit["beta"]

    # where a little more of N and of D help equally (arXiv:2203.15556, equation 4)
    ratio = alpha * fit["A"] / (beta * fit["B"])
    G = ratio ** (1 / (alpha + beta))
    N = G * (C / 6) ** fit["a"]
    D = C / 6 / N
    return N, D, predict(fit, N, D)


# ---- one series: L = E + k C^-p ------------------------------------------------------------------


def series(runs, draws: int = DRAWS, seed: int = 0) -> dict:
    """Fit of L = E + k C^-p (E not below 0) to runs of growing compute, by least squares on logs:
    {"E", "k", "p", "intervals"}.

    Raises UserError below four different sizes.
    """
    C, L = _column(runs, "C"), _column(runs, "L")
    sizes = len(set(C))
    if sizes < 4:
        raise UserError(
            f"three constants cannot be fitted to {sizes} size(s): four or more are needed"
        )
    fit = _fit_series(C, L)

    # how sure the constants are: fits to relative residuals drawn anew, widened by what three
    # constants have taken from them
    expected = fit["E"] + fit["k"] * C ** -fit["p"]
    widened = math.sqrt(len(L) / max(len(L) - 3, 1))
    residual = np.log(L / expected) * widened
    rng = np.random.default_rng(seed)
    again = []
    for _ in range(draws // 4):
        resampled = expected * np.exp(rng.choice(residual, len(L)))
        again.append(_fit_series(C, resampled))
    return fit | dict(intervals=_intervals(fit, again), draws=again)


def _fit_series(C, L) -> dict:
    """{"E", "k", "p"} of the best of many powers."""
    from scipy.optimize import nnls

    x = C / C.min()
    best: tuple[float, ...] = tuple([math.inf])
    for p in np.geomspace(0.02, 2, 120):
        # for one power the rest is linear, and neither constant may be negative
        basis = np.stack([np.ones_like(x), x**-p], axis=1)
        relative = basis / L[:, None]
        (E, k), _ = nnls(relative, np.ones_like(L))
        predicted = np.maximum(basis @ [E, k], 1e-12)
        miss = float(np.sum(np.log(predicted / L) ** 2))
        best = min(best, (miss, E, k * C.min() ** p, p))
    _, E, k, p = map(float, best)
    return dict(E=E, k=k, p=p)


# ---- did it know? --------------------------------------------------------------------------------


def held_out(runs, draws: int = 100) -> list[dict]:
    """Predicted against actual for the largest budget, by fits that saw only the smaller ones.

    With several sizes per budget (isoflop) by the parametric fit, else (miniseries) by `series`.
    Rows: N, D, C, actual, predicted, low, high (of the prediction, constants' uncertainty only),
    error (relative). [] when what is left is too little to fit.
    """
    # budgets with one size each are a miniseries, whose steps are its sizes
    groups = budgets(runs)
    several = any(len(_by_size(group)) > 1 for group in groups.values())
    if not several:
        groups = _by_size(runs)
    if len(groups) < 2:
        return []

    # fit all but the largest
    *smaller, largest = groups.values()
    seen = list(itertools.chain.from_iterable(smaller))
    try:
        if several:
            fit = parametric(seen, draws=draws)
        else:
            fit = series(seen, draws=4 * draws)
    except UserError:
        return []

    def expect(f: dict, run: dict) -> float:
        """The loss of a run by the fit, or by one of its draws."""
        if several:
            return float(predict(f, run["N"], run["D"]))
        return float(f["E"] + f["k"] * run["C"] ** -f["p"])

    rows = []
    for run in largest:
        predicted = expect(fit, run)
        low, high = interval([expect(draw, run) for draw in fit["draws"]])
        row = dict(
            N=float(run["N"]),
            D=float(run["D"]),
            C=float(run["C"]),
            actual=run["L"],
            predicted=predicted,
            low=low,
            high=high,
            error=predicted / run["L"] - 1,
        )
        rows.append(row)
    return rows


def _by_size(runs) -> dict:
    """{parameters: runs}, ascending."""
    groups = {}
    for run in runs:
        groups.setdefault(run["N"], []).append(run)
    return dict(sorted(groups.items()))


# ---- ablations -----------------------------------------------------------------------------------


def paired(trials, by: str = "without", base="") -> list[dict]:
    """What leaving out each part costs: the difference to the whole model of the same seed, and of
    the same size, rate and whatever else the sweep varies, averaged over these pairs.

    Rows sorted by the difference: part, delta, low, high (Student's t over the pairs), pairs, mean
    (of the metric), steps, seconds. The interval is nan with a single pair. Ten parts at 95 % mean
    that one in two such tables has an interval that misses.
    """

    def partner(t) -> str:
        """What a trial and its partner have in common."""
        return key({name: value for name, value in t.assignment.items() if name != by})

    # trials by the part that they do without, and the whole models' results
    groups, whole = {}, {}
    for t in trials:
        if not t.scored or by not in t.assignment:
            continue
        part = t.assignment[by]
        groups.setdefault(part, []).append(t)
        if part == base:
            whole[partner(t)] = t.value

    rows = []
    for part, members in groups.items():
        # only what has a partner is compared
        deltas = [t.value - whole[partner(t)] for t in members if partner(t) in whole]
        if not deltas:
            continue
        delta, half = _mean_and_half(deltas)
        # the whole model is what all others are measured from
        if part == base:
            delta, half = 0.0, 0.0

        seconds = [t.facts.get("seconds", math.nan) for t in members]
        row = dict(
            part=part,
            delta=delta,
            low=delta - half,
            high=delta + half,
            pairs=len(deltas),
            mean=float(np.mean([t.value for t in members])),
            steps=members[0].facts.get("steps"),
            seconds=float(np.mean(seconds)),
        )
        rows.append(row)
    return sorted(rows, key=lambda row: (row["part"] != base, row["delta"]))


def _mean_and_half(deltas: list[float]) -> tuple[float, float]:
    """(mean, half of its interval by Student's t); the half is nan for a single difference."""
    from scipy.stats import t as student

    n, mean = len(deltas), float(np.mean(deltas))
    if n == 1:
        return mean, math.nan
    quantile = student.ppf((1 + LEVEL) / 2, n - 1)
    spread = np.std(deltas, ddof=1)
    return mean, float(quantile * spread / math.sqrt(n))
