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
# Loads a checkpoint of `02_train`, measures how well it predicts text that it never saw, and lets it continue yours. Then it is
# fine-tuned on conversations, in two phases, asked held-out questions before and after each, and you can talk to it.
#
# **At the end you have** bits per byte beside what `gzip -9` and `xz -9` need for the very same bytes, a picture of what
# the model finds easy and hard, a model that answers, uses a calculator and knows when to stop, and its marks with their errors.
#
# **Hardware and time:** whatever trained the model; about six minutes on two CPU cores for the default.

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
import itertools
import json
import time

import jax
import numpy as np

from lib import chat, data, evals, pictures, report, train
from lib.config import Config
from lib.data.speech import spoken
from lib.data.tokenizer import FILE, load_tokenizer
from lib.evals import contamination, core, questions, records, stats
from lib.files import UserError, choose, update_json
from lib.generate import Engine, Sampling, generate
from lib.interrupts import interruptible
from lib.notebook import device_report, flags, secret
from lib.params import count_params, templates
from lib.pictures import show
from lib.runs import STAGES, enter, results_table, set_aside
from lib.sandbox import calculator
from lib.tasks import tasks as known_tasks
from lib.train import checkpoint
from lib.train import finetune as sft
from lib.train.metrics import Metrics, column, read_jsonl

# %% tags=["parameters"]
# @title Parameters
# @markdown Name of the run, runs/NAME; empty takes the run trained last
run = ""  # @param {type:"string"}
# @markdown Where runs live, the same in all notebooks: empty (this machine), drive, hub:USER/NAME, gs://…, or a path
home = ""  # @param ["", "drive"] {"allow-input":true}
# @markdown Base checkpoint: empty for the run's newest, best for its lowest validation loss, or a folder, gs:// or hf://USER/NAME
# @markdown address
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
# @markdown First phase of fine-tuning, the broad mixture: names of mixtures, tasks and .jsonl files of chats, each maybe with its epochs,
# @markdown like "arithmetic:0.5 mine.jsonl:3" or "embedded_mid mine.jsonl:3"; auto: embedded_mid, or nanochat_mid for a model of web
# @markdown text; none skips the phase
mid = "auto"  # @param ["auto", "none", "embedded_mid", "nanochat_mid"] {allow-input: true}
# @markdown Second phase, the smaller and cleaner mixture, likewise
sft_mixture = "auto"  # @param ["auto", "none", "embedded_sft", "nanochat_sft"] {allow-input: true}
# @markdown Passes over the first mixture
mid_epochs = 1.0  # @param {type:"number"}
# @markdown Passes over the second mixture
sft_epochs = 1.0  # @param {type:"number"}
# @markdown Learning rates of the first phase, as a share of pretraining's
mid_lr = 1.0  # @param {type:"number"}
# @markdown Learning rates of the second phase, likewise
sft_lr = 0.3  # @param {type:"number"}
# @markdown Lines of a .jsonl file that hold no chat: refuse the file, or skip and count them
bad_lines = "refuse"  # @param ["refuse", "skip"]
# @markdown Optimizer state of a phase: fresh, or warm, which goes on with the moments of the stage before
optimizer_state = "fresh"  # @param ["fresh", "warm"]
# @markdown When a phase was run before: continue (a finished one is only loaded), fresh (the old one is set aside), or stop
if_exists = "continue"  # @param ["continue", "fresh", "stop"]
# @markdown Tasks to ask before and after: names, or .jsonl files of your own; auto takes those that the mixtures teach and code_completion,
# @markdown all adds those of the Hugging Face Hub (MMLU, ARC, GSM8K, HumanEval and others), none asks nothing
tasks = "auto"  # @param ["auto", "all", "none"] {allow-input: true}
# @markdown Held-out questions of each task (0: all)
task_items = 256  # @param {type:"integer"}
# @markdown CORE, DCLM's 22 tasks, of the base model: none, download (about 160 MB), or the path of the bundle's folder or zip
core_bundle = "none"  # @param ["none", "download"] {allow-input: true}
# @markdown Items of each CORE task (0: all)
core_items = 0  # @param {type:"integer"}
# @markdown What to say to the model at the end, one turn after the other, between them |
say = "Hello! | What is 37 times 85? | How many r's are in strawberry? | Thanks!"  # @param {type:"string"}
# @markdown Go on by typing (a notebook asks below its last cell; an empty line ends it; in a terminal rather python -m lib.chat)
live = False  # @param {type:"boolean"}

# %%
globals().update(flags(globals()))
hub = ckpt.startswith("hf://")
hub_token = lambda: secret("HF_TOKEN")  # noqa: E731
if hub:
    tokenizer = load_tokenizer(f"hf:{ckpt.removeprefix('hf://')}")
    folder, mirror = enter(home, run or ckpt.rpartition("/")[2], token=hub_token)
else:
    needs = "checkpoints" if ckpt in ("", "best") else FILE
    folder, mirror = enter(home, run, needs, token=hub_token)
    tokenizer = load_tokenizer(folder)
device = device_report()
if device["count"] > 1:
    print(
        "one of them is used here: a model that was trained on several is measured and fine-tuned on one"
    )

# %% [markdown]
# ## The model

# %%
path = {"": folder, "best": checkpoint.best(folder / "checkpoints")}.get(ckpt, ckpt)
if path is None:
    raise UserError(
        f"no checkpoint in {folder} was validated, so none is best: leave ckpt empty for the newest"
    )
meta = checkpoint.read_meta(path)
config = Config.from_dict(meta["config"])
if meta["tokenizer"] != tokenizer.fingerprint:
    raise UserError(
        f"{path} was trained with another tokenizer than the one at hand: name the run it belongs to"
    )
params, _ = checkpoint.restore(path, templates(config), only="params")
params = jax.device_put(params)
source = source or meta["settings"]["source"]
kind = "nanochat" if source in ("climbmix", "fineweb_edu", "tinystories") else "embedded"
mixtures = {
    stage: "" if name == "none" else f"{kind}_{stage}" if name == "auto" else name
    for stage, name in {"mid": mid, "sft": sft_mixture}.items()
}
taught = {stage: sft.parse_mixture(name) for stage, name in mixtures.items() if name}
auto = dict.fromkeys(
    [
        *(name for mixture in taught.values() for name in mixture if not name.endswith(".jsonl")),
        "code_completion",
    ]
)
names = {"none": [], "auto": [*auto], "all": [*auto | known_tasks()]}.get(tasks, tasks.split())
# found and read now, so that a wrong name, file or bundle stops the run before any compute
asked = questions.find(names, known_tasks()) if names else {}
bundle = None if core_bundle == "download" else core_bundle
core_tasks = [] if core_bundle == "none" else core.load_bundle(bundle, limit=core_items or None)[0]
choose("if_exists", if_exists, ("continue", "fresh", "stop"))
choose("optimizer_state", optimizer_state, ("fresh", "warm"))
print(
    f"{path}: step {meta['step']} of {config.num_steps}, {count_params(config)['total']:,} parameters, "
    f"{config.n_layer} layers x {config.n_embd}, {config.dtype} on {device['kind']}"
)

# %% [markdown]
# ## Bits per byte
#
# How many bits the model needs for each byte of held-out text: comparable between models with any tokenizer, and with file
# compressors, which know nothing of the language but read the very same bytes.

# %%
texts = data.head(data.documents(source, "val"), eval_bytes)
batches = data.batches(
    data.tokens_of(texts, tokenizer), config.microbatch, config.sequence_len, loop=False
)
clock = time.perf_counter()
score = evals.bits_per_byte(params, config, batches, tokenizer.token_bytes)
seconds = time.perf_counter() - clock
packers = data.baselines(texts)
print(
    f"{score.bytes:,} of {packers['bytes']:,} bytes in {len(texts)} documents of {source}, {seconds:.1f} s"
)
print(f"model    {score.bpb:.4f} ± {score.stderr:.4f} bits per byte (standard error over rows)")
print(f"gzip -9  {packers['gzip_bpb']:.4f}\nxz -9    {packers['xz_bpb']:.4f}")

# %% [markdown]
# By kind of text, each document now read from its own beginning:

# %%
by_kind = evals.bits_by_kind(params, config, tokenizer, texts)
for name, bits in sorted(by_kind["kinds"].items(), key=lambda entry: -entry[1]["bytes"]):
    print(
        f"{name:14} {bits['bytes'] / by_kind['bytes']:6.1%} of the bytes  {bits['bpb']:.3f} ± {bits['stderr']:.3f} bits per byte"
    )

# %% [markdown]
# ## What it finds easy and hard
#
# Each token of one held-out text, coloured by how many bits it cost: blue was expected, red was a surprise. `↵` is the end of a
# line, which costs bits too.

# %%
ids = tokenizer.encode(texts[0], bos=True)[: min(config.sequence_len, 240) + 1]
row = np.full((2, config.sequence_len), -1, np.int32)
row[0], row[1, : len(ids) - 1] = 0, ids[1:]
row[0, : len(ids) - 1] = ids[:-1]
bits = np.asarray(evals.token_losses(params, config, row[:1], row[1:]))[0, : len(ids) - 1] / np.log(
    2
)

show(pictures.surprise(tokenizer, ids[1:], bits), folder / "plots" / "surprise.png")

# %% [markdown]
# ## Completions
#
# Change the prompt or the sampling settings above and run this cell again.

# %%
prompt_ids = tokenizer.encode(prompt, bos=True)
clock = time.perf_counter()
sampling = Sampling(max_tokens, temperature, top_k, top_p, seed=seed, stop=(tokenizer.bos,))
new = generate(params, config, [prompt_ids] * num_samples, sampling)
seconds = time.perf_counter() - clock
completions = [prompt + tokenizer.decode(ids) for ids in new]
update_json(
    folder / "results.json",
    val_source=source,
    val_bpb=score.bpb,
    val_bpb_stderr=score.stderr,
    val_bytes=score.bytes,
    gzip_bpb=packers["gzip_bpb"],
    xz_bpb=packers["xz_bpb"],
    samples=completions,
)
for text in completions:
    print(text, "\n" + "─" * 60)
print(
    f"{sum(map(len, new))} tokens in {seconds:.1f} s, compilation included where the shape is new"
)

# %% [markdown]
# ## What a conversation looks like to the model
#
# The loss counts only what the assistant says: not the question, and not what the calculator answered, which it will never have
# to write itself.

# %%
chats = {stage: sft.open_mixture(mixture, "train", bad_lines) for stage, mixture in taught.items()}
held_out = {stage: sft.open_mixture(mixture, "val", bad_lines) for stage, mixture in taught.items()}
for stage, found in chats.items():
    # one that uses the calculator
    shown = next(
        (m for m in found.messages if '"type": "python"' in json.dumps(m)), found.messages[0]
    )
    pairs = zip(*data.render(tokenizer, shown, config.sequence_len + 1))
    print(f"{stage}, a conversation of its mixture:")
    for learnt, part in itertools.groupby(pairs, key=lambda pair: pair[1]):
        print(f"  {'learnt ' if learnt else 'context'}  {tokenizer.decode([i for i, _ in part])!r}")

# %% [markdown]
# ## Can it answer?
#
# A base model continues text; it does not know that a question wants an answer, nor when to stop. Here are held-out questions,
# put to it now and again after each phase. It writes its own answers; what stands between `<|python_start|>` and
# `<|python_end|>` is calculated for it, and the result put behind.

# %%
# by stage: the tasks' entries, bits per byte, whose they are, all of it
marks, bits_of, about, kept = {}, {"base": by_kind}, {}, {}
asking = questions.Questions(
    limit=task_items or None,
    seed=seed,
    batch=64,
    max_tokens=min(512, config.sequence_len * 3 // 8),
)


def examine(stage, path, params):
    """Put the tasks to a model, and see how well it still foresees text; the record goes to evals/STAGE.json."""
    found = questions.evaluate(params, config, tokenizer, names, asking) if names else {"tasks": {}}
    if stage not in bits_of:
        bits_of[stage] = evals.bits_by_kind(params, config, tokenizer, texts)
    if stage == "base" and core_tasks:
        measured = core.evaluate(
            core.scorer(params, config, tokenizer), tokenizer, bundle, limit=core_items or None
        )
        found = found | dict(core=measured["core"], tasks=found["tasks"] | measured["tasks"])
    for name, entry in found["tasks"].items():
        if name in shared:
            entry["contamination"] = {k: shared[name][k] for k in ("overlapping", "n", "short")}
    marks[stage] = {
        name: entry for name, entry in found["tasks"].items() if entry["kind"] != "core"
    }
    step = checkpoint.read_meta(path)["step"]
    about[stage] = dict(step=step, checkpoint=f"{STAGES[stage]}/step_{step:08d}", seed=seed)
    kept[stage] = records.write(
        folder, stage, about[stage] | found | dict(bpb={source: bits_of[stage]})
    )


# how many test items were in the pretraining text: they share so many words in a row with it (see lib/evals/contamination.py)
test_texts = {
    name: questions.texts_of(items)
    for name, task in asked.items()
    if isinstance(items := questions.items_or_reason(task, task_items or None), list)
}
test_texts |= {f"core/{task.label}": core.texts_of(task) for task in core_tasks}
trained_on = data.documents(meta["settings"]["source"], "train", shards=meta["settings"]["shards"])
try:
    shared = contamination.overlap(trained_on, test_texts) if test_texts else {}
    met = [
        f"{name} {found['overlapping']} of {found['n']}"
        for name, found in shared.items()
        if found["overlapping"]
    ]
    short, total = (sum(found[k] for found in shared.values()) for k in ("short", "n"))
    print(
        f"seen in the pretraining text: {', '.join(met) or 'none of the questions'} ({short} of {total} are too short to tell)"
    )
except UserError as e:  # a model from elsewhere, whose text cannot be had here
    shared = {}
    print(f"how many questions were in the pretraining text is not known: {e}")
examine("base", path, params)

# %% [markdown]
# ## Two phases, one code path
#
# Each phase takes what the stage before has learnt, packs whole conversations of its mixture into rows, and runs the very
# training step of `02_train` with a schedule of its own. A few conversations of each source, chosen by their hash, validate.


# %%
def fine_tune(stage, params, opt_state, epochs, lr):
    """Run a phase, or what is left of it, or find it finished; returns its state and the checkpoint's path."""
    plan, warm = sft.plan(chats[stage], tokenizer, config, epochs), optimizer_state == "warm"
    tuned = sft.phase_config(config, plan["steps"], lr, warm)
    settings = dict(
        mixture=taught[stage],
        conversations=chats[stage].identity,
        epochs=epochs,
        lr=lr,
        source=source,
        optimizer_state=optimizer_state,
        start=sft.fingerprint(params),
    )
    store = folder / STAGES[stage]
    saved = checkpoint.latest(store)
    if saved and if_exists == "stop":
        raise UserError(
            f"{folder} has a phase {stage} already: pass if_exists=continue or fresh, or another run"
        )
    if saved and if_exists == "fresh":
        print(f"fresh start: what was there is now in {set_aside(folder, store.name)}")
        saved = None
    if saved and (then := checkpoint.read_meta(saved)["settings"]) != settings:
        changed = ", ".join(name for name in settings if then.get(name) != settings[name])
        raise UserError(
            f"the phase {stage} in {folder} was run with other settings ({changed}): set them back, pass "
            "if_exists=fresh to run it anew, or take another run name"
        )
    if saved:
        state, meta = checkpoint.restore(saved, train.state_template(tuned))
    else:
        state, meta = sft.start(params, tuned, opt_state if warm else None), {}
    done, last, rows = (
        int(state.step),
        tuned.num_steps,
        tuned.total_batch_size // tuned.sequence_len,
    )
    print(
        f"{stage}: {sft.PHASES[stage]}\n  "
        + "  ".join(f"{name} {n:,}" for name, n in plan["conversations"].items())
        + f"\n  {plan['tokens']:,} tokens x {epochs:g} epochs = {last} steps of {rows} x {tuned.sequence_len}, {lr:g} x rates"
        + (
            f"; finished before: {saved}"
            if done == last
            else f"; continuing at step {done}"
            if saved
            else ""
        )
    )
    if done == last:
        return state, saved
    val = list(
        data.chat_batches(
            held_out[stage], tokenizer, tuned.microbatch, tuned.sequence_len, loop=False
        )
    )
    batches = data.prefetch(
        data.chat_batches(
            chats[stage],
            tokenizer,
            rows,
            tuned.sequence_len,
            cursor=meta.get("cursor"),
            seed=tuned.seed,
        ),
        jax.device_put,
    )
    step_fn = train.make_train_step(tuned)
    with (
        Metrics(store, last, resumed=done if saved else None, config=tuned.to_dict()) as metrics,
        checkpoint.Saver(store, keep=1, size=checkpoint.nbytes(state)) as saver,
        interruptible() as signal,
    ):

        def pause(n):
            """Whether to look at the state after n steps: to measure, to save or to stop."""
            measured, kept = n % max(1, last // 10) == 0, n % max(1, last // 3) == 0
            return signal.stop or n == last or measured or kept  # noqa: B023

        for step in train.steps(step_fn, state, batches, tuned, pause=pause):
            values, n = step.metrics, step.step
            if step.state is not None:
                state = step.state
                values["val_loss"] = sft.validation_loss(state.params, tuned, val)
                if n == last or n % max(1, last // 3) == 0 or signal.stop:
                    saver.save(
                        n,
                        state,
                        dict(
                            config=tuned.to_dict(),
                            cursor=step.cursor,
                            settings=settings,
                            tokenizer=tokenizer.fingerprint,
                            loss=values["loss"],
                        ),
                        metric=values["val_loss"],
                    )
            metrics.log(n, values)
            if signal.stop and step.state is not None:
                break
        saved = saver.wait()
        mirror.send()
    if int(state.step) < last:
        raise UserError(
            f"stopped in phase {stage} at step {int(state.step)} and saved: run again with the same settings"
        )
    found = step.cursor
    print(
        f"  {found['conversations']:,} conversations, {found['truncated']} cut to the length of a row, {found['empty']} left "
        f"out, having nothing to learn; {found['targets'] / found['cells']:.0%} of the tokens learnt, "
        f"{found['padding'] / found['cells']:.1%} padding"
    )
    return state, saved


stage, opt_state, curves = "base", None, {}
if taught and optimizer_state == "warm":
    opt_state = checkpoint.restore(path, train.state_template(config))[0].opt_state
for phase, epochs, lr in (("mid", mid_epochs, mid_lr), ("sft", sft_epochs, sft_lr)):
    if phase in taught:
        state, path = fine_tune(phase, params, opt_state, epochs, lr)
        stage, params, opt_state = phase, state.params, state.opt_state
        curves[phase] = read_jsonl(folder / STAGES[phase] / "metrics.jsonl")
        examine(phase, path, params)

# %%
if curves:
    show(pictures.fine_tuning(curves), folder / "plots" / "fine_tuning.png")

# %% [markdown]
# ## Before and after
#
# Share of held-out questions answered rightly, with its standard error. What a held-out question is about, the numbers of a sum
# or the word to spell, never occurs in training.

# %%
graded = [name for name, entry in marks.get(stage, {}).items() if entry["kind"] != "perplexity"]
print(
    "bits per byte of text  "
    + "  ".join(f"{stage_} {found['bpb']:.4f}" for stage_, found in bits_of.items())
)
if graded:
    print(f"{'% right':22}{'random':>8}" + "".join(f"{stage:>16}" for stage in marks))
    for name in graded:
        row = [found[name] for found in marks.values()]
        print(
            f"{name:22}{100 * (row[0]['baseline'] or 0):8.1f}"
            + "".join(f"{100 * e['score']:9.1f} ± {100 * (e['stderr'] or 0):4.1f}" for e in row)
            + f"   of {row[0]['n']}"
        )
    rated = {
        stage_: {name: found[name] for name in graded if name in found}
        for stage_, found in marks.items()
    }
    show(pictures.scores(rated), folder / "plots" / "tasks.png")
show(pictures.bits_by_kind(bits_of), folder / "plots" / "kinds.png")

# %% [markdown]
# Which of these differences are more than chance? Each stage against the one before, on the same questions:

# %%
for before, after in itertools.pairwise(kept):
    compared = stats.compare(kept[before], kept[after], (before, after))
    print("\n".join(stats.told(compared)))

# %% [markdown]
# ## Results

# %%
scores = {
    f"{stage_}_{name}": entry["score"]
    for stage_, found in marks.items()
    for name, entry in found.items()
}
losses = {
    f"{phase}_val_loss": column(logged, "val_loss")[1][-1] for phase, logged in curves.items()
}
update_json(folder / "results.json", stage=stage, **scores, **losses)
print(results_table(folder))

# %% [markdown]
# ## Talk to it
#
# Change `say` in the parameters and run this cell again, or switch `live` on and type. What the calculator did is in brackets. The
# answers to `say` take the likeliest tokens; with `live` on they are drawn by the sampling settings above.

# %%
engine = Engine(params, config, 1, config.sequence_len, tokenizer, calculator)
conversation = []


def talk(words):
    """Say something to the model, print its answer as it comes, and keep both in the conversation."""
    ids, _ = chat.fit(
        tokenizer,
        [*conversation, dict(role="user", content=words)],
        config.sequence_len,
        max_tokens,
    )
    room = min(max_tokens, config.sequence_len - len(ids))
    reader, kind = chat.Reader(tokenizer), "text"
    warmth = temperature if live else 0.0
    sampling = Sampling(room, warmth, top_k, top_p, seed=seed, stop=chat.ends(tokenizer))
    for piece in chat.reply(engine, ids, sampling, reader):
        if piece.kind != kind:
            print({"python": " [", "python_output": " = ", "text": "] "}[piece.kind], end="")
        kind = piece.kind
        print(piece.text, end="", flush=True)
    print()
    conversation.extend(
        [
            dict(role="user", content=words),
            dict(role="assistant", content=chat.compact(reader.parts)),
        ]
    )


for words in filter(None, map(str.strip, say.split("|"))):
    print(f"you    {words}\nmodel  ", end="")
    talk(words)
said = [
    dict(prompt=asked["content"], text=spoken(answer["content"]), parts=answer["content"])
    for asked, answer in zip(conversation[::2], conversation[1::2])
]
if taught:
    records.write(folder, stage, about[stage] | dict(samples=said))
while live and (words := input("you    ").strip()):
    print("model  ", end="")
    talk(words)

# %% [markdown]
# ## The report card
#
# All of it on one page, which needs nothing else: open it in a browser, or send it to someone.

# %%
card = report.write(folder)
print(f"report: {card}")
mirror.wait()

# %% [markdown]
# ## Where to go next
#
# A model that predicts better: train longer, larger or on other text in `02_train`. A model that answers other things: write
# chats as JSONL, one `{"messages": [...]}` a line, and name the file in a mixture above. A checkpoint from the Hugging Face Hub
# is loaded by giving its address as the checkpoint above. To talk in a terminal: `python -m lib.chat`.
