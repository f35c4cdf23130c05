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
# A language model reads numbers, not letters. The tokenizer decides which pieces of text become one number each: it
# starts from the 256 bytes and keeps merging the pair of pieces that occurs most often (byte pair encoding) until the
# vocabulary is full.
#
# **At the end you have** `runs/NAME/tokenizer.json` (plain JSON), how well it compresses several kinds of text beside
# GPT-2's and GPT-4's tokenizers, and pictures of what it learnt.
#
# **Hardware and time:** any CPU; ten seconds on the Python standard library (the default, nothing to download), some
# minutes on two billion characters of web text.

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

setup()

# %%
import time

import numpy as np

from lib import pictures
from lib.data import documents, head
from lib.data.tokenizer import FILE, Tokenizer, load_tokenizer
from lib.files import UserError, choose, update_json
from lib.notebook import flags, secret
from lib.pictures import show
from lib.runs import open_run
from lib.runtime import progress

# %% tags=["parameters"]
# @title Parameters
# @markdown Name of the run: everything goes to runs/NAME
run = "default"  # @param {type:"string"}
# @markdown What to read: a name, or a path or glob of .txt .md .py .jsonl .parquet files
source = "stdlib"  # @param ["stdlib", "stdlib_with_tests", "climbmix", "fineweb_edu", "tinystories"] {"allow-input":true}
# @markdown Number of token ids, the nine special tokens included
vocab_size = 32768  # @param {type:"integer"}
# @markdown Training shards to read of a source on the Hub, about 100 MB each
shards = 8  # @param {type:"integer"}
# @markdown Stop reading after this many characters
max_chars = 2000000000  # @param {type:"integer"}
# @markdown Read at most this many characters of one document, so that a few giants do not rule
doc_cap = 50000  # @param {type:"integer"}
# @markdown Instead of training: tiktoken:gpt2, tiktoken:cl100k_base, hf:USER/NAME, or a file; empty trains
pretrained = ""  # @param {type:"string"}
# @markdown When the run has a tokenizer: continue with it if its settings are these, make it afresh, or stop
if_exists = "continue"  # @param ["continue", "fresh", "stop"]
# @markdown Hugging Face Hub repository (USER/NAME) to push to, with the secret HF_TOKEN; empty pushes nothing
push_to = ""  # @param {type:"string"}

# %%
globals().update(flags(globals()))
folder = open_run(run)
path, plots = folder / FILE, folder / "plots"
settings = (
    {"pretrained": pretrained}
    if pretrained
    else {
        "source": source,
        "vocab_size": vocab_size,
        "shards": shards,
        "max_chars": max_chars,
        "doc_cap": doc_cap,
    }
)
existing = None
if path.exists() and choose("if_exists", if_exists, ("continue", "fresh", "stop")) == "stop":
    raise UserError(f"{path} exists: choose another run, or pass --if-exists continue or fresh")
if path.exists() and if_exists == "continue":
    existing = Tokenizer.load(path)
    made_with = existing.meta.get("settings", {})
    if changed := [
        name for name in settings | made_with if settings.get(name) != made_with.get(name)
    ]:
        raise UserError(
            f"{path} was made with other settings ({', '.join(changed)}): choose another run, or pass "
            "--if-exists fresh to replace it"
        )

# %% [markdown]
# ## The corpus
#
# Documents come as a stream, so a corpus may be larger than memory. One part of it, the validation split, is never
# trained on: that is where compression is measured.

# %%
validation = head(documents(source, "val", shards=shards), 2_000_000)
lengths = np.array([len(text) for text in validation])
print(
    f"{source}, validation split: {len(validation):,} documents with {lengths.sum():,} characters (2 MB at most);\n"
    f"characters each: median {np.median(lengths):,.0f}, mean {lengths.mean():,.0f}, longest {lengths.max():,};\n"
    f"one of them begins:\n\n{validation[len(validation) // 2][:600]}"
)

# %% [markdown]
# ## Training
#
# rustbpe first splits every document into words, numbers of one or two digits, punctuation and blanks (no merge
# crosses these borders), counts them, and then merges pairs, the most frequent first.


# %%
def counted(texts, seen, bar):
    """The texts, while the progress bar counts the characters used of each."""
    for text in texts:
        seen["documents"] += 1
        seen["characters"] += min(len(text), doc_cap)
        bar.update(min(len(text), doc_cap))
        yield text


start = time.perf_counter()
if existing:
    tokenizer = existing
    print(f"continuing with {path}: same settings, nothing to train")
elif pretrained:
    tokenizer = load_tokenizer(pretrained)
else:
    seen = {"documents": 0, "characters": 0}
    with progress(unit=" characters", unit_scale=True, desc="reading") as bar:
        texts = counted(documents(source, "train", shards=shards), seen, bar)
        tokenizer = Tokenizer.train(texts, vocab_size, max_chars, doc_cap, meta=seen)
    print(f"trained on {seen['documents']:,} documents, {seen['characters']:,} characters")
seconds = time.perf_counter() - start
if not existing:
    tokenizer.meta["settings"] = settings
    tokenizer.save(path)
    if (folder / "checkpoints").exists():
        print(f"note: the checkpoints in {folder} belong to the tokenizer that was there before")
print(
    f"{tokenizer.vocab_size:,} ids ({len(tokenizer.tokens):,} learnt, {len(tokenizer.special)} special) "
    f"in {seconds:.1f} s: {path}"
)

# %% [markdown]
# The special tokens come after the learnt ones. `<|bos|>` starts every document; the others fence the turns and tool
# calls of a chat. Their names inside a text are plain text, so nobody can forge one by typing it.

# %%
print("  ".join(f"{name} {i}" for name, i in tokenizer.special.items()))
for word in (" the", " return", " tokenizer", " internationalization", " 2026", " Straße"):
    print(f"{word!r:25}", " | ".join(tokenizer.decode([i]) for i in tokenizer.encode(word)))

# %% [markdown]
# ## Compression
#
# Bytes per token: the more bytes one token stands for, the more text fits into the context and the less computing a
# text costs. GPT-2's and GPT-4's tokenizers, fetched once, are the yardstick; they have 50,257 and 100,277 ids and
# were trained on web text.

# %%
KINDS = {
    "prose": """The harbour was empty when they came down to it in the morning. Fog lay on the water, and somewhere
behind it a bell kept time for nobody. "You said there would be a boat," said Anna, not unkindly; she had slept badly and wanted
coffee more than she wanted to be right. Her brother shrugged. There had been a boat yesterday, and the day before, and
he had seen no reason why the sea should change its habits on their account. They sat on the wall and waited, and little
by little the other side appeared.""",
    "Python code": """def moving_average(values, window):
    \"\"\"Yield the mean of each run of `window` neighbours.\"\"\"
    if window < 1 or window > len(values):
        raise ValueError(f"window must be in 1..{len(values)}, not {window}")
    total = sum(values[:window])
    for i in range(window, len(values) + 1):
        yield total / window
        if i < len(values):
            total += values[i] - values[i - window]


class Timer:
    def __enter__(self):
        self.start = time.perf_counter()
        return self

    def __exit__(self, *exc_info):
        self.elapsed = time.perf_counter() - self.start
""",
    "Markdown": """# Getting started

1. Install the package: `pip install example`
2. Create a file named **config.yaml** and fill in the fields
3. Run `example serve --port 8080` and open <http://localhost:8080>

| option | default | meaning |
|--------|---------|---------|
| `port` | 8080 | where the server listens |
| `debug` | false | print every request |

> **Note:** see the [manual](https://example.org/manual#install) for *advanced* settings.
""",
    "numbers": """year,population,growth
1990,5327231061,1.74
2000,6143493823,1.32
2010,6956823603,1.24
2020,7794798739,1.05
17 * 24 = 408; 408 / 12 = 34; 34.5 + 0.25 = 34.75; 2^16 = 65536; 65536 - 1 = 65535
3.14159265358979, 2.71828182845905, 1.41421356237310, 0.57721566490153
+49 30 1234567, 192.168.0.254, 2026-11-20T21:50:03Z, 0x7fff5fbff8c0, 1,048,576 bytes, $1,299.99, 99.95 %
""",
    "other languages": """Der Zug nach München fährt heute leider nicht; die nächste steht auf der Anzeige.
La niña corrió hacia el jardín, pero ya no había nadie. Où est donc passée la clé de l'armoire ?
Поезд отправляется через десять минут.
会议将于明天上午九点开始，请准时参加。 今日はとても天気がいいので、公園へ行きましょう。 내일 아침에 다시 전화하겠습니다.
يبدأ الدرس في الساعة التاسعة صباحا. मुझे एक कप चाय चाहिए। Η βιβλιοθήκη ανοίγει στις οκτώ.""",
    f"{source} (validation)": validation,
}


def bytes_per_token(tokenizer, texts):
    """UTF-8 bytes of a text, or of a list of them, over the number of ids they become."""
    texts = [texts] if isinstance(texts, str) else texts
    return sum(len(text.encode()) for text in texts) / sum(map(len, tokenizer.encode_batch(texts)))


tokenizers = {"ours": tokenizer}
for name, encoding in {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}.items():
    try:
        tokenizers[name] = Tokenizer.from_tiktoken(encoding, timeout=20)
    except UserError as e:
        print(f"{name} is left out of the comparison: {e}")
compression = {
    kind: {name: bytes_per_token(its, texts) for name, its in tokenizers.items()}
    for kind, texts in KINDS.items()
}
print(f"\n{'bytes per token':26}" + "".join(f"{name:>8}" for name in tokenizers))
for kind, row in compression.items():
    print(f"{kind:26}" + "".join(f"{value:8.2f}" for value in row.values()))

# %%
show(pictures.compression(compression), plots / "tokenizer_compression.png")

# %% [markdown]
# ## Pictures
#
# Left, the vocabulary: how many tokens have which length. Right, the validation text: how long the tokens are that it
# is made of. The two differ because short tokens are few but used all the time.

# %%
ids = np.concatenate([np.array(x, int) for x in tokenizer.encode_batch(validation)])
learnt = tokenizer.token_bytes[: len(tokenizer.tokens)]
show(
    pictures.token_lengths(learnt, tokenizer.token_bytes[ids]),
    plots / "tokenizer_lengths.png",
)
used = np.unique(ids).size
words = [i for i in np.argsort(-learnt, kind="stable") if tokenizer.tokens[i].strip().isalpha()]
print(
    f"{used:,} of {len(learnt):,} learnt tokens ({used / len(learnt):.0%}) occur in the validation text;\n"
    "the longest words: " + ", ".join(tokenizer.decode([i]).strip() for i in words[:8])
)

# %% [markdown]
# A sample as the model sees it: every token on its own colour. `↵` is a line end, `�` a part of a character that has
# no token of its own, and `□` a character that the font of the picture lacks.

# %%
sample = "\n".join(
    [
        validation[len(validation) // 2][:700].rstrip(),
        "",
        KINDS["prose"].replace("\n", " "),
        "",
        KINDS["numbers"][:130],
        "Grüße aus dem Café, Поезд отправляется, 東京",
    ]
)
show(pictures.coloured_tokens(tokenizer, sample), plots / "tokenizer_sample.png")

# %% [markdown]
# ## A chat, as training will see it
#
# Only what the assistant is to say (marked `+`) is learnt: not the user's words, and not what its tools answered.

# %%
chat = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is 37 * 12?"},
    {
        "role": "assistant",
        "content": [
            {"type": "python", "text": "37 * 12"},
            {"type": "python_output", "text": "444"},
            {"type": "text", "text": "It is 444."},
        ],
    },
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
others = [texts for texts in KINDS.values() if isinstance(texts, str)] + [
    "",
    "\x00 <|bos|> \r\n 🙂" * 10,
]
for text in validation + others:
    ids = saved.encode(text)
    assert saved.decode(ids) == text
    assert saved.token_bytes[ids].sum() == len(text.encode())
    assert max(ids, default=0) < saved.bos
print(
    f"{len(validation):,} validation documents and {len(others)} other texts survive the round trip"
)

# %% [markdown]
# ## Save
#
# The figures go to `results.json`, which the next notebooks add to. With `push_to` the tokenizer also goes to the
# Hugging Face Hub, from where `hf:USER/NAME` pulls it.

# %%
results = {
    "bytes_per_token": compression[f"{source} (validation)"]["ours"],
    "vocab_size": tokenizer.vocab_size,
    "compression": compression,
}
update_json(folder / "results.json", **results, **({} if existing else {"tokenizer_s": seconds}))
if push_to:
    print("pushed to", tokenizer.push_to_hub(push_to, secret("HF_TOKEN")))
print(
    f"{results['bytes_per_token']:.2f} bytes per token on the validation split",
    path,
    folder / "results.json",
    plots,
    sep="\n",
)

# %% [markdown]
# ## Where to go next
#
# - `02_train` trains a language model on the tokens of this run: `python 02_train.py --run NAME`
# - Another vocabulary: `python 01_tokenizer.py --run small --vocab-size 4096`. In a small model the
#   embeddings of a large vocabulary are most of the parameters.
# - Your own text: `--source "notes/**/*.md"`
