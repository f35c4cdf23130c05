"""lib/data/roles.py: one rule for who speaks when."""

import pytest

from lib.data.roles import BadMessage, in_turns

CALL = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]


def chat(text):
    """Messages from "s: be brief | u: hello"."""
    names = {"s": "system", "d": "developer", "u": "user", "a": "assistant"}
    pairs = [turn.strip().split(": ", 1) for turn in text.split("|") if turn.strip()]
    return [{"role": names[role], "content": content} for role, content in pairs]


@pytest.mark.parametrize(
    "given, turns",
    [
        ("u: a | a: b | u: c", "u: a | a: b | u: c"),
        ("u: a | u: b | a: c | a: d", "u: a\n\nb | a: c\n\nd"),
        ("s: a | d: b | u: c", "s: a\n\nb | u: c"),
        ("u: a | s: b | u: c", "u: a\n\nb\n\nc"),
        ("u: a | a: b | s: c | u: d", "u: a | a: b | u: c\n\nd"),
        ("u: a | s: b | a: c", "u: a\n\nb | a: c"),
        ("a: hello | u: a | a: b", "u: a | a: b"),
        ("s: a | a: hello | u: b", "s: a | u: b"),
        ("a: hello", ""),
        ("", ""),
    ],
)
def test_any_order_becomes_turns(given, turns):
    assert in_turns(chat(given)) == chat(turns)
    assert in_turns(in_turns(chat(given))) == chat(turns)


def test_text_parts_become_text_and_calls_stay_parts():
    two = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": two}, {"role": "assistant", "content": [*two, *CALL]}]
    messages += [{"role": "assistant", "content": "c"}, {"role": "assistant", "content": None}]
    turns = in_turns(messages)
    assert turns[0] == {"role": "user", "content": "ab"}
    assert turns[1]["content"][:4] == [*two, *CALL]
    assert "".join(part["text"] for part in turns[1]["content"][4:]) == "\n\nc\n\n"


def test_what_was_given_is_not_changed():
    messages = chat("u: a | u: b")
    in_turns(messages)
    assert messages == chat("u: a | u: b")


@pytest.mark.parametrize(
    "bad, key",
    [
        ("text", ""),
        ({"content": "a"}, ""),
        ({"role": "tool", "content": "a"}, "role"),
        ({"role": None, "content": "a"}, "role"),
        ({"role": "user"}, "content"),
        ({"role": "user", "content": 3}, "content"),
        ({"role": "user", "content": CALL}, "content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content"),
        ({"role": "assistant", "content": [{"type": "python", "text": 1}]}, "content"),
        ({"role": "assistant", "content": "", "tool_calls": [{}]}, "tool_calls"),
    ],
)
def test_what_has_no_place_is_refused_by_number_and_key(bad, key):
    with pytest.raises(BadMessage, match="message 1 ") as error:
        in_turns([{"role": "user", "content": "a"}, bad])
    assert (error.value.index, error.value.key) == (1, key)
