"""What a sweep searches: wandb's schema checked in full, values drawn from it, and Configs made of
them.

A sweep is a plain dict with the keys of a wandb sweep YAML: method (bayes, random, grid), metric
{name, goal, target}, parameters {name: {value | values | min, max, distribution …}},
early_terminate {type: hyperband, …}, run_cap, name, description, project, entity. A parameter is a
field of Config, an argument of Config.from_depth (DIALS), "without" (a key of PARTS), or one of
SETTINGS. An assignment is a dict with a value for each parameter.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

from lib.config import Config
from lib.files import UserError, choose, local_path, read_text
from lib.sweeps.hyperband import rungs

METHODS = ("bayes", "random", "grid")
LARGEST_GRID = 100_000  # combinations
METRICS = ("val_bpb", "val_loss", "loss")
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
# numbers with an exponent, like 1e-4
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
# what only wandb's own agent needs: how to start a program
AGENT_KEYS = ("program", "command")

# arguments of Config.from_depth
DIALS = {"depth": int, "aspect_ratio": int, "target_flops": float}
# what a trial is given beside its Config
SETTINGS = {
    "source": str,
    "packing": str,
    "shards": int,
    "eval_bytes": int,
    "evals": int,
    "tokenizer": str,
}
FIELDS = {f.name: f.type for f in dataclasses.fields(Config)} | DIALS
PARAMETERS = FIELDS | SETTINGS | {"without": str}
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


# ---- distributions -------------------------------------------------------------------------------


def _normal(p, rng):
    return float(rng.normal(p["mu"], p["sigma"]))


def _log_normal(p, rng):
    return float(rng.lognormal(p["mu"], p["sigma"]))


def _int_uniform(p, rng):
    return int(rng.integers(p["min"], p["max"] + 1))


def _uniform(p, rng):
    return float(rng.uniform(p["min"], p["max"]))


def _q_uniform(p, rng):
    return quantised(_uniform(p, rng), p)


def _log_uniform(p, rng):
    """Its bounds are natural logarithms."""
    return math.exp(_uniform(p, rng))


def _log_uniform_values(p, rng):
    low, high = math.log(p["min"]), math.log(p["max"])
    return math.exp(float(rng.uniform(low, high)))


def _q_log_uniform_values(p, rng):
    return quantised(_log_uniform_values(p, rng), p)


class Distribution(NamedTuple):
    """How values of a parameter are drawn, and what its entry must say for that."""

    draw: Callable  # (entry, rng) -> a value
    needs: tuple[str, ...] = ("min", "max")
    positive: bool = False  # min must be above 0
    whole: str = "no"  # whether it draws whole numbers: no, yes, or with a whole q
    finite: bool = False  # whether a grid can walk through all its values


DISTRIBUTIONS = {
    "int_uniform": Distribution(_int_uniform, whole="yes", finite=True),
    "uniform": Distribution(_uniform),
    "q_uniform": Distribution(_q_uniform, ("min", "max", "q"), whole="with q", finite=True),
    "log_uniform": Distribution(_log_uniform),
    "log_uniform_values": Distribution(_log_uniform_values, positive=True),
    "q_log_uniform_values": Distribution(
        _q_log_uniform_values, ("min", "max", "q"), positive=True, whole="with q"
    ),
    "normal": Distribution(_normal, ("mu", "sigma")),
    "log_normal": Distribution(_log_normal, ("mu", "sigma")),
}


def quantised(x: float, p: dict) -> float | int:
    """The nearest multiple of q within bounds, without the noise of binary fractions."""
    q = p["q"]
    least = math.ceil(p["min"] / q - 1e-9) * q
    most = math.floor(p["max"] / q + 1e-9) * q
    nearest = round(x / q) * q
    x = min(max(nearest, least), most)

    # 0.30000000000000004 would be another assignment than 0.3
    x = float(f"{x:.12g}")
    if x.is_integer() and float(q).is_integer():
        return int(x)
    return x


def draw(p: dict, rng):
    """Draw one value of a varied parameter."""
    if "values" in p:
        values = p["values"]
        return values[rng.choice(len(values), p=p.get("probabilities"))]
    distribution = DISTRIBUTIONS[p["distribution"]]
    return distribution.draw(p, rng)


# ---- reading and checking ------------------------------------------------------------------------


def load(source) -> dict:
    """A checked sweep from a dict or the path of a YAML or JSON file."""
    if isinstance(source, dict):
        return check(source)
    import yaml

    path = local_path(source)
    if not path.exists():
        raise UserError(
            f"cannot read the sweep {source}: give a preset's name or the path of a YAML file"
        )
    try:
        return check(yaml.safe_load(read_text(path)))
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(
            f"{source} is not YAML ({reason}): see README.md for a sweep to start from"
        ) from None


def check(spec: dict) -> dict:
    """A copy of `spec` with defaults filled in, or a UserError naming the entry that is wrong."""
    if not isinstance(spec, dict):
        raise UserError(
            f"a sweep is a mapping with method, metric and parameters, not {spec!r:.60}"
        )
    # a copy of plain types, which JSON on disk and on a server can hold
    try:
        spec = _numbers(json.loads(json.dumps(spec)))
    except (TypeError, ValueError, RecursionError) as e:
        raise UserError(f"a sweep holds numbers, texts, lists and mappings only ({e})") from None

    # the entries themselves, with defaults for method and metric
    _check_command(spec)
    spec = {name: value for name, value in spec.items() if name not in AGENT_KEYS}
    for name in spec:
        choose("entry of a sweep", name, KEYS)
    choose("sweep method", spec.setdefault("method", "random"), METHODS)
    _check_metric(spec.setdefault("metric", {"name": "val_bpb"}))

    # the parameters, each with its distribution named
    parameters = spec.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise UserError(
            "a sweep needs parameters, like "
            "{matrix_lr: {min: 0.01, max: 0.5, distribution: log_uniform_values}}"
        )
    for name, entry in parameters.items():
        parameters[name] = _parameter(name, entry, spec["method"])

    # what says when it ends
    cap = spec.get("run_cap")
    if cap is not None and (not _is_int(cap) or cap < 1):
        raise UserError(f"run_cap={cap!r} must be a whole number of trials, 1 or more")
    rungs(spec)  # refuses a wrong early_terminate
    if spec["method"] == "grid" and size(spec) > LARGEST_GRID:
        raise UserError(
            f"a grid of {size(spec):,} combinations is too large: list fewer values, or take random"
        )
    return spec


def _numbers(x) -> Any:
    """`x` with texts like 1e-4 made numbers: YAML 1.1 takes them for texts unless they have a
    point.
    """
    if isinstance(x, dict):
        return {name: _numbers(value) for name, value in x.items()}
    if isinstance(x, list):
        return [_numbers(value) for value in x]
    if isinstance(x, str) and EXPONENT.fullmatch(x):
        return float(x)
    return x


def _check_command(spec: dict):
    """Refuse a command with flags of its own: workers here start no program, so they would be lost.

    A plain program and command say nothing about a trial, and every sweep made for wandb has them.
    """
    words = spec.get("command") or []
    if not isinstance(words, list):
        return
    flags = [str(word) for word in words if str(word).startswith("--")]
    if flags:
        raise UserError(
            f"the sweep's command sets {' '.join(flags)}, which no worker here would see: "
            "make that a parameter with a value, and leave the command out"
        )


def _check_metric(metric):
    """Refuse a metric that is none of METRICS, and fill in its goal."""
    named = isinstance(metric, dict) and isinstance(metric.get("name"), str)
    if not named or set(metric) - {"name", "goal", "target"}:
        raise UserError(
            f"a sweep's metric is like {{name: val_bpb, goal: minimize}}, not {metric!r}"
        )
    choose("metric", metric["name"], METRICS)
    choose("goal of the metric", metric.setdefault("goal", "minimize"), ("minimize", "maximize"))
    if "target" in metric and not _is_number(metric["target"]):
        raise UserError(
            f"the metric's target {metric['target']!r} is no number: a sweep begins no further "
            "trial when one has reached it"
        )


def _is_int(x) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x) -> TypeGuard[float]:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _bad(name: str, why: str) -> UserError:
    return UserError(f"sweep parameter {name}: {why}")


def _parameter(name: str, entry, method: str) -> dict:
    """The checked entry of one parameter, with its distribution named."""
    kind = choose("sweep parameter", name, PARAMETERS)
    if not isinstance(entry, dict):
        raise _bad(name, f"write {{value: {entry!r}}} for a constant, or values, or min and max")

    # a constant
    if "value" in entry:
        _check_keys(name, entry, "value", ("value",))
        typed(name, entry["value"], kind)
        return {"value": entry["value"]}

    # a list of values, at times with how likely each is
    if "values" in entry:
        _check_keys(name, entry, "values", ("values", "probabilities"))
        _check_values(name, entry, kind)
        return {k: entry[k] for k in ("values", "probabilities") if k in entry}

    # a range, which only numbers have
    if kind not in (int, float):
        raise _bad(name, f"it is of type {kind.__name__}, so it takes value or values, not a range")
    return _range(name, entry, kind, method)


def _check_keys(name: str, entry: dict, what: str, keys):
    """Refuse what an entry says beside the keys that belong to its kind."""
    if set(entry) - {*keys, "distribution"}:
        raise _bad(name, f"{sorted(entry)} do not go together with {what}")


def _check_values(name: str, entry: dict, kind):
    """Refuse values of another type or given twice, and probabilities that do not add up."""
    values = entry["values"]
    if not isinstance(values, list) or not values:
        raise _bad(name, "values must be a list with at least one entry")
    for value in values:
        typed(name, value, kind)
    different = {json.dumps(value) for value in values}
    if len(different) < len(values):
        raise _bad(name, f"values has an entry twice: {values}")

    # how likely each is: all alike, unless it is said
    shares = entry.get("probabilities", [1 / len(values)] * len(values))
    good = isinstance(shares, list) and all(_is_number(share) and share >= 0 for share in shares)
    if not good or len(shares) != len(values) or abs(sum(shares) - 1) > 1e-6:
        raise _bad(name, "probabilities must be as many as values, none negative, adding up to 1")


def _range(name: str, entry: dict, kind, method: str) -> dict:
    """The checked entry of a parameter that is drawn from a distribution."""
    # without a name it is uniform, over whole numbers where both bounds are some
    distribution = entry.get("distribution")
    if distribution is None:
        whole_bounds = _is_int(entry.get("min")) and _is_int(entry.get("max"))
        distribution = "int_uniform" if whole_bounds else "uniform"
    rule = choose("distribution", distribution, DISTRIBUTIONS)

    # what it needs to be drawn from
    if "mu" in rule.needs:
        _check_normal(name, entry, distribution)
    else:
        _check_bounds(name, entry, distribution)
    if kind is int:
        _check_whole(name, entry, distribution)
    _check_keys(name, entry, distribution, rule.needs)

    # what the method can do with it
    if method == "grid" and not rule.finite:
        why = f"a grid cannot walk through {distribution}: list values, or use int_uniform or "
        raise _bad(name, why + "q_uniform")
    return {k: entry[k] for k in rule.needs} | {"distribution": distribution}


def _check_normal(name: str, entry: dict, distribution: str):
    """Refuse a normal distribution without its mean and its width."""
    mu, sigma = entry.get("mu"), entry.get("sigma")
    if not (_is_number(mu) and _is_number(sigma)) or sigma <= 0:
        raise _bad(name, f"{distribution} needs numbers mu and sigma, sigma above 0")


def _check_bounds(name: str, entry: dict, distribution: str):
    """Refuse bounds, or a step between them, from which nothing could be drawn."""
    rule = DISTRIBUTIONS[distribution]
    low, high, q = entry.get("min"), entry.get("max"), entry.get("q")
    if not (_is_number(low) and _is_number(high)) or not low < high:
        raise _bad(name, "min and max must be numbers, min below max")

    # what the distribution asks for beside that
    if rule.positive and low <= 0:
        raise _bad(name, f"{distribution} needs min above 0")
    if "q" in rule.needs and not (_is_number(q) and q > 0):
        raise _bad(name, f"{distribution} needs a step q above 0")
    if rule.whole == "yes" and not (_is_int(low) and _is_int(high)):
        raise _bad(name, f"{distribution} needs whole numbers min and max")


def _check_whole(name: str, entry: dict, distribution: str):
    """Refuse a distribution that would draw fractions for a parameter of whole numbers."""
    rule = DISTRIBUTIONS[distribution]
    if rule.whole == "no":
        why = "it takes whole numbers, so its distribution is int_uniform or a q_ one with a whole"
        raise _bad(name, f"{why} q, not {distribution}")
    if rule.whole == "with q" and not float(entry["q"]).is_integer():
        raise _bad(name, f"it takes whole numbers, so q={entry['q']} must be one")


def typed(name: str, value, kind):
    """`value` as a `kind`: whole floats become ints, ints become floats; all else of another type
    is a UserError.
    """
    if kind is float and _is_int(value):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _bad(name, f"{value!r} is not of type {kind.__name__}")
    return value


# ---- assignments ---------------------------------------------------------------------------------


def constants(spec: dict) -> dict:
    """The parameters that are the same in every trial."""
    entries = spec["parameters"].items()
    return {name: entry["value"] for name, entry in entries if "value" in entry}


def varied(spec: dict) -> dict:
    """The entries of the parameters that differ between trials."""
    entries = spec["parameters"].items()
    return {name: entry for name, entry in entries if "value" not in entry}


def with_constants(spec: dict, values: dict) -> dict:
    """`spec` with constants added for the parameters that it does not have itself, so that it alone
    says all of a trial.
    """
    parameters = spec["parameters"]
    added = {name: {"value": v} for name, v in values.items() if name not in parameters}
    return spec | {"parameters": added | parameters}


def key(assignment: dict) -> str:
    """Ten letters that name an assignment."""
    text = json.dumps(assignment, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


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
        low, q = p["min"], p["q"]
        return [quantised(low + i * q, p) for i in range(_count(p))]
    return []


def _count(p: dict) -> int:
    """How many values a parameter has; 0 for no end of them."""
    if p.get("distribution") == "int_uniform":
        return p["max"] - p["min"] + 1
    if p.get("distribution") == "q_uniform":
        steps = (p["max"] - p["min"]) / p["q"]
        return int(steps + 1e-9) + 1
    return len(p.get("values", ()))


def size(spec: dict) -> float:
    """How many different assignments there are; inf with a continuous parameter."""
    counts = [_count(p) for p in varied(spec).values()]
    return math.prod(counts) if all(counts) else math.inf


def grid(spec: dict) -> list[dict]:
    """All assignments (varied parameters only) of a finite sweep, the last parameter changing
    fastest.
    """
    names = list(varied(spec))
    steps = [_steps(p) for p in varied(spec).values()]
    combinations = itertools.product(*steps)
    return [dict(zip(names, values)) for values in combinations]


def limit(spec: dict) -> float:
    """How many trials the sweep has at most: its run_cap, its size, or inf."""
    return min(spec.get("run_cap") or math.inf, size(spec))


def config_of(assignment: dict) -> Config:
    """The Config of a whole assignment, constants included.

    UserError for an impossible one, before any compute.
    """
    # what is no field of Config belongs to the data and the validation
    fields: dict[str, Any] = {}
    for name, value in assignment.items():
        if name not in SETTINGS:
            kind = choose("sweep parameter", name, PARAMETERS)
            fields[name] = typed(name, value, kind)

    # a part that is left out is a few fields
    part = fields.pop("without", "")
    fields |= choose("part to leave out", part, PARTS)
    if "depth" not in fields:
        raise UserError(
            "a trial needs a depth: give it as a parameter, a constant or through a preset"
        )
    return Config.from_depth(**fields)
