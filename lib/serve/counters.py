"""Figures of the server in Prometheus' text format."""

import collections
import os
from pathlib import Path
from typing import Any

# seconds, of the histograms
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Counters:
    """Counters and histograms in Prometheus' text format.

    Each name is written by one thread only.
    """

    def __init__(self):
        # of real numbers too, which the type of a Counter does not know
        self.counters: Any = collections.Counter()
        self.histograms = {}

    def add(self, name: str, amount: float = 1, **labels):
        self.counters[name, tuple((k, str(v)) for k, v in labels.items())] += amount

    def observe(self, name: str, seconds: float):
        counts, total = self.histograms.setdefault(name, ([0] * (len(BUCKETS) + 1), [0.0]))
        counts[next((i for i, bound in enumerate(BUCKETS) if seconds <= bound), len(BUCKETS))] += 1
        total[0] += seconds

    def text(self, gauges: dict[str, float]) -> str:
        """Everything so far, and `gauges`: what is read now."""
        lines, seen = [], set()
        # sorted copies first: another thread may add a name
        for (name, labels), value in sorted(self.counters.items()):
            if name not in seen:
                lines.append(f"# TYPE {name} counter")
                seen.add(name)
            inner = ",".join(f'{k}="{v}"' for k, v in labels)
            lines.append(f"{name}{{{inner}}} {value}" if inner else f"{name} {value}")
        for name, (counts, total) in self.histograms.items():
            lines.append(f"# TYPE {name} histogram")
            running = 0
            for bound, count in zip((*BUCKETS, "+Inf"), counts):
                running += count
                lines.append(f'{name}_bucket{{le="{bound}"}} {running}')
            lines += [f"{name}_sum {total[0]}", f"{name}_count {running}"]
        for name, value in gauges.items():
            lines += [f"# TYPE {name} gauge", f"{name} {value}"]
        return "\n".join(lines) + "\n"


def resident_bytes() -> int | None:
    """Memory that this process holds now, None where the system doesn't say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
