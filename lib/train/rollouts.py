"""Rollouts: a model answers each question several times; what each is worth, rows to learn from.

They are written by the engine that chats and evaluates (lib.generate), at temperature 1 and without
filters, because the learner's log-probabilities are those of the model itself. What is learnt is
every token that the model chose, the end of its turn among them, and never a tool's answer.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np

from lib.config import Config
from lib.data import Tokenizer
from lib.data.speech import said
from lib.files import UserError
from lib.generate import Engines, Sampling, Token
from lib.generate.engine import LONG_CHUNK, bucket
from lib.parallel.hosts import from_each
from lib.sandbox import calculator
from lib.tasks.rewards import Reward, score

# tokens: the narrowest row of the learner, and what widths up to eight times that are multiples of
NARROWEST = 16


class Question(NamedTuple):
    """An item of a task, ready to be asked: its prompt as ids."""

    item: dict
    prompt: list[int]


class Rollout(NamedTuple):
    """One answer. finish: "stop" where the model ended it itself, "length" where it was cut."""

    prompt: list[int]
    tokens: list[Token]
    finish: str
    text: str
    reward: float


@dataclass
class Seconds:
    """Where the time of rollouts went: all of it, and what of it the tools took."""

    rollout: float = 0.0
    tools: float = 0.0


def questions_of(
    items: Iterable[dict], tokenizer: Tokenizer, max_tokens: int, room: int
) -> list[Question]:
    """Items with their prompts; UserError where one leaves no room for an answer."""
    questions = []
    for item in items:
        prompt = tokenizer.render_for_completion(item["messages"])
        if len(prompt) + max_tokens > room:
            raise UserError(
                f"item {item['id']} has a prompt of {len(prompt)} tokens: with an answer of "
                f"{max_tokens} it doesn't fit into the model's {room}, so ask for shorter answers"
            )
        questions.append(Question(item, prompt))
    return questions


# ---- writing -------------------------------------------------------------------------------------


def roll_out(  # noqa: PLR0913  (a model, what is asked of it, and how)
    params,
    config: Config,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    seeds: Sequence[Sequence[int]],
    max_tokens: int,
    reward: Reward,
    *,
    slots: int = 64,
    seconds: Seconds | None = None,
) -> list[list[Rollout]]:
    """A group of answers to each question, one for each of its seeds, with their rewards.

    The answers depend on parameters, prompt and seed alone, not on what else is written beside
    them. All answers to a question come from one prefill. An answer that was cut is worth nothing:
    nobody heard its end. slots: rows written at once.
    """
    seconds = seconds or Seconds()
    start = time.perf_counter()
    most = max(map(len, seeds))
    slots = max(min(slots, bucket(sum(map(len, seeds)))), bucket(most))
    length = bucket(max(len(question.prompt) for question in questions) + max_tokens, 64)
    engine = Engines(params, config, slots, length, tokenizer, _timed(calculator, seconds))

    stop = tokenizer.special["<|assistant_end|>"], tokenizer.bos
    sampling = Sampling(max_tokens, stop=stop, keep_stop=True)
    tokens, finish = _write_groups(engine, questions, seeds, sampling)

    groups = []
    for question, answers, ends in zip(questions, tokens, finish):
        group = [
            _judged(question, answer, end, tokenizer, reward) for answer, end in zip(answers, ends)
        ]
        groups.append(group)
    seconds.rollout += time.perf_counter() - start
    return groups


def _write_groups(
    engine: Engines,
    questions: Sequence[Question],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
) -> tuple[list[list[list[Token]]], list[list[str]]]:
    """(tokens, why each ended) of every answer, by question and by number."""
    waiting = deque(range(len(questions)))
    busy: dict[int, tuple[int, int]] = {}  # slot -> (question, number of its answer)
    tokens: list[list[list[Token]]] = [[[] for _ in own] for own in seeds]
    finish = [["" for _ in own] for own in seeds]
    while waiting or busy:
        # whole groups join, so that a prompt is prefilled once for all of its answers
        while waiting and engine.free >= len(seeds[waiting[0]]):
            i = waiting.popleft()
            samplings = [replace(sampling, seed=seed) for seed in seeds[i]]
            slots = engine.add_many([questions[i].prompt] * len(samplings), samplings)
            busy |= {slot: (i, n) for n, slot in enumerate(slots)}

        # some more tokens of all that are being written
        for slot, (new, end) in engine.step(LONG_CHUNK).items():
            i, n = busy[slot]
            tokens[i][n] += new
            if end:
                finish[i][n] = end
                del busy[slot]
    return tokens, finish


def _timed(tool: Callable, seconds: Seconds) -> Callable:
    def call(text: str):
        start = time.perf_counter()
        answer = tool(text)
        seconds.tools += time.perf_counter() - start
        return answer

    return call


def _judged(
    question: Question, tokens: list[Token], finish: str, tokenizer: Tokenizer, reward: Reward
) -> Rollout:
    """An answer with what it is worth."""
    text = said(tokenizer, [token.id for token in tokens])
    worth = score(reward, question.item, text) if finish == "stop" else 0.0
    return Rollout(question.prompt, tokens, finish, text, worth)


def from_all(groups: list[list[Rollout]], questions: Sequence[Question]) -> list[list[Rollout]]:
    """The groups of all questions on every process, each of which has asked every n-th of them."""
    if jax.process_count() == 1:
        return groups

    # as JSON, which keeps every bit of a number; prompts are known to all
    packed = []
    for group in groups:
        answers = []
        for rollout in group:
            tokens = [[token.id, token.logprob, token.forced] for token in rollout.tokens]
            answers.append([tokens, rollout.finish, rollout.text, rollout.reward])
        packed.append(answers)
    by_process = from_each("rollouts", packed)

    whole = []
    for number, question in enumerate(questions):
        turn, process = divmod(number, len(by_process))
        group = []
        for tokens, *rest in by_process[process][turn]:
            group.append(Rollout(question.prompt, [Token(*token) for token in tokens], *rest))
        whole.append(group)
    return whole


# ---- rows to learn from --------------------------------------------------------------------------


class Rows(NamedTuple):
    """Some rows as the model reads them: targets are -1 where nothing is learnt."""

    inputs_BT: np.ndarray
    targets_BT: np.ndarray


class Signal(NamedTuple):
    """What those rows teach: how good each was, what its tokens weigh, what the sampler thought."""

    sampler_logp_BT: np.ndarray
    advantage_B: np.ndarray
    weight_B: np.ndarray


def learnt(rollout: Rollout) -> int:
    """How many tokens of an answer the model chose itself."""
    return sum(not token.forced for token in rollout.tokens)


def width_of(tokens: int, narrowest: int = NARROWEST) -> int:
    """The width of a row for so many tokens: one of eight to an octave, so that few shapes compile
    and little is padding.
    """
    step = narrowest
    while step * 16 <= tokens:
        step *= 2
    return -(-tokens // step) * step


def parts_of(  # noqa: PLR0913  (rows, what each teaches, and the shape of a part)
    rollouts: Sequence[Rollout],
    advantage_B: Sequence[float] | np.ndarray,
    weight_B: Sequence[float] | np.ndarray,
    rows_at_once: int,
    narrowest: int = NARROWEST,
    longest: int | None = None,
) -> tuple[list[Rows], list[Signal]]:
    """Rollouts as parts of `rows_at_once` rows, alike in length; none is left out.

    What fills up the last part and the ends of rows has no target and no weight. longest: a width
    that no part exceeds.
    """
    order = sorted(range(len(rollouts)), key=lambda i: -_tokens(rollouts[i]))
    rows, signals = [], []
    for start in range(0, len(order), rows_at_once):
        members = order[start : start + rows_at_once]
        width = width_of(_tokens(rollouts[members[0]]), narrowest)
        shape = rows_at_once, min(width, longest or width)
        inputs, targets = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        logp = np.zeros(shape, np.float32)
        advantage, weight = np.zeros((2, rows_at_once), np.float32)
        for row, i in enumerate(members):
            _write(rollouts[i], inputs[row], targets[row], logp[row])
            advantage[row], weight[row] = advantage_B[i], weight_B[i]
        rows.append(Rows(inputs, targets))
        signals.append(Signal(logp, advantage, weight))
    return rows, signals


def _tokens(rollout: Rollout) -> int:
    """How wide a row its inputs need: all of its tokens but the last."""
    return len(rollout.prompt) + len(rollout.tokens) - 1


def _write(rollout: Rollout, inputs_T, targets_T, logp_T):
    """Put a rollout into its row."""
    ids = rollout.prompt + [token.id for token in rollout.tokens]
    inputs_T[: len(ids) - 1] = ids[:-1]
    # position t foresees token t + 1
    first = len(rollout.prompt) - 1
    for t, token in enumerate(rollout.tokens, first):
        if not token.forced:
            targets_T[t] = token.id
            logp_T[t] = token.logprob
