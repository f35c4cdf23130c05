"""Small parts of the measurements, by hand."""

import math
import types

import numpy as np
import pytest

from lib.data.tokenizer import Tokenizer
from lib.evals import core, likelihood, questions, stats
from lib.files import UserError
from tests.helpers.golden import PARITY

TOKENIZER = Tokenizer.load(PARITY / "tokenizer.json")


# ---- CORE ----------------------------------------------------------------------------------------


def test_a_measurement_of_tasks_says_how_fast_it_was_and_of_what(monkeypatch):
    tasks = [types.SimpleNamespace(label=label, items=[1, 2]) for label in ("one", "two")]
    monkeypatch.setattr(core, "load_bundle", lambda *_: (tasks, "digest"))
    monkeypatch.setattr(core, "prepare", lambda *_: types.SimpleNamespace(requests=[]))
    monkeypatch.setattr(core, "decide", lambda *_: dict(n=2))
    monkeypatch.setattr(core, "summary", lambda entries: dict(score=len(entries)))
    monkeypatch.setattr(core, "line", lambda label, entry: label)
    monkeypatch.setattr(core, "headline", lambda core: "CORE")

    def measured(*seconds, **options):
        clock = iter(seconds).__next__
        monkeypatch.setattr(core, "time", types.SimpleNamespace(perf_counter=clock))
        told = []
        record = core.evaluate(lambda requests: [], None, report=told.append, **options)
        return record["core"], record["tasks"], told

    whole, entries, told = measured(10.0, 20.0, 24.0, 30.0, 38.0, 50.0)
    figures = dict(seconds=40.0, per_second=0.1, limit=None, bundle="digest", partial=False)
    assert whole.items() >= (figures | dict(score=2)).items() and told == ["one", "two", "CORE"]
    assert entries["core/one"] == dict(n=2, seconds=4.0, per_second=0.5, limit=None)
    assert entries["core/two"]["per_second"] == 0.25
    part, entries, told = measured(10.0, 20.0, 24.0, 50.0, only=["two"])
    assert part["partial"] and list(entries) == ["core/two"] and told == ["two", "CORE"]
    part, entries, _ = measured(10.0, 20.0, 24.0, 30.0, 38.0, 50.0, limit=1)
    assert part["partial"] and part["limit"] == entries["core/one"]["limit"] == 1


def test_a_measurement_during_training_has_every_task(monkeypatch):
    tasks = [types.SimpleNamespace(label=label, items=[1, 2]) for label in ("one", "two")]
    asked = []
    monkeypatch.setattr(core, "load_bundle", lambda *given: asked.append(given) or (tasks, ""))
    monkeypatch.setattr(
        core,
        "prepare",
        lambda tokenizer, task: types.SimpleNamespace(task=task, requests=task.label),
    )
    monkeypatch.setattr(
        core, "scorer", lambda params, *_, **more: lambda label: (params, label, more)
    )
    centered = {"one": 0.25, "two": 0.75}
    monkeypatch.setattr(
        core, "decide", lambda one, score: dict(centered=centered[score[1]], by=score)
    )
    monkeypatch.setattr(core, "summary", lambda entries: dict(score=len(entries), stderr=0.5))
    measure = core.during_training(None, None, "bundle", limit=7, room=9)
    assert [given[::2] for given in asked] == [("bundle", 7)]
    for params in ("early", "late"):
        assert measure(params) == {
            "core": 2,
            "core_stderr": 0.5,
            "core/one": 0.25,
            "core/two": 0.75,
        }


# ---- letters -------------------------------------------------------------------------------------


def lettered(letters, gold=0):
    config = types.SimpleNamespace(sequence_len=64)
    job = types.SimpleNamespace(tokenizer=TOKENIZER, config=config)
    messages = [{"role": "user", "content": "which?"}]
    return questions._lettered(job, dict(letters=letters, gold=gold, messages=messages))


def test_letters_are_one_token_each():
    asked = lettered(["a", "b"], gold=1)
    assert asked.letters == [TOKENIZER.encode("a")[0], TOKENIZER.encode("b")[0]]
    assert not asked.cut and asked.ids[-1] == TOKENIZER.special["<|assistant_start|>"]
    long = "zq"
    assert len(TOKENIZER.encode(long)) == 2
    for letters, gold in (([long, "b"], 1), (["a", long], 0), (["a", "b"], 2), (["a"], -1)):
        with pytest.raises(UserError, match="one token each"):
            lettered(letters, gold)


# ---- batches -------------------------------------------------------------------------------------


def test_the_longest_come_first_and_results_by_their_place():
    done, told = [], []
    bar = types.SimpleNamespace(update=told.append)
    job = types.SimpleNamespace(items=list("abcd"), bar=bar)
    at_work = []

    class Evaluating:
        def __init__(self, items):
            at_work.append(items)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

    job.evaluating = Evaluating
    batch = lambda part: done.append(list(part)) or [10 * i for i in part]
    results = questions.TaskJob.in_batches(job, [1, 4, 2, 3], 3, batch)
    assert results == [0, 10, 20, 30] and done == [[1, 3, 2], [0]] and told == [3, 1]
    assert at_work == [["b", "c", "d"], ["a"]]
    at_work.clear()
    questions.TaskJob.in_batches(job, [1, 4, 2], 2, batch, owners=[3, 0, 3])
    assert at_work == [["a", "d"], ["d"]]


# ---- whole records -------------------------------------------------------------------------------


def test_what_was_measured_and_what_was_skipped(monkeypatch):
    seen = []
    chosen = dict(here="task", away="task", there="task")
    loaded = dict(here=[1], away="no network", there=[2, 3])
    by_call = iter(loaded.values())
    monkeypatch.setattr(questions, "find", lambda names, known: chosen)
    monkeypatch.setattr(questions, "ThreadPoolExecutor", OneByOne)
    monkeypatch.setattr(questions, "items_or_reason", lambda task, limit: next(by_call))
    monkeypatch.setattr(
        questions, "_measured", lambda job: seen.append((job.name, job.items)) or len(job.items)
    )
    monkeypatch.setattr(questions.stats, "chatcore", lambda entries: sum(entries.values()) - 3)
    record = questions.evaluate(
        None, None, TOKENIZER, None, questions.Questions(), known={}, answers="ask", progress=False
    )
    assert record == dict(tasks=dict(here=1, there=2), skipped=dict(away="no network"))
    assert seen == [("here", [1]), ("there", [2, 3])]


class OneByOne:
    """What stands for a pool of threads."""

    def __init__(self, threads):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


@pytest.mark.parametrize("counts, alone", [((1, 1), True), ((1, 2), False), ((2, 2), False)])
def test_only_where_nothing_is_to_choose_from_a_perplexity_is_told(monkeypatch, counts, alone):
    made = []
    asked = [types.SimpleNamespace(length=9, cut=i) for i in range(2)]
    scored = [[likelihood.Score(-2.0, 4, True, 0)] * count for count in counts]
    job = types.SimpleNamespace(settings=types.SimpleNamespace(batch=1))
    job.each = lambda function: asked
    job.in_batches = lambda lengths, size, function: scored
    job.judge = lambda means: made.append(means) or [1.0, 0.0]
    job.outcomes = lambda correct: [{} for _ in correct]
    monkeypatch.setattr(questions, "_one_continuation", lambda *_: ([0.0, 0.0], dict(alone=True)))
    monkeypatch.setattr(
        questions, "_accuracy", lambda job, correct, options, **more: (correct, options, more)
    )
    correct, options, more = questions._likelihood(job)
    assert ("alone" in more) == alone and correct == ([0.0, 0.0] if alone else [1.0, 0.0])
    assert options == list(counts) and more["truncated"] == 1
    assert made == [[[-0.5] * count for count in counts]]


# ---- rows that share a beginning -----------------------------------------------------------------


def row(ids, first=0, scored=1):
    return likelihood.Row(np.array(ids, ">i4").tobytes(), first, [[0] * scored], [None])


def test_rows_and_groups_by_hand():
    one = row([1, 2, 3, 300], first=3, scored=2)
    assert (one.ids.tolist(), one.length, one.scored) == ([1, 2, 3, 300], 4, 2)
    alone, both = likelihood.Group([one]), likelihood.Group([one, row([1, 2, 9])], shared=2)
    assert (alone.length, alone.first, alone.key_ids.tolist()) == (4, 3, [1, 2, 3, 300])
    assert (both.length, both.first, both.key_ids.tolist()) == (2, 2, [1, 2])
    assert alone.key == one.key and both.key == one.key[:8]


def test_how_much_is_read_at_once():
    config = types.SimpleNamespace(sequence_len=8)
    read = lambda batch=9, most=None, stride=None: likelihood._reading(
        config, batch, most, stride, True, None
    )
    assert read()[:3] == (9, 8, 8) and read(most=5)[:3] == (9, 5, 5)
    assert read(1, 1, 1)[:3] == (1, 1, 1) and read(9, 5, 3)[:3] == (9, 5, 3)
    assert likelihood._reading(config, None, None, None, True, None).batch_tokens >= 1
    for bad in ((0, 5, 3), (9, -1, -1), (9, 5, -1), (9, 5, 6)):
        with pytest.raises(UserError, match="of at least 1 and stride <= max_tokens"):
            read(*bad)


# ---- comparisons ---------------------------------------------------------------------------------


def test_bits_of_texts_that_differ_are_compared_by_their_errors():
    a, b = dict(bpb=2.0, stderr=0.3), dict(bpb=1.0, stderr=0.4)
    compared = stats._compare_bits("text", a, b)
    assert (compared.label, compared.delta, compared.n) == ("text", -1.0, 0)
    assert compared.stderr == pytest.approx(0.5) and compared.better == "lower"
    assert compared.p == pytest.approx(math.erfc(2 / math.sqrt(2)), rel=1e-6)
    assert compared.unit == "bits per byte" and compared.improved
    assert compared.interval == pytest.approx((-1 - 0.98, -1 + 0.98))
    # where one has no error (0 in older records), nothing tells whether it is chance
    for a, b in ((None, None), (0.1, None), (0, 0)):
        unknown = stats._compare_bits("t", dict(bpb=2.0, stderr=a), dict(bpb=1.0, stderr=b))
        assert (unknown.p, unknown.stderr, unknown.interval) == (1.0, None, None)


def test_a_mean_is_compared_by_its_own_tasks():
    tasks = {"a": {"kind": "core"}, "b": {"kind": "choice"}, "c": {"kind": "core"}, "d": {}}
    record = dict(tasks=tasks, core={}, chatcore=dict(tasks=["b", "gone"]))
    assert stats._members(record, "core") == {"a": tasks["a"], "c": tasks["c"]}
    assert stats._members(record, "chatcore") == {"b": tasks["b"]}


def test_which_of_two_is_better():
    compared = lambda delta, better: stats.Comparison("x", delta, 0.1, 1.0, 1, "t", "u", better)
    for delta, better, improved in (
        (1.0, "higher", True),
        (-1.0, "higher", False),
        (1.0, "lower", False),
        (-1.0, "lower", True),
        (0.0, "higher", False),
        (0.0, "lower", False),
    ):
        assert compared(delta, better).improved == improved
    assert not compared(1.0, "lower").real
    for p, real in ((0.0499, True), (0.05, False)):
        assert stats.replace(compared(1.0, "lower"), p_adjusted=p).real == real


def test_errors_by_hand():
    assert stats.proportion([1, 0, 0, 0]) == (0.25, pytest.approx(math.sqrt(0.25 * 0.75 / 4)))
    for value in (0.0, 1.0):
        p = 0.5 / 5
        assert stats.proportion([value] * 4) == (value, pytest.approx(math.sqrt(p * (1 - p) / 4)))
    assert all(math.isnan(number) for number in stats.proportion([]))
    mean, error = stats.ratio([2.0, 4.0], [1.0, 3.0])
    # residuals 2 - 1.5 and 4 - 4.5, of two items
    assert (mean, error) == (1.5, pytest.approx(math.sqrt(0.5 * 2 / 1) / 4))
    # one draw has no spread, and an item without size is no draw
    assert stats.ratio([3.0], [2.0]) == stats.ratio([3.0, 0.0], [2.0, 0.0]) == (1.5, None)
