"""What was answered: speech without tool calls, numbers as people write them, text compared in any
script.
"""

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

# Groups of three behind a comma, a blank (of any width) or an apostrophe; an exponent may follow.
_GROUPED = r"\d{1,3}(?:[ \u00a0\u2009\u202f'’]\d{3})+(?!\d)"
_DIGITS = rf"(?:{_GROUPED}|\d[\d,]*|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?"
_SIGNED = rf"([-+−]?)\s*\\?[$€£¥]?\s*([-−]?)({_DIGITS})"
# what may stand before a number: emphasis, brackets, TeX's box
_BEFORE = r"(?:[\s*_`({\[]|\\boxed\{|\\\(|\\text\{|\$(?=[\\*]))*"
# Scripts that are written without blanks between words, or with endings grown to them.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def said(answer: str) -> str:
    """What was said after the last use of a tool, without special tokens."""
    _, _, spoken = answer.rpartition("<|output_end|>")
    return re.sub(r"<\|\w+\|>", "", spoken).strip()


# ---- numbers -------------------------------------------------------------------------------------


def _latin_digits(text: str) -> str:
    """The same text with digits of all scripts as 0 to 9."""
    if text.isascii():
        return text
    latin = ""
    for char in text:
        latin += str(unicodedata.decimal(char)) if char.isdecimal() else char
    return latin


def _value(match: re.Match) -> Decimal | None:
    """The number of a match of _SIGNED; None for digits that are no number, like 1e999999999."""
    sign, inner_sign, digits = match.groups()
    try:
        value = Decimal(re.sub(r"[^\d.eE+-]", "", digits))
    except InvalidOperation:
        return None
    negative = (sign and sign in "-−") or inner_sign
    return -value if negative else value


def number(text: str) -> Decimal | None:
    """The number that a text begins with: "$1,234.", "-0.50", "5 %", "1 000", "1e6", "**18**"."""
    match = re.match(_BEFORE + _SIGNED, _latin_digits(text))
    if match is None:
        return None
    return _value(match)


def numbers(text: str) -> list[Decimal | None]:
    """All numbers in a text, None for what looks like one; what is a part of a word (x2, x_2) or of
    another number is none.
    """
    return [_value(match) for match in _matches(text)]


def _matches(text: str) -> list[re.Match]:
    """Where numbers stand in a text. An underscore before one may be emphasis, as in _12_."""
    begins = r"(?<![A-Za-z0-9.])(?<![A-Za-z0-9]_)"
    return list(re.finditer(begins + _SIGNED, _latin_digits(text)))


def sole_number(text: str) -> Decimal | None:
    """The number that a text is, None where it holds several, as 1/2 and 10:30 do, or begins with
    words.
    """
    matches = _matches(text)
    if len(matches) != 1 or any(char.isdecimal() for char in text[matches[0].end() :]):
        return None
    return number(text)


def last_number(text: str) -> Decimal | None:
    """The last of the numbers in a text."""
    values = numbers(text)
    return values[-1] if values else None


def number_after_mark(text: str) -> Decimal | None:
    """The number behind the first ####, as GSM8K's own grader takes it."""
    _, mark, after = text.partition("####")
    return number(after) if mark else None


# ---- texts ---------------------------------------------------------------------------------------


def bare(text: str) -> str:
    """A text as it is compared: one form of each character, no case, no final stops and quotes."""
    # twice, because without case a character may have another form
    lower = unicodedata.normalize("NFKC", text).casefold()
    text = unicodedata.normalize("NFKC", lower)
    return " ".join(text.split()).strip(" .!\"'`。！「」")


def _spaced(char: str) -> bool:
    """Whether a character is of a word that ends where the next blank stands."""
    if not (char.isalnum() or char == "_"):
        return False
    return not unicodedata.name(char, "").startswith(UNSPACED)


def contains(given: str, wanted: str) -> bool:
    """Whether `wanted` stands in `given` as words, where its script has words with blanks
    between.
    """
    given, wanted = bare(given), bare(wanted)
    if not wanted:
        return False
    start = given.find(wanted)
    while start >= 0:
        end = start + len(wanted)
        before = given[start - 1 : start] or " "
        behind = given[end : end + 1] or " "

        # "art" does not stand in "start", nor in "arts"
        glued_before = _spaced(before) and _spaced(wanted[0])
        glued_behind = _spaced(behind) and _spaced(wanted[-1])
        glued = glued_before or glued_behind
        if not glued and not _cuts_a_number(given, start, end):
            return True
        start = given.find(wanted, start + 1)
    return False


def _cuts_a_number(given: str, start: int, end: int) -> bool:
    """Whether given[start:end] is a part of a longer number there: 15 of 15.5, 7 of -7, 3 of
    3,000.
    """
    before, behind = given[:start], given[end:]
    if given[start].isdecimal():
        # behind a comma only three digits go on with a number
        is_thousand = re.match(r"\d{3}(?!\d)", given[start:]) and re.search(r"\d,$", before)
        if is_thousand or re.search(r"(\d\.|(?<!\w)[-−])$", before):
            return True
    ends_in_digit = given[end - 1].isdecimal()
    return ends_in_digit and bool(re.match(r"\.\d|,\d{3}(?!\d)", behind))


def same_number(given: str, wanted: str) -> bool:
    """Whether the number behind ####, or else the last one said, is the wanted one."""
    if "####" in given:
        value = number_after_mark(given)
    else:
        value = last_number(given)
    return value is not None and value == number(wanted)


# How an answer is compared: (given, wanted) -> bool.
MATCH: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda given, wanted: bare(given) == bare(wanted),
    "contains": contains,
    "number": same_number,
}
