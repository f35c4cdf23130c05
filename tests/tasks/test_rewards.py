"""Rewards: what a careful reader takes as the answer, tricks that must not pay, bad functions."""

from decimal import Decimal

import numpy as np
import pytest

from lib.files import UserError
from lib.tasks import items_of, rewards, tasks, to_reinforce
from tests.helpers.golden import load

GSM8K = load("rl_gsm8k.json")


@pytest.mark.parametrize("case", GSM8K["extraction"], ids=lambda case: repr(case["completion"]))
def test_numbers_behind_the_mark(case):
    careful = case["careful"]
    assert rewards.careful_number(case["completion"]) == (careful and Decimal(careful))
    assert rewards.nanochat_text(case["completion"]) == case["reference_extracts"]


def test_gsm8k_rewards():
    for case in GSM8K["rewards"]:
        gold = rewards.careful_number(case["gold"])
        item = dict(id="here", answer=str(gold))
        assert float(rewards.gsm8k(item, case["completion"])) == case["right_reward"], case
        if gold is not None:
            item = dict(id="here", answer=rewards.nanochat_text(case["gold"]))
            given = float(rewards.gsm8k_as_nanochat(item, case["completion"]))
            assert given == case["reference_reward"], case


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The answer is 1234.", True),
        ("1,234", True),
        ("1234.0", True),
        ("That is 1234. Yes, 1234.", True),
        ("", False),
        (".", False),
        ("-1234", False),
        ("12 1111 1234", False),
        ("1111 + 123 = 1234", False),
        ("1111 + 123", False),
        ("1234" * 30, False),
        ("1234 " * 60, False),
        ("<|python_start|>1111+123<|python_end|><|output_start|>1234<|output_end|>", False),
        ("<|output_start|>1234<|output_end|>It is 1234.", True),
    ],
)
def test_only_the_right_number_pays(answer, right):
    assert rewards.only_this_number(dict(answer="1234"), answer) == right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('"cat": c a t', True),
        ("The word cat: c a t.", True),
        ("c a t", True),
        ("", False),
        ("cat", False),
        ('Spell "cat".', False),
        ("s c a t", False),
        ("c a t s", False),
        # one guess after the other
        ("c u t c a t", False),
        ("c a t c a t", False),
        (" ".join("abcdefghijklmnopqrstuvwxyz" * 5) + " c a t", False),
        ("<|python_start|>c a t<|python_end|><|output_start|>c a t<|output_end|>", False),
    ],
)
def test_only_the_right_letters_pay(answer, right):
    assert rewards.only_these_letters(dict(answer="c a t"), answer) == right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('Together they are "catdog".', True),
        ("", False),
        ('Join "cat" and "dog".', False),
        ("catdog dogcat", False),
        ("catdog" * 50 + " catdog", False),
    ],
)
def test_only_the_right_end_pays(answer, right):
    assert rewards.ends_so(dict(answer="catdog"), answer) == right


def test_once_too_often_earns_nothing():
    item = next(i for i in items_of("strings", "train") if "times" in i["messages"][0]["content"])
    taught = item["messages"][-1]["content"][0]["text"]
    assert rewards.ends_so(item, taught)
    assert not rewards.ends_so(item, f"{taught} {item['about']}")


def test_what_is_taught_earns_its_reward():
    for name in ("spelling", "strings", "counting", "two_steps", "arithmetic_beyond"):
        task = to_reinforce(name)
        reward = rewards.reward_of(name, task.grade)
        for item in task.items("train")[:200]:
            content = item["messages"][-1]["content"]
            spoken = [part["text"] for part in content if part["type"] == "text"]
            assert reward(item, spoken[-1]), item
            # repeated questions, and other items' answers, earn nothing
            assert not reward(item, item["messages"][-2]["content"] + "?"), item


def test_arithmetic_beyond_is_longer_than_what_is_taught():
    taught = {item["about"] for item in items_of("arithmetic", "train")}
    for split in ("train", "test"):
        items = items_of("arithmetic_beyond", split)
        assert len({item["id"] for item in items}) == len(items) >= 1000
        for item in items[:200]:
            assert item["about"] not in taught
            reference = item["messages"][-1]["content"][-1]["text"]
            assert rewards.only_this_number(item, reference)
    asked = {item["about"] for item in items_of("arithmetic_beyond", "train")}
    assert not asked & {item["about"] for item in items_of("arithmetic_beyond", "test")}


def test_reward_by_name(tmp_path):
    assert rewards.reward_of("arithmetic_beyond") is rewards.only_this_number
    grade = tasks()["pyfacts"].grade
    assert rewards.reward_of("pyfacts", grade) is grade
    file = tmp_path / "mine.py"
    file.write_text("def short(item, answer):\n    return 1 / (1 + len(answer))\n")
    reward = rewards.reward_of(f"{file}:short")
    assert rewards.score(reward, dict(id="a"), "abc") == 0.25
    (tmp_path / "ends.py").write_text("raise SystemExit(0)")
    for wrong in ("smoltalk", f"{file}:long", f"{tmp_path}/none.py:short", f"{tmp_path}/ends.py:f"):
        with pytest.raises(UserError):
            rewards.reward_of(wrong)


NO_NUMBERS = [
    None,
    "1",
    float("nan"),
    float("inf"),
    10**400,
    pytest.param(10**5000, id="long"),
    np.ones(2),
    ZeroDivisionError(),
    SystemExit(0),
]


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_a_reward_that_is_no_number_names_the_item(value):
    def reward(item, answer):
        if isinstance(value, BaseException):
            raise value
        return value

    with pytest.raises(UserError, match="task/train/7"):
        rewards.score(reward, dict(id="task/train/7"), "answer")
