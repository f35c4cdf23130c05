"""lib/tasks/code.py: a right program is right however its answer is written."""

import pytest

from lib.tasks.code import code_blocks, grade_humaneval, program_of

ITEM = dict(
    prompt='from math import floor\n\n\ndef half(n):\n    """Half of n, rounded down."""\n',
    entry_point="half",
    test="def check(candidate):\n    assert candidate(7) == 3\n    assert candidate(8) == 4\n",
)
RIGHT = "def half(n):\n    return floor(n / 2)\n"
WRONG = "def half(n):\n    return n / 2\n"
MAIN = '\nif __name__ == "__main__":\n    '


def fenced(code, info="python", fence="```", indent=""):
    lines = [f"{fence}{info}", *code.splitlines(), fence]
    return "\n".join(indent + line for line in lines) + "\n"


ANSWERS = {
    "py3": fenced(RIGHT, "py3"),
    "capitals": fenced(RIGHT, "PYTHON"),
    "a word behind the language": fenced(RIGHT, "python title=half.py"),
    "no language": fenced(RIGHT, ""),
    "tildes": fenced(RIGHT, fence="~~~"),
    "four backticks": fenced('"""\n```\n"""\n' + RIGHT, fence="````"),
    "in a list": "1. Write this:\n\n" + fenced(RIGHT, indent="   "),
    "far to the right": "Here it is:\n" + fenced(RIGHT, indent="      "),
    "after a blank line far to the right": "Here:\n\n" + fenced(RIGHT, indent="    "),
    "in a quotation": "".join(f"> {line}\n" for line in fenced(RIGHT).splitlines()),
    "never closed": "```python\n" + RIGHT,
    "behind a block of shell": fenced("pip install numpy", "bash") + fenced(RIGHT),
    "behind an unnamed block": fenced("$ python half.py") + fenced(RIGHT),
    "before an example": fenced(RIGHT) + "Use it so:\n" + fenced("print(half(7))"),
    "only the body": fenced("    return floor(n / 2)\n"),
    "without fences": RIGHT,
    "a main part that asks": fenced(RIGHT + MAIN + "print(half(int(input())))\n"),
    "a main part that leaves": fenced(RIGHT + "import sys\n" + MAIN + "sys.exit(0)\n"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_right_program_passes_however_it_is_written(name):
    assert grade_humaneval(ITEM, ANSWERS[name])


@pytest.mark.parametrize("name", ANSWERS)
def test_a_wrong_program_fails_however_it_is_written(name):
    wrong = ANSWERS[name].replace("floor(n / 2)", "n / 2")
    assert wrong != ANSWERS[name] and not grade_humaneval(ITEM, wrong)


def test_leaving_early_is_no_way_to_pass():
    assert not grade_humaneval(ITEM, fenced(WRONG + "import sys\nsys.exit(0)\n"))
    assert not grade_humaneval(ITEM, fenced("def check(f): pass\n" + WRONG))
    assert not grade_humaneval(ITEM, "I do not know.")


def test_blocks_have_a_language_and_the_asked_one_is_taken():
    text = fenced("ls", "Bash") + "and\n" + fenced("def f(): pass", "py") + fenced("x = 1", "")
    assert [(b.language, b.code) for b in code_blocks(text)] == [
        ("bash", "ls\n"),
        ("py", "def f(): pass\n"),
        ("", "x = 1\n"),
    ]
    assert program_of(text) == program_of(text, "f") == "def f(): pass\n"
    assert program_of(fenced("ls", "bash")) == "ls\n" and program_of("x = 2") == "x = 2"
