"""Tasks that no mixture teaches: a little beyond what fine-tuning showed, for reinforcement.

The model has seen sums of two or three numbers of at most four digits. Here are longer ones, put in
the same words and solved with the same calculator: it can find the way by itself, where it is told
which of its tries were right.
"""

import functools
from random import Random

from lib.sandbox import calculator
from lib.tasks.embedded import ASK, RESULT, call, make_items, random_number, text
from lib.tasks.items import Task
from lib.tasks.rewards import only_this_number

# digits of the numbers in sums of four and more, and in sums of two
FEW_DIGITS, MANY_DIGITS = (1, 2, 3), (5, 6, 7)


def arithmetic_beyond(rng: Random, split: str):
    """Sums of four to six numbers, or of two with five to seven digits: as `make_items` has it."""
    if rng.random() < 0.5:
        numbers = [random_number(rng, rng.choice(FEW_DIGITS)) for _ in range(rng.randint(4, 6))]
    else:
        numbers = [random_number(rng, rng.choice(MANY_DIGITS)) for _ in range(2)]
    signs = [rng.choice("+-") for _ in numbers[1:]]

    # written with blanks, or without
    spaced = tight = str(numbers[0])
    for sign, number in zip(signs, numbers[1:]):
        spaced += f" {sign} {number}"
        tight += f"{sign}{number}"
    question = rng.choice(ASK).format(rng.choice([spaced, spaced, tight]))
    value = calculator(tight)
    answer = [*call(tight, value), text(rng.choice(RESULT).format(value))]
    return f"{sorted(numbers)}", question, answer, str(value)


TASKS: dict[str, Task] = {
    "arithmetic_beyond": Task(
        "generate",
        functools.cache(
            functools.partial(make_items, "arithmetic_beyond", arithmetic_beyond, 4_000)
        ),
        grade=only_this_number,
    )
}
