"""Charts as SVG: curves over steps, scores with their ranges, differences with their intervals.

Positions are percentages and heights are pixels, so that a chart fits any width and its text stays
as large as the page's; colours are the page's own variables, for light and dark.
"""

import html
import math
from collections.abc import Iterable
from typing import NamedTuple

from lib.evals.stats import SURE, Comparison
from lib.pictures import running_mean
from lib.report.words import comparison_label, is_finite, short, unit_label
from lib.runs import STAGES
from lib.train.metrics import column

LIGHT = (
    "--fg:#1c2430;--muted:#5b6675;--line:#dde2e9;--card:#f6f7f9;--bg:#fff;"
    "--base:#56657a;--mid:#0277b5;--sft:#c2470a;--rl:#14803c;--better:#14803c;--worse:#b3261e;"
)
DARK = (
    "--fg:#e5e9f0;--muted:#98a3b3;--line:#323a46;--card:#1b212a;--bg:#12161c;"
    "--base:#a3b0c2;--mid:#4db8f0;--sft:#fb9a4b;--rl:#55cf7f;--better:#55cf7f;--worse:#ff8a80;"
)

# classes that only name a colour
COLOURED = [*STAGES, "better", "worse"]

CHART_CSS = (
    "svg{color:var(--fg)}"
    "svg text{font:11px system-ui,sans-serif;fill:var(--muted)}"
    "svg .value{fill:var(--fg);paint-order:stroke;stroke:var(--bg);stroke-width:3px}"
    ".grid{stroke:var(--line)}"
    ".zero,.random,.majority{stroke:var(--muted);stroke-width:1.5}"
    ".random{stroke-dasharray:1.5 2.5}"
    ".majority{stroke-dasharray:6 3}"
    "polyline{fill:none;vector-effect:non-scaling-stroke;stroke-width:1.8}"
    ".raw{opacity:.35;stroke-width:1}"
    + "".join(f".{name}{{stroke:var(--{name});fill:var(--{name})}}" for name in COLOURED)
    + ".chance{stroke:var(--muted);fill:var(--bg)}"
)


class Chart(NamedTuple):
    """A title and SVG elements, so many pixels high."""

    title: str
    inner: str
    height: int

    def svg(self, extra: str = "") -> str:
        """The SVG element; extra: more attributes."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="100%" height="{self.height}" '
            f'role="img" aria-label="{html.escape(self.title)}"{extra}>{self.inner}</svg>'
        )


def stack(charts: list[Chart]) -> str:
    """One SVG file of several charts below each other, with its own colours for light and dark."""
    # each below the last, its title above it
    y, parts = 0, []
    for chart in charts:
        title = html.escape(chart.title)
        parts.append(f'<text x="0" y="{y + 18}" class="value">{title}</text>')
        parts.append(chart.svg(f' y="{y + 26}"'))
        y += chart.height + 36

    # the page's variables, which a file of its own does not have
    dark = f"@media(prefers-color-scheme:dark){{:root{{{DARK}}}}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{y}">'
        f"<style>:root{{{LIGHT}}}{dark}{CHART_CSS}</style>"
        f'<rect width="100%" height="100%" style="fill:var(--bg)"/>{"".join(parts)}</svg>\n'
    )


# ---- elements ------------------------------------------------------------------------------------


def _line(kind: str, x1: float, x2: float, y1: float, y2: float, extra: str = "") -> str:
    """A line; x in percent, y in pixels."""
    return (
        f'<line class="{kind}" x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y1:.1f}" y2="{y2:.1f}"{extra}/>'
    )


def _circle(kind: str, x: float, y: float, radius: float) -> str:
    """A dot; x in percent, y and radius in pixels."""
    return f'<circle class="{kind}" cx="{x:.2f}%" cy="{y:.1f}" r="{radius:g}"/>'


def _text(
    x: float, y: float, text: str, anchor: str = "middle", kind: str = "", dx: int = 0
) -> str:
    """A text; x in percent, dx more in pixels, y in pixels."""
    named = f' class="{kind}"' if kind else ""
    moved = f' dx="{dx}"' if dx else ""
    return (
        f'<text{named} x="{x:.2f}%"{moved} y="{y:.1f}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from low to high."""
    # the smallest of 1, 2 and 5 times a power of ten that gives no more
    length = high - low
    step = 10 ** math.floor(math.log10(length / count))
    for factor in (1, 2, 5, 10):
        if length / (step * factor) <= count:
            step *= factor
            break

    # its multiples within, both ends counted in
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


# ---- curves over steps ---------------------------------------------------------------------------

# title, columns of metrics.jsonl, whether its axis starts at zero
CURVES = [
    ("loss, nats/token (dots: validation)", ("loss", "val_loss"), False),
    ("validation, bits per byte", ("val_bpb",), False),
    ("learning rate / its base", ("lr",), True),
    ("throughput, tokens/s", ("tokens_per_s",), True),
    ("reward", ("reward",), True),
    ("CORE while training", ("core",), False),
]

# pixels: of a curve's area, and above it; percent: left of it, for its numbers
TALL, TOP, LEFT = 140, 6, 12

# points drawn of a curve at most, and how few get dots
MOST_POINTS, FEW_POINTS = 300, 30


class Points(NamedTuple):
    steps: list[float]
    values: list[float]


class Frame(NamedTuple):
    """The area of a curve: what its edges stand for."""

    first: float
    last: float
    low: float
    high: float

    def at(self, step: float, value: float) -> tuple[float, float]:
        """Shares from 0 to 1 of the way right and down."""
        right = (step - self.first) / (self.last - self.first)
        down = (self.high - value) / (self.high - self.low)
        return right, down

    def place(self, step: float, value: float) -> tuple[float, float]:
        """Percent and pixels in the chart."""
        right, down = self.at(step, value)
        return LEFT + (100 - LEFT) * right, TOP + TALL * down


def curves(rows: list[dict], stage: str) -> list[Chart]:
    """The charts of a stage's metrics over its steps."""
    charts = [_curve(rows, stage, *curve) for curve in CURVES]
    return [chart for chart in charts if chart]


def _curve(
    rows: list[dict], stage: str, title: str, names: tuple[str, ...], from_zero: bool
) -> Chart | None:
    """The first column as a line, the others as dots on lines; None where there is no number."""
    lines, lost = [], 0
    for name in names:
        points, dropped = _points(rows, name)
        lines.append(points)
        lost += dropped
    if not any(points.values for points in lines):
        return None

    # the axes and the line
    frame = _frame(lines, from_zero)
    line, *dotted = lines
    parts = _grid(frame)
    parts.append(_area(frame, line, stage, smooth=not from_zero))

    # the dots: of the other columns, or of a line that has few points
    if not dotted and len(line.steps) < FEW_POINTS:
        dotted = [line]
    for points in dotted:
        for step, value in zip(*points):
            x, y = frame.place(step, value)
            parts.append(_circle(stage, x, y, 3.2))
    if lost:
        title += f" ({lost} values not finite, left out)"
    return Chart(title, "".join(parts), TOP + TALL + 24)


def _points(rows: list[dict], name: str) -> tuple[Points, int]:
    """(a column's finite values, as means of equal pieces if they are many; how many were not)."""
    finite = Points([], [])
    lost = 0
    for step, value in zip(*column(rows, name)):
        if is_finite(value):
            finite.steps.append(step)
            finite.values.append(value)
        else:
            lost += 1

    # no screen shows more points; a mean stands at the last step of its piece
    count = len(finite.steps)
    piece = max(1, math.ceil(count / MOST_POINTS))
    thin = Points([], [])
    for start in range(0, count, piece):
        values = finite.values[start : start + piece]
        thin.steps.append(finite.steps[start + len(values) - 1])
        thin.values.append(sum(values) / len(values))
    return thin, lost


def _frame(lines: list[Points], from_zero: bool) -> Frame:
    """The area that holds all points, with some room."""
    steps, values = [], []
    for points in lines:
        steps += points.steps
        values += points.values

    # above and below, unless zero is the floor; a flat line has room too
    low, high = min(values), max(values)
    if from_zero:
        low = min(0, low)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1
    bottom = low if from_zero else low - room

    # a single step is one step wide
    first = min(steps)
    last = max(*steps, first + 1)
    return Frame(first, last, bottom, high + room)


def _grid(frame: Frame) -> list[str]:
    """Lines and numbers of the value axis, numbers of the step axis."""
    parts = []
    for tick in ticks(frame.low, frame.high):
        _, y = frame.place(frame.first, tick)
        parts.append(_line("grid", LEFT, 100, y, y))
        parts.append(_text(LEFT - 2.5, y + 4, short(tick), "end"))
    for tick in ticks(frame.first, frame.last):
        # there is no step 2.5
        if tick != int(tick):
            continue
        x, _ = frame.place(tick, frame.low)
        anchor = "end" if x > 96 else "middle"
        parts.append(_text(x, TOP + TALL + 16, f"{tick:,.0f}", anchor))
    return parts


def _area(frame: Frame, points: Points, stage: str, smooth: bool) -> str:
    """The line itself, stretched to the area; with many points faint, and smoothed above that."""
    lines = _polyline(frame, points, stage)
    if smooth and len(points.values) >= 2 * FEW_POINTS:
        smoothed = Points(points.steps, running_mean(points.values))
        faint = _polyline(frame, points, f"raw {stage}")
        lines = faint + _polyline(frame, smoothed, stage)

    # an SVG within, so that the line can be stretched and the text around it is not
    return (
        f'<svg x="{LEFT}%" y="{TOP}" width="{100 - LEFT}%" height="{TALL}" '
        f'viewBox="0 0 1000 1000" preserveAspectRatio="none" overflow="visible">{lines}</svg>'
    )


def _polyline(frame: Frame, points: Points, kind: str) -> str:
    """A line in thousandths of the area."""
    places = [frame.at(step, value) for step, value in zip(*points)]
    drawn = " ".join(f"{1000 * x:.1f},{1000 * y:.1f}" for x, y in places)
    return f'<polyline class="{kind}" style="fill:none" points="{drawn}"/>'


# ---- scores --------------------------------------------------------------------------------------

# pixels of a row of a score, and of the axis below
ROW, AXIS = 20, 16


def dots(name: str, stages: dict[str, dict], published: Iterable[float] = ()) -> Chart:
    """One task: each stage's score and the range that holds the true one 19 times in 20.

    Lines mark random answers and always the commonest one, diamonds what others published.
    """
    # from 0 to 1; centred scores may be below zero, then from a tenth below the worst
    worst = min(entry["score"] for entry in stages.values())
    low = min(0.0, math.floor(10 * worst) / 10)

    def x(score: float) -> float:
        """Percent of the width; what lies outside stands at the edge."""
        inside = min(max(score, low), 1)
        return 100 * (inside - low) / (1 - low)

    # diamonds have a strip of their own
    published = list(published)
    tall = ROW * len(stages)
    if published:
        tall += 14

    # the axis
    parts = []
    for tick in sorted({low, 0, 0.25, 0.5, 0.75, 1}):
        anchor = {low: "start", 1: "end"}.get(tick, "middle")
        unit = " %" if tick == 1 else ""
        parts.append(_line("grid", x(tick), x(tick), 0, tall))
        parts.append(_text(x(tick), tall + 13, f"{100 * tick:.0f}{unit}", anchor))

    # what it is compared with: guesses, and others
    first = next(iter(stages.values()))
    for kind, key in (("random", "baseline"), ("majority", "majority")):
        value = first.get(key)
        if value is not None:
            parts.append(_line(kind, x(value), x(value), 0, tall))
    for value in published:
        parts.append(_text(x(value), tall - 2, "◇", kind="value"))

    # the scores, a row for each stage
    for i, (stage, entry) in enumerate(stages.items()):
        parts += _dot(stage, entry, ROW * i + ROW / 2, x)
    return Chart(name, "".join(parts), tall + AXIS)


def _dot(stage: str, entry: dict, y: float, x) -> list[str]:
    """A score, its range, and its number on the side that has room."""
    score, half = entry["score"], SURE * (entry.get("stderr") or 0)
    low, high = score - half, score + half
    if max(high, score + 0.02) < 0.72:
        edge, anchor, dx = high, "start", 9
    else:
        edge, anchor, dx = low, "end", -9
    style = ' stroke-width="2.5" opacity=".55"'
    return [
        _line(stage, x(low), x(high), y, y, style),
        _circle(stage, x(score), y, 4.5),
        _text(x(edge), y + 4, f"{stage} {100 * score:.1f}", anchor, "value", dx),
    ]


# ---- differences ---------------------------------------------------------------------------------

# pixels of a difference: its name above, its interval below
DIFFERENCE_ROW = 34


def intervals(compared: list[Comparison], names: tuple[str, str]) -> list[Chart]:
    """Differences between two stages with their 95 % intervals, a chart for each unit.

    Filled dots are more than chance, hollow ones are not.
    """
    # points first
    groups: dict[str, list[Comparison]] = {"points": []}
    for comparison in compared:
        groups.setdefault(comparison.unit, []).append(comparison)
    return [_intervals(group, unit, names) for unit, group in groups.items() if group]


def _intervals(compared: list[Comparison], unit: str, names: tuple[str, str]) -> Chart:
    """The differences of one unit below each other, zero in the middle."""
    # as far to both sides as the farthest end of an interval, and a little more
    scale = 100 if unit == "points" else 1
    ends = []
    for comparison in compared:
        interval = comparison.interval or (comparison.delta,)
        ends += [abs(scale * end) for end in interval]
    reach = max(ends) * 1.08 or 1
    tall = DIFFERENCE_ROW * len(compared)

    def x(value: float) -> float:
        return 50 + 50 * value / reach

    # the axis
    parts = []
    for tick in ticks(-reach, reach):
        parts.append(_line("grid", x(tick), x(tick), 0, tall))
        sign = "+" if tick > 0 else ""
        parts.append(_text(x(tick), tall + 13, f"{sign}{short(tick)}", _anchor(x(tick))))
    parts.append(_line("zero", 50, 50, 0, tall))

    # the differences
    for i, comparison in enumerate(compared):
        parts += _interval(comparison, DIFFERENCE_ROW * i + 24, scale, x)
    better = "more is better" if compared[0].better == "higher" else "less is better"
    title = f"{names[1]} less {names[0]}, {unit_label(unit)} ({better})"
    return Chart(title, "".join(parts), tall + AXIS)


def _anchor(x: float) -> str:
    """On which side of its place a number of the axis is written: at the edges inside."""
    if x < 4:
        return "start"
    return "end" if x > 96 else "middle"


def _interval(c: Comparison, y: float, scale: float, x) -> list[str]:
    """A difference: what it is about, above its interval and its dot."""
    spec = "+.1f" if c.unit == "points" else "+.4f"
    title = f"{comparison_label(c.label)} {scale * c.delta:{spec}}"
    kind = "better" if c.improved else "worse"
    if not c.real:
        title, kind = f"{title} (may be chance)", "chance"
    parts = [_text(0, y - 11, title, "start", "value")]
    if c.interval:
        low, high = (x(scale * end) for end in c.interval)
        parts.append(_line(kind, low, high, y, y, ' stroke-width="2.5" opacity=".6"'))
    return [*parts, _circle(kind, x(scale * c.delta), y, 4.5)]
