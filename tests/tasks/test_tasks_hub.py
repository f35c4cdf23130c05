"""lib/tasks/hub.py, stdlib.py: files of the Hub's schema from a misbehaving server and from"
" folders, every rendering, every grader."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lib import data
from lib.data.tokenizer import Tokenizer
from lib.files import UserError
from lib.tasks import Task, hub, shuffled, stdlib
from lib.tasks.answers import number
from lib.tasks.code import program_of
from lib.tasks.own import jsonl
from tests.helpers.hub_rows import BODY, CHAT, ROWS, parquet, rows_of
from tests.helpers.hub_stand_in import PARQUET


@pytest.fixture
def server(hub_server, tmp_path):
    """The stand-in for the Hub with every task's data, two files each."""
    for name, source in hub.SOURCES.items():
        records = rows_of(name)
        for split in set(source.splits.values()):
            for i, part in enumerate((records[:4], records[4:])):
                put(hub_server, name, split, i, parquet(part))
    hub_server.files["/identity.jsonl"] = "\n".join(json.dumps(CHAT) for _ in range(40)).encode()
    address = hub_server.address + "/identity.jsonl"
    hub_server.tasks = lambda: hub.make(cache_dir=tmp_path / "cache", identity=address)
    return hub_server


def put(server, name, split, number, body):
    source = hub.SOURCES[name]
    server.put(source.repo, f"{source.config}/{split}/{number:04d}.parquet", body, PARQUET)


# ---- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hub.SOURCES)
def test_rows_of_the_hub_become_the_items_written_here(server, name):
    task, source = server.tasks()[name], hub.SOURCES[name]
    items = task.items("test")
    assert len(items) == 5 and task.kind == source.kind
    for item in items:
        assert {key: value for key, value in item.items() if key != "id"} == ROWS[name][1]
    assert sorted(item["id"] for item in items) == [f"{name}/test/{i}" for i in range(5)]
    assert items == task.items("test")
    folder = f"{source.repo}/tree/{PARQUET}/{source.config}/{source.splits['test']}"
    lists = [path for _, path, _ in server.log if "/tree/" in path]
    assert lists == [f"/api/datasets/{folder}"], "asked the second time too"
    assert sum(method == "GET" for method, *_ in server.log) == 3
    assert bool(task.items("train")) == ("train" in source.splits)


# Where each task's data lies, written out here: repository, config, our splits -> theirs.
PLACES = {
    "smoltalk": ("HuggingFaceTB/smol-smoltalk", "default", dict(train="train", test="test")),
    "mmlu": ("cais/mmlu", "all", dict(train="auxiliary_train", test="test")),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", dict(train="train", test="test")),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", dict(train="train", test="test")),
    "gsm8k": ("openai/gsm8k", "main", dict(train="train", test="test")),
    "humaneval": ("openai/openai_humaneval", "openai_humaneval", dict(test="test")),
    "hellaswag": ("Rowan/hellaswag", "default", dict(train="train", test="validation")),
    "piqa": ("baber/piqa", "default", dict(train="train", test="validation")),
    "winogrande": ("allenai/winogrande", "winogrande_xl", dict(train="train", test="validation")),
    "lambada": ("EleutherAI/lambada_openai", "default", dict(test="test")),
    "wikitext103": (
        "Salesforce/wikitext",
        "wikitext-103-raw-v1",
        dict(train="train", test="test"),
    ),
}


def test_tasks_are_measured_on_their_test_splits():
    places = {name: (s.repo, s.config, s.splits) for name, s in hub.SOURCES.items()}
    assert places == PLACES


@pytest.mark.parametrize("name", ["hellaswag", "piqa", "winogrande", "mmlu"])
def test_the_split_that_is_asked_for_is_the_one_that_is_read(hub_server, tmp_path, name):
    repo, config, splits = PLACES[name]
    record = ROWS[name][0]
    marked = {
        "hellaswag": lambda split: record | dict(ctx_b=split),
        "piqa": lambda split: record | dict(goal=split),
        "winogrande": lambda split: record | dict(sentence=f"{split} _ is here."),
        "mmlu": lambda split: record | dict(question=split),
    }[name]
    for theirs in splits.values():
        body = parquet([marked(theirs)])
        hub_server.put(repo, f"{config}/{theirs}/0000.parquet", body, PARQUET)
    task = hub.make(cache_dir=tmp_path / "cache")[name]
    for ours, theirs in splits.items():
        (item,) = task.items(ours)
        assert theirs.casefold() in str(item).casefold()
        others = set(splits.values()) - {theirs}
        assert not any(other in str(item).casefold() for other in others if other != "test")


def test_chats_render_as_tokens_and_the_calculator_is_learnt_but_not_its_answers():
    tokenizer = Tokenizer.train(["the cat sat"], 270)
    for name, (_, item) in ROWS.items():
        if "messages" in item:
            ids, mask = tokenizer.render_conversation(item["messages"])
            learnt = tokenizer.decode([t for t, m in zip(ids, mask) if m])
            if name == "gsm8k":
                assert (
                    learnt.startswith("It is 12*100=<|python_start|>12*100<|python_end|>1200.")
                    and learnt.count("1200") == 2
                )
            if name == "mmlu":
                assert learnt == "B<|assistant_end|>"


def test_order_is_mixed_and_always_the_same(server):
    rows = [dict(ROWS["piqa"][0], goal=f"goal {i}") for i in range(30)]
    put(server, "piqa", "validation", 0, parquet(rows))
    items = server.tasks()["piqa"].items("test")
    numbers = [int(item["id"].rsplit("/", 1)[1]) for item in items]
    assert numbers == np.random.default_rng(42).permutation(31).tolist() != sorted(numbers)
    assert all(
        item["context"] == f"Question: goal {i}\nAnswer:"
        for i, item in zip(numbers, items)
        if i < 30
    )


@pytest.mark.parametrize(
    "faults",
    [
        [None, None, "truncate"],
        [429, 503],
        [None, 429, None, "truncate", 503],
    ],
)
def test_broken_and_refused_downloads_are_taken_up_again(server, faults):
    server.faults += faults
    assert len(server.tasks()["gsm8k"].items("test")) == 5 and not server.faults


def test_without_a_network_what_was_loaded_is_there_and_the_rest_is_told_in_a_line(server):
    tasks = server.tasks()
    tasks["piqa"].items("test")
    tasks["identity_conversations"].items("test")
    server.close()
    assert (
        len(tasks["piqa"].items("test")) == 5
        and len(tasks["identity_conversations"].items("train")) == 38
    )
    for name in ("mmlu", "smoltalk"):
        with pytest.raises(UserError, match="cannot download .*check the network") as caught:
            tasks[name].items("test")
        assert "\n" not in str(caught.value)


def second(*records):
    """A change of the second file of GSM8K's test split."""
    body = records[0] if isinstance(records[0], bytes) else parquet(list(records))
    return lambda server: put(server, "gsm8k", "test", 1, body)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda server: server.faults.append(404), "cannot download .*gsm8k.*404"),
        (lambda server: server.faults.append(401), "401.*HF_TOKEN"),
        (lambda server: server.files.clear(), "cannot download .*gsm8k.*404"),
        (second(b"PAR1"), "cannot read .*0001.parquet as parquet"),
        (second(dict(question="q")), "0001.parquet has no column answer, only question"),
        (
            second(dict(question="q", answer="12")),
            r"row 4 of openai/gsm8k \(main, test\) is not as task gsm8k expects .*no number after",
        ),
        (second(dict(question=None, answer="#### 1")), "row 4 of openai/gsm8k"),
    ],
)
def test_bad_data_is_told_in_a_sentence(server, change, message):
    change(server)
    with pytest.raises(UserError, match=message) as caught:
        server.tasks()["gsm8k"].items("test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "place",
    [
        "openai/gsm8k/main/test/0000.parquet",
        "openai/gsm8k/main/test-00000-of-00001.parquet",
        "gsm8k/main/test-00000-of-00001.parquet",
        "openai/gsm8k/data/test-00000-of-00001.parquet",
    ],
)
def test_a_folder_takes_the_place_of_the_hub(tmp_path, place):
    path = tmp_path / "mine" / place
    path.parent.mkdir(parents=True)
    path.write_bytes(parquet(rows_of("gsm8k")))
    made = hub.make(root=tmp_path / "mine")
    assert len(made["gsm8k"].items("test")) == 5
    for name in ("mmlu", "identity_conversations"):
        with pytest.raises(UserError, match=f"{tmp_path / 'mine'}: put "):
            made[name].items("test")


def test_files_put_into_the_cache_by_hand_are_used(tmp_path):
    path = tmp_path / "hub/openai/gsm8k/main/test/a.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(parquet(rows_of("gsm8k")))
    assert len(hub.make(cache_dir=tmp_path)["gsm8k"].items("test")) == 5


def test_identity_conversations_split_by_line(server, tmp_path):
    task = server.tasks()["identity_conversations"]
    train, test = task.items("train"), task.items("test")
    assert (len(train), len(test)) == (38, 2) and not {i["id"] for i in train} & {
        i["id"] for i in test
    }
    assert train[0]["messages"] == CHAT
    (tmp_path / "identity_conversations.jsonl").write_text("[]\n")
    with pytest.raises(UserError, match="line 1: expected a list of messages"):
        hub.make(root=tmp_path)["identity_conversations"].items("train")


def test_a_formula_is_no_title_and_a_quote_may_begin_with_dots():
    lines = [
        " \n",
        " = First = \n",
        " \n",
        " The constant is given by \n",
        " = 1 k / s and a nominal k = \n",
        " which is \n",
        " = 2 = \n",
        " \n",
        " = = Part = = \n",
        " \n",
        " = ... Second = \n",
        " \n",
        ' " ... Later " is " a film " , said " he \n',
    ]
    first, second = hub.wikitext_articles([dict(text=line) for line in lines])
    assert first["text"].startswith(" = First = \n") and "= 2 =" in first["text"]
    text = '= ... Second =\n\n"... Later" is "a film", said " he\n'
    assert hub.detokenised(second["text"]) == text


# ---- grading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("So it is 72.\n#### 72", "72", True),
        ("#### 72.", "72", True),
        ("#### 72. That is all.", "72", True),
        ("####72", "72", True),
        ("#### 1,234", "1234", True),
        ("#### 1234", "1,234", True),
        ("#### $1,234.00", "1234", True),
        ("#### -5", "-5", True),
        ("#### 5", "-5", False),
        ("#### −5", "-5", True),
        ("#### -$5", "-5", True),
        ("#### 3.50", "3.5", True),
        ("#### .5", "0.5", True),
        ("#### 10.0", "10", True),
        ("#### 15%", "15", True),
        ("#### 7 apples", "7", True),
        ("#### 72", "720", False),
        ("#### 720", "72", False),
        ("The answer is 72", "72", False),
        ("#### none", "72", False),
        ("", "72", False),
        ("####", "72", False),
        ("#### 72\n#### 9", "72", True),
        (
            "<|python_start|>70+2<|python_end|><|output_start|>72<|output_end|>72\n####"
            " 72<|assistant_end|>",
            "72",
            True,
        ),
        ("#### 1.5", "15", False),
        ("#### 1,5", "15", True),
    ],
)
def test_gsm8k_compares_the_number_behind_the_mark(text, answer, right):
    assert hub.grade_gsm8k(dict(answer=str(number(answer))), text) is right


DEFINED = "def area(r):\n    return half(math.pi * r * r)\n"


@pytest.mark.parametrize(
    "text, right",
    [
        (ROWS["humaneval"][1]["messages"][1]["content"], True),
        (BODY, True),  # the body alone, as a base model continues the prompt
        (f"```python\n{BODY}```", True),
        # needs the prompt's import and its helper function
        (f"Sure:\n```python\n{DEFINED}```\nDone.", True),
        (f"```\n{DEFINED}", True),  # the fence was never closed
        (DEFINED.replace("half(", "("), False),
        ("    return 0\n", False),
        ("    import sys\n    sys.exit(0)\n", False),
        ("    import os\n    os._exit(0)\n", False),
        ("I cannot do that.", False),
        ("", False),
    ],
)
def test_humaneval_runs_the_tests(text, right):
    assert hub.grade_humaneval(ROWS["humaneval"][1], text) is right


def test_code_is_found_in_what_was_said():
    assert program_of("x\n```python\na = 1\n```\ny\n```python\nb = 2\n```") == "a = 1\n"
    assert program_of("```py\na = 1\n```<|assistant_end|>") == "a = 1\n"
    assert program_of("    return 1") == "    return 1"


# ---- a file of one's own -------------------------------------------------------------------------


def own(tmp_path, *records) -> Task:
    path = tmp_path / "own.jsonl"
    path.write_text("\n\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return jsonl(path)


def test_own_choices(tmp_path):
    asked = dict(question=" Which? ", choices=["red", "B", "blue"])
    task = own(
        tmp_path,
        asked | dict(answer=2, id="x"),
        asked | dict(answer="red"),
        asked | dict(answer="C"),
        asked | dict(answer="B"),
    )
    assert (
        task.kind == "choice"
        and [i["gold"] for i in task.items("test")] == [2, 0, 2, 1]
        and task.items("train") == []
    )
    assert [i["id"] for i in task.items("test")] == ["x", "own/3", "own/5", "own/7"]
    assert (
        task.items("test")[0]["messages"][0]["content"]
        == "Which?\n\n- red=A\n- B=B\n- blue=C\n\nAnswer with the letter alone."
    )


def test_own_continuations_and_texts(tmp_path):
    task = own(tmp_path, dict(context="The sky is", choices=["blue", " green"], answer=0))
    assert task.kind == "likelihood"
    assert task.items("test") == [
        dict(id="own/1", context="The sky is", choices=[" blue", " green"], gold=0)
    ]
    assert own(tmp_path, dict(text="Some text.")).items("test") == [
        dict(id="own/1", text="Some text.")
    ]
    assert own(tmp_path, dict(messages=CHAT)).items("test") == [dict(id="own/1", messages=CHAT)]


@pytest.mark.parametrize(
    "match, wanted, said, right",
    [
        ("exact", "Paris", " paris. ", True),
        ("exact", "Paris", "It is Paris", False),
        ("exact", ["Paris", "Lutetia"], "lutetia", True),
        ("contains", "Paris", "It is Paris, of course", True),
        ("contains", "Paris", "Parisian", False),
        ("number", "1234", "That makes $1,234.00.", True),
        ("number", "12", "12 or 13", False),
        ("number", "-3", "−3", True),
        ("number", "7", "no", False),
        ("exact", "4", "<|python_start|>2+2<|python_end|><|output_start|>5<|output_end|>4", True),
        ("number", "5", "<|output_start|>5<|output_end|>so four", False),
    ],
)
def test_own_answers_are_compared_as_asked(tmp_path, match, wanted, said, right):
    task = own(tmp_path, dict(question="?", answer=wanted, match=match))
    assert task.kind == "generate" and task.grade(task.items("test")[0], said) is right


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON"),
        ("[]", "it has no messages"),
        ("3", "expected a JSON object"),
        ("{}", "expected .question. or .context."),
        ('{"question": "a"}', "expected"),
        ('{"question": "a", "choices": ["x", "y"]}', "'answer' is missing"),
        (
            '{"question": "a", "choices": ["x", "y"], "answer": 2}',
            "answer 2 is none of the 2 choices",
        ),
        ('{"question": "a", "choices": ["x", "y"], "answer": -1}', "answer -1 is none"),
        ('{"question": "a", "choices": ["x", "y"], "answer": true}', "answer True is none"),
        ('{"question": "a", "choices": ["x", "y"], "answer": "z"}', "answer 'z' is none"),
        ('{"question": "a", "choices": ["x", "y"], "answer": "AB"}', "answer 'AB' is none"),
        ('{"question": "a", "choices": ["x"], "answer": 0}', "2 to 26"),
        ('{"question": "a", "choices": [], "answer": 0}', "choices must be text"),
        ('{"question": "a", "choices": ["x", 1], "answer": 0}', "choices must be text"),
        ('{"question": "a", "answer": 5}', "answer must be text"),
        ('{"question": "", "answer": "5"}', "question must be text"),
        (
            '{"question": "a", "answer": "5", "match": "fuzzy"}',
            "match 'fuzzy' is none of exact, contains, number",
        ),
        ('{"question": "a", "answer": "five", "match": "number"}', "'five' is no single number"),
        ('{"question": "a", "answer": "1/2", "match": "number"}', "'1/2' is no single number"),
        ('{"question": "a", "answer": "half. #### 1/2"}', "'1/2' is no single number"),
        (
            '{"messages": [{"role": "user", "content": "a"}, '
            '{"role": "assistant", "content": "b"}],'
            ' "answer": "5"}',
            "must end with the user's",
        ),
        ('{"messages": [{"role": "user"}]}', "message 0 has a content that is not text"),
        ('{"messages": 3}', "messages must be a list"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "nothing to measure"),
        ('{"text": ""}', "text must be text"),
        ('{"text": "a", "id": "own/1"}', "the id 'own/1' is taken"),
        (
            '{"question": "a", "answer": "5"}',
            "a generate item, but the lines above are perplexity items",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(UserError, match=rf"own.jsonl, line 3.*{message}"):
        own(tmp_path, '{"text": "fine"}', line)


def test_a_file_that_is_none_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot read .*nothing.jsonl: No such file"):
        jsonl(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="own.jsonl has no items"):
        own(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    with pytest.raises(UserError, match="latin.jsonl is not UTF-8"):
        jsonl(tmp_path / "latin.jsonl")


# ---- the order of options ------------------------------------------------------------------------


def test_shuffled_options_keep_their_answer():
    item = dict(id="m") | ROWS["mmlu"][1]
    turned = shuffled(item, [2, 1, 3, 0])
    assert (
        turned["options"] == ["5", "4", "22", "1"]
        and turned["gold"] == 1
        and turned["messages"][1]["content"] == "B"
    )
    assert (
        "- 5=A\n- 4=B\n- 22=C\n- 1=D" in turned["messages"][0]["content"]
        and turned["subject"] == "maths"
    )
    assert shuffled(turned, [3, 1, 0, 2]) == item
    pair = shuffled(ROWS["winogrande"][1], [1, 0])
    assert (
        pair["gold"] == 1
        and pair["context"][1].endswith("the cup")
        and shuffled(pair, [1, 0]) == ROWS["winogrande"][1]
    )
    with pytest.raises(UserError, match="item q does not tell its options apart"):
        shuffled(dict(id="q", letters=["A", "B"], gold=0, messages=CHAT), [1, 0])


# ---- code of the standard library ----------------------------------------------------------------


def test_code_completion_asks_about_held_out_files_only():
    items = stdlib.completion_items("test")
    assert 100 < len(items) <= stdlib.ITEMS
    assert items == stdlib.completion_items("test") and stdlib.completion_items("train") == []
    assert len({item["id"] for item in items}) == len(items)
    val = [document.expandtabs(8) for document in data.documents("stdlib", "val")]
    golds = np.bincount([item["gold"] for item in items], minlength=4) / len(items)
    assert golds.min() > 0.15 and golds.max() < 0.35
    for item in items[::20]:
        true = item["context"] + item["choices"][item["gold"]]
        assert any(true in document for document in val)
        assert not any(
            item["context"] + wrong in document
            for wrong in item["choices"]
            for document in val
            if wrong != item["choices"][item["gold"]]
        )
        assert (
            len({len(re.match(" *", choice)[0]) for choice in item["choices"]}) == 1
            and len(set(item["choices"])) == 4
        )


def test_all_entries_are_tasks_with_sound_baselines():
    assert set(ROWS) == set(hub.SOURCES) and set(hub.SOURCES) | {
        "identity_conversations",
        "code_completion",
        "source_text",
    } == set(hub.TASKS)
    for name, task in hub.TASKS.items():
        assert (task.grade is not None) == (task.kind == "generate"), name
        assert (task.baseline is None) == (task.kind == "perplexity"), name
    assert Path(hub.IDENTITY).name == "identity_conversations.jsonl"
