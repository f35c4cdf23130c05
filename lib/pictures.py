"""The pictures that the notebooks show: each a function of data that returns a matplotlib figure.

A notebook draws one in a line, `show(pictures.training_curves(rows), folder / "training.png")`.
Nothing here needs a display, and nothing touches pyplot's global state.
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.files import UserError, replacing
from lib.notebook import in_notebook
from lib.train.metrics import column

STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "axes.titlesize": "medium",
    "legend.frameon": False,
    "font.size": 9,
    "lines.linewidth": 1.3,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 130,
}

# ours first, then greys for those that stand beside it
BLUE, ORANGE, GREY, DARK_GREY = "#3b6fb6", "#d98032", "#b9bec6", "#878f9b"
INK = "#222222"

# ---- the house style -----------------------------------------------------------------------------


def styled(draw: Callable) -> Callable:
    """Decorate a function that draws: all that it adds, legends too, is in the house style."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


@styled
def subplots(rows: int = 1, cols: int = 1, size=(4.5, 3), **kwargs):
    """(figure, axes) in the house style, `size` in inches per axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * cols, size[1] * rows))
    return figure, figure.subplots(rows, cols, **kwargs)


@styled
def show(figure, path):
    """Write a figure to `path` (format from its suffix), and show it inline in a notebook."""
    check_format(path)
    with replacing(path) as tmp:
        figure.savefig(tmp, format=Path(path).suffix[1:])

    if not in_notebook():
        print(f"plot: {path}")
        return
    from IPython.display import Image, display

    display(Image(filename=str(path)))


def check_format(path):
    """UserError where no picture can be written in the format that the path's suffix names."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in formats:
        raise UserError(f"cannot draw {path}: end its name in .png, .svg or .pdf")


def whole_ticks(axis):
    """Put the ticks of `axes.xaxis` or `axes.yaxis` at whole numbers: there is no step 2.5."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def running_mean(values: Sequence[float], share: int = 30) -> list[float]:
    """Each value's mean with its neighbours on both sides, together a `share`-th of all values."""
    # sums up to each value, so that a mean is a difference of two
    half = len(values) // (2 * share)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    centers = np.arange(len(values))

    # at both ends the neighbourhood is cut, not filled up
    first = np.maximum(centers - half, 0)
    last = np.minimum(centers + half + 1, len(values))
    return ((sums[last] - sums[first]) / (last - first)).tolist()


# ---- 01: what a tokenizer learnt -----------------------------------------------------------------


@styled
def compression(bytes_per_token: dict[str, dict[str, float]]):
    """Bars of bytes per token: {kind of text: {tokenizer: bytes per token}}, ours first."""
    # all bars of a kind share a place
    kinds = list(bytes_per_token)
    names = list(bytes_per_token[kinds[0]])
    height = 0.8 / len(names)
    figure, axis = subplots(size=(7.5, 3.8))

    for k, (name, colour) in enumerate(zip(names, (BLUE, GREY, DARK_GREY))):
        values = [bytes_per_token[kind][name] for kind in kinds]
        middle = k - (len(names) - 1) / 2
        places = np.arange(len(kinds)) + middle * height
        bars = axis.barh(places, values, 0.92 * height, color=colour, label=name)
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)

    # the first kind on top
    axis.set_yticks(range(len(kinds)), kinds)
    axis.invert_yaxis()
    axis.set(xlabel="bytes per token (more is better)")
    axis.set_title("Compression by kind of text", loc="left")
    axis.grid(visible=False, axis="y")
    if len(names) > 1:
        figure.legend(loc="outside upper right", ncols=len(names))
    return figure


@styled
def token_lengths(vocabulary_bytes, text_bytes, longest: int = 21):
    """Histograms of token lengths in bytes: in the vocabulary, and in a text made of its tokens."""
    figure, axes = subplots(1, 2, size=(4.5, 3))
    lengths = np.arange(1, longest + 1)
    parts = (
        (axes[0], np.asarray(vocabulary_bytes), "vocabulary: {:,} learnt tokens", BLUE),
        (axes[1], np.asarray(text_bytes), "validation text: {:,} tokens", ORANGE),
    )
    for axis, values, title, colour in parts:
        # the last bar holds all that are longer
        counts = np.bincount(values.clip(max=longest), minlength=longest + 1)[1:]
        percent = 100 * counts / len(values)
        axis.bar(lengths, percent, width=0.85, color=colour)

        mean = values.mean()
        axis.axvline(mean, color="#333333", linestyle="--", linewidth=1)
        axis.annotate(f" mean {mean:.2f}", (mean, percent.max()), va="top", fontsize=8)

        axis.set(xlabel="bytes per token", ylabel="% of tokens", title=title.format(len(values)))
        axis.set_xticks([1, 5, 10, 15, longest], [1, 5, 10, 15, f"{longest}+"])
        axis.grid(visible=False, axis="x")
    return figure


PALETTE = (
    (0.79, 0.87, 0.97),
    (0.99, 0.88, 0.74),
    (0.82, 0.93, 0.80),
    (0.97, 0.82, 0.84),
    (0.89, 0.84, 0.95),
)


def coloured_tokens(tokenizer, text: str):
    """Draw a text with each token on a colour: `↵` is a line end, `�` a part of a character."""
    pieces = []
    for k, i in enumerate(tokenizer.encode(text)):
        pieces.append((tokenizer.tokens[i].decode(errors="replace"), PALETTE[k % len(PALETTE)]))
    return _text_grid(pieces)


# characters in a row of a text that is drawn
COLUMNS = 92


@styled
def _text_grid(pieces: list[tuple[str, tuple]], columns: int = COLUMNS):
    """Draw (text, background colour) pieces on a grid of characters; `\\n` ends a row."""
    from matplotlib.figure import Figure

    # every character's background, one pixel each, white where there is none
    rows, colours = _fill_rows(pieces, columns)
    backgrounds = np.ones((len(rows), columns, 3))
    for row, line in enumerate(colours):
        backgrounds[row, : len(line)] = np.reshape(line, (-1, 3))

    # a white gap above every row
    backgrounds = backgrounds.repeat(12, axis=0)
    backgrounds[::12] = 1

    # inches, inches, characters
    width, line_height, margin = 9.0, 0.22, 1.5
    figure = Figure(figsize=(width, line_height * (len(rows) + 1)))
    figure.set_layout_engine("none")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(
        backgrounds, aspect="auto", interpolation="nearest", extent=(0, columns, len(rows), 0)
    )
    axis.set(xlim=(-margin, columns + margin), ylim=(len(rows) + 0.5, -0.5))
    axis.axis("off")

    # DejaVu Sans Mono is 0.602 of its size wide
    style: dict[str, Any] = dict(
        size=width * 72 / (columns + 2 * margin) / 0.602,
        family="monospace",
        ha="center",
        va="center_baseline",
        color=INK,
        parse_math=False,
    )
    for row, line in enumerate(rows):
        # one by one: a whole line drifts off the grid
        for column_, char in enumerate(line):
            if char != " ":
                axis.text(column_ + 0.5, row + 0.55, char, **style)
    return figure


def _fill_rows(pieces, columns: int) -> tuple[list[str], list[list]]:
    """(rows of at most `columns` characters, the colour of each character)."""
    from matplotlib.font_manager import findfont, get_font

    drawable = get_font(findfont("monospace")).get_charmap()
    rows, colours = [""], [[]]

    def new_row():
        rows.append("")
        colours.append([])

    for text, colour in pieces:
        # what has no shape of its own gets one
        text = text.replace("\r\n", "\n").replace("\t", "→   ").replace("\n", "↵")
        # a piece is not cut in two unless it is longer than a row
        if len(rows[-1]) + len(text.rstrip("↵")) > columns:
            new_row()
        for char in text:
            if len(rows[-1]) == columns and char != "↵":
                new_row()
            if len(rows[-1]) < columns:
                rows[-1] += char if char == " " or ord(char) in drawable else "□"
                colours[-1].append(colour)
            if char == "↵":
                new_row()
    return rows, colours


# ---- 02: how training went -----------------------------------------------------------------------


@styled
def masks(windows: Sequence[int], length: int):
    """What each layer's queries may see: one square per kind of window, query down, key across.

    windows: of each layer, in keys before itself (lib.config.Config.windows).
    """
    position = np.arange(length)
    distance = position[:, None] - position[None, :]
    # a window that is longer than the row sees all of it
    reach = [min(window, length) for window in windows]
    kinds = sorted(set(reach))
    figure, axes = subplots(1, len(kinds), size=(2.6, 2.8), squeeze=False)
    for axis, window in zip(axes[0], kinds):
        visible = (distance >= 0) & (distance <= window)
        shades = np.where(visible, 1.0, 0.0)
        axis.imshow(shades, cmap="Blues", vmin=0, vmax=1.4, extent=(0, length, length, 0))
        layers = [str(i) for i, other in enumerate(reach) if other == window]
        more = ", …" if len(layers) > 6 else ""
        axis.set(
            title=f"window {window}: layers {', '.join(layers[:6])}{more}",
            xlabel="key",
            ylabel="query",
        )
        axis.grid(False)
    return figure


@styled
def training_curves(rows: list[dict]):
    """Loss, learning rate and throughput over the steps of a metrics.jsonl."""
    # what it is judged by
    figure, axes = subplots(1, 3, size=(4.6, 3.2))
    _loss_curves(axes[0], rows, "validation (per token of text)")
    axes[0].legend(loc="upper right")
    axes[0].set(title="loss", xlabel="step", ylabel="nats per token")

    # what it was driven by
    axes[1].plot(*column(rows, "lr"), color="C2")
    axes[1].set(
        title="learning rate", xlabel="step", ylabel="times each group's base rate", ylim=(0, None)
    )

    # how fast it went
    axes[2].plot(*column(rows, "tokens_per_s"), color="C3", linewidth=0.8)
    axes[2].set(title="throughput", xlabel="step", ylabel="tokens/s", ylim=(0, None))
    for axis in axes:
        whole_ticks(axis.xaxis)
    return figure


def _loss_curves(axis, rows, validation: str):
    """Draw the training loss, its running mean in bold, and the validation loss as dots."""
    steps, losses = column(rows, "loss")
    axis.plot(steps, losses, color="C0", alpha=0.35, linewidth=0.8)
    axis.plot(steps, running_mean(losses), color="C0", label="training")

    style = dict(color="C1", markersize=3, label=validation)
    axis.plot(*column(rows, "val_loss"), "o-", **style)


# ---- 04: what a model finds hard, and what it learnt ---------------------------------------------


def surprise_colour(bits: float) -> tuple[float, ...]:
    """Blue for an expected token (0 bits), paler towards 4 bits, then red for a surprise (16)."""
    colour, strength = ((0.2, 0.5, 1.0), 0.34 * (1 - bits / 4))
    if bits > 4:
        colour, strength = ((1.0, 0.3, 0.2), 0.75 * min(1.0, (bits - 3) / 13))
    return tuple(1 - strength * (1 - part) for part in colour)


def surprise(tokenizer, ids: Sequence[int], bits: Sequence[float]):
    """A text whose tokens are coloured by the bits that each cost, under a key of the colours."""
    # the key, a patch for each level
    white = (1.0, 1.0, 1.0)
    pieces = [("bits a token cost:", white)]
    for level in (0, 1, 2, 3, 4, 6, 8, 12, 16):
        pieces += [(" ", white), (f" {level}{'+' * (level == 16)} ", surprise_colour(level))]
    pieces.append((f"   {np.mean(bits):.2f} on average", white))

    rows = [(tokenizer.decode([i]), surprise_colour(float(cost))) for i, cost in zip(ids, bits)]
    # then the text itself
    empty_row = (" " * COLUMNS, white)
    return _text_grid([*pieces, empty_row, *rows])


@styled
def attention_maps(pieces: Sequence[str], maps: Sequence[np.ndarray], heads: int = 4):
    """Where layers look: a row per layer, a square per head, query down and key across.

    pieces: the text of each token. maps: of each shown layer (N, T, S), weights that add up to 1
    along the last axis.
    """
    heads = min(heads, len(maps[0]))
    labels = [piece.replace("\n", "↵").replace(" ", "·") for piece in pieces]
    side = 0.9 + 0.115 * len(pieces)
    figure, axes = subplots(len(maps), heads, size=(side, side), squeeze=False)
    for layer, (row, weights) in enumerate(zip(axes, maps)):
        for head, axis in enumerate(row):
            # roots, so that small shares are seen too
            axis.imshow(np.sqrt(weights[head]), cmap="Blues", vmin=0, vmax=1)
            axis.set_title(f"layer {layer}, head {head}")
            axis.grid(False)
            style = dict(fontsize=6, family="monospace", parse_math=False)
            axis.set_yticks(range(len(labels)), labels if head == 0 else [], **style)
            across = labels if layer == len(maps) - 1 else []
            axis.set_xticks(range(len(labels)) if across else [], across, rotation=90, **style)
            axis.tick_params(length=0)
    return figure


@styled
def bits_by_kind(by_stage: dict[str, dict]):
    """Bits per byte of each kind of text, with two standard errors.

    by_stage: {stage: the answer of `evals.bits_by_kind`}.
    """
    # the kinds with most bytes on top
    sizes = {}
    for measured in by_stage.values():
        for kind, entry in measured["kinds"].items():
            sizes[kind] = entry["bytes"]
    kinds = sorted(sizes, key=lambda kind: -sizes[kind])
    total = sum(sizes.values())

    figure, axis = subplots(size=(6.5, 0.8 + 0.3 * len(kinds)))
    for i, (stage, measured) in enumerate(by_stage.items()):
        entries = [
            (k, measured["kinds"][kind])
            for k, kind in enumerate(kinds)
            if kind in measured["kinds"]
        ]
        shift = 0.16 * (i - (len(by_stage) - 1) / 2)
        axis.errorbar(
            [entry["bpb"] for _, entry in entries],
            [k + shift for k, _ in entries],
            xerr=[2 * (entry["stderr"] or 0) for _, entry in entries],
            fmt="o",
            markersize=4,
            elinewidth=1.2,
            color=f"C{i}",
            label=stage,
        )
    axis.set_yticks(
        range(len(kinds)), [f"{kind}, {sizes[kind] / total:.0%} of the bytes" for kind in kinds]
    )
    axis.invert_yaxis()
    axis.set(xlabel="bits per byte (less is better)")
    if len(by_stage) > 1:
        figure.legend(loc="outside upper right", ncols=len(by_stage))
    return figure


@styled
def fine_tuning(curves: dict[str, list[dict]]):
    """Training and validation loss of each phase: {phase: rows of its metrics}."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = subplots(1, len(curves), size=(4.6, 3), squeeze=False)
    for axis, (phase, rows) in zip(axes[0], curves.items()):
        _loss_curves(axis, rows, "validation")
        axis.set(title=phase, xlabel="step", ylabel="nats per token of the assistant", yscale="log")

        # 0.2, 0.5 and 1 instead of powers of ten
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        whole_ticks(axis.xaxis)

    # above, where no curve is
    lines = axes[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper right", ncols=2)
    return figure


@styled
def scores(marks: dict[str, dict[str, dict]]):
    """Share of questions answered rightly, with its standard error: {stage: {task: entry}}.

    A dark line across a task's bars is what guessing gets.
    """
    # tasks in the order in which they were first asked
    tasks = []
    for entries in marks.values():
        tasks += [name for name in entries if name not in tasks]
    height = 0.8 / len(marks)
    figure, axis = subplots(size=(6.5, 0.9 + (0.2 + 0.14 * len(marks)) * len(tasks)))

    for i, (stage, entries) in enumerate(marks.items()):
        known = [(k, entries[name]) for k, name in enumerate(tasks) if name in entries]
        middle = i - (len(marks) - 1) / 2
        axis.barh(
            [k + middle * height for k, _ in known],
            [100 * entry["score"] for _, entry in known],
            0.9 * height,
            xerr=[100 * (entry["stderr"] or 0) for _, entry in known],
            error_kw=dict(linewidth=0.8, ecolor="#444444"),
            capsize=2,
            color=f"C{i}",
            label=stage,
        )
        for k, entry in known:
            guess = 100 * (entry["baseline"] or 0)
            axis.plot([guess, guess], [k - 0.42, k + 0.42], color=INK, linewidth=1)

    axis.set_yticks(range(len(tasks)), tasks)
    axis.invert_yaxis()
    axis.set(
        xlabel="% of held-out questions answered rightly (dark line: by guessing)", xlim=(0, 105)
    )
    axis.grid(visible=False, axis="y")
    figure.legend(loc="outside upper right", ncols=len(marks))
    return figure


# ---- 05: learning from rewards -------------------------------------------------------------------


@styled
def reinforcement(rows: list[dict]):
    """Reward with held-out pass@k and all that is watched over, for each step of a training."""
    figure, axes = subplots(2, 3, size=(5.7, 4.5))
    for axis, name in zip(axes.flat, ("reward", "length", "entropy", "kl", "signal", "drift")):
        steps, values = column(rows, name)
        axis.plot(steps, values, color="C0", alpha=0.35, linewidth=0.8)
        axis.plot(steps, running_mean(values), color="C0", label=name)
        whole_ticks(axis.xaxis)

    reward, length, entropy, kl, signal, drift = axes.flat
    # held-out questions beside those that it learns from
    measured = {name for row in rows for name in row if re.fullmatch(r"pass_\d+|greedy", name)}
    drawn = sorted(measured, key=lambda name: int(name.partition("_")[2] or 0))
    # the first and the last k of pass@k
    for i, name in enumerate(dict.fromkeys([*drawn[:2], *drawn[-1:]]), 1):
        steps, values = column(rows, name)
        reward.plot(steps, values, "o-", color=f"C{i}", markersize=3, label=name.replace("_", "@"))
    reward.legend(loc="lower right")
    reward.set(ylabel="reward, share right", title="reward")
    length.set(ylabel="tokens", title="length of answers")
    entropy.set(ylabel="nats per token", title="entropy")
    kl.set(xlabel="step", ylabel="nats per token", title="divergence from the start")
    # a cut answer is worth nothing, so it belongs to what can be learnt from
    steps, values = column(rows, "truncated")
    signal.plot(steps, running_mean(values), color="C1", label="answers that were cut")
    signal.set(xlabel="step", ylabel="share", title="groups that teach anything")
    signal.legend(loc="upper right")
    drift.set(xlabel="step", ylabel="nats per token", title="sampler against learner")
    return figure


# ---- 06: how fast it is --------------------------------------------------------------------------


@styled
def product_speeds(products):
    """TFLOP/s of measured matrix products, one bar for each shape and dtype."""
    dtypes = list(dict.fromkeys(product.dtype for product in products))
    shapes = list(dict.fromkeys(product.what for product in products))
    figure, axis = subplots(size=(7, 0.3 * len(shapes) * len(dtypes) + 1))
    height = 0.8 / len(dtypes)
    for i, dtype in enumerate(dtypes):
        speeds = [p.flops / 1e12 for p in products if p.dtype == dtype]
        places = [k + (i - (len(dtypes) - 1) / 2) * height for k in range(len(shapes))]
        bars = axis.barh(places, speeds, height, color=(BLUE, ORANGE, DARK_GREY)[i], label=dtype)
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axis.set_yticks(range(len(shapes)), shapes)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set(xlabel="TFLOP/s")
    axis.margins(x=0.1)
    figure.legend(loc="outside upper right", ncols=len(dtypes))
    return figure


@styled
def roofline(reached, ceiling, sheet=None):
    """Left: a dot for each component under the roof of a chip's two ceilings. Right: the share of
    its bound that each reaches. sheet: the chip as its data sheet has it, dashed.
    """
    figure, (roof, shares) = subplots(1, 2, size=(4.8, 3.6))
    dots = [r for r in reached if r.flops > 0 and r.bytes > 0 and r.seconds > 0]
    intensity = [r.flops / r.bytes for r in dots]
    corner = ceiling.flops / ceiling.bandwidth
    line = np.geomspace(min([*intensity, corner]) / 4, max([*intensity, corner]) * 4, 100)
    if sheet is not None:
        above = np.minimum(sheet.flops, sheet.bandwidth * line) / 1e12
        roof.plot(line, above, "--", color=DARK_GREY, label="data sheet")
    roof.plot(line, np.minimum(ceiling.flops, ceiling.bandwidth * line) / 1e12, color=INK)

    for i, (r, x) in enumerate(zip(dots, intensity)):
        y = r.flops / r.seconds / 1e12
        roof.plot(x, y, "o", color=f"C{i}")
        roof.annotate(r.component, (x, y), xytext=(5, -9), textcoords="offset points", fontsize=8)
    roof.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s")
    roof.set(title="each part of a step under its roof")
    if sheet is not None:
        roof.legend(loc="lower right")

    bars = [r for r in reached if r.seconds > 0]
    places = range(len(bars))
    drawn = shares.barh(places, [100 * r.share for r in bars], color=BLUE)
    shares.bar_label(drawn, fmt="%.0f", padding=3, fontsize=8)
    shares.set_yticks(places, [f"{r.component}\n{r.binds}" for r in bars])
    shares.invert_yaxis()
    shares.grid(visible=False, axis="y")
    shares.axvline(100, color=INK, linewidth=1)
    shares.set(xlabel="% of the bound", title="what is reached")
    return figure
