"""Was the test in the training text? Long runs of words that both contain, counted per task."""

import re
from collections.abc import Iterable

import numpy as np

WORDS = 13  # in a row, as GPT-3's authors did it (Brown et al. 2020, appendix C)
LEAST = 8  # an item shorter than WORDS is looked for as a whole, one shorter than this not at all
_WORD = re.compile(r"\w+")
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing


def _hashes(text: str):
    """A 64-bit number per word, upper and lower case alike. Python's own hash: another one in every process, which does no harm here."""
    return np.array([hash(word) for word in _WORD.findall(text.lower())], np.int64).view(np.uint64)


def _runs(words, n: int):
    """A number for each run of n words."""
    out = np.zeros(max(0, len(words) - n + 1), np.uint64)
    for i in range(n if out.size else 0):
        out = out * _MIX + words[i : i + len(out)]
    return out


def overlap(texts: Iterable[str], tasks: dict[str, list[dict]], n: int = WORDS) -> dict[str, dict]:
    """Per task {"overlapping", "n", "short", "words", "items"}: how many items have n words in a row in common with a training text.

    texts: a stream of training documents, read once and not kept. tasks: name -> items with "id" and "text", as `core.texts_of` and
    `chat.texts_of` give them; memory grows with these alone (some 12 bytes per word). Words are runs of letters and digits, in lower
    case. An item of LEAST to n - 1 words overlaps when all of it is found; shorter ones are counted as "short" and not looked for.
    "items" lists the ids found.
    """
    known, short, wanted = [], {name: 0 for name in tasks}, {}
    for name, items in tasks.items():
        for item in items:
            words = _hashes(item["text"])
            if len(words) < min(LEAST, n):
                short[name] += 1
                continue
            size = min(n, len(words))
            wanted.setdefault(size, []).append((len(known), _runs(words, size)))
            known.append((name, item["id"]))
    tables = {}
    for size, entries in wanted.items():
        runs = np.concatenate([runs for _, runs in entries])
        owner = np.concatenate([np.full(len(runs), k, np.int32) for k, runs in entries])
        order = np.argsort(runs, kind="stable")
        tables[size] = runs[order], owner[order]
    hit = np.zeros(len(known), bool)
    for text in texts:
        words = _hashes(text)
        for size, (runs, owner) in tables.items():
            found = np.unique(_runs(words, size))
            first, last = (
                np.searchsorted(runs, found, "left"),
                np.searchsorted(runs, found, "right"),
            )
            for a, b in zip(first[first < last], last[first < last]):
                hit[owner[a:b]] = True
    out = {
        name: dict(overlapping=0, n=len(items), short=short[name], words=n, items=[])
        for name, items in tasks.items()
    }
    for (name, item), found in zip(known, hit):
        if found:
            out[name]["overlapping"] += 1
            out[name]["items"].append(item)
    return out
