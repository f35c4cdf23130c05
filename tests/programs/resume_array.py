"""Takes a toy training up from its checkpoint, if there is one, and goes on to a step.

Arguments: folder, last step.
"""

import sys

import jax
import jax.numpy as jnp

from lib.train.checkpoint import latest, restore, save


def loss(w, x):
    return jnp.mean((jnp.tanh(x @ w) - 0.3) ** 2)


@jax.jit
def start():
    return {"params": jax.random.normal(jax.random.key(0), (8, 8)), "momentum": jnp.zeros((8, 8))}


@jax.jit
def step(state, i):
    x = jax.random.normal(jax.random.key(i), (4, 8))
    value, gradient = jax.value_and_grad(loss)(state["params"], x)
    momentum = 0.9 * state["momentum"] + gradient
    return {"params": state["params"] - 0.1 * momentum, "momentum": momentum}, value


folder, last = sys.argv[1], int(sys.argv[2])
losses = []
if latest(folder):
    state, meta = restore(folder, jax.eval_shape(start))
    losses = meta["losses"]
else:
    state = start()
for i in range(len(losses), last):
    state, value = step(state, i)
    losses.append(float(value))
save(folder, len(losses), state, {"losses": losses})
