"""Scaling laws recover known constants; paired differences see through the spread of seeds."""

import itertools
import math

import numpy as np
import pytest

from lib.files import UserError
from lib.sweeps import laws, scaling, tables
from lib.sweeps.journal import Trial
from tests.helpers.sweeps import CHINCHILLA, ablation_trials, synthetic


def test_fits_recover_the_constants_that_made_the_data():
    runs = synthetic()
    fit = scaling.parametric(runs, draws=12)
    for name, true in CHINCHILLA.items():
        low, high = fit["intervals"][name]
        assert low < high and abs(math.log(fit[name] / true)) < (0.3 if name in "AB" else 0.05), (
            name
        )
    assert fit["a"] == pytest.approx(0.28 / 0.62, abs=0.02) and fit["error"] < 0.002
    off = [run["L"] / scaling.predict(fit, run["N"], run["D"]) - 1 for run in runs]
    assert fit["error"] == pytest.approx(np.sqrt(np.mean(np.square(off))))
    exact = scaling.parametric(synthetic(noise=0), draws=2)
    assert all(exact[k] == pytest.approx(v, rel=1e-3) for k, v in CHINCHILLA.items())
    law = scaling.isoflop(runs)
    assert law["used"] == 4 and all(
        b.inside and b.N_interval[0] < b.N < b.N_interval[1] for b in law["budgets"]
    )
    low, high = law["N_opt"]["p_interval"]
    assert low < law["N_opt"]["p"] < high and law["N_opt"]["p"] == pytest.approx(0.4516, abs=0.03)
    assert law["N_opt"]["p"] + law["D_opt"]["p"] == pytest.approx(1, abs=0.01)  # C = 6 N D
    N, D, L = scaling.frontier(fit, 1e20)
    assert N == pytest.approx(law["budgets"][2].N, rel=0.1) and 6 * N * D == pytest.approx(1e20)


def test_huber_fit_shrugs_off_an_outlier_and_intervals_cover():
    runs = synthetic()
    runs[5] = runs[5] | {"L": runs[5]["L"] * 1.3}
    assert scaling.parametric(runs, draws=2)["alpha"] == pytest.approx(0.34, abs=0.02)
    inside = [
        low < 0.4516 < high
        for low, high in (
            scaling.isoflop(synthetic(0.002, s), draws=40)["N_opt"]["p_interval"] for s in range(20)
        )
    ]
    assert sum(inside) >= 14, "of twenty 95 % intervals (a parabola is only nearly right)"


def test_the_largest_budget_is_predicted_from_the_smaller_and_too_little_is_said_so():
    rows = scaling.held_out(synthetic(), draws=6)
    assert len(rows) == 7 and {r["C"] for r in rows} == {3e20}
    assert all(abs(r["error"]) < 0.01 and r["low"] < r["predicted"] < r["high"] for r in rows)
    growing = [
        dict(N=n, D=12 * n, C=72 * n * n, L=0.8 + 5 * (72 * n * n) ** -0.15)
        for n in np.geomspace(1e5, 1e7, 6)
    ]
    fit = scaling.series(growing)
    assert fit["E"] == pytest.approx(0.8, abs=0.02) and fit["p"] == pytest.approx(0.15, abs=0.01)
    [last] = scaling.held_out(growing)
    assert abs(last["error"]) < 0.005
    assert last["error"] == pytest.approx(last["predicted"] / last["actual"] - 1)
    for fit in (scaling.isoflop, scaling.parametric, scaling.series):
        with pytest.raises(UserError):
            fit(growing[:3])
    for losses in ([1, 2, 2, 1], [4, 3, 2, 1 + 1e-9]):  # no minimum at all, or none within reach
        flat = scaling.parabola([1, 2, 4, 8], losses)
        assert flat["inside"] is False and math.isnan(flat["N"])
    hopeless = [r | {"L": 3 - 0.1 * math.log(r["N"])} for r in synthetic()]
    assert scaling.isoflop(hopeless, draws=20)["used"] == 0


def test_paired_differences_see_through_the_spread_of_seeds():
    rows = {r["part"]: r for r in scaling.paired(ablation_trials())}
    assert (
        rows["muon"]["delta"] == pytest.approx(0.2, abs=0.003)
        and rows["muon"]["low"] > 0.19
        and rows["muon"]["pairs"] == 3
    )
    assert rows["backout"]["low"] < 0 < rows["backout"]["high"] and rows[""]["delta"] == 0
    assert math.isnan(
        scaling.paired([t for t in ablation_trials() if t.assignment["seed"] == 1])[1]["low"]
    )


def test_pairs_have_all_else_the_same():
    """Sizes and rates that a sweep varies beside the part make no difference to what it costs."""
    trials = []
    for depth, rate, part, seed in itertools.product((4, 2), (0.1, 0.2), ("", "smear"), (1, 2)):
        assignment = dict(without=part, depth=depth, matrix_lr=rate, seed=seed)
        value = depth + 10 * rate + 0.3 * seed + (0.01 if part else 0.0)
        trials.append(Trial(str(len(trials)), len(trials), assignment, "done", value=value))
    rows = {row["part"]: row for row in scaling.paired(trials)}
    assert rows["smear"]["delta"] == pytest.approx(0.01) and rows["smear"]["pairs"] == 8
    assert rows["smear"]["low"] == pytest.approx(0.01)


def test_a_law_is_about_the_best_of_each_size():
    """Of trials that differ in a rate only the best one counts; budgets and seeds stay apart."""
    good = [run | dict(seed=seed) for run in synthetic() for seed in (1, 2)]
    bad = [run | dict(L=run["L"] + 1 / run["N"]) for run in good]
    assert scaling.best_of_each([*bad, *good]) == good
    growing = [dict(N=n, D=d, C=n * d, L=3.0) for n in (1, 2) for d in (5, 6)]
    assert scaling.best_of_each(growing) == growing


def test_a_minimum_and_students_interval_by_hand():
    N = np.array([1.0, 2.0, 4.0])
    fit = scaling.parabola(N, (np.log(N) - 1) ** 2 + 3)
    assert (fit["N"], fit["L"]) == pytest.approx((math.e, 3))
    # a spread of 1 over three pairs, whose t at 97.5 % is 4.303
    mean, half = scaling._mean_and_half([1.0, 2.0, 3.0])
    assert (mean, half) == pytest.approx((2, 4.303 / math.sqrt(3)), rel=1e-3)


def test_no_other_split_of_the_same_compute_has_a_lower_loss():
    fit = CHINCHILLA | dict(a=0.28 / 0.62)
    N, D, L = scaling.frontier(fit, 1e20)
    for factor in (0.95, 1.05):
        assert scaling.predict(fit, N * factor, D / factor) > L


def test_a_percentile_interval_by_hand():
    assert scaling.interval(range(1001)) == pytest.approx((25, 975))
    assert scaling.interval([*range(1001), math.nan]) == pytest.approx((25, 975))
    assert all(map(math.isnan, scaling.interval([1.0, math.nan, math.inf])))


def test_a_bootstrap_interval_by_hand():
    """Four sizes on a parabola, and noise that no parabola takes up: the spread is known."""
    x = np.log([1.0, 2.0, 4.0, 8.0])
    runs = [dict(N=float(np.exp(v)), D=1.0, C=1.0, L=float((v - 1.0) ** 2)) for v in x]
    [exact] = scaling.isoflop(runs, draws=50)["budgets"]
    assert exact.N_interval == pytest.approx((math.e, math.e), rel=1e-6)
    noise = 0.01 * np.array([1, -3, 3, -1])
    noisy = [run | dict(L=run["L"] + float(e)) for run, e in zip(runs, noise)]
    [wide] = scaling.isoflop(noisy, draws=2000)["budgets"]

    # the same by hand: what a parabola leaves of the noise, drawn anew
    rest = noise - np.polyval(np.polyfit(x, noise, 2), x)
    rest = 2 * (rest - rest.mean())  # four points less three coefficients
    centre = np.polyval(np.polyfit(x, [run["L"] for run in noisy], 2), x)
    rng, minima = np.random.default_rng(1), []
    for _ in range(2000):
        a2, a1, _ = np.polyfit(x, centre + rng.choice(rest, 4), 2)
        minima.append(np.exp(-a1 / (2 * a2)))
    by_hand = np.quantile(minima, [0.025, 0.975])
    assert wide.N_interval == pytest.approx(tuple(by_hand), rel=0.01)
    # residuals that were not widened would make it half as wide
    assert np.diff(wide.N_interval) == pytest.approx(np.diff(by_hand), rel=0.15)


def test_the_best_is_the_lowest_or_the_highest_as_the_goal_says():
    found = []
    for n, (value, lr, depth) in enumerate([(2.0, 0.1, 4), (1.0, 0.2, 4), (4.0, 0.3, 9)]):
        assignment = dict(lr=lr, depth=depth)
        found.append(Trial(str(n), n, assignment, "done", value=value))
    found.append(Trial("3", 3, dict(lr=0.4, depth=4), "done", value=math.nan))
    found.append(Trial("4", 4, dict(lr=0.5, depth=4), "pruned", value=0.0))

    for goal, best in dict(minimize=["1", "0", "2"], maximize=["2", "0", "1"]).items():
        assert tables.best_of(found, goal).id == best[0]
        lines = tables.leaders(found, goal).splitlines()[1:]
        assert [line.split()[0] for line in lines] == best
    # the best pair that differs in the rate alone
    assert laws.single_change(found)[:2] == (found[1], found[0])
    assert laws.single_change(found, "maximize")[:2] == (found[0], found[1])
    assert laws.single_change(found)[2] == "lr"
