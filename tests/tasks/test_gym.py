"""reasoning_gym's sets: divided, graded by their own answer and nothing else."""

import pytest

from lib.files import UserError
from lib.tasks import gym, to_reinforce

pytest.importorskip("reasoning_gym", reason="the extra gym is not installed")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(gym, "TRAIN_ITEMS", 40)
    monkeypatch.setattr(gym, "TEST_ITEMS", 20)
    gym._drawn.cache_clear()
    yield
    gym._drawn.cache_clear()


def test_a_set_of_numbers():
    task = to_reinforce("gym:chain_sum")
    learnt, tested = task.items("train"), task.items("test")
    asked = {item["messages"][0]["content"] for item in learnt}
    assert len(learnt) > 30 and tested
    assert not asked & {item["messages"][0]["content"] for item in tested}
    item = learnt[0]
    assert task.grade(item, item["answer"]) and task.grade(item, f"It is {item['answer']}.")
    for wrong in ("", "?", f"{item['answer']} or 7", item["messages"][0]["content"], "9" * 300):
        assert not task.grade(item, wrong), wrong


def test_a_set_of_words_pays_for_nothing_beside_them():
    task = to_reinforce("gym:word_sorting")
    item = task.items("train")[0]
    assert task.grade(item, item["answer"] + ".")
    # the set's own score pays a part for each of these
    for wrong in ("", f"The answer is {item['answer']}", item["answer"] + " and more"):
        assert not task.grade(item, wrong), wrong


def test_an_unknown_set_is_refused():
    with pytest.raises(UserError, match="chain_sum"):
        to_reinforce("gym:chain_sun")
