"""Trains the same steps again and again, each time on other devices or in another order, and
reports losses, parameters and bytes. Arguments: JSON, which process.

The JSON holds config, steps, hosts (address and how many, where there are several), and runs, each
with some of: layout ([strategy, mesh]), config (changes), until (the step to end at), make (the
first state is made on the devices rather than brought there), order (a seed by which the rows of
each batch change places: the same sums in another order), drop (so many rows of each batch teach
nothing, as if a device's share had been forgotten), save and restore (folders).
Prints RESULT and a list, one entry a run.
"""

import functools
import json
import re
import sys
from collections import Counter

import jax
import numpy as np

from lib import parallel, train
from lib.config import Config
from lib.train import checkpoint

asked = json.loads(sys.argv[1])
if asked.get("hosts"):
    address, processes = asked["hosts"]
    parallel.start_hosts(address, processes, int(sys.argv[2]), 60)
process, processes = jax.process_index(), jax.process_count()

base = Config(**asked["config"])
rows = base.total_batch_size // base.sequence_len
shape = (asked["steps"], rows, base.sequence_len + 1)
tokens = np.random.default_rng(0).integers(0, base.vocab_size, shape).astype(np.int32)
own = slice(process * rows // processes, (process + 1) * rows // processes)


@functools.cache
def first_state():
    """The state that all begin with, made on one device and kept on the host."""
    return jax.device_get(jax.jit(train.init_state, static_argnums=0)(base))


def place(state, template):
    """A state on the host on the devices that the template names."""

    def put(leaf, like):
        if like.sharding is None:
            return jax.device_put(leaf)
        return jax.make_array_from_callback(leaf.shape, like.sharding, lambda i: leaf[i])

    return jax.tree.map(put, state, template)


@functools.cache
def lowered(config, layout):
    """The step, traced for these devices."""
    sharding = layout.batch if layout else None
    batch = jax.ShapeDtypeStruct((rows, config.sequence_len), "int32", sharding=sharding)
    step = train.make_train_step(config, layout)
    return step.lower(train.state_template(config, layout), batch, batch)


@functools.cache
def compiled(config, layout):
    return lowered(config, layout).compile()


@functools.cache
def sums(config, layout):
    """What a step that computes in bfloat16 adds up: how often devices add up numbers of which
    type, and the largest sum of bfloat16 numbers that one device takes.
    """
    text = lowered(config.replace(compute_dtype="bfloat16"), layout).as_text()
    across = Counter()
    for op, results in re.findall(
        r'"stablehlo\.(all_reduce|reduce_scatter)"\(.*?\n\s*\}\) : \(.*?\) -> (.*?)\n', text, re.S
    ):
        across[op + " " + re.findall(r"(\w+)>", results)[0].split("x")[-1]] += 1
    most = 0
    for axes, sizes in re.findall(
        r"applies stablehlo\.add across dimensions = \[(.*?)\] : \(tensor<([\dx]+)xbf16>", text
    ):
        sizes = [int(size) for size in sizes.split("x")]
        most = max(most, np.prod([sizes[int(axis)] for axis in axes.split(",")]))
    return dict(across=across, most=int(most))


def compared(params):
    """Whether parameters equal themselves, and themselves with the last number of one changed."""
    largest = max(jax.tree.leaves(params), key=lambda leaf: leaf.size)
    add = jax.jit(lambda a: a.at[(-1,) * a.ndim].add(1.0), out_shardings=largest.sharding)
    changed = jax.tree.map(lambda leaf: add(leaf) if leaf is largest else leaf, params)
    return [parallel.equal(params, params), parallel.equal(params, changed)]


def train_once(run):
    config = base.replace(**run.get("config", {}))
    strategy, mesh = run.get("layout", [None, None])
    layout = parallel.make_layout(strategy, config, mesh=mesh) if strategy else None
    template = train.state_template(config, layout)
    if run.get("restore"):
        state, _ = checkpoint.restore(run["restore"], template)
    elif run.get("make"):
        state = train.init_state(config, layout)
    else:
        state = place(first_state(), template)

    losses = []
    for tokens_BT in tokens[int(state.step) : run.get("until")]:
        if run.get("order") is not None:
            tokens_BT = np.random.default_rng(run["order"]).permutation(tokens_BT)
        # some targets are left out, as in fine-tuning
        inputs, targets = tokens_BT[own, :-1], tokens_BT[own, 1:]
        targets = np.where(targets < 20, -1, targets)
        targets[: run.get("drop", 0)] = -1
        batch = [parallel.put_batch(layout, array) for array in (inputs, targets)]
        state, metrics = compiled(config, layout)(state, *batch)
        losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    if run.get("save"):
        checkpoint.save(run["save"], int(state.step), state)

    whole = parallel.whole(layout, state.params)
    text = compiled(config, layout).as_text() if layout and losses else ""
    return dict(
        losses=losses,
        params=[np.asarray(leaf, np.float64).ravel().tolist() for leaf in jax.tree.leaves(whole)],
        bytes=sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)),
        gathers=re.findall(r"= (\S+) all-gather", text),
        kinds=Counter(re.findall(r" (all-[a-z]+|reduce-scatter|collective-[a-z]+)\(", text)),
        equal=compared(state.params) if layout and losses else None,
        bfloat16=sums(config, layout) if losses else None,
    )


results = [train_once(run) for run in asked["runs"]]
if process == 0:
    print("RESULT" + json.dumps(results))
