"""Tasks from reasoning_gym (an extra): a hundred generators of puzzles, by "gym:NAME".

The package scores an answer itself, but pays a little for wrong ones and may raise on odd ones.
What is paid for is learnt, so an answer is right here where it says what the set's own answer says,
and nothing else. Sets that have many right answers are underpaid by that: give such a set a reward
of its own, FILE.py:FUNCTION, by what the item tells under "metadata".
"""

import functools
import re
from difflib import get_close_matches

from lib.files import UserError
from lib.tasks.answers import bare, said
from lib.tasks.items import Task
from lib.tasks.rewards import only_this_number

PREFIX = "gym:"
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
# as in lib.tasks.embedded
TRAIN_ITEMS, TEST_ITEMS = 4_000, 500
# the seeds of both splits: item i is drawn by seed + i, so they are far apart
SEEDS = {"train": 0, "test": 1_000_000}


def gym_task(name: str) -> Task:
    """The task "gym:NAME" of reasoning_gym's dataset NAME; UserError where there is none."""
    check_name(name)
    return Task(
        "generate", functools.cache(functools.partial(gym_items, name)), grade=says_the_same
    )


def gym_items(name: str, split: str) -> list[dict]:
    """Items of one split; no test question is among the training questions."""
    dataset = name.removeprefix(PREFIX)
    items = _drawn(dataset, split)
    if split == "test":
        asked = {item["messages"][0]["content"] for item in _drawn(dataset, "train")}
        items = [item for item in items if item["messages"][0]["content"] not in asked]
    return items


@functools.cache
def _drawn(dataset: str, split: str) -> list[dict]:
    """What the generator draws for a split, each question once."""
    size = TRAIN_ITEMS if split == "train" else TEST_ITEMS
    entries = _gym().create_dataset(dataset, size=size, seed=SEEDS[split])
    items = {}
    for i, entry in enumerate(entries):
        question, answer = entry["question"], str(entry["answer"])
        asked = dict(role="user", content=question)
        items.setdefault(
            question,
            dict(
                id=f"{PREFIX}{dataset}/{split}/{i}",
                answer=answer,
                messages=[asked, dict(role="assistant", content=answer)],
                metadata=entry["metadata"],
            ),
        )
    return list(items.values())


def _gym():
    """The package; UserError says how it is installed."""
    try:
        import reasoning_gym  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UserError("gym: tasks need reasoning_gym: pip install reasoning_gym") from e
    return reasoning_gym


def check_name(name: str):
    """UserError unless reasoning_gym has the dataset of "gym:NAME"."""
    known = _gym().factory.DATASETS
    dataset = name.removeprefix(PREFIX)
    if dataset not in known:
        near = ", ".join(get_close_matches(dataset, known, 3, 0)) or "none"
        raise UserError(f"reasoning_gym has no dataset {dataset}: near to it are {near}")


def says_the_same(item: dict, answer: str) -> bool:
    """Whether the answer says the item's number and no other; or, where that is no number, the
    item's words and nothing else.
    """
    wanted = bare(item["answer"])
    if NUMBER.fullmatch(wanted):
        return only_this_number(item, answer)
    return bool(wanted) and bare(said(answer)) == wanted
