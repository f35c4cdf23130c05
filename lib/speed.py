"""What the chip at hand reaches, beside what it could: the measurements of 06_speed.

First two ceilings, of matrix products and of memory. Then the parts of a training step, and
decoding, each beside the least time that preflight's roofline gives it under those ceilings.
Compiling is never in a time, and neither is the first call.
"""

import math
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lib import model, train
from lib.chips import Chip, chip
from lib.config import Config
from lib.files import UserError, first_line, read_json
from lib.generate import Engine, Sampling
from lib.model import transformer
from lib.model.head import head_matrix, summed_loss
from lib.model.kernels import BLOCKS
from lib.preflight import roofline
from lib.train.optim import make_optimizer

LARGE = 2**29  # bytes: more than caches hold
SQUARES = {"cpu": (512, 1024, 2048), "gpu": (1024, 4096, 8192), "tpu": (1024, 4096, 8192)}
FIGURES = Path(__file__).parents[1] / "benchmarks" / "chips"
PROMPT = 64  # tokens before those that decoding is timed on, at most half a row

# what to try where a component is far from its bound
ADVICE = {
    "embedding": "Rows are gathered one by one; a larger microbatch hides what each gather costs.",
    "attention": "Another implementation or block may fit this chip better: the table above has "
    "them, and `attention` and `attention_block` choose.",
    "mlp": "These are plain products: a larger microbatch, or a width that is a multiple of the "
    "matrix unit, fills the chip better.",
    "head+loss": "A larger `loss_chunk` means fewer, larger products, for more memory.",
    "optimizer": "It runs once a step: a larger `total_batch_size` spreads it over more tokens.",
    "other": "This is what stands between the parts: `remat` recomputes, a larger microbatch "
    "makes fewer of everything.",
}


def parse_asked(rows: str, seconds: float) -> list[int]:
    """The numbers in "1 8 64", rows that are decoded together; UserError where they, or the seconds
    for which each part is run, can't be.
    """
    words = rows.replace(",", " ").split()
    if not words or not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"rows={rows!r} must be numbers from 1 on, like 1 8 64")
    if not 0 < seconds < math.inf:
        raise UserError(f"seconds={seconds} must be above 0: for so long each part is run")
    return [int(word) for word in words]


# ---- clocks --------------------------------------------------------------------------------------


def seconds_of(fn: Callable, *args, at_least: float = 0.2) -> float:
    """Seconds of a compiled function's call: of three batches of calls, the fastest's mean.

    A batch is queued at once and waited for once, which hides what it costs to send a call; not
    where a CPU computes a call while it is asked for it.
    """
    jax.block_until_ready(fn(*args))
    begun = time.perf_counter()
    jax.block_until_ready(fn(*args))
    single = time.perf_counter() - begun

    # three batches of a third of the time each
    calls = max(1, round(at_least / 3 / max(single, 1e-6)))
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        for _ in range(calls):
            result = fn(*args)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - begun) / calls)
    return min(times)


# ---- the ceilings --------------------------------------------------------------------------------


class MeasuredProduct(NamedTuple):
    """A measured matrix product, (m, k) times (k, n).

    dtype: of what is multiplied and of the result, or "mixed".
    """

    what: str
    dtype: str
    shape: tuple[int, int, int]
    seconds: float

    @property
    def flops(self) -> float:
        """FLOP/s reached."""
        m, k, n = self.shape
        return 2 * m * k * n / self.seconds


def product_shapes(config: Config) -> dict[str, tuple[int, int, int]]:
    """Squares, and the products that a step of this model is made of."""
    tokens = config.microbatch * config.sequence_len
    shapes = {}
    for n in SQUARES.get(jax.default_backend(), SQUARES["gpu"]):
        shapes[f"square {n}"] = n, n, n
    queries = config.n_head * config.head_dim
    shapes["queries"] = tokens, config.n_embd, queries
    shapes["mlp in"] = tokens, config.n_embd, config.mlp_dim
    shapes["mlp out"] = tokens, config.mlp_dim, config.n_embd
    shapes["a chunk of logits"] = min(config.loss_chunk, tokens), config.n_embd, config.padded_vocab
    return shapes


def as_trained(config: Config) -> Config:
    """A config with what `auto` means in a training step here: attention and compute dtype."""
    computed = train.for_training(config).compute_dtype
    if computed == "auto":
        computed = config.dtype.name
    return config.replace(attention=config.attention_name, compute_dtype=computed)


def products(config: Config) -> list[MeasuredProduct]:
    """Each of `product_shapes` in bfloat16 and float32, on random numbers; in a config's mixed mode
    also that one: of bfloat16, with results in float32.
    """
    results = {"bfloat16": "bfloat16", "float32": "float32"}
    if config.compute_dtype == "mixed":
        results["mixed"] = "float32"

    measured = []
    for dtype, result in results.items():
        operands = "bfloat16" if dtype == "mixed" else dtype
        multiply = jax.jit(partial(jnp.matmul, preferred_element_type=result))
        for what, (m, k, n) in product_shapes(config).items():
            keys = jax.random.split(jax.random.key(0))
            a = jax.random.normal(keys[0], (m, k), operands)
            b = jax.random.normal(keys[1], (k, n), operands)
            measured.append(MeasuredProduct(what, dtype, (m, k, n), seconds_of(multiply, a, b)))
    return measured


def read_bandwidth(size: int, seconds: float = 0.3) -> float:
    """Bytes a second that the device reads from an array of `size` bytes, the best of several
    tries.

    On CPUs numpy's maximum in as many threads as there are cores, and in one; on accelerators a
    jitted product with a vector.
    """
    if jax.default_backend() == "cpu":
        return _read_by_threads(np.ones(size // 4, np.float32), seconds)

    a = jnp.ones((size // 2 // 4096, 4096), jnp.bfloat16)
    x = jnp.ones(4096, jnp.bfloat16)

    @jax.jit
    def read_often(a, x):
        def again(_, x):
            return x + (1e-30 * (a @ x).max()).astype(x.dtype)

        return jax.lax.fori_loop(0, 20, again, x)

    read_often(a, x).block_until_ready()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        read_often(a, x).block_until_ready()
        best = max(best, 20 * a.nbytes / (time.perf_counter() - begun))
    return best


def _read_by_threads(a, seconds: float) -> float:
    # a thread's start must not count, so a small array is read several times
    rounds = max(1, LARGE // a.nbytes)

    def read(part):
        for _ in range(rounds):
            part.max()

    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        for count in {1, os.cpu_count() or 1}:
            parts = np.array_split(a, count)
            threads = [threading.Thread(target=read, args=(part,)) for part in parts]
            begun = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            best = max(best, rounds * a.nbytes / (time.perf_counter() - begun))
    return best


def measured_chip(measured: Sequence[MeasuredProduct], bandwidth: float, dtype: str) -> Chip:
    """A Chip whose ceilings are what was reached: the fastest product in `dtype`, and memory."""
    kind = jax.devices()[0].device_kind
    known = chip(kind) or Chip(kind, 0, 0, 0)
    best = max(product.flops for product in measured if product.dtype == dtype)
    return known._replace(name=f"{known.name}, measured", flops=best, bandwidth=bandwidth)


# ---- attention -----------------------------------------------------------------------------------


class Attended(NamedTuple):
    """One layer's attention, forward and backward; `why` it has no time, where it has none."""

    name: str
    block: int  # 0: it has none, or chooses
    window: int
    seconds: float | None
    why: str = ""


def attention_choices() -> list[tuple[str, int]]:
    """(implementation, block) of all that can run here."""
    if jax.default_backend() != "tpu":
        return [("einsum", 0), ("jax", 0)]
    choices = [("einsum", 0), ("jax", 0)]
    for name in BLOCKS:
        choices += [(name, block) for block in (256, 512, 1024, 2048)]
    return choices


def attentions(config: Config) -> list[Attended]:
    """Every implementation and block on this model's shapes, for each of its windows.

    What the compiler refuses is listed with its reason.
    """
    B, T, H = config.microbatch, config.sequence_len, config.head_dim
    keys = jax.random.split(jax.random.key(0), 3)
    q_BTNH = jax.random.normal(keys[0], (B, T, config.n_head, H), config.dtype)
    k_BSKH = jax.random.normal(keys[1], (B, T, config.n_kv_head, H), config.dtype)
    v_BSKH = jax.random.normal(keys[2], (B, T, config.n_kv_head, H), config.dtype)

    measured = []
    for window in sorted(set(config.windows)):
        for name, block in attention_choices():
            if block > T:
                continue

            # NotImplementedError is jax's own word for a shape that this chip's kernels lack
            try:
                choice = config.replace(attention=name, attention_block=block)
                attend = _both_ways(_attention_alone(choice, window))
                took = seconds_of(attend, q_BTNH, q_BTNH, k_BSKH, v_BSKH)
            except (UserError, jax.errors.JaxRuntimeError, NotImplementedError) as e:
                measured.append(Attended(name, block, window, None, first_line(e)))
            else:
                measured.append(Attended(name, block, window, took))
    return measured


def _attention_alone(config: Config, window: int) -> Callable:
    """(q, k, v) -> o, as a layer of this config attends."""
    attend = transformer.full_attention(config, window)
    return lambda q_BTNH, k_BSKH, v_BSKH: attend(q_BTNH, k_BSKH, v_BSKH)[0]


def _both_ways(fn: Callable) -> Callable:
    """Forward, and backward from the gradient that is handed in before the arguments."""
    return jax.jit(lambda gradient, *args: jax.vjp(fn, *args)[1](gradient))


# ---- the parts of a step -------------------------------------------------------------------------


class Component(NamedTuple):
    """A component of the step: a compiled function, what it is called with, calls in a step."""

    component: str
    fn: Callable
    args: tuple
    calls: int


class Reached(NamedTuple):
    """Seconds of a component in a step, and its least ones by the roofline."""

    component: str
    seconds: float
    bound: float
    binds: str
    flops: float
    bytes: float

    @property
    def share(self) -> float:
        """Of the bound that was reached; nan for what took no time of its own."""
        return self.bound / self.seconds if self.seconds > 0 else float("nan")


def parts_of_step(config: Config) -> list[Component]:
    """Each component on its own, forward and backward, and the whole step."""
    rng = np.random.default_rng(0)
    B, T, D, A = config.microbatch, config.sequence_len, config.n_embd, config.accumulate
    state = train.init_state(config)
    params = state.params
    tokens_BT = jnp.asarray(rng.integers(0, config.vocab_size, (B, T)), jnp.int32)
    x_BTD = jnp.asarray(rng.normal(size=(B, T, D)), config.dtype)
    rope = transformer.rope_tables(jnp.arange(T), config)

    # the first layer's weights, as a layer sees them
    stacks = transformer.cast_matrices(params["blocks"], config.operand_dtype)
    w = {name: stack[0] for name, stack in stacks.items()}

    def look_up(table):
        return transformer.embed(params | {"embed": table}, config, tokens_BT)

    def attention(w, x_BTD, attend):
        _, h_BTDs = transformer.summed_norm(x_BTD, None, config, readers=3)
        return transformer.self_attention(h_BTDs, w, None, config, rope, attend)[0]

    def mlp(w, x_BTD):
        _, (h_BTD,) = transformer.summed_norm(x_BTD, None, config, readers=1)
        return transformer.mlp(h_BTD, w, config)

    parts = [Component("embedding", _both_ways(look_up), (x_BTD, params["embed"]), A)]
    for window in sorted(set(config.windows)):
        attend = transformer.full_attention(config, window)
        fn = _both_ways(lambda w, x, attend=attend: attention(w, x, attend))
        parts.append(
            Component("attention", fn, (x_BTD, w, x_BTD), A * config.windows.count(window))
        )
    parts.append(Component("mlp", _both_ways(mlp), (x_BTD, w, x_BTD), A * config.n_layer))

    def loss(x_BTD, head_DV):
        return summed_loss(x_BTD, head_DV, tokens_BT, config)

    loss_and_gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))
    parts.append(
        Component("head+loss", loss_and_gradients, (x_BTD, head_matrix(params, config)), A)
    )

    # the whole step gives its old state's memory to the new one, as training does; so it comes last
    rows = jnp.tile(tokens_BT, (A, 1))
    return [*parts, _optimizer(state, config), _whole_step(state, rows, config)]


def _optimizer(state: train.TrainState, config: Config) -> Component:
    """An update of all weights by gradients that are at hand."""

    @jax.jit
    def optimize(grads, opt_state, params):
        optimizer = make_optimizer(config, config.num_steps)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), state.params)
    return Component("optimizer", optimize, (grads, state.opt_state, state.params), 1)


def _whole_step(state: train.TrainState, rows, config: Config) -> Component:
    """A training step, each from the state that the one before has left."""
    step = train.make_train_step(config)

    def go_on(rows):
        nonlocal state
        state, metrics = step(state, rows, rows)
        return state.step, metrics

    return Component("step", go_on, (rows,), 1)


def components(config: Config, ceiling: Chip, at_least: float = 0.5) -> list[Reached]:
    """Every component of a step, its time beside its bound under the ceilings of a chip.

    "other" is the step less its parts: value embeddings, residual sums, the last norm, what `remat`
    recomputes, gradients added up; below 0 where what the compiler fuses across parts saves more.
    """
    took: dict[str, float] = {}
    waiting = parts_of_step(config)
    while waiting:
        # dropped when it is done, for what it was called with takes memory
        part = waiting.pop(0)
        each = seconds_of(part.fn, *part.args, at_least=at_least)
        took[part.component] = took.get(part.component, 0) + part.calls * each
    parts = sum(took[name] for name in took if name != "step")
    took["other"] = took["step"] - parts

    work = roofline.account(config, ceiling.matrix_unit).components
    bounds = roofline.bound(work, ceiling)
    reached = []
    for name in ("embedding", "attention", "mlp", "head+loss", "optimizer", "other", "step"):
        b = bounds[name]
        reached.append(Reached(name, took[name], b.seconds, b.binds, b.flops, b.bytes))
    return reached


# ---- decoding ------------------------------------------------------------------------------------


class Decoded(NamedTuple):
    """Decoding this many rows together: seconds and bytes read of a step that adds one token to
    each row.
    """

    rows: int
    seconds: float
    bytes: int

    @property
    def tokens_per_second(self) -> float:
        return self.rows / self.seconds


def decoding(config: Config, rows: Sequence[int] = (1, 8, 64), tokens: int = 128) -> list[Decoded]:
    """Greedy decoding with random weights, prefill and compiling left out.

    The bytes are the weights of the blocks and the head, and the whole cache: what a step reads.
    """
    length = min(PROMPT, config.sequence_len // 2)
    tokens = min(tokens, config.sequence_len - length)
    params = model.decoding_params(model.init_params(jax.random.key(0), config), config)
    read = [params["blocks"], params.get("head", params["embed"])]
    weights = sum(array.nbytes for array in jax.tree.leaves(read))
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, length).tolist()

    measured = []
    for count in rows:
        engine = Engine(params, config, count, length + tokens)
        # the first time compiles
        times = [_decode(engine, prompt, count, tokens) for _ in range(3)][1:]
        cache = engine.caches[0]
        held = sum(array.nbytes for array in jax.tree.leaves([cache.k, cache.v]))
        measured.append(Decoded(count, min(times), weights + held))
    return measured


def _decode(engine: Engine, prompt: list[int], count: int, tokens: int) -> float:
    """Seconds of each step after the first."""
    engine.add_many([prompt] * count, [Sampling(tokens, temperature=0)] * count)
    engine.step()
    begun, steps = time.perf_counter(), 0
    while engine.free < count:
        written = engine.step(tokens)
        steps += max(len(new) for new, _ in written.values())
    return (time.perf_counter() - begun) / steps


# ---- in words ------------------------------------------------------------------------------------


def components_table(reached: Sequence[Reached], last: dict[str, float]) -> str:
    """Times beside their bounds, and beside those of the last file of this chip, if there is one.

    last: milliseconds by component.
    """
    lines = [f"{'component':12}{'ms':>10}{'at least':>10}{'binds':>9}{'reached':>9}{'last':>10}"]
    for r in reached:
        binds = "" if r.component == "step" else r.binds
        share = f"{r.share:.0%}" if r.seconds > 0 else ""
        before = f"{last[r.component]:.2f}" if r.component in last else ""
        times = f"{1e3 * r.seconds:10.2f}{1e3 * r.bound:10.2f}"
        lines.append(f"{r.component:12}{times}{binds:>9}{share:>9}{before:>10}")
    return "\n".join(lines)


def file_name(device_kind: str) -> str:
    """The name of a chip's file: TPU_v6_lite.json."""
    return re.sub(r"\W+", "_", device_kind).strip("_") + ".json"


def last_figures(config: Config) -> dict[str, float]:
    """Milliseconds of each component that benchmarks/chips has of this kind of chip and this very
    config; empty without such a file.
    """
    path = FIGURES / file_name(jax.devices()[0].device_kind)
    if not path.exists():
        return {}
    figures = read_json(path)
    if figures.get("config") != config.to_dict():
        return {}
    return {row["component"]: 1e3 * row["seconds"] for row in figures["components"]}


def advice(reached: Sequence[Reached], lowest: int = 2) -> list[str]:
    """What to try for the components that lose the most time, the largest loss first."""
    parts = [r for r in reached if r.component != "step" and r.seconds > r.bound]
    parts.sort(key=lambda r: r.bound - r.seconds)
    sentences = []
    for part in parts[:lowest]:
        lost = 1e3 * (part.seconds - part.bound)
        sentences.append(
            f"{part.component}: {lost:.1f} ms above its bound, of which it reaches "
            f"{part.share:.0%}. {ADVICE[part.component]}"
        )
    return sentences


def to_dict(ceiling: Chip, config: Config, **measured: Sequence[Any]) -> dict:
    """What runs/speed/CHIP.json holds: ceilings, what they were measured with, every figure."""
    known = {name: [m._asdict() for m in rows] for name, rows in measured.items()}
    device = jax.devices()[0].device_kind
    about = dict(device=device, jax=jax.__version__, dtype=config.compute_dtype)
    about |= dict(config=config.to_dict())
    return about | dict(flops=ceiling.flops, bandwidth=ceiling.bandwidth) | known
