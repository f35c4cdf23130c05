"""What a sweep searches: wandb's schema checked in full, assignments drawn from it, and Configs made of them.

A sweep is a plain dict with the keys of a wandb sweep YAML: method (bayes, random, grid), metric {name, goal}, parameters
{name: {value | values | min, max, distribution …}}, early_terminate {type: hyperband, …}, run_cap, name, description.
A parameter is a field of Config, an argument of Config.from_depth (DIALS), "without" (a key of PARTS), or one of SETTINGS.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np

from lib.config import Config
from lib.files import UserError, choose

METHODS = ("bayes", "random", "grid")
KEYS = (
    "method",
    "metric",
    "parameters",
    "early_terminate",
    "run_cap",
    "name",
    "description",
    "project",
    "entity",
)
DIALS = {"depth": int, "aspect_ratio": int, "target_flops": float}  # arguments of Config.from_depth
# all but the Config
SETTINGS = {
    "source": str,
    "packing": str,
    "shards": int,
    "eval_bytes": int,
    "evals": int,
    "tokenizer": str,
}
FIELDS = {f.name: f.type for f in dataclasses.fields(Config)} | DIALS
# what `without` switches off
PARTS = {
    "": {},
    "value_embeds": dict(value_embeds=False),
    "smear": dict(smear=False),
    "backout": dict(backout=False),
    "x0_scales": dict(x0_scales=False),
    "resid_scales": dict(resid_scales=False),
    "qk_norm": dict(qk_norm=False),
    "softcap": dict(softcap=0.0),
    "windows": dict(window_pattern="L"),
    "muon": dict(optimizer="adamw"),
}
METRICS = ("val_bpb", "val_loss", "loss")
# by min and max
BOUNDED = (
    "int_uniform",
    "uniform",
    "q_uniform",
    "log_uniform",
    "log_uniform_values",
    "q_log_uniform_values",
)
NORMAL = ("normal", "log_normal")  # by mu and sigma


# ---- reading and checking ----------------------------------------------------------------------------------------------


def load(source) -> dict:
    """A checked sweep from a dict or the path of a YAML or JSON file."""
    if isinstance(source, dict):
        return check(source)
    import yaml

    try:
        return check(yaml.safe_load(Path(source).read_text()))
    except OSError as e:
        raise UserError(
            f"cannot read the sweep {source} ({e.strerror}): give a preset's name or the path of a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(
            f"{source} is not YAML ({str(e).splitlines()[0]}): see README.md for a sweep to start from"
        ) from None


def check(spec: dict) -> dict:
    """A copy of `spec` with defaults filled in, or a UserError naming the entry that is wrong."""
    if not isinstance(spec, dict):
        raise UserError(
            f"a sweep is a mapping with method, metric and parameters, not {spec!r:.60}"
        )
    try:
        spec = _numbers(json.loads(json.dumps(spec)))  # a copy of plain types
    except TypeError as e:
        raise UserError(f"a sweep holds numbers, texts, lists and mappings only ({e})") from None
    for name in spec:
        choose("entry of a sweep", name, KEYS)
    choose("sweep method", spec.setdefault("method", "random"), METHODS)
    metric = spec.setdefault("metric", {"name": "val_bpb"})
    if (
        not isinstance(metric, dict)
        or not isinstance(metric.get("name"), str)
        or set(metric) - {"name", "goal", "target"}
    ):
        raise UserError(
            f"a sweep's metric is like {{name: val_bpb, goal: minimize}}, not {metric!r}"
        )
    choose("metric", metric["name"], METRICS)
    choose("goal of the metric", metric.setdefault("goal", "minimize"), ("minimize", "maximize"))
    if not isinstance(spec.get("parameters"), dict) or not spec["parameters"]:
        raise UserError(
            "a sweep needs parameters, like {matrix_lr: {min: 0.01, max: 0.5, distribution: log_uniform_values}}"
        )
    spec["parameters"] = {
        name: _parameter(name, entry, spec["method"]) for name, entry in spec["parameters"].items()
    }
    cap = spec.get("run_cap")
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 1):
        raise UserError(f"run_cap={cap!r} must be a whole number of trials, 1 or more")
    if "early_terminate" in spec:
        rungs(spec)
    return spec


def _numbers(x):
    """`x` with texts like 1e-4 made numbers: YAML 1.1 takes them for texts unless they have a point."""
    if isinstance(x, dict):
        return {k: _numbers(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_numbers(v) for v in x]
    return (
        float(x)
        if isinstance(x, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", x)
        else x
    )


def _parameter(name: str, entry, method: str) -> dict:
    kind = choose("sweep parameter", name, FIELDS | SETTINGS | {"without": str})
    bad = lambda why: UserError(f"sweep parameter {name}: {why}")
    if not isinstance(entry, dict):
        raise bad(f"write {{value: {entry!r}}} for a constant, or values, or min and max")
    entry = dict(entry)
    number = lambda k: (
        isinstance(entry.get(k), int | float)
        and not isinstance(entry[k], bool)
        and math.isfinite(entry[k])
    )
    if "value" in entry:
        entry = (
            {"value": entry["value"]}
            if set(entry) <= {"value", "distribution"}
            else bad_keys(bad, entry, "value")
        )
        _typed(name, entry["value"], kind)
        return entry
    if "values" in entry:
        if set(entry) - {"values", "probabilities", "distribution"}:
            bad_keys(bad, entry, "values")
        if not isinstance(entry["values"], list) or not entry["values"]:
            raise bad("values must be a list with at least one entry")
        for value in entry["values"]:
            _typed(name, value, kind)
        if len({json.dumps(v) for v in entry["values"]}) < len(entry["values"]):
            raise bad(f"values has an entry twice: {entry['values']}")
        if "probabilities" in entry:
            p = entry["probabilities"]
            if (
                not isinstance(p, list)
                or len(p) != len(entry["values"])
                or any(not isinstance(x, int | float) or x < 0 for x in p)
                or abs(sum(p) - 1) > 1e-6
            ):
                raise bad("probabilities must be as many as values, none negative, adding up to 1")
        return {k: entry[k] for k in ("values", "probabilities") if k in entry}
    if kind not in (int, float):
        raise bad(f"it is of type {kind.__name__}, so it takes value or values, not a range")
    distribution = entry.get("distribution")
    if distribution is None:
        distribution = (
            "int_uniform"
            if all(isinstance(entry.get(k), int) for k in ("min", "max"))
            else "uniform"
        )
    if distribution in NORMAL:
        wanted = {"mu", "sigma"}
        if not (number("mu") and number("sigma") and entry["sigma"] > 0):
            raise bad(f"{distribution} needs numbers mu and sigma, sigma above 0")
        if kind is int:
            raise bad(f"{distribution} draws no whole numbers: use int_uniform")
    else:
        choose("distribution", distribution, [*BOUNDED, *NORMAL])
        wanted = {"min", "max"} | ({"q"} if distribution.startswith("q_") else set())
        if not (number("min") and number("max")) or not entry["min"] < entry["max"]:
            raise bad("min and max must be numbers, min below max")
        if "values" in distribution and entry["min"] <= 0:
            raise bad(f"{distribution} needs min above 0")
        if "q" in wanted and not (number("q") and entry["q"] > 0):
            raise bad(f"{distribution} needs a step q above 0")
        if distribution == "int_uniform" and not all(
            isinstance(entry[k], int) for k in ("min", "max")
        ):
            raise bad("int_uniform needs whole numbers min and max")
        if kind is int and distribution in ("uniform", "log_uniform", "log_uniform_values"):
            raise bad(
                f"it takes whole numbers, so its distribution is int_uniform or a q_ one with a whole q, not {distribution}"
            )
        if kind is int and "q" in wanted and not float(entry["q"]).is_integer():
            raise bad(f"it takes whole numbers, so q={entry['q']} must be one")
    if set(entry) - wanted - {"distribution"}:
        bad_keys(bad, entry, distribution)
    if method == "grid" and distribution not in ("int_uniform", "q_uniform"):
        raise bad(
            f"a grid cannot walk through {distribution}: list values, or use int_uniform or q_uniform"
        )
    return {k: entry[k] for k in wanted} | {"distribution": distribution}


def bad_keys(bad, entry, what):
    raise bad(f"{sorted(entry)} do not go together with {what}")


def _typed(name, value, kind):
    """`value` as a `kind`: whole floats become ints, ints become floats; anything else of another type is a UserError."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"sweep parameter {name}: {value!r} is not of type {kind.__name__}")
    return value


# ---- assignments ---------------------------------------------------------------------------------------------------------


def constants(spec: dict) -> dict:
    """The parameters that are the same in every trial."""
    return {name: p["value"] for name, p in spec["parameters"].items() if "value" in p}


def varied(spec: dict) -> dict:
    """The entries of the parameters that differ between trials."""
    return {name: p for name, p in spec["parameters"].items() if "value" not in p}


def with_constants(spec: dict, values: dict) -> dict:
    """`spec` with constants added for the parameters that it does not have itself, so that it alone says all of a trial."""
    return spec | {
        "parameters": {
            name: {"value": v} for name, v in values.items() if name not in spec["parameters"]
        }
        | spec["parameters"]
    }


def key(assignment: dict) -> str:
    """Ten letters that name an assignment."""
    return hashlib.sha256(json.dumps(assignment, sort_keys=True).encode()).hexdigest()[:10]


def spec_id(spec: dict) -> str:
    """A short name for a sweep from all that it says: the same sweep started twice is one."""
    return f"{spec.get('name', spec['method'])}-{key(spec)[:6]}"


def _steps(p: dict) -> list:
    """All values of a parameter that has finitely many, else []."""
    if "values" in p:
        return p["values"]
    if p["distribution"] == "int_uniform":
        return list(range(p["min"], p["max"] + 1))
    if p["distribution"] == "q_uniform":
        return [
            _quantised(p["min"] + i * p["q"], p)
            for i in range(int((p["max"] - p["min"]) / p["q"] + 1e-9) + 1)
        ]
    return []


def _quantised(x, p):
    """The nearest multiple of q within bounds, without the noise of binary fractions."""
    x = round(x / p["q"]) * p["q"]
    x = min(
        max(x, math.ceil(p["min"] / p["q"] - 1e-9) * p["q"]),
        math.floor(p["max"] / p["q"] + 1e-9) * p["q"],
    )
    x = float(f"{x:.12g}")
    return int(x) if x.is_integer() and float(p["q"]).is_integer() else x


def size(spec: dict) -> float:
    """How many different assignments there are; inf with a continuous parameter."""
    counts = [len(_steps(p)) for p in varied(spec).values()]
    return math.prod(counts) if all(counts) else math.inf


def grid(spec: dict) -> list[dict]:
    """All assignments (varied parameters only) of a finite sweep, the last parameter changing fastest."""
    names = list(varied(spec))
    return [
        dict(zip(names, row))
        for row in itertools.product(*(_steps(p) for p in varied(spec).values()))
    ]


def limit(spec: dict) -> float:
    """How many trials the sweep has at most: its run_cap, its size, or inf."""
    return min(spec.get("run_cap") or math.inf, size(spec))


def draw(p: dict, rng):
    """One value of a varied parameter."""
    if "values" in p:
        return p["values"][rng.choice(len(p["values"]), p=p.get("probabilities"))]
    kind = p["distribution"]
    if kind == "normal":
        return float(rng.normal(p["mu"], p["sigma"]))
    if kind == "log_normal":
        return float(rng.lognormal(p["mu"], p["sigma"]))
    if kind == "int_uniform":
        return int(rng.integers(p["min"], p["max"] + 1))
    low, high = (
        (p["min"], p["max"]) if "values" not in kind else (math.log(p["min"]), math.log(p["max"]))
    )
    x = float(rng.uniform(low, high))
    x = math.exp(x) if "log" in kind else x  # log_uniform gives its bounds as natural logarithms
    return _quantised(x, p) if kind.startswith("q_") else x


def _optuna(p: dict):
    """Optuna's distribution for a varied parameter, or None for what it has no name for (those are drawn at random)."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if "values" in p:
        return (
            CategoricalDistribution([json.dumps(v) for v in p["values"]])
            if "probabilities" not in p
            else None
        )
    kind = p["distribution"]
    if kind in NORMAL:
        return None
    if kind == "int_uniform":
        return IntDistribution(p["min"], p["max"])
    low, high = (
        (math.exp(p["min"]), math.exp(p["max"])) if kind == "log_uniform" else (p["min"], p["max"])
    )
    return FloatDistribution(low, high, log="log" in kind)


def _study(spec: dict, trials, seed: int = 0):
    """An Optuna study in memory that has seen `trials` (of lib.sweeps.journal)."""
    try:
        import optuna
    except ImportError:
        raise UserError(
            "a bayes sweep needs a package: pip install optuna, or use method: random"
        ) from None
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = {name: d for name, p in varied(spec).items() if (d := _optuna(p))}
    study = optuna.create_study(
        direction=spec["metric"]["goal"],
        sampler=optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed),
    )
    for t in trials:
        # a trial that failed for what it is, or was pruned, tells something too; one that is being trained keeps others away
        state = {
            "done": TrialState.COMPLETE,
            "pruned": TrialState.PRUNED,
            "failed": TrialState.FAIL,
        }.get(t.state, TrialState.RUNNING)
        if state == TrialState.PRUNED and not t.reports:
            state = TrialState.FAIL
        values = {
            name: json.dumps(t.assignment[name]) if hasattr(d, "choices") else t.assignment[name]
            for name, d in space.items()
        }
        study.add_trial(
            create_trial(
                state=state,
                params=values,
                distributions=space,
                value=t.value if state == TrialState.COMPLETE else None,
                intermediate_values={n: v for n, v in enumerate(t.reports.values(), 1)},
            )
        )
    return study, space


def ask(spec: dict, trials, seed: int) -> dict | None:
    """An assignment (varied parameters only) that none of `trials` has, or None when there is no further one.

    grid: the next in order. random: independent draws. bayes: Optuna's tree-structured Parzen estimator (wandb's own server
    uses a Gaussian process), told also of what is being trained right now. seed makes the draw.
    """
    known = {key(t.assignment) for t in trials}
    if spec["method"] == "grid":
        return next((a for a in grid(spec) if key(a) not in known), None)
    rng = np.random.default_rng([seed, len(trials)])
    told = _study(spec, trials, int(rng.integers(2**31))) if spec["method"] == "bayes" else None
    for attempt in range(20):
        assignment = {name: draw(p, rng) for name, p in varied(spec).items()}
        if told and attempt < 3:
            study, space = told
            found = study.ask(space).params
            for name, d in space.items():
                p = spec["parameters"][name]
                value = json.loads(found[name]) if hasattr(d, "choices") else found[name]
                assignment[name] = (
                    _quantised(value, p) if p.get("distribution", "").startswith("q_") else value
                )
        if key(assignment) not in known:
            return assignment
    if size(spec) < math.inf:  # nearly all were tried: draw from what is left
        left = [a for a in grid(spec) if key(a) not in known]
        return left[rng.integers(len(left))] if left else None
    raise UserError(
        "the sweep found no new assignment in twenty draws: its ranges are too narrow, widen them or set run_cap"
    )


def importance(spec: dict, trials) -> dict:
    """{parameter: share of what decides whether a trial is among the better half}, by PED-ANOVA (arXiv:2304.10255); {} when
    fewer than four trials with different results are there, nothing varies, or Optuna is not installed."""
    import importlib.util

    done = [
        t for t in trials if t.state == "done" and t.value is not None and math.isfinite(t.value)
    ]
    if (
        len(done) < 4
        or len({t.value for t in done}) < 2
        or not varied(spec)
        or not importlib.util.find_spec("optuna")
    ):
        return {}
    study, space = _study(spec, done)
    import optuna

    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
    alone = [name for name, d in space.items() if not d.single()]
    return (
        dict(optuna.importance.get_param_importances(study, evaluator=evaluator, params=alone))
        if alone
        else {}
    )


def config_of(assignment: dict) -> Config:
    """The Config of a whole assignment (constants and varied parameters). UserError for an impossible one, before any compute."""
    fields = {
        name: _typed(name, v, choose("sweep parameter", name, FIELDS | SETTINGS | {"without": str}))
        for name, v in assignment.items()
        if name not in SETTINGS
    }
    fields |= choose("part to leave out", fields.pop("without", ""), PARTS)
    if "depth" not in fields:
        raise UserError(
            "a trial needs a depth: give it as a parameter, a constant or through a preset"
        )
    return Config.from_depth(**fields)


# ---- hyperband -------------------------------------------------------------------------------------------------------------


def rungs(spec: dict) -> list[int]:
    """After how many validations hyperband looks at a trial, as wandb reads early_terminate; [] without it."""
    entry = spec.get("early_terminate")
    if entry is None:
        return []
    if not isinstance(entry, dict) or entry.get("type") != "hyperband":
        raise UserError(
            f"early_terminate must be of type hyperband, with min_iter, or max_iter and s; got {entry!r}"
        )
    for name, value in entry.items():
        if name not in ("type", "strict"):
            choose("entry of early_terminate", name, ("min_iter", "max_iter", "s", "eta"))
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or value < (2 if name == "eta" else 1)
            ):
                raise UserError(
                    f"early_terminate {name}={value!r} must be a number of at least {2 if name == 'eta' else 1}"
                )
    eta = entry.get("eta", 3)
    if "min_iter" in entry:
        found = [int(entry["min_iter"] * eta**k) for k in range(30)]
    elif "max_iter" in entry and "s" in entry:
        found = [int(entry["max_iter"] / eta**k) for k in range(1, int(entry["s"]) + 1)]
    else:
        raise UserError("early_terminate needs min_iter, or max_iter together with s")
    return sorted({n for n in found if 1 <= n < 10**6})


def should_stop(spec: dict, trials, trial) -> bool:
    """Whether hyperband ends `trial` now: at its latest rung its best value so far is not among the best 1/eta there.

    Asynchronous: a trial is compared with those that have come as far, finished or not, and the first to come goes on.
    """
    reached = [r for r in rungs(spec) if r <= len(trial.reports)]
    if not reached:
        return False
    sign = 1 if spec["metric"]["goal"] == "minimize" else -1
    best = lambda t: min(
        sign * v if math.isfinite(v) else math.inf for v in list(t.reports.values())[: reached[-1]]
    )
    there = sorted(best(t) for t in trials if len(t.reports) >= reached[-1])
    place = max(1, int(len(there) / spec["early_terminate"].get("eta", 3)))
    return len(there) > 1 and best(trial) > there[place - 1]
