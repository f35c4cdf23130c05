"""What becomes of one row's tokens, put in by hand."""

import pytest

from lib.data.tokenizer import Tokenizer
from lib.generate import Sampling
from lib.generate.writer import Token, Writer
from tests.helpers.golden import PARITY

TOKENIZER = Tokenizer.load(PARITY / "tokenizer.json")
SPECIAL = TOKENIZER.special
START, END = SPECIAL["<|python_start|>"], SPECIAL["<|python_end|>"]
LETTER = {letter: TOKENIZER.tokens.index(letter.encode()) for letter in "abcdefxyz"}


def put(writer, text, **token):
    """Put letters into a writer; what it let out, as a text."""
    for letter in text:
        writer.push(Token(LETTER[letter], -1.0, **token))
    return shown(writer)


def shown(writer):
    return TOKENIZER.decode([token.id for token in writer.take_ready()])


def writer_of(max_tokens=99, tool=None, **settings):
    return Writer(Sampling(max_tokens, **settings), TOKENIZER, tool)


def test_a_stop_string_inside_a_token_leaves_the_character_before_it_whole():
    """A token may end a character whose first byte was let out already."""
    letters = tuple(bytes([byte]) for byte in range(256))
    tokenizer = Tokenizer(TOKENIZER.pattern, (*letters, b"\x84nder"))
    writer = Writer(Sampling(99, stop_strings=("nd",)), tokenizer)
    for id in (*b"wird ", 0xC3, 256, *b"ung"):
        writer.push(Token(id, -1.0))
        if writer.finish:
            break
    assert writer.finish == "stop"
    assert tokenizer.decode([token.id for token in writer.ready]) == "wird Ä"


# ---- ends ----------------------------------------------------------------------------------------


def test_a_row_ends_with_its_last_token():
    writer = writer_of(3)
    assert put(writer, "ab") == "ab" and writer.finish is None and writer.made == 2
    assert put(writer, "c") == "c" and writer.finish == "length"
    assert shown(writer) == "", "taken once"
    one = writer_of(1)
    assert put(one, "a") == "a" and one.finish == "length"


def test_a_stop_token_is_not_shown_and_counts():
    writer = writer_of(3, stop=(LETTER["c"],))
    assert put(writer, "abc") == "ab" and (writer.finish, writer.made) == ("stop", 3)
    kept = writer_of(3, stop=(LETTER["c"],), keep_stop=True)
    assert put(kept, "abc") == "abc" and kept.finish == "stop"
    # what a tool says ends no row
    forced = writer_of(9, stop=(LETTER["c"],))
    forced.forced = [LETTER["c"], LETTER["d"]]
    assert put(forced, "c", forced=True) == "c" and forced.finish is None
    assert forced.forced == [LETTER["d"]]


def test_what_might_have_been_a_stop_string_is_let_out_at_the_end():
    for most, stop, reason in ((3, (), "length"), (9, (LETTER["z"],), "stop")):
        writer = writer_of(most, stop=stop, stop_strings=("bcd",))
        text = put(writer, "abc")
        text += put(writer, "z") if stop else ""
        assert (text, writer.finish) == ("abc", reason)


# ---- stop strings --------------------------------------------------------------------------------


def test_nothing_that_may_be_a_stop_string_is_let_out_and_nothing_else_is_held():
    writer = writer_of(stop_strings=("abc", "bx"))
    told = [put(writer, letter) for letter in "yabyaabxz"]
    # "ab" could go on as "abc" and "b" as "bx"
    assert told[:7] == ["y", "", "", "aby", "", "a", ""]
    assert told[7] == "a" and writer.finish == "stop"


def test_the_first_of_several_stop_strings_ends_the_text():
    under, bridge = (TOKENIZER.tokens.index(text) for text in (b" under", b" bridge"))
    for stops, shown_text in (
        (("r", "nd"), " u"),
        (("nd", "r"), " u"),
        ((" under",), ""),
        (("x", "e"), " und"),
    ):
        writer = writer_of(stop_strings=stops)
        writer.push(Token(under, -1.0, top=[(1, -1.0)]))
        ready = writer.take_ready()
        assert TOKENIZER.decode([token.id for token in ready]) == shown_text
        assert writer.finish == "stop" and writer.held == []
        # tokens of our own making, with the probability of the one that they are a part of
        assert all(token.top == [] and token.logprob == -1.0 for token in ready)
    whole = writer_of(stop_strings=("zz",))
    whole.push(Token(bridge, -1.0, top=[(1, -1.0)]))
    assert [token.top for token in whole.take_ready()] == [[(1, -1.0)]]


def test_stop_strings_are_not_looked_for_across_what_is_not_said():
    # a token of a tool, or one that is no text, lies between
    for between in (Token(LETTER["b"], -1.0, forced=True), Token(TOKENIZER.bos, -1.0)):
        writer = writer_of(stop_strings=("ab", "ac"))
        writer.forced = [LETTER["b"]] if between.forced else []
        assert put(writer, "a") == ""
        writer.push(between)
        assert [token.id for token in writer.take_ready()] == [LETTER["a"], between.id]
        assert put(writer, "c") == "c" and writer.finish is None


# ---- tool calls ----------------------------------------------------------------------------------


def called(tool, *ids):
    """A writer whose row has made these tokens, and what its tool was asked."""
    asked = []
    writer = writer_of(tool=lambda text: asked.append(text) or tool)
    for id in ids:
        writer.push(Token(id, -1.0))
    return writer, asked


def test_a_call_is_answered_by_force():
    writer, asked = called("a", START, LETTER["x"], LETTER["y"], END)
    assert asked == ["xy"] and writer.call is None
    first, last = SPECIAL["<|output_start|>"], SPECIAL["<|output_end|>"]
    assert writer.forced == [first, LETTER["a"], last]
    # taken one by one, and nothing is asked of them
    for id in list(writer.forced):
        writer.push(Token(id, 0.0, forced=True))
    assert writer.forced == [] and asked == ["xy"] and writer.made == 7
    # an answer of nothing is one; none is none
    assert called("", START, LETTER["x"], END)[0].forced == [first, last]
    assert called(None, START, LETTER["x"], END)[0].forced == []


@pytest.mark.parametrize(
    "ids, asked",
    [
        ([START, END], []),
        ([LETTER["x"], END], []),
        ([END, LETTER["x"], END], []),
        ([START, LETTER["x"], START, LETTER["y"], END], ["y"]),
        ([START, LETTER["x"]], []),
        ([START, LETTER["x"], END, LETTER["y"], END], ["x"]),
        ([START, LETTER["x"], END, START, LETTER["y"], END], ["x", "y"]),
    ],
    ids=str,
)
def test_which_calls_are_asked(ids, asked):
    assert called(None, *ids)[1] == asked


def test_where_there_is_no_tool_a_call_is_text():
    writer = Writer(Sampling(9), None)
    for id in (START, LETTER["x"], END):
        writer.push(Token(id, -1.0))
    assert len(writer.take_ready()) == 3 and writer.forced == [] and writer.call is None
