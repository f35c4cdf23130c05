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
# # 02 · Train a language model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/rawchat/rawchat/blob/main/02_train.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/rawchat/rawchat/blob/main/02_train.ipynb)
#
# A language model is asked one question, billions of times: *which token comes next?* Here you
# build a small one in forty lines, see what the real one adds to it, plan what a training will
# cost, and run it.
#
# **At the end you have** a checkpoint from which training resumes bit for bit, curves, samples from
# the first step to the last, and you can say where in the model each FLOP goes.
#
# **Hardware and time.** The preset follows the device. Two CPU cores: about five minutes, to about
# 1.25 bits per byte of Python code (on more of it, in 04, 1.30; `xz -9` there 1.84). A free Colab
# v5e-1: `colab_free_v5e`, planned at twenty minutes to an hour. A v6e-1 (*Runtime > Change runtime
# type*, paid): `colab_v6e`, a larger model, three hours or more. TPU figures are the compiler's and
# not measured on a chip; the plan below says what to expect on yours.

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

setup()

# %% cellView="form"
# @title Imports
import math

import jax
import jax.numpy as jnp
import numpy as np

from lib import model, parallel, pictures, pretrain, train
from lib.config import Config
from lib.data.tokenizer import FILE
from lib.data.vocabulary import read_by
from lib.files import path_or_address
from lib.model.products import products_table
from lib.notebook import device_report, flags, join_hosts, parse_steps, secret, show_source
from lib.params import init_params, named_specs, templates
from lib.pictures import show
from lib.preflight.overview import print_overview
from lib.preflight.plan import Payment, count_tokens, epochs_text
from lib.puzzles import check
from lib.runs import enter, results_table
from lib.runtime import ends_within, give_back, host
from lib.train.metrics import column, parse_writers, read_jsonl

# %% cellView="form" tags=["parameters"]
# @title Parameters
# @markdown Name of the run, runs/NAME; empty takes the run whose tokenizer was made last, or begins one
run = ""  # @param {type:"string"}
# @markdown Where runs live: drive, hub:USER/NAME, gs://…, a path; empty: as any notebook here was told, or the secret RAWCHAT_HOME, else this machine
home = ""  # @param ["", "drive"] {"allow-input":true}
# @markdown Starting point for every size and rate; auto picks one for the device
preset = "auto"  # @param ["auto", "cpu_demo", "colab_free_v5e", "colab_free_t4", "colab_v5e", "colab_v6e", "gpu", "gpt2_like", "llama_like", "nanochat_d12", "nanochat_d20", "nanochat_d24"]
# @markdown Layers; width, batch, horizon and rates follow (0: the preset's)
depth = 0  # @param {type:"integer"}
# @markdown Optimizer steps (0: what the preset or the scaling rules say)
num_steps = 0  # @param {type:"integer"}
# @markdown What to read: a name, or a path or glob of .txt .md .py .jsonl .parquet files; empty: what the tokenizer read
source = ""  # @param ["", "stdlib", "stdlib_with_tests", "climbmix", "fineweb_edu", "tinystories"] {allow-input: true}
# @markdown Any other Config field by name, such as: optimizer=adamw mlp=swiglu matrix_lr=0.01
overrides = ""  # @param {type:"string"}
# @markdown When the run was trained before: continue it, start it afresh (the old one is set aside), or stop
if_exists = "continue"  # @param ["continue", "fresh", "stop"]
# @markdown Hours that this session lasts: it saves and stops five minutes before (0: 12 in Colab, 9 on Kaggle, else for ever)
session_hours = 0.0  # @param {type:"number"}
# @markdown Writers besides metrics.jsonl: console, tensorboard, wandb:online, wandb:offline, otlp:http://HOST:4318
writers = "console"  # @param {type:"string"}

# %% cellView="form" tags=["parameters"]
# @title Advanced
# @markdown Rows per forward pass: preset, auto (searched: with rematerialisation and blocks, the fastest that fits this device), both for
# @markdown each device of several, or a number for all together
microbatch = "preset"  # @param ["preset", "auto"] {allow-input: true}
# @markdown How this device is paid for; prices are in lib/chips.py, with their date: check them
pay = "on-demand"  # @param ["on-demand", "flex-start", "spot", "colab"]
# @markdown Dollars per device and hour, instead of that table's (0: the table's)
price_per_hour = 0.0  # @param {type:"number"}
# @markdown Training shards to download of a source from the Hub, about 100 MB each (0: as many as the plan needs)
shards = 0  # @param {type:"integer"}
# @markdown How documents fill rows: bestfit wastes nearly nothing, reference is nanochat's, stream cuts anywhere
packing = "bestfit"  # @param ["bestfit", "reference", "stream"]
# @markdown Steps between validations (0: ten of them in all, and one every ten minutes)
eval_every = 0  # @param {type:"integer"}
# @markdown Steps between samples, beside steps 1, 10, 100 and 1,000 (0: two of them in all)
sample_every = 0  # @param {type:"integer"}
# @markdown Steps between checkpoints (0: four or five in all, and one every ten minutes)
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
# @markdown At the end give the Colab runtime back, so that nothing more is charged for it
give_runtime_back = False  # @param {type:"boolean"}
# @markdown Hugging Face Hub repository (USER/NAME) that every checkpoint is uploaded to, in the background, with the secret HF_TOKEN; empty uploads nothing
push_to = ""  # @param {type:"string"}
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
writing, tracing = parse_writers(writers), parse_steps(trace)
pretrain.check_leaving(keep, session_hours)
folder, mirror = enter(home, run, needs=FILE, default="default", secret=secret)
wishes = pretrain.Wishes(preset, depth, num_steps, overrides, microbatch, strategy, mesh)

# %% [markdown]
# ## The device
#
# JAX computes on what is there: a TPU, a GPU or the CPU. The tokenizer is 01's; where the run has
# none yet, it is made now.

# %%
device = device_report()
tokenizer = pretrain.open_tokenizer(folder, wishes, source, device)
source = source or read_by(tokenizer)

# %% [markdown]
# ## JAX for people from PyTorch
#
# | PyTorch | here | why |
# |---|---|---|
# | `nn.Module` with hidden parameters | a function of `params`, a dict of arrays (a *pytree*) | everything that affects a result is passed in |
# | `for p in model.parameters()` | `jax.tree.map(f, params)` | a tree of gradients has the same shape as the parameters |
# | `loss.backward()`, `.grad` | `jax.value_and_grad(loss)(params)` returns both | a gradient is the value of a function, not a state |
# | `x[i] = 1` | `x.at[i].set(1)`, a new array | arrays cannot change; the compiler reuses the memory |
# | eager, then `torch.compile` | `jax.jit`, once per shape and dtype | the compiler sees the whole step, fuses it and plans its memory |
# | `torch.manual_seed` | a *key*, split for each use | the same numbers on one chip or on eight |
# | a loop over layers | weights stacked along a first axis, and `jax.lax.scan` | one layer is compiled, not twenty |
# | `optimizer.step()` in place | `state = step(state, batch)`, the old state *donated* | its memory is used again, as if in place |
# | `loss.item()` waits | so does `float(loss)`; the call before it did not | the next step can be sent before this one is done |

# %% [markdown]
# ## A model in forty lines
#
# Before the real thing, the whole idea on one page. A vector per token (the *residual stream*), to
# which each layer adds what it finds out. Letters of a name are its axes: **B** batch, **T** query
# position, **S** key position, **D** width, **N** query heads, **K** key/value heads (here as
# many), **H** head width, **F** width of the MLP, **V** vocabulary.
#
# - **norm**: $x / \sqrt{\mathrm{mean}(x^2) + \epsilon}$, so that no layer drowns another
#   ([RMSNorm](https://arxiv.org/abs/1910.07467), without weights; $\epsilon$ is float32's machine
#   epsilon, as in PyTorch). Queries and keys are normed too
#   ([QK norm](https://arxiv.org/abs/2010.04245)), so that no score explodes.
# - **rotary**: channel $i$ and channel $i + H/2$ are a pair, turned by minus an angle that grows
#   with the position, each pair at its own speed; a query times a key then knows how far apart they
#   are ([Su et al.](https://arxiv.org/abs/2104.09864))
# - **attention**: $\mathrm{softmax}(q k^\top / \sqrt H + \mathrm{mask})\,v$; the mask hides the
#   future ([Vaswani et al.](https://arxiv.org/abs/1706.03762))
# - **relu²**: $\max(0, x)^2$ between two matrices ([Primer](https://arxiv.org/abs/2109.08668))
#
# The weights of all layers are stacked in one array, the layer as first axis: `stack[i]` are those
# of layer i.


# %%
def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1.1920929e-07)


def rotary(x_BTNH, base=100_000):
    half = x_BTNH.shape[-1] // 2
    position_T11 = jnp.arange(x_BTNH.shape[1])[:, None, None]
    angle = position_T11 * base ** (-jnp.arange(half) / half)
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)


# %%
def attention(q_BTNH, k_BSNH, v_BSNH):
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / math.sqrt(q_BTNH.shape[-1])
    length = q_BTNH.shape[1]
    visible_TS = jnp.arange(length)[:, None] >= jnp.arange(length)
    weights_BNTS = jax.nn.softmax(jnp.where(visible_TS, scores_BNTS, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH)


# %%
def layer(x_BTD, w):
    h_BTD = norm(x_BTD)
    q, k, v = (jnp.einsum("BTD,DNH->BTNH", h_BTD, w[name]) for name in ("wq", "wk", "wv"))
    o_BTNH = attention(norm(rotary(q)), norm(rotary(k)), v)
    x_BTD = x_BTD + jnp.einsum("BTNH,NHD->BTD", o_BTNH, w["wo"])
    a_BTF = jnp.square(jax.nn.relu(jnp.einsum("BTD,DF->BTF", norm(x_BTD), w["w_in"])))
    return x_BTD + jnp.einsum("BTF,FD->BTD", a_BTF, w["w_out"])


def small_model(params, tokens_BT):
    x_BTD = norm(params["embed"][tokens_BT])
    for i in range(len(params["blocks"]["wq"])):
        x_BTD = layer(x_BTD, {name: stack[i] for name, stack in params["blocks"].items()})
    return norm(x_BTD) @ params["head"]


# %% [markdown]
# Is that really the model? `lib.model.forward` with all that the next section adds switched off
# must give the same logits. (In a new model `wo` and `w_out` are zero, so that its layers add
# nothing and a mistake would not show; here all weights are random.)

# %%
plain = Config.from_depth(
    2, n_embd=64, n_head=2, n_kv_head=2, head_dim=32, vocab_size=64, sequence_len=32, softcap=0.0,
    window_pattern="L", qk_scale=1.0, resid_scales=False, x0_scales=False, value_embeds=False,
    smear=False, backout=False, compute_dtype="float32", attention="einsum",
)  # fmt: skip
rng = np.random.default_rng(0)
plain_params = jax.tree.map(
    lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), templates(plain)
)
tokens = rng.integers(64, size=(2, 32))
# compiled whole: without `jit` each operation would be compiled alone
ours, _ = jax.jit(model.forward, static_argnums=1)(plain_params, plain, tokens)
difference = jnp.abs(jax.jit(small_model)(plain_params, tokens) - ours).max()
print(f"largest difference of the logits: {difference:.1e}", "ok" if difference < 1e-4 else "FAIL")

# %% [markdown]
# ## The real model
#
# The same layer, with what [nanochat](https://github.com/karpathy/nanochat) and the
# [modded-nanogpt](https://github.com/KellerJordan/modded-nanogpt) speed runs found to pay:
#
# - **scales**: each layer scales the stream (`resid_scale`) and mixes the first embedding back in
#   (`x0_scale`)
# - **value embeddings**: in every other layer the values get an embedding of the token itself, let
#   in by a *gate* of each head: knowledge about single tokens for almost no FLOPs, a lookup, paid
#   for in memory
# - **smear**: a gated share of the token before, so that layer 0 already knows pairs of tokens
# - **backout**: a share of the middle layer is subtracted at the end: what was only needed on the
#   way
# - **grouped heads**: several query heads share a key and a value head, so that the cache of keys
#   and values, which a chat keeps, is smaller ([GQA](https://arxiv.org/abs/2305.13245))
# - **windows**: most layers see only the near past (`S`, a quarter of the row, at least 128 keys),
#   some all of it (`L`). Windows add up: what layer 1 sees has seen what layer 0 saw. The last
#   layer is always long.
# - **softcap** bends the logits, $15 \tanh(x / 15)$, and **qk_scale** makes the scores of normed
#   queries and keys larger
#
# On one device `gather`, `enter` and `leave` do nothing: they say where several devices talk.
# `grad_barrier` changes no number: it only orders the backward pass, to save memory.

# %%
show_source(model.transformer.block, model.transformer.self_attention)

# %% [markdown]
# **A puzzle:** the mask of a *windowed* layer. May the query at position `t` see the key at
# position `s`, when it sees itself and `window` keys before it? (`None`: all of the past.)
#
# <details><summary>Hint</summary>
#
# Two conditions: the key is not in the future, and not more than <code>window</code> positions
# back.
#
# </details>


# %%
def visible(t, s, window):
    """Whether query t sees key s."""
    return True  # your code here


solved = check("mask", visible)

# %% [markdown]
# ## The plan
#
# One dial, `depth`, sets width, heads, batch, horizon and learning rates by scaling rules; any
# field of `Config` can be set by name under `overrides`. The text decides how long: a small one is
# not read a hundred times.

# %%
config = pretrain.choose_model(wishes, device, tokenizer)
shards = shards or pretrain.shards_for(folder, source, config, if_exists)
text = pretrain.open_text(source, tokenizer, shards, packing, eval_bytes, mirror)
config = pretrain.fit_text(config, text, wishes)

# %% [markdown]
# Where checkpoints go, and on which devices. A run that was begun before continues, unless a
# changed setting would mix two experiments.

# %%
store = path_or_address(checkpoints) if checkpoints else folder / "checkpoints"
sender = pretrain.HomeSender(mirror, push_to, store, tokenizer)
past = pretrain.find_past(folder, store, if_exists, config, text)
config, layout = pretrain.share_out(config, wishes, device, past)
cores = pretrain.core_measurement(config, layout, tokenizer, core_every, core_bundle, core_limit)

# %% [markdown]
# Will it fit, how fast, what will it cost? From shapes alone, before anything is compiled. For a
# TPU that you don't have yet, `python -m lib.preflight --depth 20 --chip v6e-1` asks its compiler,
# on any Linux machine; `python -m lib.preflight --dashboard` writes
# [a page of sliders](docs/before-you-pay.md) for every shape on every chip.

# %%
plan, memory = print_overview(config, layout, device, Payment(pay, price_per_hour).at(host()))
plan = plan._replace(tokens_there=count_tokens(text.train))
print(epochs_text(plan))

# %% [markdown]
# Where the FLOPs go. Each product of a token with a weight of W numbers takes 2 W forward and 4 W
# backward, for the gradients of the input and of the weight. Attention has no weight: each query
# meets the keys in its window in two products, $qk^\top$ and its use on the values, 12 N H FLOPs
# for each key (the row shows the shape of the scores). The sum is the plan's *FLOPs per token*.

# %%
print(products_table(config))

# %% [markdown]
# And what each kind of layer may look at. White is hidden: the future, and what lies before the
# window.

# %%
show(pictures.masks(config.windows, config.sequence_len), folder / "plots" / "masks.png")

# %% [markdown]
# ## The data
#
# Documents are tokenised in processes of their own and cached; rows of one length are packed from
# them, each beginning with `<|bos|>`. This is the beginning of the first row, as the model will see
# it.

# %%
first_inputs, waste = text.first_rows(config)
print(tokenizer.decode(first_inputs[0][:120].tolist()))
print("\npacking: " + ", ".join(f"{share:.2%} {what}" for what, share in waste.items()))

# %% [markdown]
# ## The parameters
#
# Every weight, how it is drawn, and the optimizer group it belongs to. Matrices are trained by
# [Muon](https://kellerjordan.github.io/posts/muon/): in essence the step is the momentum with all
# its singular values set to about 1, so that every direction of a matrix moves alike. Embeddings,
# head and scalars are trained by [AdamW](https://arxiv.org/abs/1711.05101).

# %%
print(f"{'weight':20} {'shape':22} {'axes':28} {'drawn':22} group")
for name, spec in named_specs(config):
    axes = " ".join(axis or "-" for axis in spec.axes)
    drawn = " ".join(f"{x:.3g}" if isinstance(x, float) else x for x in spec.init)
    print(f"{name:20} {str(spec.shape):22} {axes:28} {drawn:22} {spec.group}")

# %% [markdown]
# ## One step
#
# Training is four lines: take rows, compute the loss and its gradient, move the parameters against
# it, go on. Here with the small model and the simplest optimizer (`p - lr * g`), on rows of the
# real text.
#
# **Guess before you run it:** what is the loss of a model that knows nothing? It gives each of V
# tokens the same probability, and the loss is the mean of $-\ln p$.


# %%
def loss(params, inputs_BT, targets_BT):
    logp_BTV = jax.nn.log_softmax(small_model(params, inputs_BT))
    return -jnp.take_along_axis(logp_BTV, targets_BT[..., None], axis=-1).mean()


@jax.jit
def sgd_step(params, inputs_BT, targets_BT):
    value, grads = jax.value_and_grad(loss)(params, inputs_BT, targets_BT)
    return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), value


# %%
tiny = plain.replace(vocab_size=tokenizer.vocab_size)
params, seen = init_params(0, tiny), jnp.asarray(first_inputs[:4, :33])
print(f"knowing nothing: ln {tiny.vocab_size} = {math.log(tiny.vocab_size):.3f}")
for _ in range(4):
    params, value = sgd_step(params, seen[:, :-1], seen[:, 1:])
    print(f"loss {value:.3f}")

# %% [markdown]
# The real step is this one. Where a batch doesn't fit, it is taken in *microbatches*: their
# gradients are added up and divided once by the number of targets, so that the step is the same up
# to rounding. On several devices each takes its share of the rows, and the sums are exchanged once
# per step.

# %%
show_source(train.train_step)

# %% [markdown]
# Compiling is the slow part, once; the compiler also says exactly how much memory the step needs.

# %%
training = pretrain.open_run(config, layout, text, folder, store, past, device)

# %% [markdown]
# ## The loop
#
# What else a loop has to do, `training.steps` does around those four lines: it sends the next step
# to the device before it reads the numbers of the last one, so that the device never waits; it
# measures, saves and logs when that is due; at Ctrl-C, SIGTERM or the end of the session it saves
# and stops; and it stops a training that diverges. Run the cell again, or the notebook again, and
# it goes on. `finish` reads the newest checkpoint and compares it with the state in memory: a write
# that was cut short or rounded would otherwise show only when you resume.

# %%
last = config.num_steps
validated = eval_every or max(1, last // 10)
measurements = [
    pretrain.validation(training, text, validated),
    pretrain.sampling(training, text, sample_every or max(1, last // 2)),
    *cores,
]
saving = train.Saving(
    save_every or train.saved_every(4, validated, last),
    keep=keep,
    then=sender,
    sent_at=sender.sent_at,
)

# %%
for step in training.steps(
    measurements,
    saving,
    writers=writing,
    trace=tracing,
    stop=lambda: ends_within(300, session_hours),
):
    if "samples" in step.metrics and first:
        print(f"\nstep {step.step}: {step.metrics['samples'][:120]!r}")
same = training.finish()

# %% [markdown]
# Where several processes train together, only the first works from here on; the others stop.

# %%
params = parallel.whole(layout, training.state.params, config.dtype)
samples = pretrain.write_samples(params, config, text)
if not first:
    raise SystemExit

# %% [markdown]
# ## Curves
#
# Look at the loss: a steep fall while the commonest words are learnt, then a long slope. The dots
# are text that the model never saw. Where they lie above the training curve, it knows its own text
# better than others, and the gap grows with every pass over a small corpus; only the dots tell
# whether more training helps. (The two are not quite the same measure: training counts the ends of
# documents too, which nothing in a text foretells.) The learning rate warms up, so that the first
# wild gradients do no harm, and falls to the end, where small steps settle into the valley.
# Throughput should be flat; on a shared machine it is not.

# %%
rows = read_jsonl(folder / "metrics.jsonl")
show(pictures.training_curves(rows), folder / "plots" / "training.png")

# %% [markdown]
# ## Samples
#
# The same beginning at growing steps: first noise, then common words, then sentences or lines of
# code. Below it, what the model writes at the end.

# %%
for n, written in zip(*column(rows, "samples")):
    print(f"step {n:>6}  {written[:100]!r}")
print("\n" + "\n\n".join(samples))

# %% [markdown]
# ## Checks

# %%
_, losses = column(rows, "loss")
for what, good in pretrain.checks(training, params, losses, same).items():
    print("ok  " if good else "FAIL", what)

# %% [markdown]
# ## Results
#
# `val_bpb` is the headline: bits per byte of text that the model never saw, comparable between
# tokenizers. 04 measures more text, with an error.

# %%
pretrain.write_results(training, text, wishes, device, plan, samples)
print(results_table(folder))
sender.wait()
if give_runtime_back:
    give_back()

# %% [markdown]
# ## Questions
#
# 1. At what length of the rows does attention take more FLOPs than the head? (Windows and all.)
# 2. Why is the very first loss so near to ln V, whatever the text? (See how the head is drawn.)
# 3. A batch of 16 rows is computed as 4 microbatches of 4. What stays the same, and what do you pay
#    and win?
# 4. The last layer sees the whole row. If it were windowed too, how could it still know of the
#    first token?
# 5. Why is a checkpoint read back and compared bit for bit, and not only written?
#
# ## Where to go next
#
# - [04_eval_chat](04_eval_chat.ipynb) measures this checkpoint, teaches it to chat and lets you
#   talk to it.
# - Longer or larger: set `depth`, `num_steps` or `source` and take a new run name.
#   [03_worker](03_worker.ipynb) finds out what pays.
# - Papers:
#   [GPT-2](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf),
#   [Chinchilla's scaling laws](https://arxiv.org/abs/2203.15556),
#   [how to scale](https://jax-ml.github.io/scaling-book/).
# - The code: [transformer](lib/model/transformer.py), [step](lib/train/step.py),
#   [run](lib/train/run.py), [optim](lib/train/optim.py), [packing](lib/data/packing.py)
