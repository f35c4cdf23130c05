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
# Makes this runtime a worker of a hyper-parameter search: it takes a *trial* (settings drawn near
# those that did well so far), trains it exactly as `02_train` would, reports, takes the next. Start
# as many workers as you like, on one machine or on many; any of them may vanish at any time, and
# its trial is taken up by another. The same for scaling laws (`miniseries`, `isoflop`) and for what
# each part of the model is worth (`ablate`).
#
# **At the end you have** a table of all trials, who was best and why, fitted scaling laws or
# ablations with intervals, as pictures and as CSV.
#
# **Hardware and time:** the plan below says, after timing one trial. Budget `small` is meant for
# two CPU cores and ten minutes, `chip` for one TPU or GPU and about a day. In Colab this notebook
# asks for a TPU v5e-1, which free accounts have too; a v6e-1 (Runtime > Change runtime type, paid)
# has 4.7 times its FLOP/s.

# %% [markdown]
# ## Set-up

# %% cellView="form"
# @title Get the code and what it needs (half a minute in a new runtime, later seconds)
import os
import sys

try:
    from lib.notebook import setup
except ModuleNotFoundError:  # Colab, Kaggle, or this file was downloaded alone
    place = "/kaggle/working/rawchat" if os.path.isdir("/kaggle/working") else "rawchat"
    address = "https://github.com/rawchat/rawchat"
    if not os.path.isdir(place) and os.system(f"git clone --quiet --depth 1 {address} {place}"):
        raise SystemExit(
            f"{address} could not be fetched: see that git is installed and that this machine "
            "reaches the internet (on Kaggle: Settings > Internet on), then run this cell again"
        ) from None
    os.chdir(place)
    sys.path.insert(0, os.getcwd())
    sys.modules.pop("lib", None)  # another folder of that name
    from lib.notebook import setup

setup("sweeps")

# %% cellView="form"
# @title Imports
import json
import math
import time

from lib.config import Config
from lib.data.tokenizer import FILE
from lib.files import Interrupted, UserError, choose, local_path, update_json
from lib.interrupts import interruptible
from lib.notebook import device_report, flags, parse_overrides, secret
from lib.pictures import show
from lib.recipes import tokenizer_of
from lib.runs import enter
from lib.runtime import host
from lib.sweeps import (
    drivers,
    journal,
    laws,
    pictures,
    presets,
    scaling,
    server,
    space,
    suggest,
    tables,
    texts,
    trials,
)

# %% cellView="form" tags=["parameters"]
# @title Parameters
# @markdown Name of the run, runs/NAME, whose tokenizer all trials use; empty takes the one made last
run = ""  # @param {type:"string"}
# @markdown Where runs live: drive, hub:USER/NAME, gs://…, a path; empty: as any notebook here was told, or the secret RAWCHAT_HOME, else this machine
home = ""  # @param ["", "drive"] {"allow-input":true}
# @markdown What to search: a preset, or the path of a sweep in wandb's YAML
sweep = "search"  # @param ["search", "miniseries", "isoflop", "ablate"] {allow-input: true}
# @markdown Sizes and rates; auto takes small on a CPU, chip on an accelerator; a YAML file also takes a preset of 02_train
budget = "auto"  # @param ["auto", "small", "chip", "smoke"] {allow-input: true}
# @markdown What to read: a name, or a path or glob, as in 02_train; empty for what the sweep itself says, else stdlib
source = ""  # @param ["", "stdlib", "stdlib_with_tests", "climbmix", "fineweb_edu", "tinystories"] {allow-input: true}
# @markdown Trials this worker takes before it stops (0: until the sweep is over; -1: none, only show what there is)
count = 0  # @param {type:"integer"}
# @markdown local needs no account: workers meet in a folder. wandb: workers meet on its server
driver = "local"  # @param ["local", "wandb"]
# @markdown Join a sweep by its id (local), or by ENTITY/PROJECT/ID (wandb), instead of starting one; nothing else is needed then
join = ""  # @param {type:"string"}

# %% cellView="form" tags=["parameters"]
# @title Advanced
# @markdown Config fields that are the same in all trials, such as: sequence_len=512 optimizer=adamw
overrides = ""  # @param {type:"string"}
# @markdown Folder where workers meet, such as one on a mounted Drive; empty for runs/NAME/sweeps
store = ""  # @param {type:"string"}
# @markdown Project on wandb that a new sweep goes to, PROJECT or ENTITY/PROJECT; empty: what a YAML says, else rawchat
project = ""  # @param {type:"string"}
# @markdown Trials of equal shape that train at once as one program, with driver local; pays where a small model leaves the chip idle
population = 1  # @param {type:"integer"}
# @markdown Training shards to download of a source from the Hub (0: what the sweep itself says, else 8)
shards = 0  # @param {type:"integer"}
# @markdown Minutes between checkpoints of a trial, so that whoever takes it over need not begin again
save_minutes = 10.0  # @param {type:"number"}

# %%
globals().update(flags(globals()))
folder, mirror = enter(home, run, needs=FILE, default="default", secret=secret)
if mirror.home.remote:
    print(
        "note: workers on other machines share a sweep through driver=wandb, "
        "or a store they all see"
    )
choose("driver", driver, ("local", "wandb"))
if count < -1 or population < 1:
    raise UserError(f"count={count} must be -1 or more, population={population} 1 or more")
if driver == "wandb" and population > 1:
    raise UserError(
        f"population={population} needs driver=local: "
        "wandb's server gives a worker one trial at a time"
    )

# %% [markdown]
# ## The device

# %%
device = device_report()
tokenizer = tokenizer_of(folder, "auto", source, device, bool(host()))
budget = {"cpu": "small"}.get(device["platform"], "chip") if budget == "auto" else budget

# %% [markdown]
# ## The sweep
#
# One dict in wandb's schema, constants included, says all about every trial. Its id follows from
# it: the same command in another terminal joins the same sweep.

# %%
place = local_path(store) if store else folder / "sweeps"
if driver == "wandb":
    secret("WANDB_API_KEY")
    site = server.wandb_login()
if join and driver == "wandb":
    spec = server.read_sweep(site, server.parse_path(join))
elif join:
    spec = journal.read(place / join)
else:
    make = presets.from_file if sweep.endswith((".yaml", ".yml", ".json")) else presets.preset
    constants = dict(vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.fingerprint[:16])
    constants |= dict(source=source) if source else {}
    constants |= dict(shards=shards) if shards else {}
    spec = make(sweep, budget, **constants, **parse_overrides(overrides, Config))
    text = {name: trials.DEFAULTS[name] for name in ("source", "shards")}
    spec = space.with_constants(spec, text)

# %% [markdown]
# A sweep that cannot be trained, or could not be measured, is not even made.

# %%
bench = trials.Bench(
    tokenizer,
    memory=device["memory"],
    save_seconds=60 * save_minutes,
    then=mirror.send,
    shelf=mirror.shelf(),
)
plan = trials.plan(spec, bench)
if count >= 0:
    for settings in plan.texts:
        bench.check_held_out(settings)

# %%
if driver == "wandb":
    path = server.parse_path(join) if join else server.create_sweep(site, spec, project)
    sweep_id, here = "/".join(path), place / f"wandb-{'-'.join(path)}"
    print(f"page        {site.page(path)}")
else:
    sweep_id = join or space.spec_id(spec)
    here = place / sweep_id
# its id says which it is, however the server spells it today
known = driver == "wandb" and (here / "sweep.json").exists()
spec = journal.read(here) if known else journal.create(here, spec)
metric, goal = spec["metric"]["name"], spec["metric"]["goal"]
again = texts.join_command(folder.name, driver, sweep_id, store)
print(f"sweep       {sweep_id}\nfolder      {here}\njoin it     {again}\n")
print(texts.sweep_text(spec))

# %% [markdown]
# ## The plan
#
# Combinations that cannot be trained are found before anything is compiled. One trial, the middle
# one by FLOPs, is timed for some steps; what it compiles is used again by every trial of its shape.

# %%
ended = sum(t.state in journal.ENDS for t in journal.trials(here))
left = max(plan.trials - ended, 0)
print(texts.plan_text(plan, spec, ended))
if count >= 0 and left:
    timing = trials.time_one(*plan.middle, bench)
    print(texts.time_text(plan, timing, spec, min(left, count or math.inf)))

# %% [markdown]
# ## The work
#
# Interrupt it at any time: the trial at hand goes back, and this or another worker takes it up
# where its checkpoint is.

# %%
clock, worked = time.perf_counter(), 0
with journal.Journal(here) as book, interruptible("giving the trial at hand back") as signal:
    if driver == "local":
        boss = drivers.Local(book, spec)
    else:
        boss = drivers.Wandb(book, spec, site, path, drivers.wandb_runs(path))
    for trial, outcome in trials.work(boss, bench, count, population, lambda: signal.stop):
        worked += outcome.state in journal.ENDS
        print(texts.trial_text(trial, outcome, metric), flush=True)
    interrupted = signal.stop
print(f"{worked} trial(s) ended here in {time.perf_counter() - clock:.1f} s; once more: {again}")

# %% [markdown]
# ## All trials

# %%
everyone = journal.trials(here)
if driver == "wandb":
    everyone = server.fetch_runs(site, path, spec)
tables.write_csv(here / "trials.csv", tables.trial_rows(everyone))
tables.write_csv(here / "curves.csv", tables.curve_rows(everyone))
states = [t.state for t in everyone]
counted = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
print(", ".join(counted) or "no trial yet")
for t in everyone:
    if t.state == "failed":
        print(f"failed: {t.assignment}: {t.reason}")
print(tables.leaders(everyone, goal))
print(f"tables: {here / 'trials.csv'}, {here / 'curves.csv'}")

# %% [markdown]
# ## Pictures
#
# The best so far and the learning curves (*pruned* trials, ended early because they lagged behind,
# in grey); for a search also each trial as a line through its parameters, and which parameter
# mattered most.

# %%
best = tables.best_of(everyone, goal)
if best:
    show(pictures.curves(everyone, spec), here / "curves.png")
    show(pictures.best_so_far(everyone, spec), here / "best.png")
    show(pictures.parallel(everyone, spec), here / "parallel.png")
if shares := suggest.importance(spec, everyone):
    show(pictures.importance(shares), here / "importance.png")
    rows = [dict(parameter=name, share=share) for name, share in shares.items()]
    tables.write_csv(here / "importance.csv", rows)

# %% [markdown]
# ## A single change
#
# Two trials that differ in one parameter alone, one over the other: where do their curves part?
# With a random search there is seldom such a pair; a grid has many.

# %%
if pair := laws.single_change(everyone, goal):
    first, second, name = pair
    for t in (first, second):
        change = texts.values_text({name: t.assignment[name]})
        print(f"trial {t.number:3}  {change}  {metric} {t.value:.4f}")
    show(pictures.compared(first, second, spec, name), here / "compared.png")
else:
    print("no two finished trials differ in a single parameter")

# %% [markdown]
# ## Laws
#
# At equal compute, loss over size is a parabola, one per budget. Its minimum is the best size, and
# the minima together say how size and tokens should grow. A formula for the loss from size and
# tokens is fitted to all runs, and the largest budget is predicted from the smaller ones. Where
# rates vary too, the best trial of each size, budget and seed counts. Brackets are 95 % intervals
# of a bootstrap.

# %%
runs = scaling.best_of_each(scaling.runs_of(everyone))
fits, lines = laws.fit_laws(spec, runs)
print("\n\n".join(lines))
if "isoflop" in fits:
    show(pictures.isoflop(fits["isoflop"], metric), here / "isoflop.png")
    show(pictures.frontier(fits["isoflop"], fits.get("parametric")), here / "frontier.png")
if "series" in fits:
    show(pictures.series(runs, fits["series"], metric), here / "series.png")

# %% [markdown]
# The largest budget, predicted by a fit that did not see it:

# %%
if fits and (unseen := scaling.held_out(runs)):
    print(tables.held_out_table(unseen))
    show(pictures.predicted(unseen, metric), here / "held_out.png")
    tables.write_csv(here / "held_out.csv", unseen)
if fits:
    tables.write_csv(here / "runs.csv", runs)
    update_json(here / "laws.json", **json.loads(json.dumps(laws.plain(fits), default=float)))

# %% [markdown]
# ## What each part is worth

# %%
rows, sentence = laws.ablations(spec, everyone)
if rows:
    print(tables.ablation_table(rows) + "\n")
    show(pictures.ablation(rows, metric), here / "ablation.png")
    tables.write_csv(here / "ablation.csv", rows)
print(sentence)

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
mirror.wait()
if interrupted:
    raise Interrupted("interrupted: the trial at hand was given back; run again to go on")

# %% [markdown]
# ## Questions
#
# 1. Two trials differ in seed alone. What does the difference of their losses tell about all other
#    differences?
# 2. Random search and a grid have 16 trials for 4 parameters. How many values of each parameter
#    does either try?
# 3. Hyperband stops trials early that look bad. Which learning rates does it wrong by that?
# 4. At twice the compute, should the model or the text grow, and by how much? (See the parabolas'
#    minima.)
# 5. An ablation's interval contains zero. What may you say about that part, and what not?
#
# ## Where to go next
#
# - Put the best rates into [02_train](02_train.ipynb) as overrides and train for longer.
# - More workers make a sweep faster: run the line under *join it* in other terminals, or this
#   notebook in other tabs with `join` set.
# - Papers: [random search](https://jmlr.org/papers/v13/bergstra12a.html),
#   [Hyperband](https://arxiv.org/abs/1603.06560), [Chinchilla](https://arxiv.org/abs/2203.15556)
#   (the laws).
# - The code: [space](lib/sweeps/space.py), [trials](lib/sweeps/trials.py),
#   [scaling](lib/sweeps/scaling.py)
