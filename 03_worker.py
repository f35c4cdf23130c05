# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · Work on a sweep
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/rawchat/rawchat/blob/main/03_worker.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/rawchat/rawchat/blob/main/03_worker.ipynb)
#
# Makes this runtime a worker of a hyper-parameter search: it takes a trial, trains it exactly as `02_train` would, reports, takes
# the next. Start as many workers as you like, on one machine or on many; any of them may vanish at any time, and its trial is
# taken up by another. The same for scaling laws (`miniseries`, `isoflop`) and for what each part of the model is worth (`ablate`).
#
# **At the end you have** a table of all trials, who was best and why, fitted scaling laws or ablations with intervals, as
# pictures and as CSV.
#
# **Hardware and time:** the plan below says, after timing one trial. Budget `small` is meant for two CPU cores and ten minutes,
# `chip` for one TPU or GPU and about a day. In Colab this notebook asks for a TPU v5e-1, which free accounts have too; a v6e-1
# (Runtime > Change runtime type, paid) has 4.7 times its FLOP/s.

# %% [markdown]
# ## Set-up

# %%
# @title Get the code and what it needs (half a minute in a new runtime, later seconds)
import os
import sys

try:
    from lib.notebook import setup
except ModuleNotFoundError:  # Colab, Kaggle, or this file was downloaded alone
    home = "/kaggle/working/rawchat" if os.path.isdir("/kaggle/working") else "rawchat"
    address = "https://github.com/rawchat/rawchat"
    if not os.path.isdir(home) and os.system(f"git clone --quiet --depth 1 {address} {home}"):
        raise SystemExit(
            f"{address} could not be fetched: see that git is installed and that this machine "
            "reaches the internet (on Kaggle: Settings > Internet on), then run this cell again"
        ) from None
    os.chdir(home)
    sys.path.insert(0, os.getcwd())
    sys.modules.pop("lib", None)  # another folder of that name
    from lib.notebook import setup

setup("sweeps")

# %%
import json
import math
import time
from pathlib import Path

from lib.config import Config
from lib.data.tokenizer import FILE, load_tokenizer
from lib.files import UserError, choose, update_json
from lib.interrupts import interruptible
from lib.notebook import device_report, flags, parse_overrides, secret
from lib.pictures import show
from lib.runs import open_run
from lib.sweeps import drivers, journal, pictures, presets, scaling, space, trials

# %% tags=["parameters"]
# @title Parameters
# @markdown Name of the run, runs/NAME, whose tokenizer all trials use; empty takes the one made last
run = ""  # @param {type:"string"}
# @markdown What to search: a preset, or the path of a sweep in wandb's YAML
sweep = "search"  # @param ["search", "miniseries", "isoflop", "ablate"] {allow-input: true}
# @markdown Join a sweep by its id (local), or by ENTITY/PROJECT/ID (wandb), instead of starting one; nothing else is needed then
join = ""  # @param {type:"string"}
# @markdown Sizes and rates; auto takes small on a CPU, chip on an accelerator; a YAML file also takes a preset of 02_train
budget = "auto"  # @param ["auto", "small", "chip", "smoke"] {allow-input: true}
# @markdown Config fields that are the same in all trials, such as: sequence_len=512 optimizer=adamw
overrides = ""  # @param {type:"string"}
# @markdown local needs no account: workers meet in a folder. wandb: workers meet on its server
driver = "local"  # @param ["local", "wandb"]
# @markdown Folder where workers meet, such as one on a mounted Drive; empty for runs/NAME/sweeps
store = ""  # @param {type:"string"}
# @markdown Project on wandb that a new sweep goes to, PROJECT or ENTITY/PROJECT
project = "rawchat"  # @param {type:"string"}
# @markdown Trials this worker takes before it stops (0: until the sweep is over; -1: none, only show what there is)
count = 0  # @param {type:"integer"}
# @markdown Trials of equal shape that train at once as one program, with driver local; pays where a small model leaves the chip idle
population = 1  # @param {type:"integer"}
# @markdown What to read: a name, or a path or glob, as in 02_train; empty for what the sweep itself says, else stdlib
source = ""  # @param ["", "stdlib", "stdlib_with_tests", "climbmix", "fineweb_edu", "tinystories"] {allow-input: true}
# @markdown Training shards to download of a source from the Hub (0: what the sweep itself says, else 8)
shards = 0  # @param {type:"integer"}
# @markdown Minutes between checkpoints of a trial, so that whoever takes it over need not begin again
save_minutes = 10.0  # @param {type:"number"}

# %%
globals().update(flags(globals()))
folder = open_run(run, needs=FILE)
tokenizer = load_tokenizer(folder)
choose("driver", driver, ("local", "wandb"))
if count < -1 or population < 1:
    raise UserError(f"count={count} must be -1 or more, population={population} 1 or more")
if driver == "wandb" and population > 1:
    raise UserError(
        f"population={population} needs driver=local: wandb's server gives a worker one trial at a time"
    )

# %% [markdown]
# ## The device

# %%
device = device_report()
budget = {"cpu": "small"}.get(device["platform"], "chip") if budget == "auto" else budget

# %% [markdown]
# ## The sweep
#
# One dict in wandb's schema, constants included, says all about every trial. Its id follows from it: the same command in another
# terminal joins the same sweep.

# %%
place = Path(store) if store else folder / "sweeps"
if driver == "wandb":
    secret("WANDB_API_KEY")
    server = drivers.wandb_login()
if join and driver == "wandb":
    spec = drivers.read_sweep(server, drivers.parse_path(join))
elif join:
    spec = journal.read(place / join)
else:
    make = presets.from_file if sweep.endswith((".yaml", ".yml", ".json")) else presets.preset
    text = dict(source=source) if source else {}
    text |= dict(shards=shards) if shards else {}
    spec = make(
        sweep,
        budget,
        **text,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint[:16],
        **parse_overrides(overrides, Config),
    )
    spec = space.with_constants(
        spec, {name: trials.DEFAULTS[name] for name in ("source", "shards")}
    )
bench = trials.Bench(tokenizer, memory=device["memory"], save_seconds=60 * save_minutes)
plan = trials.plan(spec, bench)  # a sweep that cannot be trained is not even made
if driver == "wandb":
    path = (
        drivers.parse_path(join)
        if join
        else drivers.create_sweep(server, spec, *["", *project.split("/")][-2:])
    )
    sweep_id, here = "/".join(path), place / f"wandb-{'-'.join(path)}"
    print(f"page        {server.page(path)}")
else:
    sweep_id = join or space.spec_id(spec)
    here = place / sweep_id
# its id says which it is, however the server spells it today
known = driver == "wandb" and (here / "sweep.json").exists()
spec = journal.read(here) if known else journal.create(here, spec)
metric, goal = spec["metric"]["name"], spec["metric"]["goal"]
again = f"--driver {driver} --join {sweep_id}" + (f" --store {store}" if store else "")
print(
    f"sweep       {sweep_id}\nfolder      {here}\njoin it     python 03_worker.py --run {folder.name} {again}\n"
)
print(
    pictures.table(
        [
            dict(parameter=name, **{k: str(v) for k, v in p.items()})
            for name, p in space.varied(spec).items()
        ]
    )
)
print("\nconstant    " + " ".join(f"{k}={v}" for k, v in space.constants(spec).items()))

# %% [markdown]
# ## The plan
#
# Combinations that cannot be trained are found before anything is compiled. One trial, the middle one by FLOPs, is timed for
# some steps; what it compiles is used again by every trial of its shape.

# %%
ended = sum(t.state in journal.ENDS for t in journal.trials(here))
left = max(plan["trials"] - ended, 0)
print(
    f"trials      {plan['trials'] if math.isfinite(plan['trials']) else 'no end'}, {ended} of them ended, "
    f"{plan['shapes']} shape(s) to compile, {plan['invalid']} impossible combination(s) in a sample of {plan['sampled']}"
)
for reason, n in plan["reasons"].items():
    print(f"impossible  {n} x {reason}")
print(
    f"compute     {plan['flops']:.3g} FLOPs per trial on average, {plan['flops_least']:.3g} to {plan['flops_most']:.3g}"
)
if space.rungs(spec):
    print(
        f"hyperband   looks after {', '.join(str(r) for r in space.rungs(spec) if r < plan['evals'])} of "
        f"{plan['evals']} validations and keeps the best 1/{spec['early_terminate'].get('eta', 3)}"
    )
if count >= 0 and left:
    timed = trials.time_one(*plan["middle"], bench)
    minutes = (
        plan["flops"] * min(left, count or math.inf) / timed["flops_per_s"]
        + plan["shapes"] * timed["compile_seconds"]
    ) / 60
    print(
        f"time        one trial {plan['flops'] / timed['flops_per_s']:.1f} s ({timed['flops_per_s'] / 1e9:.1f} GFLOP/s, validation "
        f"included) after {timed['compile_seconds']:.1f} s to compile"
    )
    if math.isfinite(minutes):
        print(
            f"            {minutes:.1f} min for what is left, with one worker"
            + (", less what is pruned" if space.rungs(spec) else "")
        )

# %% [markdown]
# ## The work
#
# Interrupt it at any time: the trial at hand goes back, and this or another worker takes it up where its checkpoint is.

# %%
clock, worked, interrupted = time.perf_counter(), 0, False
with journal.Journal(here) as book, interruptible() as signal:
    boss = (
        drivers.Local(book, spec)
        if driver == "local"
        else drivers.Wandb(book, spec, server, path, drivers.wandb_runs(path))
    )
    try:
        while (count == 0 or worked < count) and not signal.stop:
            taken = boss.take(
                min(population, count - worked) if count else population, stop=lambda: signal.stop
            )
            if not taken:
                break
            for trial, outcome in trials.run(boss, taken, bench, stop=lambda: signal.stop):
                worked += outcome.state in journal.ENDS
                shown = (
                    f"{metric} {outcome.values[metric]:.4f}"
                    if metric in outcome.values
                    else outcome.reason
                )
                print(
                    f"trial {trial.number:3} {outcome.state:7} {shown}  {outcome.facts.get('seconds', 0):6.1f} s  "
                    + " ".join(
                        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                        for k, v in trial.assignment.items()
                    ),
                    flush=True,
                )
        interrupted = signal.stop
    finally:
        boss.close()
print(
    f"{worked} trial(s) ended here in {time.perf_counter() - clock:.1f} s; once more: python 03_worker.py --run {folder.name} {again}"
)

# %% [markdown]
# ## All trials

# %%
everyone = drivers.fetch_runs(server, path, spec) if driver == "wandb" else journal.trials(here)
pictures.write_csv(here / "trials.csv", pictures.trial_rows(everyone))
pictures.write_csv(here / "curves.csv", pictures.curve_rows(everyone))
states = {s: sum(t.state == s for t in everyone) for s in dict.fromkeys(t.state for t in everyone)}
print(", ".join(f"{n} {s}" for s, n in states.items()) or "no trial yet")
for t in everyone:
    if t.state == "failed":
        print(f"failed: {t.assignment}: {t.reason}")
print(pictures.leaders(everyone, goal))
print(f"tables: {here / 'trials.csv'}, {here / 'curves.csv'}")

# %% [markdown]
# ## Pictures
#
# Best so far and learning curves (pruned runs in grey); where something is searched, every trial as a line through its parameters,
# and what decided.

# %%
best = pictures.best_of(everyone, goal)
if best:
    show(pictures.curves(everyone, spec), here / "curves.png")
    show(pictures.best_so_far(everyone, spec), here / "best.png")
    show(pictures.parallel(everyone, spec), here / "parallel.png")
if shares := space.importance(spec, everyone):
    show(pictures.importance(shares), here / "importance.png")
    pictures.write_csv(
        here / "importance.csv", [dict(parameter=k, share=v) for k, v in shares.items()]
    )

# %% [markdown]
# ## Laws
#
# Sweeps over sizes at equal compute give one parabola per budget and, through their minima, how size and tokens should grow;
# a loss in size and tokens is fitted to all runs at once; and the largest budget is predicted from the smaller ones. Brackets are
# 95 % intervals of a bootstrap.

# %%
runs = scaling.runs_of(everyone)
laws, span = {}, lambda pair: f"[{pair[0]:.3g}, {pair[1]:.3g}]"
if "target_flops" in space.varied(spec) and "depth" in space.varied(spec):
    try:
        laws["isoflop"] = fit = scaling.isoflop(runs)
        print(
            pictures.table(
                [
                    {k: b[k] for k in ("target", "N", "D", "L")}
                    | {
                        "N interval": span(b["N_interval"]),
                        "tokens/N": b["D"] / b["N"],
                        "inside": str(b["inside"]),
                    }
                    for b in fit["budgets"]
                ],
                dict(target=".3g", N=",.0f", D=",.0f", L=".4f", **{"tokens/N": ".1f"}),
            )
        )
        print(
            f"\n{len(fit['budgets']) - fit['used']} budget(s) left out, their minimum being outside of the sizes trained\n"
            f"through {fit['used']} minima: best size ~ C^{fit['N_opt']['p']:.3f} {span(fit['N_opt']['p_interval'])}, best tokens ~ "
            f"C^{fit['D_opt']['p']:.3f} {span(fit['D_opt']['p_interval'])}"
        )
        show(pictures.isoflop(fit, metric), here / "isoflop.png")
        laws["parametric"] = whole = scaling.parametric(runs)
        print(
            "L(N, D) = E + A/N^alpha + B/D^beta, Huber loss on logs: "
            + ", ".join(
                f"{k} {whole[k]:.3g} {span(whole['intervals'][k])}"
                for k in ("E", "A", "alpha", "B", "beta", "a")
            )
            + f"; off by {whole['error']:.2%} (root mean square); a is the power of the best size"
        )
    except UserError as e:
        print(f"not fitted yet: {e}")
    if "isoflop" in laws:
        show(pictures.frontier(laws["isoflop"], laws.get("parametric")), here / "frontier.png")
elif "depth" in space.varied(spec):
    try:
        laws["series"] = fit = scaling.series(runs)
        print(
            "L = E + k C^-p: "
            + ", ".join(f"{k} {fit[k]:.4g} {span(fit['intervals'][k])}" for k in "Ekp")
        )
        show(pictures.series(runs, fit, metric), here / "series.png")
    except UserError as e:
        print(f"not fitted yet: {e}")
if laws and (unseen := scaling.held_out(runs)):
    print(
        "\nthe largest, predicted by a fit that did not see it:\n"
        + pictures.table(
            unseen,
            dict(
                N=",.0f",
                D=",.0f",
                C=".3g",
                error="+.2%",
                actual=".4f",
                predicted=".4f",
                low=".4f",
                high=".4f",
            ),
        )
    )
    show(pictures.predicted(unseen, metric), here / "held_out.png")
    pictures.write_csv(here / "held_out.csv", unseen)
if laws:
    pictures.write_csv(here / "runs.csv", runs)
    kept = {name: {k: v for k, v in law.items() if k != "draws"} for name, law in laws.items()}
    update_json(here / "laws.json", **json.loads(json.dumps(kept, default=float)))

# %% [markdown]
# ## What each part is worth

# %%
if "without" in space.varied(spec) and (rows := scaling.paired(everyone)):
    print(pictures.ablation_table(rows))
    print(
        "\ndelta: without the part minus the whole model of the same seed (positive: the part helps)\n"
        "low, high: 95 % interval, Student's t over seeds"
    )
    show(pictures.ablation(rows, metric), here / "ablation.png")
    pictures.write_csv(here / "ablation.csv", rows)

# %% [markdown]
# ## Checks

# %%
mine = [t for t in journal.trials(here) if not t.reason.startswith(drivers.NOT_AGAIN)]
checks = {
    "no assignment was trained twice": len({space.key(t.assignment) for t in mine}) == len(mine),
    "every trial that ended has a result or a reason": all(
        t.value is not None if t.state == "done" else t.reason or t.state != "failed"
        for t in everyone
    ),
    "every result is a finite number": all(
        math.isfinite(t.value) for t in everyone if t.state == "done" and t.value is not None
    ),
}
for what, good in checks.items():
    print("ok  " if good else "FAIL", what)

# %% [markdown]
# ## Results

# %%
results = dict(
    sweep=sweep_id,
    sweep_trials=len(everyone),
    sweep_best=best and best.value,
    sweep_best_assignment=best and best.assignment,
)
update_json(folder / "results.json", **results)
print(json.dumps(results, indent=1))
if interrupted:
    raise UserError("interrupted: the trial at hand was given back; run again to go on")

# %% [markdown]
# ## Where to go next
#
# Put the best rates into `02_train` as overrides and train for longer. More workers make a sweep faster: run the line under *join it*
# in other terminals, or this notebook in other tabs with `join` set.
