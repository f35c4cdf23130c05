"""Time and memory of every attention implementation, forward and backward, on this device or
compiled for a TPU.

python benchmarks/attention.py                    time and memory here python
benchmarks/attention.py --tpu v6e:1x1      memory for a TPU that need not be there (needs libtpu)
"""

import os
import sys
import time
from pathlib import Path

import tyro

# instead of this folder: its tokenize.py would hide Python's own
sys.path[0] = str(Path(__file__).parents[1])

from lib import runtime  # noqa: E402

MIB = 2**20


def main(
    tpu: str = "",
    batch: tuple[int, ...] = (),
    length: int = 0,
    heads: int = 0,
    kv_heads: int = 0,
    head_dim: int = 128,
    window: int = 0,
    repeats: int = 20,
    json: Path | None = None,
):
    """Print a table of every implementation, with the window and with all of the past visible.

    Args:
        tpu: compile for this topology (v6e:1x1, v5e:1x1, ...) instead of running here.
        batch: rows, one table each. Sizes left out suit the device.
        length: positions.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: width of a head.
        window: keys visible before the query.
        repeats: timed runs of each, in turns.
        json: also write the rows to this file.
    """
    if tpu:  # libtpu reads these when jax starts
        os.environ |= dict(
            JAX_PLATFORMS="cpu",
            TPU_SKIP_MDS_QUERY="1",
            TPU_WORKER_HOSTNAMES="localhost",
            TPU_ACCELERATOR_TYPE="v6e-1",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        )
    else:
        runtime.keep_memory()
    import jax

    from lib.files import write_json

    on_cpu = not tpu and jax.default_backend() == "cpu"
    default = ((8,), 512, 2, 128) if on_cpu else ((4, 8), 2048, 8, 512)
    batch, length, heads, window = (
        batch or default[0],
        length or default[1],
        heads or default[2],
        window or default[3],
    )
    if tpu:
        from jax.experimental import topologies

        bounds = tuple(int(n) for n in (tpu.split(":")[1] + "x1x1").split("x")[:3])
        device = topologies.get_topology_desc(tpu, "tpu", chips_per_host_bounds=bounds).devices[0]
    else:
        device = jax.devices()[0]
    print(
        "peak: arguments, results and temporaries of forward + backward; saved: what backward "
        "keeps of "
        "forward;\n"
        "moved: bytes read and written as XLA counts them (a kernel's operands once)"
    )
    if not tpu and device.platform != "tpu":
        print(
            "splash and pallas are left out: they are TPU kernels, and the time of their "
            "interpreter says "
            "nothing"
        )
    rows = []
    for b in batch:
        for w in (window, None):
            rows += measure(
                device,
                bool(tpu),
                on_cpu,
                (b, length, heads, kv_heads or heads, head_dim),
                w,
                repeats,
            )
    if json:
        write_json(json, dict(jax=jax.__version__, device=device.device_kind, rows=rows))


def measure(device, deviceless, on_cpu, shape, window, repeats) -> list[dict]:
    """Rows for one shape (B, T, N, K, H) and window."""
    import jax
    import jax.numpy as jnp

    from lib.model.attention import ATTENTION
    from lib.model.kernels import compiled_kernels

    B, T, N, K, H = shape
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    place = jax.sharding.SingleDeviceSharding(device)
    args = [jax.ShapeDtypeStruct((B, T, n, H), dtype, sharding=place) for n in (N, K, K, N)]
    print(
        f"\n{device.device_kind} {jnp.dtype(dtype).name} B={B} T={T} N={N} K={K} H={H} "
        f"window={window}"
    )
    print(
        f"{'':8}{'min ms':>9}{'median':>9}{'compile s':>11}"
        f"{'peak MiB':>11}{'saved MiB':>11}{'moved MiB':>11}"
    )
    programs, rows = {}, []
    for name, attend in ATTENTION.items():
        if name in ("splash", "pallas") and not (deviceless or device.platform == "tpu"):
            continue

        def step(q, k, v, do):
            o, vjp = jax.vjp(lambda *qkv: attend(*qkv, window), q, k, v)
            return o, *vjp(do)

        start = time.perf_counter()
        with compiled_kernels():
            residuals = jax.eval_shape(
                lambda *qkv: jax.vjp(lambda *x: attend(*x, window), *qkv)[1], *args[:3]
            )
            compiled = jax.jit(step).lower(*args).compile()
        memory = compiled.memory_analysis()
        together = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        )
        rows.append(
            dict(
                name=name,
                shape=shape,
                window=window,
                compile_s=time.perf_counter() - start,
                # XLA:CPU's peak lacks temporaries
                peak_mib=(together if on_cpu else memory.peak_memory_in_bytes) / MIB,
                saved_mib=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals)) / MIB,
                moved_mib=compiled.cost_analysis()["bytes accessed"] / MIB,
            )
        )
        programs[name] = compiled
    if not deviceless:
        keys = jax.random.split(jax.random.key(0), len(args))
        values = [
            jax.device_put(jax.random.normal(key, a.shape, a.dtype), device)
            for key, a in zip(keys, args)
        ]
        times = {name: [] for name in programs}
        # in turns, so that a busy moment hits all of them; the first is a warm-up
        for _ in range(repeats + 1):
            for name, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(*values))
                times[name].append(1e3 * (time.perf_counter() - start))
        for row in rows:
            ordered = sorted(times[row["name"]][1:])
            row |= dict(min_ms=ordered[0], median_ms=ordered[len(ordered) // 2])
    for r in rows:
        ms = "".join(f"{r[key]:9.2f}" if key in r else f"{'':9}" for key in ("min_ms", "median_ms"))
        sizes = "".join(
            f"{r[key]:11.1f}" for key in ("compile_s", "peak_mib", "saved_mib", "moved_mib")
        )
        print(f"{r['name']:8}{ms}{sizes}")
    return rows


if __name__ == "__main__":
    tyro.cli(main)
