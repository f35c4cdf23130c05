"""`python -m lib.interop`: a trained model for other programs."""

from pathlib import Path

import tyro

from lib.interop import export_run
from lib.notebook import setup
from lib.runs import newest_run


def export(
    run: str = "",
    format: str = "transformers",
    stage: str = "",
    ckpt: str = "",
    out: str = "",
    runs_dir: str = "runs",
):
    """Write a model of a run for another program, and prove it by that program.

    Args:
        run: name of the run; empty takes the one that was trained last
        format: transformers, gguf (llama.cpp) or stablehlo
        stage: base, mid, sft or rl; empty for the furthest that the run has
        ckpt: best, or a checkpoint's path; empty for the newest
        out: where to write; empty for exports/FORMAT in the run folder
        runs_dir: folder that holds the runs
    """
    folder = Path(runs_dir) / run if run else newest_run(runs_dir)
    print(export_run(folder, format, stage, ckpt, out).table())


if __name__ == "__main__":
    setup()
    tyro.extras.subcommand_cli_from_dict({"export": export}, prog="python -m lib.interop")
