"""What a run folder holds for its report, read and checked; and in one sentence what came of it.

Nothing is computed anew and nothing is guessed: what a run has not recorded is left out or said to
be missing, and figures of another training that are still in the folder are not shown as this
one's.
"""

import datetime
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from lib.evals import stats
from lib.files import UserError, read_json
from lib.report.words import is_share, percent, short
from lib.runs import STAGES, read_results
from lib.train.metrics import read_jsonl

# Published elsewhere, to see one's own figures beside:
# (system, where it stands, {metric: {stage: score from 0 to 1}})
REFERENCES = [
    (
        "GPT-2 1.6B",
        "nanochat README, leaderboard (OpenAI's original checkpoint)",
        {"CORE": {"base": 0.2565}},
    ),
    (
        "nanochat d20, 8×H100, 3h51m",
        "nanochat README of 2025-10-13, table of the $100 run",
        {
            "CORE": {"base": 0.2219},
            "ARC-Challenge": {"mid": 0.2875, "sft": 0.2807},
            "ARC-Easy": {"mid": 0.3561, "sft": 0.3876},
            "GSM8K": {"mid": 0.0250, "sft": 0.0455, "rl": 0.0758},
            "HumanEval": {"mid": 0.0671, "sft": 0.0854},
            "MMLU": {"mid": 0.3111, "sft": 0.3151},
            "ChatCORE": {"mid": 0.0730, "sft": 0.0884},
        },
    ),
    (
        "nanochat d24, 8×H100, 1.65 h",
        "nanochat README, leaderboard of 2026-03-14",
        {"CORE": {"base": 0.2626}},
    ),
    ("nanochat-jax d24, v6e-8, 7.3 h", "published by tucan9389", {"CORE": {"base": 0.274}}),
    ("nanocode d24, v6e-8, 7.8 h", "published by its author", {"CORE": {"base": 0.227}}),
]

# other runs shown beside this one, the newest
EARLIER = 5


class RunRecord(NamedTuple):
    """Everything that a run folder holds for its report; missing files are empty dicts."""

    name: str
    config: dict[str, Any]
    results: dict[str, Any]
    # by stage: rows of its metrics
    curves: dict[str, list[dict]]
    # by stage, in the order of STAGES: its evaluation record, and what lm-evaluation-harness said
    records: dict[str, dict]
    harness: dict[str, dict]
    has_tokenizer: bool
    # sentences on what is not shown, and why
    notes: list[str]


# ---- reading -------------------------------------------------------------------------------------


def read(folder) -> RunRecord:
    """The `Run` in a folder with any part of a run's files; UserError for none or damaged ones."""
    folder = Path(folder)
    notes = []

    # the metrics of each stage that was trained here
    curves = {}
    for stage, place in STAGES.items():
        stage_folder = folder if stage == "base" else folder / place
        path = stage_folder / "metrics.jsonl"
        if path.exists():
            curves[stage] = read_jsonl(path)

    # what was measured, of these very trainings
    results = _own_results(read_results(folder), curves, notes)
    if "val_bpb" in results and results["val_bpb"] is None:
        notes.append("bits per byte of unseen text: there was no held-out text to measure on")
    records = _own_records(_read_stages(folder / "evals", "{}.json"), curves, notes)

    run = RunRecord(
        name=folder.name,
        config=_read(folder / "config.json"),
        results=results,
        curves=curves,
        records=records,
        harness=_read_stages(folder / "evals", "lm_eval_{}.json"),
        has_tokenizer=(folder / "tokenizer.json").exists(),
        notes=notes,
    )
    # all but the name
    if not any(run[1:]):
        raise UserError(
            f"nothing to report in {folder}: it has no tokenizer.json, config.json, results.json, "
            "metrics or evals; name a run's folder, or make one with 01_tokenizer.py"
        )
    return run


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is none."""
    if not path.exists():
        return {}
    return read_json(path, cure="delete it, and run again what writes it")


def _read_stages(folder: Path, pattern: str) -> dict[str, dict]:
    """{stage: the JSON object of its file} for those that there are."""
    content = {}
    for stage in STAGES:
        record = _read(folder / pattern.format(stage))
        if record:
            content[stage] = record
    return content


def _began(rows: list[dict] | None) -> float | None:
    """When a training began, in seconds since 1970."""
    return rows[0].get("time") if rows else None


def _own_results(results: dict, curves: dict[str, list[dict]], notes: list[str]) -> dict:
    """The results without those of an earlier training of this folder."""
    began, now = results.get("began"), _began(curves.get("base"))
    if began is None or now is None or began == now:
        return results

    # the tokenizer is older than any training, and still the same
    notes.append(
        "results.json belongs to an earlier training of this folder: its figures are left out."
    )
    tokenizer = ("vocab_size", "bytes_per_token", "compression")
    return {key: results[key] for key in tokenizer if key in results}


def _own_records(
    records: dict[str, dict], curves: dict[str, list[dict]], notes: list[str]
) -> dict[str, dict]:
    """The records that were measured after their stage's training began."""
    own = {}
    for stage, record in records.items():
        began = _began(curves.get(stage))
        measured = _seconds(record.get("time"))
        # a record's time has whole seconds
        if began is not None and measured is not None and measured < math.floor(began):
            notes.append(
                f"evals/{stage}.json was measured before this training began: it belongs to an "
                "earlier model and is left out."
            )
        else:
            own[stage] = record
    return own


def _seconds(text) -> float | None:
    """Seconds since 1970 of a record's time."""
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return None


def earlier_runs(folder) -> tuple[list[RunRecord], list[str]]:
    """(other evaluated runs beside `folder`, newest first; a sentence for each unreadable one)."""
    # when each of them was measured last
    folder = Path(folder).resolve()
    newest = {}
    for path in folder.parent.glob("*/evals/*.json"):
        other = path.parents[1]
        newest[other] = max(newest.get(other, 0), path.stat().st_mtime)
    newest.pop(folder, None)
    others = sorted(newest, key=lambda path: -newest[path])

    # a damaged neighbour is no reason to have no report
    runs, unread = [], []
    for other in others[:EARLIER]:
        try:
            runs.append(read(other))
        except UserError as e:
            unread.append(f"Run {other.name} is left out: {e}.")
    return runs, unread


# ---- scores --------------------------------------------------------------------------------------


def is_mean(name: str) -> bool:
    """Whether a score is the mean of several tasks."""
    return name.startswith(("CORE", "ChatCORE"))


def key_of(name: str) -> str:
    """A name without what spellings differ in: ARC-Easy and arc_easy are one."""
    return re.sub(r"\W|_", "", name).lower()


# the tasks that nanochat's ChatCORE is the mean of
CHATCORE = {key_of(name) for name in REFERENCES[1][2] if not is_mean(name)}


def scores_of(record: dict) -> dict[str, dict]:
    """{task: entry} of a record, CORE and ChatCORE first as tasks of their own.

    The tasks that CORE is made of are left out: they have a table of their own.
    """
    scores = {}
    for key, name in (("core", "CORE"), ("chatcore", "ChatCORE")):
        mean = record.get(key)
        if mean:
            tasks = mean.get("tasks", ())
            scores[name + _of_a_part(key, mean)] = {
                "score": mean["score"],
                "stderr": mean.get("stderr"),
                "baseline": 0.0,
                "n": f"{len(tasks)} tasks",
                "kind": "centred mean",
            }

    for name, entry in record.get("tasks", {}).items():
        if entry.get("kind") != "core":
            scores[name] = entry
    return scores


def _of_a_part(key: str, mean: dict) -> str:
    """Over other tasks or fewer items it is another measure than the published one."""
    if key == "core":
        whole = not mean.get("partial")
    else:
        whole = {key_of(name) for name in mean.get("tasks", ())} == CHATCORE
    return "" if whole else " of a part"


def task_names(run: RunRecord) -> list[str]:
    """The names of all scores, means first."""
    names = {}
    for record in run.records.values():
        names |= dict.fromkeys(scores_of(record))
    return sorted(names, key=lambda name: not is_mean(name))


def core_label(record: dict) -> str:
    """The label of CORE or "" where it was not measured."""
    for name in scores_of(record):
        if name.startswith("CORE"):
            return name
    return ""


# ---- text ----------------------------------------------------------------------------------------


def source_of(run: RunRecord) -> str:
    """The text that it was trained on."""
    return run.results.get("source", "its text")


def measured_source(run: RunRecord) -> str:
    """The text of which results.json has bits per byte, the model's and the compressors'."""
    return run.results.get("val_source", source_of(run))


def text_bits(run: RunRecord) -> dict[str, dict[str, dict]]:
    """{source: {stage: measurement}}; of a run that nobody examined, what its results say."""
    by_source = {}
    for stage, record in run.records.items():
        for source, measured in record.get("bpb", {}).items():
            by_source.setdefault(source, {})[stage] = measured

    # 02_train measures the end of a training, if nobody else does
    if not by_source and run.results.get("val_bpb") is not None:
        by_source[measured_source(run)] = {
            "base": {
                "bpb": run.results["val_bpb"],
                "stderr": run.results.get("val_bpb_stderr"),
                "bytes": run.results.get("val_bytes"),
            }
        }
    return by_source


def steps_done(run: RunRecord) -> tuple[int, int]:
    """(steps taken, steps planned) of pretraining."""
    rows = run.curves.get("base", [])
    done = rows[-1]["step"] if rows else run.results.get("steps", 0)
    return done, run.config.get("num_steps", 0)


# ---- the verdict ---------------------------------------------------------------------------------


def verdict(run: RunRecord) -> str:
    """What came of the run, in one sentence, from nothing but its records."""
    done, asked = steps_done(run)
    if not done and not run.records and not text_bits(run):
        return _verdict_without_model(run)

    # from text to tasks, as a model is made
    parts = []
    if done < asked:
        parts.append(f"training stopped at step {done:,} of {asked:,}")
    parts += _bits_sentence(run)
    if run.records:
        parts += _core_sentence(run)
        parts += _tasks_sentence(run)
    else:
        parts.append("no task is measured yet")
    return f"{_subject(run)}: {'; '.join(parts)}."


def _verdict_without_model(run: RunRecord) -> str:
    """What is there before anything is trained: a tokenizer, or settings."""
    if not run.has_tokenizer:
        return "Nothing is trained or measured yet: this run has only settings."
    words = "Only a tokenizer so far, one"
    if "vocab_size" in run.results:
        words += f" of {run.results['vocab_size']:,} tokens"
    if run.results.get("bytes_per_token") is not None:
        size = run.results["bytes_per_token"]
        words += f" that takes {size:.2f} bytes of held-out text per token"
    return f"{words}; no model is trained and none is measured."


def _subject(run: RunRecord) -> str:
    """A model of so many parameters, trained on so many tokens."""
    words = "A model"
    if run.results.get("params") is not None:
        words += f" of {short(run.results['params'])} parameters"
    steps, _ = steps_done(run)
    tokens = steps * run.config.get("total_batch_size", 0)
    tokens = tokens or run.results.get("train_tokens")
    if tokens:
        words += f", trained on {short(tokens)} tokens of {source_of(run)}"
    return words


def _bits_sentence(run: RunRecord) -> list[str]:
    """The headline: bits per byte of the first text, of the base model, since chat forgets text."""
    for source, stages in text_bits(run).items():
        stage, measured = next(iter(stages.items()))
        if measured.get("bpb") is None:
            return []
        after = "" if stage == "base" else f" after stage {stage}"
        sentence = f"it needs {measured['bpb']:.3f} bits per byte of unseen {source}{after}"

        # what anyone's computer can do with the same bytes
        if run.results.get("xz_bpb") and source == measured_source(run):
            sentence += f" where xz\u00a0-9 needs {run.results['xz_bpb']:.3f}"
        return [sentence]
    return []


def _core_sentence(run: RunRecord) -> list[str]:
    """CORE of the last stage that has it."""
    for stage, record in reversed(run.records.items()):
        name = core_label(record)
        if name:
            core = scores_of(record)[name]
            error = "" if core["stderr"] is None else f" ± {core['stderr']:.3f}"
            return [f"{name} is {core['score']:.3f}{error} after stage {stage}"]
    return []


def _tasks_sentence(run: RunRecord) -> list[str]:
    """On how many tasks the last stage is better than guessing, by exact tests for all of them."""
    last = list(run.records)[-1]
    entries = run.records[last].get("tasks", {})
    tasks = {name: entry for name, entry in entries.items() if is_share(entry)}
    if not tasks:
        return []
    chances = stats.above_guessing(tasks)
    above = [name for name, p in chances.items() if p < stats.CONFIDENT]
    count = f"{len(above) or 'none'} of {len(tasks)} tasks"

    def centered(name):
        return stats.centered(tasks[name]["score"], tasks[name]["baseline"])

    # the farthest from what guessing would give
    if above:
        best = max(above, key=centered)
        count += f" (most on {best}: {percent(tasks[best]['score'])} %)"
    return [f"after stage {last} it is clearly better than guessing on {count}"]
