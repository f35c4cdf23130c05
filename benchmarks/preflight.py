"""How far the estimate from shapes is from what libtpu compiles: `python -m benchmarks.preflight`.

Each point is one training step, compiled for a TPU that isn't there (minutes each on two cores; answers are kept in .cache/preflight) and
estimated. Memory is the peak per chip, time the least one (lib.roofline), sent what a chip sends over the network.
"""

from dataclasses import dataclass

import tyro

from lib.preflight import compile as preflight

SHORT = dict(sequence_len=1024, remat="dots")
PLAIN = dict(window_pattern="L", value_embeds=False)  # scanned layer by layer: compiles fast
PUBLISHED = {k: v for k, v in preflight.PUBLISHED["config"].items() if k != "n_layer"} | dict(
    scan_layers=False
)
POINTS = (  # chip, strategy, depth, what differs from Config.from_depth
    ("v6e-1", "dp", 8, SHORT | dict(microbatch=4, total_batch_size=2**13)),
    ("v6e-4", "dp", 8, SHORT | dict(microbatch=16, total_batch_size=2**15)),
    ("v6e-4", "zero", 8, SHORT | dict(microbatch=16, total_batch_size=2**15)),
    ("v6e-4", "fsdp", 8, SHORT | dict(microbatch=16, total_batch_size=2**15)),
    ("v6e-8", "zero", 8, SHORT | dict(microbatch=32, total_batch_size=2**16)),
    ("v6e-8", "fsdp", 8, SHORT | dict(microbatch=32, total_batch_size=2**16)),
    ("v5e-1", "dp", 4, PLAIN | dict(microbatch=8, sequence_len=1024, total_batch_size=2**14)),
    (
        "v6e-1",
        "dp",
        12,
        PLAIN | dict(microbatch=8, remat="layer", optimizer="adamw", total_batch_size=2**15),
    ),
    ("v5e-1", "dp", 12, dict(remat="dots", microbatch=4)),
    ("v6e-1", "dp", 2, PUBLISHED),
    ("v6e-1", "dp", 2, PUBLISHED | dict(loss_chunk=8192)),
)


@dataclass
class Args:
    only: str = ""
    """Numbers of the points to do, like "0 3 7"; empty: all"""


def main(args: Args):
    from lib.chips import tpu_slice
    from lib.config import Config
    from lib.files import UserError

    if not preflight.has_libtpu():
        raise UserError(
            "the truth that this compares with needs libtpu: pip install libtpu (Linux x86-64 only)"
        )
    off = {"memory": [], "time": []}
    print(
        f"{'':3}{'chip':7}{'':5}{'depth x width, rows x T, remat, optimizer':48}{'GiB: compiled, estimated':>26}{'ms':>22}{'MB sent':>18}"
    )
    for i in [int(n) for n in args.only.split()] or range(len(POINTS)):
        chip, strategy, depth, fields = POINTS[i]
        c = preflight.for_tpu(Config.from_depth(depth, **fields))
        truth, guess = (
            preflight.inspect(c, chip, strategy),
            preflight.estimate(c, tpu_slice(chip), strategy),
        )
        pairs = {
            "memory": (truth["peak"] / 2**30, guess["peak"] / 2**30),
            "time": tuple(1e3 * r["bound"]["step"]["seconds"] for r in (truth, guess)),
        }
        for name, (a, b) in pairs.items():
            off[name].append(b / a - 1)
        shape = f"{depth} x {c.n_embd}, {c.microbatch} x {c.sequence_len}, {c.remat}, {c.optimizer}{', ' + c.window_pattern}"
        (m, n), (t, u) = pairs.values()
        print(
            f"{i:2} {chip:7}{strategy if '-1' not in chip else '':5}{shape:48}{m:10.2f}{n:8.2f} {off['memory'][-1]:+7.0%}{t:8.1f}{u:7.1f}"
            f"{off['time'][-1]:+7.0%}{truth['sent'] / 1e6:9.0f}{guess['sent'] / 1e6:9.0f}",
            flush=True,
        )
    for name, errors in off.items():
        print(
            f"estimated {name} is {min(errors):+.0%} to {max(errors):+.0%} off the compiled, mean {sum(errors) / len(errors):+.0%}"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
