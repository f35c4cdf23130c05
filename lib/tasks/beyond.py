"""Tasks that no mixture teaches: a little beyond what fine-tuning showed, for reinforcement.

The model has seen sums of two or three numbers of at most four digits. Here are longer ones, put in
the same words and solved with the same calculator: it can find the way by itself, where it is told
which of its tries were right.
"""

import functools
from collections.abc import Callable
from random import Random

from lib.sandbox import calculator
from lib.tasks.embedded import (
    ASK,
    PEOPLE,
    RESULT,
    THINGS,
    call,
    make_items,
    random_number,
    text,
)
from lib.tasks.items import Task
from lib.tasks.rewards import only_this_number

# how many numbers a sum has, and their digits
KINDS = [(4, (2, 3, 4)), (3, (5, 6, 7))]


def arithmetic_beyond(rng: Random, split: str):
    """Sums of four numbers, or of three with five to seven digits: as `make_items` has it."""
    count, digits = rng.choice(KINDS)
    numbers = [random_number(rng, rng.choice(digits)) for _ in range(count)]
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


# stories of two steps, with what is to be calculated
TWO_STEPS = [
    (
        "{a}+{b}-{c}",
        "{who} has {a} {things}, finds {b} more and gives away {c}. How many are left?",
    ),
    (
        "{a}*{b}-{c}",
        "{who} buys {a} bags of {b} {things} each and loses {c}. How many {things} are left?",
    ),
    (
        "{a}*{b}+{c}",
        "A box holds {a} {things}. {who} has {b} boxes and {c} {things} more. "
        "How many {things} is that?",
    ),
    (
        "({a}+{b})*{c}",
        "There are {a} {things} in one bag and {b} in another. {who} has {c} of each. "
        "How many {things} is that?",
    ),
    (
        "({a}+{b})//{c}",
        "{who} puts {a} {things} to {b} others and shares them evenly among {c} friends. "
        "How many does each get?",
    ),
]


def two_steps(rng: Random, split: str):
    """A word problem that takes two operations, through one call: as `make_items` has it."""
    a = random_number(rng, rng.choice([2, 3]))
    b = random_number(rng, rng.choice([1, 2]))
    c = rng.randint(2, 9)
    formula, story = rng.choice(TWO_STEPS)
    names = dict(things=rng.choice(THINGS), who=rng.choice(PEOPLE))
    expression = formula.format(a=a, b=b, c=c)
    value = calculator(expression)
    # nobody loses more than there is
    if value is None or value.startswith("-"):
        return None
    answer = [*call(expression, value), text(rng.choice(RESULT).format(value))]
    question = story.format(a=a, b=b, c=c, **names)
    return f"{sorted((a, b, c))}", question, answer, value


def _task(name: str, one: Callable) -> Task:
    """A task whose items are made when they are first asked for, paid for by the number alone."""
    items = functools.cache(functools.partial(make_items, name, one, 4_000))
    return Task("generate", items, grade=only_this_number)


TASKS: dict[str, Task] = {
    "arithmetic_beyond": _task("arithmetic_beyond", arithmetic_beyond),
    # of another form than what is taught: give it a little fine-tuning first, as docs/rl.md has it
    "two_steps": _task("two_steps", two_steps),
}
