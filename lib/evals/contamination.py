"""Was the test in the training text? Long runs of words that both contain, counted per task."""

import re
from collections.abc import Iterable

import numpy as np

# words in a row, as GPT-3's authors did it (Brown et al. 2020, appendix C)
WORDS = 13
# an item shorter than WORDS is looked for as a whole, one shorter than this not at all
LEAST = 8
WORD = re.compile(r"\w+")
# odd, so that multiplying by it loses nothing
MIX = np.uint64(0x9E3779B97F4A7C15)


def _hashes(text: str) -> np.ndarray:
    """A 64-bit number per word, upper and lower case alike.

    By Python's own hash: another one in every process, which does no harm here.
    """
    words = WORD.findall(text.lower())
    hashes = np.array(list(map(hash, words)), np.int64)
    return hashes.view(np.uint64)


def _runs(words: np.ndarray, n: int) -> np.ndarray:
    """A number for each run of n words."""
    count = max(0, len(words) - n + 1)
    runs = np.zeros(count, np.uint64)
    if not count:
        return runs
    # a rolling hash: word after word, so that their order counts
    for i in range(n):
        runs = runs * MIX + words[i : i + count]
    return runs


class Index:
    """The runs of words that items are looked for by, by their length."""

    def __init__(self, tasks: dict[str, list[dict]], n: int):
        # (task, id) of each item that is looked for, and how many of each task are not
        self.owners: list[tuple[str, str]] = []
        self.short = dict.fromkeys(tasks, 0)

        # a number for every run of every item, with whose it is
        by_size: dict[int, list[tuple[int, np.ndarray]]] = {}
        for name, items in tasks.items():
            for item in items:
                words = _hashes(item["text"])
                if len(words) < min(LEAST, n):
                    self.short[name] += 1
                    continue
                size = min(n, len(words))
                number = len(self.owners)
                by_size.setdefault(size, []).append((number, _runs(words, size)))
                self.owners.append((name, item["id"]))
        # tables that a text's runs are looked up in, and what was found so far
        self.tables = {size: _table(entries) for size, entries in by_size.items()}
        self.hit = np.zeros(len(self.owners), bool)

    def look(self, text: str) -> None:
        """Mark the items that share a run with a text."""
        words = _hashes(text)
        for size, (runs, owner) in self.tables.items():
            # where in the table each of the text's runs would stand
            here = np.unique(_runs(words, size))
            first = np.searchsorted(runs, here, "left")
            last = np.searchsorted(runs, here, "right")
            # one run may belong to several items
            known = first < last
            for begin, end in zip(first[known], last[known]):
                self.hit[owner[begin:end]] = True


def _table(entries: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(runs in order, whose each is) of items and their runs."""
    items, by_item = zip(*entries)
    runs = np.concatenate(by_item)
    counts = [len(runs_of_item) for runs_of_item in by_item]
    owner = np.repeat(np.array(items, np.int32), counts)
    order = np.argsort(runs, kind="stable")
    return runs[order], owner[order]


def overlap(texts: Iterable[str], tasks: dict[str, list[dict]], n: int = WORDS) -> dict[str, dict]:
    """How many items of each task have n words in a row in common with a training text.

    {task: {"overlapping", "n", "short", "words", "items"}}.

    texts: a stream of training documents, read once and not kept. tasks: name -> items with "id"
    and "text", as `core.texts_of` and `questions.texts_of` give them; memory grows with these alone
    (some 12 bytes per word). Words are runs of letters and digits, in lower case. An item of LEAST
    to n - 1 words overlaps when all of it is found; shorter ones are counted as "short" and not
    looked for. "items" lists the ids found.
    """
    index = Index(tasks, n)
    for text in texts:
        index.look(text)

    # what was hit, counted by task
    counts = {}
    for name, items in tasks.items():
        counts[name] = dict(
            overlapping=0,
            n=len(items),
            short=index.short[name],
            words=n,
            items=[],
        )
    for (name, item), hit in zip(index.owners, index.hit):
        if hit:
            counts[name]["overlapping"] += 1
            counts[name]["items"].append(item)
    return counts
