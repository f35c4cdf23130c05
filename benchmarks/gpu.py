"""A training step on a GPU beside PyTorch at its best: `python -m benchmarks.gpu --help`.

Each contestant is a process of its own that compiles once, warms up, and then takes a few steps
whenever it is told to, so that they are timed in turns on one warm card. Both train the same shape
on random tokens: bfloat16 products, float32 masters, flash attention, AdamW.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tyro

# nanochat's shape without the parts that PyTorch's plain GPT lacks
PLAIN = dict(
    window_pattern="L",
    qk_scale=1.0,
    softcap=0.0,
    resid_scales=False,
    x0_scales=False,
    value_embeds=False,
    smear=False,
    backout=False,
    optimizer="adamw",
    compute_dtype="bfloat16",
)


@dataclass
class Args:
    depth: int = 12
    """Layers; the width is 64 times that"""
    rows: int = 16
    """Rows of 2,048 tokens in a microbatch"""
    accumulate: int = 4
    """Microbatches in a step"""
    contestants: tuple[str, ...] = ("torch", "plain")
    """torch; plain (the same shape, ours); whole (nanochat's whole model with Muon, ours). After a
    colon Config fields for ours alone, such as plain:loss_chunk=8192,scan_layers=false, and options
    of the compiler, whose names begin with xla_. Before an @ the folder of another checkout, to see
    what a change brings: ../before@plain
    """
    rounds: int = 5
    """Rounds; each gives every contestant its steps once, in turns"""
    steps: int = 4
    """Steps of a contestant in a round"""
    profile: bool = False
    """Also print the kernels that a step of ours spends its time in"""
    json: str = ""
    """Also write the result to this file"""
    serve: str = ""
    """For the contestants' own processes"""


def config_of(args: Args, name: str):
    """(the Config that a contestant trains, options of the compiler)."""
    from lib.config import Config
    from lib.files import UserError, choose
    from lib.notebook import parse_overrides

    kind, _, behind = name.partition(":")
    choose("contestant", kind, ("torch", "plain", "whole"))
    if kind == "torch" and behind:
        raise UserError("fields of Config are for ours alone: leave them out behind torch")
    parts = behind.split(",")
    options: dict = dict(part.split("=", 1) for part in parts if part.startswith("xla_"))
    # the compiler takes a switch as a bool only
    for option, value in options.items():
        if value in ("true", "false"):
            options[option] = value == "true"
    fields = " ".join(part for part in parts if not part.startswith("xla_"))
    overrides = parse_overrides(fields, Config)
    shape = dict(depth=args.depth, microbatch=args.rows, num_steps=100)
    shape["total_batch_size"] = args.rows * args.accumulate * 2048
    model = dict(compute_dtype="bfloat16") if kind == "whole" else PLAIN
    return Config.from_depth(**shape | model | overrides), options


def our_step(config, options: dict):
    """(step() -> loss, number of parameters), compiled."""
    import jax
    import numpy as np

    from lib import train
    from lib.params import count_params

    rows = config.accumulate * config.microbatch
    shape = rows, config.sequence_len
    ids = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
    batch = jax.device_put(ids), jax.device_put(np.roll(ids, -1, 1))
    lowered = train.make_train_step(config).lower(train.state_template(config), *batch)
    step = lowered.compile(compiler_options=options)
    state = train.init_state(config)

    def take():
        nonlocal state
        state, metrics = step(state, *batch)
        return metrics["loss"]

    return take, count_params(config)["total"]


def kernel_seconds(step) -> list[tuple[float, str]]:
    """(seconds, name) of the kernels of one step, the longest first."""
    import glob
    import tempfile
    from collections import Counter

    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(step())
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
        total = Counter()
        for plane in data.planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if "Stream" in line.name:
                    for event in line.events:
                        total[event.name] += event.duration_ns / 1e9
    return [(seconds, name) for name, seconds in total.most_common()]


def torch_kernel_seconds(step) -> list[tuple[float, str]]:
    """The same of PyTorch."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        step()
        torch.cuda.synchronize()
    spent = [(e.self_device_time_total / 1e6, e.key) for e in traced.key_averages()]
    return sorted(spent, reverse=True)


def serve(args: Args):
    """One contestant: says when it is ready, then takes steps for each line of its input."""
    config, options = config_of(args, args.serve)
    begun = time.perf_counter()
    if args.serve == "torch":
        import torch

        from benchmarks.torch_gpt import make_step

        step, params = make_step(config)
        wait = torch.cuda.synchronize
        kind = torch.cuda.get_device_name()
        peak = torch.cuda.max_memory_allocated
    else:
        import jax

        step, params = our_step(config, options)
        last = []
        take, step = step, lambda: last.append(take())
        wait = lambda: jax.block_until_ready(last)
        device = jax.local_devices()[0]
        kind = device.device_kind
        peak = lambda: (device.memory_stats() or {"peak_bytes_in_use": 0})["peak_bytes_in_use"]
    step(), wait()
    compile_s = time.perf_counter() - begun
    step(), wait()
    about = dict(device=kind, compile_s=round(compile_s, 1), params=params)
    print(json.dumps(about), flush=True)

    for _ in sys.stdin:
        # as in training, nobody waits for a step before the next is asked for
        clock = time.perf_counter()
        for _ in range(args.steps):
            step()
        wait()
        each = (time.perf_counter() - clock) / args.steps
        print(json.dumps(dict(seconds=each, peak=peak())), flush=True)
    if args.profile:
        kernels = kernel_seconds(take) if args.serve != "torch" else torch_kernel_seconds(step)
        print(f"\n{args.serve}: {1e3 * sum(s for s, _ in kernels):.1f} ms of kernels in a step")
        for spent, name in kernels[:30]:
            print(f"{1e3 * spent:9.2f} ms  {name[:110]}")


class Contestant:
    """A process that waits to be told to take its steps."""

    def __init__(self, args: Args, name: str):
        self.name = name
        self.times: list[float] = []
        self.peak = 0
        mine = dict(depth=args.depth, rows=args.rows, accumulate=args.accumulate, steps=args.steps)
        folder, _, kind = name.rpartition("@")
        # this file in any case, so that all are timed alike; lib is the other checkout's
        command = [sys.executable, "-P", __file__, "--serve", kind]
        command += [part for key, value in mine.items() for part in (f"--{key}", str(value))]
        command += ["--profile"] if args.profile else []
        here = Path(__file__).resolve().parents[1]
        places = [Path(folder or here).resolve(), here, os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(str(place) for place in places if place)
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": path}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
        self.about: dict = {}

    def wait(self):
        """Until it has compiled and warmed up."""
        self.about = self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {self.process.wait()}")
        return json.loads(line)

    def run(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        done = self.read()
        self.times.append(done["seconds"])
        self.peak = done["peak"]

    def end(self) -> str:
        """What it still has to say."""
        return self.process.communicate()[0]


def main(args: Args):
    if args.serve:
        return serve(args)
    from lib.chips import chip
    from lib.files import write_json

    with_torch = [name for name in args.contestants if name.rpartition("@")[2].startswith("torch")]
    if with_torch and not find_spec("torch"):
        raise SystemExit(f"{with_torch[0]} is PyTorch's: pip install torch, or name --contestants")

    # one at a time, for compilers time what they choose between
    contestants = []
    for name in args.contestants:
        contestants.append(Contestant(args, name))
        contestants[-1].wait()
    for number in range(args.rounds):
        # every other round in the other order
        for contestant in contestants[:: -1 if number % 2 else 1]:
            contestant.run()

    device = contestants[0].about["device"]
    known = chip(device)
    result = dict(device=device, batch=f"{args.accumulate}x{args.rows}x2048", lines=[])
    print(f"{device}, depth {args.depth}, {result['batch']} tokens a step; medians and extremes")
    for contestant in contestants:
        config, _ = config_of(args, contestant.name.rpartition("@")[2])
        median = statistics.median(contestant.times)
        tokens = config.total_batch_size / median
        line = dict(
            name=contestant.name,
            step_ms=round(1e3 * median, 1),
            step_ms_min=round(1e3 * min(contestant.times), 1),
            step_ms_max=round(1e3 * max(contestant.times), 1),
            tokens_per_s=round(tokens),
            mfu=round(tokens * config.flops_per_token / known.flops, 3) if known else None,
            peak_GiB=round(contestant.peak / 2**30, 1),
            **contestant.about,
        )
        print("  ".join(f"{key} {value}" for key, value in line.items()))
        result["lines"].append(line)
    for contestant in contestants:
        print(contestant.end(), end="")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
