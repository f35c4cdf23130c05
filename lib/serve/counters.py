"""Figures of the server in Prometheus' text format."""

import collections
import os
from bisect import bisect_left
from pathlib import Path
from typing import Any

# seconds, of the histograms
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Histogram:
    """How many times were as long as each bucket, and all together."""

    def __init__(self):
        self.counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0

    def observe(self, seconds: float):
        # the last count is of what is longer than every bucket
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        """As Prometheus reads it: each bucket counts the shorter ones too."""
        lines = [f"# TYPE {name} histogram"]
        running = 0
        for bound, count in zip((*BUCKETS, "+Inf"), self.counts):
            running += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {running}')
        return [*lines, f"{name}_sum {self.total}", f"{name}_count {running}"]


class Counters:
    """Counters and histograms in Prometheus' text format.

    Each name is written by one thread only.
    """

    def __init__(self):
        # of real numbers too, which the type of a Counter does not know
        self.counters: Any = collections.Counter()
        self.histograms: dict[str, Histogram] = {}

    def add(self, name: str, amount: float = 1, **labels):
        """Count `amount` more under a name and labels."""
        labelled = tuple((key, str(value)) for key, value in labels.items())
        self.counters[name, labelled] += amount

    def observe(self, name: str, seconds: float):
        """Note how long something took."""
        self.histograms.setdefault(name, Histogram()).observe(seconds)

    def text(self, gauges: dict[str, float]) -> str:
        """Everything so far, and `gauges`: what is read now."""
        lines = []
        # the type stands once, before all lines of a name
        typed = set()
        # a sorted copy first: another thread may add a name
        for (name, labels), value in sorted(self.counters.items()):
            if name not in typed:
                lines.append(f"# TYPE {name} counter")
                typed.add(name)
            inner = ",".join(f'{key}="{label}"' for key, label in labels)
            braces = f"{{{inner}}}" if inner else ""
            lines.append(f"{name}{braces} {value}")

        for name, histogram in list(self.histograms.items()):
            lines += histogram.lines(name)
        for name, value in gauges.items():
            lines += [f"# TYPE {name} gauge", f"{name} {value}"]
        return "\n".join(lines) + "\n"


def resident_bytes() -> int | None:
    """Memory that this process holds now, None where the system doesn't say."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
