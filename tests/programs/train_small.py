"""Trains a small model on the texts of a folder, from its checkpoint if there is one. Arguments:
folder, seconds to wait after each step.

Prints a line of JSON per step, [step, loss], and at the end [step, cursor, digest of the state].
"""

import hashlib
import json
import sys
import time

import jax
import numpy as np

from lib import data, train
from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.interrupts import interruptible
from lib.train import checkpoint
from tests.helpers import ROOT

jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

folder, seconds = sys.argv[1], float(sys.argv[2])
tokenizer = Tokenizer.load(folder + "/tokenizer.json")
config = Config(
    vocab_size=tokenizer.vocab_size,
    sequence_len=64,
    n_layer=2,
    n_embd=32,
    n_head=2,
    n_kv_head=1,
    head_dim=16,
    mlp_dim=64,
    microbatch=2,
    total_batch_size=256,
    num_steps=20,
    warmup_steps=4,
    loss_chunk=64,
)
tokens = data.open_tokens(folder + "/*.txt", "train", tokenizer, cache_dir=folder + "/cache")
cursor, saved = None, checkpoint.latest(folder + "/checkpoints")
state = train.init_state(config)
if saved:
    state, meta = checkpoint.restore(saved, train.state_template(config))
    cursor = meta["cursor"]
batches = data.prefetch(data.batches(tokens, 4, 64, cursor=cursor, buffer_size=8), jax.device_put)
step_fn = train.make_train_step(config)
with interruptible() as flag, checkpoint.Saver(folder + "/checkpoints") as saver:
    pause = lambda n: n == config.num_steps or flag.stop  # noqa: E731
    for s in train.steps(step_fn, state, batches, config, pause=pause):
        print(json.dumps([s.step, s.metrics["loss"]]), flush=True)
        time.sleep(seconds)
        if s.state is not None:
            saver.save(s.step, s.state, dict(cursor=s.cursor))
            leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(s.state)]
            digest = hashlib.sha256(b"".join(leaves)).hexdigest()
            print(json.dumps([s.step, s.cursor, digest]), flush=True)
            break
