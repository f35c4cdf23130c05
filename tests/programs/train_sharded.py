"""Trains the same steps on one or more layouts and reports losses, parameters and bytes. Arguments:
JSON, which process.

The JSON holds config, steps, layouts ([strategy, mesh] each), and where wanted save, restore
(folders), hosts (address and how many), text (whether to read collectives from what was compiled),
orders (seeds by which the rows of each batch change places: the same sums in another order), drop
(so many rows of each batch teach nothing, as if a device's share had been forgotten).
Prints RESULT and a list, one entry a layout and order.
"""

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
config = Config(**asked["config"])
rows = config.total_batch_size // config.sequence_len
shape = (asked["steps"], rows, config.sequence_len + 1)
tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
process, processes = jax.process_index(), jax.process_count()
own = slice(process * rows // processes, (process + 1) * rows // processes)


def compiled_text(step, layout):
    batch = jax.ShapeDtypeStruct((rows, config.sequence_len), "int32", sharding=layout.batch)
    return step.lower(train.state_template(config, layout), batch, batch).compile().as_text()


results = []
runs = [(layout, order) for layout in asked["layouts"] for order in asked.get("orders", [None])]
for (strategy, mesh), order in runs:
    layout = parallel.make_layout(strategy, config, mesh=mesh) if strategy else None
    state = train.init_state(config, layout)
    step = train.make_train_step(config, layout)
    if asked.get("restore"):
        state, _ = checkpoint.restore(asked["restore"], train.state_template(config, layout))
    losses = []
    for tokens_BT in tokens[int(state.step) :]:
        if order is not None:
            tokens_BT = np.random.default_rng(order).permutation(tokens_BT)
        # some targets are left out, as in fine-tuning
        inputs, targets = tokens_BT[own, :-1], tokens_BT[own, 1:]
        targets = np.where(targets < 20, -1, targets)
        targets[: asked.get("drop", 0)] = -1
        state, metrics = step(
            state, parallel.put_batch(layout, inputs), parallel.put_batch(layout, targets)
        )
        losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    if asked.get("save"):
        checkpoint.save(asked["save"], int(state.step), state)
    text = compiled_text(step, layout) if asked.get("text") else ""
    whole = state.params
    if layout:
        whole = jax.jit(lambda x: x, out_shardings=layout.sharding())(whole)
    if process == 0:
        results.append(
            dict(
                losses=losses,
                params=[
                    np.asarray(leaf, np.float64).ravel().tolist() for leaf in jax.tree.leaves(whole)
                ],
                bytes=sum(
                    leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)
                ),
                gathers=re.findall(r"= (\S+) all-gather", text),
                kinds=Counter(
                    re.findall(r" (all-[a-z]+|reduce-scatter|collective-[a-z]+)\(", text)
                ),
            )
        )
if process == 0:
    print("RESULT" + json.dumps(results))
