"""The report card: what a run folder holds, read (`record`), said (`sections`) and drawn
(`charts`), on one page.

`write(folder)` makes it: report.html, which needs nothing else, and report.md with its charts in
plots/. One list of blocks (`blocks`) is rendered twice (`page`, `markdown`). `python -m
lib.report` does it for a run.
"""

from lib.report.page import write
from lib.report.record import read, verdict
from lib.report.sections import commit_id

__all__ = ["commit_id", "read", "verdict", "write"]
