"""`python -m lib.report`: writes the report card of a run."""

from pathlib import Path

import tyro

from lib.notebook import setup
from lib.report.page import write
from lib.runs import newest_run


def main(run: str = "", runs_dir: str = "runs"):
    """Write the report card of runs/NAME.

    Args:
        run: name of the run; empty takes the one whose tokenizer was made last
        runs_dir: folder that holds the runs
    """
    print(
        f"report: {write(Path(runs_dir) / run if run else newest_run(runs_dir, 'tokenizer.json'))}"
    )


setup()
tyro.cli(main, prog="python -m lib.report")
