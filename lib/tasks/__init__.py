"""What a model can be taught and asked: every task's data, rendering and grading, by name.

The same entry serves fine-tuning (its train split is a part of a mixture) and evaluation (its test
split). `embedded` and `stdlib` are made here, `hub` is downloaded, `own` reads a user's file;
`beyond` is never taught, only rewarded, and `rewards` says what an answer is worth.
"""

from lib.files import UserError, choose
from lib.tasks.items import Task, choice_item, shuffled

__all__ = ["Task", "choice_item", "items_of", "shuffled", "tasks", "to_reinforce"]


def tasks() -> dict[str, Task]:
    """All tasks by name: those made here, which need no network, then those of the Hub."""
    from lib.tasks import beyond, embedded, hub

    return {**embedded.TASKS, **beyond.TASKS, **hub.TASKS}


def to_reinforce(name: str) -> Task:
    """A task with items to learn from and others to test: by name, "gym:NAME", or a user's
    .jsonl file, of which a tenth is for tests. UserError where answers are not written, or there is
    nothing to learn from.
    """
    from lib.tasks import gym, own

    if name.startswith(gym.PREFIX):
        task = gym.gym_task(name)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        task = own.divided(own.jsonl(name))
    else:
        task = choose("task", name, tasks())
    if task.kind != "generate":
        raise UserError(f"task {name} is {task.kind}: only answers that are written are rewarded")
    if not task.items("train"):
        raise UserError(f"task {name} has nothing to learn from: it needs two items at least")
    return task


def items_of(name: str, split: str, limit: int | None = None) -> list[dict]:
    """The first `limit` items of a task's split (all of them for None)."""
    task = choose("task", name, tasks())
    items = task.items(choose("split", split, ("train", "test")))
    if not items:
        raise UserError(f"task {name} has no {split} split")
    return items[:limit]
