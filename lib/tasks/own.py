"""A task from a file of the user's own: one JSON object a line, in the forms that people's files
have.
"""

from dataclasses import replace
from functools import partial
from string import ascii_uppercase

from lib.data.chats import messages_of
from lib.data.readers import json_lines
from lib.files import UserError, local_path
from lib.tasks.answers import MATCH, number_after_mark, said, sole_number
from lib.tasks.code import grade_humaneval, humaneval
from lib.tasks.embedded import held_out
from lib.tasks.items import Task, choice_item

# the keys by which a line of HumanEval's file is known
PROGRAM_KEYS = {"prompt", "test", "entry_point", "canonical_solution"}
FORMS = (
    'expected "question" or "context" with "choices" and "answer", "question" with "answer",'
    ' "messages", or "text"'
)


def jsonl(path) -> Task:
    """A task from a file of one JSON object a line, all of the same shape.

    choice      {"question", "choices", "answer"}: answered by a letter. answer: a choice's index,
                text or letter
    generate    {"question", "answer"}: the model writes. answer: text, or a list of them; "match"
                is exact (case, white space and final stops apart), contains or number (the last one
                written). "messages" may stand for "question". An answer with "#### 18" is a number,
                as GSM8K has it
    generate    {"prompt", "canonical_solution", "test", "entry_point"}: a program, as in HumanEval
    likelihood  {"context", "choices", "answer"}: which continuation is likelier
    perplexity  {"text"}, or a chat in any form of `read_chats`: of what the assistant says

    An "id" may be given, else it is the line's number. UserError names the file and line of
    anything else.
    """
    path = local_path(path)
    items, kind, seen = [], None, set()
    for line, record in json_lines(path):
        try:
            this, item = own_item(record)
            item["id"] = _id_of(record, f"{path.stem}/{line}")

            # what the lines above do not allow
            if item["id"] in seen:
                raise ValueError(f"the id {item['id']!r} is taken by an earlier line")
            if kind is not None and this != kind:
                raise ValueError(
                    f"a {this} item, but the lines above are {kind} items: make a file of each"
                )
        except (UserError, ValueError, KeyError, TypeError, AttributeError) as e:
            why = f"{e.args[0]!r} is missing" if isinstance(e, KeyError) else e
            raise UserError(f"{path}, line {line}: {why}") from None
        kind = this
        seen.add(item["id"])
        items.append(item)
    if kind is None:
        raise UserError(f"{path} has no items: write one JSON object a line")
    baseline = None if kind == "perplexity" else 0.0
    grade = grade_own if kind == "generate" else None
    return Task(kind, partial(own_split, items), baseline, grade)


def _id_of(record, default: str) -> str:
    """The id that a line gives itself, as HumanEval's lines do too."""
    if not isinstance(record, dict):
        return default
    id = record.get("id", record.get("task_id"))
    return default if id is None else str(id)


def divided(task: Task) -> Task:
    """A user's task with some of its items to learn from: one in ten is for tests, by the hash of
    its id, and at least one of each.
    """
    items = task.items("test")
    for_tests = [item for item in items if held_out(item["id"])] or items[:1]
    chosen = {item["id"] for item in for_tests}
    to_learn = [item for item in items if item["id"] not in chosen]
    splits = dict(train=to_learn, test=for_tests)
    return replace(task, items=splits.__getitem__)


def own_split(items: list[dict], split: str) -> list[dict]:
    """All of a file's items are for testing."""
    return items if split == "test" else []


def grade_own(item: dict, text: str) -> bool:
    """What was said after the last use of a tool, against each accepted answer; or a program, by
    its tests.
    """
    if "entry_point" in item:
        return grade_humaneval(item, text)
    return any(MATCH[item["match"]](said(text), wanted) for wanted in item["answers"])


def own_item(record) -> tuple[str, dict]:
    """(kind, item without an id) of a line of a user's file; ValueError, KeyError or TypeError says
    what is wrong with it.
    """
    if isinstance(record, list):
        return _chat(record)
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    if "choices" in record:
        return _choice(record)
    if PROGRAM_KEYS <= record.keys():
        return "generate", humaneval(record, "")
    if "answer" in record:
        return "generate", _question(record)
    if "messages" in record or "conversations" in record:
        return _chat(record)
    if "text" in record:
        return "perplexity", dict(text="\n".join(texts(record["text"], "text")))
    raise ValueError(FORMS)


def texts(value, what: str) -> list[str]:
    """A text or a list of texts as a list; ValueError for anything else."""
    values = [value] if isinstance(value, str) else value
    sound = isinstance(values, list) and len(values) > 0
    if not sound or not all(isinstance(text, str) and text.strip() for text in values):
        raise ValueError(f"{what} must be text, or a list of texts, none of them empty")
    return values


def _choice(record: dict) -> tuple[str, dict]:
    """A question to answer by a letter, or a context to go on from."""
    is_question = "question" in record
    asked = record["question"] if is_question else record["context"]
    (context,) = texts(asked, "question or context")
    options = texts(record["choices"], "choices")
    gold = _gold(record["answer"], options)
    if is_question:
        return "choice", choice_item("", context, options, gold)

    # a continuation begins with a blank, which is part of its first token
    choices = [option if option[0].isspace() else " " + option for option in options]
    return "likelihood", dict(context=context, choices=choices, gold=gold)


def _gold(answer, options: list[str]) -> int:
    """The index of the right option, which is given by index, text or letter."""
    count = len(options)
    gold = answer
    if answer in options:
        gold = options.index(answer)
    elif isinstance(answer, str) and len(answer) == 1:
        gold = ascii_uppercase[:count].find(answer)

    # True is an int, too
    is_index = type(gold) is int and 0 <= gold < count
    if not is_index or not 2 <= count <= 26:
        raise ValueError(
            f"answer {answer!r} is none of the {count} choices, by index from 0, text or letter "
            "(2 to 26 are needed)"
        )
    return gold


def _question(record: dict) -> dict:
    """A question that the model answers in its own words."""
    answers = texts(record["answer"], "answer")
    reference, match = answers[0], record.get("match", "exact")

    # a solution with its result behind ####, as GSM8K has it
    results = [number_after_mark(answer) for answer in answers]
    if "match" not in record and None not in results:
        answers = [answer.partition("####")[2].strip() for answer in answers]
        match = "number"
    if match not in MATCH:
        raise ValueError(f"match {match!r} is none of {', '.join(MATCH)}")
    for answer in answers:
        if match == "number" and sole_number(answer) is None:
            raise ValueError(
                f'answer {answer!r} is no single number: give it alone, with "match": "exact"'
            )

    # asked in a chat, or alone
    if record.get("messages"):
        messages = messages_of(record)
    else:
        (question,) = texts(record["question"], "question")
        messages = [dict(role="user", content=question.strip())]
    if messages[-1]["role"] != "user":
        raise ValueError("messages must end with the user's: the model writes what follows")
    return dict(
        messages=[*messages, dict(role="assistant", content=reference)],
        answer=answers[0],
        answers=answers,
        match=match,
    )


def _chat(record) -> tuple[str, dict]:
    """A chat of which the assistant's part is measured."""
    messages = messages_of(record)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message is the assistant's, so there is nothing to measure")
    return "perplexity", dict(messages=messages)
