"""CORE, the base-model benchmark of DCLM (Li et al. 2024, arXiv 2406.11794): 22 tasks, rendered and decided as nanochat does."""

import csv
import functools
import hashlib
import io
import json
import math
import random
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lib.data import CACHE, fetch
from lib.evals import evaluating, likelihood, stats
from lib.files import UserError, choose, sha256, write_atomic

# where nanochat has it from
BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
FEWSHOT_SEED, SHUFFLE_SEED = 1234, 1337
CONFIG, BASELINES, DATA = "core.yaml", "eval_meta_data.csv", "eval_data"


@dataclass(frozen=True)
class Task:
    """One line of the bundle's list. items: dicts as in its file, each with an "id", the line's number; baseline: 0 to 1."""

    label: str
    kind: str
    source: str
    fewshot: int
    delimiter: str
    baseline: float
    items: tuple


# ---- the bundle


def download(cache_dir=CACHE, url: str = BUNDLE, expect: str = "", tries: int = 3) -> Path:
    """The bundle's zip in the cache, downloaded if need be (resuming what came before), its members' check sums verified.

    Nobody publishes the file's SHA-256: unless `expect` gives it, the one of the first download is written beside it and every later
    use is compared with that.
    """
    path = Path(cache_dir, "eval_bundle.zip")
    note = path.with_name(path.name + ".sha256")
    fetch(url, path, tries=tries)
    digest = sha256(path)
    want = expect or (note.read_text().strip() if note.exists() else "")
    if want and digest != want:
        raise UserError(
            f"{path} has SHA-256 {digest}, not {want}: delete it and {note.name}, and run again"
        )
    if not note.exists():
        _check_zip(path)
        write_atomic(note, digest + "\n")
    return path


def _check_zip(path):
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as e:
        raise UserError(f"{path} is not a whole zip file ({e}): delete it and run again") from e
    if bad:
        raise UserError(f"{bad} in {path} is damaged: delete {path} and run again")


def _reader(path: Path) -> Callable[[str], str]:
    """A function from a file's name in the bundle to its text; the bundle is a folder or a zip, maybe with one folder around it."""
    if path.is_dir():
        root = next((p for p in (path, path / "eval_bundle") if (p / CONFIG).is_file()), None)
        names = lambda: [str(p.relative_to(root)) for p in root.rglob("*")]
        read = lambda name: (root / name).read_text("utf-8")
    elif zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        found = sorted(
            (
                n
                for n in archive.namelist()
                if n.split("/")[-1] == CONFIG and not n.startswith("__MACOSX")
            ),
            key=len,
        )
        root = found[0].removesuffix(CONFIG) if found else None
        names = archive.namelist
        read = lambda name: archive.read(root + name).decode("utf-8")
    else:
        raise UserError(
            f"{path} is neither a folder nor a zip file: give the path of DCLM's eval_bundle, or none to download it"
        )
    if root is None:
        raise UserError(f"{path} holds no {CONFIG}: it is not DCLM's eval_bundle")

    def text(name):
        try:
            return read(name)
        except (OSError, KeyError, UnicodeDecodeError, zipfile.BadZipFile) as e:
            has = "is unreadable" if any(n.endswith(name) for n in names()) else "is missing"
            raise UserError(f"{name} {has} in {path}: fetch the bundle again") from e

    return text


def load_bundle(path=None, cache_dir=CACHE, limit: int | None = None) -> tuple[list[Task], str]:
    """(tasks in the bundle's order, SHA-256 of what was read). path: of a folder or zip; None downloads.

    Items are shuffled by SHUFFLE_SEED and then cut to `limit`, which changes few-shot draws too, as in nanochat.
    """
    import yaml

    if limit is not None and limit < 1:
        raise UserError(
            f"a limit of {limit} items leaves nothing to measure: take at least 1, or None for all"
        )
    path = Path(path or download(cache_dir)).expanduser()
    if not path.exists():
        raise UserError(
            f"no CORE bundle at {path}: give DCLM's eval_bundle as a folder or zip, or no path to download it"
        )
    read, digest = _reader(path), hashlib.sha256()

    def text(name):
        found = read(name)
        digest.update(found.encode())
        return found

    try:
        listed = yaml.safe_load(text(CONFIG))["icl_tasks"]
        chance = {
            row["Eval Task"]: float(row["Random baseline"]) / 100
            for row in csv.DictReader(io.StringIO(text(BASELINES)))
            if row["Random baseline"]
        }
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{CONFIG} or {BASELINES} in {path} is not as in DCLM's bundle ({str(e).splitlines()[0]})"
        ) from e
    tasks, files = [], {}
    for entry in listed:
        try:
            label, kind, source = entry["label"], entry["icl_task_type"], entry["dataset_uri"]
            fewshot, delimiter = entry["num_fewshot"][0], entry.get("continuation_delimiter", " ")
        except (KeyError, TypeError, IndexError) as e:
            raise UserError(
                f"{CONFIG} in {path} has a task without {e}: it is not as in DCLM's bundle"
            ) from e
        choose(f"type of CORE task {label}", kind, KINDS)
        if label not in chance:
            raise UserError(f"{BASELINES} in {path} has no random baseline for {label}")
        if source not in files:
            # not splitlines, which also cuts at marks inside a text
            lines = io.StringIO(text(f"{DATA}/{source}"))
            files[source] = [_item(line, number, source) for number, line in enumerate(lines)]
        items = files[source].copy()
        random.Random(SHUFFLE_SEED).shuffle(items)
        items = items[:limit]
        if len(items) <= fewshot:
            raise UserError(
                f"CORE task {label} shows {fewshot} examples beside each item, and there are {len(items)} items: "
                "raise the limit"
            )
        tasks.append(Task(label, kind, source, fewshot, delimiter, chance[label], tuple(items)))
    if not tasks:
        raise UserError(f"{CONFIG} in {path} lists no tasks")
    return tasks, digest.hexdigest()


def _item(line: str, number: int, source: str) -> dict:
    with evaluating(source, number):
        return {**json.loads(line.strip()), "id": str(number)}


# ---- items -> prompts -> tokens


def _render(query, answer, examples, delimiter):
    """Solved examples with a blank line behind each, then the question."""
    return "".join(f"{q}{delimiter}{a}\n\n" for q, a in examples) + f"{query}{delimiter}{answer}"


def _choice_prompts(item, examples, delimiter):
    shown = [(e["query"], e["choices"][e["gold"]]) for e in examples]
    return [_render(item["query"], choice, shown, delimiter) for choice in item["choices"]]


def _schema_prompts(item, examples, delimiter):
    shown = [(e["context_options"][e["gold"]], e["continuation"]) for e in examples]
    return [
        _render(context, item["continuation"], shown, delimiter)
        for context in item["context_options"]
    ]


def _language_prompts(item, examples, delimiter):
    """Without and with the continuation. Without is stripped: a blank at its end would belong to the next token."""
    shown = [(e["context"].strip(), e["continuation"]) for e in examples]
    context = item["context"].strip()
    return [
        _render(context, "", shown, delimiter).strip(),
        _render(context, item["continuation"], shown, delimiter),
    ]


def common_start(sequences) -> int:
    """How many tokens all sequences begin with alike."""
    n = 0
    for tokens in zip(*sequences):
        if len(set(tokens)) > 1:
            break
        n += 1
    return n


def _choice_spans(tokens):
    """Options differ behind what they have in common; that much is scored."""
    start = common_start(tokens)
    return [(t, start) for t in tokens]


def _schema_spans(tokens):
    """Beginnings differ; the end that all have in common is scored."""
    same = common_start([t[::-1] for t in tokens])
    return [(t, len(t) - same) for t in tokens]


def _language_spans(tokens):
    """The continuation is scored: from where the prompt without it ends, or from the first token that it changed."""
    without, whole = tokens
    return [(whole, common_start(tokens))] if len(whole) > common_start(tokens) else []


def _least_loss(item, scores) -> bool:
    """The option with the least mean loss is taken; one without any token of its own has none (NaN), as in nanochat."""
    losses = [mean_loss(s) for s in scores]
    return losses.index(min(losses)) == item["gold"]


def mean_loss(score) -> float:
    """Nats per token."""
    return -score.logprob / score.tokens if score.tokens else math.nan


# item type -> (prompts of an item, (tokens, start of what is scored) of each sequence, decision)
KINDS = {
    "multiple_choice": (_choice_prompts, _choice_spans, _least_loss),
    "schema": (_schema_prompts, _schema_spans, _least_loss),
    "language_modeling": (
        _language_prompts,
        _language_spans,
        lambda item, scores: scores[0].greedy,
    ),
}


def examples_of(task: Task, index: int) -> list[dict]:
    """The solved examples that item `index` is shown: drawn by FEWSHOT_SEED + index from all the others."""
    drawn = random.Random(FEWSHOT_SEED + index).sample(range(len(task.items) - 1), task.fewshot)
    return [task.items[i + (i >= index)] for i in drawn]


def prompts_of(task: Task, index: int) -> list[str]:
    """The texts that item `index` is decided by."""
    return KINDS[task.kind][0](task.items[index], examples_of(task, index), task.delimiter)


@dataclass(frozen=True)
class Prepared:
    """A task with its requests for `likelihood.score`, made once.

    spans: per item (first request, number of them). moved: items whose continuation changes the last token of its context under this
    tokenizer, which nanochat refuses; they are scored from that token on.
    """

    task: Task
    requests: list
    spans: list
    moved: int


def prepare(tokenizer, task: Task) -> Prepared:
    """Render and tokenise a task."""
    prompts, counts = [], []
    for index, item in enumerate(task.items):
        with evaluating(task.label, item["id"]):
            if "gold" in item and not 0 <= item["gold"] < len(
                item.get("choices", item.get("context_options", ()))
            ):
                raise UserError(f"gold is {item['gold']}, outside its options")
            texts = prompts_of(task, index)
        prompts += texts
        counts.append(len(texts))
    tokens = tokenizer.encode_batch(prompts, bos=True)
    requests, spans, start, moved = [], [], 0, 0
    for item, count in zip(task.items, counts):
        sequences = KINDS[task.kind][1](tokens[start : start + count])
        if not sequences:
            raise UserError(
                f"{task.label} item {item['id']}: its continuation adds no token to its context"
            )
        moved += task.kind == "language_modeling" and sequences[0][1] < len(tokens[start])
        start += count
        spans.append((len(requests), len(sequences)))
        requests += [(t[:first], [t[first:]]) for t, first in sequences]
    return Prepared(task, requests, spans, moved)


# ---- the measurement


def decide(prepared: Prepared, scores) -> dict:
    """One task's entry of an evaluation record (accuracy with its binomial error, baselines, every item's outcome)."""
    task, items, truncated = prepared.task, [], 0
    for item, (start, count) in zip(task.items, prepared.spans):
        with evaluating(task.label, item["id"]):
            mine = [s for one in scores[start : start + count] for s in one]
            if not all(math.isfinite(s.logprob) for s in mine):
                raise UserError("the model's likelihood is not a number: its weights are broken")
            items.append({"id": item["id"], "correct": int(KINDS[task.kind][2](item, mine))})
            truncated += any(s.cut for s in mine)
    answers = [item["gold"] if "gold" in item else item["continuation"] for item in task.items]
    accuracy, stderr = stats.proportion([i["correct"] for i in items])
    return dict(
        kind="core",
        score=accuracy,
        stderr=stderr,
        n=len(items),
        baseline=task.baseline,
        majority=stats.majority(answers),
        centered=stats.centered(accuracy, task.baseline),
        seed=SHUFFLE_SEED,
        fewshot=task.fewshot,
        fewshot_seed=FEWSHOT_SEED,
        truncated=truncated,
        moved=prepared.moved,
        source=task.source,
        items=items,
    )


def summary(tasks: dict[str, dict]) -> dict:
    """The "core" part of a record from the entries of its tasks: the mean of centred scores and its error."""
    score, stderr = stats.mean_centered(tasks)
    short = {
        label: dict(
            accuracy=t["score"],
            centered=t["centered"],
            stderr=t["stderr"],
            n=t["n"],
            baseline=t["baseline"],
        )
        for label, t in tasks.items()
    }
    return dict(score=score, stderr=stderr, tasks=short)


def scorer(params, config, tokenizer, **options) -> Callable:
    """requests -> scores, by a model: what `evaluate` and every other measurement by likelihood takes."""
    return functools.partial(likelihood.score, params, config, tokenizer, **options)


def evaluate(
    score: Callable,
    tokenizer,
    bundle=None,
    *,
    limit: int | None = None,
    only: Iterable[str] = (),
    cache_dir=CACHE,
    report: Callable[[str], None] = print,
) -> dict:
    """CORE of a model: {"core": summary, "tasks": {"core/LABEL": entry}}, as in an evaluation record.

    score: see `scorer`. bundle: path of a folder or zip, None to download. limit: items per task. only: labels, all when empty.
    report(line) is called after each task. UserError without a bundle; any failure names the task and the item, and nothing is scored.
    """
    tasks, digest = load_bundle(bundle, cache_dir, limit)
    only = [choose("CORE task", label, {t.label for t in tasks}) for label in only]
    entries, begin = {}, time.perf_counter()
    for task in tasks:
        if only and task.label not in only:
            continue
        clock = time.perf_counter()
        prepared = prepare(tokenizer, task)
        with evaluating(task.label, f"one of {len(task.items)}"):
            scores = score(prepared.requests)
        entry = decide(prepared, scores)
        seconds = time.perf_counter() - clock
        entries[task.label] = entry | dict(
            seconds=seconds, per_second=entry["n"] / seconds, limit=limit
        )
        cut = f", {entry['truncated']} truncated" if entry["truncated"] else ""
        report(
            f"{task.label}: {100 * entry['score']:.1f} ± {100 * entry['stderr']:.1f} % (random {100 * entry['baseline']:.1f} %), "
            f"centred {entry['centered']:+.3f}, {entry['n']} items, {entry['n'] / seconds:.1f}/s{cut}"
        )
    seconds = time.perf_counter() - begin
    core = summary(entries) | dict(
        seconds=seconds,
        per_second=sum(e["n"] for e in entries.values()) / seconds,
        limit=limit,
        bundle=digest,
        partial=bool(only) or limit is not None,
    )
    return {"core": core, "tasks": {f"core/{label}": entry for label, entry in entries.items()}}


def during_training(
    config, tokenizer, bundle=None, *, limit: int = 50, cache_dir=CACHE, **options
) -> Callable:
    """A function params -> {"core", "core_stderr", "core/LABEL": centred score} to call every so many steps.

    Everything is rendered and tokenised here, once; a call only reads the parameters. It has its own compiled programs, so that the
    training step is not compiled again and the data's cursor does not move. options: of `likelihood.score`.
    """
    prepared = [prepare(tokenizer, task) for task in load_bundle(bundle, cache_dir, limit)[0]]

    def measure(params) -> dict[str, float]:
        entries = {
            p.task.label: decide(
                p, likelihood.score(params, config, tokenizer, p.requests, **options)
            )
            for p in prepared
        }
        core = summary(entries)
        return {
            "core": core["score"],
            "core_stderr": core["stderr"],
            **{f"core/{label}": float(e["centered"]) for label, e in entries.items()},
        }

    return measure


def texts_of(task: Task) -> list[dict]:
    """Items as {"id", "text"} with the question and its right answer, for `contamination.overlap`."""

    def text(item):
        if task.kind == "multiple_choice":
            return f"{item['query']} {item['choices'][item['gold']]}"
        first = item["context_options"][item["gold"]] if task.kind == "schema" else item["context"]
        return f"{first} {item['continuation']}"

    return [{"id": item["id"], "text": text(item)} for item in task.items]
