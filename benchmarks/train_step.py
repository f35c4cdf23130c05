"""Speed and memory of the training step: `python -m benchmarks.train_step --help`.

On the device at hand it times whole optimizer steps; with --tpu it compiles for a TPU that isn't
there and reports memory.
"""

import statistics
import time
from dataclasses import dataclass

import tyro

from lib.runtime import keep_memory

CONFIGS = {  # name: Config.from_depth arguments
    # the shapes that peers were measured on: 4 layers, width 256, T 512, batch 8, vocabulary 4096
    "small": dict(
        depth=4,
        vocab_size=4096,
        sequence_len=512,
        total_batch_size=4096,
        microbatch=8,
        num_steps=1000,
        scan_layers=False,
        loss_chunk=1024,
    ),
    # 268M parameters: 16 layers, 1024 wide, 8 heads of 128, T 2048, vocabulary 32768, AdamW
    "v6e_268m": dict(
        depth=16,
        value_embeds=False,
        smear=False,
        optimizer="adamw",
        microbatch=16,
        total_batch_size=2**16,
        remat="dots",
        attention="splash",
        compute_dtype="bfloat16",
    ),
}


@dataclass
class Args:
    config: str = "small"
    """small, v6e_268m, or a preset of lib.config"""
    overrides: str = ""
    """Config fields by name, like: microbatch=32 remat=layer"""
    steps: int = 20
    """Steps timed, after two that warm up"""
    tpu: str = ""
    """Compile for this TPU instead of running here, such as v6e:1x1"""
    json: str = ""
    """Also write the result to this file"""


def main(args: Args):
    if args.tpu:
        from lib.preflight.compile import compile_step, tpu_device

        device = tpu_device(args.tpu)
    else:
        keep_memory()
    import jax
    import numpy as np

    from lib import train
    from lib.config import PRESETS, Config
    from lib.files import choose, write_json
    from lib.notebook import chip, parse_overrides
    from lib.params import count_params

    config = Config.from_depth(
        **choose("config", args.config, CONFIGS | PRESETS) | parse_overrides(args.overrides, Config)
    )
    result = dict(
        config=args.config,
        overrides=args.overrides,
        params=count_params(config)["total"],
        batch=f"{config.accumulate}x{config.microbatch}x{config.sequence_len}",
        jax=jax.__version__,
    )
    if args.tpu:
        made = compile_step(config, device)
        memory = made.program.memory_analysis()
        result |= dict(
            device=args.tpu,
            compile_s=round(made.seconds, 1),
            peak_GiB=round(made.peak / 2**30, 2),
            state_GiB=round(memory.argument_size_in_bytes / 2**30, 2),
            temporary_GiB=round(memory.temp_size_in_bytes / 2**30, 2),
        )
    else:
        rows = config.accumulate * config.microbatch
        x = (
            np.random.default_rng(0)
            .integers(0, config.vocab_size, (rows, config.sequence_len))
            .astype(np.int32)
        )
        clock = time.perf_counter()
        step = train.make_train_step(config).lower(train.state_template(config), x, x).compile()
        compile_s = time.perf_counter() - clock
        state, times, memory = train.init_state(config), [], step.memory_analysis()
        for _ in range(args.steps + 2):
            clock = time.perf_counter()
            state, metrics = step(state, x, x)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - clock)
        times = sorted(times[2:])
        median = statistics.median(times)
        kind = jax.devices()[0].device_kind
        result |= dict(
            device=kind,
            compile_s=round(compile_s, 1),
            step_ms_min=round(1e3 * times[0], 1),
            step_ms_median=round(1e3 * median, 1),
            step_ms_max=round(1e3 * times[-1], 1),
            tokens_per_s=round(config.total_batch_size / median),
            GFLOP_per_s=round(config.flops_per_token * config.total_batch_size / median / 1e9),
            temporary_GiB=round(memory.temp_size_in_bytes / 2**30, 2),
        )
        if known := chip(kind):
            result["mfu"] = round(
                config.flops_per_token * config.total_batch_size / median / known.flops, 3
            )
    for name, value in result.items():
        print(f"{name:16} {value}")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
