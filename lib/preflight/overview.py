"""All that is known of a training before it is compiled, as lines of one table."""

from lib.chips import Slice, chip
from lib.config import Config
from lib.parallel.layout import AXES, BATCH, Layout
from lib.params import count_params
from lib.preflight.estimate import GIB, estimate, report_text
from lib.preflight.memory import estimate_memory
from lib.preflight.plan import Payment, Plan, plan, plan_text
from lib.train.step import computed_in


def print_overview(
    config: Config, layout: Layout | None, device: dict, pay: Payment
) -> tuple[Plan, dict[str, int]]:
    """Print what a training on the device at hand will be and take; (the plan, memory by part).

    device: lib.notebook's device_report.
    """
    memory = estimate_memory(config, layout)
    print("\n".join(shape_lines(config, layout)))
    print(memory_line(memory, device["memory"], layout))

    known = chip(device["kind"])
    if known:
        where = Slice(device["kind"], known, "at hand", device["count"] if layout else 1)
        strategy = layout.strategy if layout else "dp"
        mesh = {axis: layout.size(axis) for axis in AXES} if layout else None
        print(report_text(estimate(config, where, strategy, mesh)))

    made = plan(config, known, device["count"], pay=pay, memory=sum(memory.values()))
    print(plan_text(made))
    if not known:
        print("time        known after the first steps: this device's peak is not in the table")
    return made, memory


def shape_lines(config: Config, layout: Layout | None) -> list[str]:
    """The model, its batch and its horizon."""
    counts = [f"{name} {n:,}" for name, n in count_params(config).items() if n]
    tokens = config.num_steps * config.total_batch_size
    rows = f"{config.accumulate} x {config.microbatch} rows"
    if layout:
        rows += f", {config.microbatch // layout.size(*BATCH)} a device"
    return [
        f"parameters  {'  '.join(counts)}",
        f"shape       {config.n_layer} layers x {config.n_embd} wide, {config.n_head} heads "
        f"({config.n_kv_head} kv) of {config.head_dim}, windows {config.window_pattern}, "
        f"rows of {config.sequence_len} tokens, {computed_in(config)} on float32 masters",
        f"attention   {config.attention_name}",
        f"horizon     {config.num_steps:,} steps x {config.total_batch_size:,} tokens ({rows}) "
        f"= {tokens:,} tokens, {tokens / config.scaling_params:.1f} per parameter",
        f"compute     {config.flops_per_token * tokens:.3g} FLOPs, "
        f"{config.flops_per_token:,} per token",
    ]


def memory_line(memory: dict[str, int], there: float, layout: Layout | None) -> str:
    """The estimate of a step's memory by part, and what the device has."""
    parts = "  ".join(f"{name} {n / GIB:.2f}" for name, n in memory.items())
    total = f"{sum(memory.values()) / GIB:.2f} GiB estimated"
    each = " on each" if layout else ""
    return f"memory      {parts}  = {total}, {there / GIB:.1f} GiB there{each}"
