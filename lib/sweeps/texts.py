"""What a worker prints:

the sweep, its plan, each trial as it ends, and what the trials say about laws.
"""

import math

from lib.files import quoted
from lib.sweeps import space
from lib.sweeps.hyperband import ETA, rungs
from lib.sweeps.tables import span, table


def join_command(run: str, driver: str, sweep_id: str, store: str) -> str:
    """The command that makes another terminal a worker of this sweep, ready for a shell."""
    words = ["python", "03_worker.py", "--run", run, "--driver", driver, "--join", sweep_id]
    return quoted(*words, *(["--store", store] if store else []))


def sweep_text(spec: dict) -> str:
    """What varies, as a table, and what is the same in all trials."""
    varied = [
        dict(parameter=name) | {k: str(v) for k, v in p.items()}
        for name, p in space.varied(spec).items()
    ]
    constants = " ".join(f"{name}={value}" for name, value in space.constants(spec).items())
    return f"{table(varied)}\n\nconstant    {constants}"


def plan_text(plan, spec: dict, ended: int) -> str:
    """What the sweep will take, from shapes alone."""
    trials = plan.trials if math.isfinite(plan.trials) else "no end"
    lines = [
        f"trials      {trials}, {ended} of them ended, {plan.shapes} shape(s) to compile, "
        f"{plan.invalid} impossible combination(s) in a sample of {plan.sampled}"
    ]
    lines += [f"impossible  {n} x {reason}" for reason, n in plan.reasons.items()]
    lines.append(
        f"compute     {plan.flops:.3g} FLOPs per trial on average, {plan.flops_least:.3g} to "
        f"{plan.flops_most:.3g}"
    )
    if rungs(spec):
        looks = ", ".join(str(rung) for rung in rungs(spec) if rung < plan.evals)
        eta = spec["early_terminate"].get("eta", ETA)
        lines.append(
            f"hyperband   looks after {looks} of {plan.evals} validations and keeps the best "
            f"1/{eta}"
        )
    return "\n".join(lines)


def time_text(plan, timing, spec: dict, count: float) -> str:
    """How long one trial takes, and `count` of them with one worker."""
    seconds = plan.flops / timing.flops_per_s
    lines = [
        f"time        one trial {seconds:.1f} s ({timing.flops_per_s / 1e9:.1f} GFLOP/s, "
        "validation "
        ""
        f"included) after {timing.compile_seconds:.1f} s to compile"
    ]
    minutes = (seconds * count + plan.shapes * timing.compile_seconds) / 60
    if math.isfinite(minutes):
        pruned = ", less what is pruned" if rungs(spec) else ""
        lines.append(f"            {minutes:.1f} min for what is left, with one worker{pruned}")
    return "\n".join(lines)


def trial_text(trial, outcome, metric: str) -> str:
    """One line on a trial that has ended here."""
    result = outcome.reason
    if metric in outcome.values and outcome.state != "failed":
        result = f"{metric} {outcome.values[metric]:.4f}"
    seconds = outcome.facts.get("seconds", 0)
    return (
        f"trial {trial.number:3} {outcome.state:7} {result}  {seconds:6.1f} s  "
        f"{values_text(trial.assignment)}"
    )


def values_text(assignment: dict) -> str:
    """Parameters as name=value."""
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in assignment.items()}
    return " ".join(f"{name}={value}" for name, value in shown.items())


def isoflop_text(fit: dict) -> str:
    """`scaling.isoflop` in two sentences."""
    if fit["used"] < 2:
        return (
            f"No power law: {fit['used']} of {len(fit['budgets'])} budgets have their best size "
            "within "
            ""
            "the sizes trained, and it takes two; train smaller or larger ones too."
        )
    N, D = fit["N_opt"], fit["D_opt"]
    return (
        f"{len(fit['budgets']) - fit['used']} budget(s) left out, their minimum being outside of "
        "the "
        ""
        f"sizes trained\nthrough {fit['used']} minima: best size ~ C^{N['p']:.3f} "
        f"{span(N['p_interval'])}, best tokens ~ C^{D['p']:.3f} {span(D['p_interval'])}"
    )


def parametric_text(fit: dict) -> str:
    """`scaling.parametric` in a sentence."""
    names = ("E", "A", "alpha", "B", "beta", "a")
    constants = ", ".join(f"{k} {fit[k]:.3g} {span(fit['intervals'][k])}" for k in names)
    return (
        f"L(N, D) = E + A/N^alpha + B/D^beta, Huber loss on logs: {constants}; off by "
        f"{fit['error']:.2%} (root mean square); a is the power of the best size"
    )


def series_text(fit: dict) -> str:
    """`scaling.series` in a sentence."""
    constants = ", ".join(f"{k} {fit[k]:.4g} {span(fit['intervals'][k])}" for k in "Ekp")
    return f"L = E + k C^-p: {constants}"
