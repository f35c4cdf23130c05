"""Several small trials at once by vmap against one after another: `python -m benchmarks.population
--help`.

Speed-up is trials per second together over trials per second apart, medians of whole optimizer
steps, both measured in one process by turns, so that other work on the machine hits both alike.
Losses of the third step are compared too: later ones of a batch learnt by heart go their own ways.
"""

import statistics
import time
from dataclasses import dataclass

import tyro

from lib.runtime import keep_memory


@dataclass
class Args:
    depths: str = "2 3 4"
    """Depths of the model family"""
    sizes: str = "2 4 8"
    """Trials at once"""
    budget: str = "small"
    """Budget of lib.sweeps.presets that the model family is taken from"""
    overrides: str = "vocab_size=1024"
    """Config fields by name"""
    steps: int = 10
    """Steps timed, after two that warm up"""
    json: str = ""
    """Also write the rows to this file"""


def main(args: Args):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lib import train
    from lib.config import Config
    from lib.files import choose, write_json
    from lib.notebook import parse_overrides
    from lib.sweeps import presets, space
    from lib.sweeps.population import population_step
    from lib.sweeps.tables import table
    from lib.train.optim import compile_key

    constants = {
        k: v
        for k, v in choose("budget", args.budget, presets.BUDGETS)["constants"].items()
        if k not in space.SETTINGS
    }
    rows = []
    for depth in map(int, args.depths.split()):
        base = space.config_of(
            constants | dict(depth=depth, num_steps=1000) | parse_overrides(args.overrides, Config)
        )
        x = np.random.default_rng(0).integers(
            0, base.vocab_size, (base.total_batch_size // base.sequence_len, base.sequence_len + 1)
        )
        inputs, targets = jax.device_put((x[:, :-1].astype(np.int32), x[:, 1:].astype(np.int32)))
        for size in map(int, args.sizes.split()):
            configs = [base.replace(matrix_lr=base.matrix_lr * 0.8**i) for i in range(size)]
            alone, together = (
                train.make_train_step(base),
                population_step(compile_key(train.for_training(base)), True),
            )
            states = [train.init_state(c) for c in configs]
            whole = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            times = {"apart": [], "together": []}
            differences = []
            for _ in range(args.steps + 2):
                begun = time.perf_counter()
                losses = []
                for i in range(size):
                    states[i], metrics = alone(states[i], inputs, targets)
                    losses.append(metrics["loss"])
                jax.block_until_ready(losses)
                times["apart"].append(time.perf_counter() - begun)
                begun = time.perf_counter()
                whole, metrics = together(whole, inputs, targets)
                jax.block_until_ready(metrics)
                times["together"].append(time.perf_counter() - begun)
                difference = jnp.abs(metrics["loss"] - jnp.stack(losses))
                differences.append(float(difference.max()))
            apart, at_once = (statistics.median(times[k][2:]) for k in ("apart", "together"))
            rows.append(
                dict(
                    depth=depth,
                    width=base.n_embd,
                    parameters=base.scaling_params,
                    trials=size,
                    apart_ms=1e3 * apart,
                    together_ms=1e3 * at_once,
                    speedup=apart / at_once,
                    worst_loss_difference=differences[2],
                )
            )
            print(
                table(
                    rows[-1:],
                    dict(
                        apart_ms=".1f",
                        together_ms=".1f",
                        speedup=".2f",
                        worst_loss_difference=".1e",
                    ),
                ),
                flush=True,
            )
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {base.total_batch_size} "
        "tokens in rows of "
        f"{base.sequence_len}"
    )
    if args.json:
        write_json(args.json, rows)
    return rows


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    keep_memory()
    main(args)
