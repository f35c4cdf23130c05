"""Which depths fit on which slices, as one table; and a search as a picture."""

from pathlib import Path
from typing import Any

import numpy as np

from lib.chips import Slice, tpu_slice
from lib.config import Config
from lib.params import count_params
from lib.pictures import styled, subplots
from lib.preflight.cache import CACHE, kept
from lib.preflight.compile import for_tpu, question
from lib.preflight.estimate import GIB, Report, estimate
from lib.preflight.search import REMATS, Search

SLICES = ("v5e-1", "v6e-1", "v5e-8", "v6e-8", "v5p-8")
DEPTHS = (12, 16, 20, 24, 28, 32)

FOOTNOTE = (
    "GiB per chip at a step's peak, of those after the x. **Bold**: compiled by libtpu; "
    "else estimated from shapes (-6 to +7 % off where compared).\n"
    "~~Struck out~~: does not fit. A cell gets compiled by asking for it once, with 4 rows a chip: "
    "python -m lib.preflight --depth 20\n"
    '--chip v6e-8 --strategy zero --overrides "microbatch=32 remat=dots"'
)


def fits_table(
    names: tuple[str, ...] = SLICES,
    depths: tuple[int, ...] = DEPTHS,
    cache: Path | None = CACHE,
    **fields,
) -> str:
    """What fits on which slices, as Markdown: GiB per chip by strategy.

    Compiled where `cache` has the answer, else from shapes alone. Four rows a chip and remat="dots"
    unless `fields` say else, all else as from_depth says.
    """
    slices = [tpu_slice(name) for name in names]
    heads = [f"{s.name}: {s.chips} x {s.chip.usable / GIB:.1f}" for s in slices]
    # the heads
    lines = [
        f"| depth | parameters | {' | '.join(heads)} |",
        "|---" * (len(names) + 2) + "|",
    ]
    # a row for each depth
    for depth in depths:
        cells = [_cell(depth, where, cache, fields) for where in slices]
        millions = count_params(Config.from_depth(depth, **fields))["total"] / 1e6
        lines.append(f"| {depth} | {millions:,.0f}M | {' | '.join(cells)} |")
    return "\n".join([*lines, "", FOOTNOTE])


def _cell(depth: int, where: Slice, cache: Path | None, fields: dict[str, Any]) -> str:
    """GiB of a depth on a slice, by strategy."""
    usual: dict[str, Any] = dict(microbatch=4 * where.chips, remat="dots")
    config = for_tpu(Config.from_depth(depth, **usual | fields))
    strategies = ("dp", "zero", "fsdp") if where.chips > 1 else ("dp",)

    # a compiled answer goes before an estimate
    parts = []
    for strategy in strategies:
        compiled = kept(cache, question(config, where, strategy))
        report = estimate(config, where, strategy)
        if compiled:
            report = Report.from_dict(compiled)
        text = f"{report.peak / GIB:.1f}"
        text = text if report.fits else f"~~{text}~~"
        text = f"**{text}**" if compiled else text
        parts.append(f"{strategy} {text}" if where.chips > 1 else text)
    return ", ".join(parts)


@styled
def heat_map(search: Search):
    """A figure of a search: the least time for each microbatch and rematerialisation."""
    microbatches = sorted({row.microbatch for row in search.rows})
    shape = (len(REMATS), len(microbatches))
    milliseconds, fits = np.full(shape, np.nan), np.zeros(shape, bool)

    # rows are sorted: the first of each cell is its best
    for row in search.rows:
        cell = REMATS.index(row.remat), microbatches.index(row.microbatch)
        if np.isnan(milliseconds[cell]):
            milliseconds[cell], fits[cell] = 1e3 * row.seconds, row.fits

    # one square for each, with its number
    figure, axis = subplots(size=(1.2 + 0.9 * len(microbatches), 2.6))
    image = axis.imshow(milliseconds, aspect="auto", cmap="viridis_r")
    for (i, j), value in np.ndenumerate(milliseconds):
        if np.isnan(value):
            continue
        text, colour = f"{value:.0f}", "white"
        if not fits[i, j]:
            text, colour = "does\nnot fit", "red"
        axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)

    # what the squares stand for
    axis.set_xticks(range(len(microbatches)), microbatches)
    axis.set_yticks(range(len(REMATS)), REMATS)
    axis.set(
        xlabel="microbatch, rows",
        ylabel="remat",
        title="least time per step, ms (best attention, block and loss chunk)",
    )
    axis.grid(False)
    figure.colorbar(image, ax=axis)
    return figure
