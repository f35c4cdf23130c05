"""Our tokenizer in other programs' files: the merges, the letters, the chat template."""

import json

import jinja2
import pytest
import regex

from lib.data.tokenizer import Tokenizer
from lib.interop.proof import HARD_TEXTS
from lib.interop.tokenizer_files import (
    CHAT_TEMPLATE,
    LETTERS,
    merges,
    spelled,
    tokenizer_json,
    write_tokenizer,
)
from tests.helpers.models import tokenizer


def by_merges(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids by applying the recovered pairs in order, as the tokenizers library does."""
    order = {pair: i for i, pair in enumerate(merges(tokenizer))}
    ids = {token: i for i, token in enumerate(tokenizer.tokens)}
    out = []
    for word in regex.findall(tokenizer.pattern, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            ranked = [order.get(pair, len(order)) for pair in zip(parts, parts[1:])]
            if not ranked or min(ranked) == len(order):
                break
            i = ranked.index(min(ranked))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        out += [ids[part] for part in parts]
    return out


def test_recovered_merges_give_the_same_ids():
    ours = tokenizer()
    assert len(merges(ours)) == len(ours.tokens) - 256
    for text in HARD_TEXTS:
        assert by_merges(ours, text) == ours.encode(text), text


def test_a_token_that_no_merge_reaches_has_no_pair():
    ours = tokenizer()
    odd = Tokenizer(ours.pattern, (*ours.tokens[:256], b"qzx"))
    assert merges(odd) == []


def test_letters_are_printable_and_distinct():
    assert len(set(LETTERS.values())) == 256
    assert all(letter.isprintable() and not letter.isspace() for letter in LETTERS.values())
    # as GPT-2 spells them
    assert spelled(b" a\n") == "\u0120a\u010a"


def test_files_hold_every_id(tmp_path):
    ours = tokenizer()
    write_tokenizer(ours, tmp_path, 256)
    data = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    assert data == json.loads(json.dumps(tokenizer_json(ours)))
    ids = list(data["model"]["vocab"].values()) + [token["id"] for token in data["added_tokens"]]
    assert sorted(ids) == list(range(ours.vocab_size))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|bos|>" and config["model_max_length"] == 256


CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  What?\n"}],
    [
        {"role": "user", "content": "2*3?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "It is "},
                {"type": "python", "text": "2*3"},
                {"type": "python_output", "text": "6"},
                {"type": "text", "text": "6."},
            ],
        },
        {"role": "user", "content": "{{ thanks }}"},
        {"role": "assistant", "content": " yes "},
        {"role": "user", "content": "bye"},
    ],
]


def to_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a rendered chat, the names of special tokens taken for what they name."""
    return tokenizer.encoding.encode(text, allowed_special="all")


@pytest.mark.parametrize("chat", CHATS)
def test_the_template_renders_as_we_do(chat):
    ours = tokenizer()
    template = jinja2.Template(CHAT_TEMPLATE)
    asked = template.render(messages=chat, add_generation_prompt=True)
    assert to_ids(ours, asked) == ours.render_for_completion(chat)
    whole = template.render(messages=chat, add_generation_prompt=False)
    assert to_ids(ours, whole) == ours.render_conversation(chat)[0]
