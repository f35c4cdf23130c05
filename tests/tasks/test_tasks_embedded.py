"""Embedded tasks: nothing of a test is in training, answers are right, and grading takes what is"
" right and nothing else."""

import ast
import collections
import re
from decimal import Decimal

import pytest

from lib.sandbox import calculator
from lib.tasks import embedded, items_of
from lib.tasks.answers import last_number
from lib.tasks.embedded import TASKS

each_task = pytest.mark.parametrize("name", TASKS)


def written(parts) -> str:
    """What a model that answers with these parts would write, as the evaluation decodes it."""
    around = {
        "text": "{}",
        "python": "<|python_start|>{}<|python_end|>",
        "python_output": "<|output_start|>{}<|output_end|>",
    }
    return "".join(around[p["type"]].format(p["text"]) for p in parts)


def asked(item):
    return item["messages"][-2]["content"]


def reference(item):
    return written(item["messages"][-1]["content"])


@each_task
def test_splits_are_the_same_each_time_and_share_nothing(name):
    train, test = (items_of(name, split) for split in ("train", "test"))
    again = (
        embedded.dialogues.__wrapped__("test")
        if name == "dialogues"
        else TASKS[name].items.__wrapped__("test")
    )
    assert test == again and len(test) >= 200 and len(train) >= 1000
    assert len({item["id"] for item in train + test}) == len(train) + len(test)
    if name != "dialogues":
        assert not {item["about"] for item in train} & {item["about"] for item in test}
        assert len({item["about"] for item in test}) == len(test)  # independent questions
    assert not {asked(item) for item in train} & {asked(item) for item in test}


def test_words_of_tests_are_in_no_training_item():
    tested = {
        item["about"]
        for name in ("spelling", "counting", "strings")
        for item in items_of(name, "test")
    }
    for name in ("spelling", "counting", "strings"):
        for item in items_of(name, "train"):
            assert not tested & {item["about"], *re.findall(r"[\"'](\w+)[\"']", asked(item))}, item


def test_common_words_of_tests_begin_coined_ones():
    """A common word is one token, whose letters are known only where it was spelled."""
    spelled = set()
    for name in ("spelling", "counting", "strings"):
        spelled |= {item["about"] for item in items_of(name, "train")}
    # of each word that is longer, its beginnings of whole words
    begun = {word[:end] for word in spelled for end in range(3, len(word))}
    common = embedded.words()[: embedded.COMMONEST]
    tested = [word for word in common if embedded.held_out(word)]
    known = sum(word in begun for word in tested)
    assert len(tested) > 100 and known > 0.97 * len(tested)
    assert not spelled & set(tested)


def test_dialogues_are_made_of_items_of_their_own_split():
    for split in ("train", "test"):
        known = {
            asked(item) for name in TASKS if name != "dialogues" for item in items_of(name, split)
        }
        for item in items_of("dialogues", split)[:300]:
            assert {m["content"] for m in item["messages"] if m["role"] == "user"} <= known


@each_task
def test_reference_answers_are_right_and_others_are_not(name):
    grade, items = TASKS[name].grade, items_of(name, "test") + items_of(name, "train")[:500]
    for item in items:
        assert grade(item, reference(item)) and grade(
            item, reference(item) + "<|assistant_end|>"
        ), item
        assert not grade(item, "") and not grade(item, "I do not know.")
    if name not in ("identity", "dialogues"):  # to say the question back is no answer
        assert sum(grade(item, asked(item)) for item in items) / len(items) < 0.05
    others = [grade(item, reference(other)) for item, other in zip(items, items[1:])]
    assert sum(others) / len(others) < 0.4


@each_task
def test_every_tool_call_is_one_that_the_calculator_answers_so(name):
    calls = 0
    for item in items_of(name, "test") + items_of(name, "train")[:2000]:
        parts = [p for m in item["messages"][1::2] for p in m["content"]]
        for made, answered in zip(parts, parts[1:]):
            if made["type"] == "python":
                assert calculator(made["text"]) == answered["text"], made
                calls += 1
    assert (calls > 500) == (name in ("arithmetic", "counting", "dialogues"))


def test_answers_are_true():
    for item in items_of("spelling", "test"):
        assert "".join(item["answer"].split()) == item["about"]
    for item in items_of("counting", "test"):
        letter = re.search(r'\.count\("(\w)"\)', reference(item))[1]
        assert re.search(rf"\b{letter}(s|'s|\b)", asked(item).replace(item["about"], ""))
        assert item["about"].count(letter) == int(item["answer"])
    counts = collections.Counter(item["answer"] for item in items_of("counting", "test"))
    # always saying the commonest is no success
    assert counts.most_common(1)[0][1] < 0.45 * sum(counts.values())
    for item in items_of("strings", "test"):
        word = item["about"]
        expected = {
            word[::-1],
            word.upper(),
            word[0],
            word[-1],
            f"{len(word)}letters",
        }
        if re.search(r"\d times", asked(item)):
            times = int(re.search(r"(\d) times", asked(item))[1])
            assert item["answer"].split() == [word] * times
            continue
        given = item["answer"].replace(" ", "")
        assert given in expected or (given.startswith(word) and given[len(word) :] in asked(item))


def test_facts_are_those_of_the_running_python():
    import builtins
    import keyword

    checked = collections.Counter()
    for item in items_of("pyfacts", "train"):
        stated = reference(item)
        if match := re.fullmatch(r'(Yes|No), "(\w+)" is (not )?(a keyword|built in)\.', stated):
            is_one = (
                keyword.iskeyword(match[2])
                if match[4] == "a keyword"
                else hasattr(builtins, match[2])
            )
            assert is_one == (match[1] == "Yes") == (not match[3])
        elif match := re.fullmatch(r"(.+) is of type (\w+)\.", stated):
            assert type(ast.literal_eval(match[1])).__name__ == match[2]
        elif match := re.fullmatch(r"(\w+) is in the module ([\w.]+)\.", stated):
            assert callable(getattr(__import__(match[2], fromlist=["x"]), match[1]))
        checked[match and match.re.pattern] += 1
    assert len(checked) == 4 and min(checked.values()) > 300, "each kind of fact was met"


def test_variety():
    for name in ("arithmetic", "spelling", "counting", "strings", "pyfacts"):
        shapes = {
            re.sub(r'"\w+"|\d+|\[[^]]*\]', "#", asked(item))
            for item in items_of(name, "train")[:3000]
        }
        assert len(shapes) >= 10, (name, shapes)
    calls = [item["messages"][1]["content"][0]["text"] for item in items_of("arithmetic", "train")]
    signs = collections.Counter(re.sub(r"[\d,]", "", call) for call in calls)
    assert {"+", "-", "*", "//", "%", "+*", "--"} <= set(signs) and signs["+"] < 0.4 * signs.total()


def test_numbers_with_commas_are_taught_and_the_calculator_takes_them():
    """In a few of a hundred sums, in question and call alike."""
    written = [item for item in items_of("arithmetic", "train") if re.search(r"\d,\d", asked(item))]
    assert 500 < len(written) < 1500
    for item in written:
        call, output = item["messages"][1]["content"][:2]
        assert re.search(r"\d,\d{3}", call["text"]) and calculator(call["text"]) == output["text"]


@pytest.mark.parametrize(
    "said, number",
    [
        ("It is 12.", "12"),
        ("12", "12"),
        ("1,234,567", "1234567"),
        ("The answer is -5.", "-5"),
        ("5.0", "5"),
        ("2.50 in all.", "2.5"),
        (
            "<|python_start|>3+4<|python_end|><|output_start|>7<|output_end|>That is"
            " 7.<|assistant_end|>",
            "7",
        ),
        ("<|python_start|>3+4<|python_end|><|output_start|>7<|output_end|>", None),
        ("none", None),
        ("", None),
        ("x2", None),
        ("first 3, then 4", "4"),
        ("10-3", "3"),
        ("007", "007"),
        ("0", "0"),
        ("-0.0", "-0"),
    ],
)
def test_last_number(said, number):
    assert last_number(embedded.said(said)) == (number and Decimal(number))


@pytest.mark.parametrize(
    "answer, said, right",
    [
        ("c a t", '"cat": c a t', True),
        ("c a t", "c a t.", True),
        ("c a t", '"scat": s c a t', False),
        ("c a t", "cat", False),
        ("c a t", "It is c, a, t.", True),
        ("c a t", "c a t s", False),
        ("c", 'The first letter is "c".', True),
        ("c", "abc", False),
        ("math", "sqrt is in the module math.", True),
        ("math", "It is cmath.", False),
        ("3 items", "1: 2 It has 3 items.", True),
        ("os.path", "It is os.path.", True),
        ("c", "", False),
        ("cat cat", "The word cat 2 times: cat cat", True),
        ("cat cat", '"cat" 2 times: "cat" "cat"', True),
        ("cat cat", "cat cat", True),
        ("cat cat", "The word cat 2 times: cat cat cat", False),
        ("cat cat", "The word cat 2 times: cat", False),
        ("cat cat", "catcat", False),
    ],
)
def test_same_end(answer, said, right):
    assert embedded.same_end(dict(answer=answer), said) is right


def test_yes_and_no_are_said_first():
    assert embedded.fact(dict(answer="yes"), "Yes, it is.") and not embedded.fact(
        dict(answer="yes"), "No, yes."
    )
    assert not embedded.fact(dict(answer="no"), "nothing is certain")


def test_words_are_asked_with_and_without_quotes():
    for name in ("spelling", "counting", "strings"):
        items = items_of(name, "test")
        share = {
            mark: sum(f"{mark}{item['about']}{mark}" in asked(item) for item in items) / len(items)
            for mark in "\"'"
        }
        assert share['"'] > 0.4 and share["'"] > 0.1 and sum(share.values()) < 0.8, (name, share)


def test_the_questions_that_we_suggest_are_asked_as_they_were_taught():
    """A small model knows questions of the shapes that it was taught: suggesting others would"
    " show it at its worst."""
    from pathlib import Path

    root = Path(__file__).parents[2]
    shapes = {
        re.sub(r'"\w+"|\d+', "#", asked(item))
        for name in ("arithmetic", "spelling", "counting", "identity")
        for item in items_of(name, "train")
    }
    for file, count in (("lib/serve/page.html", 4), ("benchmarks/serve.py", 4)):
        text = (root / file).read_text()
        questions = ast.literal_eval(re.search(r'\[[^][]*"Who are you\?",?\s*\]', text)[0])
        assert (
            len(questions) == count and {re.sub(r'"\w+"|\d+', "#", q) for q in questions} <= shapes
        )
