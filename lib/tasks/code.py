"""Programs as answers: what of an answer is code, and whether it passes the tests of its
question.
"""

import re

from lib.sandbox import run_python


def humaneval(row: dict, id: str) -> dict:
    """A row of HumanEval as a question whose answer is a program."""
    solution = f"```python\n{row['prompt']}{row['canonical_solution']}```"
    messages = [
        dict(role="user", content=f"Complete this Python program:\n```python\n{row['prompt']}```"),
        dict(role="assistant", content=solution),
    ]
    return dict(
        id=id,
        messages=messages,
        prompt=row["prompt"],
        test=row["test"],
        entry_point=row["entry_point"],
    )


def program_of(text: str) -> str:
    """The code of an answer: its first fenced block, closed or not, else all of it."""
    text = re.sub(r"<\|\w+\|>", "", text)
    fenced = re.search(r"```(?:[Pp]ython[3]?|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.S)
    return fenced[1] if fenced else text


def grade_humaneval(item: dict, text: str) -> bool:
    """Whether the program passes the item's tests in the sandbox.

    The prompt stays in front of it whole, with its imports and helper functions: an answer that
    defines the function asked for replaces the unfinished one, any other is taken for its body.
    """
    code = program_of(text)
    defines = re.search(rf"^(async )?def {re.escape(item['entry_point'])}\b", code, re.M)
    program = item["prompt"] + code
    if defines:
        program = item["prompt"].rstrip() + "\n    pass\n\n" + code
    return run_python(f"{program}\n\n{item['test']}\n\ncheck({item['entry_point']})\n").ok
