"""Numbers as words: short for an axis, whole for a table, never more digits than are meant."""

import math

# where a run has not recorded a figure
UNKNOWN = "—"
SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(x: float) -> str:
    """A number for an axis or a sentence: 13.7k, 0.05, 1.8M."""
    for size, suffix in SUFFIXES:
        if abs(x) >= size:
            return f"{x / size:.3g}{suffix}"
    return f"{x:.3g}"


def duration(seconds: float) -> str:
    """A time in the unit that reads best."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.2f} h"


def gigabytes(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"


def with_error(value, stderr, scale: float = 1.0, spec: str = ".1f") -> str:
    """A figure and its standard error, where it has one."""
    if value is None:
        return UNKNOWN
    text = f"{value * scale:{spec}}"
    if stderr is not None:
        text += f" ± {stderr * scale:{spec}}"
    return text


def bits(measured: dict) -> str:
    """Bits per byte with their standard error."""
    return with_error(measured.get("bpb"), measured.get("stderr"), spec=".4f")


def score(entry: dict | None) -> str:
    """A task's entry: percent with its standard error, or a perplexity with its own."""
    if not entry:
        return UNKNOWN
    figure, error = entry.get("score"), entry.get("stderr")
    if is_share(entry):
        return with_error(figure, error, scale=100)
    return with_error(figure, error, spec=".3g")


def is_share(entry: dict) -> bool:
    """Whether an entry's score is a share from 0 to 1, rather than a perplexity or nothing."""
    # only shares have a baseline: what guessing gets
    if entry.get("kind") == "perplexity" or entry.get("score") is None:
        return False
    return entry.get("baseline") is not None


def percent(share: float | None) -> str:
    """A share in percent, without the sign."""
    return UNKNOWN if share is None else f"{100 * share:.1f}"


def value(x) -> str:
    """A setting or a recorded figure."""
    if x is None:
        return UNKNOWN
    if isinstance(x, bool) or not isinstance(x, int | float):
        return str(x)
    # whole numbers whole, others with six digits
    if isinstance(x, int):
        return f"{x:,}"
    return f"{x:,.6g}"


def is_finite(x) -> bool:
    """Whether it is a number that can be drawn."""
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def unit_label(unit: str) -> str:
    """A comparison's unit as a heading says it."""
    if unit == "of the mean of centred scores":
        return "mean of centred scores, from 0 for guessing to 1"
    return unit


def comparison_label(label: str) -> str:
    """What a comparison is about: its key in words."""
    means = {"core": "CORE", "chatcore": "ChatCORE"}
    if label.startswith("bpb/"):
        return f"bits per byte of {label.removeprefix('bpb/')}"
    return means.get(label, label)
