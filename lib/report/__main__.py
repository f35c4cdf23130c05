"""`python -m lib.report`: writes the report card of a run."""

import tyro

from lib.files import local_path
from lib.interrupts import started
from lib.notebook import setup
from lib.report import write
from lib.runs import newest_run


def main(run: str = "", runs_dir: str = "runs"):
    """Write the report card of a run: report.html, report.md and the charts in plots/.

    Args:
        run: name of the run; empty takes the one whose tokenizer was made last
        runs_dir: folder that holds the runs
    """
    runs = local_path(runs_dir)
    folder = runs / run if run else newest_run(runs, "tokenizer.json")
    print(f"report: {write(folder)}")


if __name__ == "__main__":
    setup()
    started()
    tyro.cli(main, prog="python -m lib.report")
