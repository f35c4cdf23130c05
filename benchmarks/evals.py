"""CORE by batches against an item-at-a-time loop: items per second, and whether they agree. With
--run the tasks of a trained model: tokens per second beside those of a plain forward.

python -m benchmarks.evals --items 40 --json out.json
python -m benchmarks.evals --run speedrun
"""

import json
import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from lib import data
from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.evals import core, questions
from lib.evals.bits import bits_by_kind, token_losses
from lib.evals.likelihood import Score
from lib.files import write_json
from lib.generate import engine
from lib.model import forward, init_params
from lib.runs import load_model
from lib.runtime import keep_memory
from lib.tasks import embedded


class Mix(NamedTuple):
    """What a task of the bundle is like. question, answer: words in each."""

    kind: str
    fewshot: int
    options: int
    question: int
    answer: int


CHOICE, LANGUAGE, SCHEMA = "multiple_choice", "language_modeling", "schema"
# The mix of the real bundle's 22 tasks, roughly.
MIX = {
    "hellaswag": Mix(CHOICE, 10, 4, 40, 14),
    "hellaswag_zeroshot": Mix(CHOICE, 0, 4, 40, 14),
    "jeopardy": Mix(LANGUAGE, 10, 1, 16, 2),
    "qa_wikidata": Mix(LANGUAGE, 10, 1, 8, 2),
    "arc_easy": Mix(CHOICE, 10, 4, 20, 4),
    "arc_challenge": Mix(CHOICE, 10, 4, 22, 5),
    "copa": Mix(CHOICE, 0, 2, 8, 6),
    "commonsense_qa": Mix(CHOICE, 10, 5, 14, 2),
    "piqa": Mix(CHOICE, 10, 2, 10, 20),
    "openbook_qa": Mix(CHOICE, 0, 4, 11, 4),
    "lambada": Mix(LANGUAGE, 0, 1, 75, 1),
    "winograd": Mix(SCHEMA, 0, 2, 12, 6),
    "winogrande": Mix(SCHEMA, 0, 2, 12, 7),
    "dyck": Mix(LANGUAGE, 10, 1, 20, 2),
    "lsat_ar": Mix(CHOICE, 3, 5, 110, 12),
    "cs_algorithms": Mix(LANGUAGE, 10, 1, 25, 2),
    "operators": Mix(LANGUAGE, 10, 1, 12, 1),
    "repeat_copy": Mix(LANGUAGE, 10, 1, 12, 8),
    "squad": Mix(LANGUAGE, 10, 1, 120, 3),
    "coqa": Mix(LANGUAGE, 0, 1, 250, 3),
    "boolq": Mix(CHOICE, 10, 2, 100, 1),
    "language_identification": Mix(CHOICE, 10, 11, 20, 1),
}


# ---- a bundle and a model to measure


def made_up_item(mix: Mix, say: Callable[[int], str], rng: random.Random) -> dict:
    """An item of random words."""
    if mix.kind == CHOICE:
        query = say(mix.question)
        choices = [say(mix.answer) for _ in range(mix.options)]
        return dict(query=query, choices=choices, gold=rng.randrange(mix.options))
    if mix.kind == SCHEMA:
        start = say(mix.question)
        contexts = [f"{start} {say(1)}" for _ in range(mix.options)]
        gold = rng.randrange(mix.options)
        return dict(context_options=contexts, continuation=say(mix.answer), gold=gold)
    return dict(context=say(mix.question), continuation=say(mix.answer))


def write_bundle(folder, items: int, words: list[str], seed: int = 0) -> None:
    """A bundle of the real one's layout and mix, of random words."""
    rng = random.Random(seed)

    def say(n: int) -> str:
        return " ".join(rng.choices(words, k=max(1, round(n * rng.uniform(0.6, 1.4)))))

    folder = Path(folder)
    (folder / core.DATA).mkdir(parents=True, exist_ok=True)
    entries, baselines = [], ["Eval Task,Random baseline"]
    for label, mix in MIX.items():
        lines = [json.dumps(made_up_item(mix, say, rng)) for _ in range(items)]
        (folder / core.DATA / f"{label}.jsonl").write_text("\n".join(lines) + "\n")
        entries.append(
            dict(
                label=label,
                dataset_uri=f"{label}.jsonl",
                num_fewshot=[mix.fewshot],
                icl_task_type=mix.kind,
            )
        )
        baselines.append(f"{label},{100 / mix.options if mix.options > 1 else 0}")
    (folder / core.CONFIG).write_text(yaml.safe_dump(dict(icl_tasks=entries)))
    (folder / core.BASELINES).write_text("\n".join(baselines) + "\n")


def random_model(sequence_len: int, n_layer: int, n_embd: int, vocab_size: int):
    """(config, params) of a model with random weights, none of them zero."""
    heads = max(1, n_embd // 64)
    config = Config(
        vocab_size=vocab_size,
        sequence_len=sequence_len,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=heads,
        n_kv_head=heads,
        head_dim=64,
        mlp_dim=4 * n_embd,
        microbatch=1,
        total_batch_size=sequence_len,
    )
    leaves, tree = jax.tree.flatten(init_params(jax.random.key(0), config))
    # projections begin at zero: let all count
    noisy = []
    for i, leaf in enumerate(leaves):
        noisy.append(leaf + 0.02 * jax.random.normal(jax.random.key(i), leaf.shape))
    return config, jax.tree.unflatten(tree, noisy)


# ---- the plain way


def one_at_a_time(params, config: Config, longest: int) -> Callable:
    """(requests, how many each item has) -> scores, with one forward pass for each item.

    It makes all logits, and pads to a power of two so that it compiles seldom.
    """

    @jax.jit
    def losses(params, tokens_BT):
        logits_BTV = forward(params, config, tokens_BT)[0][:, :-1]
        logprob_BTV = jax.nn.log_softmax(logits_BTV)
        targets = tokens_BT[:, 1:, None]
        logprob_BT = jnp.take_along_axis(logprob_BTV, targets, axis=-1)[..., 0]
        return logprob_BT, jnp.argmax(logits_BTV, axis=-1)

    def score_item(requests) -> list[list[Score]]:
        sequences = [(list(c) + list(k), len(c)) for c, ks in requests for k in ks]
        width = max(32, 1 << (max(min(len(ids), longest) for ids, _ in sequences) - 1).bit_length())
        tokens = np.zeros((len(sequences), width), np.int32)
        for row, (ids, _) in zip(tokens, sequences):
            kept = ids[-longest:]
            row[: len(kept)] = kept
        logprob, best = map(np.asarray, losses(params, tokens))
        scores = []
        for i, (ids, start) in enumerate(sequences):
            cut = max(0, len(ids) - longest)
            span = slice(start - cut - 1, len(ids) - cut - 1)
            greedy = bool((best[i, span] == tokens[i, 1:][span]).all())
            scores.append([Score(float(logprob[i, span].sum()), len(ids) - start, greedy, cut)])
        return scores

    def score(requests, counts: list[int]) -> list[list[Score]]:
        scores, start = [], 0
        for count in counts:
            scores += score_item(requests[start : start + count])
            start += count
        return scores

    return score


# ---- both, side by side


class Timing(NamedTuple):
    """One way on one task. first and seconds: of the first run, which compiles, and the second."""

    first: float
    seconds: float
    cpu: float
    decisions: list[int]


def timed(prepared: core.Prepared, score: Callable) -> Timing:
    """Score a task twice; the second run counts."""
    runs = []
    for _ in range(2):
        clock, busy = time.perf_counter(), time.process_time()
        scores = score(prepared.requests)
        runs.append((time.perf_counter() - clock, time.process_time() - busy))
    decisions = [item["correct"] for item in core.decide(prepared, scores)["items"]]
    return Timing(runs[0][0], *runs[1], decisions)


def compared(prepared: core.Prepared, batched: Timing, loop: Timing) -> dict:
    """The line of the table for a task."""
    n = len(prepared.spans)
    return dict(
        kind=prepared.task.kind,
        fewshot=prepared.task.fewshot,
        longest=max(len(c) + len(k) for c, ks in prepared.requests for k in ks),
        items=n,
        same=sum(a == b for a, b in zip(batched.decisions, loop.decisions)),
        batched_per_s=n / batched.seconds,
        loop_per_s=n / loop.seconds,
        speed_up=loop.seconds / batched.seconds,
        cpu_speed_up=loop.cpu / batched.cpu,
    )


def shown(label: str, row: dict) -> str:
    """A task's line in words."""
    return (
        f"{label:24} {row['kind']:18} longest {row['longest']:5}  "
        f"{row['loop_per_s']:8.1f} -> {row['batched_per_s']:8.1f} items/s  "
        f"{row['speed_up']:5.1f}x ({row['cpu_speed_up']:.1f}x in CPU time)  "
        f"same {row['same']}/{row['items']}"
    )


def total(n: int, batched: list[Timing], loop: list[Timing]) -> dict:
    """The figures over all tasks."""
    seconds = {"batched": batched, "loop": loop}
    cpu = {name: sum(t.cpu for t in timings) for name, timings in seconds.items()}
    first = {name: sum(t.first for t in timings) for name, timings in seconds.items()}
    second = {name: sum(t.seconds for t in timings) for name, timings in seconds.items()}
    return dict(
        device=jax.devices()[0].device_kind,
        items=n,
        batched_per_s=n / second["batched"],
        loop_per_s=n / second["loop"],
        speed_up=second["loop"] / second["batched"],
        cpu_seconds=cpu,
        cpu_speed_up=cpu["loop"] / cpu["batched"],
        first_run_seconds=first,
    )


# ---- the tasks of a trained model


class Counted:
    """A model's answers (`questions.ModelAnswers`), with the tokens that went through it."""

    def __init__(self, answers: questions.ModelAnswers):
        self.tokens = 0

        def texts(prompts, samplings):
            self.tokens += sum(map(len, prompts))
            for i, ids in answers.texts(prompts, samplings):
                self.tokens += len(ids or [])
                yield i, ids

        def next_logprobs(prompts):
            self.tokens += sum(map(len, prompts))
            return answers.next_logprobs(prompts)

        def continuations(requests, **options):
            requests = list(requests)
            for context, choices in requests:
                self.tokens += sum(len(context) + len(choice) for choice in choices)
            return answers.continuations(requests, **options)

        def losses(rows):
            self.tokens += sum(len(inputs) for inputs, _ in rows)
            return answers.losses(rows)

        self.answers = questions.ModelAnswers(next_logprobs, continuations, losses, texts)


def forward_speed(params, config: Config, rows: int) -> float:
    """Tokens a second of losses alone, the best of five."""
    shape = rows, config.sequence_len
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    times = []
    for _ in range(6):
        clock = time.perf_counter()
        token_losses(params, config, tokens, tokens).block_until_ready()
        times.append(time.perf_counter() - clock)
    return tokens.size / min(times)


def of_run(run: str, items: int, repeats: int = 3) -> dict:
    """Each embedded task's tokens a second beside a forward's; what is written, by one engine and
    by as many as the device takes, in turns.
    """
    loaded = load_model(Path(run) if "/" in run else Path("runs") / run)
    params, config, tokenizer = loaded.params, loaded.config, loaded.tokenizer
    settings = questions.Questions(limit=items, batch=64, max_tokens=config.sequence_len // 2)
    plain = forward_speed(params, config, 64)
    print(f"{'a forward of 64 rows':24} {plain:10,.0f} tokens/s")

    texts = list(data.head(data.documents("stdlib", "val"), 500_000))
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    for _ in range(2):
        clock = time.perf_counter()
        bits_by_kind(params, config, tokenizer, texts)
        speed = tokens / (time.perf_counter() - clock)
    print(
        f"{'bits per byte by kind':24} {speed:10,.0f} tokens/s  {speed / plain:6.1%} of a forward's"
    )

    ways = {"": engine.SIDES, ", one engine": 1}
    rows = {}
    for name, task in embedded.TASKS.items():
        asked = ways if task.kind == "generate" else {"": engine.SIDES}
        best = {}
        # the first round compiles
        for _ in range(repeats + 1):
            for way, sides in asked.items():
                engine.SIDES = sides
                counted = Counted(questions.model_answers(params, config, tokenizer, 64))
                entry = questions.evaluate(
                    params,
                    config,
                    tokenizer,
                    [name],
                    settings,
                    answers=counted.answers,
                    progress=False,
                )["tasks"][name]
                speed = counted.tokens / entry["seconds"]
                best.setdefault(way, []).append(speed)
        engine.SIDES = ways[""]
        for way, speeds in best.items():
            speed = max(speeds[1:])
            rows[name + way] = dict(tokens_per_s=speed, of_forward=speed / plain)
            print(f"{name + way:24} {speed:10,.0f} tokens/s  {speed / plain:6.1%} of a forward's")
    return dict(device=jax.devices()[0].device_kind, forward_tokens_per_s=plain, tasks=rows)


def main(
    items: int = 40,
    sequence_len: int = 1024,
    n_layer: int = 4,
    n_embd: int = 128,
    vocab_size: int = 4096,
    only: tuple[str, ...] = (),
    run: str = "",
    json: str = "",
) -> dict:
    """Evaluate a random model on a made-up bundle of CORE's mix both ways, or a run's on its tasks.

    Each runs twice and the second run counts.

    Args:
        items: per task
        sequence_len: context of the model in tokens; longer prompts lose their beginning
        n_layer: of the model
        n_embd: of the model
        vocab_size: of the tokenizer, trained on the standard library
        only: tasks to run, all of them when empty
        run: the newest model of this run, put the embedded tasks
        json: file to write the figures to
    """
    if run:
        figures = of_run(run, items)
        if json:
            write_json(json, figures)
        return figures
    config, params = random_model(sequence_len, n_layer, n_embd, vocab_size)
    texts = data.head(data.documents("stdlib", "val"), 500_000)
    tokenizer = Tokenizer.train(texts, vocab_size)
    words = re.findall(r"[a-z]{2,12}", " ".join(texts))[:20_000]
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(folder, items, words)
        tasks, _ = core.load_bundle(folder)
    tasks = [task for task in tasks if not only or task.label in only]

    clock = time.perf_counter()
    prepared = [core.prepare(tokenizer, task) for task in tasks]
    rendering = time.perf_counter() - clock

    score_batched = core.scorer(params, config, tokenizer)
    score_one = one_at_a_time(params, config, sequence_len)
    rows, batched, loop = {}, [], []
    for p in prepared:
        counts = [count for _, count in p.spans]
        batched.append(timed(p, score_batched))
        loop.append(timed(p, lambda requests, counts=counts: score_one(requests, counts)))
        rows[p.task.label] = compared(p, batched[-1], loop[-1])
        print(shown(p.task.label, rows[p.task.label]))

    n = sum(len(p.spans) for p in prepared)
    figures = total(n, batched, loop) | dict(tasks=rows, rendering_seconds=rendering)
    first = figures["first_run_seconds"]
    print(
        f"all {n} items: {figures['loop_per_s']:.1f} -> {figures['batched_per_s']:.1f} items/s, "
        f"{figures['speed_up']:.1f}x ({figures['cpu_speed_up']:.1f}x in CPU time); first runs, "
        f"compiling, {first['loop']:.0f} s and {first['batched']:.0f} s; "
        f"rendering {rendering:.2f} s"
    )
    if json:
        write_json(json, figures)
    return figures


if __name__ == "__main__":
    import tyro

    keep_memory()
    tyro.cli(main)
