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
# files with fewer definitions are tables of numbers and names, not code
LINES_PER_DEF = 60
# of a context at most, and of a continuation
CONTEXT_LINES, NEXT_LINES = 12, 2
# the context is cut to whole lines of about so many; a continuation has at least so many
CONTEXT_CHARS, SHORTEST = 400, 24
CHOICES = 4
# how many, of about so many characters, so that one fits into a short row
PASSAGES, PASSAGE_CHARS = 2000, 700


def _depth(line: str) -> int:
    """How far a line is indented."""
    return len(line) - len(line.lstrip())


def _passages(document: str) -> list[tuple[str, str]]:
    """(context, next lines) wherever a text of code can be broken between two lines that both say
    something.
    """
    lines = document.expandtabs(8).splitlines(keepends=True)
    definitions = re.findall(r"^ *(?:def|class) ", document, re.M)
    if LINES_PER_DEF * len(definitions) < len(lines):
        return []

    passages = []
    for i in range(4, len(lines) - NEXT_LINES):
        # what comes next is code, and something stands right before it
        after = "".join(lines[i : i + NEXT_LINES])
        says_something = all(map(_is_plain, lines[i : i + NEXT_LINES]))
        if not says_something or len(after.strip()) < SHORTEST or not lines[i - 1].strip():
            continue

        # a question needs enough to go by
        context = _context(lines[max(0, i - CONTEXT_LINES) : i])
        if len(context) >= 2 * SHORTEST:
            passages.append((context, after.rstrip("\n")))
    return passages


def _is_plain(line: str) -> bool:
    """Whether a line begins with a name, is not too long, and has nothing but ASCII."""
    begins = re.match(r" *[A-Za-z_@]{2}", line)
    return begins is not None and len(line) < 100 and line.isascii()


def _context(lines: list[str]) -> str:
    """The last lines that fit into a context, whole."""
    context = ""
    for line in reversed(lines):
        if len(context) + len(line) > CONTEXT_CHARS:
            break
        context = line + context
    return context


def completion_items(split: str) -> list[dict]:
    """Items of the files that are held out from training (`data.documents("stdlib", "val")`).

    The wrong continuations are lines of other held-out files that are indented alike, so that the
    shape of the text gives nothing away.
    """
    if split != "test":
        return []
    # a few passages of each file, and a pool of continuations by how far they are indented
    rng, pool, asked = random.Random("code completion"), defaultdict(list), []
    for number, document in enumerate(data.documents("stdlib", "val")):
        passages = _passages(document)
        for context, after in rng.sample(passages, min(PER_FILE, len(passages))):
            pool[_depth(after)].append((number, after))
            asked.append((number, context, after))
    rng.shuffle(asked)

    items, seen = [], set()
    for number, context, after in asked:
        # wrong ones: of other files, each once
        alike = {text for other, text in pool[_depth(after)] if other != number}
        others = sorted(alike - {after})
        if len(others) < CHOICES - 1 or context + after in seen:
            continue
        seen.add(context + after)
        choices = [after, *rng.sample(others, CHOICES - 1)]
        rng.shuffle(choices)

        # named after what it says: the same item has the same name on another Python
        digest = hashlib.sha256("\0".join([context, *choices]).encode()).hexdigest()
        item = dict(
            id=f"code_completion/{digest[:12]}",
            context=context,
            choices=choices,
            gold=choices.index(after),
        )
        items.append(item)
    return items[:ITEMS]


def _cut(side: str) -> set[str]:
    """The files of one side of the standard library, cut between lines into passages of about one
    size.
    """
    cut = set()
    for document in data.documents("stdlib", side):
        passage = ""
        for line in document.splitlines(keepends=True):
            if passage and len(passage) + len(line) > PASSAGE_CHARS:
                cut.add(passage)
                passage = ""
            passage += line[:PASSAGE_CHARS]
        cut.add(passage)

    # the ends of files may be short
    return {passage for passage in cut if len(passage) > PASSAGE_CHARS // 2}


def passages(split: str) -> list[dict]:
    """Passages drawn at random: mixed into fine-tuning, they keep a model from forgetting its text.
    None is in both splits.
    """
    # files share licences and the like
    if split == "train":
        texts, size = sorted(_cut("train")), PASSAGES
    else:
        texts, size = sorted(_cut("val") - _cut("train")), ITEMS
    drawn = random.Random(split).sample(texts, min(size, len(texts)))
    return [dict(id=f"source_text/{split}/{i}", text=text) for i, text in enumerate(drawn)]


TASKS: dict[str, Task] = {
    "source_text": Task("perplexity", functools.cache(passages), None),
    "code_completion": Task("likelihood", completion_items, 1 / CHOICES),
}
