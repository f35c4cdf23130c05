"""CORE by batches against an item-at-a-time loop: items per second of both, and whether they answer alike.

python -m benchmarks.evals --items 40 --json out.json
"""

# (type, few-shot examples, options, words in a question, words in an answer): the mix of the real bundle's 22 tasks, roughly
MIX = {
    "hellaswag": ("multiple_choice", 10, 4, 40, 14),
    "hellaswag_zeroshot": ("multiple_choice", 0, 4, 40, 14),
    "jeopardy": ("language_modeling", 10, 1, 16, 2),
    "qa_wikidata": ("language_modeling", 10, 1, 8, 2),
    "arc_easy": ("multiple_choice", 10, 4, 20, 4),
    "arc_challenge": ("multiple_choice", 10, 4, 22, 5),
    "copa": ("multiple_choice", 0, 2, 8, 6),
    "commonsense_qa": ("multiple_choice", 10, 5, 14, 2),
    "piqa": ("multiple_choice", 10, 2, 10, 20),
    "openbook_qa": ("multiple_choice", 0, 4, 11, 4),
    "lambada": ("language_modeling", 0, 1, 75, 1),
    "winograd": ("schema", 0, 2, 12, 6),
    "winogrande": ("schema", 0, 2, 12, 7),
    "dyck": ("language_modeling", 10, 1, 20, 2),
    "lsat_ar": ("multiple_choice", 3, 5, 110, 12),
    "cs_algorithms": ("language_modeling", 10, 1, 25, 2),
    "operators": ("language_modeling", 10, 1, 12, 1),
    "repeat_copy": ("language_modeling", 10, 1, 12, 8),
    "squad": ("language_modeling", 10, 1, 120, 3),
    "coqa": ("language_modeling", 0, 1, 250, 3),
    "boolq": ("multiple_choice", 10, 2, 100, 1),
    "language_identification": ("multiple_choice", 10, 11, 20, 1),
}


def write_bundle(folder, items: int, words: list[str], seed: int = 0):
    """A bundle of the real one's layout and mix, of random words."""
    import json
    import random
    from pathlib import Path

    import yaml

    rng = random.Random(seed)
    say = lambda n: " ".join(rng.choices(words, k=max(1, round(n * rng.uniform(0.6, 1.4)))))
    folder, entries, rows = Path(folder), [], ["Eval Task,Random baseline"]
    (folder / "eval_data").mkdir(parents=True, exist_ok=True)
    for label, (kind, fewshot, options, question, answer) in MIX.items():
        lines = []
        for _ in range(items):
            if kind == "multiple_choice":
                item = dict(
                    query=say(question),
                    choices=[say(answer) for _ in range(options)],
                    gold=rng.randrange(options),
                )
            elif kind == "schema":
                start = say(question)
                item = dict(
                    context_options=[f"{start} {say(1)}" for _ in range(options)],
                    continuation=say(answer),
                    gold=rng.randrange(options),
                )
            else:
                item = dict(context=say(question), continuation=say(answer))
            lines.append(json.dumps(item))
        (folder / "eval_data" / f"{label}.jsonl").write_text("\n".join(lines) + "\n")
        entries.append(
            dict(
                label=label, dataset_uri=f"{label}.jsonl", num_fewshot=[fewshot], icl_task_type=kind
            )
        )
        rows.append(f"{label},{100 / options if options > 1 else 0}")
    (folder / "core.yaml").write_text(yaml.safe_dump(dict(icl_tasks=entries)))
    (folder / "eval_meta_data.csv").write_text("\n".join(rows) + "\n")


def one_at_a_time(params, config, tokenizer, longest: int):
    """requests -> scores, an item's sequences in one forward pass with all logits, padded to a power of two so that it compiles seldom."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lib import model
    from lib.evals.likelihood import Score

    @jax.jit
    def losses(params, tokens_BT):
        logits = model.forward(params, config, tokens_BT)[0]
        logprob = jax.nn.log_softmax(logits[:, :-1])
        return jnp.take_along_axis(logprob, tokens_BT[:, 1:, None], axis=-1)[..., 0], jnp.argmax(
            logits[:, :-1], axis=-1
        )

    def score(requests, counts):
        out, at = [], 0
        for count in counts:
            sequences = [
                (list(c) + list(k), len(c)) for c, ks in requests[at : at + count] for k in ks
            ]
            sequences = [
                (ids[-longest:], max(0, len(ids) - longest), start - max(0, len(ids) - longest))
                for ids, start in sequences
            ]
            width = max(32, 1 << (max(len(ids) for ids, *_ in sequences) - 1).bit_length())
            tokens = np.zeros((len(sequences), width), np.int32)
            for row, (ids, *_) in zip(tokens, sequences):
                row[: len(ids)] = ids
            logprob, best = map(np.asarray, losses(params, tokens))
            for row, lp, b, (ids, cut, start) in zip(tokens, logprob, best, sequences):
                span = slice(start - 1, len(ids) - 1)
                out.append(
                    [
                        Score(
                            float(lp[span].sum()),
                            len(ids) - start,
                            bool((b[span] == row[1:][span]).all()),
                            cut,
                        )
                    ]
                )
            at += count
        return out

    return score


def main(
    items: int = 40,
    sequence_len: int = 1024,
    n_layer: int = 4,
    n_embd: int = 128,
    vocab_size: int = 4096,
    only: tuple[str, ...] = (),
    json: str = "",
) -> dict:
    """Evaluate a random model on a made-up bundle of CORE's mix both ways; each runs twice and the second run counts.

    Args:
        items: per task
        sequence_len: context of the model in tokens; longer prompts lose their beginning
        n_layer: of the model
        n_embd: of the model
        vocab_size: of the tokenizer, trained on the standard library
        only: tasks to run, all of them when empty
        json: file to write the figures to
    """
    import re
    import tempfile
    import time

    import jax

    from lib import data, model
    from lib.config import Config
    from lib.data.tokenizer import Tokenizer
    from lib.evals import core
    from lib.files import write_json

    config = Config(
        vocab_size=vocab_size,
        sequence_len=sequence_len,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=max(1, n_embd // 64),
        n_kv_head=max(1, n_embd // 64),
        head_dim=64,
        mlp_dim=4 * n_embd,
        microbatch=1,
        total_batch_size=sequence_len,
    )
    params = model.init_params(jax.random.key(0), config)
    noise = lambda i, p: p + 0.02 * jax.random.normal(jax.random.key(i), p.shape)
    leaves, tree = jax.tree.flatten(params)
    # projections begin at zero: let all count
    params = jax.tree.unflatten(tree, [noise(i, p) for i, p in enumerate(leaves)])
    texts = data.head(data.documents("stdlib", "val"), 500_000)
    tokenizer = Tokenizer.train(texts, vocab_size)
    words = re.findall(r"[a-z]{2,12}", " ".join(texts))[:20_000]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(folder, items, words)
        tasks, _ = core.load_bundle(folder)
        clock = time.perf_counter()
        prepared = [
            core.prepare(tokenizer, task) for task in tasks if not only or task.label in only
        ]
        rendering = time.perf_counter() - clock
    batched, loop = (
        core.scorer(params, config, tokenizer),
        one_at_a_time(params, config, tokenizer, sequence_len),
    )
    total, cpu = {"batched": [0.0, 0.0], "loop": [0.0, 0.0]}, {"batched": 0.0, "loop": 0.0}
    for p in prepared:
        counts = [count for _, count in p.spans]
        ways = {"batched": batched, "loop": lambda requests: loop(requests, counts)}
        seconds, used, decisions = {}, {}, {}
        for name, score in ways.items():
            for run in range(2):
                clock, busy = time.perf_counter(), time.process_time()
                scores = score(p.requests)
                seconds[name], used[name] = time.perf_counter() - clock, time.process_time() - busy
                total[name][run] += seconds[name]
            cpu[name] += used[name]
            decisions[name] = [item["correct"] for item in core.decide(p, scores)["items"]]
        longest = max(len(c) + len(k) for c, ks in p.requests for k in ks)
        agree = sum(a == b for a, b in zip(*decisions.values()))
        n = len(p.spans)
        rows[p.task.label] = dict(
            kind=p.task.kind,
            fewshot=p.task.fewshot,
            longest=longest,
            items=n,
            same=agree,
            batched_per_s=n / seconds["batched"],
            loop_per_s=n / seconds["loop"],
            speed_up=seconds["loop"] / seconds["batched"],
            cpu_speed_up=used["loop"] / used["batched"],
        )
        print(
            f"{p.task.label:24} {p.task.kind:18} longest {longest:5}  {n / seconds['loop']:8.1f} -> {n / seconds['batched']:8.1f} items/s"
            f"  {rows[p.task.label]['speed_up']:5.1f}x ({rows[p.task.label]['cpu_speed_up']:.1f}x in CPU time)  same {agree}/{n}"
        )
    n = sum(len(p.spans) for p in prepared)
    out = dict(
        device=jax.devices()[0].device_kind,
        items=n,
        rendering_seconds=rendering,
        tasks=rows,
        batched_per_s=n / total["batched"][1],
        loop_per_s=n / total["loop"][1],
        speed_up=total["loop"][1] / total["batched"][1],
        cpu_seconds=cpu,
        cpu_speed_up=cpu["loop"] / cpu["batched"],
        first_run_seconds={name: t[0] for name, t in total.items()},
    )
    print(
        f"all {n} items: {out['loop_per_s']:.1f} -> {out['batched_per_s']:.1f} items/s, {out['speed_up']:.1f}x "
        f"({out['cpu_speed_up']:.1f}x in CPU time); first runs, compiling, {total['loop'][0]:.0f} s and {total['batched'][0]:.0f} s; "
        f"rendering {rendering:.2f} s"
    )
    if json:
        write_json(json, out)
    return out


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
