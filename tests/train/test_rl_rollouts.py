"""Rollouts: the same by seed whatever is beside them, every chosen token learnt and no tool's,
log-probabilities that are the learner's, rows of which none is lost.
"""

import jax
import numpy as np
import pytest

from lib import model
from lib.config import Config
from lib.data import Tokenizer
from lib.files import UserError
from lib.generate import Token
from lib.params import init_params
from lib.train import rollouts
from lib.train.rollouts import Question, Rollout

TINY = Config(
    vocab_size=265,
    sequence_len=64,
    n_layer=1,
    n_embd=32,
    n_head=2,
    n_kv_head=1,
    head_dim=16,
    mlp_dim=64,
    microbatch=4,
    total_batch_size=256,
    num_steps=4,
    loss_chunk=64,
    compute_dtype="float32",
)
ITEMS = [
    dict(id=str(n), messages=[dict(role="user", content=text), dict(role="assistant", content="")])
    for n, text in enumerate(["1+1?", "and 2 + 2?", "3"])
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["plain bytes"], 265)


@pytest.fixture(scope="module")
def params():
    # random words, among them often the special ones
    params = init_params(jax.random.key(1), TINY)
    return params | dict(head=0.3 * jax.random.normal(jax.random.key(2), params["head"].shape))


def ask(params, tokenizer, items, seeds, **more):
    questions = rollouts.questions_of(items, tokenizer, 24, TINY.sequence_len)
    reward = lambda item, answer: float(len(answer))
    return rollouts.roll_out(params, TINY, tokenizer, questions, seeds, 24, reward, **more)


SEEDS = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


@pytest.fixture(scope="module")
def groups(params, tokenizer):
    return ask(params, tokenizer, ITEMS, SEEDS)


def test_an_answer_depends_on_its_seed_alone(groups, params, tokenizer):
    # fewer slots than rows, other company, another order
    again = ask(params, tokenizer, ITEMS[::-1], SEEDS[::-1], slots=4)[::-1]
    for group, other in zip(groups, again):
        for a, b in zip(group, other):
            assert [t.id for t in a.tokens] == [t.id for t in b.tokens]
            assert (a.finish, a.text, a.reward) == (b.finish, b.text, b.reward)
    texts = [tuple(t.id for t in rollout.tokens) for group in groups for rollout in group]
    assert len(set(texts)) > 1


def test_samplers_log_probabilities_are_the_learners(groups, params, tokenizer):
    flat = [rollout for group in groups for rollout in group]
    # the end of its turn is learnt too
    last = {rollout.tokens[-1].id for rollout in flat if rollout.finish == "stop"}
    assert last and last <= {tokenizer.special["<|assistant_end|>"], tokenizer.bos}
    ones = np.ones(len(flat))
    rows, signals = rollouts.parts_of(flat, ones, ones, 4)
    for part, signal in zip(rows, signals):
        logp_BT, _ = jax.jit(model.token_logprobs, static_argnums=1)(params, TINY, *part)
        chosen = part.targets_BT >= 0
        np.testing.assert_allclose(
            np.asarray(logp_BT)[chosen], signal.sampler_logp_BT[chosen], atol=5e-5
        )
    total = sum((part.targets_BT >= 0).sum() for part in rows)
    assert total == sum(map(rollouts.learnt, flat))


# nats: in bfloat16 the learner reads whole rows at once and the sampler token by token, whose sums
# round in another order
BFLOAT16_MEAN, BFLOAT16_MOST = 0.02, 0.2


def test_in_bfloat16_they_differ_by_no_more_than_is_said(params, tokenizer):
    config = TINY.replace(compute_dtype="bfloat16")
    questions = rollouts.questions_of(ITEMS, tokenizer, 24, TINY.sequence_len)
    reward = lambda item, answer: 0.0
    asked = rollouts.roll_out(params, config, tokenizer, questions, SEEDS, 24, reward)
    flat = [rollout for group in asked for rollout in group]
    (rows,), (signal,) = rollouts.parts_of(flat, np.ones(12), np.ones(12), 12)
    logp_BT, _ = jax.jit(model.token_logprobs, static_argnums=1)(params, config, *rows)
    apart = np.abs(np.asarray(logp_BT) - signal.sampler_logp_BT)[rows.targets_BT >= 0]
    assert 0 < apart.mean() < BFLOAT16_MEAN and apart.max() < BFLOAT16_MOST


def test_the_end_is_learnt_and_a_tools_answer_is_not(tokenizer):
    special = tokenizer.special
    start, end = special["<|output_start|>"], special["<|output_end|>"]
    tokens = [Token(65, -1.0), Token(start, -9.0, True), Token(66, -9.0, True)]
    tokens += [Token(end, -9.0, True), Token(special["<|assistant_end|>"], -0.5)]
    rollout = Rollout([1, 2, 3], tokens, "stop", "A", 1.0)
    (rows,), (signal,) = rollouts.parts_of([rollout], [2.0], [0.5], rows_at_once=2)
    assert rows.inputs_BT[0, :7].tolist() == [1, 2, 3, 65, start, 66, end]
    assert rows.targets_BT[0, :7].tolist() == [-1, -1, 65, -1, -1, -1, special["<|assistant_end|>"]]
    assert signal.sampler_logp_BT[0, [2, 6]].tolist() == [-1.0, -0.5]
    assert rollouts.learnt(rollout) == 2
    # seventeen tokens are sixteen inputs, and just fit
    full = rollout._replace(prompt=[1] * 12)
    assert rollouts.parts_of([full], [1.0], [1.0], 1)[0][0].inputs_BT.shape == (1, 16)
    # what fills up the part teaches nothing
    assert (rows.targets_BT[1] == -1).all() and signal.weight_B.tolist() == [0.5, 0.0]


def test_no_row_is_lost_and_little_is_padding():
    rng = np.random.default_rng(0)
    many = []
    for n in rng.integers(40, 400, 50):
        many.append(Rollout([0] * 10, [Token(int(n), -1.0)] * int(n), "length", "", 0.0))
    numbers = np.arange(50)
    rows, signals = rollouts.parts_of(many, numbers, np.ones(50), 8)
    assert sum((signal.weight_B > 0).sum() for signal in signals) == 50
    advantages = np.concatenate([signal.advantage_B for signal in signals])
    weights = np.concatenate([signal.weight_B for signal in signals])
    assert sorted(advantages[weights > 0].tolist()) == numbers.tolist()
    cells = sum(part.inputs_BT[: (s.weight_B > 0).sum()].size for part, s in zip(rows, signals))
    used = sum(len(r.prompt) + len(r.tokens) - 1 for r in many)
    assert 1 - used / cells < 0.2
    assert len({part.inputs_BT.shape for part in rows}) < len(rows) + 1


def test_a_prompt_without_room_is_refused(tokenizer):
    with pytest.raises(UserError, match="item 1"):
        rollouts.questions_of(ITEMS[1:], tokenizer, 60, TINY.sequence_len)
    # one that leaves no token over is asked
    [question] = rollouts.questions_of(ITEMS[1:2], tokenizer, 60, 1000)
    room = len(question.prompt) + 60
    assert len(rollouts.questions_of(ITEMS[1:2], tokenizer, 60, room)) == 1
    with pytest.raises(UserError, match="item 1"):
        rollouts.questions_of(ITEMS[1:2], tokenizer, 60, room - 1)


def test_an_answer_that_was_cut_is_worth_nothing(tokenizer):
    question = Question(ITEMS[0], [1])
    judge = lambda finish: rollouts._judged(
        question, [Token(65, -1.0)], finish, tokenizer, lambda item, answer: 1.0
    )
    assert judge("stop").reward == 1.0 and judge("length").reward == 0.0
