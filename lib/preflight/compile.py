"""The real train step compiled for a TPU that isn't there: libtpu does it on any Linux x86-64
machine.

Answers are kept in .cache/preflight. Without libtpu an estimate from shapes answers and says so.
"""

import dataclasses
import importlib.metadata
import math
import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from lib import chips, runtime
from lib.chips import Chip, Slice, rented
from lib.config import Config
from lib.files import UserError, first_line
from lib.generate.engine import LONG_CHUNK
from lib.model.kernels import compiled_kernels
from lib.parallel.layout import Layout, make_layout
from lib.preflight import hlo, roofline
from lib.preflight.cache import CACHE, has_libtpu, kept
from lib.preflight.estimate import GIB, Report, estimate, make_report, make_split
from lib.preflight.memory import held_bytes
from lib.preflight.roofline import Account, Split
from lib.train.step import make_train_step, state_template

# libtpu looks for a TPU machine around it unless told; several processes may compile at once
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# ---- devices that aren't there -------------------------------------------------------------------


def tpu_devices(topology: str) -> list:
    """The devices of a TPU topology like v6e:2x4 that isn't there.

    Call it before anything else initialises JAX's backends.
    """
    if not has_libtpu():
        raise UserError(
            "compiling for a TPU without one needs libtpu, which is not installed: "
            "pip install 'jax[tpu]' (Linux x86-64 only)"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # only after the environment is set
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    # the two cores of a v4 chip are one device to jax, but only when asked for here
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"
    # older libtpus take it that a host holds 2 x 2 chips, also where there is only one
    sides = [int(side) for side in re.findall(r"\d+", topology.partition(":")[2])][:2]
    if 1 in sides:
        options["chips_per_host_bounds"] = (*(min(side, 2) for side in sides), 1)
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except Exception as e:
        if "lockfile" in str(e) or "already in use" in str(e):
            raise UserError(
                "another process holds libtpu's lock (/tmp/libtpu_lockfile): wait until it ends, "
                "or set ALLOW_MULTIPLE_LIBTPU_LOAD=1 if it only compiles too"
            ) from e
        good = [name for name in ("v6e:1x1", "v6e:2x4", "v5p:2x2x1") if name != topology]
        raise UserError(
            f"libtpu {runtime.version('libtpu')} cannot describe TPU topology {topology} "
            f"({first_line(e)}): name another one, like {' or '.join(good)}"
        ) from e
    return list(description.devices)


def tpu_device(topology: str = "v6e:1x1"):
    """The first device of a TPU topology that isn't there."""
    return tpu_devices(topology)[0]


def capacity(device) -> int:
    """Bytes of HBM that the compiler lets a program use: it says so when asked for more."""
    big = jax.ShapeDtypeStruct((2**40,), "int8", sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(big).compile()
    except jax.errors.JaxRuntimeError as e:
        told = re.search(r"(?:available HBM \(|of )([\d.]+)G", str(e))
        if told:
            return int(float(told[1]) * GIB)
        raise
    raise AssertionError("a program of 2 TiB fitted")


def for_tpu(config: Config, kernels: bool = True) -> Config:
    """`config` with what "auto" means on a TPU named; kernels: whether Pallas kernels compile."""
    attention = "splash" if kernels else "einsum"
    meaning = dict(attention=attention, compute_dtype="bfloat16")
    named = {name: value for name, value in meaning.items() if getattr(config, name) == "auto"}
    return config.replace(**named)


def for_chip(config: Config, chip: Chip) -> Config:
    """`config` with what "auto" means on a chip named: a TPU's kernels, or what a GPU has."""
    if chip.is_tpu:
        return for_tpu(config)
    meaning = dict(attention="jax", compute_dtype=chip.dtype)
    named = {name: value for name, value in meaning.items() if getattr(config, name) == "auto"}
    return config.replace(**named)


def as_compiled(config: Config, cache: Path | None = CACHE) -> Config:
    """`config` with what "auto" comes to on a TPU with the libtpu that is installed here.

    Says so on stderr where that libtpu does not compile Pallas kernels. Tried once for each pair of
    versions of jax and libtpu: the answer is kept in `cache`.
    """
    if config.attention != "auto" or not has_libtpu():
        return for_tpu(config)
    fault = kept(cache, ["kernels"], lambda: runtime.kernel_fault(tpu_device("v6e:2x2")))
    if fault:
        print(runtime.fallback(fault), file=sys.stderr)
    return for_tpu(config, kernels=not fault)


# ---- compiling -----------------------------------------------------------------------------------


class Compiled(NamedTuple):
    """What came of compiling. program is None where memory ran out; needed says how much then."""

    program: Any
    seconds: float
    # the optimised HLO
    text: str
    # the largest: (bytes, what shares them)
    buffers: list[tuple[float, str]]
    # bytes of temporaries
    needed: float | None

    @property
    def peak(self) -> int:
        """Bytes at the program's peak on each device."""
        return self.program.memory_analysis().peak_memory_in_bytes


def compile_lowered(lowered) -> Compiled:
    """Compile what `jax.jit(...).lower(...)` returned, and read what XLA dumps about it."""
    clock = time.perf_counter()
    program = needed = None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # jax finds in its cache on disk what was compiled for a TPU before, cannot load it without
        # one, and compiles it again
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        try:
            program = lowered.compile(compiler_options={"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as e:
            # a gap of the compiler's own, such as with shards thinner than a register
            if "UNIMPLEMENTED" in str(e):
                raise UserError(
                    f"this libtpu cannot compile it ({first_line(e)}): "
                    "take another strategy or mesh, or wider parts"
                ) from e
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            needed = _needed_bytes(str(e))
        seconds = time.perf_counter() - clock

        # the program's as_text() fails on some
        text = _dumped(folder, ".after_optimizations.txt")
        usage = _dumped(folder, "after_optimizations-memory-usage-report.txt")
    return Compiled(program, seconds, text, _largest_buffers(usage), needed)


def _dumped(folder: str, end: str) -> str:
    """The longest of the dumped files that end so: small helpers are dumped too."""
    texts = [path.read_text() for path in Path(folder).glob(f"*{end}")]
    return max(texts, key=len, default="")


def _needed_bytes(message: str) -> float:
    """How much memory the compiler says that it would need."""
    told = re.search(r"(?:required for HLO temporaries \(|Used )([\d.]+)([GT])", message)
    if not told:
        return math.nan
    return float(told[1]) * {"G": 2**30, "T": 2**40}[told[2]]


def _largest_buffers(usage: str, most: int = 8) -> list[tuple[float, str]]:
    """(bytes, what shares them) of the largest buffers in XLA's report of memory usage."""
    # its first part is HBM
    hbm = usage.split("Memory Space: ")[1:2]
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}
    lines = re.findall(r"\( *\d+%\); +([\d.]+)([KMG])iB; +\d+; +\d+; (.*)", "".join(hbm))
    return [(float(size) * unit[prefix], what) for size, prefix, what in lines[:most]]


def lower_step(config: Config, where):
    """The real training step lowered for `where`: a device or a `Layout`."""
    layout = where if isinstance(where, Layout) else None
    shape = (config.accumulate * config.microbatch, config.sequence_len)
    if layout:
        state = state_template(config, layout)
        batch = jax.ShapeDtypeStruct(shape, "int32", sharding=layout.batch)
    else:
        state = _on(where, state_template(config))
        batch = _on(where, jax.ShapeDtypeStruct(shape, "int32"))
    with compiled_kernels():
        return make_train_step(config, layout).lower(state, batch, batch)


def _on(device, tree):
    """Shapes placed on one device."""
    place = SingleDeviceSharding(device)

    def placed(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)

    return jax.tree.map(placed, tree)


def compile_step(config: Config, where) -> Compiled:
    """Compile one training step of `config` for `where`: a device or a `Layout`.

    `config` names its attention and compute dtype (auto would look at the machine at hand). The
    device's memory running out is a UserError.
    """
    # what takes most is what to change
    compiled = compile_lowered(lower_step(config, where))
    if compiled.needed is not None:
        largest = [f"{n / GIB:.2f} GiB for {what}" for n, what in compiled.buffers[:3]]
        raise UserError(
            f"does not fit: {compiled.needed / GIB:.2f} GiB of temporaries; the largest are "
            + "; ".join(largest)
        )
    return compiled


# tokens of a row that decoding is compiled for: as many as the engine writes in one dispatch
TURNS = LONG_CHUNK


def compile_decode(config: Config, device, rows: int, length: int, int8: bool = False) -> dict:
    """Compile the decoding of TURNS tokens for each of `rows` rows with caches of `length` tokens.

    int8: weights as `model.quantized` makes them. Returns its memory and its least time for one
    token of each row, as JSON, with the bytes that it moves by component beside those that it
    cannot do without where all of it lies in HBM: in a loop, what fits on the chip stays there.
    """
    from lib import model

    def weights(params):
        """As decoding holds them."""
        return model.decoding_params(model.quantized(params, config) if int8 else params, config)

    # weights, caches, and one token a row
    params = jax.eval_shape(weights, state_template(config).params)
    cache = jax.eval_shape(lambda: model.init_cache(config, rows, length))
    tokens = jax.ShapeDtypeStruct((rows, 1), "int32")

    # A loop, as the engine's: of a program with one step the compiler thinks that what it brought
    # on the chip must be written back at once, and brings a table there for the next run.
    def decode(params, tokens, cache):
        def turn(carry, _):
            tokens, cache = carry
            logits_BTV, cache = model.forward(params, config, tokens, cache)
            tokens = logits_BTV.argmax(axis=-1).astype(tokens.dtype)
            return (tokens, cache), tokens

        return jax.lax.scan(turn, (tokens, cache), length=TURNS)

    arguments = [_on(device, tree) for tree in (params, tokens, cache)]
    compiled = compile_lowered(jax.jit(decode, donate_argnums=2).lower(*arguments))
    asked = dict(rows=rows, int8=int8)
    if compiled.needed is not None:
        return dict(**asked, fits=False, needed=compiled.needed)

    # the least time of what was compiled, and a turn's share of it
    chip = chips.chip(device.device_kind)
    assert chip is not None, "every TPU that libtpu describes is in the table"
    work = hlo.analyse(compiled.text, chip.matrix_unit).components
    step = roofline.bound(work, chip)["step"]
    seconds = step.seconds / TURNS
    return dict(
        **asked,
        fits=True,
        peak=compiled.peak,
        compile_seconds=compiled.seconds,
        seconds=seconds,
        tokens_per_s=rows / seconds,
        bytes=step.bytes / TURNS,
        flops=step.flops / TURNS,
        moved={name: part.bytes / TURNS for name, part in work.items() if part.bytes},
        needs=roofline.decode_bytes(config, rows, length, int8),
    )


# ---- the report of a compiled step ---------------------------------------------------------------


def inspect(
    config: Config,
    name: str,
    strategy: str = "dp",
    mesh: dict[str, int] | None = None,
    decode: int = 0,
    cache: Path | None = CACHE,
    int8: bool = False,
) -> Report:
    """Compile the train step of `config` for the slice `name` (v6e-1, v5p-8, v6e:2x4, ...).

    For GPUs (h100-8) no compiler is at hand: an estimate from shapes answers.
    decode: rows of a decode step to compile too (one chip only), int8: with such weights. The
    answer is kept in `cache`.
    """
    where = rented(name)
    if not where.chip.is_tpu:
        return estimate(for_chip(config, where.chip), where, strategy, mesh)
    config = as_compiled(config, cache)
    if not has_libtpu():
        return estimate(config, where, strategy, mesh)

    asked = question(config, where, strategy, mesh)

    # with its question, so that others can find it
    def answer():
        return _inspect(config, where, strategy, mesh).to_dict() | dict(asked=asked)

    report = Report.from_dict(kept(cache, asked, answer))
    if not decode or where.chips > 1:
        return report

    def decoding():
        device = tpu_device(where.topology)
        return compile_decode(config, device, decode, config.sequence_len, int8)

    asked_too = ["decode", config.to_dict(), where.topology, decode, int8]
    return dataclasses.replace(report, decode=kept(cache, asked_too, decoding))


def question(
    config: Config, where: Slice, strategy: str, mesh: dict[str, int] | None = None
) -> list:
    """What `inspect` asks of a step, as the key under which its answer is kept."""
    split = make_split(config, where, strategy, mesh)
    return ["inspect", config.to_dict(), where.topology, strategy, split._asdict()]


def _inspect(config: Config, where: Slice, strategy: str, mesh: dict[str, int] | None) -> Report:
    # the step
    devices = tpu_devices(where.topology)
    layout = make_layout(strategy, config, devices, mesh) if len(devices) > 1 else None
    split = Split(*map(layout.size, Split._fields)) if layout else Split()
    compiled = compile_lowered(lower_step(config, layout or devices[0]))

    # its work, with what the kernels do added
    unit = where.chip.matrix_unit
    analysis = hlo.analyse(compiled.text, unit, where.chips)
    rows = config.microbatch // split.rows
    roofline.add_kernels(
        analysis.components, analysis.kernels, config, rows, unit, tensor=split.tensor
    )
    collectives = sorted(analysis.collectives, key=lambda c: -c.bytes)
    memory, peak = _memory_by_part(config, layout, compiled)
    return make_report(
        config,
        where,
        strategy,
        split,
        Account(analysis.components, sum(c.bytes for c in collectives)),
        memory=memory,
        peak=peak,
        available=capacity(devices[0]),
        source=f"compiled by libtpu {importlib.metadata.version('libtpu')}",
        compile_seconds=compiled.seconds,
        buffers=compiled.buffers,
        kernels=analysis.kernels,
        collectives=[c._asdict() for c in collectives],
    )


def _memory_by_part(
    config: Config, layout: Layout | None, compiled: Compiled
) -> tuple[dict[str, int], int]:
    """(bytes on one device by part, their sum); the rest is gradients, then activations."""
    # what is held from step to step
    state = state_template(config, layout)
    parameters, optimizer = held_bytes(state.params), held_bytes(state.opt_state)
    # the compiler counts state as arguments, unless it failed: then only temporaries
    if compiled.needed is None:
        peak = compiled.peak
    else:
        peak = int(compiled.needed) + parameters + optimizer

    rest = max(0, peak - parameters - optimizer)
    gradients = min(parameters, rest)
    memory = dict(
        parameters=parameters,
        optimizer=optimizer,
        gradients=gradients,
        activations=rest - gradients,
    )
    return memory, peak
