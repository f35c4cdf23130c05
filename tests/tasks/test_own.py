"""lib/tasks/own.py: GSM8K, HumanEval and chats as their makers publish them, given by path."""

import gzip
import json

import pytest

from lib.files import UserError
from lib.tasks import to_reinforce
from lib.tasks.own import jsonl
from tests.helpers.hub_rows import ROWS

SOLUTION = (
    "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\n"
    "She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18"
)


def write(path, *records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_an_answer_behind_a_mark_is_a_number(tmp_path):
    path = write(tmp_path / "gsm.jsonl", dict(question="How much?", answer=SOLUTION))
    task = jsonl(path)
    (item,) = task.items("test")
    assert item["match"] == "number" and item["answers"] == ["18"]
    assert item["messages"][-1]["content"] == SOLUTION
    for said in ("#### 18", "It is $18.", r"\boxed{18}", "so **18** dollars", SOLUTION):
        assert task.grade(item, said), said
    for said in ("#### 17", "9", "", "no number"):
        assert not task.grade(item, said), said


def test_humanevals_own_lines_are_programs(tmp_path):
    record = ROWS["humaneval"][0]
    packed = tmp_path / "HumanEval.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(record).encode()))
    for path in (write(tmp_path / "programs.jsonl", record), packed):
        task = jsonl(path)
        (item,) = task.items("test")
        assert task.kind == "generate" and item["id"] == "HumanEval/0"
        assert task.grade(item, item["messages"][-1]["content"])
        assert not task.grade(item, "    return 0\n")


@pytest.mark.parametrize(
    "record",
    [
        [dict(role="user", content="hi"), dict(role="assistant", content="ho")],
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"messages": [dict(role="user", content="hi"), dict(role="assistant", content="ho")]},
    ],
)
def test_chats_of_any_form_are_measured(tmp_path, record):
    task = jsonl(write(tmp_path / "chats.jsonl", record))
    assert task.kind == "perplexity"
    messages = [dict(role="user", content="hi"), dict(role="assistant", content="ho")]
    assert task.items("test") == [dict(id="chats/1", messages=messages)]


def test_a_path_is_read_as_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "My notes [2024].jsonl", dict(text="a"))
    assert jsonl("~/My notes [2024].jsonl").kind == "perplexity"


def test_calls_in_another_form_are_refused(tmp_path):
    messages = [dict(role="user", content="hi"), dict(role="assistant", tool_calls=[dict(id="x")])]
    with pytest.raises(UserError, match="line 1: .*tool_calls"):
        jsonl(write(tmp_path / "a.jsonl", dict(messages=messages)))


def test_a_file_is_divided_for_learning(tmp_path):
    records = [dict(question=f"{n} + 1?", answer=str(n + 1)) for n in range(60)]
    task = to_reinforce(str(write(tmp_path / "sums.jsonl", *records)))
    learnt, tested = task.items("train"), task.items("test")
    assert len(learnt) + len(tested) == 60 and 1 <= len(tested) < 20
    assert not {item["id"] for item in learnt} & {item["id"] for item in tested}
    # an answer of one's own reward, and the file's own grade
    assert learnt[0]["answer"] == learnt[0]["answers"][0]
    assert task.grade(learnt[0], f"{learnt[0]['answer']}.")

    with pytest.raises(UserError, match="nothing to learn from"):
        to_reinforce(str(write(tmp_path / "one.jsonl", records[0])))
    with pytest.raises(UserError, match="perplexity"):
        to_reinforce(str(write(tmp_path / "text.jsonl", dict(text="a"), dict(text="b"))))
