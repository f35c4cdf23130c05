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
# # 04 · Measure a model, teach it to chat, and talk to it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/rawchat/rawchat/blob/main/04_eval_chat.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/rawchat/rawchat/blob/main/04_eval_chat.ipynb)
#
# 02 leaves a model that continues text. How good is it? And what does it take until it answers?
# First it is measured in a unit that compares any two language models. Then you look at what it
# finds hard, and where it looks. Two short trainings on conversations make it answer, calculate,
# and stop.
#
# **At the end you have** bits per byte beside what `gzip -9` and `xz -9` need for the very same
# bytes, a model that chats, its marks on held-out questions with their errors, and a report card on
# one page.
#
# **Hardware and time:** whatever trained the model; six to nine minutes on two CPU cores for the
# default.
#
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
import time

from lib import data, evals, pictures, report, teach
from lib.evals.questions import Questions
from lib.files import UserError, update_json
from lib.generate import Sampling, generate
from lib.interop import export_run
from lib.model.looking import attention_weights
from lib.notebook import device_report, flags, secret, show_page
from lib.params import count_params
from lib.pictures import show
from lib.puzzles import check
from lib.report.words import with_error
from lib.runs import STAGES, enter_trained, load_model, results_table, start_afresh
from lib.train import checkpoint, finetune, state_template
from lib.train.metrics import parse_writers, read_jsonl

# %% cellView="form" tags=["parameters"]
# @title Parameters
# @markdown Name of the run, runs/NAME; empty takes the run trained last
run = ""  # @param {type:"string"}
# @markdown Where runs live: drive, hub:USER/NAME, gs://…, a path; empty: as any notebook here was told, or the secret RAWCHAT_HOME, else this machine
home = ""  # @param ["", "drive"] {"allow-input":true}
# @markdown Base checkpoint: empty for the run's newest, best for its lowest validation loss, or a folder, gs:// or hf://USER/NAME
# @markdown address
ckpt = ""  # @param ["", "best"] {allow-input: true}
# @markdown Text to continue
prompt = "def fibonacci(n):\n"  # @param {type:"string"}
# @markdown First phase of fine-tuning, the broad mixture: names of mixtures, tasks and .jsonl files of chats, each optionally with a number of epochs,
# @markdown like "arithmetic:0.5 mine.jsonl:3" or "embedded_mid mine.jsonl:3"; auto: embedded_mid, or nanochat_mid for a model of web
# @markdown text; none skips the phase
mid = "auto"  # @param ["auto", "none", "embedded_mid", "nanochat_mid"] {allow-input: true}
# @markdown Second phase, the smaller and cleaner mixture, likewise
sft_mixture = "auto"  # @param ["auto", "none", "embedded_sft", "nanochat_sft"] {allow-input: true}
# @markdown Tasks to ask before and after: names and .jsonl files of your own; auto stands for those that the mixtures teach and code_completion,
# @markdown all adds those of the Hugging Face Hub (MMLU, ARC, GSM8K, HumanEval and others), none asks nothing
tasks = "auto"  # @param ["auto", "all", "none"] {allow-input: true}
# @markdown What to say to the model at the end, one turn after the other, between them |
say = "Hello! | What is 37 times 85? | How many r's are in strawberry? | Thanks!"  # @param {type:"string"}
# @markdown Go on by typing (a notebook asks below its last cell; an empty line ends it; in a terminal better python -m lib.chat)
live = False  # @param {type:"boolean"}
# @markdown When a phase was run before: continue (a finished one is only loaded), fresh (the old one is set aside), or stop
if_exists = "continue"  # @param ["continue", "fresh", "stop"]
# @markdown Writers besides metrics.jsonl: console, tensorboard, wandb:online, wandb:offline, otlp:http://HOST:4318
writers = "console"  # @param {type:"string"}

# %% cellView="form" tags=["parameters"]
# @title Advanced
# @markdown Write the model for another program at the end: see docs/interop.md
export_to = "none"  # @param ["none", "transformers", "gguf", "onnx", "litert", "stablehlo", "stablehlo_inside"]
# @markdown Text to measure on: a name, or a path or glob; empty takes what the model was trained on (its held-out split)
source = ""  # @param {type:"string"}
# @markdown Bytes of text to measure on
eval_bytes = 1000000  # @param {type:"integer"}
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
# @markdown Passes over the first mixture
mid_epochs = 1.0  # @param {type:"number"}
# @markdown Passes over the second mixture
sft_epochs = 1.0  # @param {type:"number"}
# @markdown Learning rates of the first phase, as a share of pretraining's (0: what suits the size of its batches)
mid_lr = 0.0  # @param {type:"number"}
# @markdown Learning rates of the second phase, likewise
sft_lr = 0.0  # @param {type:"number"}
# @markdown Lines of a .jsonl file that hold no chat: refuse the file, or skip and count them
bad_lines = "refuse"  # @param ["refuse", "skip"]
# @markdown Optimizer state of a phase: fresh, or warm, which goes on with the moments of the stage before
optimizer_state = "fresh"  # @param ["fresh", "warm"]
# @markdown Held-out questions of each task (0: all)
task_items = 256  # @param {type:"integer"}
# @markdown CORE, DCLM's 22 tasks, of the base model: none, download (about 160 MB), or the path of the bundle's folder or zip
core_bundle = "none"  # @param ["none", "download"] {allow-input: true}
# @markdown Items of each CORE task (0: all)
core_items = 0  # @param {type:"integer"}

# %%
globals().update(flags(globals()))
writing = parse_writers(writers)
folder, mirror = enter_trained(home, run, ckpt, secret=secret)
device = device_report()
if device["count"] > 1:
    print("one of them is used here, whatever the model was trained on")

# %% [markdown]
# ## The model
#
# A checkpoint is a folder with the arrays and a `meta.json` that says what they are. One line finds
# the newest and puts it on the device.

# %%
base = load_model(folder, ckpt, stage="base")
params, config, tokenizer, meta = base.params, base.config, base.tokenizer, base.meta
trained_on = meta["settings"]["source"]
source = source or trained_on
print(f"{base.path}: step {meta['step']} of {config.num_steps}")
print(f"{count_params(config)['total']:,} parameters, {config.n_layer} layers x {config.n_embd}")

# %% [markdown]
# What will be taught is opened now, so that a wrong name or file stops the notebook before it
# computes.

# %%
phases = teach.open_phases(
    trained_on,
    config,
    bad_lines,
    mid=(mid, mid_epochs, mid_lr),
    sft=(sft_mixture, sft_epochs, sft_lr),
)
teach.check_stages(folder, phases, if_exists)

# %% [markdown]
# And so is what will be asked. The examiner puts the same questions to every stage, and keeps the
# marks.

# %%
names = teach.task_names(tasks, phases)
texts = data.head(data.documents(source, "val"), eval_bytes)
room = min(512, config.sequence_len * 3 // 8)
asking = Questions(limit=task_items or None, seed=seed, batch=64, max_tokens=room)
examiner = teach.Examiner(
    folder, config, tokenizer, source, texts, names, asking, core_bundle, core_items
)

# %% [markdown]
# ## Bits per byte
#
# How many bits does the model need for each byte of text that it never saw? The loss says how many
# nats a *token* costs; but tokens of one vocabulary are longer than those of another, so two
# models' losses can't be compared. Bytes are the same for all, for file compressors too:
#
# $$\text{bits per byte} =
# \frac{\sum_i -\ln p(\text{token}_i \mid \text{tokens before it})}
# {\ln 2 \cdot \sum_i \text{bytes}(\text{token}_i)}$$
#
# Special tokens are left out of both sums. The model's own size is not counted, and it has learnt
# from similar text, as `xz` has not: this says how well it foresees, not that it would be a good
# compressor.
#
# **Guess before you run it:** will this small model beat `xz -9`?

# %%
clock = time.perf_counter()
batches = data.batches(
    data.tokens_of(texts, tokenizer), config.microbatch, config.sequence_len, loop=False
)
score = evals.bits_per_byte(params, config, batches, tokenizer.token_bytes)
packers = data.baselines(texts)
print(f"{score.bytes:,} bytes of {source} in {time.perf_counter() - clock:.1f} s")
print(f"{'':9}bits per byte")
measured = with_error(score.bpb, score.stderr, spec=".4f")
print(f"model    {measured} (standard error over rows)")
print(f"gzip -9  {packers['gzip_bpb']:.4f}\nxz -9    {packers['xz_bpb']:.4f}")

# %% [markdown]
# This is the headline of the model. Other figures of it differ a little, for three honest reasons:
# 02 measured a smaller part of the text; below, each document is read from its own beginning,
# without the end of another before it; and the standard error there counts documents, not rows.

# %% [markdown]
# By kind of text:

# %%
examiner.bits["base"] = evals.bits_by_kind(params, config, tokenizer, texts)
print(teach.kinds_table(examiner.bits["base"]))

# %% [markdown]
# **A puzzle:** compute bits per byte yourself. Special tokens such as `<|bos|>` stand for no byte:
# they count neither above nor below.
#
# <details><summary>Hint</summary>
#
# Add up the nats of the tokens that have bytes, divide by <code>math.log(2)</code>, then by the sum
# of the bytes.
#
# </details>


# %%
def bits(nats, sizes):
    """Bits per byte from each token's loss in nats and the bytes that it stands for."""
    return 0.0  # your code here


solved = check("bits", bits)

# %% [markdown]
# ## What it finds easy and hard
#
# Each token of one held-out text, coloured by how many bits it cost: blue was expected, red was a
# surprise. `↵` is the end of a line, which costs bits too. Look at the beginnings of words, and at
# what follows an open bracket.

# %%
ids, costs = teach.token_bits(base, texts[0])
show(pictures.surprise(tokenizer, ids, costs), folder / "plots" / "surprise.png")

# %% [markdown]
# ## Where it looks
#
# The attention of some heads over the beginning of the same text: each row is a query, dark where
# it looks. On the diagonal a token looks at itself, on the line just below at the one before it. An
# upright stripe is a place that all look at, often the very first token, where a head rests that
# has nothing to do. Square blocks on the diagonal are tokens of one word that look at each other.

# %%
shown = [tokenizer.bos, *ids[:31]]
maps = [weights[0] for weights in attention_weights(params, config, [shown])]
pieces = [tokenizer.decode([i]) for i in shown]
show(pictures.attention_maps(pieces, maps), folder / "plots" / "attention.png")

# %% [markdown]
# ## Completions
#
# The model writes token by token, each drawn from its predicted distribution. *Temperature*
# sharpens or flattens that, *top_k* and *top_p* cut off what is unlikely. Change the prompt and run
# this cell again.

# %%
sampling = Sampling(max_tokens, temperature, top_k, top_p, seed=seed, stop=(tokenizer.bos,))
prompt_ids = tokenizer.encode(prompt, bos=True)
written = generate(params, config, [prompt_ids] * num_samples, sampling)
completions = [prompt + tokenizer.decode(ids) for ids in written]
print(f"\n{'─' * 60}\n".join(completions))

# %% [markdown]
# ## What a conversation looks like to the model
#
# A chat is text too, with special tokens between the turns. The loss counts only what the assistant
# says: not the question, and not what the calculator answered, which it will never have to write
# itself. Passages of plain text are mixed in and learnt whole, so that the model does not forget
# how to foresee it.

# %%
for phase in phases:
    teach.show_conversation(phase, tokenizer, config.sequence_len + 1)

# %% [markdown]
# ## Can it answer?
#
# A base model continues text; it does not know that a question wants an answer, nor when to stop.
# Here are held-out questions, put to it now and again after each phase. It writes its own answers,
# always the likeliest token; what stands between `<|python_start|>` and `<|python_end|>` is
# calculated for it, and the result is inserted after it. It has never seen the tokens of a chat, so
# marks near 0 say little yet.
#
# First, how many questions share a run of words with the pretraining text: a right answer to those
# would show memory only. Most short questions are too short to tell.

# %%
try:
    examiner.look_for_leaks(teach.documents_of(meta))
except UserError as e:  # a model from elsewhere, whose text cannot be had here
    print(f"how many questions were in the pretraining text is not known: {e}")
examiner.examine("base", base.path, params)

# %% [markdown]
# ## Two phases, one training
#
# *Mid* teaches what a conversation is, and tools; *sft* (supervised fine-tuning), smaller and
# cleaner, how an answer should be. Each starts from what the stage before has learnt, packs whole
# conversations into rows, and uses 02's training with its own schedule: it can be stopped and
# resumed. Its learning rates are a share of pretraining's: with higher ones it would learn facts a
# little sooner and forget more of the text.


# %%
def fine_tune(phase, start):
    """Train a phase, or what is left of it; returns what the next starts from, and where it is."""
    store = folder / STAGES[phase.stage]
    training = finetune.open_phase(
        phase, start, store, if_exists, lambda: start_afresh(folder, phase.stage)
    )
    validation = finetune.validation(phase, training, tokenizer)
    saving = finetune.saving(training, lambda *_: mirror.send(), lambda: mirror.sent_at)
    for _ in training.steps([validation], saving, writers=writing):
        pass  # a place for your own measurements
    print("  read back, bit for bit:", training.finish())
    print(finetune.packing_line(training.cursor))
    moments = training.state.opt_state if optimizer_state == "warm" else None
    return start._replace(params=training.state.params, opt_state=moments), training.past.path


# %%
stage, path, curves = "base", base.path, {}
model = finetune.Base(params, config, tokenizer, trained_on)
if optimizer_state == "warm":
    state, _ = checkpoint.restore(base.path, state_template(config))
    model = model._replace(opt_state=state.opt_state)
for phase in phases:
    stage = phase.stage
    model, path = fine_tune(phase, model)
    curves[stage] = read_jsonl(folder / STAGES[stage] / "metrics.jsonl")
    examiner.examine(stage, path, model.params)

# %% [markdown]
# The loss of the assistant's words. It falls fast, for much of it is form; the dots are
# conversations that it never saw.

# %%
if curves:
    show(pictures.fine_tuning(curves), folder / "plots" / "fine_tuning.png")

# %% [markdown]
# ## Before and after
#
# Share of held-out questions answered correctly, with its standard error $\sqrt{p(1-p)/n}$. What a
# held-out question of the built-in tasks is about, the numbers of a sum or the word to spell, never
# occurs in their conversations.

# %%
print(teach.marks_table(examiner))

# %%
if any(examiner.graded.values()):
    show(pictures.scores(examiner.graded), folder / "plots" / "tasks.png")
show(pictures.bits_by_kind(examiner.bits), folder / "plots" / "kinds.png")

# %% [markdown]
# Which of these differences are more than chance? Each stage against the one before, *paired*: only
# the questions that one answered and the other did not can tell. p is how often chance alone would
# do as much in this one comparison. A difference is called real only where it stays so after p is
# adjusted for the number of comparisons ([Holm](https://www.jstor.org/stable/4615733)); the report
# card's table has the adjusted p.

# %%
teach.print_differences(examiner)

# %% [markdown]
# ## Results

# %%
measured = dict(val_source=source, val_bpb=score.bpb, val_bpb_stderr=score.stderr)
measured |= dict(val_bytes=score.bytes, gzip_bpb=packers["gzip_bpb"], xz_bpb=packers["xz_bpb"])
update_json(folder / "results.json", **measured, samples=completions)
teach.write_results(examiner, stage, curves)
print(results_table(folder))

# %% [markdown]
# ## Talk to it
#
# Change `say` in the parameters and run this cell again, or switch `live` on and type. What the
# calculator did is in brackets. The answers to `say` take the likeliest tokens; with `live` on they
# are drawn by the sampling settings.

# %%
warmth = temperature if live else 0.0
sampling = Sampling(max_tokens, warmth, top_k, top_p, seed=seed)
talk = teach.Conversation(model.params, config, tokenizer, sampling)
for words in filter(None, map(str.strip, say.split("|"))):
    talk.say(words)
if phases:
    teach.keep_samples(examiner, stage, path, talk)
while live and (words := input("you    ").strip()):
    talk.say(words)

# %% [markdown]
# ## The report card
#
# All of it on one page, which needs nothing else: open it in a browser, or send it to someone.

# %%
show_page(report.write(folder))
mirror.wait()

# %% [markdown]
# ## Leaving
#
# A model that can only be used here is half a model. One call writes it for another program, runs
# it *by that program*, and keeps it only if logits and 200 greedy tokens agree with ours.
# `transformers` takes every model, `gguf` (llama.cpp, Ollama) plain ones such as `llama_like`; a
# refusal names the fields that stand against it. What each needs stands in
# [docs/interop.md](docs/interop.md). Choose one under `export_to`.

# %%
if export_to != "none":
    print(export_run(folder, export_to).table())

# %% [markdown]
# ## Questions
#
# 1. Two models have the same loss per token, and vocabularies of 4,096 and 50,000 tokens. Which
#    predicts better?
# 2. Why is the first token of a word more surprising than the second?
# 3. What would the model learn if the loss counted the user's words too? And the calculator's?
# 4. Of 256 questions 50 %, then 54 % were right. In one case 10 were gained and none lost, in
#    another 40 gained and 30 lost. Which is an improvement, and why do the two standard errors not
#    tell?
# 5. Why do bits per byte of plain text rise while the model learns to chat, and what in the mixture
#    works against it?
#
# ## Where to go next
#
# - A model that predicts better: train longer, larger or on other text in
#   [02_train](02_train.ipynb).
# - A model that answers other things: write chats as JSONL, one `{"messages": [...]}` a line, and
#   name the file in a mixture above.
# - Talk in a terminal with `python -m lib.chat`, in a browser with `python -m lib.serve`.
# - Papers: [InstructGPT](https://arxiv.org/abs/2203.02155) (its first step),
#   [GSM8K](https://arxiv.org/abs/2110.14168) (calculators in answers),
#   [CORE](https://arxiv.org/abs/2406.11794).
# - The code: [finetune](lib/train/finetune.py), [questions](lib/evals/questions.py),
#   [stats](lib/evals/stats.py), [engine](lib/generate/engine.py)
