"""A corpus beyond one machine: datatrove reads and filters texts, and its tasks write our format.

    python launch/corpus.py --source raw/ --to gs://bucket/corpus --tokenizer runs/mine --tasks 64

On one machine, or with --partition as a job array on Slurm; docs/data-at-scale.md says the rest.
"""

from functools import partial

import tyro
from datatrove.executor import (  # pyright: ignore[reportMissingImports]
    LocalPipelineExecutor,
    SlurmPipelineExecutor,
)
from datatrove.pipeline.filters import LambdaFilter  # pyright: ignore[reportMissingImports]
from datatrove.pipeline.readers import JsonlReader  # pyright: ignore[reportMissingImports]

SHORTEST = 200  # characters of a document
HOURS = "24:00:00"  # that Slurm gives a task


def write(documents, rank: int, world_size: int, to: str, tokenizer: str):
    """The last step of a task: its documents become one shard of the corpus."""
    # imported where the task runs
    from lib.data.records import write_texts
    from lib.data.tokenizer import load_tokenizer

    texts = (document.text for document in documents)
    write_texts(texts, to, load_tokenizer(tokenizer), rank, world_size)


def main(
    source: str,
    to: str,
    tokenizer: str,
    tasks: int = 64,
    logs: str = "logs/corpus",
    workers: int = -1,
    partition: str = "",
    venv: str = ".venv",
):
    """Filter a folder of .jsonl files, and write it as a corpus of records.

    Args:
        source: a folder of .jsonl or .jsonl.gz files with a "text" each; local, gs:// or s3://
        to: where the corpus goes, likewise
        tokenizer: the run folder with the tokenizer that 01 has made
        tasks: shards that it becomes; the last one's text validates
        logs: datatrove's own folder; a task that ended well is not run again
        workers: tasks at a time (-1: all)
        partition: of Slurm; empty runs all tasks on this machine
        venv: with datatrove and rawchat, on Slurm's nodes
    """
    pipeline = [
        JsonlReader(source),
        # languages, quality, what stands twice: datatrove.pipeline.filters and .dedup
        LambdaFilter(lambda document: len(document.text) >= SHORTEST),
        partial(write, to=to, tokenizer=tokenizer),
    ]
    shared = dict(pipeline=pipeline, tasks=tasks, workers=workers, logging_dir=logs)
    if not partition:
        LocalPipelineExecutor(**shared).run()
        return
    SlurmPipelineExecutor(
        **shared,
        time=HOURS,
        partition=partition,
        venv_path=f"{venv}/bin/activate",
    ).run()


if __name__ == "__main__":
    tyro.cli(main)
