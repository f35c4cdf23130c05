"""Programs as answers: what of an answer is code, and whether it passes the tests of its
question.
"""

import re
from typing import NamedTuple

from markdown_it import MarkdownIt

from lib.sandbox import run_python


def humaneval(row: dict, id: str) -> dict:
    """A row of HumanEval as a question whose answer is a program."""
    prompt = row["prompt"]
    question = f"Complete this Python program:\n```python\n{prompt}```"
    solution = f"```python\n{prompt}{row['canonical_solution']}```"
    messages = [
        dict(role="user", content=question),
        dict(role="assistant", content=solution),
    ]
    return dict(
        id=id,
        messages=messages,
        prompt=prompt,
        test=row["test"],
        entry_point=row["entry_point"],
    )


class CodeBlock(NamedTuple):
    """A block of code in an answer. language: the first word behind its fence, in lower case."""

    language: str
    code: str


def code_blocks(text: str) -> list[CodeBlock]:
    """The fenced blocks of a text as Markdown reads them, in order; the last may be left open.

    Fences of backticks or tildes, in lists and quotations, and, unlike in Markdown, however far
    they are indented.
    """
    # a fence far to the right would go on with the paragraph above it
    text = re.sub(r"(?m)^(?=(?: {4}|\t)[ \t]*(?:```|~~~))", "\n", text)
    # blocks that are code by their indentation alone are nothing that a model writes
    tokens = MarkdownIt("commonmark").disable("code").parse(text)
    blocks = []
    for token in tokens:
        if token.type == "fence":
            words = token.info.lower().split()
            blocks.append(CodeBlock(words[0] if words else "", token.content))
    return blocks


def defines(code: str, name: str) -> bool:
    """Whether a program defines a function of that name."""
    return re.search(rf"^(async )?def {re.escape(name)}\b", code, re.M) is not None


def program_of(text: str, entry_point: str = "") -> str:
    """The code of an answer: the block that defines the function asked for.

    Else the first block that is of no other language than Python; without blocks all of it.
    """
    text = re.sub(r"<\|\w+\|>", "", text)
    blocks = code_blocks(text)
    if not blocks:
        return text

    # what was asked for, else what may be Python, else whatever comes first
    if entry_point:
        for block in blocks:
            if defines(block.code, entry_point):
                return block.code
    for block in blocks:
        if not block.language or block.language.startswith("py"):
            return block.code
    return blocks[0].code


def grade_humaneval(item: dict, text: str) -> bool:
    """Whether the program passes the item's tests in the sandbox.

    The prompt stays in front of it whole, with its imports and helper functions: an answer that
    defines the function asked for replaces the unfinished one, any other is taken for its body. As
    in the official check the program is not the main one, so that a main part, which may ask for
    input or leave, does not run.
    """
    name = item["entry_point"]
    code = program_of(text, name)

    # "pass" ends the unfinished function, which a whole answer then replaces
    program = item["prompt"] + code
    if defines(code, name):
        program = item["prompt"].rstrip() + "\n    pass\n\n" + code
    tested = f"{program}\n\n{item['test']}\n\ncheck({name})\n"
    return run_python(tested, name="solution").ok
