"""What 05_rl says before and after: the other tasks asked as they were asked before, and what is
kept of it in the run.
"""

import dataclasses
import json

import jax
import pytest

from lib import reinforce
from lib.data import Tokenizer
from lib.evals import records
from lib.params import init_params
from lib.reinforce import Examination
from lib.train import checkpoint
from tests.train.test_rl_rollouts import TINY

# ---- the other tasks once more -------------------------------------------------------------------


@pytest.fixture
def exam():
    return Examination(TINY, Tokenizer.train(["plain bytes"], 265), "spelling", 4, 2, max_tokens=8)


@pytest.fixture
def asked(monkeypatch):
    """What questions.evaluate is asked for, as a list that grows: (names, its settings) each."""
    calls = []

    def evaluate(params, config, tokenizer, names, asking, progress):
        calls.append((names, asking))
        return dict(tasks={name: dict(score=1.0) for name in names})

    monkeypatch.setattr(reinforce.questions, "evaluate", evaluate)
    return calls


def test_the_other_tasks_are_asked_as_they_were_before(exam, asked):
    before = dict(
        tasks=dict(
            counting=dict(kind="generate", limit=5, seed=7, max_tokens=96),
            source_text=dict(kind="perplexity", limit=3, seed=1),
        )
    )
    tasks = exam.once_more({}, before)

    assert list(tasks) == ["counting", "source_text"]
    (first, as_before), (second, of_text) = asked
    assert first == ["counting"]
    assert second == ["source_text"]
    assert (as_before.limit, as_before.seed, as_before.max_tokens) == (5, 7, 96)
    assert (of_text.limit, of_text.seed) == (3, 1)


def test_nothing_is_asked_twice_or_of_what_is_not_known(exam, asked):
    entry = dict(kind="generate", limit=5, seed=7, max_tokens=96)
    before = dict(
        tasks=dict(
            # its own task, which is measured anyway; a user's file; a task of CORE
            spelling=entry,
            mine=entry,
            counting=entry | dict(kind="core"),
        )
    )
    assert exam.once_more({}, before) == {}
    assert exam.once_more({}, {}) == {}
    assert asked == []


def test_a_model_that_did_not_change_gives_the_same_answers_once_more():
    tokenizer = Tokenizer.train(["plain bytes"], 265)
    params = init_params(jax.random.key(1), TINY)
    exam = Examination(TINY, tokenizer, "identity", 2, 2, max_tokens=4)
    before = exam.answers(params, greedy=True)
    # the same task, put by the examination of another
    other = Examination(TINY, tokenizer, "spelling", 2, 2, max_tokens=2)
    after = other.once_more(params, before)["identity"]

    entry = before["tasks"]["identity"]
    assert after["items"] == entry["items"]
    assert (after["max_tokens"], after["limit"]) == (4, 2)


# ---- what is kept --------------------------------------------------------------------------------


def entry(score: float) -> dict:
    return dict(kind="generate", score=score)


def kept(run, stage: str) -> dict:
    return json.loads((run / "evals" / f"{stage}.json").read_text())


@pytest.fixture
def run(tmp_path):
    """A run whose sft stage, at step 5, was measured in one task; and it has an rl stage at 3."""
    weights = dict(weight=jax.numpy.zeros(2))
    for stage, step in (("sft", 5), ("sft", 6), ("rl", 3)):
        checkpoint.save(tmp_path / stage, step, weights)
    records.write(
        tmp_path,
        "sft",
        dict(step=5, checkpoint="sft/step_00000005", seed=1, tasks=dict(counting=entry(0.5))),
    )
    return tmp_path


def test_what_was_measured_before_stands_beside_what_was_known(run):
    path = run / "sft" / "step_00000005"
    reinforce.keep(run, "sft", path, 4, dict(tasks=dict(spelling=entry(0.25))))
    record = kept(run, "sft")
    scores = {name: task["score"] for name, task in record["tasks"].items()}
    assert scores == dict(counting=0.5, spelling=0.25)
    assert (record["step"], record["checkpoint"]) == (5, "sft/step_00000005")


def test_a_record_of_another_checkpoint_is_left_as_it_is(run):
    before = kept(run, "sft")
    path = run / "sft" / "step_00000006"
    reinforce.keep(run, "sft", path, 4, dict(tasks=dict(spelling=entry(0.25))))
    assert kept(run, "sft") == before


def test_another_run_s_checkpoint_of_the_same_step_is_another(run, tmp_path_factory):
    """Its own record is neither added to nor read for it."""
    before, elsewhere = kept(run, "sft"), tmp_path_factory.mktemp("other")
    path = checkpoint.save(elsewhere / "sft", 5, dict(weight=jax.numpy.zeros(2)))
    assert records.read_of(run, "sft", run / "sft" / "step_00000005") == before
    assert records.read_of(run, "sft", path) == {}
    reinforce.keep(run, "sft", path, 4, dict(tasks=dict(spelling=entry(0.25))))
    assert kept(run, "sft") == before
    assert records.place_of(run, path) == str(path)


def test_a_file_called_like_a_known_task_is_not_taken_for_it():
    def name_of(task):
        return dataclasses.replace(exam, task=task).name

    exam = Examination(TINY, Tokenizer.train(["plain bytes"], 265), "spelling", 4, 2, max_tokens=8)
    assert name_of("mine/sums.jsonl.gz") == "sums" and name_of("spelling") == "spelling"
    assert name_of("mine/spelling.jsonl") == "mine/spelling.jsonl"


def test_no_record_is_begun_for_a_stage_that_was_never_measured(run):
    (run / "evals" / "sft.json").unlink()
    path = run / "sft" / "step_00000005"
    reinforce.keep(run, "sft", path, 4, dict(tasks=dict(spelling=entry(0.25))))
    assert not (run / "evals" / "sft.json").exists()


def test_the_stage_of_rewards_always_has_its_record(run):
    reinforce.keep(run, "rl", run / "rl" / "step_00000003", 4, dict(tasks=dict(a=entry(0.25))))
    record = kept(run, "rl")
    assert (record["step"], record["seed"], record["checkpoint"]) == (3, 4, "rl/step_00000003")
    assert record["tasks"]["a"]["score"] == 0.25
