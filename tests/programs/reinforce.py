"""Reinforces a small random model by how long its answers are. Arguments: JSON, which process.

The JSON holds steps, and either folder (of a run, which goes on from its checkpoints), with hosts
(address and how many) where there are several; or layouts ([strategy, mesh] each), on which one and
the same step is taken.
A run prints [step, loss, reward] after each step, and at the end RESULT with the digest of its
state and its parameters; layouts print RESULT with the moments after the step on each.
"""

import hashlib
import json
import sys

import jax
import numpy as np

from lib import parallel
from lib.config import Config
from lib.data import Tokenizer
from lib.parallel.layout import param_shardings
from lib.params import init_params
from lib.tasks import Task
from lib.train import Saving, rl
from lib.train.finetune import Base
from lib.train.policy import PRESETS
from tests.helpers import ROOT

jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

asked = json.loads(sys.argv[1])
if asked.get("hosts"):
    address, processes = asked["hosts"]
    parallel.start_hosts(address, processes, int(sys.argv[2]), 60)

config = Config(
    vocab_size=265,
    sequence_len=64,
    n_layer=2,
    n_embd=32,
    n_head=4,
    n_kv_head=4,
    head_dim=8,
    mlp_dim=64,
    microbatch=8,
    total_batch_size=8 * 64,
    num_steps=4,
    loss_chunk=64,
    compute_dtype="float32",
    scan_layers=False,
)
params = init_params(jax.random.key(1), config)
# random words, among them often the special ones
params = params | dict(head=0.3 * jax.random.normal(jax.random.key(2), params["head"].shape))
base = Base(params, config, Tokenizer.train(["plain bytes"], 265), "here")


def item(n: int) -> dict:
    messages = [dict(role="user", content=str(n)), dict(role="assistant", content="")]
    return dict(id=f"letters/{n}", messages=messages)


items = [item(n) for n in range(7)]
task = Task("generate", lambda split: items, grade=lambda item, answer: False)
rl.to_reinforce = lambda name: task
rl.reward_of = lambda name, grade: lambda item, answer: 1 + len(answer)
settings = rl.Reinforcing(
    "letters", num_steps=asked["steps"], questions=4, samples=4, max_tokens=24, lr=0.05
)


def flat(params, layout=None) -> list[float]:
    """All numbers of a tree like the parameters in one list."""
    leaves = jax.tree.leaves(parallel.whole(layout, params))
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves]).tolist()


def run(folder: str):
    """A whole training, or the rest of it."""
    layout = parallel.make_layout("zero", config) if asked.get("hosts") else None
    training = rl.Reinforcement(settings, base, folder, layout=layout)
    saving = Saving(1, keep=2, metric="reward")
    for step in training.run.steps([training.measurement], saving, writers=None):
        told = [step.step, step.metrics["loss"], step.metrics["reward"]]
        print(json.dumps(told), flush=True)
    state = training.run.state
    arrays = [
        np.asarray(shard.data) for a in jax.tree.leaves(state) for shard in a.addressable_shards
    ]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays))
    return dict(digest=digest.hexdigest(), params=flat(state.params, layout))


def step_on(training: rl.Reinforcement, parts, where, preset: str) -> list[float]:
    """The moments after one step on a layout, [strategy, mesh]; on one device for None."""
    layout = parallel.make_layout(where[0], config, mesh=where[1]) if where else None
    training.layout, training.ref_params = layout, base.params
    state = training.begin()
    if layout is not None:
        shardings = param_shardings(layout, config)
        training.ref_params = jax.device_put(jax.tree.map(np.asarray, base.params), shardings)
    on_devices = parallel.put_batch(layout, parts, whole=True)
    state, _ = rl.learn(
        state, *on_devices, training.ref_params, training.config, PRESETS[preset], 1, layout
    )
    return flat(state.opt_state.m, layout)


if asked.get("folder"):
    result = run(asked["folder"])
else:
    training = rl.Reinforcement(settings, base, "nowhere")
    groups = training.ask(base.params, 0, rl.Seconds())
    parts = training.parts([answers for _, answers in groups])
    result = [step_on(training, parts, where, "grpo") for where in [None, *asked["layouts"]]]
if jax.process_index() == 0:
    print("RESULT" + json.dumps(result))
