"""CORE's bundle and its lines, by hand: no model and no tokenizer of ours."""

import hashlib
import types
import zipfile

import pytest

from lib.evals import core
from lib.files import UserError

# ---- the bundle ----------------------------------------------------------------------------------


def test_the_list_nearest_to_the_top_counts_and_no_shadow_of_macos(tmp_path):
    path = tmp_path / "b.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("__MACOSX/core.yaml", "a/b/core.yaml", "a/core.yaml", "a/x"):
            archive.writestr(name, name)
    names, read = core._archive(path)
    assert names == ["a/b/core.yaml", "a/core.yaml", "a/x"]
    assert read("core.yaml") == "a/core.yaml" and read("x") == "a/x"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/core.yaml", "")
    with pytest.raises(UserError, match="holds no core.yaml"):
        core._archive(path)


def test_a_folder_may_have_the_bundle_within_and_what_is_read_is_summed(tmp_path):
    inside = tmp_path / "eval_bundle"
    inside.mkdir()
    for name, content in (("core.yaml", b"a list"), ("half", b"\xff"), ("more", b"more")):
        (inside / name).write_bytes(content)
    bundle = core.Bundle(tmp_path)
    assert bundle.text("core.yaml") == "a list" and bundle.text("more") == "more"
    assert bundle.digest.hexdigest() == hashlib.sha256(b"a listmore").hexdigest()
    with pytest.raises(UserError, match="gone is missing in"):
        bundle.text("gone")
    with pytest.raises(UserError, match="half"):
        bundle.text("half")
    # the one at the top comes first
    (tmp_path / "core.yaml").write_text("another")
    assert core.Bundle(tmp_path).text("core.yaml") == "another"


def test_baselines_are_in_per_cent_and_not_of_every_task():
    texts = {core.CONFIG: "icl_tasks: [a, b]"}
    texts[core.BASELINES] = "Eval Task,Random baseline\na,25\nb,\nc,0\n"
    bundle = types.SimpleNamespace(text=texts.__getitem__, path="here")
    assert core._list_of_tasks(bundle) == (["a", "b"], dict(a=0.25, c=0.0))
    items = '{"a": 1}\n  {"a": 2}\n'
    texts[f"{core.DATA}/x.jsonl"] = items
    assert core._items(bundle, "x.jsonl") == [dict(a=1, id="0"), dict(a=2, id="1")]


# ---- tokens --------------------------------------------------------------------------------------


def test_what_all_begin_with():
    assert core.common_start([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert core.common_start([[1, 2], [1, 2, 4]]) == 2 and core.common_start([[1], [2]]) == 0
    assert core._schema_spans([[1, 2, 9, 8], [3, 9, 8]]) == [([1, 2, 9, 8], 2), ([3, 9, 8], 1)]
    assert core._language_spans([[1, 2], [1, 2]]) == []
    assert core._language_spans([[1, 2], [1, 3]]) == [([1, 3], 1)]


def test_continuations_that_change_the_context_are_counted():
    items = tuple(dict(context=c, continuation="x", id=c) for c in "ab")
    task = core.CoreTask("t", "language_modeling", "s", 0, " ", 0.0, items)
    tokens = [[1, 2, 3], [1, 2, 9, 9], [1, 2], [1, 2, 3]]
    tokenizer = types.SimpleNamespace(encode_batch=lambda prompts, bos: bos and tokens)
    prepared = core.prepare(tokenizer, task)
    assert prepared.moved == 1 and prepared.spans == [(0, 1), (1, 1)]
    assert prepared.requests == [([1, 2], [[9, 9]]), ([1, 2], [[3]])]
    tokens[3] = [1, 2]
    with pytest.raises(UserError, match="t item b: its continuation adds no token"):
        core.prepare(tokenizer, task)


def test_examples_are_all_others():
    items = tuple(dict(id=str(i)) for i in range(4))
    task = core.CoreTask("t", "schema", "s", 3, " ", 0.0, items)
    for index in range(4):
        shown = {item["id"] for item in core.examples_of(task, index)}
        assert shown == {"0", "1", "2", "3"} - {str(index)}


def test_gold_is_one_of_the_options():
    for item in (dict(gold=1, choices="ab"), dict(gold=0, context_options="a"), dict(query="a")):
        core._check_gold(item)
    for item in (dict(gold=2, choices="ab"), dict(gold=-1, context_options="ab"), dict(gold=0)):
        with pytest.raises(UserError, match="outside its options"):
            core._check_gold(item)


def test_the_words_of_every_kind_of_item():
    words = [
        core._words("multiple_choice", dict(query="q", choices=["x", "y"], gold=1)),
        core._words("schema", dict(context_options=["x", "y"], continuation="z", gold=1)),
        core._words("language_modeling", dict(context="c", continuation="z")),
    ]
    assert words == ["q y", "y z", "c z"]


# ---- lines ---------------------------------------------------------------------------------------


def test_a_measurement_in_lines():
    entry = dict(score=0.5, stderr=0.125, baseline=0.25, centered=1 / 3, n=8, per_second=2.0)
    line = "t: 50.0 ± 12.5 % (random 25.0 %), centred +0.333, 8 items, 2.0/s"
    assert core.line("t", entry | dict(truncated=0)) == line
    assert core.line("t", entry | dict(truncated=3)) == line + ", 3 truncated"
    whole = dict(score=0.25, stderr=0.0625, tasks=dict(a=1, b=2))
    line = "CORE 0.2500 ± 0.0625, the mean of 2 centred scores (0 is chance, 1 perfect)"
    assert core.headline(whole) == core.headline(whole | dict(partial=False)) == line
    assert core.headline(whole | dict(partial=True)) == line + ", of a part of the benchmark"


def test_the_sum_keeps_tasks_without_their_items():
    items = [dict(id="0", correct=1), dict(id="1", correct=0)]
    entry = dict(score=0.5, stderr=0.25, n=2, baseline=0.0, centered=0.5, items=items, seed=1)
    told = core.summary({"a": entry})
    short = dict(accuracy=0.5, centered=0.5, stderr=0.25, n=2, baseline=0.0)
    assert told["tasks"] == {"a": short} and told["score"] == 0.5
