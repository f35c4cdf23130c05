"""How far the estimate from shapes is from what libtpu compiles: `python -m benchmarks.preflight`.

Each point is one training step, compiled for a TPU that isn't there (minutes each on two cores;
answers are kept in .cache/preflight) and estimated. Memory is the peak per chip, time the least one
(lib.preflight.roofline), sent what a chip sends over the network.
"""

from dataclasses import dataclass
from typing import NamedTuple

import tyro

from lib.preflight.__main__ import PUBLISHED

SHORT = dict(sequence_len=1024, remat="dots")

# scanned layer by layer: compiles fast
PLAIN = dict(window_pattern="L", value_embeds=False)

TWO_LAYERS = {name: value for name, value in PUBLISHED.items() if name != "n_layer"} | dict(
    scan_layers=False
)


class Point(NamedTuple):
    """A step to compile; fields: what differs from Config.from_depth."""

    chip: str
    strategy: str
    depth: int
    fields: dict


POINTS = (
    Point("v6e-1", "dp", 8, SHORT | dict(microbatch=4, total_batch_size=2**13)),
    Point("v6e-4", "dp", 8, SHORT | dict(microbatch=16, total_batch_size=2**15)),
    Point("v6e-4", "zero", 8, SHORT | dict(microbatch=16, total_batch_size=2**15)),
    Point("v6e-4", "fsdp", 8, SHORT | dict(microbatch=16, total_batch_size=2**15)),
    Point("v6e-8", "zero", 8, SHORT | dict(microbatch=32, total_batch_size=2**16)),
    Point("v6e-8", "fsdp", 8, SHORT | dict(microbatch=32, total_batch_size=2**16)),
    Point("v5e-1", "dp", 4, PLAIN | dict(microbatch=8, sequence_len=1024, total_batch_size=2**14)),
    Point(
        "v6e-1",
        "dp",
        12,
        PLAIN | dict(microbatch=8, remat="layer", optimizer="adamw", total_batch_size=2**15),
    ),
    Point("v5e-1", "dp", 12, dict(remat="dots", microbatch=4)),
    Point("v6e-1", "dp", 2, TWO_LAYERS),
    Point("v6e-1", "dp", 2, TWO_LAYERS | dict(loss_chunk=8192)),
)


@dataclass
class Args:
    only: str = ""
    """Numbers of the points to do, like "0 3 7"; empty: all"""


def measure(number: int, point: Point) -> tuple[float, float]:
    """Compile and estimate a point, print a line; how far memory and time are off, as shares."""
    from lib.chips import tpu_slice
    from lib.config import Config
    from lib.preflight.compile import for_tpu, inspect
    from lib.preflight.estimate import GIB, estimate

    config = for_tpu(Config.from_depth(point.depth, **point.fields))
    truth = inspect(config, point.chip, point.strategy)
    guess = estimate(config, tpu_slice(point.chip), point.strategy)
    memory = guess.peak / truth.peak - 1
    seconds, guessed_seconds = (r.bound["step"].seconds for r in (truth, guess))
    time = guessed_seconds / seconds - 1

    shape = f"{point.depth} x {config.n_embd}, {config.microbatch} x {config.sequence_len}"
    how = f"{shape}, {config.remat}, {config.optimizer}, {config.window_pattern}"
    strategy = point.strategy if truth.chips > 1 else ""
    print(
        f"{number:2} {point.chip:7}{strategy:5}{how:48}"
        f"{truth.peak / GIB:10.2f}{guess.peak / GIB:8.2f} {memory:+7.0%}"
        f"{1e3 * seconds:8.1f}{1e3 * guessed_seconds:7.1f}{time:+7.0%}"
        f"{truth.sent / 1e6:9.0f}{guess.sent / 1e6:9.0f}",
        flush=True,
    )
    return memory, time


def main(args: Args):
    from lib.files import UserError
    from lib.preflight.cache import has_libtpu

    if not has_libtpu():
        raise UserError(
            "the truth that this compares with needs libtpu: pip install libtpu (Linux x86-64 only)"
        )
    print(
        f"{'':3}{'chip':7}{'':5}{'depth x width, rows x T, remat, optimizer':48}"
        f"{'GiB: compiled, estimated':>26}{'ms':>22}{'MB sent':>18}"
    )
    numbers = [int(word) for word in args.only.split()] or range(len(POINTS))
    errors = [measure(number, POINTS[number]) for number in numbers]
    for name, off in zip(("memory", "time"), zip(*errors)):
        mean = sum(off) / len(off)
        print(
            f"estimated {name} is {min(off):+.0%} to {max(off):+.0%} off the compiled, "
            f"mean {mean:+.0%}"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
