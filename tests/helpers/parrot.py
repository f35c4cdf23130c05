"""A tiny model that knows a few conversations by heart, so that chats can be tested with answers
that are known.
"""

import fcntl
import hashlib
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax

from lib import model
from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.files import replacing
from lib.params import init_params
from lib.runs import STAGES
from lib.train import checkpoint
from tests.helpers import ROOT

MARKDOWN = """# A heading

Some **bold**, *italic* and `code`, with a [link](https://example.com/a?b=c).

- one
- two
  - inside two

1. first
2. second

> quoted

| name | value |
|---|---|
| pi | 3.14 |

```python
def add(a, b):  # a sum
    return a + b
```"""
ATTACK = """<img src=x onerror="window.hacked=1"> <script>window.hacked=1</script> \
[a](javascript:window.hacked=1) ![b](http://evil.test/x)
```"><svg onload=window.hacked=1>
<b>bold</b>
```"""
COUNT = " ".join(map(str, range(1, 121)))
CHATS = {  # question: answer
    "hello": "Hello! How can I help?",
    "What is 37 plus 85?": [
        {"type": "text", "text": "Let me see. "},
        {"type": "python", "text": "37+85"},
        {"type": "python_output", "text": "122"},
        {"type": "text", "text": "37 plus 85 is **122**."},
    ],
    "Show me some Markdown.": MARKDOWN,
    "Say it in other scripts.": "Grüße aus 東京, naïve 🙂 café.",
    "Attack the page.": ATTACK,
    "Count to 120.": COUNT,
}
STEPS = 260


def messages(question: str) -> list[dict]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": CHATS[question]},
    ]


def run() -> Path:
    """The run folder of the model, trained once for all tests and kept until the code that makes it
    changes.
    """
    lib = ROOT / "lib"
    sources = [Path(__file__), lib / "config.py", lib / "params.py", lib / "data" / "tokenizer.py"]
    files = ("checkpoint", "records", "saving", "trees")
    sources += [lib / "train" / f"{name}.py" for name in files]
    sources += sorted((lib / "model").glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    folder = ROOT / ".cache" / f"parrot-{digest[:12]}"
    folder.parent.mkdir(exist_ok=True)
    # the other test files wait for the one that trains
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with replacing(folder) as tmp:
                make(tmp)
    return folder


def make(folder: Path, sequence_len: int = 768):
    """Train the model (seconds) and leave it as an sft checkpoint in a run folder."""
    text = "\n".join(f"{q}\n{a if isinstance(a, str) else a[-1]['text']}" for q, a in CHATS.items())
    tokenizer = Tokenizer.train([text], 300)
    tokenizer.save(folder / "tokenizer.json")
    config = Config(
        vocab_size=tokenizer.vocab_size,
        sequence_len=sequence_len,
        n_layer=2,
        n_embd=64,
        n_head=2,
        n_kv_head=1,
        head_dim=32,
        mlp_dim=256,
        window_pattern="L",
        microbatch=1,
        total_batch_size=sequence_len,
        scan_layers=False,
    )
    rows = [tokenizer.render_conversation(messages(q), sequence_len) for q in CHATS]
    T = max(len(ids) for ids, _ in rows)
    inputs = np.array([ids + [0] * (T - len(ids)) for ids, _ in rows])
    learn = np.array([mask + [0] * (T - len(mask)) for _, mask in rows])
    targets = np.where(learn, inputs, -1)
    inputs, targets = inputs[:, :-1], targets[:, 1:]
    params = init_params(0, config)
    optimizer = optax.adam(optax.cosine_decay_schedule(6e-3, STEPS))

    # here it is the steps that cost, and not the compiler (see tests/conftest.py)
    effort = dict(xla_backend_optimization_level=2, xla_llvm_disable_expensive_passes=False)

    @partial(jax.jit, donate_argnums=(0, 1), compiler_options=effort)
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: model.loss_fn(p, config, inputs, targets)[0])(
            params
        )
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    for _ in range(STEPS):
        params, state, loss = step(params, state)
    assert loss < 0.05, f"the parrot has not learnt its chats: loss {loss:.3f}"
    meta = {"config": config.to_dict(), "tokenizer": tokenizer.fingerprint}
    checkpoint.save(folder / STAGES["sft"], STEPS, {"params": params}, meta)
