"""What a task is, and the forms of its items that several tasks share."""

from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_uppercase

from lib.files import UserError


@dataclass(frozen=True)
class Task:
    """One source of conversations or questions.

    items(split) gives the list of items of "train" or "test", always the same ones in the same
    order; it raises UserError where the data cannot be had. Every item is a dict with a unique "id"
    and, by kind:

    generate    "messages" (the last one is the assistant's reference answer); the model writes its
                own, with tools, and grade(item, text) says whether that is right. `text` is what it
                wrote, tool calls and their results included as plain text.
    choice      "messages", "letters" and "gold" (an index): the likeliest of the letters as first
                token of the answer is taken
    likelihood  "context", "choices" (continuations) and "gold": the choice with the highest mean
                log-likelihood is taken
    perplexity  "messages" or "text": the loss on what an assistant should say, or on all of a text

    baseline: accuracy of random answers, 0 to 1; None for perplexity.
    """

    kind: str
    items: Callable[[str], list[dict]]
    baseline: float | None = 0.0
    grade: Callable[[dict, str], bool] | None = None


def choice_item(
    id: str, question: str, options: list[str], gold: int, letters=None, **more
) -> dict:
    """A multiple choice question as a chat whose answer is one letter.

    A letter stands behind its option, for a model that finds an option reads on to its letter, and
    behind "=" with no blank, for " A" and "A" are different tokens and the answer begins with "A".
    White space around question and options is dropped.
    """
    letters = list(letters or ascii_uppercase[: len(options)])
    fitting = len(letters) == len(set(letters)) == len(options)
    if not fitting or not 0 <= gold < len(options):
        raise ValueError(f"{len(options)} options, letters {letters}, answer {gold}")

    # one option a line, its letter behind it
    question = question.strip()
    options = [option.strip() for option in options]
    lines = "".join(f"- {option}={letter}\n" for option, letter in zip(options, letters))
    asked = f"{question}\n\n{lines}\nAnswer with the letter alone."
    messages = [dict(role="user", content=asked), dict(role="assistant", content=letters[gold])]
    return dict(
        id=id,
        messages=messages,
        letters=letters,
        gold=gold,
        question=question,
        options=options,
        **more,
    )


def shuffled(item: dict, order: list[int]) -> dict:
    """A choice or likelihood item with its options in another order: option i is the old
    order[i].
    """
    gold = order.index(item["gold"])

    # likelihood: there may be a context for each option
    if "letters" not in item:
        context = item["context"]
        if isinstance(context, list):
            context = [context[i] for i in order]
        choices = [item["choices"][i] for i in order]
        return item | dict(context=context, choices=choices, gold=gold)

    # choice: the letters stay where they are
    if "options" not in item:
        raise UserError(
            f"item {item['id']} does not tell its options apart, so their order cannot be changed"
        )
    options = [item["options"][i] for i in order]
    return item | choice_item(item["id"], item["question"], options, gold, item["letters"])
