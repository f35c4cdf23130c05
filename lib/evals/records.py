"""What was measured, kept in a run: evals/STAGE.json, whose entries merge task by task."""

import time
from pathlib import Path

import jax

from lib.evals import stats
from lib.files import choose, read_json, write_json
from lib.runs import STAGES

# What says whose measurements these are: those of another checkpoint go.
IDENTITY = ("step", "checkpoint")
# Parts of a record that merge entry by entry; others are replaced whole.
MERGED = ("tasks", "bpb")


def now() -> str:
    """The time as records write it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def place_of(folder, path) -> str:
    """How a record calls a checkpoint: by its name in the run's folder, any other by its
    address.
    """
    if Path(path).resolve().is_relative_to(Path(folder).resolve()):
        return Path(path).resolve().relative_to(Path(folder).resolve()).as_posix()
    return str(path)


def read_of(folder, stage: str, path) -> dict:
    """What folder/evals/STAGE.json holds of this very checkpoint, {} where it is of another."""
    known = read(Path(folder, "evals", f"{stage}.json"))
    return known if known.get("checkpoint") == place_of(folder, path) else {}


def read(path) -> dict:
    """A record, {} where there is none; UserError if it is damaged."""
    if not Path(path).exists():
        return {}
    return read_json(path, cure="delete it and evaluate again")


def write(folder, stage: str, record: dict) -> dict:
    """Merge a record into folder/evals/STAGE.json, whole or not at all; what stands there now.

    record: "step" and "checkpoint" of what was measured, and any of "tasks", "skipped", "bpb",
    "core", "samples" and so on. Entries of the same checkpoint stay unless they were measured
    again; those of another checkpoint go. Each task's entry says when it was measured.
    """
    path = Path(folder, "evals", f"{choose('stage', stage, tuple(STAGES))}.json")
    # nothing of another checkpoint may stand beside these
    old = read(path)
    if any(old.get(key) != record.get(key) for key in IDENTITY):
        old = {}
    stamp = now()
    merged = old | record
    merged |= dict(
        stage=stage,
        time=stamp,
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
    )
    # entries of the parts that merge, each task with its own date
    new_tasks = {name: dict(time=stamp) | entry for name, entry in record.get("tasks", {}).items()}
    for part in MERGED:
        if part in old or part in record:
            merged[part] = old.get(part, {}) | record.get(part, {})
    if new_tasks:
        merged["tasks"] |= new_tasks
    # what could not be had before may be measured now
    missing = old.get("skipped", {}) | record.get("skipped", {})
    measured = merged.get("tasks", {})
    merged["skipped"] = {name: why for name, why in missing.items() if name not in measured}
    # the mean is made anew of all that stands here
    if score := stats.chatcore(measured):
        merged["chatcore"] = score
    write_json(path, merged)
    return merged
