"""The running Python's sources as tasks: which lines come next in a file that training never saw,
and passages, to go on reading.
"""

import functools
import hashlib
import random
import re
from collections import defaultdict

from lib import data
from lib.tasks.items import Task

ITEMS = 400
PER_FILE = 16
LINES_PER_DEF = 60  # files with fewer definitions are tables of numbers and names, not code
CONTEXT_LINES, NEXT_LINES = 12, 2
# the context is cut to whole lines of about so many; a continuation has at least so many
CONTEXT_CHARS, SHORTEST = 400, 24
CHOICES = 4
# how many, of about so many characters, so that one fits into a short row
PASSAGES, PASSAGE_CHARS = 2000, 700


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _passages(document: str) -> list[tuple[str, str]]:
    """(context, next lines) wherever a text of code can be broken between two lines that both say
    something.
    """
    lines, found = document.expandtabs(8).splitlines(keepends=True), []
    if LINES_PER_DEF * len(re.findall(r"^ *(?:def|class) ", document, re.M)) < len(lines):
        return []
    for i in range(4, len(lines) - NEXT_LINES):
        after = lines[i : i + NEXT_LINES]
        plain = all(
            re.match(r" *[A-Za-z_@]{2}", line) and len(line) < 100 and line.isascii()
            for line in after
        )
        if plain and len("".join(after).strip()) >= SHORTEST and lines[i - 1].strip():
            context = ""
            for line in reversed(lines[max(0, i - CONTEXT_LINES) : i]):
                if len(context) + len(line) > CONTEXT_CHARS:
                    break
                context = line + context
            if len(context) >= 2 * SHORTEST:
                found.append((context, "".join(after).rstrip("\n")))
    return found


def completion_items(split: str) -> list[dict]:
    """Items of the files that are held out from training (`data.documents("stdlib", "val")`).

    The wrong continuations are lines of other held-out files that are indented alike, so that the
    shape of the text gives nothing away.
    """
    if split != "test":
        return []
    rng, pool, asked = random.Random("code completion"), defaultdict(list), []
    for number, document in enumerate(data.documents("stdlib", "val")):
        found = _passages(document)
        for context, after in rng.sample(found, min(PER_FILE, len(found))):
            pool[_depth(after)].append((number, after))
            asked.append((number, context, after))
    rng.shuffle(asked)
    items, seen = [], set()
    for number, context, after in asked:
        others = sorted({text for other, text in pool[_depth(after)] if other != number} - {after})
        if len(others) >= CHOICES - 1 and context + after not in seen:
            seen.add(context + after)
            choices = [after, *rng.sample(others, CHOICES - 1)]
            rng.shuffle(choices)
            digest = hashlib.sha256("\0".join([context, *choices]).encode()).hexdigest()[:12]
            items.append(
                dict(
                    id=f"code_completion/{digest}",
                    context=context,
                    choices=choices,
                    gold=choices.index(after),
                )
            )
    return items[:ITEMS]


def _cut(side: str) -> set[str]:
    """The files of one side of the standard library, cut between lines into passages of about one
    size.
    """
    found = set()
    for document in data.documents("stdlib", side):
        passage = ""
        for line in document.splitlines(keepends=True):
            if passage and len(passage) + len(line) > PASSAGE_CHARS:
                found.add(passage)
                passage = ""
            passage += line[:PASSAGE_CHARS]
        found.add(passage)
    return {p for p in found if len(p) > PASSAGE_CHARS // 2}


def passages(split: str) -> list[dict]:
    """Passages drawn at random: mixed into fine-tuning, they keep a model from forgetting its text.
    None is in both splits.
    """
    # files share licences and the like
    found = _cut("train") if split == "train" else _cut("val") - _cut("train")
    found, size = sorted(found), PASSAGES if split == "train" else ITEMS
    return [
        dict(id=f"source_text/{split}/{i}", text=p)
        for i, p in enumerate(random.Random(split).sample(found, min(size, len(found))))
    ]


TASKS: dict[str, Task] = {
    "source_text": Task("perplexity", functools.cache(passages), None),
    "code_completion": Task("likelihood", completion_items, 1 / CHOICES),
}
