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
# # 04 · Measure a model and write with it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/rawchat/rawchat/blob/main/04_eval_chat.ipynb)
#
# Loads a checkpoint of `02_train`, measures how well it predicts text that it never saw, and lets it continue yours.
#
# **At the end you have** bits per byte beside what `gzip -9` and `xz -9` need for the very same bytes, a picture of what
# the model finds easy and hard, and completions with your own sampling settings.
#
# **Hardware and time:** whatever trained the model; about a minute on two CPU cores for the default.

# %% [markdown]
# ## Set-up

# %%
# @title Get the code (in Colab; elsewhere you have it)
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.exists("lib/notebook.py"):
    if not os.path.exists("rawchat"):
        subprocess.run(["git", "clone", "--depth", "1", "https://github.com/rawchat/rawchat"], check=True)
    os.chdir("rawchat")
    sys.path.insert(0, os.getcwd())
from lib.notebook import setup

setup()

# %%
import json
import time

import jax
import numpy as np

from lib import checkpoint, data, evals, generate
from lib.config import Config
from lib.files import UserError, update_json
from lib.notebook import device_report, flags, open_run, results_table, show, subplots
from lib.params import count_params, templates
from lib.tokenizer import FILE, load_tokenizer

# %% tags=["parameters"]
# @title Parameters
# @markdown Name of the run, runs/NAME; empty takes the run trained last
run = ""  # @param {type:"string"}
# @markdown Checkpoint: empty for the run's newest, best for its lowest validation loss, or a folder, gs:// or hf://USER/NAME address
ckpt = ""  # @param ["", "best"] {allow-input: true}
# @markdown Text to measure on: a name, or a path or glob; empty takes what the model was trained on (its held-out split)
source = ""  # @param {type:"string"}
# @markdown Bytes of text to measure on
eval_bytes = 1000000  # @param {type:"integer"}
# @markdown Text to continue
prompt = "def fibonacci(n):\n"  # @param {type:"string"}
# @markdown Tokens to write at most
max_tokens = 96  # @param {type:"integer"}
# @markdown Randomness: 0 always takes the likeliest token, 1 draws from the model's own distribution
temperature = 0.7  # @param {type:"number"}
# @markdown Draw from this many likeliest tokens only (0: from all)
top_k = 50  # @param {type:"integer"}
# @markdown Draw from the likeliest tokens that hold this share of the probability (1: from all)
top_p = 0.95  # @param {type:"number"}
# @markdown The same seed writes the same text
seed = 0  # @param {type:"integer"}
# @markdown Completions of the prompt
num_samples = 2  # @param {type:"integer"}

# %%
globals().update(flags(globals()))
hub = ckpt.startswith("hf://")
if hub:
    tokenizer = load_tokenizer(f"hf:{ckpt.removeprefix('hf://')}")
    folder = open_run(run or ckpt.rpartition("/")[2])
else:
    folder = open_run(run, "checkpoints" if ckpt in ("", "best") else FILE)
    tokenizer = load_tokenizer(folder)
device = device_report()

# %% [markdown]
# ## The model

# %%
path = {"": folder, "best": checkpoint.best(folder / "checkpoints")}.get(ckpt, ckpt)
if path is None:
    raise UserError(f"no checkpoint in {folder} was validated, so none is best: leave ckpt empty for the newest")
meta = checkpoint.read_meta(path)
config = Config.from_dict(meta["config"])
if meta["tokenizer"] != tokenizer.fingerprint:
    raise UserError(f"{path} was trained with another tokenizer than the one at hand: name the run it belongs to")
params, _ = checkpoint.restore(path, templates(config), only="params")
params = jax.device_put(params)
source = source or meta["settings"]["source"]
print(f"{path}: step {meta['step']} of {config.num_steps}, {count_params(config)['total']:,} parameters, "
      f"{config.n_layer} layers x {config.n_embd}, {config.dtype} on {device['kind']}")

# %% [markdown]
# ## Bits per byte
#
# How many bits the model needs for each byte of held-out text: comparable between models with any tokenizer, and with file
# compressors, which know nothing of the language but read the very same bytes.

# %%
texts = data.head(data.documents(source, "val"), eval_bytes)
batches = data.batches(data.tokens_of(texts, tokenizer), config.microbatch, config.sequence_len, loop=False)
clock = time.perf_counter()
score = evals.bits_per_byte(params, config, batches, tokenizer.token_bytes)
seconds = time.perf_counter() - clock
packers = data.baselines(texts)
print(f"{score['bytes']:,} of {packers['bytes']:,} bytes in {len(texts)} documents of {source}, {seconds:.1f} s")
print(f"model    {score['bpb']:.4f} ± {score['stderr']:.4f} bits per byte (standard error over rows)")
print(f"gzip -9  {packers['gzip_bpb']:.4f}\nxz -9    {packers['xz_bpb']:.4f}")

# %% [markdown]
# ## What it finds easy and hard
#
# Each token of one held-out text, coloured by how many bits it cost: blue was expected, red was a surprise.

# %%
ids = tokenizer.encode(texts[0], bos=True)[: min(config.sequence_len, 240) + 1]
row = np.full((2, config.sequence_len), -1, np.int32)
row[0], row[1, : len(ids) - 1] = 0, ids[1:]
row[0, : len(ids) - 1] = ids[:-1]
bits = np.asarray(evals.token_losses(params, config, row[:1], row[1:]))[0, : len(ids) - 1] / np.log(2)

figure, axis = subplots(size=(9, 4.5))
axis.set_axis_off()
x = y = wide = 0
for token, cost in zip(ids[1:], bits):
    for piece in tokenizer.decode([token]).replace("\t", "    ").splitlines(keepends=True):
        text = piece.rstrip("\r\n")
        if x + len(text) > 110:
            x, y = 0, y + 1
        if text:
            axis.text(x, -y, text, family="monospace", fontsize=7, va="top", parse_math=False,
                      bbox=dict(facecolor=(1, 0.3, 0.2, min(cost / 16, 0.8)) if cost > 4 else (0.2, 0.5, 1, 0.3 - cost / 16),
                                edgecolor="none", pad=0.6))
        wide = max(wide, x + len(text))
        x, y = (0, y + 1) if piece != text else (x + len(text), y)
axis.set(xlim=(0, wide), ylim=(-y - 1, 0.5), title=f"bits per token: {bits.mean():.2f} on average")
show(figure, folder / "plots" / "surprise.png")

# %% [markdown]
# ## Completions
#
# Change the prompt or the sampling settings above and run this cell again.

# %%
prompt_ids = tokenizer.encode(prompt, bos=True)
clock = time.perf_counter()
new = generate.generate(params, config, [prompt_ids] * num_samples, max_tokens, temperature, top_k, top_p, seed,
                        stop=(tokenizer.bos,))
seconds = time.perf_counter() - clock
completions = [prompt + tokenizer.decode(ids) for ids in new]
for text in completions:
    print(text, "\n" + "─" * 60)
print(f"{sum(map(len, new))} tokens in {seconds:.1f} s, compilation included where the shape is new")

# %% [markdown]
# ## Results

# %%
update_json(folder / "results.json", val_bpb=score["bpb"], val_bpb_stderr=score["stderr"], val_bytes=score["bytes"],
            gzip_bpb=packers["gzip_bpb"], xz_bpb=packers["xz_bpb"], samples=completions)
print(results_table(folder))

# %% [markdown]
# ## Where to go next
#
# A model that predicts better: train longer, larger or on other text in `02_train`. A checkpoint from the Hugging Face Hub is
# loaded by giving its address as the checkpoint above.
