"""What to try next: the next of a grid, a random draw, or what a tree-structured Parzen estimator
expects most of.
"""

import importlib.util
import json
import math

import numpy as np

from lib.files import UserError
from lib.sweeps.space import LARGEST_GRID, draw, grid, key, quantised, size, varied

DRAWS = 20  # how often a random draw is tried again when all that it gave is known
SUGGESTIONS = 3  # how often of these the estimator is asked


def ask(spec: dict, trials, seed: int) -> dict | None:
    """An assignment (varied parameters only) that none of `trials` has, or None when there is no
    further one, or a trial has reached the metric's target.

    grid: the next in order. random: independent draws. bayes: Optuna's tree-structured Parzen
    estimator (wandb's own server uses a Gaussian process), told also of what is being trained right
    now. `seed` makes the draw.
    """
    if _target_is_reached(spec["metric"], trials):
        return None
    known = {key(t.assignment) for t in trials}
    if spec["method"] == "grid":
        return next((a for a in grid(spec) if key(a) not in known), None)

    # the estimator is told of all trials once
    rng = np.random.default_rng([seed, len(trials)])
    estimator = None
    if spec["method"] == "bayes":
        estimator = _study(spec, trials, int(rng.integers(2**31)))

    # it speaks first; where it insists on what is known, chance decides
    for attempt in range(DRAWS):
        assignment = {name: draw(p, rng) for name, p in varied(spec).items()}
        if estimator and attempt < SUGGESTIONS:
            assignment |= _suggested(spec, *estimator)
        if key(assignment) not in known:
            return assignment

    # nearly all were tried: draw from what is left
    if size(spec) <= LARGEST_GRID:
        left = [a for a in grid(spec) if key(a) not in known]
        return left[rng.integers(len(left))] if left else None
    raise UserError(
        "the sweep found no new assignment in twenty draws: "
        "its ranges are too narrow, widen them or set run_cap"
    )


def _target_is_reached(metric: dict, trials) -> bool:
    """Whether a finished trial is as good as the sweep asks for, behind which wandb begins none."""
    if "target" not in metric:
        return False
    sign = 1 if metric["goal"] == "minimize" else -1
    return any(sign * t.value <= sign * metric["target"] for t in trials if t.scored)


def _suggested(spec: dict, study, space: dict) -> dict:
    """The estimator's values for the parameters that it knows."""
    params = study.ask(space).params
    values = {}
    for name, distribution in space.items():
        entry, value = spec["parameters"][name], params[name]
        # listed values went in as JSON, and steps as what lies between them
        if hasattr(distribution, "choices"):
            value = json.loads(value)
        elif entry["distribution"].startswith("q_"):
            value = quantised(value, entry)
        values[name] = value
    return values


def _distribution(p: dict):
    """Optuna's distribution for a varied parameter, or None for what it has no name for (that is
    drawn at random).
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if "probabilities" in p:
        return None
    # JSON, because Optuna takes no lists as choices
    if "values" in p:
        return CategoricalDistribution([json.dumps(v) for v in p["values"]])

    kind = p["distribution"]
    if kind in ("normal", "log_normal"):
        return None
    if kind == "int_uniform":
        return IntDistribution(p["min"], p["max"])
    low, high = p["min"], p["max"]
    if kind == "log_uniform":  # its bounds are natural logarithms
        low, high = math.exp(low), math.exp(high)
    return FloatDistribution(low, high, log="log" in kind)


def _study(spec: dict, trials, seed: int = 0):
    """(Optuna study in memory that has seen `trials`, {parameter: its distribution there})."""
    try:
        import optuna
    except ImportError:
        raise UserError(
            "a bayes sweep needs a package: pip install optuna, or use method: random"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    space = {}
    for name, entry in varied(spec).items():
        distribution = _distribution(entry)
        if distribution:
            space[name] = distribution

    # constant_liar: several workers at once do not all go to the same place
    study = optuna.create_study(
        direction=spec["metric"]["goal"],
        sampler=optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed),
    )
    for trial in trials:
        study.add_trial(_as_optuna(trial, space))
    return study, space


def _as_optuna(trial, space: dict):
    """A trial as Optuna keeps it.

    One that failed for what it is, or was pruned, tells something too; one that is being trained
    keeps others away.
    """
    from optuna.trial import TrialState, create_trial

    states = {
        "done": TrialState.COMPLETE,
        "pruned": TrialState.PRUNED,
        "failed": TrialState.FAIL,
    }
    state = states.get(trial.state, TrialState.RUNNING)

    # without a number it has nothing to tell
    worthless = state == TrialState.COMPLETE and not trial.scored
    if worthless or (state == TrialState.PRUNED and not trial.reports):
        state = TrialState.FAIL

    params = {}
    for name, distribution in space.items():
        value = trial.assignment[name]
        params[name] = json.dumps(value) if hasattr(distribution, "choices") else value
    return create_trial(
        state=state,
        params=params,
        distributions=space,
        value=trial.value if state == TrialState.COMPLETE else None,
        intermediate_values=dict(enumerate(trial.reports.values(), 1)),
    )


def importance(spec: dict, trials) -> dict:
    """{parameter: share of what decides whether a trial is among the better half}, by PED-ANOVA
    (arXiv:2304.10255).

    {} when fewer than four trials with different results are there, nothing varies, or Optuna is
    not installed.
    """
    done = [t for t in trials if t.scored]
    different = len({t.value for t in done})
    enough = len(done) >= 4 and different >= 2 and varied(spec)
    if not enough or not importlib.util.find_spec("optuna"):
        return {}
    import optuna

    # a parameter with one possible value decides nothing
    study, space = _study(spec, done)
    names = [name for name, distribution in space.items() if not distribution.single()]
    if not names:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator, params=names))
