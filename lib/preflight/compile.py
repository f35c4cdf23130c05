"""Will it fit, how fast can it be, what will it cost: the real train step compiled for a TPU that isn't there.

    python -m lib.preflight --depth 20 --chip v6e-1
    python -m lib.preflight --preset nanochat_d24 --chip v6e-8 --strategy fsdp --overrides "microbatch=32"
    python -m lib.preflight --run mine --chip v5e-1 --search
    python -m lib.preflight --table

libtpu compiles on any Linux x86-64 machine. Without it an estimate from shapes answers and says so. Answers are kept in .cache/preflight.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from lib import chips
from lib.chips import Chip, Slice, tpu_slice
from lib.files import UserError, choose, first_line, write_json
from lib.preflight import hlo, roofline

# libtpu looks for a TPU machine around it unless told; several processes may compile at once
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "preflight"
MFU = 0.4  # assumed where nobody has measured: what a healthy single-chip run of this size reaches
PARTS = ("parameters", "optimizer", "gradients", "activations")
# published: 163.6M parameters on a Colab v6e-1 made 477k tokens/s (vorushin/tpuchat, 08_tpu_ablations revision 39, whose shape this is; its
# parameters, moments, gradients and logits are bfloat16, ours float32)
PUBLISHED = dict(
    tokens_per_s=477e3,
    chip="v6e-1",
    config=dict(
        n_layer=8,
        n_embd=1024,
        n_head=4,
        n_kv_head=1,
        head_dim=256,
        mlp="swiglu",
        mlp_dim=3072,
        vocab_size=32768,
        sequence_len=2048,
        microbatch=4,
        total_batch_size=2**17,
        window_pattern="L",
        qk_scale=1.0,
        softcap=15.0,
        resid_scales=False,
        x0_scales=False,
        value_embeds=False,
        smear=False,
        backout=False,
        optimizer="adamw",
        attention="splash",
        compute_dtype="bfloat16",
    ),
)


# ---- devices that aren't there -----------------------------------------------------------------------------------------


def has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def tpu_devices(topology: str) -> list:
    """The devices of a TPU topology like v6e:2x4 that isn't there. Call before anything else initialises JAX's backends."""
    if not has_libtpu():
        raise UserError(
            "compiling for a TPU without one needs libtpu, which is not installed: pip install libtpu (Linux x86-64 only)"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    # the two cores of a v4 chip are one device to jax, but only when asked for here
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        return list(
            topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
        )
    except Exception as e:
        if "lockfile" in str(e) or "already in use" in str(e):
            raise UserError(
                "another process holds libtpu's lock (/tmp/libtpu_lockfile): wait until it ends, or set "
                "ALLOW_MULTIPLE_LIBTPU_LOAD=1 if it only compiles too"
            ) from e
        raise UserError(
            f"libtpu cannot describe TPU topology {topology} ({first_line(e)}): name one like v6e:1x1, v6e:2x4 or v5p:2x2x1"
        ) from e


def tpu_device(topology: str = "v6e:1x1"):
    """The first device of a TPU topology that isn't there."""
    return tpu_devices(topology)[0]


def capacity(device) -> int:
    """Bytes of HBM that the compiler lets a program use on `device`: it says so when asked for more."""
    import jax

    big = jax.ShapeDtypeStruct((2**40,), "int8", sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(big).compile()
    except jax.errors.JaxRuntimeError as e:
        if found := re.search(r"(?:available HBM \(|of )([\d.]+)G", str(e)):
            return int(float(found[1]) * 2**30)
        raise
    raise AssertionError("a program of 2 TiB fitted")


# ---- compiling ---------------------------------------------------------------------------------------------------------


def for_tpu(config):
    """`config` with what "auto" means on a TPU named."""
    auto = dict(attention="splash", compute_dtype="bfloat16")
    return config.replace(**{k: v for k, v in auto.items() if getattr(config, k) == "auto"})


def _compile(lowered) -> dict:
    """{"compiled" or None, "seconds", "text" (optimised HLO), "buffers": [(bytes, what shares it)], "needed": bytes where it does not fit}."""
    import jax

    clock = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        compiled = needed = None
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as e:
            # a gap of the compiler's own, such as with shards thinner than a register
            if "UNIMPLEMENTED" in str(e):
                raise UserError(
                    f"this libtpu cannot compile it ({first_line(e)}): take another strategy or mesh, or wider parts"
                ) from e
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            found = re.search(r"(?:required for HLO temporaries \(|Used )([\d.]+)([GT])", str(e))
            needed = float(found[1]) * {"G": 2**30, "T": 2**40}[found[2]] if found else float("nan")
        seconds = time.perf_counter() - clock
        # helpers are dumped too
        dumped = lambda end: max(
            (p.read_text() for p in Path(folder).glob(f"*{end}")), key=len, default=""
        )
        # the first is HBM
        report = "".join(
            dumped("after_optimizations-memory-usage-report.txt").split("Memory Space: ")[1:2]
        )
        buffers = re.findall(r"\( *\d+%\); +([\d.]+)([KMG])iB; +\d+; +\d+; (.*)", report)
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}
        # as_text() fails on some programs
        return dict(
            compiled=compiled,
            seconds=seconds,
            needed=needed,
            text=dumped(".after_optimizations.txt"),
            buffers=[(float(n) * unit[u], what) for n, u, what in buffers[:8]],
        )


def lower_step(config, where):
    """The real training step lowered for `where`: a device or a lib.parallel.layout.Layout."""
    import jax

    from lib.model.attention import compiled_kernels
    from lib.parallel.layout import Layout
    from lib.train import step as train

    layout = where if isinstance(where, Layout) else None
    shape = (config.accumulate * config.microbatch, config.sequence_len)
    if layout:
        state, batch = (
            train.state_template(config, layout),
            jax.ShapeDtypeStruct(shape, "int32", sharding=layout.batch),
        )
    else:
        place = jax.sharding.SingleDeviceSharding(where)
        at = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
        state, batch = (
            jax.tree.map(at, train.state_template(config)),
            at(jax.ShapeDtypeStruct(shape, "int32")),
        )
    with compiled_kernels():
        return train.make_train_step(config, layout).lower(state, batch, batch)


def compile_step(config, where) -> dict:
    """Compile one training step of `config` for `where`: {"compiled", "seconds", "peak", "arguments", "temporary"} in bytes, text and buffers.

    `config` names its attention and compute dtype (auto would look at the machine at hand). The device's memory running out is a UserError.
    """
    made = _compile(lower_step(config, where))
    if made["compiled"] is None:
        raise UserError(
            f"does not fit: {made['needed'] / 2**30:.2f} GiB of temporaries; the largest are "
            + "; ".join(f"{n / 2**30:.2f} GiB for {what}" for n, what in made["buffers"][:3])
        )
    memory = made["compiled"].memory_analysis()
    return made | dict(
        peak=memory.peak_memory_in_bytes,
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
    )


def compile_decode(config, device, rows: int, length: int) -> dict:
    """Compile the decoding of one token for each of `rows` rows with caches of `length` tokens: bytes and least time, as JSON."""
    import jax

    from lib import model
    from lib.train import step as train

    place = jax.sharding.SingleDeviceSharding(device)
    at = lambda tree: jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree
    )
    params = at(
        jax.eval_shape(
            lambda p: model.decoding_params(p, config), train.state_template(config).params
        )
    )
    cache = at(jax.eval_shape(lambda: model.init_cache(config, rows, length)))
    tokens = at(jax.ShapeDtypeStruct((rows, 1), "int32"))
    made = _compile(
        jax.jit(lambda p, x, c: model.forward(p, config, x, c), donate_argnums=2).lower(
            params, tokens, cache
        )
    )
    if made["compiled"] is None:
        return dict(rows=rows, fits=False, needed=made["needed"])
    known = chips.chip(device.device_kind)
    parts = hlo.analyse(made["text"], known.matrix_unit)["components"]
    step = roofline.bound(parts, known)["step"]
    return dict(
        rows=rows,
        fits=True,
        peak=made["compiled"].memory_analysis().peak_memory_in_bytes,
        compile_seconds=made["seconds"],
        seconds=step["seconds"],
        tokens_per_s=rows / step["seconds"],
        bytes=step["bytes"],
        flops=step["flops"],
    )


# ---- the report --------------------------------------------------------------------------------------------------------


def _local_state(config, layout) -> dict[str, int]:
    """Bytes of parameters, optimizer state and float32 gradients on one device, from shapes and shardings."""
    import jax

    from lib.train import step as train

    state = train.state_template(config, layout)
    held = lambda a: (
        a.dtype.itemsize * math.prod(a.sharding.shard_shape(a.shape) if layout else a.shape)
    )
    total = lambda tree: sum(held(a) for a in jax.tree.leaves(tree))
    return dict(
        parameters=total(state.params),
        optimizer=total(state.opt_state),
        gradients=total(state.params),
    )


def _layout(config, devices, strategy: str, mesh: dict | None):
    from lib.parallel.layout import make_layout

    return make_layout(strategy, config, devices, mesh) if len(devices) > 1 else None


def _sizes(layout) -> dict[str, int]:
    return (
        {axis: layout.size(axis) for axis in ("data", "fsdp", "tensor")}
        if layout
        else dict(data=1, fsdp=1, tensor=1)
    )


def estimate(
    config, where: Slice, strategy: str = "dp", mesh: dict | None = None, layout=None
) -> dict:
    """The report of `inspect` from shapes alone, compiling nothing.

    Off by -16 to +23 % in memory and -19 to +23 % in time from eleven compiled steps of 1 to 8 GiB (benchmarks/preflight.py): too low where large.
    """
    from lib.parallel.layout import MESH_AXIS
    from lib.preflight.memory import estimate_memory

    size = dict(data=1, fsdp=1, tensor=1) | (
        mesh or {choose("sharding strategy", strategy, MESH_AXIS): where.chips}
    )
    rows = size["data"] * size["fsdp"]
    one = config.replace(
        microbatch=max(1, config.microbatch // rows),
        total_batch_size=max(1, config.microbatch // rows)
        * config.sequence_len
        * config.accumulate,
    )
    guess = estimate_memory(one)
    split = size["fsdp"] * size["tensor"]
    # where the new ones come together beside the old ones
    together = guess["parameters"] if strategy == "zero" else 0
    memory = dict(
        parameters=guess["parameters"] // split,
        gradients=guess["gradients"] // split + together,
        optimizer=guess["optimizer"] // (split * (size["data"] if strategy != "dp" else 1)),
        activations=guess["activations"] // size["tensor"] + guess["logits"] // size["tensor"],
    )
    made = roofline.account(config, where.chip.matrix_unit, **size, strategy=strategy)
    available = int(where.chip.usable or 0.94 * where.chip.memory)
    return _report(
        config,
        where,
        strategy,
        size,
        memory,
        sum(memory.values()),
        available,
        made["components"],
        made["sent"],
        source="estimated from shapes, nothing was compiled",
    )


def _report(
    config, where, strategy, size, memory, peak, available, parts, sent, source, **more
) -> dict:
    bounds = roofline.bound(parts, where.chip, sent)
    seconds = bounds["step"]["seconds"]
    return (
        dict(
            chip=where.name,
            topology=where.topology,
            chips=where.chips,
            strategy=strategy if where.chips > 1 else "one chip",
            mesh=size,
            source=source,
            memory=memory,
            peak=peak,
            available=available,
            fits=peak <= available,
            bound=bounds,
            sent=sent,
            mfu=roofline.mfu(config, seconds, where.chip, where.chips),
            tokens_per_s=config.total_batch_size / seconds,
        )
        | more
    )


def inspect(
    config,
    name: str,
    strategy: str = "dp",
    mesh: dict | None = None,
    decode: int = 0,
    cache: Path | None = CACHE,
) -> dict:
    """Compile the train step of `config` for the slice `name` (v6e-1, v5p-8, v6e:2x4, ...) and report, as JSON, per device.

    {"memory": bytes by part, "peak", "available", "fits", "buffers", "bound" (lib.roofline), "mfu" and "tokens_per_s" at the bound,
    "collectives", "kernels", "compile_seconds", "decode"}. decode: rows of a decode step to compile too (one chip only). Kept in `cache`.
    """
    where, config = tpu_slice(name), for_tpu(config)
    question = _question(config, where, strategy, mesh, decode)
    mesh = question[-2]
    if not has_libtpu():
        return estimate(config, where, strategy, mesh)
    return _kept(cache, question, lambda: _inspect(config, where, strategy, mesh, decode))


def _question(
    config, where: Slice, strategy: str, mesh: dict | None = None, decode: int = 0
) -> list:
    if mesh is None and where.chips > 1:
        from lib.parallel.layout import MESH_AXIS

        mesh = {choose("sharding strategy", strategy, MESH_AXIS): where.chips}
    return ["inspect", config.to_dict(), where.topology, strategy, mesh, decode]


def _inspect(config, where, strategy, mesh, decode) -> dict:
    devices = tpu_devices(where.topology)
    layout = _layout(config, devices, strategy, mesh)
    size = _sizes(layout)
    made = _compile(lower_step(config, layout or devices[0]))
    unit, available = where.chip.matrix_unit, capacity(devices[0])
    found = hlo.analyse(made["text"], unit, where.chips)
    rows = config.microbatch // (size["data"] * size["fsdp"])
    roofline.add_kernels(found["components"], found["kernels"], config, rows, unit, size["tensor"])
    memory = _local_state(config, layout)
    if made["compiled"]:
        peak = made["compiled"].memory_analysis().peak_memory_in_bytes
    else:
        peak = int(made["needed"]) + memory["parameters"] + memory["optimizer"]
    rest = peak - memory["parameters"] - memory["optimizer"]
    memory["gradients"] = min(memory["gradients"], max(rest, 0))
    memory["activations"] = max(0, rest - memory["gradients"])
    more = (
        dict(decode=compile_decode(config, devices[0], decode, config.sequence_len))
        if decode and where.chips == 1
        else {}
    )
    return _report(
        config,
        where,
        strategy,
        size,
        memory,
        peak,
        available,
        found["components"],
        sum(c.bytes for c in found["collectives"]),
        source=f"compiled by libtpu {importlib.metadata.version('libtpu')}",
        compile_seconds=made["seconds"],
        buffers=made["buffers"],
        kernels=found["kernels"],
        collectives=[c._asdict() for c in sorted(found["collectives"], key=lambda c: -c.bytes)],
        **more,
    )


def _place(folder: Path, question: list) -> Path:
    """Where the answer to a question about this code and these versions is kept."""
    import jax

    code = b"".join(
        p.read_bytes()
        for p in sorted((ROOT / "lib").rglob("*.py"))
        if p.relative_to(ROOT / "lib").parts[0] in CODE
    )
    asked = json.dumps(
        [question, jax.__version__, importlib.metadata.version("libtpu") if has_libtpu() else ""],
        sort_keys=True,
        default=str,
    )
    return Path(folder) / f"{hashlib.sha256(asked.encode() + code).hexdigest()[:16]}.json"


def _kept(folder: Path | None, question: list, answer=lambda: None):
    """`answer()`, or what it was when the same question was asked before; without one None where it was not."""
    if folder is None:
        return answer()
    path = _place(folder, question)
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_text())
    result = json.loads(json.dumps(answer()))
    if result is not None:
        write_json(path, result)
    return result


# what an answer depends on
CODE = ("chips.py", "config.py", "params.py", "model", "parallel", "preflight", "train")

GIB = 2**30


def report_text(r: dict) -> str:
    """`inspect`'s or `estimate`'s report for people."""
    lines = [
        f"chip        {r['chip']}: {r['chips']} chip{'s' * (r['chips'] > 1)} ({r['topology']}), {r['strategy']}"
        + ("".join(f" {a}={n}" for a, n in r["mesh"].items() if n > 1))
    ]
    lines.append(
        f"source      {r['source']}"
        + (f" in {r['compile_seconds']:.0f} s" if "compile_seconds" in r else "")
    )
    lines.append(
        "memory      "
        + "  ".join(f"{k} {v / GIB:.2f}" for k, v in r["memory"].items())
        + f"  = {r['peak'] / GIB:.2f} of {r['available'] / GIB:.2f} GiB per chip"
    )
    left = (r["available"] - r["peak"]) / GIB
    lines.append(
        f"fits        {'yes, with' if r['fits'] else 'NO, over by'} {abs(left):.2f} GiB{' to spare' if r['fits'] else ''}"
    )
    for n, what in () if r["fits"] else r.get("buffers", ()):
        lines.append(f"            {n / GIB:6.2f} GiB  {what}")
    lines.append(f"\n{'component':12}{'at least ms':>12}{'binds':>10}{'TFLOP':>10}{'GB':>10}")
    for name, b in r["bound"].items():
        lines.append(
            f"{name:12}{1e3 * b['seconds']:12.2f}{b['binds'] if name != 'step' else '':>10}{b['flops'] / 1e12:10.2f}{b['bytes'] / 1e9:10.2f}"
        )
    lines.append(
        f"at best     {r['tokens_per_s']:,.0f} tokens/s, {r['mfu']:.1%} MFU; {r['bound']['step']['binds']} takes longest"
    )
    for c in r.get("collectives", ())[:12]:
        lines.append(
            f"collective  {c['kind']:18} {c['times']:5} x {c['shape'][:60]:60} {c['component']:10} {c['bytes'] / 1e6:10.1f} MB sent"
        )
    if d := r.get("decode"):
        lines.append(
            f"decoding    {d['rows']} rows: "
            + (
                f"{d['peak'] / GIB:.2f} GiB, at best {d['tokens_per_s']:,.0f} tokens/s ({d['bytes'] / 1e9:.2f} GB a step)"
                if d["fits"]
                else f"does not fit ({d['needed'] / GIB:.2f} GiB)"
            )
        )
    return "\n".join(lines)


# ---- plan and money ----------------------------------------------------------------------------------------------------


def plan(
    config,
    chip: Chip | None,
    count: int = 1,
    mfu: float = MFU,
    pay: str = "on-demand",
    price: float = 0.0,
    units: float = 0.0,
    memory: int | None = None,
) -> dict:
    """Tokens, steps, and where the chip is known hours at `mfu`; cost where a price is: dollars per chip and hour (`price`, else the table's).

    The keys are what lib.report looks for: tokens, steps, hours, memory_bytes, price_per_hour (of all chips), cost, mfu, pay.
    """
    tokens = config.num_steps * config.total_batch_size
    out = dict(
        tokens=tokens,
        steps=config.num_steps,
        memory_bytes=memory,
        mfu=mfu,
        pay=pay,
        prices_of=chips.PRICES_DATE,
    )
    if chip is None:
        return {k: v for k, v in out.items() if v is not None}
    out["hours"] = config.flops_per_token * tokens / (chip.flops * count * mfu) / 3600
    each = price or chips.price_per_hour(chip.name, pay, units)
    if each:
        out |= dict(price_per_hour=each * count, cost=each * count * out["hours"])
    return {k: v for k, v in out.items() if v is not None}


def plan_text(p: dict) -> str:
    """`plan` for people."""
    lines = [f"tokens      {p['tokens']:,} in {p['steps']:,} steps"]
    if "hours" in p:
        lines.append(
            f"time        {p['hours']:.2f} h if {p['mfu']:.0%} MFU is reached (assumed, not promised)"
        )
        if "cost" in p:
            lines.append(
                f"cost        ${p['cost']:.2f} at ${p['price_per_hour']:.2f} an hour, {p['pay']} (lib/chips.py, table of {p['prices_of']}: "
                "check the price before you pay)"
            )
        elif p["pay"] == "colab":
            lines.append(
                "cost        not known: Colab publishes no rates; its Resources panel shows this chip's units per hour: give them"
            )
        else:
            lines.append(
                f"cost        not known: lib/chips.py has no {p['pay']} price of this chip: give one in dollars per chip and hour"
            )
    return "\n".join(lines)


def compare(p: dict, seconds: float, tokens: int, flops_per_token: int, flops: float | None) -> str:
    """What came of a plan, after `tokens` were trained in `seconds` on devices that make `flops` a second."""
    hours = seconds / 3600
    line = (
        f"planned {p['hours']:.2f} h, took {hours:.2f} h for the steps"
        if "hours" in p
        else f"took {hours:.2f} h for the steps, not planned"
    )
    if flops and seconds:
        line += f"; planned {p['mfu']:.0%} MFU, reached {tokens * flops_per_token / seconds / flops:.1%}"
    if "price_per_hour" in p:
        line += f"; planned ${p['cost']:.2f}, spent ${hours * p['price_per_hour']:.2f} on them"
    return line


# ---- search ------------------------------------------------------------------------------------------------------------

SEARCHED = ("microbatch", "attention", "attention_block", "remat", "loss_chunk")


def candidates(
    config,
    rows: int = 1,
    vary=SEARCHED,
    blocks=(512, 1024, 2048),
    loss_chunks=(1024, 2048, 4096, 8192),
) -> list:
    """Configs that compute the same step otherwise, in the fields `vary`: microbatch (a multiple of `rows`), attention, its block, ..."""
    total, T = config.total_batch_size // config.sequence_len, config.sequence_len
    kernels = config.attention_name in roofline.KERNELS
    options = dict(
        microbatch=[n for i in range(9) if total % (n := rows * 2**i) == 0],
        attention=roofline.KERNELS if kernels else [config.attention],
        attention_block=[b for b in blocks if b <= T and T % b == 0] if kernels else [0],
        remat=("none", "dots", "layer"),
        loss_chunk=loss_chunks,
    )
    out = []
    for values in itertools.product(
        *(options[k] if k in vary else [getattr(config, k)] for k in SEARCHED)
    ):
        with contextlib.suppress(UserError):  # an attention that can't do these sizes
            c = config.replace(**dict(zip(SEARCHED, values)))
            if c.loss_chunk <= c.microbatch // rows * T or "loss_chunk" not in vary:
                out.append(c)
    return out


def search(
    config,
    where: Slice,
    strategy: str = "dp",
    mesh: dict | None = None,
    verify=None,
    margin: float = 0.9,
    cache: Path | None = CACHE,
    vary: tuple = SEARCHED,
) -> dict:
    """The candidate that fits with the lowest bound: {"best": its fields or None, "rows": all of them, best first, "checked": ...}.

    All are ranked from shapes, those over `margin` of the memory left out. verify: callable(config) -> report like inspect's, asked
    about one after the other until one fits; without it the estimate decides. vary: the fields that may differ from `config`.
    """
    config = config if config.attention == "jax" else for_tpu(config)

    def answer():
        table = []
        shards = where.chips if mesh is None else mesh.get("data", 1) * mesh.get("fsdp", 1)
        if mesh is None and strategy == "tp":
            shards = 1
        for c in candidates(config, shards, vary):
            r = estimate(c, where, strategy, mesh)
            table.append(
                {k: getattr(c, k) for k in SEARCHED}
                | dict(
                    peak=r["peak"],
                    fits=r["peak"] <= margin * r["available"],
                    mfu=r["mfu"],
                    seconds=r["bound"]["step"]["seconds"],
                )
            )
        table.sort(key=lambda row: (not row["fits"], row["seconds"], row["peak"]))
        checked, best = [], next((row for row in table if row["fits"]), None)
        if verify:
            best = None
            for row in [row for row in table if row["fits"]][:4]:
                r = verify(config.replace(**{k: row[k] for k in SEARCHED}))
                checked.append(
                    {k: row[k] for k in SEARCHED}
                    | dict(peak=r["peak"], fits=r["fits"], seconds=r["bound"]["step"]["seconds"])
                )
                if r["fits"]:
                    best = row
                    break
        return dict(
            best={k: best[k] for k in SEARCHED} if best else None, rows=table, checked=checked
        )

    return _kept(
        cache,
        ["search", config.to_dict(), where, strategy, mesh, bool(verify), margin, vary],
        answer,
    )


def verify_here(config) -> dict:
    """What the compiler of the device at hand says of `config`, in the form that `search` asks for."""
    import jax

    from lib.preflight.memory import peak_bytes

    device = jax.local_devices()[0]
    where = Slice(device.device_kind, chips.chip(device.device_kind), "at hand", 1)
    r = estimate(config, where)
    made = _compile(lower_step(config, device))
    if made["compiled"] is None:
        return r | dict(peak=made["needed"], fits=False)
    peak = peak_bytes(made["compiled"])
    return r | dict(
        peak=peak, fits=peak <= (device.memory_stats() or {}).get("bytes_limit", where.chip.memory)
    )


def with_microbatch(config, asked: str, device: dict, keep=(), before: dict | None = None):
    """`config` with what `asked` says of its microbatch: "preset" (as it is), a number, or "auto": the search's answer for this device.

    device: lib.notebook's device_report. keep: names of fields that a search must leave alone. before: the config, as a dict, of a run that goes
    on: its answer then stays. Prints what was found.
    """
    if asked == "preset":
        return config
    if asked != "auto":
        if not asked.isdigit():
            raise UserError(f"microbatch={asked!r} must be preset, auto or a number of rows")
        return config.replace(microbatch=int(asked))
    if before:
        return config.replace(**{k: before[k] for k in SEARCHED if k in before})
    known = chips.chip(device["kind"])
    if known is None:
        print(f"microbatch  {config.microbatch}: no search, this device's peak is not in the table")
        return config
    tpu = device["platform"] == "tpu"
    vary = [
        k for k in SEARCHED if k not in keep and (tpu or k not in ("attention", "attention_block"))
    ]
    found = search(
        config
        if tpu
        else config.replace(attention=config.attention_name, compute_dtype=config.dtype.name),
        Slice(device["kind"], known, "at hand", 1),
        verify=verify_here,
        vary=tuple(vary),
    )
    print(search_text(found, 6))
    if found["best"] is None:
        raise UserError(
            "microbatch=auto: nothing that was searched fits this device: take a smaller depth"
        )
    return config.replace(**{k: v for k, v in found["best"].items() if k in vary})


def search_text(found: dict, show: int = 15) -> str:
    """The best rows of a search, and how many there were."""
    lines = [
        f"{'microbatch':>10} {'attention':>9} {'block':>6} {'remat':>6} {'loss chunk':>10} {'GiB':>7} {'fits':>5} {'at least ms':>12} {'MFU <=':>7}"
    ]
    lines += [
        f"{r['microbatch']:10} {r['attention']:>9} {r['attention_block']:6} {r['remat']:>6} {r['loss_chunk']:10} {r['peak'] / GIB:7.2f} "
        f"{'yes' if r['fits'] else 'no':>5} {1e3 * r['seconds']:12.2f} {r['mfu']:7.1%}"
        for r in found["rows"][:show]
    ]
    lines.append(
        f"{len(found['rows'])} searched, {sum(r['fits'] for r in found['rows'])} fit; memory and time from shapes"
    )
    lines += [
        f"compiled: {' '.join(f'{k}={c[k]}' for k in SEARCHED)}: {c['peak'] / GIB:.2f} GiB, {'fits' if c['fits'] else 'does not fit'}"
        for c in found["checked"]
    ]
    lines.append(
        "best: "
        + (
            " ".join(f"{k}={v}" for k, v in found["best"].items())
            if found["best"]
            else "none fits: take fewer parameters, or more chips"
        )
    )
    return "\n".join(lines)


def heat_map(found: dict, path):
    """Draw a search: the lowest bound in ms for each microbatch and rematerialisation; hatched where nothing fits."""
    import numpy as np

    from lib.pictures import show, subplots

    remats, micros = ("none", "dots", "layer"), sorted({r["microbatch"] for r in found["rows"]})
    grid, fits = np.full((3, len(micros)), np.nan), np.zeros((3, len(micros)), bool)
    for r in found["rows"]:  # best first: the first of each cell counts
        at = remats.index(r["remat"]), micros.index(r["microbatch"])
        if np.isnan(grid[at]):
            grid[at], fits[at] = 1e3 * r["seconds"], r["fits"]
    figure, ax = subplots(1, 1, size=(1.2 + 0.9 * len(micros), 2.6))
    image = ax.imshow(grid, aspect="auto", cmap="viridis_r")
    for i in range(3):
        for j in range(len(micros)):
            if not np.isnan(grid[i, j]):
                ax.text(
                    j,
                    i,
                    f"{grid[i, j]:.0f}" if fits[i, j] else "does\nnot fit",
                    ha="center",
                    va="center",
                    color="white" if fits[i, j] else "red",
                    fontsize=8,
                )
    ax.set(
        xticks=range(len(micros)),
        xticklabels=micros,
        yticks=range(3),
        yticklabels=remats,
        xlabel="microbatch, rows",
        ylabel="remat",
        title="least time per step, ms (best attention, block and loss chunk)",
    )
    ax.grid(False)
    figure.colorbar(image, ax=ax)
    show(figure, path)


def fits_table(
    names=("v5e-1", "v6e-1", "v5e-8", "v6e-8", "v5p-8"),
    depths=(12, 16, 20, 24, 28, 32),
    cache: Path | None = CACHE,
    **fields,
) -> str:
    """What fits on which slices, as Markdown: GiB per chip by strategy, compiled where `cache` has the answer, else from shapes alone.

    Four rows a chip and remat="dots" unless `fields` say else, all else as from_depth says.
    """
    from lib.config import Config

    slices = [tpu_slice(n) for n in names]
    heads = [f"{s.name}: {s.chips} x {s.chip.usable / GIB:.1f}" for s in slices]
    lines = [f"| depth | parameters | {' | '.join(heads)} |", "|---" * (len(names) + 2) + "|"]
    for depth in depths:
        cells = []
        for where in slices:
            config = for_tpu(
                Config.from_depth(depth, **dict(microbatch=4 * where.chips, remat="dots") | fields)
            )
            cell = []
            for strategy in ("dp", "zero", "fsdp") if where.chips > 1 else ("dp",):
                known = _kept(cache, _question(config, where, strategy))
                r = known or estimate(config, where, strategy)
                text = f"{r['peak'] / GIB:.1f}" if r["fits"] else f"~~{r['peak'] / GIB:.1f}~~"
                cell.append(f"{strategy} " * (where.chips > 1) + (f"**{text}**" if known else text))
            cells.append(", ".join(cell))
        lines.append(f"| {depth} | {_count(config) / 1e6:,.0f}M | " + " | ".join(cells) + " |")
    lines += [
        "",
        "GiB per chip at a step's peak, of those after the x. **Bold**: compiled by libtpu; else estimated from shapes (-16 to +23 % off).",
        "~~Struck out~~: does not fit. A cell gets compiled by asking for it once, with 4 rows a chip: python -m lib.preflight --depth 20",
        '--chip v6e-8 --strategy zero --overrides "microbatch=32 remat=dots"',
    ]
    return "\n".join(lines)


def _count(config) -> int:
    from lib.params import count_params

    return count_params(config)["total"]


# ---- the command -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Args:
    """Will it fit, how fast can it be, what will it cost: for a TPU that isn't there."""

    depth: int = 0
    """Layers; everything else follows from it"""
    preset: str = ""
    """A preset of lib.config"""
    run: str = ""
    """The configuration of a run folder"""
    chip: str = "v6e-1"
    """What you would rent: v6e-1, v6e-8, v5e-4, v5p-8, v4-8, ... (v4 and v5p count cores, two a chip), or a topology like v6e:2x4"""
    strategy: str = "dp"
    """On several chips: dp, zero, fsdp or tp"""
    mesh: str = ""
    """Devices per mesh axis, like "data=2 fsdp=4"; empty: all on the strategy's axis"""
    overrides: str = ""
    """Config fields by name, like "microbatch=32 remat=layer" """
    decode: int = 0
    """Also compile a decode step of this many rows"""
    search: bool = False
    """Search microbatch, attention, its block, loss chunk and rematerialisation for the lowest bound that fits"""
    map: str = ""
    """Where to draw the search's heat map"""
    mfu: float = MFU
    """Assumed for the plan"""
    pay: str = "on-demand"
    """on-demand, flex-start, spot or colab"""
    price: float = 0.0
    """Dollars per chip and hour, instead of the table's"""
    units: float = 0.0
    """Colab compute units per hour, as its Resources panel shows"""
    estimate: bool = False
    """From shapes alone, compiling nothing"""
    table: bool = False
    """Print which depths fit on which chips instead: compiled where that was asked before, else from shapes"""
    calibrate: bool = False
    """Compare the bound with the published v6e-1 measurement instead"""
    json: bool = False
    """Print JSON"""


def config_of(args: Args):
    from lib.config import Config
    from lib.notebook import parse_overrides

    if sum(map(bool, (args.depth, args.preset, args.run))) != 1:
        raise UserError("say which model: one of --depth N, --preset NAME and --run NAME")
    changes = parse_overrides(args.overrides, Config)
    if args.run:
        return Config.load(Path("runs") / args.run / "config.json").replace(**changes)
    return (
        Config.preset(args.preset, **changes)
        if args.preset
        else Config.from_depth(args.depth, **changes)
    )


def parse_mesh(text: str) -> dict[str, int] | None:
    """Mesh axes from "data=2 fsdp=4"."""
    pairs = [word.partition("=") for word in text.replace(",", " ").split()]
    if not all(n.isdigit() for _, _, n in pairs):
        raise UserError(f"mesh {text!r} is not of the form data=2 fsdp=4")
    return {axis: int(n) for axis, _, n in pairs} or None


def main(args: Args):
    if args.table:
        return print(fits_table())
    if args.calibrate:
        from lib.config import Config

        config, args.chip = Config(**PUBLISHED["config"]), PUBLISHED["chip"]
    else:
        config = config_of(args)
    where, mesh = tpu_slice(args.chip), parse_mesh(args.mesh)
    config = for_tpu(config)
    if args.search:
        ask = (
            None
            if args.estimate or not has_libtpu()
            else lambda c: inspect(c, args.chip, args.strategy, mesh)
        )
        found = search(config, where, args.strategy, mesh, ask)
        print(json.dumps(found) if args.json else search_text(found))
        if args.map:
            heat_map(found, args.map)
        if not found["best"]:
            raise UserError(
                f"nothing that was searched fits on {args.chip}: take fewer parameters, or more chips"
            )
        config = config.replace(**found["best"])
    r = (
        estimate(config, where, args.strategy, mesh)
        if args.estimate
        else inspect(config, args.chip, args.strategy, mesh, args.decode)
    )
    p = plan(config, where.chip, where.chips, args.mfu, args.pay, args.price, args.units, r["peak"])
    if args.json:
        return print(json.dumps(r | dict(plan=p)))
    print(report_text(r))
    if args.calibrate:
        told = PUBLISHED["tokens_per_s"]
        return print(
            f"published   {told:,.0f} tokens/s measured: {told / r['tokens_per_s']:.1%} of this bound "
            f"({roofline.mfu(config, config.total_batch_size / told, where.chip):.1%} MFU as counted here)"
        )
    print(plan_text(p))


def command():
    import tyro

    try:
        main(tyro.cli(Args, prog="python -m lib.preflight", description=__doc__))
    except UserError as e:
        print(f"Error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
