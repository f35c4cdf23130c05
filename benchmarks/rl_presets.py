"""Ways of reinforcing at equal rollouts: `python -m benchmarks.rl_presets --help`.

Every way begins at the same fine-tuned model and is given the same number of rollouts, a step that
teaches nothing included. Afterwards it answers held-out questions, drawn and greedily. Several
processes may share a folder: each takes what no other is at. The last to end has the whole table.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from lib.train.policy import PRESETS


class Way(NamedTuple):
    """A preset, an optimizer, its share of pretraining's rates, whether the end token is learnt."""

    preset: str
    optimizer: str = "muon"
    lr: float = 0.1
    end: bool = True


WAYS = {preset: Way(preset) for preset in PRESETS}
WAYS |= {
    "no_end": Way("reinforce", end=False),
    "muon_0.2": Way("reinforce", lr=0.2),
    "adamw_0.1": Way("reinforce", "adamw", 0.1),
    "adamw_0.2": Way("reinforce", "adamw", 0.2),
    "adamw_0.4": Way("reinforce", "adamw", 0.4),
    "adamw_0.8": Way("reinforce", "adamw", 0.8),
}


@dataclass
class Args:
    run: str
    """A run whose sft stage all begin with"""
    out: str
    """Folder for the results, one file each; what is there already is not done again"""
    ways: tuple[str, ...] = tuple(WAYS)
    """Names of WAYS"""
    seeds: int = 3
    """Runs of each"""
    steps: int = 60
    """Steps of 8 questions with 8 answers each"""
    items: int = 128
    """Held-out questions"""
    task: str = "arithmetic_beyond"
    """What is reinforced and asked"""


def reinforced(base, way: Way, seed: int, args: Args):
    """The parameters after the steps."""
    from lib.train import rl
    from lib.train.rollouts import Seconds

    settings = rl.Reinforcing(
        args.task,
        preset=way.preset,
        num_steps=args.steps,
        lr=way.lr,
        optimizer=way.optimizer,
        seed=seed,
    )
    # the run's own loop skips what teaches nothing, so here its parts are called one by one
    with tempfile.TemporaryDirectory() as folder:
        training = rl.Reinforcement(settings, base, folder)
    state = training.begin()
    for step in range(args.steps):
        asked = step * settings.questions
        groups = [answers for _, answers in training.ask(state.params, asked, Seconds())]
        # what counts as forced isn't learnt
        if not way.end:
            groups = [[without_end(answer) for answer in answers] for answers in groups]
        parts = training.parts(groups)
        # nothing to learn where all answers to each question were worth the same
        if parts:
            state, _ = training.step(state, *parts)
    return state.params


def without_end(answer):
    """The rollout as if its end token had not been its own choice."""
    if answer.finish != "stop":
        return answer
    *before, last = answer.tokens
    return answer._replace(tokens=[*before, last._replace(forced=True)])


def answered(base, params, args: Args) -> dict:
    """{"drawn": share right of 8 answers, "greedy": right or not}, question by question."""
    from lib.evals import questions
    from lib.tasks import to_reinforce

    result = {}
    for name, samples, temperature in (("drawn", 8, 1.0), ("greedy", 1, 0.0)):
        asking = questions.Questions(
            limit=args.items,
            max_tokens=64,
            batch=64,
            samples=samples,
            temperature=temperature,
        )
        known = {args.task: to_reinforce(args.task)}
        record = questions.evaluate(
            params, base.config, base.tokenizer, None, asking, known=known, progress=False
        )
        result[name] = [item["correct"] for item in record["tasks"][args.task]["items"]]
    return result


def table(folder: Path, ways):
    """Prints each way's means and how far above the first it is, with 95 % intervals."""
    from lib.evals import stats

    measures = {
        "pass@1": lambda result: np.array(result["drawn"]),
        "pass@8": lambda result: (np.array(result["drawn"]) > 0).astype(float),
        "greedy": lambda result: np.array(result["greedy"]),
    }
    first = {}
    for name in ("before", *ways):
        results = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-*.json"))]
        line = f"{name:10} {len(results)} runs"
        for measure, of in measures.items():
            if not results:
                continue
            scores = np.mean([of(result) for result in results], axis=0)
            line += f"  {measure} {scores.mean():.3f}"
            if name == "before":
                continue
            # question by question against the first
            apart = scores - first.setdefault(measure, scores)
            sure = stats.SURE * apart.std(ddof=1) / len(apart) ** 0.5
            line += f" ({apart.mean():+.3f} ± {sure:.3f}, p {stats.sign_flips(apart):.4f})"
        print(line)


def main(args: Args):
    from lib.files import choose, write_json
    from lib.locks import open_lock, take
    from lib.runs import load_model
    from lib.train.finetune import Base

    ways = {name: choose("way", name, WAYS) for name in args.ways}
    start = load_model(Path(args.run), stage="sft")
    base = Base(start.params, start.config, start.tokenizer, "")
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [("before", 0)]
    for seed in range(args.seeds):
        jobs += [(name, seed) for name in args.ways]

    for name, seed in jobs:
        # the lock goes with its process, so that what was cut off is done again
        path = folder / f"{name}-{seed}.json"
        with open_lock(path.with_suffix(".lock")) as lock:
            if take(lock, wait=False) is False or path.exists():
                continue
            params = base.params
            if name != "before":
                params = reinforced(base, ways[name], seed, args)
            result = answered(base, params, args)
            write_json(path, result)
        shares = {measure: round(float(np.mean(right)), 3) for measure, right in result.items()}
        print(name, seed, shares, flush=True)
    table(folder, args.ways)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
