"""Time of each component of a training step against its roofline: `python -m benchmarks.roofline`.

The roofline is lib.preflight.roofline's account from shapes. What the device can do at most is in
lib.chips for accelerators; of a CPU it is measured here first: matrix products and a large read.
Components are timed alone, forward and backward (lib.speed, which 06_speed shows cell by cell).
"""

from dataclasses import dataclass

import tyro

from lib.runtime import keep_memory


@dataclass
class Args:
    config: str = "small"
    """small, v6e_268m (of benchmarks.train_step) or a preset of lib.config"""
    overrides: str = ""
    """Config fields by name, like: microbatch=4 attention=jax"""
    seconds: float = 1.0
    """For which each component is run, after it was compiled"""
    picture: str = ""
    """Also draw measured time beside the bound, into this file"""
    json: str = ""
    """Also write the result to this file"""


def print_rows(reached):
    """A table of measured and least times."""
    print(
        f"{'component':12}{'ms':>10}{'at least':>10}{'binds':>10}{'reached':>9}"
        f"{'GFLOP':>10}{'GB':>8}"
    )
    for r in reached:
        binds = "" if r.component == "step" else r.binds
        share = f"{r.share:.0%}" if r.seconds > 0 else ""
        print(
            f"{r.component:12}{1e3 * r.seconds:10.2f}{1e3 * r.bound:10.2f}"
            f"{binds:>10}{share:>9}{r.flops / 1e9:10.2f}{r.bytes / 1e9:8.2f}"
        )
    print(
        "other is the step without the parts, which are timed alone: norms and residual sums, or, "
        "below 0, what fusing them saves"
    )


def main(args: Args):
    import jax

    from benchmarks.train_step import CONFIGS
    from lib import pictures, speed
    from lib.chips import chip
    from lib.config import PRESETS, Config
    from lib.files import choose, write_json
    from lib.notebook import parse_overrides
    from lib.pictures import show

    config = Config.from_depth(
        **choose("config", args.config, CONFIGS | PRESETS) | parse_overrides(args.overrides, Config)
    )
    config = config.replace(attention=config.attention_name, compute_dtype=config.dtype.name)
    known = chip(jax.devices()[0].device_kind)
    if known is None:
        dtype = config.dtype.name
        measured = speed.products(config, [dtype])
        known = speed.measured_chip(measured, speed.read_bandwidth(speed.LARGE), dtype)
    reached = speed.components(config, known, args.seconds)

    print(
        f"{known.name}: {known.flops / 1e9:,.0f} GFLOP/s, {known.bandwidth / 1e9:,.0f} GB/s; "
        f"{config.dtype}, attention={config.attention}, "
        f"{config.accumulate} x {config.microbatch} x {config.sequence_len} tokens"
    )
    print_rows(reached)
    if args.picture:
        show(pictures.roofline(reached, known), args.picture)
    if args.json:
        rows = [r._asdict() for r in reached]
        about = dict(jax=jax.__version__, device=known._asdict(), config=config.to_dict())
        write_json(args.json, about | dict(rows=rows))


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    keep_memory()
    main(args)
