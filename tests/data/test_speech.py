"""lib/data/speech.py: what was called is not what was said, and no words are glued."""

import pytest

from lib.chat import Reader
from lib.data.speech import joint, parts_of, pieces, said, spoken
from lib.data.tokenizer import Tokenizer
from lib.generate import Token

TOKENIZER = Tokenizer.train(["what is 37 times 85? That is 3145. naïve 東京 " * 9], 285)
SPECIAL = TOKENIZER.special


def fenced(name, text):
    return [SPECIAL[f"<|{name}_start|>"], *TOKENIZER.encode(text), SPECIAL[f"<|{name}_end|>"]]


def test_calls_and_results_are_not_said():
    ids = [
        *TOKENIZER.encode("So: "),
        *fenced("python", "37*85"),
        *fenced("output", "3145"),
        *TOKENIZER.encode("That is 3145."),
        SPECIAL["<|assistant_end|>"],
    ]
    parts = [
        {"type": "text", "text": "So: "},
        {"type": "python", "text": "37*85"},
        {"type": "python_output", "text": "3145"},
        {"type": "text", "text": "That is 3145."},
    ]
    assert parts_of(TOKENIZER, ids) == parts
    assert said(TOKENIZER, ids) == spoken(parts) == "So: That is 3145."


def test_what_follows_a_call_without_a_result_is_said():
    ids = [*fenced("python", "import os"), *TOKENIZER.encode("No.")]
    assert said(TOKENIZER, ids) == "No."


def test_parts_are_the_inverse_of_rendering():
    parts = [
        {"type": "text", "text": "naïve 東京"},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "2 <|output_end|> is text"},
    ]
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": parts}]
    ids, _ = TOKENIZER.render_conversation(chat)
    answer = ids[len(TOKENIZER.render_for_completion(chat)) :]
    assert parts_of(TOKENIZER, answer) == parts


def test_a_call_left_open_is_not_said_and_a_character_over_two_tokens_is_whole():
    assert said(TOKENIZER, [SPECIAL["<|python_start|>"], *TOKENIZER.encode("37*85")]) == ""
    ids = [TOKENIZER.tokens.index(bytes([b])) for b in "é".encode()]
    assert said(TOKENIZER, ids) == "é" and said(TOKENIZER, ids[:1]) == "\ufffd"


@pytest.mark.parametrize(
    "before, after, between",
    [
        ("s t r a w", "The letter", "\n"),
        ("That makes", "12.", " "),
        ("That makes ", "12.", ""),
        ("12*100=", "1200", ""),
        ("costs $", "10", ""),
        ("ends.", "so it", " "),
        ("a", ", and", ""),
        ("a", "\nb", ""),
        ("", "The", ""),
    ],
)
def test_words_beside_a_hidden_call_are_not_glued(before, after, between):
    call = [{"type": "python", "text": "1"}, {"type": "python_output", "text": "1"}]
    content = [{"type": "text", "text": before}, *call, {"type": "text", "text": after}]
    assert joint(before, after) == between
    assert spoken(content) == before + between + after == "".join(pieces(content))


@pytest.mark.parametrize("at_once", [1, 2, 100])
@pytest.mark.parametrize("before, after", [("s t r", "The"), ("is", "12"), ("=", "12"), ("", "x")])
def test_a_stream_adds_up_to_what_was_said(before, after, at_once):
    calls = [*fenced("python", "1+1"), *fenced("output", "2")]
    ids = [*TOKENIZER.encode(before), *calls, *TOKENIZER.encode(after), *calls]
    ids += TOKENIZER.encode("and é.")
    reader, heard = Reader(TOKENIZER), ""
    for start in range(0, len(ids), at_once):
        tokens = [Token(id, 0.0) for id in ids[start : start + at_once]]
        heard += "".join(piece.said for piece in reader.read(tokens))
    assert reader.parts == parts_of(TOKENIZER, ids)
    assert heard == spoken(reader.parts) == said(TOKENIZER, ids)


def test_text_without_a_call_stays_as_it_is():
    assert spoken("a string") == "a string" and spoken([]) == ""
    assert spoken([{"type": "text", "text": "ab"}, {"type": "text", "text": "Cd"}]) == "abCd"
