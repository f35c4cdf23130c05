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
# # 01 · Train a tokenizer
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/rawchat/rawchat/blob/main/01_tokenizer.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/rawchat/rawchat/blob/main/01_tokenizer.ipynb)
#
# A language model reads numbers, not letters. The tokenizer decides which pieces of text become one
# number each: it starts from the 256 bytes and keeps merging the pair of pieces that occurs most
# often, until the vocabulary is full. That is *byte pair encoding*
# ([Gage 1994](https://www.derczynski.com/papers/archive/BPE_Gage.pdf); for language models
# [Sennrich et al. 2016](https://arxiv.org/abs/1508.07909)).
#
# **At the end you have** `tokenizer.json` in your run's folder, you have merged a pair by hand, and
# you know how well your vocabulary compresses prose, code, numbers and other languages beside
# GPT-2's and GPT-4's.
#
# **Hardware and time:** any CPU. Ten seconds on the default of a laptop (the source code of
# Python's own standard library, nothing to download); some minutes on two billion characters of web
# text.

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

import numpy as np

from lib import pictures, recipes
from lib.data import documents, head, vocabulary
from lib.data.samples import SAMPLES
from lib.data.tokenizer import FILE, load_tokenizer
from lib.data.vocabulary import Vocabulary, make_tokenizer
from lib.files import update_json
from lib.notebook import device_report, flags, secret
from lib.pictures import show
from lib.puzzles import check
from lib.runs import enter
from lib.runtime import host

# %% cellView="form" tags=["parameters"]
# @title Parameters
# @markdown Name of the run: everything goes to runs/NAME
run = "default"  # @param {type:"string"}
# @markdown Where runs live: drive, hub:USER/NAME, gs://…, a path; empty: as any notebook here was told, or the secret RAWCHAT_HOME, else this machine
home = ""  # @param ["", "drive"] {"allow-input":true}
# @markdown What to read: a name, or a path or glob of .txt .md .py .jsonl .parquet files; empty: what the preset needs
source = ""  # @param ["", "stdlib", "stdlib_with_tests", "climbmix", "fineweb_edu", "tinystories"] {"allow-input":true}
# @markdown Number of token ids, the nine special tokens included (0: the preset's)
vocab_size = 0  # @param {type:"integer"}
# @markdown When the run has a tokenizer: continue with it if its settings are these, make it afresh, or stop
if_exists = "continue"  # @param ["continue", "fresh", "stop"]

# %% cellView="form" tags=["parameters"]
# @title Advanced
# @markdown The preset of 02 that this is for: it decides text and vocabulary where you don't
preset = "auto"  # @param ["auto", "cpu_demo", "colab_free_v5e", "colab_free_t4", "colab_v5e", "colab_v6e", "gpu", "gpt2_like", "llama_like", "nanochat_d12", "nanochat_d20", "nanochat_d24"]
# @markdown Training shards to read of a source on the Hub, about 100 MB each
shards = 8  # @param {type:"integer"}
# @markdown Stop reading after this many characters
max_chars = 2000000000  # @param {type:"integer"}
# @markdown Read at most this many characters of one document, so that a few giants do not rule
doc_cap = 50000  # @param {type:"integer"}
# @markdown Instead of training: tiktoken:gpt2, tiktoken:cl100k_base, hf:USER/NAME, or a file; empty trains
pretrained = ""  # @param {type:"string"}
# @markdown Hugging Face Hub repository (USER/NAME) to push to, with the secret HF_TOKEN; empty pushes nothing
push_to = ""  # @param {type:"string"}

# %%
globals().update(flags(globals()))
folder, mirror = enter(home, run, secret=secret)
device = device_report()
plan = recipes.for_tokenizer(preset, source, vocab_size, device, bool(host()))
print(plan.why)

# %% [markdown]
# ## The corpus
#
# Documents come as a stream, so a corpus may be larger than memory. One part of it, the validation
# split, is never trained on: that is where compression is measured. One document begins like this.

# %%
validation = head(documents(plan.source, "val", shards=shards), 2_000_000)
lengths = np.array([len(text) for text in validation])
print(
    f"{plan.source}: {len(validation):,} documents held out, "
    f"{lengths.sum():,} characters (2 MB at most)"
)
print(f"median {np.median(lengths):,.0f} characters, longest {lengths.max():,}\n")
print(validation[len(validation) // 2][:600])

# %% [markdown]
# ## The whole algorithm
#
# First the text is cut into *words*: letters with the one blank or sign before them, one or two
# digits, other signs, blanks. No merge crosses these borders, so that "dog." and "dog!" share a
# token. Then count the pairs of
# neighbours, merge the most frequent one everywhere, and begin again.
#
# **Guess before you run it:** which pair comes first in this text? And how many bytes will the
# fifth token have?

# %%
words = vocabulary.words_of(validation[:200])
for _ in range(5):
    pair, count = vocabulary.most_frequent_pair(words)
    print(f"{pair[0]!r:12} + {pair[1]!r:12} occurs {count:,} times")
    words = {vocabulary.merged(word, pair): n for word, n in words.items()}

# %% [markdown]
# **A puzzle:** write the step that joins a pair in one word. The cell says whether it is right; it
# stops nothing.
#
# <details><summary>Hint</summary>
#
# Walk through the word with an index. Where this piece and the next are the pair, take both and go
# on by two; otherwise take one. From the left: in <code>a a a</code> the pair <code>a a</code>
# occurs once.
#
# </details>


# %%
def merge(word, pair):
    """The word, a tuple of pieces such as (b"l", b"o", b"w"), the pair joined wherever it is."""
    return word  # your code here


solved = check("merge", merge)

# %% [markdown]
# ## Training
#
# The same thing, fast: [rustbpe](https://pypi.org/project/rustbpe/) counts once and updates the
# counts after each merge. Then the first twenty merges, with how often each pair occurred in the
# held-out text.

# %%
start = time.perf_counter()
settings = Vocabulary(plan.source, plan.vocab_size, shards, max_chars, doc_cap, pretrained)
tokenizer, made = make_tokenizer(folder, settings, if_exists)
seconds = time.perf_counter() - start
print(
    f"{tokenizer.vocab_size:,} ids in {seconds:.1f} s"
    if made
    else "same settings, nothing to train"
)
print(f"{len(tokenizer.tokens):,} learnt and {len(tokenizer.special)} special: {folder / FILE}")

# %%
for token, count in vocabulary.first_merges(tokenizer, validation[:200]):
    print(f"{token!r:14} {count:>9,}")

# %% [markdown]
# A word becomes tokens in the same order: of all pairs that make a known token, the one that was
# learnt first is merged.

# %%
for pieces in vocabulary.merge_steps(tokenizer, " tokenizer"):
    print(" | ".join(piece.decode(errors="replace") for piece in pieces))
print()
for word in (" the", " return", " internationalization", " 2026", " Straße"):
    print(f"{word!r:25}", " | ".join(tokenizer.decode([i]) for i in tokenizer.encode(word)))

# %% [markdown]
# Special tokens come after the learnt ones. `<|bos|>` starts every document; the others fence the
# turns and tool calls of a chat. Their names inside a text are plain text, so nobody can forge one
# by typing it.

# %%
print("  ".join(f"{name} {i}" for name, i in tokenizer.special.items()))

# %% [markdown]
# ## Compression
#
# Bytes per token: the more bytes one token stands for, the more text fits into the context and the
# less computing a text costs. GPT-2's and GPT-4's tokenizers, fetched once, are the yardstick; they
# have 50,257 and 100,277 ids and were trained on web text. **Look at** the kinds that your corpus
# had none of: bytes per token near 1 means that the model will read them byte by byte.

# %%
held_out = f"{plan.source} (validation)"
compression = vocabulary.compare(tokenizer, SAMPLES | {held_out: validation})
show(pictures.compression(compression), folder / "plots" / "tokenizer_compression.png")

# %%
print(f"{'bytes per token':32}" + "".join(f"{name:>8}" for name in compression[held_out]))
for kind, by_tokenizer in compression.items():
    print(f"{kind:32}" + "".join(f"{value:8.2f}" for value in by_tokenizer.values()))

# %% [markdown]
# Left, the vocabulary: how many tokens have which length. Right, the validation text: how long the
# tokens are that it is made of. **Look at** how the two differ: short tokens are few, but used all
# the time.

# %%
ids = np.concatenate([np.array(x, int) for x in tokenizer.encode_batch(validation)])
learnt = tokenizer.token_bytes[: len(tokenizer.tokens)]
lengths = pictures.token_lengths(learnt, tokenizer.token_bytes[ids])
show(lengths, folder / "plots" / "tokenizer_lengths.png")
used = np.unique(ids).size
print(f"{used:,} of {len(learnt):,} learnt tokens ({used / len(learnt):.0%}) occur in this text")

# %% [markdown]
# A sample as the model sees it, every token on its own colour. `↵` is a line end, `�` a part of a
# character that has no token of its own, and `□` a character that the font of the picture lacks.

# %%
sample = validation[len(validation) // 2][:700].rstrip() + "\n\n" + SAMPLES["numbers"][:130]
sample += "\nGrüße aus dem Café, Поезд отправляется, 東京"
show(pictures.coloured_tokens(tokenizer, sample), folder / "plots" / "tokenizer_sample.png")

# %% [markdown]
# ## A chat, as training will see it
#
# Only what the assistant is to say (marked `+`) is learnt: not the user's words, and not what its
# tools answered.

# %%
calls = [{"type": "python", "text": "37 * 12"}, {"type": "python_output", "text": "444"}]
chat = [
    {"role": "user", "content": "What is 37 * 12?"},
    {"role": "assistant", "content": [*calls, {"type": "text", "text": "It is 444."}]},
]
for i, learn in zip(*tokenizer.render_conversation(chat)):
    print(f"{'+' if learn else ' '} {i:>6}  {tokenizer.decode([i])!r}")

# %% [markdown]
# ## Checks
#
# Every text must come back as it went in, and the bytes of its tokens must add up to its own.

# %%
saved = load_tokenizer(folder)
assert saved.fingerprint == tokenizer.fingerprint
texts = [*validation, *SAMPLES.values(), "", "\x00 <|bos|> \r\n 🙂" * 10]
vocabulary.check_round_trip(saved, texts)
print(f"{len(texts):,} texts survive the round trip")

# %% [markdown]
# ## Save
#
# The figures go to `results.json`, which the next notebooks add to.

# %%
results = {
    "bytes_per_token": compression[held_out]["ours"],
    "vocab_size": tokenizer.vocab_size,
    "compression": compression,
}
update_json(folder / "results.json", **results, **({"tokenizer_s": seconds} if made else {}))
if push_to:
    print("pushed to", tokenizer.push_to_hub(push_to, secret("HF_TOKEN")))
mirror.wait()
print(f"{results['bytes_per_token']:.2f} bytes per token on the validation split: {folder}")

# %% [markdown]
# ## Questions
#
# 1. Why does training begin with bytes and not with letters? What would happen to `東` otherwise?
# 2. The vocabulary doubles. What happens to the number of tokens of a text, and to the parameters
#    of the model?
# 3. Why may no merge cross the border between letters and the punctuation behind them?
# 4. Which numbers become one token here, and what does that mean for a model that is to add them?
# 5. Two tokenizers give a text 1,000 and 800 tokens. Whose model has the lower loss per token, and
#    why is that no comparison? (04 measures bits per byte instead.)
#
# ## Where to go next
#
# - [02_train](02_train.ipynb) trains a language model on the tokens of this run:
#   `python 02_train.py --run NAME`
# - Another vocabulary: `python 01_tokenizer.py --run small --vocab-size 4096`. In a small model the
#   embeddings of a large vocabulary are most of the parameters.
# - Your own text: `--source "notes/**/*.md"`
# - The code: [tokenizer](lib/data/tokenizer.py), [vocabulary](lib/data/vocabulary.py),
#   [sources](lib/data/sources.py)
