"""Fine-tuning and measuring, apart from the story that 04_eval_chat tells.

The phases that forms ask for, an examiner that puts the same questions to every stage, tables of
what came out, and a conversation that a notebook can hold.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lib import chat, data, evals
from lib.config import Config
from lib.data.speech import spoken
from lib.data.tokenizer import Tokenizer
from lib.evals import contamination, core, questions, records, stats
from lib.files import UserError, update_json
from lib.generate import Engine, Sampling
from lib.generate.engine import PREFILL
from lib.report.words import with_error
from lib.runs import STAGES, Model
from lib.sandbox import calculator
from lib.tasks import tasks as known_tasks
from lib.train import checkpoint
from lib.train.finetune import Phase, parse_mixture

# sources of web text: their models learn nanochat's mixtures, all others the embedded ones
WEB = ("climbmix", "fineweb_edu", "tinystories")
# A phase's rates as a share of pretraining's. In small batches, of up to so many tokens, the
# rates of pretraining would undo much of what it taught (searched, LOG.md); in large ones a phase
# has few steps.
SMALL_BATCH = 2**14
SMALL_BATCH_SHARES = {"mid": 0.25, "sft": 0.08}
SHARES = {"mid": 1.0, "sft": 0.3}

# what stands before a piece of an answer where its kind changes
BEFORE = {"python": " [", "python_output": " = ", "text": "] "}

# ---- the phases ----------------------------------------------------------------------------------


def open_phases(
    source: str, config: Config, bad_lines: str, **asked: tuple[str, float, float]
) -> list[Phase]:
    """The phases that are to be run, in their order, of a model of `source`.

    asked: stage=(mixture, epochs, share of the rates); the mixture is "none", "auto" for the one
    that goes with `source`, or words as `parse_mixture` reads them. A share of 0 stands for the one
    that goes with the batches of `config`.
    """
    kind = "nanochat" if source in WEB else "embedded"
    shares = SMALL_BATCH_SHARES if config.total_batch_size <= SMALL_BATCH else SHARES
    phases = []
    for stage, (name, epochs, lr) in asked.items():
        if name == "none":
            continue
        words = f"{kind}_{stage}" if name == "auto" else name
        phases.append(Phase(stage, parse_mixture(words), epochs, lr or shares[stage], bad_lines))
    return phases


def check_stages(folder: Path, phases: list[Phase], if_exists: str):
    """UserError where a phase would go on with a stage that was trained elsewhere.

    Asked before any phase computes: the second one would be refused after the first had run.
    """
    for phase in phases:
        path = None
        if if_exists == "continue":
            path = checkpoint.latest(folder / STAGES[phase.stage])
        if path and checkpoint.read_meta(path).get("imported"):
            raise UserError(
                f"{phase.stage} of {folder} is an imported model: pass --mid none --sft-mixture "
                "none to measure it and talk to it, or --if-exists fresh to teach it anew"
            )


def show_conversation(phase: Phase, tokenizer: Tokenizer, length: int):
    """Print a conversation of a phase, one with a tool call if there is any, as it is learnt."""
    chats = phase.chats.messages[:1000]
    if not chats:
        raise UserError(f"the mixture of {phase.stage} holds no conversation: raise its epochs")
    shown = next((chat for chat in chats if '"type": "python"' in json.dumps(chat)), chats[0])
    pairs = zip(*data.render(tokenizer, shown, length))
    print(f"{phase.stage}, a conversation of its mixture:")
    for learnt, part in itertools.groupby(pairs, key=lambda pair: pair[1]):
        words = tokenizer.decode([i for i, _ in part])
        print(f"  {'learnt ' if learnt else 'context'}  {words!r}")


# ---- measuring -----------------------------------------------------------------------------------


def token_bits(model: Model, text: str, most: int = 240) -> tuple[list[int], np.ndarray]:
    """(ids, bits of each) of the beginning of a text: what its tokens cost the model."""
    config = model.config
    ids = model.tokenizer.encode(text, bos=True)[: min(config.sequence_len, most) + 1]
    # one row of a batch in the shape of bits_per_byte's, which is compiled already
    inputs = np.zeros((config.microbatch, config.sequence_len), np.int32)
    targets = np.full_like(inputs, -1)
    inputs[0, : len(ids) - 1] = ids[:-1]
    targets[0, : len(ids) - 1] = ids[1:]
    nats = evals.token_losses(model.params, config, inputs, targets)
    return ids[1:], np.asarray(nats)[0, : len(ids) - 1] / np.log(2)


@dataclasses.dataclass
class Examiner:
    """Puts the same questions to every stage of a model, and keeps the marks.

    folder: the run's, where evals/STAGE.json goes. texts: held-out documents of `source`. names: of
    tasks, or .jsonl files. bundle: CORE's, "none" or "download" for neither. Made before any
    compute: a wrong name, file or bundle stops the run here.
    """

    folder: Path
    config: Config
    tokenizer: Tokenizer
    source: str
    texts: list[str]
    names: list[str]
    settings: questions.Questions
    bundle: str = "none"
    core_items: int = 0

    def __post_init__(self):
        self.tasks = questions.find(self.names, known_tasks()) if self.names else {}
        self.core_tasks = []
        self.core_path = None if self.bundle == "download" else self.bundle
        if self.bundle != "none":
            self.core_tasks = core.load_bundle(self.core_path, limit=self.core_items or None)[0]
        self.shared: dict[str, dict] = {}
        self.marks: dict[str, dict] = {}  # stage: {task: entry}
        self.bits: dict[str, dict] = {}  # stage: bits per byte by kind of text
        self.records: dict[str, dict] = {}  # stage: all that is known of it

    def look_for_leaks(self, trained_on: Iterable[str]):
        """See how many questions were in the text that the model was pretrained on, and say so."""
        texts = {}
        for name, task in self.tasks.items():
            items = questions.items_or_reason(task, self.settings.limit)
            if isinstance(items, list):
                texts[name] = questions.texts_of(items)
        texts |= {f"core/{task.label}": core.texts_of(task) for task in self.core_tasks}
        if not texts:
            return
        self.shared = contamination.overlap(trained_on, texts)
        met = [
            f"{name} {entry['overlapping']} of {entry['n']}"
            for name, entry in self.shared.items()
            if entry["overlapping"]
        ]
        short = sum(entry["short"] for entry in self.shared.values())
        total = sum(entry["n"] for entry in self.shared.values())
        print(
            f"seen in the pretraining text: {', '.join(met) or 'none of the questions'} "
            f"({short} of {total} are too short to tell)"
        )

    def examine(self, stage: str, path, params):
        """Put the tasks to a stage's model and measure its bits per byte, into evals/STAGE.json."""
        answers: dict[str, Any] = {"tasks": {}}
        if self.names:
            answers = questions.evaluate(
                params, self.config, self.tokenizer, self.names, self.settings
            )
        if stage == "base" and self.core_tasks:
            score = core.scorer(params, self.config, self.tokenizer)
            limit = self.core_items or None
            measured = core.evaluate(score, self.tokenizer, self.core_path, limit=limit)
            answers["core"] = measured["core"]
            answers["tasks"] |= measured["tasks"]
        for name, entry in answers["tasks"].items():
            if name in self.shared:
                leaks = self.shared[name]
                entry["contamination"] = {k: leaks[k] for k in ("overlapping", "n", "short")}

        if stage != "base" or stage not in self.bits:  # of the base model it may be known
            self.bits[stage] = evals.bits_by_kind(params, self.config, self.tokenizer, self.texts)
        self.marks[stage] = {
            name: entry for name, entry in answers["tasks"].items() if entry["kind"] != "core"
        }
        record = self.about(path) | answers | dict(bpb={self.source: self.bits[stage]})
        self.records[stage] = records.write(self.folder, stage, record)

    def about(self, path) -> dict:
        """What says whose measurements a record holds."""
        step = checkpoint.read_meta(path)["step"]
        place = records.place_of(self.folder, path)
        return dict(step=step, checkpoint=place, seed=self.settings.seed)

    @property
    def graded(self) -> dict[str, dict]:
        """{stage: {task: entry}} of what is answered rightly or wrongly."""
        return {
            stage: {name: e for name, e in entries.items() if e["kind"] != "perplexity"}
            for stage, entries in self.marks.items()
        }


def kinds_table(bits: dict) -> str:
    """Bits per byte of each kind of text, the largest first."""
    lines = [f"{'kind of text':14} {'share':>6}  bits per byte"]
    kinds = sorted(bits["kinds"].items(), key=lambda entry: -entry[1]["bytes"])
    for name, entry in kinds:
        share = entry["bytes"] / bits["bytes"]
        measured = with_error(entry["bpb"], entry["stderr"], spec=".3f")
        lines.append(f"{name:14} {share:6.1%}  {measured}")
    return "\n".join(lines)


def marks_table(examiner: Examiner) -> str:
    """Every stage's marks side by side, in % with their standard errors."""
    bits = "  ".join(f"{stage} {entry['bpb']:.4f}" for stage, entry in examiner.bits.items())
    lines = [f"bits per byte of text  {bits}"]
    graded = examiner.graded
    names = dict.fromkeys(name for entries in graded.values() for name in entries)
    if names:
        stages = "".join(f"{stage:>16}" for stage in graded)
        lines.append(f"{'% right':22}{'guessing':>9}{stages}   questions")
    for name in names:
        # a stage that could not be asked leaves its place empty
        marks = [entries.get(name) for entries in graded.values()]
        known = next(mark for mark in marks if mark)
        line = f"{name:22}{100 * (known['baseline'] or 0):9.1f}"
        for mark in marks:
            line += _percent(mark) if mark else f"{'':16}"
        lines.append(f"{line}   {known['n']}")
    return "\n".join(lines)


def _percent(mark: dict) -> str:
    return f"{100 * mark['score']:9.1f} ± {100 * (mark['stderr'] or 0):4.1f}"


def print_differences(examiner: Examiner):
    """Which differences between a stage and the one before are more than chance."""
    kept = examiner.records
    for before, after in itertools.pairwise(kept):
        compared = stats.compare(kept[before], kept[after], (before, after))
        print("\n".join(stats.told(compared)))


def write_results(examiner: Examiner, stage: str, curves: dict[str, list[dict]]):
    """Add the marks and the phases' last losses to the run's results.json."""
    results: dict[str, Any] = {"stage": stage}
    for name, entries in examiner.marks.items():
        results |= {f"{name}_{task}": entry["score"] for task, entry in entries.items()}
    for phase, rows in curves.items():
        losses = [row["val_loss"] for row in rows if "val_loss" in row]
        results[f"{phase}_val_loss"] = losses[-1]
    update_json(examiner.folder / "results.json", **results)


def task_names(asked: str, phases: list[Phase]) -> list[str]:
    """The tasks to put to a model: none, or words, among which auto stands for what the phases
    teach and all for those of the Hub too.
    """
    if asked == "none":
        return []
    taught = [
        name
        for phase in phases
        for name in phase.mixture
        if not name.endswith((".jsonl", ".jsonl.gz"))
    ]
    auto = [*taught, "code_completion"]
    groups = {"auto": auto, "all": [*auto, *known_tasks()]}
    names = [name for word in asked.split() for name in groups.get(word, [word])]
    return list(dict.fromkeys(names))


def documents_of(meta: dict) -> Iterable[str]:
    """The text that a checkpoint was trained on; UserError where it cannot be had here."""
    settings = meta.get("settings") or {}
    if "source" not in settings:
        raise UserError("its checkpoint does not say which text that was")
    return data.documents(settings["source"], "train", shards=settings.get("shards", 1))


# ---- talking -------------------------------------------------------------------------------------


class Conversation:
    """A chat with a model, printed as it is written; the calculator's work stands in brackets."""

    def __init__(self, params, config: Config, tokenizer: Tokenizer, sampling: Sampling):
        self.engine = Engine(params, config, 1, config.sequence_len, tokenizer, calculator)
        # prompts grow from turn to turn: one program for all of them
        self.engine.narrowest = min(PREFILL, config.sequence_len)
        self.tokenizer, self.config, self.sampling = tokenizer, config, sampling
        self.messages: list[dict] = []

    def say(self, words: str):
        """Say something to the model, print its answer as it comes, and keep both."""
        context = self.config.sequence_len
        asked = [*self.messages, dict(role="user", content=words)]
        ids, dropped = chat.fit(self.tokenizer, asked, context, self.sampling.max_tokens)
        if dropped:
            print(f"(the {dropped} oldest messages no longer fit, and are left out)")
        room = min(self.sampling.max_tokens, context - len(ids))
        sampling = dataclasses.replace(
            self.sampling, max_tokens=room, stop=chat.ends(self.tokenizer)
        )

        print(f"you    {words}\nmodel  ", end="")
        reader, kind = chat.Reader(self.tokenizer), "text"
        with contextlib.closing(chat.reply(self.engine, ids, sampling, reader)) as pieces:
            for piece in pieces:
                if piece.kind != kind:
                    print(BEFORE[piece.kind], end="")
                kind = piece.kind
                # what a terminal would obey is shown instead
                print(piece.text.replace("\x1b", "␛"), end="", flush=True)
        print("" if kind == "text" else "]")
        answer = dict(role="assistant", content=chat.compact(reader.parts))
        self.messages = [*asked, answer]

    @property
    def samples(self) -> list[dict]:
        """Prompts and answers, as the report card shows them."""
        pairs = zip(self.messages[::2], self.messages[1::2])
        return [
            dict(prompt=asked["content"], text=spoken(told["content"]), parts=told["content"])
            for asked, told in pairs
        ]


def keep_samples(examiner: Examiner, stage: str, path, conversation: Conversation):
    """Put what was said into the stage's record."""
    record = examiner.about(path) | dict(samples=conversation.samples)
    records.write(examiner.folder, stage, record)
