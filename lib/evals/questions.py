"""Tasks put to a model: it picks a letter, a continuation, writes an answer or foresees a text.

`evaluate` gives records in the format of runs/NAME/evals/STAGE.json, which `records.write` keeps
there. Nothing that goes wrong is ever counted as a wrong answer: it stops the evaluation with the
item's id, but for tasks whose data cannot be had, which are named.
"""

import hashlib
import itertools
import math
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from lib.config import Config
from lib.data.speech import said
from lib.data.tokenizer import Tokenizer
from lib.evals import likelihood, stats
from lib.evals.bits import token_losses
from lib.evals.errors import evaluating, named
from lib.files import UserError, choose
from lib.generate.engine import LONG_CHUNK, NARROWEST, PREFILL, Engines, Sampling, bucket, pad_to
from lib.model import hidden, logits
from lib.runtime import progress as progress_bar
from lib.sandbox import calculator
from lib.tasks import Task, shuffled, tasks
from lib.tasks.own import jsonl

# tokens of the narrowest batch: kernels of attention want multiples of it, and fewer widths compile
# faster
LEAST_WIDTH = 128
# rows join an engine when this part of its slots is free
GROUPS = 4
# nats: scores closer than this are equal, for rounding alone can move them so far
TIE = 1e-5
# characters of a written answer that the record keeps
TEXT_CHARS = 300
# nats: beyond, the exponential has no room in a float
LARGEST = 700.0
# the k of pass@k that are told, as far as there are samples
PASS_AT = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Questions:
    """How tasks are put to a model.

    limit: the first so many items of each; tasks keep theirs in a fixed mixed order. batch: rows at
    once. max_tokens, temperature, samples: of generated answers. shuffle: options in an order drawn
    by the seed, for what a model knows does not depend on it.
    """

    limit: int | None = None
    seed: int = 0
    batch: int = 32
    max_tokens: int = 256
    temperature: float = 0.0
    samples: int = 1
    shuffle: bool = False

    def __post_init__(self):
        for name in ("limit", "batch", "max_tokens", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        # greedy decoding writes the same every time
        all_equal = self.samples > 1 and self.temperature == 0
        if self.temperature < 0 or all_equal:
            raise UserError(
                f"{self.samples} samples at temperature {self.temperature}: it must not be "
                "negative, nor 0 for more than one, or all are equal"
            )


# ---- what a model is asked


class ModelAnswers(NamedTuple):
    """The four questions that tasks put to a model; tests put others in its place.

    Ids are lists of ints.
    next_logprobs(prompts) -> (B, V): of the token behind each prompt, at most `batch` of them
    continuations(requests) -> as `likelihood.score`: a list of scores per request
    losses(rows) -> per (inputs, targets) the nats of each target, 0 where it is negative; at most
                    `batch` of them
    texts(prompts, samplings) -> yields (i, None) when prompt i is begun and (i, new ids) when it is
                                 done, in any order
    """

    next_logprobs: Callable
    continuations: Callable
    losses: Callable
    texts: Callable


@partial(jax.jit, static_argnames="config")
def _next_logprobs(params, config: Config, tokens_BT, last_B):
    """Log-probabilities (B, V) of what follows position last_B; what stands behind is not seen."""
    x_BTD, _ = hidden(params, config, tokens_BT)
    last_BD = x_BTD[np.arange(len(tokens_BT)), last_B]
    return jax.nn.log_softmax(logits(params, config, last_BD))


def _width(longest: int) -> int:
    """LEAST_WIDTH, doubled until it holds `longest` tokens."""
    blocks = -(-longest // LEAST_WIDTH)
    return LEAST_WIDTH << max(0, blocks - 1).bit_length()


def _padded(rows: Sequence[Sequence[int]], config: Config, batch: int, fill: int) -> np.ndarray:
    """Rows as one array (B, T) of few shapes."""
    width = min(_width(max(map(len, rows))), config.sequence_len)
    padded = np.full((batch, width), fill, np.int32)
    for row, ids in zip(padded, rows):
        row[: len(ids)] = ids
    return padded


class Shapes:
    """Sizes that programs were compiled for: a task takes one that is there already, if it is at
    most twice what the task needs.
    """

    def __init__(self):
        self.known: set[int] = set()

    def holding(self, size: int) -> int:
        """The size to compute in: the least known from `size` to twice that, else `size` itself."""
        fitting = [known for known in self.known if size <= known <= 2 * size]
        chosen = min(fitting, default=size)
        self.known.add(chosen)
        return chosen


def model_answers(params, config: Config, tokenizer, batch: int) -> ModelAnswers:
    """How a model of ours answers. batch: rows at once."""

    def next_logprobs(prompts):
        # rows that fill up the batch are looked at nowhere
        last = np.zeros(batch, np.int32)
        last[: len(prompts)] = [len(prompt) - 1 for prompt in prompts]
        tokens = _padded(prompts, config, batch, 0)
        logprobs = _next_logprobs(params, config, tokens, last)
        return np.asarray(logprobs)[: len(prompts)]

    def losses(rows):
        inputs, targets = zip(*rows)
        inputs_BT = _padded(inputs, config, batch, 0)
        targets_BT = _padded(targets, config, batch, -1)
        losses_BT = token_losses(params, config, inputs_BT, targets_BT)
        losses_BT = np.asarray(losses_BT, np.float64)
        # without the padding
        return [row[: len(target)] for row, target in zip(losses_BT, targets)]

    # of caches and of prompts, over all tasks
    lengths, widths = Shapes(), Shapes()

    def texts(prompts, samplings):
        # one engine for the whole task, with room for its longest answer
        longest = max(len(p) + s.max_tokens for p, s in zip(prompts, samplings))
        slots = min(batch, bucket(len(prompts)))
        length = lengths.holding(_width(longest))
        engine = Engines(params, config, slots, length, tokenizer, calculator)
        # prompts of one width, in groups of one size: a program more costs more than padding does
        widest = max(map(len, prompts)) - 1
        width = widths.holding(min(PREFILL, bucket(widest, NARROWEST)))
        pad_to(engine, width, together=max(1, engine.parts[0].slots // GROUPS))
        return _written(engine, prompts, samplings)

    continuations = partial(likelihood.score, params, config, tokenizer)
    return ModelAnswers(next_logprobs, continuations, losses, texts)


def _written(engine: Engines, prompts: list, samplings: list) -> Iterator[tuple]:
    """What an engine writes after each prompt, as `Answers.texts` yields it."""
    # prompts by number: those that wait, those in a slot, and what they have written
    waiting = deque(range(len(prompts)))
    busy = {}
    written = [[] for _ in prompts]

    # few prefills, each of many rows
    group = max(1, engine.slots // GROUPS)
    while waiting or busy:
        while waiting and engine.free >= group:
            new = [waiting.popleft() for _ in range(min(group, len(waiting)))]
            for i in new:
                yield i, None
            new_prompts = [prompts[i] for i in new]
            new_samplings = [samplings[i] for i in new]
            slots = engine.add_many(new_prompts, new_samplings)
            busy |= dict(zip(slots, new))

        # a chunk of tokens for every row
        for slot, (tokens, finish) in engine.step(LONG_CHUNK).items():
            if any(math.isnan(token.logprob) for token in tokens):
                raise ValueError("the model's probabilities are no numbers")
            i = busy[slot]
            written[i] += [token.id for token in tokens]
            if finish:
                del busy[slot]
                yield i, written[i]


# ---- one task on its way


@dataclass(frozen=True)
class TaskJob:
    """One task on its way through `evaluate`."""

    name: str
    task: Task
    items: list[dict]
    ask: ModelAnswers
    config: Config
    tokenizer: Tokenizer
    settings: Questions
    bar: tqdm

    def evaluating(self, items: list[dict]):
        """Stop at any error, saying which of the task's items were at work."""
        ids = [str(item["id"]) for item in items]
        return evaluating(f"task {self.name}, {named(ids)}")

    def each(self, function: Callable) -> list:
        """function(item) of every item, an error naming the item."""
        results = []
        for item in self.items:
            with self.evaluating([item]):
                results.append(function(item))
        return results

    def in_batches(self, lengths: list[int], size: int, function: Callable, owners=None) -> list:
        """function([i, ...]) of `size` things at a time, alike in length; its results by i.

        The longest come first. owners: the item of each thing, by index; each its own for None.
        """
        count = len(lengths)
        if owners is None:
            owners = range(count)
        order = sorted(range(count), key=lambda i: -lengths[i])
        results = [None] * count
        for start in range(0, len(order), size):
            part = order[start : start + size]
            # an error names all the items that it may be about
            numbers = sorted({owners[i] for i in part})
            at_work = [self.items[j] for j in numbers]
            with self.evaluating(at_work):
                for i, result in zip(part, function(part), strict=True):
                    results[i] = result
            self.bar.update(len(part))
        return results

    def outcomes(self, correct: list[float]) -> list[dict]:
        """The items of the task's entry."""
        return [dict(id=item["id"], correct=c) for item, c in zip(self.items, correct)]

    def judge(self, scores: list[list[float]]) -> list[float]:
        """The credit of each item for the scores of its options."""
        rest = iter(scores)
        return self.each(lambda item: _credit(next(rest), item["gold"]))


def _cut(ids: list[int], room: int) -> tuple[list[int], bool]:
    """At most `room` ids, and whether any had to go: the oldest, but for bos, the first."""
    if len(ids) <= room:
        return ids, False
    return [*ids[:1], *ids[len(ids) - room + 1 :]], True


def _credit(scores: list[float], gold: int) -> float:
    """1 if gold has the highest score, 0 if not, and its share of a tie.

    So whoever cannot tell gets what guessing gets.
    """
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"the model gives scores that are no numbers: {scores}")
    # who cannot tell two options apart has half a point
    least = max(scores) - TIE
    best = [i for i, score in enumerate(scores) if score >= least]
    return (gold in best) / len(best)


def _perplexity_of(nats, units) -> tuple[float, float | None]:
    """(perplexity per unit, its standard error, None for a single item) of independent items."""
    mean, error = stats.ratio(nats, units)
    perplexity = math.exp(min(mean, LARGEST))
    if error is None:
        return perplexity, None
    # an error of the mean becomes a factor
    return perplexity, perplexity * error


def _accuracy(job: TaskJob, correct: list[float], options: list[int] | None = None, **more) -> dict:
    """The entry of a task that is right or wrong. options: how many each item offered."""
    score, error = stats.proportion(correct)
    baseline = job.task.baseline
    majority = None
    # the chance of a guess, item by item: their numbers of options may differ
    if options and min(options) > 1:
        baseline = sum(1 / n for n in options) / len(options)
        majority = stats.majority([item["gold"] for item in job.items])
    # 0 for whoever guesses, where that can be told
    centered = None if baseline is None else stats.centered(score, baseline)
    return dict(
        score=score,
        stderr=error,
        baseline=baseline,
        majority=majority,
        centered=centered,
        **more,
    )


# ---- choice: which letter


class Lettered(NamedTuple):
    """A multiple choice item as ids. letters: the token of each option."""

    ids: list[int]
    cut: bool
    letters: list[int]


def _lettered(job: TaskJob, item: dict) -> Lettered:
    """An item's prompt and letters as ids; UserError where they can't be asked for."""
    # only the next token is looked at, so a letter must be one
    letters = [job.tokenizer.encode(letter) for letter in item["letters"]]
    single = all(len(letter) == 1 for letter in letters)
    if not single or not 0 <= item["gold"] < len(letters):
        raise UserError(
            f"letters {item['letters']} must be one token each, and gold {item['gold']} the index "
            "of one"
        )

    prompt = job.tokenizer.render_for_completion(item["messages"])
    ids, cut = _cut(prompt, job.config.sequence_len)
    return Lettered(ids, cut, [letter[0] for letter in letters])


def _choice(job: TaskJob) -> dict:
    """The likeliest of the letters as first token of the answer is taken."""
    questions = job.each(partial(_lettered, job))

    def scores(part):
        asked = [questions[i] for i in part]
        logprobs = job.ask.next_logprobs([question.ids for question in asked])
        return [row[question.letters].tolist() for question, row in zip(asked, logprobs)]

    # alike in length go together, so that little is padding
    lengths = [len(question.ids) for question in questions]
    by_item = job.in_batches(lengths, job.settings.batch, scores)

    # the entry
    correct = job.judge(by_item)
    items = job.outcomes(correct)
    truncated = sum(question.cut for question in questions)
    options = list(map(len, by_item))
    return _accuracy(job, correct, options, truncated=truncated, items=items)


# ---- likelihood: which continuation


class Continued(NamedTuple):
    """A likelihood item as requests for `likelihood.score`.

    One for all choices, or one each where the contexts differ.
    """

    requests: list[tuple[list[int], list[list[int]]]]
    cut: bool

    @property
    def length(self) -> int:
        """Tokens of the longest request."""
        lengths = []
        for before, after in self.requests:
            lengths.append(len(before) + max(map(len, after)))
        return max(lengths)


def continuation_ids(tokenizer, context: str, choice: str) -> tuple[list[int], list[int]]:
    """Ids of a context, bos first, and of what continues it.

    Blanks at the end of the context go to the continuation, for that is where tokens have them:
    "a " + "b" is the same as "a" + " b". The two are encoded in one piece where the tokens have a
    border between them, as in the texts of training.
    """
    bare = context.rstrip(" \t")
    choice = context[len(bare) :] + choice
    before = tokenizer.encode(bare)
    whole = tokenizer.encode(bare + choice)
    # in one piece, unless a token of the whole lies across the border
    border = len(before)
    if whole[:border] == before:
        after = whole[border:]
    else:
        after = tokenizer.encode(choice)
    return [tokenizer.bos, *before], after


def _continued(job: TaskJob, item: dict) -> Continued:
    """An item as requests, its contexts cut to what there is room for."""
    contexts = item["context"]
    choices = item["choices"]
    if not isinstance(contexts, list):
        contexts = [contexts] * len(choices)
    pairs = []
    for context, choice in zip(contexts, choices, strict=True):
        pairs.append(continuation_ids(job.tokenizer, context, choice))
    with_text = all(after for _, after in pairs)
    if not with_text or not 0 <= item["gold"] < len(pairs):
        raise UserError(
            "a likelihood item needs choices with text, and gold must be the index of one"
        )
    # room for the longest choice, but half of the model's context at least is the item's context
    context_len = job.config.sequence_len
    longest = max(len(after) for _, after in pairs)
    room = max(context_len // 2, context_len - longest)

    # neighbours with the same context are one request
    requests = []
    cut = False
    for before, after in pairs:
        before, was_cut = _cut(before, room)
        cut |= was_cut
        if requests and requests[-1][0] == before:
            requests[-1][1].append(after)
        else:
            requests.append((before, [after]))
    return Continued(requests, cut)


def _likelihood(job: TaskJob) -> dict:
    """The choice with the highest mean log-likelihood per token is taken.

    Where there is nothing to choose from, the question is whether greedy decoding would write it.
    """
    questions = job.each(partial(_continued, job))

    def scores(part):
        # the requests of all items in one list, and their answers back to the items
        asked = []
        for i in part:
            asked += questions[i].requests
        answers = iter(job.ask.continuations(asked))
        by_item = []
        for i in part:
            of_item = []
            for _ in questions[i].requests:
                of_item += next(answers)
            by_item.append(of_item)
        return by_item

    # many at a time: score() makes its own batches, and finds the longest first again
    lengths = [question.length for question in questions]
    by_item = job.in_batches(lengths, 16 * job.settings.batch, scores)
    # the mean over its tokens, or a short choice would always win
    means = []
    for scores_of_item in by_item:
        means.append([score.logprob / score.tokens for score in scores_of_item])
    correct = job.judge(means)
    items = job.outcomes(correct)

    # nothing to choose from
    more = {}
    if all(len(scores_of_item) == 1 for scores_of_item in by_item):
        single = [scores_of_item[0] for scores_of_item in by_item]
        correct, more = _one_continuation(single, items)

    # the entry
    truncated = sum(question.cut for question in questions)
    options = list(map(len, by_item))
    return _accuracy(job, correct, options, truncated=truncated, items=items, **more)


def _one_continuation(scores: list[likelihood.Score], items: list[dict]):
    """(whether each was greedy, the perplexity of one item); both go to the items too."""
    nats = [-float(score.logprob) for score in scores]
    perplexity, error = _perplexity_of(nats, np.ones(len(nats)))
    for item, score, n in zip(items, scores, nats):
        item.update(correct=float(score.greedy), nats=n)
    correct = [item["correct"] for item in items]
    return correct, dict(perplexity=perplexity, perplexity_stderr=error)


# ---- generate: what it writes


def _seed(*of) -> int:
    """A seed that depends on what it is for.

    So an item's text is the same whatever else is asked.
    """
    purpose = " ".join(map(str, of))
    digest = hashlib.sha256(purpose.encode()).hexdigest()
    return int(digest[:8], 16)


def stop_ids(tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer."""
    special = tokenizer.special
    return special["<|assistant_end|>"], special["<|user_start|>"], tokenizer.bos


class Drawing(NamedTuple):
    """One answer to be written: sample number `sample` of an item."""

    item: int
    sample: int


def _generate(job: TaskJob) -> dict:
    """The model writes its own answers, with the calculator, and they are graded as they come."""
    settings = job.settings
    n = settings.samples

    # an answer may fill half of the context; the prompt has the rest
    max_tokens = min(settings.max_tokens, job.config.sequence_len // 2)
    room = job.config.sequence_len - max_tokens

    def prompt_of(item):
        ids = job.tokenizer.render_for_completion(item["messages"])
        return _cut(ids, room)

    prompts = job.each(prompt_of)

    # as they come: lengths mixed, so that prefills have few shapes
    numbers = itertools.product(range(len(prompts)), range(n))
    drawings = [Drawing(i, s) for i, s in numbers]

    # every sample of every item has a seed of its own
    stop = stop_ids(job.tokenizer)
    samplings = []
    for i, s in drawings:
        seed = _seed(settings.seed, job.items[i]["id"], s)
        samplings.append(Sampling(max_tokens, settings.temperature, seed=seed, stop=stop))

    # written and graded side by side
    job.bar.reset(len(drawings))
    asked = [prompts[i][0] for i, _ in drawings]
    written = job.ask.texts(asked, samplings)
    texts, counts = _graded(job, drawings, written)

    # of several samples, the share that was right and the text of the first
    correct = [count / n for count in counts]
    items = job.outcomes(correct)
    for item, text in zip(items, texts):
        item["text"] = text[:TEXT_CHARS]
    entry = _accuracy(
        job,
        correct,
        truncated=sum(cut for _, cut in prompts),
        items=items,
        max_tokens=max_tokens,
        temperature=settings.temperature,
        samples=n,
    )
    if n > 1:
        entry["pass_at"] = _pass_at(n, counts)
    return entry


def _graded(
    job: TaskJob, drawings: list[Drawing], written: Iterator
) -> tuple[list[str], list[int]]:
    """(what was said in the first sample, how many samples were right) of each item."""
    if job.task.grade is None:
        raise UserError(f"task {job.name} has no way to grade what a model writes")
    texts = [""] * len(job.items)
    grades = [[] for _ in job.items]
    at_work = {}
    # a program's tests run while others are written
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        while True:
            with job.evaluating(list(at_work.values()) or job.items):
                number, ids = next(written, (None, None))
            if number is None:
                break
            i, sample = drawings[number]
            # begun: an error from now on may be about this item
            if ids is None:
                at_work[number] = job.items[i]
                continue
            at_work.pop(number, None)

            # what was called and calculated is not what was said
            text = said(job.tokenizer, ids)
            if sample == 0:
                texts[i] = text
            grade = pool.submit(job.task.grade, job.items[i], text)
            grades[i].append(grade)
            job.bar.update()
        # a grader that failed raises here, with its item's name
        rest = iter(grades)

        def count_right(item):
            return sum(bool(grade.result()) for grade in next(rest))

        counts = job.each(count_right)
    return texts, counts


def _pass_at(n: int, counts: list[int]) -> dict[str, dict]:
    """{k: score and error} of pass@k, from how many of n samples of each item were right."""
    entries = {}
    for k in [*(k for k in PASS_AT if k < n), n]:
        chances = [stats.pass_at_k(n, count, k) for count in counts]
        score, error = stats.proportion(chances)
        entries[str(k)] = dict(score=score, stderr=error)
    return entries


# ---- perplexity: how well it foresees


class Foreseen(NamedTuple):
    """A text or a chat as rows (inputs, targets). cut: it was longer than the model's context."""

    rows: list[tuple[list[int], list[int]]]
    cut: bool


def _windows(ids: list[int], bos: int, width: int) -> Iterator[tuple[list[int], list[int]]]:
    """Rows (inputs, targets) in which every id is a target once, behind a bos.

    All but the first row begin with half a row of what precedes them.
    """
    done = 0
    while done < len(ids):
        start = max(0, done - width // 2)
        end = min(len(ids), start + width)
        # what was a target before is only read again
        targets = [-1] * (done - start) + ids[done:end]
        yield [bos, *ids[start : end - 1]], targets
        done = end


def _foreseen(job: TaskJob, item: dict) -> Foreseen:
    """A text's windows, or a chat as one row."""
    tokenizer = job.tokenizer
    width = job.config.sequence_len
    if "text" in item:
        ids = tokenizer.encode(item["text"])
        rows = _windows(ids, tokenizer.bos, width)
        return Foreseen(list(rows), False)

    # of a chat only what the assistant says, as far as one row goes
    ids, mask = tokenizer.render_conversation(item["messages"], sys.maxsize)
    cut = len(ids) > width + 1
    ids = ids[: width + 1]
    mask = mask[: width + 1]

    # special tokens are no text: neither they nor their loss count
    is_text = tokenizer.token_bytes[ids[1:]] > 0
    learnt = np.array(mask[1:], bool) & is_text
    targets = np.where(learnt, ids[1:], -1).tolist()
    return Foreseen([(ids[:-1], targets)], cut)


def _perplexity(job: TaskJob) -> dict:
    """The loss on what an assistant should say, or on all of a text."""
    # the rows of all texts, and the item of each
    texts = job.each(partial(_foreseen, job))
    rows, owners = [], []
    for j, text in enumerate(texts):
        rows += text.rows
        owners += [j] * len(text.rows)
    job.bar.reset(len(rows))

    def losses_of(part):
        return job.ask.losses([rows[i] for i in part])

    lengths = [len(inputs) for inputs, _ in rows]
    losses = job.in_batches(lengths, job.settings.batch, losses_of, owners)

    # rows add up to their items
    none = dict(nats=0.0, tokens=0, bytes=0)
    items = [dict(id=item["id"], **none) for item in job.items]
    for j, (_, targets), loss in zip(owners, rows, losses):
        targets = np.asarray(targets)
        real = targets >= 0
        items[j]["nats"] += float(np.asarray(loss)[real].sum())
        items[j]["tokens"] += int(real.sum())
        items[j]["bytes"] += int(job.tokenizer.token_bytes[targets[real]].sum())
    for item, sums in zip(job.items, items):
        if "words" in item:
            sums["words"] = item["words"]
    truncated = sum(text.cut for text in texts)
    return dict(**_foresight(job, items), truncated=truncated, items=items)


def _foresight(job: TaskJob, items: list[dict]) -> dict:
    """The entry of a task of texts from the sums of each."""
    # words are known of data sets that count them
    units = ["tokens", "bytes"]
    if all("words" in item for item in items):
        units.append("words")
    total = {}
    for name in ("nats", *units):
        total[name] = sum(item[name] for item in items)
    if not all(total[unit] for unit in units):
        raise UserError(
            f"task {job.name} has no text to measure within the model's context of "
            f"{job.config.sequence_len} tokens"
        )
    # a broken model is no bad model: it is not scored
    for item in items:
        if not math.isfinite(item["nats"]):
            raise RuntimeError(f"task {job.name}, item {item['id']}: the loss is not finite")
    # perplexity per unit; that of words is the score where they are known
    nats = [item["nats"] for item in items]
    score = error = None
    perplexities = {}
    for unit in units:
        perplexity, its_error = _perplexity_of(nats, [item[unit] for item in items])
        perplexities[f"per_{unit.removesuffix('s')}"] = perplexity
        if unit in ("tokens", "words"):
            score, error = perplexity, its_error
    return dict(
        score=score,
        stderr=error,
        baseline=None,
        majority=None,
        centered=None,
        **perplexities,
        bpb=total["nats"] / math.log(2) / total["bytes"],
        **total,
    )


# ---- all of it

KINDS: dict[str, Callable[[TaskJob], dict]] = {
    "generate": _generate,
    "choice": _choice,
    "likelihood": _likelihood,
    "perplexity": _perplexity,
}


def find(names, known: dict[str, Task]) -> dict[str, Task]:
    """Tasks by name, all of `known` for None.

    A name that ends with .jsonl is the path of a file of the user's own, and its task is called
    like the file.
    """
    chosen = {}
    for name in dict.fromkeys(map(str, known if names is None else names)):
        if name.endswith(".jsonl"):
            # called by its path where the name is taken
            stem = Path(name).stem
            is_taken = stem in known or stem in chosen
            chosen[name if is_taken else stem] = jsonl(name)
        else:
            chosen[name] = choose("task", name, known)
    if not chosen:
        raise UserError("no task was named: choose some of " + ", ".join(sorted(known)))
    return chosen


def items_or_reason(task: Task, limit: int | None) -> list[dict] | str:
    """The first items of a task's test split, or one line why they cannot be had."""
    try:
        return task.items("test")[:limit] or "it has no test split"
    except UserError as e:
        return " ".join(str(e).split())


def evaluate(
    params,
    config: Config,
    tokenizer,
    names=None,
    questions: Questions | None = None,
    *,
    known: dict[str, Task] | None = None,
    answers: ModelAnswers | None = None,
    progress: bool = True,
) -> dict:
    """{"tasks": {name: entry}, "skipped": {name: why}, "chatcore"}: answers to tasks' test splits.

    names: of lib.tasks.tasks() or of `known` (such as lib.tasks.hub.make(root=...)), or paths of
    .jsonl files; None for all, most of which are downloaded once. answers: who is asked instead of
    the model. With more samples than one "pass_at" k is told too, and "correct" is the share that
    was right. A prompt longer than the context (less max_tokens, which get half a context at most)
    loses its oldest tokens, counted as "truncated". Ties share a point. "seconds" include
    compiling. UserError for bad arguments before anything runs; any error in an item stops
    everything and names it.
    """
    questions = questions or Questions()
    if known is None:
        known = tasks()
    chosen = find(names, known)

    # downloads side by side, and waiting for no network only once
    load = partial(items_or_reason, limit=questions.limit)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(load, chosen.values()))
    loaded, skipped = {}, {}
    for name, result in zip(chosen, results):
        if isinstance(result, str):
            skipped[name] = result
        else:
            loaded[name] = result
    if progress:
        for name, why in skipped.items():
            tqdm.write(f"{name:20} skipped: {why}")

    # one task after the other
    ask = answers or model_answers(params, config, tokenizer, questions.batch)
    entries = {}
    for name, items in loaded.items():
        if questions.shuffle:
            items = [_mixed(item, questions.seed) for item in items]
        hidden_bar = None if progress else True
        with progress_bar(total=len(items), desc=name, leave=False, disable=hidden_bar) as bar:
            job = TaskJob(name, chosen[name], items, ask, config, tokenizer, questions, bar)
            entries[name] = _measured(job)
        if progress:
            tqdm.write(summary(name, entries[name]))

    record = dict(tasks=entries, skipped=skipped)
    if score := stats.chatcore(entries):
        record["chatcore"] = score
    return record


def _measured(job: TaskJob) -> dict:
    """The entry of one task, with the time that it took."""
    clock = time.perf_counter()
    choose("kind of task", job.task.kind, KINDS)
    entry = KINDS[job.task.kind](job)
    seconds = time.perf_counter() - clock
    return dict(
        kind=job.task.kind,
        n=len(job.items),
        seconds=seconds,
        per_second=len(job.items) / seconds,
        seed=job.settings.seed,
        limit=job.settings.limit,
        **entry,
    )


def _mixed(item: dict, seed: int) -> dict:
    """An item with its options in an order drawn by the seed and its id."""
    if "gold" not in item:
        return item
    options = item["choices"] if "choices" in item else item["letters"]
    order = list(range(len(options)))
    random.Random(f"{seed} {item['id']}").shuffle(order)
    return shuffled(item, order)


def texts_of(items: list[dict]) -> list[dict]:
    """Items of any kind as {"id", "text"} with the question and its right answer.

    For the count of overlaps with a training source.
    """
    return [dict(id=item["id"], text=_words(item)) for item in items]


def _words(item: dict) -> str:
    """What an item says, the right answer to it included."""
    if "text" in item:
        return item["text"]
    if "choices" in item:
        gold = item["gold"]
        context = item["context"]
        if isinstance(context, list):
            context = context[gold]
        return context + item["choices"][gold]
    if "options" in item:
        answer = item["options"][item["gold"]]
        return f"{item['question']} {answer}"

    # a conversation, whose messages may have parts
    contents = []
    for message in item["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        contents.append(content)
    return "\n".join(contents)


def summary(name: str, entry: dict) -> str:
    """One line about a task: score, standard error, baselines, speed."""
    # accuracies in per cent
    is_perplexity = entry["kind"] == "perplexity"
    scale = 1 if is_perplexity else 100
    error = ""
    if entry["stderr"] is not None:
        error = f" ± {entry['stderr'] * scale:.2f}"

    if is_perplexity:
        result = f"perplexity {entry['score']:.2f}{error}, {entry['bpb']:.4f} bits per byte"
    else:
        beside = []
        for label, key in (("random", "baseline"), ("majority", "majority")):
            if entry[key] is not None:
                beside.append(f"{label} {100 * entry[key]:.1f}")
        result = f"{100 * entry['score']:.2f}{error} % ({', '.join(beside)})"
    cut = ""
    if entry["truncated"]:
        cut = f", {entry['truncated']} prompts cut"
    return f"{name:20} {result}, n {entry['n']}, {entry['per_second']:.1f}/s{cut}"
