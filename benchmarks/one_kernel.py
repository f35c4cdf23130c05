"""All layers of a token as one kernel on a GPU, beside XLA's: `python -m benchmarks.one_kernel`.

An experiment (LOG.md), for one row on an NVIDIA card of compute capability 8 or more: the model
does not use it. Needed is nvcc 12.1 or newer, which compiles `one_kernel.cu` in half a minute.
Printed are how far its numbers are from the formulas', the time of the layers by themselves, where
that goes, and a token's time in decoding, both ways.
"""

import ctypes
import math
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from lib import model
from lib.config import VALUE_GATE_CHANNELS, Config
from lib.model import decoding, transformer
from lib.params import unstack

SOURCE = Path(__file__).with_suffix(".cu")
FLAGS = ("-std=c++17", "-O3", "-shared", "-w", "-Xcompiler", "-fPIC")
# what is left out to see what is waited for; the numbers are then wrong
VARIANTS = {
    "whole": (),
    "without waits": ("-DWITHOUT_WAITS",),
    "without copies": ("-DWITHOUT_COPIES",),
    "without both": ("-DWITHOUT_WAITS", "-DWITHOUT_COPIES"),
    "with clocks": ("-DCLOCKS",),
}
# of a step, each with its wait for the other warps before it
STAMPS = ("base", "inputs", "norm", "product", "write", "attention")

# as one_kernel.cu has them
MOST_SPLITS = 8
MLPS = ("relu2", "gelu", "swiglu")
# a layer's matrices in the order in which they are handed over
MATRICES = ("wq", "wk", "wv", "wo", "w_in", "w_gate", "w_out")

# a model to compare numbers with: broken pieces of rows, grouped heads, a ring that came round and
# one that is split among blocks
SMALL = Config(
    n_layer=4,
    n_embd=320,
    n_head=4,
    n_kv_head=2,
    head_dim=64,
    mlp_dim=1280,
    window_pattern="SL",
    sequence_len=1024,
    vocab_size=64,
)


@dataclass
class Args:
    depth: int = 20
    """Layers; the width is 64 times that"""
    lengths: tuple[int, ...] = (192, 2048)
    """Of caches that are nearly full"""
    nvcc: str = "nvcc"
    """The CUDA compiler"""


# ---- the kernel ----------------------------------------------------------------------------------


def blocks(x_BTD, weights: list, ve: dict, config: Config, rope, cache, *, target: str):
    """`transformer.cached_blocks` of one token of one row, by what XLA knows as `target`."""
    x_D = x_BTD.reshape(-1).astype(jnp.float32)
    cos_H, sin_H = (a.reshape(-1).astype(jnp.float32) for a in rope)
    rings = [ring for pair in zip(cache.k, cache.v) for ring in pair]
    arrays = []
    for i, w in enumerate(weights):
        arrays += [w[name]["by_output"] for name in MATRICES if name in w]
        if i in ve:
            arrays += [w["value_gate"], ve[i]]
        arrays += [w[name].astype(jnp.float32) for name in ("resid_scale", "x0_scale") if name in w]

    given = [x_D, cos_H, sin_H, cache.length, *arrays, *rings]
    # of each layer what blocks of threads tell each other, and the rings
    between = jax.ShapeDtypeStruct((len(weights), _floats_between(config)), jnp.float32)
    results = [between] + [jax.ShapeDtypeStruct(ring.shape, ring.dtype) for ring in rings]
    first = len(given) - len(rings)
    in_place = {first + i: 1 + i for i in range(len(rings))}
    call = jax.ffi.ffi_call(target, results, input_output_aliases=in_place)
    between, *rings = call(*given, **_settings(weights, ve, config))

    # the stream behind each layer comes first
    x_LD = between[:, : config.n_embd].astype(x_BTD.dtype)
    last_BTD, middle_BTD = (x_LD[i].reshape(x_BTD.shape) for i in (-1, config.n_layer // 2))
    return last_BTD, middle_BTD, rings[::2], rings[1::2]


def _floats_between(config: Config) -> int:
    """Room for what a layer's blocks of threads tell each other, which `one_kernel.cu` cuts up."""
    N, K, H = config.n_head, config.n_kv_head, config.head_dim
    gates = -(-K // 4) * 4
    of_attention = (N + 2 * K) * H + gates + N * MOST_SPLITS * (H + 1)
    of_mlp = config.mlp_dim * (2 if config.mlp == "swiglu" else 1)
    return 2 * config.n_embd + of_attention + of_mlp


def _settings(weights: list, ve: dict, config: Config) -> dict:
    return dict(
        heads=np.int64(config.n_head),
        kv_heads=np.int64(config.n_kv_head),
        head_width=np.int64(config.head_dim),
        mlp_width=np.int64(config.mlp_dim),
        gate_channels=np.int64(VALUE_GATE_CHANNELS),
        mlp=np.int64(MLPS.index(config.mlp)),
        qk_norm=np.bool_(config.qk_norm),
        resid_scales=np.bool_("resid_scale" in weights[0]),
        x0_scales=np.bool_("x0_scale" in weights[0]),
        qk_scale=np.float32(config.qk_scale),
        eps=np.float32(config.norm_eps),
        windows=np.array(config.windows, np.int32),
        has_values=np.array([i in ve for i in range(len(weights))], np.int32),
    )


# ---- its numbers ---------------------------------------------------------------------------------


def difference(config: Config, target: str, length: int) -> float:
    """The largest difference, as a share of the largest number, between what the kernel makes of a
    token behind `length` others and what the formulas make of it in float32, of random numbers.
    """
    wide = config.replace(compute_dtype="float32")
    rng = np.random.default_rng(0)

    def drawn(a):
        # so large that every part of a block shows
        scale = 1 / math.sqrt(a.shape[-1]) if a.ndim > 1 else 1
        return jnp.asarray(scale * rng.normal(size=a.shape), a.dtype)

    def template():
        params = unstack(model.init_params(jax.random.key(0), config), config)
        weights = decoding.by_outputs(decoding.cast_matrices(params, config.dtype))["blocks"]
        value = jax.ShapeDtypeStruct((1, 1, config.n_kv_head, config.head_dim), config.dtype)
        return weights, dict.fromkeys(config.value_layers, value)

    weights, ve = jax.tree.map(drawn, jax.eval_shape(template))
    empty = partial(model.init_cache, config, 1, config.sequence_len)
    cache = jax.tree.map(drawn, jax.eval_shape(empty))
    cache = cache._replace(length=jnp.array([length], jnp.int32))
    x_BTD = drawn(jax.ShapeDtypeStruct((1, 1, config.n_embd), np.float32))

    @jax.jit
    def by_kernel(x_BTD, weights, ve, cache):
        rope = transformer.rope_tables(cache.length[:, None], config)
        return blocks(x_BTD, weights, ve, config, rope, cache, target=target)

    @jax.jit
    def by_formulas(x_BTD, weights, ve, cache):
        position_BT = cache.length[:, None]
        rope = transformer.rope_tables(position_BT, wide)
        with jax.default_matmul_precision("highest"):
            return transformer.cached_blocks(x_BTD, weights, ve, wide, rope, cache, position_BT)

    def widened(tree):
        return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype != jnp.int32 else a, tree)

    given = x_BTD, weights, ve, cache
    got, want = widened(by_kernel(*given)), by_formulas(*widened(given))
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return float(np.max([jnp.abs(a - b).max() / jnp.abs(b).max() for a, b in pairs]))


# ---- its time ------------------------------------------------------------------------------------


def built(args: Args, folder: Path) -> dict[str, ctypes.CDLL]:
    """The variants, compiled beside each other and known to XLA by their names."""
    arch = "-arch=sm_" + jax.devices()[0].compute_capability.replace(".", "")
    command = [args.nvcc, *FLAGS, arch, f"-I{jax.ffi.include_dir()}", str(SOURCE)]
    compiling = {}
    for name, options in VARIANTS.items():
        path = folder / f"{len(compiling)}.so"
        compiling[name] = path, subprocess.Popen([*command, *options, "-o", str(path)])
    libraries = {}
    for name, (path, process) in compiling.items():
        if process.wait():
            raise SystemExit(f"{args.nvcc} cannot compile {SOURCE} {name}")
        libraries[name] = ctypes.CDLL(str(path))
        function = jax.ffi.pycapsule(libraries[name].OneKernel)
        jax.ffi.register_ffi_target(name, function, platform="CUDA")
    return libraries


def seconds_of_layers(params, config: Config, length: int, target: str) -> list[float]:
    """Of a token's way through all layers, the best and the worst of five times 64."""
    cache = model.init_cache(config, 1, length)
    cache = cache._replace(length=jnp.array([length - 48], jnp.int32))
    value = jnp.ones((1, 1, config.n_kv_head, config.head_dim), config.dtype)
    ve = dict.fromkeys(config.value_layers, value)
    x_BTD = jax.random.normal(jax.random.key(1), (1, 1, config.n_embd), config.dtype)

    @partial(jax.jit, donate_argnums=3)
    def tokens(x_BTD, weights, ve, cache):
        rope = transformer.rope_tables(cache.length[:, None], config)

        def one(_, carry):
            y_BTD, cache = carry
            # each begins with what came out of the one before
            x = x_BTD + 1e-3 * jnp.nan_to_num(y_BTD)
            y_BTD, _, k, v = blocks(x, weights, ve, config, rope, cache, target=target)
            return y_BTD, cache._replace(k=k, v=v)

        return jax.lax.fori_loop(0, 64, one, (x_BTD, cache))

    times = []
    for _ in range(6):
        begun = time.perf_counter()
        y_BTD, cache = tokens(x_BTD, params["blocks"], ve, cache)
        y_BTD.block_until_ready()
        times.append((time.perf_counter() - begun) / 64)
    return [min(times[1:]), max(times[1:])]


def print_clocks(library: ctypes.CDLL):
    """Cycles between the places of two layers' products, for a block with a part in attention and
    one without, and the first and the last warp of each; of 12 layers or more, on 101
    multiprocessors or more.
    """
    stamps = np.zeros((2, 2, 8, len(STAMPS)), np.int64)
    library.Stamps(stamps.ctypes.data_as(ctypes.c_void_p))
    for block, who in enumerate(("attends", "does not")):
        for warp, which in enumerate(("first", "last")):
            times = stamps[block, warp].ravel()
            print(f"block that {who}, {which} warp: {times[-1] - times[0]:,} cycles")
            spent = np.append(np.diff(times), 0).reshape(8, -1)
            for product, row in zip(["qkv", "attention out", "mlp in", "mlp out"] * 2, spent):
                each = "  ".join(f"{name} {cycles:5}" for name, cycles in zip(STAMPS, row))
                print(f"  {product:14} {each}")


def main(args: Args):
    from lib import speed

    if jax.default_backend() != "gpu" or not shutil.which(args.nvcc):
        raise SystemExit(
            f"this needs an NVIDIA GPU that jax sees, and {args.nvcc} to compile for it"
        )
    config = Config.from_depth(depth=args.depth, compute_dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        libraries = built(args, Path(folder))
    for dtype in ("float32", "bfloat16"):
        apart = difference(SMALL.replace(compute_dtype=dtype), "whole", 900)
        print(f"{dtype}: {apart:.1e} of the largest number from the formulas")

    params = model.decoding_params(model.init_params(jax.random.key(0), config), config)
    bandwidth = speed.read_bandwidth(speed.LARGE)
    print(f"{jax.devices()[0].device_kind}, memory read at {bandwidth / 1e9:,.0f} GB/s")
    for name in VARIANTS:
        for length in args.lengths if name == "whole" else args.lengths[:1]:
            best, worst = seconds_of_layers(params, config, length, name)
            times = f"{1e6 * best:7.1f} us (worst {1e6 * worst:.1f})"
            print(f"layers, cache of {length}, {name:15} {times}", flush=True)
    print_clocks(libraries["with clocks"])

    by_xla = transformer.cached_blocks

    def by_kernel(x_BTD, *rest):
        if x_BTD.shape[:2] != (1, 1):
            return by_xla(x_BTD, *rest)
        return blocks(x_BTD, *rest[:-1], target="whole")

    for name, way in {"XLA": by_xla, "one kernel": by_kernel}.items():
        transformer.cached_blocks = way
        jax.clear_caches()
        (decoded,) = speed.decoding(config, rows=(1,))
        share = decoded.bytes / decoded.seconds / bandwidth
        print(f"decoding, {name:10} {1e6 * decoded.seconds:.1f} us a token, {share:.1%} of memory")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
