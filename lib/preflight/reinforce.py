"""Does reinforcement fit, and where does its time go: writing answers, or learning from them.

A step of it does three things on the same chip. Answers are written a token at a time by all rows
at once, which reads all weights for each token (the decoding that was compiled, or its least
traffic from shapes). The frozen reference reads the answers once. The learner is a training step
over the same tokens. What is held through all of it are parameters, moments and the reference; the
peak is in the learner, or while caches stand beside the weights as decoding holds them.
"""

import dataclasses
from typing import Any

from lib.chips import Chip, tpu_slice
from lib.config import Config
from lib.params import count_params
from lib.preflight.cache import has_libtpu
from lib.preflight.compile import as_compiled, for_tpu, inspect
from lib.preflight.estimate import GIB, Report, estimate

# a forward pass is a third of a training step
FORWARD = 1 / 3


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The shape of a step: questions, answers to each, tokens of a prompt and of an answer."""

    questions: int = 8
    samples: int = 16
    prompt: int = 128
    max_tokens: int = 256

    @property
    def rows(self) -> int:
        return self.questions * self.samples

    @property
    def tokens(self) -> int:
        """What the learner reads, where every answer is as long as it may be."""
        return self.rows * (self.prompt + self.max_tokens)


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes at the peak of both halves of a step, and the least seconds of each part."""

    learner_bytes: int
    rollout_bytes: int
    available: int
    rollout: float
    reference: float
    learner: float
    source: str

    @property
    def peak(self) -> int:
        return max(self.learner_bytes, self.rollout_bytes)

    @property
    def fits(self) -> bool:
        return self.peak <= self.available

    @property
    def seconds(self) -> float:
        return self.rollout + self.reference + self.learner

    def shares(self) -> dict[str, float]:
        """Of the least time, by part."""
        parts = dict(rollout=self.rollout, reference=self.reference, learner=self.learner)
        return {name: seconds / self.seconds for name, seconds in parts.items()}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | dict(
            peak=self.peak, fits=self.fits, seconds=self.seconds, shares=self.shares()
        )


def cache_bytes(config: Config, rows: int, length: int) -> int:
    """Keys and values of so many rows, in the compute dtype."""
    per_token = 2 * config.n_kv_head * config.head_dim * config.n_layer
    return rows * length * per_token * config.dtype.itemsize


def needs(config: Config, name: str, rounds: Rounds, compiling: bool = True) -> Needs:
    """What a step of reinforcement needs on the slice `name`, one chip of it.

    compiling: the learner's step and the decoding of a token by libtpu, where that is installed,
    else both from shapes.
    """
    where = tpu_slice(name)
    length = rounds.prompt + rounds.max_tokens
    # the learner's rows are as long as prompt and answer, not as what it was pretrained on
    rows = min(config.microbatch, rounds.rows)
    config = config.replace(microbatch=rows, sequence_len=length, total_batch_size=rows * length)
    compiling = compiling and has_libtpu()
    config = as_compiled(config) if compiling else for_tpu(config)
    if compiling:
        report = inspect(config, name, decode=rounds.rows)
    else:
        report = estimate(config, where)

    parameters = report.memory["parameters"]
    held = parameters + report.memory["optimizer"] + parameters
    decoding, bytes_read = _decoding(config, report, rounds, length)
    per_token = _token_seconds(config, report, where.chip, rounds.rows, bytes_read)
    passes = rounds.tokens / report.tokens_per_s
    return Needs(
        learner_bytes=report.peak + parameters,
        rollout_bytes=held + decoding,
        available=report.available,
        rollout=per_token * rounds.max_tokens,
        reference=FORWARD * passes,
        learner=passes,
        source=report.source,
    )


def _decoding(config: Config, report: Report, rounds: Rounds, length: int) -> tuple[int, int]:
    """(bytes that decoding holds, bytes that it reads for a token of every row)."""
    if report.decode and report.decode["fits"]:
        return report.decode["peak"], report.decode["bytes"]
    # weights in the compute dtype, but for tables of which a row is looked up; half-full caches
    weights = report.memory["parameters"] // 4 * config.dtype.itemsize
    looked_up = count_params(config).get("embed", 0) * config.dtype.itemsize
    cache = cache_bytes(config, rounds.rows, length)
    return weights + cache, weights - looked_up + cache // 2


def _token_seconds(config: Config, report: Report, chip: Chip, rows: int, bytes_read: int) -> float:
    """The least time of one token for every row: reading, or computing."""
    if report.decode and report.decode["fits"]:
        return report.decode["seconds"]
    flops = FORWARD * config.flops_per_token * rows
    return max(bytes_read / chip.bandwidth, flops / chip.flops)


# ---- for people ----------------------------------------------------------------------------------

GROUPS = (8, 16, 32)


def needs_text(needs: Needs, rounds: Rounds) -> str:
    """What a step needs, as lines of text."""
    shares = "  ".join(f"{name} {share:.0%}" for name, share in needs.shares().items())
    room = needs.available / GIB
    verdict = "yes" if needs.fits else "NO"
    return "\n".join(
        [
            f"step        {rounds.questions} questions x {rounds.samples} answers of "
            f"{rounds.max_tokens} tokens, behind prompts of {rounds.prompt}",
            f"source      {needs.source}",
            f"memory      learner {needs.learner_bytes / GIB:.2f}  rollout "
            f"{needs.rollout_bytes / GIB:.2f}  of {room:.2f} GiB",
            f"fits        {verdict}",
            f"at best     {needs.seconds:.2f} s a step: {shares}",
        ]
    )


def group_table(name: str, depths: tuple[int, ...], rounds: Rounds) -> str:
    """Which depth and group size fit on one chip, from shapes, as Markdown: GiB and the share of
    the time that writing takes.
    """
    heads = [f"{samples} answers" for samples in GROUPS]
    lines = [f"| depth | {' | '.join(heads)} |", "|---" * (len(GROUPS) + 1) + "|"]
    for depth in depths:
        cells = []
        for samples in GROUPS:
            config = Config.from_depth(depth, microbatch=4, remat="dots")
            asked = dataclasses.replace(rounds, samples=samples)
            step = needs(config, name, asked, compiling=False)
            text = f"{step.peak / GIB:.1f}"
            text = text if step.fits else f"~~{text}~~"
            cells.append(f"{text}, {step.shares()['rollout']:.0%}")
        lines.append(f"| {depth} | {' | '.join(cells)} |")
    return "\n".join(lines)
