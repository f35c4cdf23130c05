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
# # 02 · Pretrain a GPT
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/rawchat/rawchat/blob/main/02_train.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/rawchat/rawchat/blob/main/02_train.ipynb)
#
# From random weights to a model of language, in raw JAX: parameters are a plain dict, the model is a function, the training
# step is one compiled program.
#
# **At the end you have** a checkpoint in `runs/NAME/checkpoints` that survives crashes and resumes bit for bit, curves of
# loss and throughput, and samples of what the model writes.
#
# **Hardware and time:** the preset follows the device. Two CPU cores: some minutes (`cpu_demo`). One Colab TPU v5e or v6e, or
# one GPU: hours; the plan below says what to expect before anything is spent. In Colab this notebook asks for a TPU v5e-1, which
# free accounts have too; a v6e-1 (Runtime > Change runtime type, paid) has 4.7 times its FLOP/s.

# %% [markdown]
# ## Set-up

# %%
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

setup()

# %%
import math
import platform
import time

import jax
import numpy as np

from lib import data, evals, model, parallel, pictures, report, train
from lib.config import Config
from lib.data.tokenizer import FILE, load_tokenizer
from lib.data.vocabulary import read_by
from lib.evals import core
from lib.files import UserError, choose, is_remote, update_json
from lib.generate import Sampling, generate
from lib.interrupts import interruptible
from lib.notebook import (
    device_report,
    flags,
    join_hosts,
    parse_overrides,
    parse_steps,
    secret,
)
from lib.params import count_params, named_specs
from lib.pictures import show
from lib.preflight.memory import choose_layout, parse_mesh, peak_bytes
from lib.preflight.overview import print_overview
from lib.preflight.plan import Payment, compare, count_tokens, epochs_text
from lib.preflight.search import with_microbatch
from lib.recipes import fit_horizon, pick_preset, pick_shards, tokenizer_of
from lib.runs import STAGES, enter, results_table, set_aside
from lib.runtime import ends_within, give_back, host
from lib.train import checkpoint
from lib.train.changes import allowed_changes
from lib.train.due import AT_LEAST_EVERY, SAMPLED_STEPS, Due
from lib.train.metrics import Metrics, column, read_jsonl, trace_window

# %% tags=["parameters"]
# @title Parameters
# @markdown Name of the run, runs/NAME; empty takes the run whose tokenizer was made last, or begins one
run = ""  # @param {type:"string"}
# @markdown Where runs live, the same in all notebooks: empty (this machine), drive, hub:USER/NAME, gs://…, or a path
home = ""  # @param ["", "drive"] {"allow-input":true}
# @markdown Starting point for every size and rate; auto picks one for the device
preset = "auto"  # @param ["auto", "cpu_demo", "colab_free_v5e", "colab_free_t4", "colab_v5e", "colab_v6e", "gpu", "gpt2_like", "llama_like", "nanochat_d12", "nanochat_d20", "nanochat_d24"]
# @markdown Layers; width, batch, horizon and rates follow (0: the preset's)
depth = 0  # @param {type:"integer"}
# @markdown Optimizer steps (0: what the preset or the scaling rules say)
num_steps = 0  # @param {type:"integer"}
# @markdown Any other Config field by name, such as: optimizer=adamw mlp=swiglu matrix_lr=0.01
overrides = ""  # @param {type:"string"}
# @markdown Rows per forward pass: preset, auto (searched: with rematerialisation and blocks, the fastest that fits this device), both for
# @markdown each device of several, or a number for all together
microbatch = "preset"  # @param ["preset", "auto"] {allow-input: true}
# @markdown How this device is paid for; prices are in lib/chips.py, with their date: check them
pay = "on-demand"  # @param ["on-demand", "flex-start", "spot", "colab"]
# @markdown Dollars per device and hour, instead of that table's (0: the table's)
price_per_hour = 0.0  # @param {type:"number"}
# @markdown What to read: a name, or a path or glob of .txt .md .py .jsonl .parquet files; empty: what the tokenizer read
source = ""  # @param ["", "stdlib", "stdlib_with_tests", "climbmix", "fineweb_edu", "tinystories"] {allow-input: true}
# @markdown Training shards to download of a source from the Hub, about 100 MB each (0: as many as the plan needs)
shards = 0  # @param {type:"integer"}
# @markdown How documents fill rows: bestfit wastes nearly nothing, reference is nanochat's, stream cuts anywhere
packing = "bestfit"  # @param ["bestfit", "reference", "stream"]
# @markdown When the run was trained before: continue it, start it afresh (the old one is set aside), or stop
if_exists = "continue"  # @param ["continue", "fresh", "stop"]
# @markdown Steps between validations (0: ten of them in all, and one every ten minutes)
eval_every = 0  # @param {type:"integer"}
# @markdown Steps between samples, beside steps 1, 10, 100 and 1,000 (0: two of them in all)
sample_every = 0  # @param {type:"integer"}
# @markdown Steps between checkpoints (0: four of them in all, and one every ten minutes)
save_every = 0  # @param {type:"integer"}
# @markdown Steps between measurements of CORE, DCLM's 22 tasks (0: none); the bundle is downloaded, about 160 MB, unless given
core_every = 0  # @param {type:"integer"}
# @markdown CORE's evaluation bundle, a folder or zip file; empty downloads it
core_bundle = ""  # @param {type:"string"}
# @markdown Items per CORE task during training, more than the 10 that serve as examples
core_limit = 50  # @param {type:"integer"}
# @markdown Bytes of validation text that a validation reads
eval_bytes = 200000  # @param {type:"integer"}
# @markdown Checkpoints kept besides the best one
keep = 2  # @param {type:"integer"}
# @markdown Where checkpoints go: empty for the run folder, or a Drive path, gs:// or s3:// address that outlives this machine
checkpoints = ""  # @param {type:"string"}
# @markdown Hours that this session lasts: it saves and stops five minutes before (0: 12 in Colab, 9 on Kaggle, else for ever)
session_hours = 0.0  # @param {type:"number"}
# @markdown At the end give the Colab runtime back, so that nothing more is charged for it
give_runtime_back = False  # @param {type:"boolean"}
# @markdown Hugging Face Hub repository (USER/NAME) that every checkpoint is uploaded to, in the background, with the secret HF_TOKEN; empty uploads nothing
push_to = ""  # @param {type:"string"}
# @markdown Writers besides metrics.jsonl: console, tensorboard, wandb:online, wandb:offline, otlp:http://HOST:4318
writers = "console"  # @param {type:"string"}
# @markdown Profile these steps, like 10:12 (open runs/NAME/trace in TensorBoard); empty for none
trace = ""  # @param {type:"string"}
# @markdown How several devices share the work: dp (each holds everything), zero (splits the optimizer's state), fsdp (splits the parameters
# @markdown too), tp (splits each layer); auto: zero if it fits by estimate, else fsdp
strategy = "auto"  # @param ["auto", "dp", "zero", "fsdp", "tp"]
# @markdown Devices on each mesh axis, like data=2 fsdp=4 (axes: data, fsdp, tensor); empty: all on the strategy's own
mesh = ""  # @param {type:"string"}
# @markdown For several hosts, each running this with the same settings: HOST:PORT of process 0, or auto (a TPU slice and Slurm know); empty: one
coordinator = ""  # @param ["", "auto"] {allow-input: true}
# @markdown Number of processes, with a HOST:PORT
host_count = 0  # @param {type:"integer"}
# @markdown Which of them this is, from 0
host_index = -1  # @param {type:"integer"}
# @markdown Seconds that they wait for each other to start
join_timeout = 300.0  # @param {type:"number"}

# %%
globals().update(flags(globals()))
# of several processes this one writes and prints
first = join_hosts(coordinator, host_count, host_index, join_timeout)
folder, mirror = enter(home, run, needs=FILE, default="default", token=lambda: secret("HF_TOKEN"))
trace_start, trace_stop = parse_steps(trace)
mesh_sizes = parse_mesh(mesh)

# %% [markdown]
# ## The device

# %%
device = device_report()
chosen, why = (preset, "asked for") if preset != "auto" else pick_preset(device)
print(f"preset {chosen}: {why}")
parallel.from_first(
    "tokenizer", lambda: tokenizer_of(folder, preset, source, device, bool(host())).fingerprint
)
tokenizer = load_tokenizer(folder)
if source and source != read_by(tokenizer):
    print(f"note: the tokenizer read {read_by(tokenizer)}, and training will read {source}")
source = source or read_by(tokenizer)

# %% [markdown]
# ## The plan
#
# One dial, `depth`, sets width, heads, batch, horizon and learning rates by scaling rules; anything can be overridden by name.

# %%
asked = (
    dict(vocab_size=tokenizer.vocab_size)
    | ({"depth": depth} if depth else {})
    | ({"num_steps": num_steps} if num_steps else {})
)
config = Config.preset(chosen, **asked | parse_overrides(overrides, Config))
shards = shards or pick_shards(source, config.num_steps * config.total_batch_size)
train_tokens = data.open_tokens(source, "train", tokenizer, shards=shards)
if source.startswith("stdlib") and "num_steps" not in asked | parse_overrides(overrides, Config):
    config, why = fit_horizon(config, count_tokens(train_tokens))
    if why:
        print(why)
store = checkpoints or folder / "checkpoints"
saved = parallel.from_first(
    "checkpoint", lambda: (found := checkpoint.latest(store)) and str(found)
)
if push_to:
    if is_remote(store):
        raise UserError(
            f"push_to uploads local checkpoints, and these go to {store}: leave one of the two empty"
        )
    hub_token = secret("HF_TOKEN")
    if first:
        checkpoint.check_hub(push_to, hub_token)
        tokenizer.push_to_hub(push_to, hub_token)
if saved and choose("if_exists", if_exists, ("continue", "fresh", "stop")) == "stop":
    raise UserError(
        f"{folder} was trained before: pass if_exists=continue or fresh, or another run"
    )
if saved and if_exists == "fresh":
    if checkpoints:
        raise UserError(
            f"{checkpoints} holds another training's checkpoints: name an empty folder to start afresh"
        )
    if first:
        old = [*STAGES.values(), "evals", "metrics.jsonl", "config.json"]
        print(f"fresh start: what was there is now in {set_aside(folder, *old)}")
    saved = None
config = with_microbatch(
    config,
    microbatch,
    device,
    keep=parse_overrides(overrides, Config),
    before=checkpoint.read_meta(saved)["config"] if saved else None,
)
grow = microbatch in ("preset", "auto") and "microbatch" not in parse_overrides(overrides, Config)
config, layout, why = choose_layout(
    config, strategy, mesh_sizes, memory=device["memory"], grow=grow
)
print(f"devices     {why}")
ways = layout.size(*parallel.BATCH) if layout else 1  # how many devices share the rows
# what a checkpoint remembers: the rows that one device took at a time, so that it goes on, is measured and fine-tuned on any number of them
portable = config.replace(microbatch=config.microbatch // ways)
settings = dict(source=source, packing=packing, shards=shards)
places = dict(run=str(folder), checkpoints=str(store), tokenizer=tokenizer.fingerprint)
parallel.check_same("settings", portable.to_dict() | settings | places)
# made now, so that a missing bundle stops the run before any compute
measure_core = (
    core.during_training(config, tokenizer, core_bundle or None, limit=core_limit)
    if core_every
    else None
)
if saved or first:
    data.check_text(folder, source, shards, resumed=bool(saved))
if saved:
    meta = checkpoint.read_meta(saved)
    # the text is known by its content, however its path is spelt
    meta["settings"]["source"] = source
    now = portable.to_dict() | settings | {"tokenizer": tokenizer.fingerprint}
    then = (
        Config.from_dict(meta["config"]).to_dict()
        | meta["settings"]
        | {"tokenizer": meta["tokenizer"]}
    )
    changes = allowed_changes(then, now, folder, meta["step"])
    for change in changes.rates:
        print(f"from step {meta['step']} on, {change}")

# %% [markdown]
# ## Will it fit, how fast, what will it cost?
#
# From shapes alone, before anything is compiled. For a TPU that you don't have yet, `python -m lib.preflight --depth 20 --chip v6e-1` asks
# its compiler, which runs on any Linux machine.

# %%
payment = Payment(pay, price_per_hour).at(host())
plan, memory = print_overview(config, layout, device, payment)

# %% [markdown]
# ## The data
#
# Documents are tokenised in processes of their own and cached; rows of one length are packed from them, each beginning
# with `<|bos|>`. Below is the beginning of the first row, as the model will see it.

# %%
validation = data.tokens_of(
    data.head(data.documents(source, "val", shards=shards), eval_bytes), tokenizer
)
plan = plan._replace(tokens_there=count_tokens(train_tokens))
print(epochs_text(plan))
rows = config.total_batch_size // config.sequence_len


def val_batches():
    return data.batches(
        validation, config.microbatch, config.sequence_len, packing=packing, loop=False
    )


def train_batches(cursor):
    """Every process packs the same rows and keeps those of its devices: packing is fast, and the curve the same on any number of them."""
    return data.prefetch(
        data.batches(
            train_tokens,
            rows,
            config.sequence_len,
            packing=packing,
            cursor=cursor,
            seed=config.seed,
        ),
        lambda batch: parallel.put_batch(layout, batch, whole=True),
    )


first_inputs, _, first_cursor = next(
    data.batches(train_tokens, rows, config.sequence_len, packing=packing, seed=config.seed)
)
print(tokenizer.decode(first_inputs[0][:120].tolist()))
print(
    "\npacking of the first batch: "
    + ", ".join(f"{share:.2%} {what}" for what, share in data.waste(first_cursor).items())
)

# %% [markdown]
# ## The parameters

# %%
for name, spec in named_specs(config):
    print(f"{name:24} {str(spec.shape):24} {' '.join(map(str, spec.axes)):32} {spec.group}")

# %% [markdown]
# ## The first step
#
# Compiling is the slow part of it, once; the compiler also says exactly how much memory the step needs.

# %%
template = train.state_template(config, layout)
batch_template = jax.ShapeDtypeStruct((rows, config.sequence_len), np.int32)
clock = time.perf_counter()
step_fn = (
    train.make_train_step(config, layout).lower(template, batch_template, batch_template).compile()
)
compile_seconds = time.perf_counter() - clock
used = step_fn.memory_analysis()
peak_memory = peak_bytes(step_fn)
print(
    f"compiled in {compile_seconds:.1f} s; the step needs {peak_memory / 2**30:.2f} GiB{' a device' if layout else ''} "
    f"({used.temp_size_in_bytes / 2**30:.2f} of it temporary)"
)

cursor, history_of_changes = None, []
if saved:
    history_of_changes = meta.get("changes", []) + [
        [meta["step"], change] for change in changes.rates
    ]
    state, meta = checkpoint.restore(saved, template)
    if changes.rates:
        state = train.with_rates(state, config)
    cursor = meta["cursor"]
    print(f"continuing {saved} at step {int(state.step)} of {config.num_steps}")
else:
    state = train.init_state(config, layout)
if first:
    portable.save(folder / "config.json")
token_losses = train.token_losses_on(layout) if layout else evals.token_losses

# %% [markdown]
# ## The loop
#
# The numbers of a step are read after the next one was sent to the device, so that it never waits.

# %%
last = config.num_steps
by_clock = AT_LEAST_EVERY if jax.process_count() == 1 else 0  # hosts' clocks differ
due = dict(
    eval=Due(eval_every or max(1, last // 10), last, by_clock),
    core=Due(core_every, last) if core_every else lambda _: False,
    sample=Due(sample_every or max(1, last // 2), last, steps=SAMPLED_STEPS),
    save=Due(save_every or max(1, last // 4), last, by_clock),
)
prompts = (
    ["def ", "import ", "# The ", "class "]
    if source == "stdlib"
    else ["The ", "Once upon a time", "In the year", "I think"]
)
prompt_ids = [tokenizer.encode(p, bos=True) for p in prompts]
done = int(state.step)
samples, val_bpb, seconds, stopping, todo, history = [], None, 0.0, False, {}, {}


def write_samples(params):
    params = parallel.whole(layout, params, config.dtype)
    sampling = Sampling(48, temperature=0.8, top_k=50, seed=config.seed, stop=(tokenizer.bos,))
    new = generate(params, config, prompt_ids, sampling)
    return [p + tokenizer.decode(ids) for p, ids in zip(prompts, new)]


def pause(n):
    """Whether to look at the state after n steps, and what for."""
    global stopping
    stopping = parallel.stop_together(n, signal.stop or ends_within(300, session_hours))
    todo[n] = {what for what, is_due in due.items() if is_due(n)}
    return stopping or bool(todo[n]) or n in (trace_start - 1, trace_stop)


with (
    Metrics(
        folder,
        config.num_steps,
        [w for w in writers.split(",") if w],
        resumed=done if saved else None,
        config=config.to_dict(),
    ) as metrics,
    checkpoint.Saver(store, keep=keep, size=checkpoint.nbytes(state)) as saver,
    interruptible() as signal,
    trace_window(folder, trace_start, trace_stop) as tick,
):
    tick(done + 1, state)
    try:
        for step in train.steps(step_fn, state, train_batches(cursor), config, pause=pause):
            values, n = step.metrics, step.step
            todo_now = todo.pop(n)
            if device["flops"]:
                values["mfu"] = (
                    values["tokens_per_s"]
                    * config.flops_per_token
                    / (device["flops"] * device["count"])
                )
            seconds += values["step_time"]
            stop = stopping and step.state is not None
            if step.state is not None:
                state = step.state
                if "eval" in todo_now:
                    measured = evals.bits_per_byte(
                        state.params,
                        config,
                        val_batches(),
                        tokenizer.token_bytes,
                        losses_of=token_losses,
                    )
                    val_bpb = values["val_bpb"] = measured.bpb
                    values["val_loss"] = measured.loss
                if "core" in todo_now:
                    values |= measure_core(parallel.whole(layout, state.params, config.dtype))
                if "sample" in todo_now:
                    samples = history[n] = write_samples(state.params)
                    values["samples"] = "\n\n".join(samples)
                    print(f"\nstep {n}: {samples[0]}")
                if "save" in todo_now or stop:
                    saver.save(
                        n,
                        state,
                        dict(
                            config=portable.to_dict(),
                            ways=ways,
                            cursor=step.cursor,
                            settings=settings,
                            tokenizer=tokenizer.fingerprint,
                            loss=values["loss"],
                            changes=history_of_changes,
                        ),
                        metric=values.get("val_bpb"),
                    )
                    mirror.send()
                    if push_to and first:
                        upload = checkpoint.upload_to_hub(saver.wait(), push_to, hub_token)
                tick(n + 1, state)
            metrics.log(n, values)
            if stop:
                break
    except UserError as e:
        saver.wait()
        raise UserError(
            f"{e} (the last good checkpoint is {checkpoint.latest(checkpoints or folder / 'checkpoints')})"
        ) from e
parallel.from_each("end", int(state.step))  # until the last one has written
if int(state.step) < config.num_steps:
    raise UserError(
        f"stopped at step {int(state.step)} and saved: run again with the same settings to go on"
    )

# %% [markdown]
# ## What was saved
#
# The newest checkpoint is read back and compared. It is the last thing that several hosts do together.

# %%
back, _ = checkpoint.restore(checkpoint.latest(store), template)
same = parallel.equal(back, state)
samples = samples or write_samples(state.params)
params = parallel.whole(layout, state.params, config.dtype)
if not first:
    raise SystemExit

# %% [markdown]
# ## Curves
#
# Look at the loss: a steep fall while the commonest words are learnt, then a long slope. The training curve lies a little above
# the validation one though that text is new: it also counts where a document ends, which nothing in the text foretells, and its
# running mean remembers worse times.

# %%
rows_logged = read_jsonl(folder / "metrics.jsonl")
_, losses = column(rows_logged, "loss")
show(pictures.training_curves(rows_logged), folder / "plots" / "training.png")

# %% [markdown]
# ## Samples
#
# The same beginning at growing steps: first noise, then common words, then sentences or lines of code. Below it, the others
# at the end.

# %%
for n, written in history.items():
    print(f"step {n:>6}  {written[0]!r}")
print("\n" + "\n\n".join(samples))

# %% [markdown]
# ## Checks

# %%
_, throughput = column(rows_logged, "tokens_per_s")
speed = float(np.median(throughput[1:] or throughput))
probe = np.asarray(first_inputs[:1])
changed = np.where(
    np.arange(probe.shape[1]) < probe.shape[1] // 2, probe, (probe + 1) % config.vocab_size
)
logits = [model.forward(params, config, p)[0][0, : probe.shape[1] // 2] for p in (probe, changed)]
checks = {
    f"first loss {losses[0]:.2f} is near ln(vocabulary) = {math.log(config.vocab_size):.2f}": abs(
        losses[0] - math.log(config.vocab_size)
    )
    < 0.5,
    f"loss went down to {losses[-1]:.2f}": losses[-1] < losses[0],
    "the saved checkpoint equals the state bit for bit": same,
    "later tokens do not change earlier predictions": bool(
        np.array_equal(*map(np.asarray, logits))
    ),
}
for what, good in checks.items():
    print("ok  " if good else "FAIL", what)

# %% [markdown]
# ## Results

# %%
results = dict(
    preset=chosen,
    source=source,
    params=count_params(config)["total"],
    steps=config.num_steps,
    train_tokens=config.num_steps * config.total_batch_size,
    train_tokens_per_s=round(speed),
    train_loss=losses[-1],
    step_memory_bytes=peak_memory,
    samples=samples,
    device=device["kind"],
    devices=device["count"],
    sharding=layout.strategy if layout else "none",
    plan=plan.to_dict(),
    began=rows_logged[0]["time"],
    jax=jax.__version__,
    python=platform.python_version(),
    commit=report.commit_id(),
)
if done < config.num_steps:  # a finished run that is only looked at again keeps what it measured
    results |= dict(
        val_bpb=val_bpb,
        val_source=source,
        compile_seconds=round(compile_seconds, 1),
        train_seconds=round(seconds, 1),
        packing_waste=data.waste(step.cursor),
    )
update_json(folder / "results.json", **results)
print(
    compare(
        plan,
        seconds,
        (int(state.step) - done) * config.total_batch_size,
        config.flops_per_token,
        device["flops"] and device["flops"] * device["count"],
    )
)
print(results_table(folder))
if push_to and int(state.step) > done:
    print(f"last checkpoint uploaded: {upload.result()}")
mirror.wait()
if give_runtime_back:
    give_back()

# %% [markdown]
# ## Where to go next
#
# `04_eval_chat` measures this checkpoint in bits per byte and lets you write with it. To train longer or larger, set `depth`,
# `num_steps` or `source` above and take a new run name; to go on after an interruption, run all cells again.
