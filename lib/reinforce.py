"""Reinforcement, apart from the story that 05_rl tells: a group shown, and what a model can before
and after.
"""

import dataclasses
from pathlib import Path
from typing import Any

from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.evals import questions, records, stats
from lib.evals.questions import Questions
from lib.parallel.layout import Layout, whole
from lib.tasks import tasks as lib_tasks
from lib.tasks import to_reinforce
from lib.train import checkpoint
from lib.train.policy import advantages
from lib.train.rl import Reinforcing, warnings_of
from lib.train.rollouts import Rollout
from lib.train.run import Measurement


def show_group(item: dict, group: list[Rollout], settings: Reinforcing, tokenizer: Tokenizer):
    """Print a question and all answers to it, each with its reward and advantage."""
    rewards = [rollout.reward for rollout in group]
    advantage_B = advantages(rewards, [0] * len(group), settings.policy)
    print(item["messages"][-2]["content"])
    print("reward advantage  answer")
    for rollout, advantage in zip(group, advantage_B):
        words = tokenizer.decode([token.id for token in rollout.tokens])
        print(f"{rollout.reward:6.2f} {advantage:9.2f}  {words!r}")


@dataclasses.dataclass(frozen=True)
class Examination:
    """Puts held-out questions of the task to a model, now and then in a training and around it.

    The same questions each time, each answer drawn by a seed of its own: what was compiled for the
    first time serves for all.
    """

    config: Config
    tokenizer: Tokenizer
    task: str
    limit: int
    samples: int
    max_tokens: int
    layout: Layout | None = None

    @property
    def name(self) -> str:
        """What the task is called in records: a user's file without its folder and ending, unless
        a known task is called so.
        """
        name = self.task.rpartition("/")[2].removesuffix(".gz").removesuffix(".jsonl")
        return self.task if name in lib_tasks() else name

    def answers(self, params, greedy: bool) -> dict:
        """An evaluation record: the likeliest answers, or several drawn at temperature 1."""
        asking = Questions(limit=self.limit, max_tokens=self.max_tokens, batch=64)
        if not greedy:
            asking = dataclasses.replace(asking, samples=self.samples, temperature=1.0)
        return questions.evaluate(
            whole(self.layout, params),
            self.config,
            self.tokenizer,
            None,
            asking,
            known={self.name: to_reinforce(self.task)},
            progress=False,
        )

    def passes(self, params) -> dict[str, float]:
        """pass@k of drawn answers for k up to their number, and how many greedy ones are right,
        each with its standard error over questions; "wrong" is what the best checkpoint has least
        of.
        """
        items = self.answers(params, greedy=False)["tasks"][self.name]["items"]
        right = [round(item["correct"] * self.samples) for item in items]
        numbers = {}
        for k in range(1, self.samples + 1):
            chances = [stats.pass_at_k(self.samples, count, k) for count in right]
            numbers[f"pass_{k}"], numbers[f"pass_{k}_stderr"] = stats.proportion(chances)

        greedy = self.answers(params, greedy=True)["tasks"][self.name]
        numbers |= dict(greedy=greedy["score"], greedy_stderr=greedy["stderr"])
        return numbers | dict(wrong=1 - numbers["pass_1"])

    def once_more(self, params, before: dict) -> dict:
        """{name: entry} of the other tasks that a record has, put in the same way: whether what was
        learnt has cost anything elsewhere.
        """
        tasks = {}
        known = lib_tasks()
        for name, entry in before.get("tasks", {}).items():
            if name == self.name or name not in known or entry.get("kind") == "core":
                continue
            # as long as then: another limit would cut other answers, and look like a difference
            max_tokens = entry.get("max_tokens", self.max_tokens)
            asking = Questions(
                limit=entry["limit"], seed=entry["seed"], batch=64, max_tokens=max_tokens
            )
            record = questions.evaluate(
                whole(self.layout, params),
                self.config,
                self.tokenizer,
                [name],
                asking,
                progress=False,
            )
            tasks |= record["tasks"]
        return tasks

    def measurement(self, every: int) -> Measurement:
        """Its `passes` every so many steps of a run."""
        return Measurement(self.passes, every)


def passes_told(numbers: dict[str, float]) -> str:
    """What an examination gave, in one line."""
    told = []
    for name in numbers:
        if f"{name}_stderr" in numbers:
            told.append(
                f"{name.replace('_', '@')} {numbers[name]:.3f} ± {numbers[f'{name}_stderr']:.3f}"
            )
    return "  ".join(told)


def told(step: int, numbers: dict[str, Any]) -> str:
    """One line about a step, and one for each number that has left its range."""
    line = f"{step:5}  reward {numbers['reward']:.3f}"
    for name in ("length", "signal", "entropy", "kl", "pass_1", "greedy"):
        if name in numbers:
            line += f"  {name} {numbers[name]:.3g}"
    return "\n".join([line, *(f"       ! {warning}" for warning in warnings_of(numbers))])


def shares(rows: list[dict]) -> str:
    """Where the time of a training went, in words."""
    whole = sum(row["step_time"] for row in rows)
    tools = sum(row["tools_s"] for row in rows)
    writing = sum(row["rollout_s"] for row in rows) - tools
    rest = whole - writing - tools
    parts = dict(writing=writing, tools=tools, learning=rest)
    return ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in parts.items())


def keep(folder: Path, stage: str, path, seed: int, record: dict):
    """Put an evaluation record of a checkpoint into evals/STAGE.json, beside what is known of it.

    A record of a stage before is kept only where there is one of the very same checkpoint.
    """
    place = records.place_of(folder, path)
    step = checkpoint.read_meta(path)["step"]
    if stage == "rl" or records.read_of(folder, stage, path):
        records.write(folder, stage, dict(step=step, checkpoint=place, seed=seed) | record)


def print_differences(before: dict, after: dict, names: tuple[str, str]):
    """Whether the difference between two evaluation records is more than chance."""
    print("\n".join(stats.told(stats.compare(before, after, names))))
