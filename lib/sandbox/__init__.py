"""Running what a model wrote: sums by a calculator that knows nothing else, Python behind walls.

`calculator` answers tool calls; `run_python` and `run_many` run programs that nobody has read.
"""

from lib.sandbox.calculator import calculator
from lib.sandbox.programs import available, run_many, run_python

__all__ = ["available", "calculator", "run_many", "run_python"]
