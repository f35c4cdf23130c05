"""What a worker prints: the sweep, its plan, each trial as it ends, and what the trials say about
laws.
"""

import math

from lib.files import quoted
from lib.sweeps import space
from lib.sweeps.hyperband import ETA, rungs
from lib.sweeps.tables import span, table


def join_command(run: str, driver: str, sweep_id: str, store: str) -> str:
    """The command that makes another terminal a worker of this sweep, ready for a shell."""
    words = ["python", "03_worker.py", "--run", run, "--driver", driver, "--join", sweep_id]
    if store:
        words += ["--store", store]
    return quoted(*words)


def sweep_text(spec: dict) -> str:
    """What varies, as a table, and what is the same in all trials."""
    # entries have different keys: min and max, values, …
    rows = []
    for name, entry in space.varied(spec).items():
        words = {key: str(value) for key, value in entry.items()}
        rows.append(dict(parameter=name) | words)
    constants = " ".join(f"{name}={value}" for name, value in space.constants(spec).items())
    return f"{table(rows)}\n\nconstant    {constants}"


def plan_text(plan, spec: dict, ended: int) -> str:
    """What the sweep will take, from shapes alone."""
    trials = plan.trials if math.isfinite(plan.trials) else "no end"
    lines = [
        f"trials      {trials}, {ended} of them ended, {plan.shapes} shape(s) to compile, "
        f"{plan.invalid} impossible combination(s) in a sample of {plan.sampled}"
    ]
    # every reason once, with how many combinations it rules out
    lines += [f"impossible  {n} x {reason}" for reason, n in plan.reasons.items()]
    lines.append(
        f"compute     {plan.flops:.3g} FLOPs per trial on average, "
        f"{plan.flops_least:.3g} to {plan.flops_most:.3g}"
    )
    # at the last validation there is nothing left to stop
    if rungs(spec):
        looks = ", ".join(str(rung) for rung in rungs(spec) if rung < plan.evals)
        eta = spec["early_terminate"].get("eta", ETA)
        lines.append(
            f"hyperband   looks after {looks} of {plan.evals} validations "
            f"and keeps the best 1/{eta}"
        )
    return "\n".join(lines)


def time_text(plan, timing, spec: dict, count: float) -> str:
    """How long one trial takes, and `count` of them with one worker."""
    seconds = plan.flops / timing.flops_per_s
    lines = [
        f"time        one trial {seconds:.1f} s "
        f"({timing.flops_per_s / 1e9:.1f} GFLOP/s, validation included) "
        f"after {timing.compile_seconds:.1f} s to compile"
    ]
    # every shape is compiled once, whatever the number of its trials
    compiling = plan.shapes * timing.compile_seconds
    minutes = (seconds * count + compiling) / 60
    if math.isfinite(minutes):
        pruned = ", less what is pruned" if rungs(spec) else ""
        lines.append(f"            {minutes:.1f} min for what is left, with one worker{pruned}")
    return "\n".join(lines)


def trial_text(trial, outcome, metric: str) -> str:
    """One line on a trial that has ended here."""
    # its result, or why it has none
    result = outcome.reason
    if metric in outcome.values and outcome.state != "failed":
        result = f"{metric} {outcome.values[metric]:.4f}"
    seconds = outcome.facts.get("seconds", 0)
    values = values_text(trial.assignment)
    return f"trial {trial.number:3} {outcome.state:7} {result}  {seconds:6.1f} s  {values}"


def values_text(assignment: dict) -> str:
    """Parameters as name=value."""
    words = []
    for name, value in assignment.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        words.append(f"{name}={text}")
    return " ".join(words)


def isoflop_text(fit: dict) -> str:
    """`scaling.isoflop` in two sentences."""
    used, budgets = fit["used"], len(fit["budgets"])
    if used < 2:
        return (
            f"No power law: {used} of {budgets} budgets have their best size within the sizes "
            "trained, and it takes two; train smaller or larger ones too."
        )
    left_out = f"{budgets - used} budget(s) left out, their minimum being outside of the sizes"
    N, D = fit["N_opt"], fit["D_opt"]
    size = f"C^{N['p']:.3f} {span(N['p_interval'])}"
    tokens = f"C^{D['p']:.3f} {span(D['p_interval'])}"
    return f"{left_out} trained\nthrough {used} minima: best size ~ {size}, best tokens ~ {tokens}"


def parametric_text(fit: dict) -> str:
    """`scaling.parametric` in a sentence."""
    names = ("E", "A", "alpha", "B", "beta", "a")
    intervals = fit["intervals"]
    constants = ", ".join(f"{k} {fit[k]:.3g} {span(intervals[k])}" for k in names)
    return (
        f"L(N, D) = E + A/N^alpha + B/D^beta, Huber loss on logs: {constants}; "
        f"off by {fit['error']:.2%} (root mean square); a is the power of the best size"
    )


def series_text(fit: dict) -> str:
    """`scaling.series` in a sentence."""
    intervals = fit["intervals"]
    constants = ", ".join(f"{k} {fit[k]:.4g} {span(intervals[k])}" for k in "Ekp")
    return f"L = E + k C^-p: {constants}"
