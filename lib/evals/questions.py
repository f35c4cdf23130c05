"""Tasks put to a model: the likeliest letter, the likelier continuation, a graded answer of its own, or how well it foresees a text.

`evaluate` gives records in the format of runs/NAME/evals/STAGE.json and `write` keeps them there. Nothing that goes wrong is ever
counted as a wrong answer: it stops the evaluation with the item's id, but for tasks whose data cannot be had, which are named.
"""

import contextlib
import hashlib
import json
import math
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from lib import model, runtime
from lib.config import Config
from lib.evals import likelihood, stats, token_losses
from lib.files import UserError, choose, write_json
from lib.generate.engine import LONG_CHUNK, Engines, Sampling, bucket
from lib.runs import STAGES
from lib.sandbox import calculator
from lib.tasks import Task, shuffled, tasks
from lib.tasks.own import jsonl

# tokens of the narrowest batch: kernels of attention want multiples of it, and fewer widths compile
# faster
LEAST_WIDTH = 128
TIE = 1e-5  # nats: scores closer than this are equal, for rounding alone can move them so far
TEXT_CHARS = 300  # of a generated text that the record keeps


# ---- what a model is asked -------------------------------------------------------------------------------------------


class Answers(NamedTuple):
    """The four questions that tasks put to a model; tests put others in its place. Ids are lists of ints.

    next_logprobs(prompts) -> (B, V): of the token behind each prompt, at most `batch` of them
    continuations(requests) -> as `lib.evals.likelihood.score`: [[(summed log-probability, tokens, greedy, …), …] per request]
    losses(rows) -> per (inputs, targets) the nats of each target, 0 where it is negative; at most `batch` of them
    texts(prompts, samplings) -> yields (i, None) when prompt i is begun and (i, new ids) when it is done, in any order
    """

    next_logprobs: Callable
    continuations: Callable
    losses: Callable
    texts: Callable


@partial(jax.jit, static_argnames="config")
def _next_logprobs(params, config: Config, tokens_BT, last_B):
    """Log-probabilities (B, V) of what follows position last_B; what stands behind it is not seen."""
    x_BTD, _ = model.hidden(params, config, tokens_BT)
    return jax.nn.log_softmax(
        model.logits(params, config, x_BTD[np.arange(len(tokens_BT)), last_B])
    )


def _width(longest: int) -> int:
    """LEAST_WIDTH, doubled until it holds `longest` tokens."""
    return LEAST_WIDTH << max(0, -(-longest // LEAST_WIDTH) - 1).bit_length()


def _padded(rows: list[list[int]], config: Config, batch: int, fill: int) -> np.ndarray:
    """Rows as one array (B, T) of few shapes."""
    out = np.full((batch, min(_width(max(map(len, rows))), config.sequence_len)), fill, np.int32)
    for row, ids in zip(out, rows):
        row[: len(ids)] = ids
    return out


def model_answers(params, config: Config, tokenizer, batch: int) -> Answers:
    """How a model of ours answers. batch: rows at once."""

    def next_logprobs(prompts):
        last_B = np.array([len(p) - 1 for p in prompts] + [0] * (batch - len(prompts)), np.int32)
        return np.asarray(
            _next_logprobs(params, config, _padded(prompts, config, batch, 0), last_B)
        )[: len(prompts)]

    def losses(rows):
        inputs, targets = zip(*rows)
        found = token_losses(
            params, config, _padded(inputs, config, batch, 0), _padded(targets, config, batch, -1)
        )
        return [row[: len(t)] for row, t in zip(np.asarray(found, np.float64), targets)]

    def texts(prompts, samplings):
        length = _width(max(len(p) + s.max_tokens for p, s in zip(prompts, samplings)))
        engine = Engines(
            params, config, min(batch, bucket(len(prompts))), length, tokenizer, calculator
        )
        waiting, busy, made = deque(range(len(prompts))), {}, [[] for _ in prompts]
        # rows join in groups of one size: a prefill serves several, and is compiled once
        group = max(1, engine.slots // 4)
        while waiting or busy:
            while waiting and engine.free >= group:
                new = [waiting.popleft() for _ in range(min(group, len(waiting)))]
                yield from ((i, None) for i in new)
                busy |= dict(
                    zip(
                        engine.add_many([prompts[i] for i in new], [samplings[i] for i in new]), new
                    )
                )
            for slot, (found, finish) in engine.step(LONG_CHUNK).items():
                if any(math.isnan(token.logprob) for token in found):
                    raise ValueError("the model's probabilities are no numbers")
                made[busy[slot]] += [token.id for token in found]
                if finish:
                    i = busy.pop(slot)
                    yield i, made[i]

    return Answers(
        next_logprobs, partial(likelihood.score, params, config, tokenizer), losses, texts
    )


# ---- the four kinds --------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One task on its way through `evaluate`."""

    name: str
    task: Task
    items: list[dict]
    ask: Answers
    config: Config
    tokenizer: object
    batch: int
    max_tokens: int
    temperature: float
    samples: int
    seed: int
    bar: tqdm


@contextlib.contextmanager
def _blaming(job: Job, items: list[dict]):
    """Stop at any error, saying which of the task's items were at work."""
    try:
        yield
    except Exception as e:
        ids = [str(item["id"]) for item in items]
        where = (
            f"item {ids[0]}"
            if len(ids) == 1
            else f"one of {len(ids)} items ({', '.join(ids[:4])}{', …' * (len(ids) > 4)})"
        )
        message = f"task {job.name}, {where}: {type(e).__name__ + ': ' if not isinstance(e, UserError) else ''}{e}"
        raise (UserError if isinstance(e, UserError) else RuntimeError)(message) from e


def _each(job: Job, function) -> list:
    """function(item) of every item, an error naming the item."""
    found = []
    for item in job.items:
        with _blaming(job, [item]):
            found.append(function(item))
    return found


def _in_batches(job: Job, lengths: list[int], size: int, function, of=lambda i: i) -> list:
    """function([i, ...]) of `size` things at a time, alike in length and the longest first; its results by i. of(i): its item's index."""
    found, order = [None] * len(lengths), sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for at in range(0, len(order), size):
        part = order[at : at + size]
        with _blaming(job, [job.items[j] for j in sorted({of(i) for i in part})]):
            for i, result in zip(part, function(part), strict=True):
                found[i] = result
        job.bar.update(len(part))
    return found


def _cut(ids: list[int], room: int) -> tuple[list[int], bool]:
    """At most `room` ids, and whether any had to go: the oldest, but for the first, which is bos."""
    return (ids, False) if len(ids) <= room else ([*ids[:1], *ids[len(ids) - room + 1 :]], True)


def _credit(scores: list[float], gold: int) -> float:
    """1 if gold has the highest score, 0 if not, and its share of a tie: whoever cannot tell gets what guessing gets."""
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"the model gives scores that are no numbers: {scores}")
    best = [i for i, score in enumerate(scores) if score >= max(scores) - TIE]
    return (gold in best) / len(best)


def _ratio(nats, units) -> tuple[float, float | None]:
    """(perplexity per unit, its standard error, None for a single item), items being independent draws (delta method)."""
    nats, units, n = np.asarray(nats, np.float64), np.asarray(units, np.float64), len(nats)
    mean = nats.sum() / units.sum()
    error = (
        math.sqrt((((nats - mean * units) ** 2).sum()) * n / (n - 1)) / units.sum()
        if n > 1
        else None
    )
    perplexity = math.exp(min(mean, 700.0))  # beyond, a float has no room
    return perplexity, error and perplexity * error


def _accuracy(job: Job, correct: list[float], options: list[int] | None, **more) -> dict:
    """The entry of a task that is right or wrong. options: how many each item had to choose from."""
    score, error = stats.proportion(correct)
    baseline, majority = job.task.baseline, None
    if options and min(options) > 1:
        baseline, majority = (
            sum(1 / n for n in options) / len(options),
            stats.majority([item["gold"] for item in job.items]),
        )
    centered = None if baseline is None else stats.centered(score, baseline)
    return (
        dict(score=score, stderr=error, baseline=baseline, majority=majority, centered=centered)
        | more
    )


def _choice(job: Job) -> dict:
    def prepare(item):
        ids, cut = _cut(
            job.tokenizer.render_for_completion(item["messages"]), job.config.sequence_len
        )
        letters = [job.tokenizer.encode(letter) for letter in item["letters"]]
        if any(len(letter) != 1 for letter in letters) or not 0 <= item["gold"] < len(letters):
            raise UserError(
                f"letters {item['letters']} must be one token each, and gold {item['gold']} the index of one"
            )
        return ids, cut, [letter[0] for letter in letters]

    ready = _each(job, prepare)

    def scores(part):
        return [
            row[ready[i][2]].tolist()
            for i, row in zip(part, job.ask.next_logprobs([ready[i][0] for i in part]))
        ]

    found = _in_batches(job, [len(ids) for ids, *_ in ready], job.batch, scores)
    correct = _judge(job, found)
    items = [dict(id=item["id"], correct=c) for item, c in zip(job.items, correct)]
    return _accuracy(
        job,
        correct,
        [len(s) for s in found],
        truncated=sum(cut for _, cut, _ in ready),
        items=items,
    )


def _judge(job: Job, scores: list[list[float]]) -> list[float]:
    rest = iter(scores)
    return _each(job, lambda item: _credit(next(rest), item["gold"]))


def continuation_ids(tokenizer, context: str, choice: str) -> tuple[list[int], list[int]]:
    """Ids of a context, bos first, and of what continues it.

    Blanks at the end of the context go to the continuation, for that is where tokens have them: "a " + "b" is the same as "a" + " b".
    The two are encoded in one piece where the tokens have a border between them, as in the texts of training.
    """
    bare = context.rstrip(" \t")
    choice = context[len(bare) :] + choice
    before, whole = tokenizer.encode(bare), tokenizer.encode(bare + choice)
    after = whole[len(before) :] if whole[: len(before)] == before else tokenizer.encode(choice)
    return [tokenizer.bos, *before], after


def _likelihood(job: Job) -> dict:
    def prepare(item):
        """The requests of an item: one for all choices, or one each where the contexts differ; whether any was cut."""
        contexts, choices = item["context"], item["choices"]
        pairs = (
            zip(contexts, choices, strict=True)
            if isinstance(contexts, list)
            else [(contexts, choice) for choice in choices]
        )
        pairs = [continuation_ids(job.tokenizer, context, choice) for context, choice in pairs]
        if not pairs or not all(after for _, after in pairs) or not 0 <= item["gold"] < len(pairs):
            raise UserError(
                "a likelihood item needs choices with text, and gold must be the index of one"
            )
        room = max(
            job.config.sequence_len // 2,
            job.config.sequence_len - max(len(after) for _, after in pairs),
        )
        requests, cuts = [], 0
        for before, after in pairs:
            kept, cut = _cut(before, room)
            cuts += cut
            if requests and requests[-1][0] == kept:
                requests[-1][1].append(after)
            else:
                requests.append((kept, [after]))
        return requests, cuts > 0

    ready = _each(job, prepare)

    def scores(part):
        found = iter(job.ask.continuations([request for i in part for request in ready[i][0]]))
        return [[one[:3] for _ in ready[i][0] for one in next(found)] for i in part]

    lengths = [
        max(len(before) + max(map(len, after)) for before, after in requests)
        for requests, _ in ready
    ]
    # many at a time: score() makes its own batches, and finds the longest first again
    found = _in_batches(job, lengths, 16 * job.batch, scores)
    more, kept = {}, [{} for _ in found]
    correct = _judge(job, [[summed / count for summed, count, _ in one] for one in found])
    # nothing to choose from: would greedy decoding write it?
    if all(len(one) == 1 for one in found):
        correct = [float(greedy) for ((_, _, greedy),) in found]
        nats = [-float(summed) for ((summed, _, _),) in found]
        perplexity, error = _ratio(nats, np.ones(len(nats)))
        more, kept = (
            dict(perplexity=perplexity, perplexity_stderr=error),
            [dict(nats=n) for n in nats],
        )
    items = [dict(id=item["id"], correct=c) | k for item, c, k in zip(job.items, correct, kept)]
    return _accuracy(
        job,
        correct,
        [len(one) for one in found],
        truncated=sum(cut for _, cut in ready),
        items=items,
        **more,
    )


def _seed(*of) -> int:
    """A seed that depends on what it is for, so that an item's text is the same whatever else is asked."""
    return int(hashlib.sha256(" ".join(map(str, of)).encode()).hexdigest()[:8], 16)


def _generate(job: Job) -> dict:
    tokenizer, n = job.tokenizer, job.samples
    max_tokens = min(job.max_tokens, job.config.sequence_len // 2)
    ready = _each(
        job,
        lambda item: _cut(
            tokenizer.render_for_completion(item["messages"]), job.config.sequence_len - max_tokens
        ),
    )
    stop = (
        tokenizer.special["<|assistant_end|>"],
        tokenizer.special["<|user_start|>"],
        tokenizer.bos,
    )
    # as they come: lengths mixed, so that prefills have few shapes
    runs = [(i, s) for i in range(len(ready)) for s in range(n)]
    samplings = [
        Sampling(
            max_tokens, job.temperature, seed=_seed(job.seed, job.items[i]["id"], s), stop=stop
        )
        for i, s in runs
    ]
    texts, right, at_work = [[None] * n for _ in ready], [[None] * n for _ in ready], {}
    job.bar.reset(len(runs))
    found = job.ask.texts([ready[i][0] for i, _ in runs], samplings)
    # a program's tests run while others are written
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        while True:
            with _blaming(job, list(at_work.values()) or job.items):
                run, ids = next(found, (None, None))
            if run is None:
                break
            i, s = runs[run]
            if ids is None:
                at_work[run] = job.items[i]
                continue
            at_work.pop(run, None)
            texts[i][s] = tokenizer.decode(ids)
            right[i][s] = pool.submit(job.task.grade, job.items[i], texts[i][s])
            job.bar.update()
        rest = iter(right)
        counts = _each(job, lambda item: sum(bool(grade.result()) for grade in next(rest)))
    items = [
        dict(id=item["id"], correct=c / n, text=t[0][:TEXT_CHARS])
        for item, c, t in zip(job.items, counts, texts)
    ]
    more = dict(max_tokens=max_tokens, temperature=job.temperature, samples=n)
    if n > 1:
        ks = sorted({k for k in (1, 2, 5, 10, 20, 50, 100) if k < n} | {n})
        estimates = {k: stats.proportion([stats.pass_at_k(n, c, k) for c in counts]) for k in ks}
        more["pass_at"] = {
            str(k): dict(score=score, stderr=error) for k, (score, error) in estimates.items()
        }
    return _accuracy(
        job,
        [c / n for c in counts],
        None,
        truncated=sum(cut for _, cut in ready),
        items=items,
        **more,
    )


def _windows(ids: list[int], bos: int, width: int) -> Iterator[tuple[list[int], list[int]]]:
    """Rows (inputs, targets) in which every id is a target once, behind a bos and, but at the beginning, half a row of what precedes it."""
    start = done = 0
    while done < len(ids):
        start = max(0, done - width // 2)
        end = min(len(ids), start + width)
        yield [bos, *ids[start : end - 1]], [-1] * (done - start) + ids[done:end]
        done = end


def _perplexity(job: Job) -> dict:
    tokenizer, width = job.tokenizer, job.config.sequence_len
    rows, owner, cuts = [], [], 0

    def prepare(item):
        nonlocal cuts
        if "text" in item:
            found = list(_windows(tokenizer.encode(item["text"]), tokenizer.bos, width))
        else:
            ids, mask = tokenizer.render_conversation(item["messages"], sys.maxsize)
            cuts += len(ids) > width + 1
            ids, mask = ids[: width + 1], mask[: width + 1]
            # special tokens are no text: neither they nor their loss count
            learn = [t if m and tokenizer.token_bytes[t] else -1 for t, m in zip(ids[1:], mask[1:])]
            found = [(ids[:-1], learn)]
        return found

    for j, found in enumerate(_each(job, prepare)):
        rows += found
        owner += [j] * len(found)
    job.bar.reset(len(rows))
    losses = _in_batches(
        job,
        [len(inputs) for inputs, _ in rows],
        job.batch,
        lambda part: job.ask.losses([rows[i] for i in part]),
        of=owner.__getitem__,
    )
    sums = [dict(nats=0.0, tokens=0, bytes=0) for _ in job.items]
    for j, (_, targets), loss in zip(owner, rows, losses):
        real = np.asarray(targets) >= 0
        sums[j]["nats"] += float(np.asarray(loss)[real].sum())
        sums[j]["tokens"] += int(real.sum())
        sums[j]["bytes"] += int(tokenizer.token_bytes[np.asarray(targets)[real]].sum())
    items = [
        dict(id=item["id"], **one) | ({"words": item["words"]} if "words" in item else {})
        for item, one in zip(job.items, sums)
    ]
    units = [unit for unit in ("tokens", "bytes", "words") if all(unit in one for one in items)]
    total = {name: sum(one[name] for one in items) for name in ("nats", *units)}
    if not all(total[unit] for unit in units):
        raise UserError(
            f"task {job.name} has no text to measure within the model's context of {width} tokens"
        )
    if not math.isfinite(total["nats"]):
        bad = next(one["id"] for one in items if not math.isfinite(one["nats"]))
        raise RuntimeError(f"task {job.name}, item {bad}: the loss is not finite")
    per = {
        unit: _ratio([one["nats"] for one in items], [one[unit] for one in items]) for unit in units
    }
    score, error = per["words" if "words" in per else "tokens"]
    more = {f"per_{unit.removesuffix('s')}": value for unit, (value, _) in per.items()}
    return dict(
        score=score,
        stderr=error,
        baseline=None,
        majority=None,
        centered=None,
        **more,
        bpb=total["nats"] / math.log(2) / total["bytes"],
        **total,
        truncated=cuts,
        items=items,
    )


KINDS: dict[str, Callable[[Job], dict]] = dict(
    generate=_generate, choice=_choice, likelihood=_likelihood, perplexity=_perplexity
)


# ---- all of it -------------------------------------------------------------------------------------------------------


def find(names, known: dict[str, Task]) -> dict[str, Task]:
    """Tasks by name, all of `known` for None; a name that ends with .jsonl is the path of a file of the user's own, and its task is
    called like the file."""
    found = {}
    for name in dict.fromkeys(map(str, known if names is None else names)):
        if name.endswith(".jsonl"):
            stem = Path(name).stem
            found[name if stem in known or stem in found else stem] = jsonl(name)
        else:
            found[name] = choose("task", name, known)
    if not found:
        raise UserError("no task was named: choose some of " + ", ".join(sorted(known)))
    return found


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
    *,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 32,
    max_tokens: int = 256,
    temperature: float = 0.0,
    samples: int = 1,
    shuffle: bool = False,
    progress: bool = True,
    known: dict[str, Task] | None = None,
    answers: Answers | None = None,
) -> dict:
    """{"tasks": {name: entry}, "skipped": {name: one line why}, "chatcore"}: a model's answers to tasks' test splits.

    names: of lib.tasks.tasks() or of `known` (such as lib.tasks.hub.make(root=...)), or paths of .jsonl files; None for all, most of
    which are downloaded once. limit: the first so many items of each; tasks keep theirs in a fixed mixed order. batch: rows at once.
    max_tokens, temperature, samples: of generated answers; with more samples than one, "pass_at" k is told too, and "correct" is the
    share that was right. A prompt longer than the context (less max_tokens, which get half a context at most) loses its oldest
    tokens, counted as "truncated". shuffle: options in an order drawn by the seed: what a model knows does not depend on it. answers:
    who is asked instead of the model. Ties share a point. "seconds" include compiling. UserError for bad arguments before anything
    runs; any error in an item stops everything and names it.
    """
    for what, value, least in (
        ("limit", limit, 1),
        ("batch", batch, 1),
        ("max_tokens", max_tokens, 1),
        ("samples", samples, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{what} must be at least {least}, got {value}")
    if temperature < 0 or (samples > 1 and temperature == 0):
        raise UserError(
            f"{samples} samples at temperature {temperature}: it must not be negative, nor 0 for more than one, "
            "or all are equal"
        )
    found = find(names, tasks() if known is None else known)
    # downloads side by side, and waiting for no network only once
    with ThreadPoolExecutor(8) as pool:
        loaded = dict(
            zip(found, pool.map(lambda task: items_or_reason(task, limit), found.values()))
        )
    skipped = {name: items for name, items in loaded.items() if isinstance(items, str)}
    for name, why in skipped.items() if progress else ():
        tqdm.write(f"{name:20} skipped: {why}")
    ask, entries = answers or model_answers(params, config, tokenizer, batch), {}
    for name, task in found.items():
        if name in skipped:
            continue
        items = [_mixed(item, seed) for item in loaded[name]] if shuffle else loaded[name]
        clock = time.perf_counter()
        with runtime.progress(
            total=len(items), desc=name, leave=False, disable=None if progress else True
        ) as bar:
            job = Job(
                name,
                task,
                items,
                ask,
                config,
                tokenizer,
                batch,
                max_tokens,
                temperature,
                samples,
                seed,
                bar,
            )
            entry = choose("kind of task", task.kind, KINDS)(job)
        seconds = time.perf_counter() - clock
        entries[name] = (
            dict(
                kind=task.kind,
                n=len(items),
                seconds=seconds,
                per_second=len(items) / seconds,
                seed=seed,
                limit=limit,
            )
            | entry
        )
        if progress:
            tqdm.write(summary(name, entries[name]))
    result = dict(tasks=entries, skipped=skipped)
    return result | ({"chatcore": score} if (score := stats.chatcore(entries)) else {})


def _mixed(item: dict, seed: int) -> dict:
    if "gold" not in item:
        return item
    order = list(range(len(item["choices"] if "choices" in item else item["letters"])))
    random.Random(f"{seed} {item['id']}").shuffle(order)
    return shuffled(item, order)


def texts_of(items: list[dict]) -> list[dict]:
    """Items of any kind as {"id", "text"} with the question and its right answer, for the count of overlaps with a training source."""

    def text(item):
        if "text" in item:
            return item["text"]
        if "choices" in item:
            context = item["context"]
            return (context[item["gold"]] if isinstance(context, list) else context) + item[
                "choices"
            ][item["gold"]]
        if "options" in item:
            return f"{item['question']} {item['options'][item['gold']]}"
        said = (m["content"] for m in item["messages"])
        return "\n".join(
            c if isinstance(c, str) else "".join(part["text"] for part in c) for c in said
        )

    return [dict(id=item["id"], text=text(item)) for item in items]


def summary(name: str, entry: dict) -> str:
    """One line about a task: score, standard error, baselines, speed."""
    error = (
        ""
        if entry["stderr"] is None
        else f" ± {entry['stderr'] * (1 if entry['kind'] == 'perplexity' else 100):.2f}"
    )
    if entry["kind"] == "perplexity":
        said = f"perplexity {entry['score']:.2f}{error}, {entry['bpb']:.4f} bits per byte"
    else:
        beside = [
            f"{what} {100 * entry[key]:.1f}"
            for what, key in (("random", "baseline"), ("majority", "majority"))
            if entry[key] is not None
        ]
        said = f"{100 * entry['score']:.2f}{error} % ({', '.join(beside)})"
    cut = f", {entry['truncated']} prompts cut" if entry["truncated"] else ""
    return f"{name:20} {said}, n {entry['n']}, {entry['per_second']:.1f}/s{cut}"


def write(folder, stage: str, record: dict) -> dict:
    """Merge a record into folder/evals/STAGE.json, whole or not at all, and return what stands there now.

    record: "step" and "checkpoint" of what was measured, and any of "tasks", "skipped", "bpb", "core", "samples" and so on. Entries of
    the same checkpoint stay unless they were measured again; those of another checkpoint go.
    """
    path = Path(folder, "evals", f"{choose('stage', stage, tuple(STAGES))}.json")
    try:
        old = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}): delete it and evaluate again") from e
    if any(old.get(key) != record.get(key) for key in ("step", "checkpoint")):
        old = {}
    merged = (
        old
        | record
        | dict(
            stage=stage,
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            device=jax.devices()[0].device_kind,
            jax=jax.__version__,
        )
    )
    for part in ("tasks", "bpb"):
        if part in old or part in record:
            merged[part] = old.get(part, {}) | record.get(part, {})
    missing = old.get("skipped", {}) | record.get("skipped", {})
    merged["skipped"] = {
        name: why for name, why in missing.items() if name not in merged.get("tasks", {})
    }
    if score := stats.chatcore(merged.get("tasks", {})):
        merged["chatcore"] = score
    write_json(path, merged)
    return merged
