"""lib/data/chats.py: what a line means is kept or refused; seeds have orders of their own."""

import itertools
import json

import numpy as np
import pytest

from lib import data
from lib.data.tokenizer import Tokenizer
from lib.files import UserError

HI = [dict(role="user", content="hi"), dict(role="assistant", content="hello")]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["plain bytes"], 265)


def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def learnt(tokenizer, chat) -> str:
    ids, mask = tokenizer.render_conversation(chat)
    return tokenizer.decode([i for i, m in zip(ids, mask) if m])


# ---- keys that change the meaning


def test_what_weighs_nothing_is_read_and_not_learnt(tmp_path, tokenizer):
    messages = [
        dict(role="user", content="a"),
        dict(role="assistant", content="bad", weight=0),
        dict(role="user", content="b"),
        dict(role="assistant", content="good", weight=1),
    ]
    (chat,) = data.read_chats(write(tmp_path / "a.jsonl", dict(messages=messages)))
    assert learnt(tokenizer, chat) == "good<|assistant_end|>"
    ids, _ = tokenizer.render_conversation(chat)
    assert "bad<|assistant_end|>" in tokenizer.decode(ids)
    with pytest.raises(UserError, match="line 1: message 1 has weight 0.5"):
        messages[1]["weight"] = 0.5
        data.read_chats(write(tmp_path / "b.jsonl", dict(messages=messages)))


def test_messages_of_one_side_must_weigh_the_same(tmp_path):
    messages = [*HI, dict(role="assistant", content="more", weight=0)]
    with pytest.raises(UserError, match="line 1: message 2 has another weight"):
        data.read_chats(write(tmp_path / "a.jsonl", dict(messages=messages)))


@pytest.mark.parametrize(
    "record",
    [
        dict(messages=HI, system="be brief"),
        dict(messages=[dict(role="system", content="be brief"), *HI]),
        {
            "system": "be brief",
            "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}],
        },
    ],
)
def test_a_system_text_speaks_wherever_it_stands(tmp_path, tokenizer, record):
    (chat,) = data.read_chats(write(tmp_path / "a.jsonl", record))
    ids, _ = tokenizer.render_conversation(chat)
    assert "<|user_start|>be brief\n\nhi<|user_end|>" in tokenizer.decode(ids)


@pytest.mark.parametrize(
    "record, key",
    [
        (dict(messages=HI, tools=[dict(type="function")]), "tools"),
        (dict(messages=HI, functions=[dict(name="f")]), "functions"),
        (dict(messages=[HI[0], dict(role="assistant", tool_calls=[dict(id="1")])]), "tool_calls"),
        (dict(messages=[HI[0], dict(role="assistant", function_call={"name": "f"})]), "function"),
        (dict(messages=[*HI, dict(role="tool", content="4")]), "role 'tool'"),
    ],
)
def test_calls_of_others_are_refused_with_their_line(tmp_path, record, key):
    with pytest.raises(UserError, match=rf"a.jsonl, line 2: .*{key}"):
        data.read_chats(write(tmp_path / "a.jsonl", HI, record))
    empty = dict(messages=HI, tools=[], functions=None)
    assert data.read_chats(write(tmp_path / "b.jsonl", empty)) == [HI]


def test_bad_lines_are_left_out_on_request_and_counted(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", HI, "{", dict(messages=HI, tools=[1]), HI)
    with pytest.raises(UserError, match="line 2"):
        data.read_chats(path)
    assert data.read_chats(path, skip_bad=True) == [HI, HI]
    assert "2 of 4 lines are bad and left out, the first: " in capsys.readouterr().err
    with pytest.raises(UserError, match="no conversations"):
        data.read_chats(write(tmp_path / "b.jsonl", "{"), skip_bad=True)


def test_an_empty_turn_is_counted(tmp_path, capsys):
    silent = [HI[0], dict(role="assistant", content="")]
    assert data.read_chats(write(tmp_path / "a.jsonl", HI, silent)) == [HI, silent]
    assert "in 1 of 2 conversations a message is empty" in capsys.readouterr().err


# ---- orders


def epochs_of(batches, epochs: int, start: int) -> list[list[int]]:
    """First tokens behind `start` of the rows, epoch by epoch."""
    seen = {}
    for inputs, _, cursor in batches:
        if cursor["epoch"] > epochs:
            break
        seen.setdefault(cursor["epoch"], []).extend(inputs[:, start].tolist())
    return list(seen.values())


def test_every_seed_and_epoch_has_an_order_of_its_own(tokenizer):
    chats = [[dict(role="user", content=chr(40 + i)), HI[1]] for i in range(60)]
    chats = data.Chats(chats, ["here"] * 60, "sixty")
    orders = []
    for seed in (0, 1, 2):
        batches = data.chat_batches(chats, tokenizer, 1, 12, seed=seed, buffer_size=1)
        orders += epochs_of(batches, 3, 2)
    assert len(orders) == 9 and len({tuple(order[:50]) for order in orders}) == 9
    # Different orders agree in few places: that of a later epoch is no rotation of an earlier one.
    for one, other in itertools.combinations(orders, 2):
        agree = np.mean(np.array(one[:50]) == np.array(other[:50]))
        assert agree < 0.2
