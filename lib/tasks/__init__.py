"""What a model can be taught and asked: every task's data, rendering and grading, by name.

The same entry serves fine-tuning (its train split is a part of a mixture) and evaluation (its test
split). `embedded` and `stdlib` are made here, `hub` is downloaded, `own` reads a user's file;
`beyond` is never taught, only rewarded, and `rewards` says what an answer is worth.
"""

from lib.files import UserError, choose
from lib.tasks.items import Task, choice_item, shuffled

__all__ = ["Task", "choice_item", "items_of", "shuffled", "tasks"]


def tasks() -> dict[str, Task]:
    """All tasks by name: those made here, which need no network, then those of the Hub."""
    from lib.tasks import beyond, embedded, hub

    return {**embedded.TASKS, **beyond.TASKS, **hub.TASKS}


def items_of(name: str, split: str, limit: int | None = None) -> list[dict]:
    """The first `limit` items of a task's split (all of them for None)."""
    task = choose("task", name, tasks())
    items = task.items(choose("split", split, ("train", "test")))
    if not items:
        raise UserError(f"task {name} has no {split} split")
    return items[:limit]
