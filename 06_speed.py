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
# # 06 · How fast is this chip, and what holds it back?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/rawchat/rawchat/blob/main/06_speed.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/rawchat/rawchat/blob/main/06_speed.ipynb)
#
# A chip does two things: it multiplies, and it moves numbers between its memory and where it
# multiplies. Each has a top speed. Whatever a program does, it waits for one of the two, and so
# every part of it has a minimum time. This chapter measures both ceilings, then each part of a
# training step and of decoding, and lays them side by side.
#
# **At the end you have** a picture of where your chip's time goes, a sentence on what to try, and a
# file that makes `python -m lib.preflight` bound a step by what this chip really reaches, for a
# chip that it knows.
#
# **Hardware and time:** whatever is there. On two CPU cores a few minutes, most of it compiling.

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
import jax

from lib import pictures, recipes, speed
from lib.chips import chip
from lib.config import Config
from lib.files import write_json
from lib.notebook import device_report, flags, parse_overrides, secret
from lib.pictures import show
from lib.runs import enter

# %% cellView="form" tags=["parameters"]
# @title Parameters
# @markdown Name of the run, runs/NAME: the figures go there
run = "speed"  # @param {type:"string"}
# @markdown Where runs live: drive, hub:USER/NAME, gs://…, a path; empty: as any notebook here was told, or the secret RAWCHAT_HOME, else this machine
home = ""  # @param ["", "drive"] {"allow-input":true}
# @markdown The model whose step is measured: a preset, or auto for what 02 would train here
preset = "auto"  # @param ["auto", "cpu_demo", "colab_free_v5e", "colab_free_t4", "colab_v5e", "colab_v6e", "gpu", "gpt2_like", "llama_like", "nanochat_d12", "nanochat_d20", "nanochat_d24"]
# @markdown Fields of Config by name, such as: microbatch=8 attention=jax
overrides = ""  # @param {type:"string"}
# @markdown Rows that are decoded together, one measurement each
rows = "1 8 64"  # @param {type:"string"}
# @markdown Seconds for which each part of the step is run
seconds = 0.5  # @param {type:"number"}

# %%
globals().update(flags(globals()))
counts = speed.parse_asked(rows, seconds)
folder, mirror = enter(home, run, secret=secret)
device = device_report()
if preset == "auto":
    preset, why = recipes.pick_preset(device)
    print(f"preset {preset}: {why}")
config = Config.preset(preset, **recipes.suited_to(device) | parse_overrides(overrides, Config))
training = speed.as_trained(config)

# %% [markdown]
# ## The first ceiling: products
#
# Nearly all arithmetic of a transformer is matrix products. A product of an $m \times k$ and a
# $k \times n$ matrix takes $2mkn$ FLOPs. **Guess before you run it:** how much faster is bfloat16
# than float32 here (as training has it: a GPU may take shortcuts), and does the largest square come
# first? A CPU that multiplies bfloat16 trains in the *mixed* mode, which is measured there as well:
# bfloat16 times bfloat16, with sums in float32.

# %%
products = speed.products(training)
show(pictures.product_speeds(products), folder / "plots" / "products.png")

# %% [markdown]
# ## The second ceiling: memory
#
# Reading a weight costs the same whether one token needs it or thousands do. *FLOPs per byte* says
# which ceiling limits a part of a program: below the chip's own number, at which both bind, memory
# does, above it products do.

# %%
bandwidth = speed.read_bandwidth(speed.LARGE)
ceiling = speed.measured_chip(products, bandwidth, training.compute_dtype)
sheet = chip(jax.devices()[0].device_kind)
print(f"products {ceiling.flops / 1e12:.4g} TFLOP/s, memory {bandwidth / 1e9:.4g} GB/s")
print(f"both bind at {ceiling.flops / bandwidth:.0f} FLOPs per byte")
if sheet and training.compute_dtype == "bfloat16":
    products_share, memory_share = ceiling.flops / sheet.flops, bandwidth / sheet.bandwidth
    print(f"of the data sheet: {products_share:.0%} of the products, {memory_share:.0%} of memory")

# %% [markdown]
# ## Attention
#
# One layer's attention, forward and backward: every implementation, and on a TPU every size of
# block. What the compiler refuses is listed with its reason.

# %%
attentions = speed.attentions(training)
print(f"{'attention':10}{'block':>7}{'window':>8}{'ms':>10}")
for a in sorted(attentions, key=lambda a: (a.window, a.seconds or 1e9)):
    time_or_why = f"{1e3 * a.seconds:10.3f}" if a.seconds else f"  {a.why[:70]}"
    print(f"{a.name:10}{a.block or '':>7}{a.window:8}{time_or_why}")

# %% [markdown]
# ## A training step, part by part
#
# Each part alone, forward and backward, multiplied by how often a step does it. *At least* is the
# time that its FLOPs and bytes need under the two ceilings above, as preflight counts them from
# shapes. More than 100 % means that the count was too high: bytes came from a cache, attention left
# out what the mask hides, or it counts what `remat` recomputes, which only the whole step does.
# *Last* is what was measured on this kind of chip before, where the repository has it.

# %%
reached = speed.components(training, ceiling, seconds)
print(speed.components_table(reached, speed.last_figures(training)))
step = reached[-1]
tokens_per_second = config.total_batch_size / step.seconds
print(f"\n{tokens_per_second:,.0f} tokens/s", end="")
print(
    f", {tokens_per_second * config.flops_per_token / ceiling.flops:.1%} of the products' ceiling"
)

# %% [markdown]
# A dot on the roof can't go faster, whatever the code. A dot far below it waits for something that
# is neither.

# %%
show(pictures.roofline(reached, ceiling, sheet), folder / "plots" / "roofline.png")
print("\n".join(speed.advice(reached)))

# %% [markdown]
# ## Decoding
#
# To write one token the chip reads every weight. With one row that is all it does: the upper limit
# is bandwidth over bytes (more only where weights fit into a cache). More rows share the reading,
# and cost next to nothing until products take longer than that.

# %%
decoded = speed.decoding(config, counts)
print(f"{'rows':>5}{'tokens/s':>12}{'ms/step':>10}{'at least':>10}{'reached':>9}")
for d in decoded:
    least = d.bytes / bandwidth
    times = f"{1e3 * d.seconds:10.3f}{1e3 * least:10.3f}"
    print(f"{d.rows:5}{d.tokens_per_second:12,.0f}{times}{least / d.seconds:9.0%}")

# %% [markdown]
# ## Keep it
#
# With `--calibrate FILE` preflight bounds a step with these ceilings instead of the data sheet's.
# **Please send it**: `benchmarks/chips` waits for its first file, and nobody who wrote this has a
# TPU.

# %%
path = folder / speed.file_name(jax.devices()[0].device_kind)
figures = dict(products=products, attentions=attentions, components=reached, decoded=decoded)
write_json(path, speed.to_dict(ceiling, training, **figures))
mirror.wait()
print(f"written: {path}")

# %% [markdown]
# ## Questions
#
# 1. Which part of your step has the fewest FLOPs per byte? What would raise that number?
# 2. From how many rows on does decoding stop being bound by memory? (Weights are read once,
#    products grow with rows.)
# 3. A chip with twice the FLOP/s and the same memory: which parts of your step gain, and which do
#    not?
# 4. Why is a small square further from the ceiling than a large one?
# 5. "Other" may be below 0. How can a whole take less time than its parts?
#
# ## Where to go next
#
# - [Before you pay](docs/before-you-pay.md): the same roofline for a chip that you do not have, by
#   its compiler.
# - How to scale your model, a book on rooflines with the same letters for axes:
#   [jax-ml.github.io/scaling-book](https://jax-ml.github.io/scaling-book/).
# - The code: [speed](lib/speed.py), [roofline](lib/preflight/roofline.py), [chips](lib/chips.py)
