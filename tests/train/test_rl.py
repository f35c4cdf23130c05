"""Reinforcement: the reference's own script step for step, resume bit for bit after any stop,
rewards that rise, steps that teach nothing skipped.
"""

import jax
import numpy as np
import pytest

from lib.data import Tokenizer
from lib.files import UserError
from lib.interop.nanochat import to_nanochat
from lib.params import init_params
from lib.tasks import Task
from lib.train import Saving, rl
from lib.train.finetune import Base
from lib.train.optim import compile_key
from lib.train.policy import Policy
from lib.train.rollouts import Rows, Signal
from tests.helpers.golden import load, parity_model
from tests.train.test_rl_policy import check_fingerprints, fingerprint
from tests.train.test_rl_rollouts import TINY

# ---- the reference's script ----------------------------------------------------------------------


def recorded_parts(step: int):
    """(rows, signals) of the reference's passes, each weighted as the mean of its own tokens."""
    golden, arrays = load("rl_reference_T.json"), load("rl_reference_T.safetensors")
    passes = golden["steps"][step]["passes"]
    width = max(a.shape[1] for name, a in arrays.items() if name.endswith("inputs"))
    rows, signals = [], []
    for one in passes:
        name = f"step{step}.group{one['group']}"
        members = slice(*one["rows"])
        targets = arrays[f"{name}.targets"][members]
        pad = ((0, 0), (0, width - targets.shape[1]))
        rows.append(
            Rows(
                np.pad(arrays[f"{name}.inputs"][members], pad),
                np.pad(targets, pad, constant_values=-1),
            )
        )
        assert (targets >= 0).sum() == one["num_valid"]
        weight = np.full(len(targets), 1 / (one["num_valid"] * len(passes)), np.float32)
        advantage = arrays[f"{name}.advantages"][members]
        signals.append(Signal(np.zeros((len(targets), width), np.float32), advantage, weight))
    return rows, signals


def test_a_step_is_the_references():
    golden = load("rl_reference_T.json")["steps"][0]
    config, params = parity_model("T")
    settings = rl.Reinforcing("arithmetic_beyond", num_steps=2, lr=0.05)
    # its base rates, which are not those that it pretrains with
    config = config.replace(unembedding_lr=0.004, embedding_lr=0.2, matrix_lr=0.02, scalar_lr=0.5)
    config = rl.rl_config(config, settings)
    state = rl.first_state(params, config, settings)

    # its rates: every group's, a twentieth, smear's too
    for group in golden["optimizer_groups"]:
        ours = rl_group(group["params"][0])
        given = float(state.opt_state.hyper["lr"][ours])
        assert given == pytest.approx(group["initial_lr"], rel=1e-5), ours

    rows, signals = recorded_parts(0)
    total = 0.0
    grads = None
    for part, signal, one in zip(rows, signals, golden["passes"]):
        (loss, _), new = rl.part_gradients(
            params, compile_key(config), part, signal, None, signal.sampler_logp_BT, Policy()
        )
        mean = loss * len(golden["passes"])
        np.testing.assert_allclose(mean, one["loss"] * len(golden["passes"]), atol=2e-5)
        total += float(loss)
        grads = new if grads is None else jax.tree.map(np.add, grads, new)
    assert total == pytest.approx(golden["loss_sum"], abs=2e-5)
    check_fingerprints(grads, config, golden["grad_fingerprint"])

    before = {name: np.array(a) for name, a in to_nanochat(params, config).items()}
    state, sums = rl.learn(state, rows, signals, params, config, Policy())
    assert float(sums["grad_norm"]) == pytest.approx(golden["grad_norm"], rel=1e-4)
    for name, after in to_nanochat(state.params, config).items():
        if name != "backout_lambda":
            norm, *_ = golden["update_fingerprint"][name]
            given = fingerprint(np.asarray(after, np.float64) - before[name])
            assert given[0] == pytest.approx(norm, rel=3e-3, abs=1e-6), name


def rl_group(name: str) -> str:
    """The optimizer's group of a weight, by the reference's name."""
    for part, group in dict(
        lm_head="head",
        wte="embed",
        value_embeds="value_embed",
        resid_lambdas="resid",
        x0_lambdas="x0",
        smear="smear",
    ).items():
        if part in name:
            return group
    return "matrix"


# ---- a run ---------------------------------------------------------------------------------------

SETTINGS = dict(num_steps=4, questions=2, samples=4, max_tokens=24, lr=0.05)


def item(n: int) -> dict:
    messages = [dict(role="user", content=str(n)), dict(role="assistant", content="")]
    return dict(id=f"letters/{n}", messages=messages)


@pytest.fixture
def base(monkeypatch):
    """A random model, and a task that pays for every letter of an answer that comes to its end."""
    task = Task("generate", lambda split: [item(n) for n in range(7)], grade=lambda i, a: False)
    monkeypatch.setattr(rl, "to_reinforce", lambda name: task)
    monkeypatch.setattr(rl, "reward_of", lambda name, grade: lambda item, answer: 1 + len(answer))
    params = init_params(jax.random.key(1), TINY)
    params = params | dict(head=0.3 * jax.random.normal(jax.random.key(2), params["head"].shape))
    return Base(params, TINY, Tokenizer.train(["plain bytes"], 265), "here")


def test_questions_are_those_to_learn_from(base, monkeypatch):
    asked = []
    task = Task("generate", lambda split: asked.append(split) or [item(0)], grade=lambda i, a: True)
    monkeypatch.setattr(rl, "to_reinforce", lambda name: task)
    questions, _ = rl.find_questions(rl.Reinforcing("letters", **SETTINGS), base)
    assert [question.item for question in questions] == [item(0)] and asked == ["train"]


def train(base, store, stop_after: int = 99, **changes):
    """(the training, its numbers step by step) of a run that is left after some steps."""
    training = rl.Reinforcement(rl.Reinforcing("letters", **SETTINGS | changes), base, store)
    told = []
    stop = lambda: len(told) >= stop_after - 1
    for step in training.run.steps(
        [training.measurement], Saving(1, keep=1, metric="reward"), writers=None, stop=stop
    ):
        told.append((step.step, step.metrics["loss"], step.metrics["reward"]))
        # of what was written, not of the rows that pretraining would have read
        assert (
            step.metrics["tokens_per_s"] < training.numbers["written"] / step.metrics["rollout_s"]
        )
    return training, told


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(base, tmp_path):
    whole, told = train(base, tmp_path / "whole")
    assert whole.run.finished
    first, before = train(base, tmp_path / "parts", stop_after=2)
    assert not first.run.finished
    second, after = train(base, tmp_path / "parts")
    assert before + after == told
    for a, b in zip(jax.tree.leaves(whole.run.state), jax.tree.leaves(second.run.state)):
        np.testing.assert_array_equal(a, b)
    assert whole.run.cursor == second.run.cursor
    with pytest.raises(UserError, match="samples"):
        train(base, tmp_path / "parts", samples=5)


@pytest.mark.slow
def test_a_longer_run_goes_on_with_the_rates_of_a_run(base, tmp_path):
    """As if it had been planned so long: each update's rate counts, and none goes below 0."""
    train(base, tmp_path, num_steps=1, updates=2)
    longer, _ = train(base, tmp_path, num_steps=3, updates=2)
    planned = rl.first_state(base.params, longer.config, longer.settings).opt_state.hyper
    for a, b in zip(jax.tree.leaves(longer.run.state.opt_state.hyper), jax.tree.leaves(planned)):
        assert float(a) == float(b)
    assert float(planned["num_steps"]) == int(longer.run.state.opt_state.step) == 6


def test_numbers_of_a_step(base, tmp_path):
    training, _ = train(base, tmp_path, num_steps=2, preset="grpo", updates=2)
    numbers = training.measure()
    # means over tokens: of none can more be open than among all words
    assert numbers["kl"] > 0 and 0 < numbers["entropy"] < np.log(TINY.vocab_size)
    assert 0 <= numbers["clipped"] < 1
    assert numbers["drift"] < 5e-5  # one decoder, one learner, the same tokens
    # two updates a step are counted by the optimizer, and one by the run
    state = training.run.state
    assert (training.run.done, int(state.opt_state.step)) == (2, 4)
    assert float(state.opt_state.hyper["num_steps"]) == 4
    assert len(training.groups) == 2 and all(len(group) == 4 for _, group in training.groups)


def test_the_divergence_is_that_from_the_frozen_reference(base, tmp_path):
    training = rl.Reinforcement(rl.Reinforcing("letters", **SETTINGS), base, tmp_path)
    *parts, _ = next(training.feed(None))
    elsewhere = jax.tree.map(lambda a: 1.3 * a, base.params)
    for reference, low, high in ((base.params, 0, 1e-6), (elsewhere, 1e-4, 1e3)):
        state = rl.first_state(base.params, training.config, training.settings)
        _, sums = rl.learn(state, *parts, reference, training.config, Policy(kl=0.1))
        assert low <= float(sums["kl"]) < high


def test_every_epoch_asks_all_questions_in_an_order_of_its_own(base, tmp_path):
    training = rl.Reinforcement(rl.Reinforcing("letters", **SETTINGS), base, tmp_path)
    asked = [training.question(number).item["id"] for number in range(14)]
    first, second = asked[:7], asked[7:]
    assert len(set(first)) == 7 and sorted(first) == sorted(second) and first != second


def test_every_question_and_sample_has_a_seed_of_its_own():
    seeds = {rl.seed_of(s, q, n) for s in range(3) for q in range(40) for n in range(8)}
    assert len(seeds) == 3 * 40 * 8


def test_a_task_that_teaches_nothing_is_given_up(base, tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "reward_of", lambda name, grade: lambda item, answer: 1.0)
    monkeypatch.setattr(rl, "PATIENCE", 2)
    training = rl.Reinforcement(rl.Reinforcing("letters", **SETTINGS), base, tmp_path)
    groups = [[rollout._replace(reward=1.0) for rollout in group] for group in answers(training)]
    assert training.parts(groups) is None
    monkeypatch.setattr(training, "parts", lambda groups: None)
    with pytest.raises(UserError, match="too easy or too hard"):
        next(training.feed(None))


def answers(training):
    """Rollouts of the first questions."""
    asked = training.ask(training.base.params, 0, rl.Seconds())
    return [group for _, group in asked]


def test_numbers_that_leave_their_range_are_told():
    assert rl.warnings_of(dict(signal=0.5, entropy=0.1, kl=0.0, drift=0.001, length=30)) == []
    told = rl.warnings_of(dict(signal=0.0, entropy=0.0001, drift=0.3, length=1.2))
    assert [line.split()[0] for line in told] == ["signal", "entropy", "drift", "length"]


@pytest.mark.parametrize(
    "changes", [dict(samples=1), dict(lr=0.0), dict(preset="ppo"), dict(questions=0)]
)
def test_settings_that_cannot_teach_are_refused(changes):
    with pytest.raises(UserError):
        rl.Reinforcing("letters", **changes)
