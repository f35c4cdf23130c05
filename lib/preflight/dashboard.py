"""The scaling dashboard: one HTML page that estimates as this room does, without Python or network.

dashboard.js holds the formulas once more, dashboard.html the page; here are the tables that both
read, so that a chip, a price or a default is written down once.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from lib import chips
from lib.chips import Chip, Slice
from lib.config import (
    KERNEL_TILE,
    MLPS,
    OPTIMIZER_NAMES,
    REFERENCE_BATCH,
    REMATS,
    SMEAR_CHANNELS,
    VALUE_GATE_CHANNELS,
    Config,
)
from lib.files import local_path, write_atomic
from lib.model.kernels import BLOCKS
from lib.parallel.layout import MESH_AXIS
from lib.preflight.cache import CACHE, answers
from lib.preflight.compile import for_chip
from lib.preflight.estimate import available_bytes
from lib.preflight.plan import MFU
from lib.train.optim import NOT_COMPILED, hyper

HERE = Path(__file__).parent

# how far the estimate was from compiled steps (LOG.md)
ERROR = "-6 to +7 % in memory and -20 to +20 % in time"


def write_dashboard(path: str | Path, cache: Path | None = CACHE) -> Path:
    """Write the page; answers of the compiler that `cache` holds are marked in it."""
    path = local_path(path)
    page = (HERE / "dashboard.html").read_text()
    formulas = (HERE / "dashboard.js").read_text()
    # a "<" of a text must not end the script
    tables = json.dumps(data(cache)).replace("<", "\\u003c")
    page = page.replace("/*FORMULAS*/", formulas).replace("/*TABLES*/", f"const DATA = {tables};")
    write_atomic(path, page)
    return path


def data(cache: Path | None = CACHE) -> dict[str, Any]:
    """All that the page knows besides its formulas, as JSON."""
    defaults = Config().to_dict()
    return dict(
        defaults=defaults,
        chips={kind: _chip_fields(slices[0].chip) for kind, slices in _kinds().items()},
        slices=[_slice_fields(kind, s) for kind, slices in _kinds().items() for s in slices],
        compiled=_compiled(cache),
        # a step counter, and what the schedules are made of
        HYPER_SCALARS=1 + len(jax.tree.leaves(hyper(Config(), 1))),
        BLOCKS=BLOCKS,
        ERROR=ERROR,
        KERNEL_TILE=KERNEL_TILE,
        MESH_AXIS=MESH_AXIS,
        MFU=MFU,
        MLPS=MLPS,
        OPTIMIZERS=OPTIMIZER_NAMES,
        PRICES_DATE=chips.PRICES_DATE,
        REFERENCE_BATCH=REFERENCE_BATCH,
        REMATS=REMATS,
        SMEAR_CHANNELS=SMEAR_CHANNELS,
        VALUE_GATE_CHANNELS=VALUE_GATE_CHANNELS,
    )


def _kinds() -> dict[str, list[Slice]]:
    """All that can be rented, by the kind of chip, the smallest first."""
    kinds = {}
    for version, (_, sizes) in chips.SLICES.items():
        kinds[version] = [chips.rented(f"{version}-{count}") for count in sizes]
    for gpu in chips.GPUS:
        kinds[gpu] = [chips.rented(f"{gpu}-{count}") for count in chips.NODES]
    return kinds


def _chip_fields(chip: Chip) -> dict[str, Any]:
    """What the page knows of a chip."""
    auto = for_chip(Config(), chip)
    prices = {how: chips.price_per_hour(chip.name, how) for how in ("on-demand", "spot")}
    note = ""
    if auto.compute_dtype == "float32":
        note = (
            f"a {chip.name} has no bfloat16, so this code computes in float32, "
            f"of which it does {chip.flops / 1e12:.1f} TFLOP/s"
        )
    return dict(
        name=chip.name,
        flops=chip.flops,
        bandwidth=chip.bandwidth,
        network=chip.network,
        matrix_unit=chip.matrix_unit,
        available=available_bytes(chip),
        attention=auto.attention,
        compute_dtype=auto.compute_dtype,
        prices=prices,
        note=note,
    )


def _slice_fields(kind: str, where: Slice) -> dict[str, Any]:
    return dict(kind=kind, name=where.name, topology=where.topology, chips=where.chips)


def _compiled(cache: Path | None) -> list[dict[str, Any]]:
    """Answers of the compiler to this code, with the fields of a config that they depend on."""
    names = {f.name for f in dataclasses.fields(Config)} - set(NOT_COMPILED)
    kept = []
    for question, answer in answers(cache, "inspect"):
        _, config, topology, strategy, split = question
        # all devices on the strategy's own axis, as the page has them
        used = {axis: n for axis, n in split.items() if n > 1}
        if set(used) - {MESH_AXIS[strategy]}:
            continue
        kept.append(
            dict(
                config={name: config[name] for name in sorted(names)},
                topology=topology,
                strategy=strategy,
                source=answer["source"],
                memory=answer["memory"],
                peak=answer["peak"],
                available=answer["available"],
                seconds=answer["bound"]["step"]["seconds"],
            )
        )
    return kept
