"""One step on many devices, and processes that train together.

`layout` says who holds which part of the parameters and of the batch, `collectives` where the
devices talk within a step, `hosts` how processes find each other, agree and stop.
"""

from lib.parallel.hosts import (
    check_same,
    end_all,
    from_each,
    from_first,
    start_hosts,
    stopping_together,
)
from lib.parallel.layout import (
    AXES,
    BATCH,
    MESH_AXIS,
    RULES,
    Layout,
    equal,
    make_layout,
    put_batch,
    whole,
)

__all__ = [
    "AXES",
    "BATCH",
    "MESH_AXIS",
    "RULES",
    "Layout",
    "check_same",
    "end_all",
    "equal",
    "from_each",
    "from_first",
    "make_layout",
    "put_batch",
    "start_hosts",
    "stopping_together",
    "whole",
]
