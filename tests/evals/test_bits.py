"""Bits per byte against the reference's numbers, by kind of text; overlap with training text."""

import base64
import math
import types

import numpy as np
import pytest

from lib import evals
from lib.data.tokenizer import Tokenizer
from lib.evals import bits, contamination
from tests.helpers.golden import load, parity_model


@pytest.mark.parametrize("case", ["val", "val_masked", "only_special_targets"])
def test_bits_per_byte_matches_the_reference(case):
    config, params = parity_model("T")
    data, want = load("bpb.safetensors"), load("bpb.json")[case]
    batches = list(zip(data[f"{case}.inputs"], data[f"{case}.targets"]))
    got = evals.bits_per_byte(params, config, batches, data["token_bytes"])
    assert got.bytes == want["total_bytes"]
    assert got.bpb == pytest.approx(float(want["bpb"]), rel=1e-5) and got.nats == pytest.approx(
        want["total_nats"], rel=1e-5
    )
    for (x, y), losses in zip(batches, data[f"{case}.losses"]):
        np.testing.assert_allclose(
            evals.token_losses(params, config, x, y), np.where(y >= 0, losses, 0), atol=5e-5
        )


def test_standard_error_covers_the_spread_of_resampled_rows():
    rng = np.random.default_rng(0)

    def bpb(nats, size):
        return nats.sum() / (math.log(2) * size.sum())

    nats, size = rng.gamma(20, 1, 400), rng.integers(5, 15, 400)
    draws = [rng.integers(0, 400, 400) for _ in range(500)]
    spread = np.std([bpb(nats[d], size[d]) for d in draws])
    assert bits.ratio_bits(nats, size)[1] == pytest.approx(spread, rel=0.15)


def test_bits_of_a_batch_by_hand():
    token_bytes = np.array([1, 2, 0, 4])
    targets = np.array([[0, 1, -1], [3, 2, 0]])
    losses = np.array([[1.0, 2.0, 64.0], [4.0, 32.0, 0.5]])
    batches = [(np.zeros((2, 3), int), targets)]
    found = bits.bits_per_byte(None, None, batches, token_bytes, losses_of=lambda *_: losses)
    # what is ignored and the special token, which has no bytes, count for nothing
    assert found.nats == 1 + 2 + 4 + 0.5 and found.bytes == 1 + 2 + 4 + 1
    assert found.bpb == pytest.approx(7.5 / 8 / math.log(2)) and found.loss == 7.5 / 4
    nothing = bits.bits_per_byte(None, None, [], token_bytes, losses_of=None)
    assert nothing.bytes == 0 and math.isinf(nothing.bpb)


def test_only_so_many_batches_are_read():
    config, params = parity_model("T")
    data = load("bpb.safetensors")

    def endless():
        while True:
            yield data["val.inputs"][0], data["val.targets"][0], {}

    once = evals.bits_per_byte(params, config, endless(), data["token_bytes"], max_batches=1)
    assert evals.bits_per_byte(
        params, config, endless(), data["token_bytes"], max_batches=3
    ).bpb == pytest.approx(once.bpb)


# ---- kinds of text

SOURCE = '''"""A module."""
import re  # patterns


def twice(x):
    """Two times it,
    however large."""
    text = f"no {x} doc" + "ünï"
    return 2 * x
'''


def labelled(text, spans):
    return [(text[a:b], kind) for a, b, kind in spans]


def test_python_is_split_into_its_kinds():
    found = labelled(SOURCE, bits.python_kinds(SOURCE))
    assert ('"""A module."""', "docstring") in found and ("# patterns", "comment") in found
    assert ('"""Two times it,\n    however large."""', "docstring") in found
    assert ('f"no {x} doc"', "string") in found and ('"ünï"', "string") in found
    assert (
        ("def", "keyword") in found
        and ("twice", "name") in found
        and ("2", "number") in found
        and ("*", "operator") in found
    )
    for bad in ("def (:\n  x", "x = '\n", "a\x00b\nc", "if x:\n\ty\n        z\n"):
        with pytest.raises((SyntaxError, ValueError)):
            list(bits.python_kinds(bad))


DOCUMENTED = '''class A:
    """Of a class."""
    def f(self): "no line of its own"
    async def g(self):
        "of a coroutine"
x = "no docstring"
"nor this"
'''


def test_docstrings_stand_alone_behind_what_they_document():
    found = labelled(DOCUMENTED, bits.python_kinds(DOCUMENTED))
    strings = {text.strip('"'): kind for text, kind in found if text.startswith('"')}
    assert strings == {
        "Of a class.": "docstring",
        "no line of its own": "string",
        "of a coroutine": "docstring",
        "no docstring": "string",
        "nor this": "string",
    }
    assert ("async", "keyword") in found and ("\n", None) not in found


def test_a_string_of_several_tokens_is_one_however_deep(monkeypatch):
    """As Python 3.12 and later see f-strings, one within another."""
    kinds = {990: "FSTRING_START", 991: "FSTRING_MIDDLE", 992: "FSTRING_END"}
    for number, name in kinds.items():
        monkeypatch.setitem(bits.tokenize.tok_name, number, name)
    text = "f'{f\"x\"}' + 1\n"
    operator, number = bits.tokenize.OP, bits.tokenize.NUMBER
    parts = [(990, 0, 2), (operator, 2, 3), (990, 3, 5), (991, 5, 6), (992, 6, 7)]
    parts += [(operator, 7, 8), (992, 8, 9), (operator, 10, 11), (number, 12, 13)]
    tokens = [
        types.SimpleNamespace(type=kind, start=(1, a), end=(1, b), string=text[a:b], line=text)
        for kind, a, b in parts
    ]
    monkeypatch.setattr(bits, "_tokens", lambda text: tokens)
    assert list(bits.python_kinds(text)) == [
        (0, 9, "string"),
        (10, 11, "operator"),
        (12, 13, "number"),
    ]


@pytest.mark.parametrize(
    "text",
    ["Not: python,\n3 lines of\n  prose_!", "one_line = 1", "def (:\n", "(" * 5000 + "\n", ""],
)
def test_what_is_not_python_is_split_by_characters(text):
    assert labelled(text, bits.automatic(text)) == labelled(text, bits.plain_kinds(text))
    assert {kind for _, _, kind in bits.plain_kinds(text)} <= {"letters", "digits", "punctuation"}


def test_a_token_is_of_the_kind_of_its_first_mark():
    text = "é = 10  # ünï\n\n"
    pieces = ["é", " =", " 1", "0", "  #", " ü", "nï", "\n\n"]
    sizes = np.array([len(p.encode()) for p in pieces])
    assert bits.kinds_of(text, sizes, bits.python_kinds(text)) == [
        "name",
        "operator",
        "number",
        "number",
        "comment",
        "comment",
        "comment",
        "white space",
    ]


def test_kinds_add_up_to_the_whole_and_documents_give_its_error():
    config, params = parity_model("T")
    data = load("tokenizer.json")
    tokenizer = Tokenizer(
        data["pattern"], tuple(base64.b64decode(token) for token, _ in data["mergeable_ranks"])
    )
    texts = [SOURCE, "Plain words, 12 of them.\n", "", SOURCE.upper(), "half \ud800 a character"]
    found = evals.bits_by_kind(params, config, tokenizer, texts, batch_tokens=512)
    want = sum(len(text.encode("utf-8", "replace")) for text in texts)
    assert (
        found["bytes"]
        == want
        == sum(k["bytes"] for k in found["kinds"].values())
        == sum(i["bytes"] for i in found["items"])
    )
    assert found["nats"] / math.log(2) == pytest.approx(
        sum(k["bpb"] * k["bytes"] for k in found["kinds"].values())
    )
    assert {"docstring", "keyword", "white space", "letters"} <= set(found["kinds"]) and found[
        "stderr"
    ] > 0
    ids = tokenizer.encode(SOURCE, bos=True)
    row = np.full((1, config.sequence_len), -1, np.int32)
    inputs, row[0, : len(ids) - 1] = np.maximum(row, 0), ids[1:]
    inputs[0, : len(ids) - 1] = ids[:-1]
    alone = evals.bits_per_byte(params, config, [(inputs, row)], tokenizer.token_bytes)
    # as by packed batches
    assert found["items"][0]["nats"] == pytest.approx(alone.nats, rel=1e-5)


# ---- contamination


def words(n, seed):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefghij"), 6)) for _ in range(n)]


def test_only_long_runs_of_words_in_common_are_an_overlap():
    text = words(200, 0)
    other = words(200, 1)
    items = [
        {"id": "copied", "text": " ".join(other[:9] + text[50:63] + other[9:20])},
        {"id": "dressed", "text": ", ".join(w.upper() for w in text[60:73]) + "!"},
        {"id": "nearly", "text": " ".join(other[:9] + text[50:62] + other[9:20])},
        {"id": "whole", "text": " ".join(text[100:109])},
        {"id": "parted", "text": " ".join(text[100:105] + other[:1] + text[105:110])},
        {"id": "short", "text": " ".join(text[:7])},
        {"id": "end", "text": " ".join(text[187:])},
    ]
    stream = (" ".join(part) for part in (other[100:], text[:110], text[110:]))
    found = contamination.overlap(stream, {"a": items, "b": items[2:3], "none": []})
    assert found["a"] == dict(
        overlapping=4, n=7, short=1, words=13, items=["copied", "dressed", "whole", "end"]
    )
    assert (found["b"]["overlapping"], found["none"]["n"]) == (0, 0)
    assert contamination.overlap([" ".join(text)], {"a": items}, n=12)["a"]["items"] == [
        "copied",
        "dressed",
        "nearly",
        "whole",
        "end",
    ]


def test_runs_never_cross_from_one_text_to_the_next():
    text = words(40, 3)
    item = [{"id": "x", "text": " ".join(text[10:30])}]
    assert (
        contamination.overlap([" ".join(text[:20]), " ".join(text[20:])], {"a": item})["a"][
            "overlapping"
        ]
        == 0
    )
    assert (
        contamination.overlap([" ".join(text[:24]), " ".join(text[20:])], {"a": item})["a"][
            "overlapping"
        ]
        == 1
    )


def test_how_short_an_item_may_be():
    text = words(40, 5)
    item = lambda n, id: {"id": id, "text": " ".join(text[10 : 10 + n])}
    stream = ["too short", " ".join(text), "too short"]
    items = [item(8, "eight"), item(7, "seven"), item(8, "again")]
    items.append({"id": "backwards", "text": " ".join(text[10:18][::-1])})
    found = contamination.overlap(stream, {"a": items})["a"]
    assert found == dict(overlapping=2, n=4, short=1, words=13, items=["eight", "again"])
    found = contamination.overlap(stream, {"a": [item(5, "five"), item(4, "four")]}, n=5)["a"]
    assert (found["items"], found["short"], found["words"]) == (["five"], 1, 5)
