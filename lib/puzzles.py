"""The puzzles of the chapters: a function to write, and cases that say whether it is right.

A puzzle that is not solved yet is told so and stops nothing, so that *Run all* goes on.
"""

import math
from collections.abc import Callable

from lib.files import choose

# puzzle: (arguments, the right answer) of each case
PUZZLES: dict[str, list[tuple[tuple, object]]] = {
    # 01: join each occurrence of a pair of neighbours in a word, from the left
    "merge": [
        (((b"l", b"o", b"w"), (b"l", b"o")), (b"lo", b"w")),
        (((b"b", b"a", b"n", b"a", b"n", b"a"), (b"a", b"n")), (b"b", b"an", b"an", b"a")),
        (((b"a", b"a", b"a"), (b"a", b"a")), (b"aa", b"a")),
        (((b"x",), (b"x", b"y")), (b"x",)),
    ],
    # 02: may the query at position t see the key at position s, with a window?
    "mask": [
        ((3, 3, 2), True),
        ((3, 1, 2), True),
        ((3, 0, 2), False),
        ((3, 4, 2), False),
        ((3, 0, None), True),
    ],
    # 04: bits per byte from the loss in nats of each token and the bytes that each stands for
    "bits": [
        (([math.log(2)], [1]), 1.0),
        (([math.log(2), math.log(2)], [1, 3]), 0.5),
        # a special token stands for no byte: neither its loss nor its length counts
        (([math.log(2), 5.0], [1, 0]), 1.0),
    ],
}


def check(name: str, solution: Callable) -> bool:
    """Try a solution on the puzzle's cases, print how it went, and return whether all are right."""
    for arguments, right in choose("puzzle", name, PUZZLES):
        asked = f"{name}({', '.join(map(repr, arguments))})"
        try:
            answer = solution(*arguments)
        except Exception as e:  # any mistake of a beginner is one line, not a traceback
            print(f"not yet: {asked} stops with {type(e).__name__}: {e}")
            return False
        if not _same(answer, right):
            print(f"not yet: {asked} gives {answer!r}, and should give {right!r}")
            return False
    print(f"right: all {len(PUZZLES[name])} cases of {name}")
    return True


def _same(answer, right) -> bool:
    # a number of numpy or jax is as good as Python's
    if getattr(answer, "ndim", None) == 0:
        answer = answer.item()
    if isinstance(right, float):
        return isinstance(answer, int | float) and math.isclose(answer, right, rel_tol=1e-6)
    return type(answer) is type(right) and answer == right
