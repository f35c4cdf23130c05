"""Time of each component of a training step against its roofline: `python -m benchmarks.roofline`.

The roofline is lib.preflight.roofline's account from shapes. What the device can do at most is in
lib.chips for accelerators; of a CPU it is measured here first: a large matrix product and a large
read. Components are timed alone, forward and backward, in turns.
"""

import statistics
import time
from dataclasses import dataclass

import tyro


@dataclass
class Args:
    config: str = "small"
    """small, v6e_268m (of benchmarks.train_step) or a preset of lib.config"""
    overrides: str = ""
    """Config fields by name, like: microbatch=4 attention=jax"""
    repeats: int = 10
    """Rounds; each times everything once, after one that warms up"""
    picture: str = ""
    """Also draw measured time beside the bound, into this file"""
    json: str = ""
    """Also write the result to this file"""


def clock(fn, *args) -> float:
    """Seconds of one call that has finished."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - start


def measured_chip(dtype, tries: int = 5):
    """A lib.chips.Chip for a device that is in no table.

    The best of a few products of 2048 x 2048 matrices, and of reads of 512 MiB.
    """
    import jax
    import jax.numpy as jnp

    from benchmarks.decode import read_bandwidth
    from lib.chips import Chip

    n = 2048
    x = jnp.ones((n, n), dtype)
    product = jax.jit(jnp.matmul)
    best = min(clock(product, x, x) for _ in range(tries + 1))
    return Chip(
        f"{jax.devices()[0].device_kind}, measured", 2 * n**3 / best, read_bandwidth(2**29), 0
    )


def pieces(config) -> dict:
    """{component: (function, arguments, calls in a step)}; attention: an entry for each window."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from lib import train
    from lib.model import transformer
    from lib.model.head import head_matrix, summed_loss
    from lib.train.optim import make_optimizer

    rng = np.random.default_rng(0)
    B, T, D, A = config.microbatch, config.sequence_len, config.n_embd, config.accumulate
    state = train.init_state(config)
    params = state.params
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (B, T)), jnp.int32)
    x = jnp.asarray(rng.normal(size=(B, T, D)), config.dtype)
    w = {
        name: a[0].astype(config.dtype) if a.ndim > 2 else a[0]
        for name, a in params["blocks"].items()
    }
    rope = transformer.rope_tables(jnp.arange(T), config)

    def both(fn):  # forward, and backward from a gradient like x
        return jax.jit(lambda g, *args: jax.vjp(fn, *args)[1](g))

    out = {
        "embedding": (
            both(lambda table: transformer.rms_norm(table[tokens].astype(config.dtype))),
            (x, params["embed"]),
            A,
        )
    }
    for window in sorted(set(config.windows)):
        attend = lambda w, x, window=window: transformer.self_attention(
            transformer.rms_norm(x),
            w,
            None,
            config,
            rope,
            transformer.full_attention(config, window),
        )[0]
        out[f"attention {window}"] = both(attend), (x, w, x), A * config.windows.count(window)
    out["mlp"] = (
        both(lambda w, x: transformer.mlp(transformer.rms_norm(x), w, config)),
        (x, w, x),
        A * config.n_layer,
    )
    loss = jax.jit(jax.value_and_grad(lambda x, head: summed_loss(x, head, tokens, config), (0, 1)))
    out["head+loss"] = loss, (x, head_matrix(params, config)), A

    @jax.jit
    def optimize(grads, opt_state, params):
        updates, opt_state = make_optimizer(config, config.num_steps).update(
            grads, opt_state, params
        )
        return optax.apply_updates(params, updates), opt_state

    out["optimizer"] = (
        optimize,
        (jax.tree.map(lambda p: jnp.full_like(p, 1e-3), params), state.opt_state, params),
        1,
    )
    rows = jnp.tile(tokens, (A, 1))
    out["step"] = jax.jit(lambda s, x: train.train_step(s, x, x, config)), (state, rows), 1
    return out


def print_rows(rows: list[dict]):
    """A table of measured and least times."""
    print(
        f"{'component':12}{'ms':>10}{'at least':>10}{'binds':>10}{'reached':>9}"
        f"{'GFLOP':>10}{'GB':>8}"
    )
    for row in rows:
        binds = "" if row["component"] == "step" else row["binds"]
        reached = f"{row['bound'] / row['seconds']:.0%}" if row["seconds"] > 0 else ""
        print(
            f"{row['component']:12}{1e3 * row['seconds']:10.2f}{1e3 * row['bound']:10.2f}"
            f"{binds:>10}{reached:>9}{row['flops'] / 1e9:10.2f}{row['bytes'] / 1e9:8.2f}"
        )
    print(
        "other is the step without the parts, which are timed alone: norms and residual sums, or, "
        "below 0, what fusing them saves"
    )


def picture(rows: list[dict], title: str):
    """A figure of measured times beside the least ones."""
    from lib.pictures import styled, subplots

    @styled
    def draw():
        figure, axis = subplots(size=(6, 3.2))
        places = range(len(rows))
        measured = [1e3 * max(row["seconds"], 0) for row in rows]
        least = [1e3 * row["bound"] for row in rows]
        axis.bar([i - 0.2 for i in places], measured, 0.4, label="measured")
        axis.bar([i + 0.2 for i in places], least, 0.4, label="at least")
        names = [f"{row['component']}\n{row['binds']}" for row in rows]
        axis.set_xticks(places, names)
        axis.set(ylabel="ms per step", title=title)
        axis.legend()
        return figure

    return draw()


def main(args: Args):
    import jax

    from benchmarks.train_step import CONFIGS
    from lib.chips import chip
    from lib.config import PRESETS, Config
    from lib.files import choose, write_json
    from lib.notebook import parse_overrides
    from lib.pictures import show
    from lib.preflight import roofline

    config = Config.from_depth(
        **choose("config", args.config, CONFIGS | PRESETS) | parse_overrides(args.overrides, Config)
    )
    config = config.replace(attention=config.attention_name, compute_dtype=config.dtype.name)
    known = chip(jax.devices()[0].device_kind) or measured_chip(config.dtype)
    work = pieces(config)
    times = {name: [] for name in work}
    for _ in range(args.repeats + 1):  # in turns, so that a busy moment hits all of them
        for name, (fn, arguments, _) in work.items():
            times[name].append(clock(fn, *arguments))
    if not chip(jax.devices()[0].device_kind):  # again, lest a busy moment has made it look slow
        again = measured_chip(config.dtype)
        known = known._replace(
            flops=max(known.flops, again.flops), bandwidth=max(known.bandwidth, again.bandwidth)
        )
    bounds = roofline.bound(roofline.account(config, known.matrix_unit).components, known)
    took = {}
    for name, (_, _, calls) in work.items():
        part = name.split()[0]
        took[part] = took.get(part, 0) + calls * statistics.median(times[name][1:])
    took["other"] = took["step"] - sum(took[name] for name in took if name != "step")

    print(
        f"{known.name}: {known.flops / 1e9:,.0f} GFLOP/s, {known.bandwidth / 1e9:,.0f} GB/s; "
        f"{config.dtype}, attention={config.attention}, "
        f"{config.accumulate} x {config.microbatch} x {config.sequence_len} tokens"
    )
    rows = [
        dict(
            component=name,
            seconds=took[name],
            bound=bounds[name].seconds,
            binds=bounds[name].binds,
            flops=bounds[name].flops,
            bytes=bounds[name].bytes,
        )
        for name in ("embedding", "attention", "mlp", "head+loss", "optimizer", "other", "step")
    ]
    print_rows(rows)
    if args.picture:
        show(picture(rows[:-1], known.name), args.picture)
    if args.json:
        write_json(
            args.json,
            dict(jax=jax.__version__, device=known._asdict(), config=config.to_dict(), rows=rows),
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
