"""lib/tasks/answers.py: numbers as people and models write them, and texts of any script."""

from decimal import Decimal

import pytest

from lib.tasks import answers


@pytest.mark.parametrize(
    "text, value",
    [
        ("18", "18"),
        ("1 000", "1000"),
        ("1\u202f000\u202f000", "1000000"),
        ("1'234.5", "1234.5"),
        ("1,234", "1234"),
        ("1e6", "1e6"),
        ("2.5E-3", "0.0025"),
        ("**18**", "18"),
        ("`18`", "18"),
        (r"\boxed{18}", "18"),
        (r"$\boxed{-18}$", "-18"),
        (r"\(18\)", "18"),
        (r"\$18", "18"),
        ("$ 18", "18"),
        ("-$5", "-5"),
        ("−5", "-5"),
        ("١٢٣", "123"),
        ("１２", "12"),
        ("18.", "18"),
        ("12 34", "12"),
        ("1 0000", "1"),
        ("eighteen", None),
        ("", None),
        ("-", None),
        ("e5", None),
    ],
)
def test_numbers(text, value):
    assert answers.number(text) == (value and Decimal(value))


@pytest.mark.parametrize(
    "text, value",
    [
        ("first 3, then **1 000** eggs", "1000"),
        (r"so it is \boxed{18}.", "18"),
        ("答案是18。", "18"),
        ("x2", None),
        ("12-3", "3"),
        ("it is _12_", "12"),
        ("it is __-12__", "-12"),
        ("x_2", None),
        ("in 2023 he had 1e6 coins", "1e6"),
    ],
)
def test_last_numbers(text, value):
    assert answers.last_number(text) == (value and Decimal(value))


@pytest.mark.parametrize(
    "match, wanted, given, right",
    [
        ("contains", "北京", "首都是北京。", True),
        ("contains", "北京", "首都是上海。", False),
        ("contains", "東京", "東京です", True),
        ("contains", "서울", "수도는 서울입니다", True),
        ("contains", "กรุงเทพ", "เมืองหลวงคือกรุงเทพมหานคร", True),
        ("contains", "Москва", "Столица — Москва.", True),
        ("contains", "Москва", "Москвариум", False),
        ("contains", "cafe\u0301", "the café here", True),
        ("contains", "café", "the cafe\u0301", True),
        ("contains", "caf", "the café", False),
        ("contains", "C++", "I know C++, too", True),
        ("contains", "a.b", "axb", False),
        ("contains", "is", "this", False),
        ("contains", "is", "this is", True),
        ("contains", "...", "anything", False),
        ("contains", "15", "it is 15.5", False),
        ("contains", "15", "it is 15.", True),
        ("contains", "7", "it is -7", False),
        ("contains", "7", "from 3-7", True),
        ("contains", "3", "3,000 eggs", False),
        ("contains", "3", "1, 2, 3,", True),
        ("contains", "500", "3,500 eggs", False),
        ("contains", "2", "1,2,3", True),
        ("exact", "é", "e\u0301", True),
        ("exact", "Straße", "STRASSE", True),
        ("exact", "北京", "北京。", True),
        ("exact", "12", "１２", True),
        ("number", "18", "He sells 18 eggs at 2 each.\n#### 18", True),
        ("number", "18", "#### 18\nThat is 3 more.", True),
        ("number", "18", "#### 3\nor 18", False),
        ("number", "1000", "1 000", True),
        ("number", "1000000", "about 1e6", True),
    ],
)
def test_texts_are_compared_in_any_script(match, wanted, given, right):
    assert answers.MATCH[match](given, wanted) is right


@pytest.mark.parametrize(
    "text, value",
    [
        ("$1,234.50", "1234.50"),
        ("-3 %", "-3"),
        ("**18** eggs", "18"),
        ("1/2", None),
        ("10:30", None),
        ("3 of 4", None),
        ("x2", None),
        ("about 5", None),
        ("", None),
    ],
)
def test_a_text_that_is_one_number(text, value):
    assert answers.sole_number(text) == (value and Decimal(value))
