"""Reinforcement learning: a model gets better at what can be checked.

Each step asks some questions several times (lib.train.rollouts), compares the answers to each with
one another (lib.train.policy), and makes those that were better than their group likelier. All the
rest is the training run that pretraining and fine-tuning have (lib.train.run): it measures, saves,
stops and goes on bit for bit, for a rollout depends on parameters and seeds alone.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from lib import model
from lib.config import Config
from lib.files import UserError, choose
from lib.parallel.collectives import optimizer_on, reduce_gradients, share_of
from lib.parallel.layout import (
    BATCH,
    Layout,
    param_shardings,
    put_batch,
    state_shardings,
    whole,
)
from lib.params import is_spec, param_specs
from lib.tasks import to_reinforce
from lib.tasks.rewards import Reward, reward_of
from lib.train import finetune, policy
from lib.train.finetune import Base
from lib.train.optim import compile_key, hyper, make_optimizer
from lib.train.policy import PRESETS, Policy
from lib.train.rollouts import (
    Question,
    Rollout,
    Rows,
    Seconds,
    Signal,
    from_all,
    learnt,
    parts_of,
    questions_of,
    roll_out,
)
from lib.train.run import Measurement, TrainingRun, find_past
from lib.train.step import TrainState, state_template, with_hyper

# steps in a row in which no group teaches anything, until it is given up
PATIENCE = 20
# where a number leaves its range, a line says so: (name, lowest, highest, what it may mean)
RANGES = (
    ("signal", 0.05, 1.0, "hardly a group differs: the questions are too easy or too hard"),
    ("entropy", 0.003, 5.0, "the model draws the same again and again, or anything"),
    ("kl", 0.0, 1.0, "the model is far from where it began"),
    ("drift", 0.0, 0.05, "sampler and learner disagree: try compute_dtype=float32"),
    ("truncated", 0.0, 0.5, "half of the answers are cut: allow more tokens"),
    ("length", 2.0, math.inf, "many answers are empty"),
)


# ---- settings ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reinforcing:
    """What is reinforced, and how.

    task: as of lib.tasks.to_reinforce; its training items are asked. reward: another one's
    name, or FILE.py:FUNCTION; empty for the task's own. preset: one of lib.train.policy.PRESETS.
    questions, samples: of a step, answers to each. updates: of the optimizer for each step's
    rollouts. lr: share of the rates of the stage that it begins with; it falls linearly to 0.
    """

    task: str
    reward: str = ""
    preset: str = "reinforce"
    num_steps: int = 120
    questions: int = 8
    samples: int = 8
    max_tokens: int = 64
    updates: int = 1
    lr: float = 0.1
    optimizer: str = "muon"
    seed: int = 0

    def __post_init__(self):
        choose("preset", self.preset, PRESETS)
        for name in ("num_steps", "questions", "max_tokens", "updates"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.samples < 2:
            raise UserError(
                f"{self.samples} sample of a question has nothing to be compared with: ask for 2 "
                "at least, 8 to 16 are usual"
            )
        if not 0 < self.lr < math.inf:
            raise UserError(f"lr must be above 0 and finite, got {self.lr}")

    @property
    def policy(self) -> Policy:
        """The preset, with the most tokens of an answer as its constant."""
        return dataclasses.replace(PRESETS[self.preset], norm=self.max_tokens)


def rl_config(config: Config, settings: Reinforcing) -> Config:
    """The config of a run: no warm-up, rates down to 0, no decay of matrices, for a step whose loss
    is small anyway would be nothing but decay.
    """
    config = finetune.phase_config(config, settings.num_steps, settings.lr, warm=True)
    return config.replace(
        optimizer=settings.optimizer,
        warmdown_ratio=1.0,
        final_lr_frac=0.0,
        weight_decay=0.0,
        seed=settings.seed,
    )


def first_state(params, config: Config, settings: Reinforcing) -> TrainState:
    """The state that a run begins with: trained parameters, and rates that are all scaled, those
    which have no field in the config among them.
    """
    return with_rl_rates(finetune.start(params, config), config, settings)


def with_rl_rates(state: TrainState, config: Config, settings: Reinforcing) -> TrainState:
    """The state with the rates and the horizon of a run, whatever it had before."""
    # the optimizer counts updates, of which a step has several
    now = hyper(config, config.num_steps * settings.updates)
    now["lr"]["smear"] *= settings.lr
    return with_hyper(state, now)


# ---- the learner's step --------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "layout"))
def _logprobs(params, config: Config, rows: Rows, layout: Layout | None = None):
    """What the model thinks of the tokens of a part, (B, T)."""

    def share(params, rows):
        return model.token_logprobs(params, config, rows.inputs_BT, rows.targets_BT)[0]

    return _on_devices(layout, config, share, P(BATCH))(params, rows)


def _on_devices(layout: Layout | None, config: Config, share: Callable, out_specs) -> Callable:
    """share(params, *rows) on the devices of a layout, each with its rows; as it is without one."""
    if layout is None:
        return share

    def traced(params, *rows):
        with share_of(layout, config):
            return share(params, *rows)

    partition = jax.tree.map(layout.partition, param_specs(config), is_leaf=is_spec)
    return lambda params, *rows: jax.shard_map(
        traced,
        mesh=layout.mesh,
        in_specs=(partition, *(P(BATCH) for _ in rows)),
        out_specs=out_specs,
        check_vma=False,
    )(params, *rows)


@functools.partial(jax.jit, static_argnames=("config", "settings", "layout"))
def part_gradients(  # noqa: PLR0913  (four models' opinions of some rows, and who reads them)
    params,
    config: Config,
    rows: Rows,
    signal: Signal,
    old_logp_BT,
    ref_logp_BT,
    settings: Policy,
    layout: Layout | None = None,
):
    """((loss, sums), gradients) of a part of a step; those of all parts are added up.

    old_logp_BT: None where the parameters are still those that wrote the answers. On several
    devices each reads its rows, and the rows' weights are those of the whole step, so the devices'
    parts are added up like any others.
    """

    def share(params, rows, signal, old_logp_BT, ref_logp_BT):
        def loss(params):
            logp_BT, entropy_BT = model.token_logprobs(params, config, *rows)
            before_BT = jax.lax.stop_gradient(logp_BT) if old_logp_BT is None else old_logp_BT
            loss, sums = policy.policy_loss(
                logp_BT,
                before_BT,
                ref_logp_BT,
                signal.sampler_logp_BT,
                rows.targets_BT >= 0,
                signal.advantage_B,
                settings,
                signal.weight_B,
            )
            return loss, sums | dict(entropy=jax.lax.stop_gradient(entropy_BT).sum())

        value, grads = jax.value_and_grad(loss, has_aux=True)(params)
        if layout is None:
            return value, grads
        # the tensor axis has each row on all of its devices, with the same loss
        return jax.lax.psum(value, BATCH), reduce_gradients(layout, config, grads)

    # gradients leave as the optimizer holds its state
    out_specs = None
    if layout is not None:
        reduced = jax.tree.map(
            lambda s: layout.state_partition(s, s.shape), param_specs(config), is_leaf=is_spec
        )
        out_specs = P(), reduced
    compute = _on_devices(layout, config, share, out_specs)
    return compute(params, rows, signal, old_logp_BT, ref_logp_BT)


def apply_gradients(
    state: TrainState, config: Config, grads, layout: Layout | None = None
) -> tuple[TrainState, jax.Array]:
    """(the state after one update, the norm of the gradient); the old state is given away."""
    return _jitted_update(config, layout)(state, grads)


@functools.cache
def _jitted_update(config: Config, layout: Layout | None):
    def update(state: TrainState, grads):
        norm = optax.tree.norm(grads)
        optimizer = make_optimizer(config, config.num_steps)
        with optimizer_on(layout):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step), jnp.asarray(norm)

    if layout is None:
        return jax.jit(update, donate_argnums=0)
    shardings = state_shardings(layout, config, state_template(config))
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, layout.sharding()))


def learn(  # noqa: PLR0913  (the state, what it learns from, and how)
    state: TrainState,
    rows: Sequence[Rows],
    signals: Sequence[Signal],
    ref_params,
    config: Config,
    settings: Policy,
    updates: int = 1,
    layout: Layout | None = None,
) -> tuple[TrainState, dict]:
    """One step: `updates` of the parameters by all parts of a rollout; (state, its last sums)."""
    key = compile_key(config)
    refs = [_logprobs(ref_params, key, part, layout) for part in rows]
    olds: list[Any] = [None] * len(rows)
    if updates > 1:
        olds = [_logprobs(state.params, key, part, layout) for part in rows]

    total: Any = None
    norm: Any = None
    for _ in range(updates):
        total = None
        for part in zip(rows, signals, olds, refs):
            result = part_gradients(state.params, key, *part, settings, layout)
            total = result if total is None else jax.tree.map(jnp.add, total, result)
        state, norm = apply_gradients(state, key, total[1], layout)
    loss, sums = total[0]
    return state._replace(step=state.step + 1), dict(loss=loss, grad_norm=norm, **sums)


# ---- the run -------------------------------------------------------------------------------------


class Reinforcement:
    """One training by rewards.

    `run` is its TrainingRun; `measurement` hands its numbers to it; `groups` are the newest
    rollouts, (item, answers) each, to be looked at.
    """

    def __init__(
        self,
        settings: Reinforcing,
        base: Base,
        store,
        if_exists: str = "continue",
        start_afresh: Callable[[], object] = lambda: None,
        layout: Layout | None = None,
    ):
        self.settings, self.base, self.layout = settings, base, layout
        self.questions, self.reward = find_questions(settings, base)
        self.config = rl_config(base.config, settings)
        self.ref_params = base.params
        if layout is not None:
            if settings.questions < jax.process_count():
                raise UserError(
                    f"{settings.questions} questions are too few for {jax.process_count()} "
                    "processes, each of which asks some: ask for more"
                )
            here = jax.tree.map(np.asarray, base.params)
            self.ref_params = jax.device_put(here, param_shardings(layout, self.config))
        self.groups: list[tuple[dict, list[Rollout]]] = []
        self.numbers: dict = {}
        self.sums: dict = {}
        self.began = 0.0

        identity = dataclasses.asdict(settings) | dict(
            tokenizer=base.tokenizer.fingerprint,
            source=base.source,
            start=finetune.fingerprint(base.params),
        )
        # these are the config's own, which may change or may not by its rules
        for name in ("num_steps", "optimizer", "seed"):
            identity.pop(name)
        past = find_past(store, if_exists, self.config, identity, store, start_afresh)
        self.run = TrainingRun(
            self.config,
            self.feed,
            folder=Path(store),
            store=store,
            identity=identity,
            past=past,
            layout=layout,
            begin=self.begin,
            rates=lambda state, config: with_rl_rates(state, config, settings),
            make_step=lambda config, layout: self.step,
            watch_state=True,
        )

    def begin(self) -> TrainState:
        """The state that the run begins with, where its devices hold it."""
        state = first_state(self.base.params, self.config, self.settings)
        if self.layout is None:
            return state
        here = jax.tree.map(np.asarray, state)
        return jax.device_put(here, state_shardings(self.layout, self.config, state))

    def step(self, state: TrainState, rows, signals):
        """As of lib.train.step.make_train_step, for a rollout's parts."""
        settings = self.settings
        state, self.sums = learn(
            state,
            rows,
            signals,
            self.ref_params,
            self.config,
            settings.policy,
            settings.updates,
            self.layout,
        )
        return state, self.sums

    def feed(self, cursor: dict | None) -> Generator:
        """(rows, signals, cursor after them) for ever, written by the run's newest parameters.

        A step of which no group teaches anything is not applied, and the next questions are asked.
        """
        place = cursor or dict(asked=0, skipped=0)
        while True:
            self.began = time.perf_counter()
            for _ in range(PATIENCE):
                asked = place["asked"]
                place = place | dict(asked=asked + self.settings.questions)
                seconds = Seconds()
                params = whole(self.layout, self.run.state.params, self.config.dtype)
                groups = self.ask(params, asked, seconds)
                parts = self.parts([answers for _, answers in groups])
                if parts:
                    break
                place = place | dict(skipped=place["skipped"] + 1)
            else:
                raise UserError(
                    f"in {PATIENCE} steps all answers to a question were worth the same: the task "
                    "is too easy or too hard for this model, so choose another or more samples"
                )
            self.groups = groups
            self.numbers = summary(groups, seconds) | dict(skipped=place["skipped"])
            yield *put_batch(self.layout, parts, whole=True), place

    def ask(self, params, asked: int, seconds: Seconds) -> list[tuple[dict, list[Rollout]]]:
        """Rollouts of the next questions, after so many."""
        settings = self.settings
        numbers = range(asked, asked + settings.questions)
        questions = [self.question(number) for number in numbers]
        # of several processes each asks its part
        own = slice(jax.process_index(), None, jax.process_count())
        seeds = [
            [seed_of(settings.seed, number, n) for n in range(settings.samples)]
            for number in numbers[own]
        ]
        groups = roll_out(
            params,
            compile_key(self.config),  # so that runs with other rates decode by the same program
            self.base.tokenizer,
            questions[own],
            seeds,
            settings.max_tokens,
            self.reward,
            seconds=seconds,
        )
        groups = from_all(groups, questions)
        return [(question.item, group) for question, group in zip(questions, groups)]

    def question(self, number: int) -> Question:
        """The question that is asked as number so and so, each epoch in an order of its own."""
        epoch, place = divmod(number, len(self.questions))
        return self.questions[order_of(self.settings.seed, epoch, len(self.questions))[place]]

    def parts(self, groups: list[list[Rollout]]) -> tuple[list[Rows], list[Signal]] | None:
        """What the learner reads; None where nothing would be learnt."""
        settings = self.settings.policy
        rollouts = [rollout for group in groups for rollout in group]
        group_B = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        reward_B = np.array([rollout.reward for rollout in rollouts])
        truncated_B = np.array([rollout.finish == "length" for rollout in rollouts])

        kept_B = policy.kept(reward_B, group_B, truncated_B, settings)
        advantage_B = policy.advantages(reward_B, group_B, settings)
        if not (advantage_B * kept_B).any():
            return None
        count_B = np.array([learnt(rollout) for rollout in rollouts]) * kept_B
        weight_B = policy.row_weights(count_B, settings) * kept_B

        # rows that count for nothing need not be read
        chosen = np.flatnonzero(kept_B)
        # kernels of attention want multiples of 128, which costs a CPU more than it saves
        narrowest = 16 if jax.default_backend() == "cpu" else 128
        return parts_of(
            [rollouts[i] for i in chosen],
            advantage_B[chosen],
            weight_B[chosen],
            self.config.microbatch,
            narrowest,
            self.config.sequence_len,
        )

    @property
    def measurement(self) -> Measurement:
        """Every step's numbers: rewards, lengths, entropy, divergence and where the time went."""
        return Measurement(lambda params: self.measure(), every=1)

    def measure(self) -> dict:
        """The newest step's numbers; those of its tokens are means. tokens_per_s counts what was
        written.
        """
        tokens = max(int(self.sums["tokens"]), 1)
        means = {
            name: float(self.sums[name]) / tokens for name in ("kl", "clipped", "drift", "entropy")
        }
        # of the whole step: writing, tools and learning
        seconds = time.perf_counter() - self.began
        return self.numbers | means | dict(tokens_per_s=self.numbers["written"] / seconds)


def find_questions(settings: Reinforcing, base: Base) -> tuple[list[Question], Reward]:
    """The task's training questions with their reward; UserError before anything is computed."""
    task = to_reinforce(settings.task)
    reward = reward_of(settings.reward or settings.task, task.grade)
    items = task.items("train")
    room = base.config.sequence_len
    return questions_of(items, base.tokenizer, settings.max_tokens, room), reward


@functools.lru_cache(2)
def order_of(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of questions in an epoch."""
    # RandomState: its numbers never change with numpy's version
    return np.random.RandomState([seed, epoch]).permutation(count)


def seed_of(seed: int, question: int, sample: int) -> int:
    """The seed of one answer: another for every question that is asked and every sample."""
    return int(np.random.SeedSequence([seed, question, sample]).generate_state(1)[0])


def summary(groups: list[tuple[dict, list[Rollout]]], seconds: Seconds) -> dict:
    """What a step's rollouts were like."""
    rollouts = [rollout for _, group in groups for rollout in group]
    lengths = [len(rollout.tokens) for rollout in rollouts]
    with_signal = [policy.has_signal([r.reward for r in group]) for _, group in groups]
    return dict(
        reward=float(np.mean([rollout.reward for rollout in rollouts])),
        length=float(np.mean(lengths)),
        written=sum(lengths),
        truncated=float(np.mean([rollout.finish == "length" for rollout in rollouts])),
        signal=float(np.mean(with_signal)),
        rollout_s=seconds.rollout,
        tools_s=seconds.tools,
    )


def warnings_of(numbers: dict) -> list[str]:
    """A sentence for each number of a step that has left its range."""
    told = []
    for name, low, high, meaning in RANGES:
        value = numbers.get(name)
        if value is not None and not low <= value <= high:
            told.append(f"{name} is {value:.3g}: {meaning}")
    return told
