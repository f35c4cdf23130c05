"""What lm_eval's requests mean for us and what is kept of its results, by hand and without it."""

import json
import sys
import types
import warnings

import numpy as np
import pytest

from lib.data.tokenizer import Tokenizer
from lib.evals import harness
from lib.evals.likelihood import Score
from lib.files import UserError
from tests.helpers.golden import PARITY

TOKENIZER = Tokenizer.load(PARITY / "tokenizer.json")


def test_arguments_of_generation():
    asked = lambda arguments, room=999: harness.sampling(arguments, (3,), 7, room)
    plain = asked({})
    assert (plain.max_tokens, plain.temperature, plain.seed, plain.stop) == (256, 0.0, 7, (3,))
    assert plain.stop_strings == ()
    # whatever it is called, and never more than there is room for
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert asked({name: 9}).max_tokens == 9 and asked({name: 9}, 5).max_tokens == 5
    assert asked({"until": "\n"}).stop_strings == ("\n",)
    assert asked({"until": ["a", "", "b"]}).stop_strings == ("a", "b")
    assert asked({"until": None}).stop_strings == ()
    # who samples: as it says, else by the temperature
    for arguments, temperature in (
        ({"temperature": 0.5}, 0.5),
        ({"temperature": 0.5, "do_sample": False}, 0.0),
        ({"temperature": 0.5, "do_sample": True}, 0.5),
        ({"do_sample": True}, 0.0),
    ):
        assert asked(arguments).temperature == temperature
    filters = dict(top_k=4, top_p=0.5, min_p=0.25, repetition_penalty=2.0)
    for name, value in filters.items():
        assert getattr(asked(filters), name) == value
    with pytest.raises(UserError, match="generation argument beams, other is not known"):
        asked({"beams": 2, "temperature": 1, "other": 1})


def test_contexts_are_texts_or_chats():
    assert harness.context_ids(TOKENIZER, "ab") == ([TOKENIZER.bos], "ab")
    user = {"role": "user", "content": "a"}
    begun = {"role": "assistant", "content": "so "}
    for messages, rest in (([user], "x"), ([user, begun], "so x")):
        context = harness.CHAT + json.dumps(messages) + "x"
        ids, text = harness.context_ids(TOKENIZER, context)
        assert ids == TOKENIZER.render_for_completion(messages) and text == rest
    ids, after = harness.pair_ids(TOKENIZER, "a", " b")
    assert ids[0] == TOKENIZER.bos and TOKENIZER.decode([*ids[1:], *after]) == "a b" and after


def test_prompts_leave_room_for_their_answers():
    """Half of the context is for the prompt at least, and of a longer one the end is kept."""
    checkpoint = object.__new__(harness.Checkpoint)
    config = types.SimpleNamespace(sequence_len=20)
    checkpoint.model = types.SimpleNamespace(tokenizer=TOKENIZER, config=config)
    checkpoint.stop, checkpoint.seed = (3,), 5
    text = "abcdefghijklmnopq"
    ids = TOKENIZER.encode(text)
    cuts = []
    for count, tokens in ((5, 10), (9, 3), (9, 10), (9, 11), (10, 10), (11, 10), (17, 3), (17, 4)):
        context = TOKENIZER.decode(ids[:count])
        whole = [TOKENIZER.bos, *TOKENIZER.encode(context)]
        request = types.SimpleNamespace(args=(context, {"max_tokens": tokens}))
        prompt = checkpoint._prompt(2, request)
        room = 20 - min(tokens, 10)
        assert prompt.sampling.max_tokens == min(tokens, 10) and prompt.sampling.seed == 7
        assert prompt.cut == (len(whole) > room)
        want = whole if len(whole) <= room else [whole[0], *whole[len(whole) - room + 1 :]]
        assert prompt.ids == want and len(prompt.ids) <= room
        cuts.append(prompt.cut)
    assert set(cuts) == {True, False}


def test_where_nothing_is_asked_nothing_is_written():
    checkpoint = object.__new__(harness.Checkpoint)
    checkpoint.answers = checkpoint.model = None
    assert checkpoint.generate_until([]) == []


@pytest.mark.parametrize("rows", ["0", 0, "many", -1, 1.5])
def test_rows_at_once_are_a_number(rows):
    with pytest.raises(UserError, match="a number of rows is needed"):
        harness.Checkpoint("nowhere", batch_size=rows)
    with pytest.raises(UserError, match="JAX chooses the device"):
        harness.Checkpoint("nowhere", device="cuda")


def test_results_of_one_checkpoint_are_put_together():
    config = dict.fromkeys(harness.records.IDENTITY, "same")
    entry = lambda name, score: {
        "config": config,
        "date": score,
        "results": {name: score},
        "measured": {name: score},
    }
    merged = harness._merged(entry("a", 1), entry("b", 2))
    assert merged == {
        "config": config,
        "date": 2,
        "results": {"a": 1, "b": 2},
        "measured": {"a": 1, "b": 2},
    }
    assert harness._merged(entry("a", 1), entry("a", 2))["results"] == {"a": 2}
    assert harness._merged({}, entry("a", 1)) == entry("a", 1)
    groups = {"groups": {"g": 1}}
    assert harness._merged(entry("a", 1) | groups, entry("b", 2))["groups"] == {"g": 1}
    for key in harness.records.IDENTITY:
        other = entry("a", 1) | {"config": config | {key: "other"}} | groups
        assert harness._merged(other, entry("b", 2)) == entry("b", 2)


def test_scores_in_words():
    figures = {"acc,none": 0.5, "acc_stderr,none": 0.25, "alias": "x", "f1,a": 1.0, "n": 3}
    figures |= {"f1_stderr,a": "N/A", "em,b": 0.125, "em_stderr,a": 0.5}
    lines = harness.scores_text({"results": {"task": figures}}).splitlines()
    assert [line.split() for line in lines] == [
        ["task", "acc", "0.5000", "±", "0.2500"],
        ["task", "f1", "1.0000"],
        ["task", "em", "0.1250"],
    ]


def test_the_command_hands_its_settings_on(monkeypatch, capsys, tmp_path):
    given = {}

    def evaluate(folder, tasks, **options):
        given.update(folder=folder, tasks=tasks, **options)
        return {"results": {}}

    monkeypatch.setattr(harness, "_import", lambda: None)
    monkeypatch.setattr(harness, "evaluate", evaluate)
    monkeypatch.setattr(harness, "write", lambda folder, results: "where")
    runs = dict(runs_dir=str(tmp_path))
    harness.main(harness.HarnessSettings("nest", "a,b c", **runs))
    none = dict(include_path=None, limit=None, num_fewshot=None)
    plain = dict(stage="", ckpt="", batch_size=32, apply_chat_template=False, bootstrap_iters=1000)
    assert given == none | plain | dict(folder=tmp_path / "nest", tasks=["a", "b", "c"])
    assert capsys.readouterr().out.endswith("results: where\n")
    more = dict(include_path="x", limit=3, num_fewshot=0, stage="sft", ckpt="best", batch_size=4)
    harness.main(harness.HarnessSettings("nest", "a", chat_template=True, **more, **runs))
    assert {name: given[name] for name in more} == more and given["apply_chat_template"] is True
    harness.main(harness.HarnessSettings("nest", "a", num_fewshot=5, **runs))
    assert given["num_fewshot"] == 5


# ---- our model as one of theirs ------------------------------------------------------------------


def checkpoint_of(**more):
    """A Checkpoint without weights."""
    checkpoint = object.__new__(harness.Checkpoint)
    config = types.SimpleNamespace(sequence_len=20)
    checkpoint.model = types.SimpleNamespace(
        params="weights", config=config, tokenizer=TOKENIZER, **more
    )
    checkpoint.stop, checkpoint.seed = (3,), 5
    return checkpoint


def requests(*arguments):
    return [types.SimpleNamespace(args=one) for one in arguments]


def test_continuations_of_one_context_are_asked_together(monkeypatch):
    asked = []

    def score(params, config, tokenizer, requests):
        asked.append(requests)
        scores = iter(
            [Score(-1.0, 1, True, 0), Score(-2.0, 1, False, cut), Score(-3.0, 1, True, 0)]
        )
        return [[next(scores) for _ in after] for _, after in requests]

    monkeypatch.setattr(harness.likelihood, "score", score)
    checkpoint, given = checkpoint_of(), requests(("a", " b"), ("z", " d"), ("a", " c"))
    cut = 1
    with pytest.warns(UserWarning, match="1 of 3 contexts were longer than the model's 20 tokens"):
        answers = checkpoint.loglikelihood(given)
    assert answers == [(-1.0, True), (-3.0, True), (-2.0, False)]
    [(first, second)] = asked
    (a, b), (_, c) = (harness.pair_ids(TOKENIZER, "a", text) for text in (" b", " c"))
    z, d = harness.pair_ids(TOKENIZER, "z", " d")
    assert first == (a, [b, c]) and second == (z, [d])
    cut = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.loglikelihood(given) == answers


def test_whole_texts_are_summed(monkeypatch):
    read = []

    def rolling(params, config, tokenizer, texts):
        read.extend(texts)
        return [np.float32([-1.0, -2.0]), np.float32([-4.0])]

    monkeypatch.setattr(harness.likelihood, "rolling", rolling)
    assert checkpoint_of().loglikelihood_rolling(requests(("ab",), ("c",))) == [-3.0, -4.0]
    assert read == [TOKENIZER.encode("ab"), TOKENIZER.encode("c")]


def test_what_is_written_comes_in_the_order_it_was_asked_in():
    asked = []

    def texts(prompts, samplings):
        asked.extend(zip(prompts, samplings))
        for i in reversed(range(len(prompts))):
            yield i, None
            yield i, TOKENIZER.encode("xyz"[i])

    checkpoint = checkpoint_of()
    checkpoint.answers = types.SimpleNamespace(texts=texts)
    given = requests(("a", {}), ("b" * 40, {"max_tokens": 4}), ("c", {"max_tokens": 4}))
    with pytest.warns(UserWarning, match="1 of 3 contexts"):
        assert checkpoint.generate_until(given) == ["x", "y", "z"]
    assert [(sampling.max_tokens, sampling.seed) for _, sampling in asked] == [
        (10, 5),
        (4, 6),
        (4, 7),
    ]
    assert len(asked[1][0]) == 16


def test_which_model_a_checkpoint_loads(monkeypatch, tmp_path):
    loaded, asked = [], []
    model = types.SimpleNamespace(params="weights", config="config", tokenizer=TOKENIZER)
    monkeypatch.setattr(harness, "load_model", lambda *which: loaded.append(which) or model)
    monkeypatch.setattr(harness.questions, "model_answers", lambda *given: asked.append(given))
    plain = harness.Checkpoint("nest", runs_dir=str(tmp_path))
    full = harness.Checkpoint("nest", "sft", "best", str(tmp_path), "4", "7")
    assert loaded == [(tmp_path / "nest", "", ""), (tmp_path / "nest", "best", "sft")]
    assert asked == [("weights", "config", TOKENIZER, rows) for rows in (32, 4)]
    assert (plain.seed, full.seed) == (0, 7)
    assert plain.stop == harness.questions.stop_ids(TOKENIZER)


def test_how_a_checkpoint_calls_itself(monkeypatch):
    monkeypatch.setattr(harness, "count_params", lambda config: dict(total=9))
    checkpoint = checkpoint_of(path="runs/a", stage="sft", meta=dict(step=7))
    assert checkpoint.tokenizer_name == f"rawchat-{TOKENIZER.fingerprint[:16]}"
    assert checkpoint.get_model_info() == dict(
        checkpoint="runs/a", stage="sft", step=7, model_num_parameters=9
    )
    chat = [{"role": "user", "content": "a"}]
    assert checkpoint.apply_chat_template(chat) == harness.CHAT + json.dumps(chat)


# ---- lm_eval, which only notes what it is asked --------------------------------------------------


@pytest.fixture
def lm_eval(monkeypatch):
    """A stand-in for lm_eval; `given` is what it was asked."""
    package, tasks, utils = (
        types.ModuleType(f"lm_eval{part}") for part in ("", ".tasks", ".utils")
    )
    package.given, package.error = {}, None

    def simple_evaluate(**options):
        package.given.update(options)
        if package.error:
            raise package.error
        return {"config": {}}

    class TaskManager:
        def __init__(self, **options):
            package.given["manager"] = options
            self.all_tasks = ["a", "b"]

    package.simple_evaluate, tasks.TaskManager = simple_evaluate, TaskManager
    utils.handle_non_serializable = str
    for module in (package, tasks, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(harness, "register", lambda: lambda *model: model)
    return package


def test_what_lm_eval_is_asked(lm_eval, tmp_path):
    options = dict(stage="sft", ckpt="best", limit=3, apply_chat_template=True, batch_size=4)
    results = harness.evaluate(tmp_path / "nest", ["a"], **options)
    assert lm_eval.given["model"] == ("nest", "sft", "best", str(tmp_path), 4)
    assert lm_eval.given["tasks"] == ["a"] and lm_eval.given["limit"] == 3
    assert "batch_size" not in lm_eval.given and results["config"]["chat_template"] is True
    assert lm_eval.given["manager"] == dict(include_path=None, include_defaults=True)
    # what is not said, and tasks of one's own
    results = harness.evaluate(
        str(tmp_path / "nest"), ["b"], include_path=tmp_path, defaults=False, batch_size=None
    )
    assert lm_eval.given["model"] == ("nest", "", "", str(tmp_path), 32)
    assert lm_eval.given["manager"] == dict(include_path=str(tmp_path), include_defaults=False)
    assert results["config"]["chat_template"] is False


def test_what_cannot_be_measured_is_told_in_a_sentence(lm_eval, tmp_path):
    with pytest.raises(UserError, match="lm_eval knows no task c, d: see"):
        harness.evaluate(tmp_path, ["a", "c", "d"])
    with pytest.raises(UserError, match="include_path .*none is no folder"):
        harness.evaluate(tmp_path, ["a"], include_path=tmp_path / "none")
    assert "model" not in lm_eval.given
    for error in (OSError("away"), ConnectionError("away")):
        lm_eval.error = error
        with pytest.raises(UserError, match=r"could not get a task's data \(away\)"):
            harness.evaluate(tmp_path, ["a"])


def test_results_are_kept_with_their_settings(lm_eval, tmp_path):
    config = dict(stage="sft", step=1, checkpoint="c", limit=3, chat_template=True, other=1)
    results = dict(results={"a": {"acc,none": 0.5}}, groups={"g": {}}, config=config, samples="all")
    path = harness.write(tmp_path, results | dict(date=1.5))
    kept = json.loads(path.read_text())
    assert path == tmp_path / "evals" / "lm_eval_sft.json"
    assert kept["results"] == results["results"] and kept["date"] == 1.5 and "samples" not in kept
    assert set(kept["measured"]) == {"a", "g"}
    for measured in kept["measured"].values():
        assert measured.pop("time").endswith("Z")
        assert measured == dict(limit=3, chat_template=True)
    # another task of the same checkpoint stands beside it
    harness.write(tmp_path, results | dict(results={"b": {}}))
    assert set(json.loads(path.read_text())["results"]) == {"a", "b"}
