"""What a GPU's step moves, compiled without a GPU: `python -m benchmarks.gpu_program --help`.

XLA compiles for a GPU that is only described to it; needed is jax with its CUDA plugin
(`pip install "jax[cuda13]"`), on a machine of any kind. Printed are the kernels of a training step
by what they read and write: a change that saves a pass over memory is seen without a card. Times
are not, nor which of a product's kernels a card would choose.
"""

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import tyro

# an H200, in the words of XLA's GpuTargetConfigProto
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 62914560
  device_memory_size: 150000000000
  memory_bandwidth: 4800000000000
}
"""


@dataclass
class Args:
    depth: int = 12
    """Layers; the width is 64 times that"""
    rows: int = 16
    """Rows of 2,048 tokens in a microbatch"""
    accumulate: int = 4
    """Microbatches in a step"""
    contestant: str = "plain:loss_chunk=32768,scan_layers=false"
    """plain or whole, with what may stand behind the colon, as of benchmarks.gpu"""
    lines: int = 40
    """How many kinds of kernel to print"""
    text: str = ""
    """Also write the compiled program to this file"""


class Kernel(NamedTuple):
    """One kind of kernel: those of equal layers count together."""

    name: str
    result: str
    scope: str


def pretend():
    """Have the model traced as on a GPU of this kind: (the device that isn't there)."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    import jax
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.experimental import topologies

    from lib.model import attention, norm_gpu, rotary_gpu

    where = dict(topology="1x1x1", target_config=H200)
    if not find_spec("jax_plugins"):
        raise SystemExit('jax has no compiler for GPUs here: pip install "jax[cuda13]"')
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", **where)
    jax.devices()  # the CPU is there before another is pretended
    jax.default_backend = lambda: "gpu"
    attention.is_ampere = rotary_gpu.is_ampere = norm_gpu.is_ampere = lambda: True
    rotary_gpu.fault = norm_gpu.fault = lambda width: ""
    # what jax would ask the card and its libraries
    cudnn.check_cudnn_version = lambda: 91000
    cudnn.check_compute_capability = lambda *_: True
    cudnn.is_cuda_compute_capability_equal = lambda *_: False
    return topology.devices[0]


def compiled(config, options: dict, device) -> str:
    """The training step's program, as XLA prints it."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from lib import train

    place = SingleDeviceSharding(device)
    rows = config.accumulate * config.microbatch
    ids = jax.ShapeDtypeStruct((rows, config.sequence_len), "int32", sharding=place)
    state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        train.state_template(config),
    )
    # nothing can be timed here
    options = options | {"xla_gpu_autotune_level": "0"}
    lowered = train.make_train_step(config).lower(state, ids, ids)
    return lowered.compile(compiler_options=options).as_text()


def kernels(text: str) -> dict[Kernel, tuple[int, float]]:
    """{kind: (how many run in a step, bytes that all of them read and write)}."""
    from lib.preflight import hlo

    program = hlo.parse(text)
    counts: dict[Kernel, int] = defaultdict(int)
    moved: dict[Kernel, float] = defaultdict(float)

    def walk(name: str, times: int):
        ops = program.computations[name]
        types = {op.name: op.type for op in ops.values()}
        for op in ops.values():
            if op.code == "while":
                walk(hlo.called(op, "body"), times * hlo.trip_count(op, program.computations))
            elif op.code == "call":
                walk(hlo.called(op, "to_apply"), times)
            elif op.code == "custom-call":
                arrays = [op.type, *(types[name] for name in op.operands)]
                add(op, times, sum(map(numbers_of, arrays)))
            elif op.code not in hlo.FREE:
                add(op, times, hlo.traffic(op, types, program))

    def add(op, times: int, bytes: float):
        target = re.search(r'custom_call_target="([^"]*)"', op.rest)
        kind = Kernel(
            name=target[1] if target else re.sub(r"[\d_.]+$", "", op.name),
            result=re.sub(r"\{[^}]*\}", "", op.type),
            scope="/".join(re.sub(r"layer\d+", "layer", op.scope).split("/")[-3:]),
        )
        counts[kind] += times
        moved[kind] += times * bytes

    def numbers_of(type_: str) -> float:
        # bytes by themselves are a library's room for work
        return sum(leaf.bytes for leaf in hlo.leaves(type_) if leaf.dtype not in ("s8", "u8"))

    walk(program.entry, 1)
    return {kind: (counts[kind], moved[kind]) for kind in counts}


def main(args: Args):
    device = pretend()
    from benchmarks.gpu import Args as Race
    from benchmarks.gpu import config_of
    from lib.files import write_atomic

    if args.contestant.partition(":")[0] not in ("plain", "whole"):
        raise SystemExit(f"contestant {args.contestant} is not compiled here: plain or whole is")
    race = Race(depth=args.depth, rows=args.rows, accumulate=args.accumulate)
    config, options = config_of(race, args.contestant)
    text = compiled(config, options, device)
    if args.text:
        write_atomic(args.text, text)
    found = kernels(text)
    total = sum(bytes for _, bytes in found.values())
    number = sum(count for count, _ in found.values())
    print(f"{number:,} kernels a step read and write {total / 1e9:,.1f} GB")
    largest = sorted(found.items(), key=lambda pair: -pair[1][1])
    for kind, (count, bytes) in largest[: args.lines]:
        line = f"{bytes / 1e9:8.2f} GB {count:5} x {kind.name[:34]:34} {kind.result[:40]:40}"
        print(f"{line} {kind.scope[-70:]}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
