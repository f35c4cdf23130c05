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
# # 05 · Make it better at what can be checked
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/rawchat/rawchat/blob/main/05_rl.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/rawchat/rawchat/blob/main/05_rl.ipynb)
#
# 04 taught by example: here is a question, here are the words to say. But where an answer can be
# *checked*, nobody has to write it down. The model tries, several times; what was right becomes
# likelier, what was wrong less likely. That is a policy gradient, and it is all there is to this
# chapter.
#
# **At the end you have** a model that solves more of a task which no example ever showed it, and
# curves that say how it came to that.
#
# **Hardware and time:** whatever trained the model. The speedrun's takes 1.5 to 2 seconds a step on
# two cores of a server; the 120 steps below brought its share of right answers (pass@1) from 0.50
# to 0.82.

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
from lib import pictures, reinforce, report
from lib.evals import records
from lib.files import update_json
from lib.notebook import device_report, flags, secret, show_page, show_source
from lib.pictures import show
from lib.preflight.memory import choose_layout
from lib.runs import STAGES, enter_trained, load_model, results_table, start_afresh
from lib.train import policy, rl
from lib.train.finetune import Base
from lib.train.metrics import parse_writers, read_jsonl
from lib.train.rollouts import Seconds
from lib.train.run import Saving

# %% cellView="form" tags=["parameters"]
# @title Parameters
# @markdown Name of the run, runs/NAME; empty takes the run trained last
run = ""  # @param {type:"string"}
# @markdown Where runs live: drive, hub:USER/NAME, gs://…, a path; empty: as any notebook here was told, or the secret RAWCHAT_HOME, else this machine
home = ""  # @param ["", "drive"] {"allow-input":true}
# @markdown What to get better at: a task whose answers can be checked
task = "arithmetic_beyond"  # @param ["arithmetic_beyond", "arithmetic", "spelling", "strings", "gsm8k"] {allow-input: true}
# @markdown What an answer is worth: empty for the task's own reward, or FILE.py:FUNCTION of your own
reward = ""  # @param {type:"string"}
# @markdown The method
preset = "reinforce"  # @param ["reinforce", "grpo", "dr_grpo", "dapo", "gspo", "cispo"]
# @markdown Steps: rounds of asking and learning
num_steps = 120  # @param {type:"integer"}
# @markdown Questions of a step
questions = 8  # @param {type:"integer"}
# @markdown Answers to each question
samples = 8  # @param {type:"integer"}
# @markdown Tokens of an answer at most
max_tokens = 64  # @param {type:"integer"}
# @markdown When this was run before: continue (a finished one is only loaded), fresh (the old one is set aside), or stop
if_exists = "continue"  # @param ["continue", "fresh", "stop"]
# @markdown Writers besides metrics.jsonl: console, tensorboard, wandb:online, wandb:offline, otlp:http://HOST:4318
writers = "console"  # @param {type:"string"}

# %% cellView="form" tags=["parameters"]
# @title Advanced
# @markdown Checkpoint to begin with: empty for the newest that can chat, or a folder, gs:// or hf://USER/NAME address
ckpt = ""  # @param {type:"string"}
# @markdown Learning rates, as a share of those of the stage that it begins with
lr = 0.1  # @param {type:"number"}
# @markdown Optimizer of the matrices
optimizer = "muon"  # @param ["muon", "adamw"]
# @markdown Updates by each step's answers
updates = 1  # @param {type:"integer"}
# @markdown Held-out questions
test_items = 64  # @param {type:"integer"}
# @markdown Answers to each of them, drawn at temperature 1
test_samples = 8  # @param {type:"integer"}
# @markdown Steps from one measurement to the next
eval_every = 20  # @param {type:"integer"}
# @markdown How several devices share the learning; each process writes its part of the answers
strategy = "auto"  # @param ["auto", "dp", "zero", "fsdp", "tp"]
# @markdown The same seed asks the same questions, and draws the same answers
seed = 0  # @param {type:"integer"}

# %%
globals().update(flags(globals()))
writing = parse_writers(writers)
folder, mirror = enter_trained(home, run, ckpt, secret=secret)
device = device_report()

# %% [markdown]
# ## The model, and what it shall learn
#
# It begins with the checkpoint that can chat, for it must already be right now and then: what it
# never does can't be made likelier.

# %%
start = load_model(folder, ckpt, stage="" if ckpt else "sft")
tokenizer = start.tokenizer
config, layout, why = choose_layout(start.config, strategy, memory=device["memory"])
print(f"devices: {why}")
source = start.meta["settings"].get("source", "")
settings = rl.Reinforcing(
    task, reward, preset, num_steps, questions, samples, max_tokens, updates, lr, optimizer, seed
)
training = rl.Reinforcement(
    settings,
    Base(start.params, config, tokenizer, source),
    folder / STAGES["rl"],
    if_exists,
    lambda: start_afresh(folder, "rl"),
    layout,
)
print(f"from {start.path}: {len(training.questions):,} questions of {task}")

# %% [markdown]
# ## One group
#
# One question, several answers, drawn at temperature 1. What stands between `<|python_start|>` and
# `<|python_end|>` is calculated for it. The reward says which are right. The *advantage* is the
# reward less the group's mean: better than the others is above 0, worse below. Where all are right,
# or all wrong, there is nothing to learn.

# %%
groups = training.ask(start.params, 0, Seconds())
best = max(groups, key=lambda group: policy.has_signal([r.reward for r in group[1]]))
reinforce.show_group(*best, settings, tokenizer)

# %% [markdown]
# ## The loss
#
# We want the expected reward to rise. Its gradient is the mean of
#
# $$A \cdot \nabla \log p(\text{token} \mid \text{what stands before})$$
#
# over the tokens that the model chose (REINFORCE; Williams 1992). So the loss of a token is
# $-A \log p$: as in fine-tuning, but the weight of an answer is how good it was. What papers have
# added since bounds how far a step may go, where an answer was drawn by an older model; the
# settings of `Policy` name them.

# %%
show_source(policy.objective)

# %% [markdown]
# ## Before
#
# Held-out questions, answered by the likeliest tokens (greedy), and several times at temperature 1:
# *pass@1* is the share that is right, *pass@8* the chance that one of eight is.

# %%
exam = reinforce.Examination(
    start.config, tokenizer, task, test_items, test_samples, max_tokens, layout
)
before = exam.answers(start.params, greedy=True)
print(reinforce.passes_told(exam.passes(start.params)))

# %% [markdown]
# ## The loop
#
# Ask, check, learn. Watch *signal*, the share of groups that teach anything; *entropy*, which falls
# to 0 if the model gives up trying; and *kl*, how far it has gone from where it began.

# %%
trained = training.run
saving = Saving(
    eval_every,
    keep=1,
    metric="wrong",
    then=lambda *_: mirror.send(),
    sent_at=lambda: mirror.sent_at,
)
measurements = [training.measurement, exam.measurement(eval_every)]
for step in trained.steps(measurements, saving, writers=writing):
    if step.step % 10 == 0 or step.step == num_steps:
        print(reinforce.told(step.step, step.metrics))
print("read back, bit for bit:", trained.finish())

# %% [markdown]
# Rewards are noisy, for each step has other questions; the dots are the same held-out ones. A
# length that runs away, or an entropy near 0, says that something else is learnt than was meant.

# %%
rows = read_jsonl(folder / STAGES["rl"] / "metrics.jsonl")
show(pictures.reinforcement(rows), folder / "plots" / "reinforcement.png")
print(reinforce.shares(rows))

# %% [markdown]
# ## After
#
# The same questions again, and whether the difference is more than chance. Beside them stand the
# tasks that 04 measured: what is learnt here must not be paid for there.

# %%
params = trained.state.params
after = exam.answers(params, greedy=True)
print(reinforce.passes_told(exam.passes(params)))
earlier = records.read_of(folder, start.stage, start.path)
after["tasks"] |= exam.once_more(params, earlier)
reinforce.keep(folder, start.stage, start.path, seed, before)
reinforce.keep(folder, "rl", trained.past.path, seed, after)
before["tasks"] = earlier.get("tasks", {}) | before["tasks"]
reinforce.print_differences(before, after, (start.stage, "rl"))

# %% [markdown]
# The question of the group above once more, answered by what the model has become. It was among
# those that it learnt from, so this shows what was reinforced, and proves nothing: read it to see
# whether the reward was earned as you meant.

# %%
groups = training.ask(params, 0, Seconds())
again = next(group for group in groups if group[0]["id"] == best[0]["id"])
reinforce.show_group(*again, settings, tokenizer)

# %%
score = after["tasks"][exam.name]["score"]
update_json(folder / "results.json", stage="rl", **{f"rl_{exam.name}": score})
print(results_table(folder))
show_page(report.write(folder))
mirror.wait()

# %% [markdown]
# ## Questions
#
# 1. Why does a group whose answers are all right teach nothing?
# 2. What would the model learn if an answer that was cut in the middle could be worth something?
# 3. A reward pays for the last number of an answer. How would a lazy model earn it?
# 4. pass@1 rises and pass@8 doesn't. What has the model learnt, and what not?
# 5. The end of an answer is a token like any other, and is learnt like one. What would happen to
#    the answers' length if it were not?
#
# ## Where to go next
#
# - A reward of your own: `--reward mine.py:reward`, a function of the item and the answer that
#   returns a number.
# - [Reinforcement](docs/rl.md): which preset when, and what to watch.
# - Talk to it: `python -m lib.chat` takes the furthest stage.
# - Papers: [GRPO](https://arxiv.org/abs/2402.03300), [Dr. GRPO](https://arxiv.org/abs/2503.20783),
#   [DAPO](https://arxiv.org/abs/2503.14476).
# - The code: [policy](lib/train/policy.py), [rollouts](lib/train/rollouts.py),
#   [rl](lib/train/rl.py), [rewards](lib/tasks/rewards.py)
