"""What a model can be taught and asked: every task's data, rendering and grading, by name.

The same entry serves fine-tuning (its train split is a part of a mixture) and evaluation (its test split).
"""

from collections.abc import Callable
from dataclasses import dataclass

from lib.files import UserError, choose


@dataclass(frozen=True)
class Task:
    """One source of conversations or questions.

    items(split) gives the list of items of "train" or "test", always the same ones in the same order; it raises UserError where the
    data cannot be had. Every item is a dict with a unique "id" and, by kind:

    generate    "messages" (the last one is the assistant's reference answer); the model writes its own, with tools, and grade(item, text)
                says whether that is right. `text` is what it wrote, tool calls and their results included as plain text.
    choice      "messages", "letters" and "gold" (an index): the likeliest of the letters as first token of the answer is taken
    likelihood  "context", "choices" (continuations) and "gold": the choice with the highest mean log-likelihood is taken
    perplexity  "messages" or "text": the loss on what an assistant should say, or on all of the text

    baseline: accuracy of random answers, 0 to 1; None for perplexity.
    """

    kind: str
    items: Callable[[str], list[dict]]
    baseline: float | None = 0.0
    grade: Callable[[dict, str], bool] | None = None


def tasks() -> dict[str, Task]:
    """All tasks by name: those made here, which need no network, then those of the Hugging Face Hub."""
    from lib.tasks import embedded, hub

    return {**embedded.TASKS, **hub.TASKS}


def items_of(name: str, split: str, limit: int | None = None) -> list[dict]:
    """The first `limit` items of a task's split (all of them for None)."""
    found = choose("task", name, tasks()).items(choose("split", split, ("train", "test")))
    if not found:
        raise UserError(f"task {name} has no {split} split")
    return found[:limit]
