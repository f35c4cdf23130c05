"""Reinforcement's bookkeeping by hand: what is asked, what is written down, what is told."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.generate import Sampling, Token
from lib.params import init_params
from lib.train import optim, policy, rl, rollouts
from lib.train.policy import Policy
from lib.train.rollouts import Question, Rollout, Rows, Seconds, Signal
from tests.train.test_rl_rollouts import TINY


def tokens(*ids, forced=()):
    return [Token(id, -float(id), id in forced) for id in ids]


def rollout(prompt, made, finish="stop", reward=0.0, forced=()):
    return Rollout(list(prompt), tokens(*made, forced=forced), finish, "", reward)


# ---- what is told --------------------------------------------------------------------------------

# number: the lowest and the highest that is no word about it
RANGES = {
    "signal": (0.05, 1.0),
    "entropy": (0.003, 5.0),
    "kl": (0.0, 1.0),
    "drift": (0.0, 0.05),
    "truncated": (0.0, 0.5),
    "length": (2.0, math.inf),
}


@pytest.mark.parametrize("name", RANGES)
def test_a_number_is_told_of_when_it_leaves_its_range(name):
    for end, beyond in zip(RANGES[name], (-0.001, 0.001)):
        assert rl.warnings_of({name: end}) == []
        if math.isfinite(end):
            [line] = rl.warnings_of({name: end + beyond})
            assert line.startswith(f"{name} is {end + beyond:.3g}: ")
    assert rl.warnings_of({}) == [] and len(rl.RANGES) == len(RANGES)


def test_a_steps_numbers_by_hand():
    groups = [
        ({}, [rollout([1], [1, 2], "stop", 1.0), rollout([1], [1, 2, 3, 4], "length", 0.0)]),
        ({}, [rollout([1], [1], "stop", 1.0), rollout([1], [1], "stop", 1.0)]),
    ]
    assert rl.summary(groups, Seconds(3.0, 1.0)) == dict(
        reward=0.75,
        length=2.0,
        written=8,
        truncated=0.25,
        signal=0.5,
        rollout_s=3.0,
        tools_s=1.0,
    )


def test_means_are_of_tokens_and_speed_is_of_what_was_written(monkeypatch):
    monkeypatch.setattr(rl, "time", types.SimpleNamespace(perf_counter=lambda: 30.0))
    training = types.SimpleNamespace(began=26.0, numbers=dict(written=20, reward=0.5))
    training.sums = dict(tokens=4, kl=1.0, clipped=2.0, drift=3.0, entropy=8.0)
    measured = rl.Reinforcement.measure(training)
    assert measured == dict(
        written=20, reward=0.5, kl=0.25, clipped=0.5, drift=0.75, entropy=2.0, tokens_per_s=5.0
    )
    training.sums |= dict(tokens=0)
    assert rl.Reinforcement.measure(training)["entropy"] == 8.0


# ---- what is asked -------------------------------------------------------------------------------


def training_of(parts, questions=3):
    """A Reinforcement whose steps have these parts; `asked` are the first questions of each."""
    training = object.__new__(rl.Reinforcement)
    training.settings = types.SimpleNamespace(questions=questions)
    training.layout = None
    training.config = types.SimpleNamespace(dtype=np.float32)
    training.run = types.SimpleNamespace(state=types.SimpleNamespace(params={}))
    training.asked = []
    groups = [({}, [rollout([1], [1])])]
    training.ask = lambda params, asked, seconds: training.asked.append(asked) or groups
    given = iter(parts)
    training.parts = lambda groups: next(given)
    return training


def test_questions_are_asked_one_after_the_other_and_skipped_ones_counted(monkeypatch):
    monkeypatch.setattr(rl, "whole", lambda layout, params, dtype: params)
    monkeypatch.setattr(rl, "put_batch", lambda layout, parts, whole: parts)
    part = (["rows"], ["signals"])
    training = training_of([part, None, None, part, part])
    feed = training.feed(None)
    assert next(feed) == (["rows"], ["signals"], dict(asked=3, skipped=0))
    assert next(feed)[2] == dict(asked=12, skipped=2) and training.numbers["skipped"] == 2
    assert next(feed)[2] == dict(asked=15, skipped=2)
    assert training.asked == [0, 3, 6, 9, 12] and training.began > 0
    again = training_of([part])
    assert next(again.feed(dict(asked=12, skipped=2)))[2] == dict(asked=15, skipped=2)
    assert again.asked == [12]


def test_seeds_and_orders_repeat_and_differ():
    seeds = {rl.seed_of(*which) for which in np.ndindex(3, 4, 5)}
    assert len(seeds) == 60 and rl.seed_of(1, 2, 3) == rl.seed_of(1, 2, 3)
    orders = [rl.order_of(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)
    training = types.SimpleNamespace(questions=list("abc"))
    training.settings = types.SimpleNamespace(seed=4)
    asked = [rl.Reinforcement.question(training, n) for n in range(6)]
    for epoch in (0, 1):
        want = [training.questions[i] for i in rl.order_of(4, epoch, 3)]
        assert asked[3 * epoch : 3 * epoch + 3] == want


# ---- what is learnt ------------------------------------------------------------------------------


def test_a_rollout_as_a_row():
    """Position t foresees token t + 1; what a tool said is read and not learnt; ids may be 0."""
    one = rollout([5, 6], [0, 7, 8], forced=(7,))
    assert rollouts.learnt(one) == 2 and rollouts._tokens(one) == 4
    inputs, targets = np.zeros(6, int), np.full(6, -1)
    logp = np.zeros(6)
    rollouts._write(one, inputs, targets, logp)
    assert inputs.tolist() == [5, 6, 0, 7, 0, 0] and targets.tolist() == [-1, 0, -1, 8, -1, -1]
    assert logp.tolist() == [0, 0, 0, -8, 0, 0]


def test_rows_are_dealt_out_by_length():
    lengths = (3, 30, 17, 18)
    made = [rollout([1], range(1, length + 1)) for length in lengths]
    rows, signals = rollouts.parts_of(made, [1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4], 3)
    assert [part.inputs_BT.shape for part in rows] == [(3, 32), (3, 16)]
    assert [(part.targets_BT >= 0).sum(1).tolist() for part in rows] == [[30, 18, 17], [3, 0, 0]]
    assert [part.advantage_B.tolist() for part in signals] == [[2, 4, 3], [1, 0, 0]]
    np.testing.assert_allclose([s.weight_B for s in signals], [[0.2, 0.4, 0.3], [0.1, 0, 0]])
    assert not rows[1].inputs_BT[1:].any() and not signals[1].sampler_logp_BT[1:].any()
    # a width that no part exceeds
    cut, _ = rollouts.parts_of(made, [1.0] * 4, [1.0] * 4, 3, longest=30)
    assert [part.inputs_BT.shape for part in cut] == [(3, 30), (3, 16)]


def test_widths_are_eight_to_an_octave():
    given = (1, 16, 17, 128, 129, 255, 256, 257, 288, 289, 511, 512, 513)
    want = (16, 16, 32, 128, 144, 256, 256, 288, 288, 320, 512, 512, 576)
    assert tuple(map(rollouts.width_of, given)) == want
    assert rollouts.width_of(129, 128) == 256


def test_which_rows_count_and_where_nothing_is_learnt(monkeypatch):
    training = types.SimpleNamespace(settings=types.SimpleNamespace(policy=Policy()))
    training.config = types.SimpleNamespace(microbatch=2, sequence_len=64)
    alike = [[rollout([1], [1, 2], reward=1.0), rollout([1], [1], reward=1.0)]]
    assert rl.Reinforcement.parts(training, alike) is None
    mixed = [*alike, [rollout([1], [3, 4, 5], reward=1.0), rollout([1], [6], reward=0.0)]]
    given = {}
    monkeypatch.setattr(rl, "parts_of", lambda *given_: given.update(enumerate(given_)) or "parts")
    dropping, plain = Policy(drop_uniform=True), Policy(drop_uniform=False)
    for settings in (plain, dropping):
        training.settings.policy = settings
        assert rl.Reinforcement.parts(training, mixed) == "parts"
        chosen = 2 if settings is dropping else 4
        assert len(given[0]) == len(given[1]) == len(given[2]) == chosen
        assert given[0][-2:] == mixed[1] and given[3] == 2
        assert given[1][-2] > 0 > given[1][-1] and (given[4], given[5]) == (16, 64)
        count = np.array([2, 1, 3, 1]) * ([0, 0, 1, 1] if settings is dropping else 1)
        weights = policy.row_weights(count, settings)[-chosen:]
        np.testing.assert_allclose(given[2], weights)


def test_groups_with_something_to_teach():
    assert policy.has_signal([0, 1]) and policy.has_signal([1, 1, 0])
    assert (
        not policy.has_signal([1, 1]) and not policy.has_signal([1]) and not policy.has_signal([])
    )
    reward, group = [1, 0, 1, 1, 0], [0, 0, 1, 1, 2]
    cut = [False, True, False, True, False]
    for settings, kept in (
        (Policy(drop_uniform=False), [True] * 5),
        (Policy(drop_uniform=True), [True, True, False, False, False]),
        (Policy(drop_uniform=False, drop_truncated=True), [True, False, True, False, True]),
        (Policy(drop_uniform=True, drop_truncated=True), [True] + [False] * 4),
    ):
        assert policy.kept(reward, group, cut, settings).tolist() == kept


def test_weights_of_rows_by_hand():
    count = np.array([3, 1, 0])
    for name, weights in (("token", [0.25] * 3), ("sequence", [1 / 9, 1 / 3, 1 / 3])):
        given = policy.REDUCTIONS[name](count, 8)
        np.testing.assert_allclose(given, weights)
    np.testing.assert_allclose(policy.REDUCTIONS["sequence_sum"](count, 8), [1 / 3] * 3)
    np.testing.assert_allclose(policy.REDUCTIONS["token"](np.array([0, 0]), 8), [1, 1])


def test_advantages_by_hand():
    group, step = np.array([0.0, 0.0, 3.0]), np.array([0.0, 0.0, 3.0, 1.0])
    spread, wide = math.sqrt(2.0), math.sqrt(1.5)
    for name, want in (
        ("group_mean", [-1, -1, 2]),
        ("leave_one_out", [-1.5, -1.5, 3]),
        ("group_std", [-1 / (spread + 0.5), -1 / (spread + 0.5), 2 / (spread + 0.5)]),
        ("batch_std", [-1 / (wide + 0.5), -1 / (wide + 0.5), 2 / (wide + 0.5)]),
    ):
        np.testing.assert_allclose(policy.ADVANTAGES[name](group, step, 0, 0.5), want, err_msg=name)


# ---- writing -------------------------------------------------------------------------------------


class Paper:
    """Engines that write two tokens a step for every row; rows of odd seeds are cut."""

    def __init__(self, slots):
        self.slots, self.rows, self.joined, self.widest = slots, {}, [], 0

    @property
    def free(self):
        return self.slots - len(self.rows)

    def add_many(self, prompts, samplings):
        free = [slot for slot in range(self.slots) if slot not in self.rows]
        slots = free[: len(prompts)]
        for slot, prompt, sampling in zip(slots, prompts, samplings, strict=True):
            self.rows[slot] = prompt, sampling.seed
        self.joined.append([sampling.seed for sampling in samplings])
        self.widest = max(self.widest, len(self.rows))
        return slots

    def step(self, count):
        assert count == rollouts.LONG_CHUNK
        written = {}
        for slot, (prompt, seed) in list(self.rows.items()):
            end = "length" if seed % 2 else "stop"
            written[slot] = tokens(prompt[0], seed), end if seed < 100 else None
            self.rows[slot] = prompt, seed - 100
            if seed < 100:
                del self.rows[slot]
        return written


def test_whole_groups_join_where_there_is_room():
    questions = [Question({}, [n]) for n in (7, 8, 9)]
    seeds = [[10, 11], [112, 13], [14, 15]]
    engine = Paper(slots=3)
    made, ends = rollouts._write_groups(engine, questions, seeds, Sampling(9))
    assert engine.joined == seeds and engine.widest == 3
    ids = [[[token.id for token in answer] for answer in group] for group in made]
    assert ids == [[[7, 10], [7, 11]], [[8, 112, 8, 12], [8, 13]], [[9, 14], [9, 15]]]
    assert ends == [["stop", "length"], ["stop", "length"], ["stop", "length"]]
    wide = Paper(slots=6)
    rollouts._write_groups(wide, questions, seeds, Sampling(9))
    assert wide.widest == 6


def test_engines_have_room_for_the_longest_prompt_and_for_a_whole_group(monkeypatch):
    made = []
    monkeypatch.setattr(rollouts, "Engines", lambda *given: made.append(given[2:4]))
    monkeypatch.setattr(rollouts, "_write_groups", lambda *_: ([], []))
    special = {"<|assistant_end|>": 1}
    tokenizer = types.SimpleNamespace(special=special, bos=0)
    for lengths, answers, most, slots, room in (
        ((3, 60, 5), 2, 40, 6, 128),
        ((3, 20), 1, 40, 2, 64),
        ((1,), 100, 10, 128, 64),
        ((1,) * 9, 10, 10, 64, 64),
    ):
        asked = [Question({}, [1] * length) for length in lengths]
        seeds = [list(range(answers))] * len(asked)
        rollouts.roll_out(None, None, tokenizer, asked, seeds, most, None)
        assert made.pop() == (slots, room)


def test_an_answer_is_worth_something_only_where_its_end_was_heard(monkeypatch):
    monkeypatch.setattr(rollouts, "said", lambda tokenizer, ids: f"said {ids}")
    monkeypatch.setattr(rollouts, "score", lambda reward, item, text: reward(item, text))
    heard = []
    reward = lambda item, text: heard.append((item, text)) or 2.0
    question = Question("item", [1, 2])
    for finish, worth in (("stop", 2.0), ("length", 0.0)):
        judged = rollouts._judged(question, tokens(3, 4), finish, None, reward)
        assert judged == Rollout([1, 2], tokens(3, 4), finish, "said [3, 4]", worth)
    assert heard == [("item", "said [3, 4]")]


def test_what_tools_took_is_added_up(monkeypatch):
    clock = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr(rollouts, "time", types.SimpleNamespace(perf_counter=clock.__next__))
    seconds = Seconds()
    timed = rollouts._timed(str.upper, seconds)
    assert (timed("a"), timed("b")) == ("A", "B") and seconds.tools == 2.5


def test_groups_come_from_every_process_in_turn(monkeypatch):
    questions = [Question({}, [n]) for n in (7, 8, 9)]
    groups = [[rollout([n], [1, n], "stop", 0.5, forced=(1,))] for n in (7, 8, 9)]
    assert rollouts.from_all(groups, questions) is groups
    monkeypatch.setattr(rollouts.jax, "process_count", lambda: 2)
    packed = []
    monkeypatch.setattr(rollouts, "from_each", lambda name, mine: packed.append(mine) or [[], []])
    # what each process sends, put together again
    for own in (groups[0::2], groups[1::2]):
        rollouts.from_all(own, [])
    monkeypatch.setattr(rollouts, "from_each", lambda name, mine: packed)
    assert rollouts.from_all(groups[0::2], questions) == groups


# ---- the loss ------------------------------------------------------------------------------------


def test_a_constant_to_divide_by():
    by = lambda norm: policy.row_weights([2, 1], Policy(reduce="constant", norm=norm))
    assert by(1).tolist() == [0.5, 0.5] and by(4).tolist() == [0.125, 0.125]
    with pytest.raises(rl.UserError, match="set it to the most tokens"):
        by(0)


def test_where_the_clip_takes_a_gradient_away():
    settings = Policy(ratio="token", clip_low=0.25, clip_high=0.5)
    ratio = np.array([[0.5, 0.75, 1.0, 1.5, 1.75]] * 3)
    advantage = np.array([[1.0], [-1.0], [0.0]])
    clipped = policy._is_clipped(ratio, advantage, settings)
    assert clipped.tolist() == [
        [False, False, False, False, True],
        [True, False, False, False, False],
        [False] * 5,
    ]
    loss = policy.objective(ratio, ratio, advantage, settings)
    assert loss[0].tolist() == [-0.5, -0.75, -1.0, -1.5, -1.5]
    assert loss[1].tolist() == [0.75, 0.75, 1.0, 1.5, 1.75]
    for other in ("none", "stopped_weight"):
        assert not policy._is_clipped(ratio, advantage, Policy(ratio=other)).any()


def test_what_the_sampler_drew_otherwise_counts_less():
    drift = np.log([0.25, 0.5, 1.0, 2.0, 4.0])
    weights = {"truncate": [0.25, 0.5, 1, 2, 2], "mask": [0, 0.5, 1, 2, 0]}
    for sampler, want in weights.items():
        settings = Policy(sampler=sampler, sampler_min=0.499, sampler_max=2.001)
        given = policy._sampler_weight(drift, settings)
        np.testing.assert_allclose(given, want, rtol=2e-3)
    assert policy._sampler_weight(drift, Policy(sampler="none")) == 1.0


def test_long_answers_cost_something_in_the_end():
    given = [policy.soft_overlong(length, 10, 4) for length in (0, 6, 7, 8, 10, 11, 99)]
    assert given == [0, 0, -0.25, -0.5, -1, -1, -1]
    assert policy.soft_overlong(10, 10, 10) == -1
    for cache in (0, 11):
        with pytest.raises(rl.UserError, match=f"cache {cache} must be from 1"):
            policy.soft_overlong(5, 10, cache)


def test_the_first_token_of_the_vocabulary_is_learnt_like_any_other(monkeypatch):
    """Two tokens are learnt, one of them number 0; the third place has none."""

    def token_logprobs(params, config, inputs_BT, targets_BT):
        return params["a"] + jnp.zeros(inputs_BT.shape), 1.0 * (targets_BT >= 0)

    monkeypatch.setattr(rl.model, "token_logprobs", token_logprobs)
    nothing = np.zeros((1, 3), np.float32)
    rows = Rows(nothing.astype(np.int32), np.array([[0, 3, -1]]))
    signal = Signal(nothing - 1, np.array([2.0]), np.array([0.5]))
    params = {"a": jnp.float32(-1.0)}
    (loss, sums), grads = rl.part_gradients(
        params, "no config", rows, signal, None, nothing - 1, Policy()
    )
    assert (float(loss), float(grads["a"])) == (2.0, -2.0)
    assert (int(sums["tokens"]), float(sums["entropy"])) == (2, 2.0)


# ---- settings ------------------------------------------------------------------------------------


def test_settings_of_reinforcement_at_their_ends():
    least = dict(num_steps=1, questions=1, max_tokens=1, updates=1)
    settings = rl.Reinforcing("spelling", samples=2, lr=1e-9, preset="dr_grpo", **least)
    assert settings.policy.norm == 1 and settings.policy.reduce == "constant"
    for name in least:
        with pytest.raises(rl.UserError, match=f"{name} must be at least 1, got 0"):
            rl.Reinforcing("spelling", **{name: 0})
    with pytest.raises(rl.UserError, match="1 sample of a question"):
        rl.Reinforcing("spelling", samples=1)
    for lr in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(rl.UserError, match="lr must be above 0 and finite"):
            rl.Reinforcing("spelling", lr=lr)


def test_settings_of_a_policy_at_their_ends():
    ends = dict(clip_low=0.0, clip_high=0.0, kl=0.0, eps=0.0, sampler_min=0.0, sampler_max=0.0)
    assert Policy(**ends).sampler_max == 0 and Policy(clip_low=0.999, dual_clip=1.001)
    for bad, match in (
        (dict(clip_low=1.0), "clip_low below 1"),
        (dict(clip_low=-0.1), "must not be negative"),
        (dict(clip_high=-0.1), "must not be negative"),
        (dict(kl=-0.1), "must not be negative"),
        (dict(eps=-0.1), "must not be negative"),
        (dict(dual_clip=1.0), "dual_clip must be above 1"),
        (dict(dual_clip=-1.0), "dual_clip must be above 1"),
        (dict(sampler_min=-0.1), "between 0 and sampler_max"),
        (dict(sampler_min=2.1), "between 0 and sampler_max"),
    ):
        with pytest.raises(rl.UserError, match=match):
            Policy(**bad)


def test_the_config_and_the_first_state_of_a_run():
    base = rl.Config(num_steps=900, warmup_steps=9, warmdown_ratio=0.5, weight_decay=0.2, seed=1)
    settings = rl.Reinforcing(
        "spelling", num_steps=40, lr=0.5, optimizer="adamw", seed=6, updates=3
    )
    config = rl.rl_config(base, settings)
    assert (config.num_steps, config.optimizer, config.seed) == (40, "adamw", 6)
    assert (config.warmup_steps, config.warmdown_ratio, config.final_lr_frac) == (0, 1.0, 0.0)
    assert config.weight_decay == 0.0 and config.matrix_lr == 0.5 * base.matrix_lr
    # smear has no field in the config, and a step makes several updates
    state = rl.first_state(
        init_params(jax.random.key(0), TINY), rl.rl_config(TINY, settings), settings
    )
    rates = state.opt_state.hyper
    assert float(rates["lr"]["smear"]) == pytest.approx(0.5 * optim.group_lrs(TINY)["smear"])
    assert float(rates["num_steps"]) == 3 * 40 and float(rates["warmup_steps"]) == 0


# ---- a step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 2])
def test_a_step_adds_up_its_parts_and_counts_once(monkeypatch, updates):
    calls = []
    monkeypatch.setattr(rl, "compile_key", lambda config: "key")
    monkeypatch.setattr(rl, "_logprobs", lambda params, key, part, layout: f"{part} by {params}")

    def part_gradients(params, key, *part):
        calls.append((params, *part))
        value = 1.0 if part[0] == "a" else 2.0
        return (value, dict(tokens=10 * value)), dict(g=100 * value)

    def apply_gradients(state, key, grads, layout):
        assert (key, layout, grads) == ("key", "layout", dict(g=300.0))
        return state._replace(params=state.params + "'"), 7.0

    monkeypatch.setattr(rl, "part_gradients", part_gradients)
    monkeypatch.setattr(rl, "apply_gradients", apply_gradients)
    state = rl.TrainState("p", None, 4)
    state, sums = rl.learn(state, "ab", "AB", "ref", None, "policy", updates, "layout")
    assert state == rl.TrainState("p" + "'" * updates, None, 5)
    assert sums == dict(loss=3.0, grad_norm=7.0, tokens=30.0)
    # the old opinion is that of the parameters that wrote the answers, where it differs at all
    old = ("a by p", "b by p") if updates > 1 else (None, None)
    for n in range(updates):
        params = "p" + "'" * n
        assert calls[2 * n : 2 * n + 2] == [
            (params, "a", "A", old[0], "a by ref", "policy", "layout"),
            (params, "b", "B", old[1], "b by ref", "policy", "layout"),
        ]
    assert rl._on_devices(None, None, "share", None) == "share"


def test_a_task_is_given_up_after_twenty_steps_that_teach_nothing(monkeypatch):
    monkeypatch.setattr(rl, "whole", lambda layout, params, dtype: params)
    monkeypatch.setattr(rl, "put_batch", lambda layout, parts, whole: parts)
    part = (["rows"], ["signals"])
    training = training_of([None] * 19 + [part] + [None] * 20)
    feed = training.feed(None)
    assert next(feed)[2] == dict(asked=60, skipped=19)
    with pytest.raises(rl.UserError, match="in 20 steps all answers"):
        next(feed)


def test_each_process_asks_its_own_questions(monkeypatch):
    given = []
    monkeypatch.setattr(rl, "compile_key", lambda config: f"key of {config}")
    monkeypatch.setattr(
        rl, "roll_out", lambda *what, **more: given.append((what, more)) or ["own groups"]
    )
    monkeypatch.setattr(
        rl, "from_all", lambda groups, questions: [f"of {q.item}" for q in questions]
    )
    training = object.__new__(rl.Reinforcement)
    training.settings = types.SimpleNamespace(questions=3, samples=2, seed=5, max_tokens=9)
    training.config, training.reward = "config", "reward"
    training.base = types.SimpleNamespace(tokenizer="tokenizer")
    training.question = lambda number: Question(number, [number])
    answers = training.ask("params", 10, "seconds")
    assert answers == [(10, "of 10"), (11, "of 11"), (12, "of 12")]
    [(what, more)] = given
    questions = [Question(n, [n]) for n in (10, 11, 12)]
    seeds = [[rl.seed_of(5, n, sample) for sample in (0, 1)] for n in (10, 11, 12)]
    assert what == ("params", "key of config", "tokenizer", questions, seeds, 9, "reward")
    assert more == dict(seconds="seconds")
    # of two processes the second one asks every second of them
    monkeypatch.setattr(rl.jax, "process_count", lambda: 2)
    monkeypatch.setattr(rl.jax, "process_index", lambda: 1)
    assert training.ask("params", 10, "seconds") == answers
    assert given[1][0][3:5] == (questions[1::2], seeds[1::2])


def test_what_a_reinforcement_is_opened_with(monkeypatch):
    given = {}
    monkeypatch.setattr(rl, "find_questions", lambda *_: ("questions", "reward"))
    monkeypatch.setattr(rl, "rl_config", lambda config, settings: f"rl {config}")
    monkeypatch.setattr(rl.finetune, "fingerprint", lambda params: f"print of {params}")
    monkeypatch.setattr(rl, "find_past", lambda *what: given.update(asked=what) or "past")
    monkeypatch.setattr(rl, "TrainingRun", lambda *what, **more: given.update(what=what, **more))
    tokenizer = types.SimpleNamespace(fingerprint="words")
    base = types.SimpleNamespace(config="config", params="params", tokenizer=tokenizer, source="x")
    settings = rl.Reinforcing("spelling", seed=4)
    training = rl.Reinforcement(settings, base, "store", "fresh", "afresh")
    identity = given["identity"]
    assert identity["task"] == "spelling" and identity["tokenizer"] == "words"
    assert (identity["source"], identity["start"]) == ("x", "print of params")
    assert not {"num_steps", "optimizer", "seed"} & set(identity) and identity["samples"] == 8
    assert given["asked"] == ("store", "fresh", "rl config", identity, "store", "afresh")
    assert given["what"] == ("rl config", training.feed) and given["past"] == "past"
    assert (str(given["folder"]), given["store"]) == ("store", "store") and given["watch_state"]
    assert given["begin"] == training.begin and given["make_step"](1, 2) == training.step
    assert training.ref_params == "params" and (training.groups, training.sums) == ([], {})
    assert training.measurement.every == 1 and given["layout"] is None
    # each of several processes must have something to ask
    monkeypatch.setattr(rl.jax, "process_count", lambda: 9)
    with pytest.raises(rl.UserError, match="8 questions are too few for 9 processes"):
        rl.Reinforcement(settings, base, "store", layout="layout")


def test_a_reward_of_its_own_or_the_tasks(monkeypatch):
    task = types.SimpleNamespace(grade="grade", items=lambda split: [split])
    monkeypatch.setattr(rl, "to_reinforce", lambda name: task)
    monkeypatch.setattr(rl, "reward_of", lambda *which: which)
    monkeypatch.setattr(rl, "questions_of", lambda *what: what)
    config = types.SimpleNamespace(sequence_len=64)
    base = types.SimpleNamespace(config=config, tokenizer="tokenizer")
    for reward in ("", "own.py:f"):
        settings = rl.Reinforcing("spelling", reward=reward, max_tokens=9)
        questions, worth = rl.find_questions(settings, base)
        assert questions == (["train"], "tokenizer", 9, 64)
        assert worth == (reward or "spelling", "grade")


def test_a_prompt_may_fill_what_its_answer_leaves():
    tokenizer = types.SimpleNamespace(render_for_completion=lambda messages: [1] * messages)
    items = [dict(id="a", messages=7), dict(id="b", messages=1)]
    made = rollouts.questions_of(items, tokenizer, 3, 10)
    assert made == [Question(items[0], [1] * 7), Question(items[1], [1])]
    with pytest.raises(rl.UserError, match="item a has a prompt of 7 tokens"):
        rollouts.questions_of(items, tokenizer, 4, 10)


def test_rollouts_are_drawn_to_the_end_of_a_turn_and_timed(monkeypatch):
    clock = iter([10.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr(rollouts, "time", types.SimpleNamespace(perf_counter=clock.__next__))
    monkeypatch.setattr(rollouts, "Engines", lambda *given: given)
    monkeypatch.setattr(
        rollouts, "_judged", lambda question, answer, end, *_: (question, answer, end)
    )
    given = []

    def write(engine, questions, seeds, sampling):
        given.append((questions, seeds, sampling))
        return [["a", "b"], ["c"]], [["stop", "length"], ["stop"]]

    monkeypatch.setattr(rollouts, "_write_groups", write)
    tokenizer = types.SimpleNamespace(special={"<|assistant_end|>": 7}, bos=3)
    one, two = Question({}, [1]), Question({}, [2])
    seconds, seeds = Seconds(), [[5, 6], [7]]
    groups = rollouts.roll_out(None, None, tokenizer, [one, two], seeds, 9, None, seconds=seconds)
    assert groups == [[(one, "a", "stop"), (one, "b", "length")], [(two, "c", "stop")]]
    [(questions, own, sampling)] = given
    assert (questions, own, sampling.max_tokens) == ([one, two], seeds, 9)
    assert sampling.stop == (7, 3) and sampling.keep_stop and sampling.temperature == 1.0
    assert seconds.rollout == 4.0
    rollouts.roll_out(None, None, tokenizer, [one, two], seeds, 9, None, seconds=seconds)
    assert seconds.rollout == 5.0


def test_a_reinforcements_state_and_step(monkeypatch):
    training = object.__new__(rl.Reinforcement)
    training.settings = rl.Reinforcing("spelling", updates=2, max_tokens=9)
    training.base, training.config = types.SimpleNamespace(params="params"), "config"
    training.layout, training.ref_params = None, "ref"
    monkeypatch.setattr(rl, "first_state", lambda *given: given)
    assert training.begin() == ("params", "config", training.settings)
    given = []
    monkeypatch.setattr(rl, "learn", lambda *what: given.append(what) or ("after", {"loss": 1}))
    assert training.step("state", "rows", "signals") == ("after", {"loss": 1})
    assert training.sums == {"loss": 1}
    policy_ = training.settings.policy
    assert given == [("state", "rows", "signals", "ref", "config", policy_, 2, None)]


def test_kernels_want_wide_rows(monkeypatch):
    training = types.SimpleNamespace(settings=types.SimpleNamespace(policy=Policy()))
    training.config = types.SimpleNamespace(microbatch=2, sequence_len=64)
    mixed = [[rollout([1], [3, 4, 5], reward=1.0), rollout([1], [6], reward=0.0)]]
    monkeypatch.setattr(rl, "parts_of", lambda *given: given[4])
    assert rl.Reinforcement.parts(training, mixed) == 16
    monkeypatch.setattr(rl.jax, "default_backend", lambda: "tpu")
    assert rl.Reinforcement.parts(training, mixed) == 128
    # rows that were cut count for nothing where that is said
    training.settings.policy = Policy(drop_truncated=True)
    monkeypatch.setattr(rl, "parts_of", lambda *given: [len(one) for one in given[:3]])
    cut = [[*mixed[0], rollout([1], [7, 8], "length", reward=1.0)]]
    assert rl.Reinforcement.parts(training, cut) == [2, 2, 2]
    training.settings.policy = Policy()
    assert rl.Reinforcement.parts(training, cut) == [3, 3, 3]
