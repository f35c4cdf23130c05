"""Reinforcement, apart from the story that 05_rl tells: a group shown, and what a model can before
and after.
"""

import dataclasses
from typing import Any

from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.evals import questions, stats
from lib.evals.questions import Questions
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
    """Puts held-out questions of the task to a model, now and then in a training and around it."""

    config: Config
    tokenizer: Tokenizer
    task: str
    limit: int
    samples: int
    max_tokens: int

    def answers(self, params, greedy: bool) -> dict:
        """An evaluation record: the likeliest answers, or several drawn at temperature 1."""
        asking = Questions(limit=self.limit, max_tokens=self.max_tokens, batch=64)
        if not greedy:
            asking = dataclasses.replace(asking, samples=self.samples, temperature=1.0)
        return questions.evaluate(
            params, self.config, self.tokenizer, [self.task], asking, progress=False
        )

    def passes(self, params) -> dict[str, float]:
        """pass@1 and pass@k of drawn answers; "wrong" is what the best checkpoint has least of."""
        entry = self.answers(params, greedy=False)["tasks"][self.task]
        most = str(self.samples)
        return {
            "pass_1": entry["score"],
            f"pass_{most}": entry["pass_at"][most]["score"],
            "wrong": 1 - entry["score"],
        }

    def measurement(self, every: int) -> Measurement:
        """Its `passes` every so many steps of a run."""
        return Measurement(self.passes, every)


def told(step: int, numbers: dict[str, Any]) -> str:
    """One line about a step, and one for each number that has left its range."""
    line = f"{step:5}  reward {numbers['reward']:.3f}"
    for name in ("length", "signal", "entropy", "kl", "pass_1"):
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


def print_differences(before: dict, after: dict, names: tuple[str, str]):
    """Whether the difference between two evaluation records is more than chance."""
    print("\n".join(stats.told(stats.compare(before, after, names))))
