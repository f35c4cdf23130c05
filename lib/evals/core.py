"""CORE, DCLM's benchmark of base models: 22 tasks, rendered and decided as nanochat does.

Li et al. 2024, arXiv 2406.11794.
"""

import csv
import functools
import hashlib
import io
import math
import random
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lib.data import CACHE, fetch
from lib.evals import likelihood, stats
from lib.evals.errors import evaluating
from lib.files import UserError, choose, local_path, parse_json, read_text, sha256, write_atomic

# where nanochat has it from
BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
# nanochat's: which examples are shown, and in what order the items are
FEWSHOT_SEED, SHUFFLE_SEED = 1234, 1337
# the bundle's list of tasks, what guessing scores, and its folder of items
CONFIG, BASELINES, DATA = "core.yaml", "eval_meta_data.csv", "eval_data"
# (tokens, start of what is scored) of each sequence of an item
Spans = list[tuple[list[int], int]]


@dataclass(frozen=True)
class CoreTask:
    """One line of the bundle's list.

    items: dicts as in its file, each with an "id", the line's number. baseline: 0 to 1.
    """

    label: str
    kind: str
    source: str
    fewshot: int
    delimiter: str
    baseline: float
    items: tuple[dict, ...]


# ---- the bundle


def download(cache_dir=CACHE, url: str = BUNDLE, expect: str = "", tries: int = 3) -> Path:
    """The bundle's zip in the cache, downloaded if need be, its members' check sums verified.

    A broken download is resumed. Nobody publishes the file's SHA-256: unless `expect` gives it, the
    one of the first download is written beside it and every later use is compared with that.
    """
    path = Path(cache_dir, "eval_bundle.zip")
    note = path.with_name(path.name + ".sha256")
    fetch(url, path, tries=tries)
    digest = sha256(path)
    # what it should be, as told or as it was the first time
    want = expect
    if not want and note.exists():
        want = note.read_text().strip()
    if want and digest != want:
        raise UserError(
            f"{path} has SHA-256 {digest}, not {want}: delete it and {note.name}, and run again"
        )
    if not note.exists():
        _check_zip(path)
        write_atomic(note, digest + "\n")
    return path


def _check_zip(path: Path) -> None:
    """UserError if the zip is cut off or one of its members is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as e:
        raise UserError(f"{path} is not a whole zip file ({e}): delete it and run again") from e
    if bad:
        raise UserError(f"{bad} in {path} is damaged: delete {path} and run again")


class Bundle:
    """Texts of the bundle by name: it is a folder or a zip, maybe with one folder around it.

    `digest` goes over all that was read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.digest = hashlib.sha256()
        if path.is_dir():
            self.names, self.read = _folder(path)
        elif zipfile.is_zipfile(path):
            self.names, self.read = _archive(path)
        else:
            raise UserError(
                f"{path} is neither a folder nor a zip file: give the path of DCLM's eval_bundle, "
                "or none to download it"
            )

    def text(self, name: str) -> str:
        """One file; UserError if it is missing or unreadable."""
        try:
            text = self.read(name)
        except (OSError, KeyError, UnicodeDecodeError, zipfile.BadZipFile) as e:
            there = any(n.endswith(name) for n in self.names)
            has = "is unreadable" if there else "is missing"
            raise UserError(f"{name} {has} in {self.path}: fetch the bundle again") from e
        self.digest.update(text.encode())
        return text


def _folder(path: Path) -> tuple[list[str], Callable[[str], str]]:
    """(names of files, function that reads one) of a bundle that is a folder."""
    for root in (path, path / "eval_bundle"):
        if (root / CONFIG).is_file():
            names = [str(p.relative_to(root)) for p in root.rglob("*")]
            return names, functools.partial(_read_file, root)
    raise UserError(f"{path} holds no {CONFIG}: it is not DCLM's eval_bundle")


def _read_file(root: Path, name: str) -> str:
    if not (root / name).exists():
        raise KeyError(name)
    return read_text(root / name)


def _archive(path: Path) -> tuple[list[str], Callable[[str], str]]:
    """(names of files, function that reads one) of a bundle that is a zip."""
    archive = zipfile.ZipFile(path)
    # macOS adds a shadow of each file
    names = [n for n in archive.namelist() if not n.startswith("__MACOSX")]
    lists = [n for n in names if n.split("/")[-1] == CONFIG]
    if not lists:
        raise UserError(f"{path} holds no {CONFIG}: it is not DCLM's eval_bundle")

    # the list nearest to the top
    root = min(lists, key=len).removesuffix(CONFIG)

    def read(name: str) -> str:
        return archive.read(root + name).decode("utf-8")

    return names, read


def load_bundle(path=None, cache_dir=CACHE, limit: int | None = None) -> tuple[list[CoreTask], str]:
    """(tasks in the bundle's order, SHA-256 of what was read). path: of a folder or zip.

    Without a path it is downloaded. Items are shuffled by SHUFFLE_SEED and then cut to `limit`,
    which changes few-shot draws too, as in nanochat.
    """
    if limit is not None and limit < 1:
        raise UserError(
            f"a limit of {limit} items leaves nothing to measure: take at least 1, or None for all"
        )
    path = local_path(path or download(cache_dir))
    if not path.exists():
        raise UserError(
            f"no CORE bundle at {path}: give DCLM's eval_bundle as a folder or zip, or no path to "
            "download it"
        )
    bundle = Bundle(path)
    entries, baselines = _list_of_tasks(bundle)
    tasks = []
    files = {}
    for entry in entries:
        label, kind, source, fewshot, delimiter = _entry(entry, path)
        if label not in baselines:
            raise UserError(f"{BASELINES} in {path} has no random baseline for {label}")

        # several tasks may ask the same items
        if source not in files:
            files[source] = _items(bundle, source)
        items = files[source].copy()
        # first shuffled, then cut: a part is a fair sample
        random.Random(SHUFFLE_SEED).shuffle(items)
        items = tuple(items[:limit])
        if len(items) <= fewshot:
            raise UserError(
                f"CORE task {label} shows {fewshot} examples beside each item, and there are "
                f"{len(items)} items: raise the limit"
            )
        tasks.append(CoreTask(label, kind, source, fewshot, delimiter, baselines[label], items))
    if not tasks:
        raise UserError(f"{CONFIG} in {path} lists no tasks")
    return tasks, bundle.digest.hexdigest()


def _list_of_tasks(bundle: Bundle) -> tuple[list[dict], dict[str, float]]:
    """(entries of the bundle's list, random baseline by label)."""
    import yaml

    try:
        entries = yaml.safe_load(bundle.text(CONFIG))["icl_tasks"]
        table = csv.DictReader(io.StringIO(bundle.text(BASELINES)))
        # given in per cent, and not for every task
        baselines = {}
        for row in table:
            if row["Random baseline"]:
                baselines[row["Eval Task"]] = float(row["Random baseline"]) / 100
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise UserError(
            f"{CONFIG} or {BASELINES} in {bundle.path} is not as in DCLM's bundle "
            f"({str(e).splitlines()[0]})"
        ) from e
    return entries, baselines


def _entry(entry: dict, path: Path) -> tuple[str, str, str, int, str]:
    """(label, kind, source, examples, delimiter) of one entry of the list."""
    try:
        label = entry["label"]
        kind = entry["icl_task_type"]
        source = entry["dataset_uri"]
        fewshot = entry["num_fewshot"][0]
        delimiter = entry.get("continuation_delimiter", " ")
    except (KeyError, TypeError, IndexError) as e:
        raise UserError(
            f"{CONFIG} in {path} has a task without {e}: it is not as in DCLM's bundle"
        ) from e
    choose(f"type of CORE task {label}", kind, KINDS)
    return label, kind, source, fewshot, delimiter


def _items(bundle: Bundle, source: str) -> list[dict]:
    """The items of one file, in its order."""
    items = []
    # not splitlines, which also cuts at marks inside a text
    for number, line in enumerate(io.StringIO(bundle.text(f"{DATA}/{source}"))):
        item = parse_json(line.strip(), f"{source} item {number}")
        items.append({**item, "id": str(number)})
    return items


# ---- items -> prompts -> tokens


def _render(query: str, answer: str, examples, delimiter: str) -> str:
    """Solved examples with a blank line behind each, then the question."""
    shown = "".join(f"{q}{delimiter}{a}\n\n" for q, a in examples)
    return f"{shown}{query}{delimiter}{answer}"


def _choice_prompts(item: dict, examples: list[dict], delimiter: str) -> list[str]:
    """The question with each of its answers."""
    shown = [(e["query"], e["choices"][e["gold"]]) for e in examples]
    return [_render(item["query"], choice, shown, delimiter) for choice in item["choices"]]


def _schema_prompts(item: dict, examples: list[dict], delimiter: str) -> list[str]:
    """Each of the contexts with the one continuation."""
    shown = [(e["context_options"][e["gold"]], e["continuation"]) for e in examples]
    contexts = item["context_options"]
    return [_render(context, item["continuation"], shown, delimiter) for context in contexts]


def _language_prompts(item: dict, examples: list[dict], delimiter: str) -> list[str]:
    """Without and with the continuation.

    Without is stripped: a blank at its end would belong to the next token.
    """
    shown = [(e["context"].strip(), e["continuation"]) for e in examples]
    context = item["context"].strip()
    return [
        _render(context, "", shown, delimiter).strip(),
        _render(context, item["continuation"], shown, delimiter),
    ]


def common_start(sequences: Iterable[Sequence[int]]) -> int:
    """How many tokens all sequences begin with alike."""
    n = 0
    for tokens in zip(*sequences):
        if len(set(tokens)) > 1:
            break
        n += 1
    return n


def _choice_spans(tokens: list[list[int]]) -> Spans:
    """Options differ behind what they have in common; that much is scored."""
    start = common_start(tokens)
    return [(t, start) for t in tokens]


def _schema_spans(tokens: list[list[int]]) -> Spans:
    """Beginnings differ; the end that all have in common is scored."""
    same = common_start([t[::-1] for t in tokens])
    return [(t, len(t) - same) for t in tokens]


def _language_spans(tokens: list[list[int]]) -> Spans:
    """The continuation is scored: from where the prompt without it ends.

    Or from the first token that it changed.
    """
    _, whole = tokens
    start = common_start(tokens)
    if len(whole) == start:
        return []
    return [(whole, start)]


def _least_loss(item: dict, scores: list[likelihood.Score]) -> bool:
    """The option with the least mean loss is taken.

    One without any token of its own has none (NaN), as in nanochat.
    """
    losses = [mean_loss(s) for s in scores]
    return losses.index(min(losses)) == item["gold"]


def _greedy(item: dict, scores: list[likelihood.Score]) -> bool:
    """Greedy decoding would write the continuation."""
    return scores[0].greedy


def mean_loss(score: likelihood.Score) -> float:
    """Nats per token."""
    if not score.tokens:
        return math.nan
    return -score.logprob / score.tokens


class Kind(NamedTuple):
    """How items of a type are put and decided.

    prompts(item, examples, delimiter) -> texts. spans(tokens of each) -> (tokens, start of what is
    scored) of each sequence. right(item, scores) -> whether the model has it right.
    """

    prompts: Callable
    spans: Callable
    right: Callable


KINDS = {
    "multiple_choice": Kind(_choice_prompts, _choice_spans, _least_loss),
    "schema": Kind(_schema_prompts, _schema_spans, _least_loss),
    "language_modeling": Kind(_language_prompts, _language_spans, _greedy),
}


def examples_of(task: CoreTask, index: int) -> list[dict]:
    """The solved examples that item `index` is shown.

    Drawn by FEWSHOT_SEED + index from all the others.
    """
    others = range(len(task.items) - 1)
    drawn = random.Random(FEWSHOT_SEED + index).sample(others, task.fewshot)
    # the item itself is left out: those behind it move up
    examples = []
    for i in drawn:
        number = i + 1 if i >= index else i
        examples.append(task.items[number])
    return examples


def prompts_of(task: CoreTask, index: int) -> list[str]:
    """The texts that item `index` is decided by."""
    examples = examples_of(task, index)
    return KINDS[task.kind].prompts(task.items[index], examples, task.delimiter)


@dataclass(frozen=True)
class Prepared:
    """A task with its requests for `likelihood.score`, made once.

    spans: per item (first request, number of them). moved: items whose continuation changes the
    last token of its context under this tokenizer, which nanochat refuses; they are scored from
    that token on.
    """

    task: CoreTask
    requests: list[tuple[list[int], list[list[int]]]]
    spans: list[tuple[int, int]]
    moved: int


def prepare(tokenizer, task: CoreTask) -> Prepared:
    """Render and tokenise a task."""
    # all prompts of a task are encoded in one go
    prompts = []
    counts = []
    for index, item in enumerate(task.items):
        with evaluating(f"{task.label} item {item['id']}"):
            _check_gold(item)
            texts = prompts_of(task, index)
        prompts += texts
        counts.append(len(texts))
    tokens = tokenizer.encode_batch(prompts, bos=True)
    # and taken apart again, item by item
    requests = []
    spans = []
    start = moved = 0
    for item, count in zip(task.items, counts):
        own = tokens[start : start + count]
        start += count
        sequences = KINDS[task.kind].spans(own)
        if not sequences:
            raise UserError(
                f"{task.label} item {item['id']}: its continuation adds no token to its context"
            )
        # the continuation begins before the context alone would end
        if task.kind == "language_modeling":
            moved += sequences[0][1] < len(own[0])

        # what each sequence begins with, and the rest of it, which is scored
        spans.append((len(requests), len(sequences)))
        for ids, first in sequences:
            requests.append((ids[:first], [ids[first:]]))
    return Prepared(task, requests, spans, moved)


def _check_gold(item: dict) -> None:
    """UserError if the right answer is none of the options."""
    options = item.get("choices", item.get("context_options", ()))
    if "gold" in item and not 0 <= item["gold"] < len(options):
        raise UserError(f"gold is {item['gold']}, outside its options")


# ---- the measurement


def decide(prepared: Prepared, scores: list[list[likelihood.Score]]) -> dict:
    """One task's entry of an evaluation record, with every item's outcome."""
    task = prepared.task
    items = []
    truncated = 0
    for item, (start, count) in zip(task.items, prepared.spans):
        with evaluating(f"{task.label} item {item['id']}"):
            own = []
            for scores_of_request in scores[start : start + count]:
                own += scores_of_request
            if not all(math.isfinite(s.logprob) for s in own):
                raise UserError("the model's likelihood is not a number: its weights are broken")
            right = KINDS[task.kind].right(item, own)
            items.append(dict(id=item["id"], correct=int(right)))
            truncated += any(s.cut for s in own)

    # what always saying the same would score
    answers = []
    for item in task.items:
        answers.append(item["gold"] if "gold" in item else item["continuation"])
    accuracy, stderr = stats.proportion([item["correct"] for item in items])
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
    """The "core" part of a record from the entries of its tasks.

    The mean of centred scores and its error.
    """
    score, stderr = stats.mean_centered(tasks)
    # of each task without its items
    short = {}
    for label, task in tasks.items():
        kept = {key: task[key] for key in ("centered", "stderr", "n", "baseline")}
        short[label] = dict(accuracy=task["score"], **kept)
    return dict(score=score, stderr=stderr, tasks=short)


def headline(core: dict) -> str:
    """The sum of a measurement in one line, from the "core" part of a record."""
    tasks = len(core["tasks"])
    part = ""
    if core.get("partial"):
        part = ", of a part of the benchmark"
    return (
        f"CORE {core['score']:.4f} ± {core['stderr']:.4f}, the mean of {tasks} centred scores "
        f"(0 is chance, 1 perfect){part}"
    )


def line(label: str, entry: dict) -> str:
    """One task's entry in a line."""
    cut = ""
    if entry["truncated"]:
        cut = f", {entry['truncated']} truncated"
    return (
        f"{label}: {100 * entry['score']:.1f} ± {100 * entry['stderr']:.1f} % "
        f"(random {100 * entry['baseline']:.1f} %), centred {entry['centered']:+.3f}, "
        f"{entry['n']} items, {entry['per_second']:.1f}/s{cut}"
    )


def scorer(params, config, tokenizer, **options) -> Callable:
    """requests -> scores, by a model: what `evaluate` takes."""
    return functools.partial(likelihood.score, params, config, tokenizer, **options)


def evaluate(
    score: Callable,
    tokenizer,
    bundle=None,
    *,
    limit: int | None = None,
    only: Iterable[str] = (),
    cache_dir=CACHE,
    report: Callable[[str], object] = print,
) -> dict:
    """CORE of a model: {"core": summary, "tasks": {"core/LABEL": entry}}, as in a record.

    score: see `scorer`. bundle: path of a folder or zip, None to download. limit: items per task.
    only: labels, all when empty. report(line) is called after each task, and with the sum at the
    end. UserError without a bundle; any failure names the task and the item, and nothing is scored.
    """
    tasks, digest = load_bundle(bundle, cache_dir, limit)
    labels = {task.label for task in tasks}
    only = [choose("CORE task", label, labels) for label in only]

    entries = {}
    begin = time.perf_counter()
    for task in tasks:
        if only and task.label not in only:
            continue
        clock = time.perf_counter()
        prepared = prepare(tokenizer, task)
        with evaluating(f"{task.label} item one of {len(task.items)}"):
            scores = score(prepared.requests)
        entry = decide(prepared, scores)

        # told at once: a whole measurement takes long
        seconds = time.perf_counter() - clock
        entry |= dict(seconds=seconds, per_second=entry["n"] / seconds, limit=limit)
        entries[task.label] = entry
        report(line(task.label, entry))
    # all tasks together
    seconds = time.perf_counter() - begin
    count = sum(entry["n"] for entry in entries.values())
    core = summary(entries) | dict(
        seconds=seconds,
        per_second=count / seconds,
        limit=limit,
        bundle=digest,
        partial=bool(only) or limit is not None,
    )
    report(headline(core))
    by_name = {f"core/{label}": entry for label, entry in entries.items()}
    return {"core": core, "tasks": by_name}


def during_training(
    config, tokenizer, bundle=None, *, limit: int = 50, cache_dir=CACHE, **options
) -> Callable:
    """A function params -> {"core", "core_stderr", "core/LABEL": centred score}.

    To call every so many steps: everything is rendered and tokenised here, once; a call only reads
    the parameters. It has its own compiled programs, so that the training step is not compiled
    again and the data's cursor does not move. options: of `likelihood.score`.
    """
    tasks, _ = load_bundle(bundle, cache_dir, limit)
    prepared = [prepare(tokenizer, task) for task in tasks]

    def measure(params) -> dict[str, float]:
        score = scorer(params, config, tokenizer, **options)
        entries = {}
        for task in prepared:
            entries[task.task.label] = decide(task, score(task.requests))

        # the mean first, and then task by task
        core = summary(entries)
        result = {"core": core["score"], "core_stderr": core["stderr"]}
        for label, entry in entries.items():
            result[f"core/{label}"] = float(entry["centered"])
        return result

    return measure


def texts_of(task: CoreTask) -> list[dict]:
    """Items as {"id", "text"} with the question and its right answer, for `contamination`."""
    return [{"id": item["id"], "text": _words(task.kind, item)} for item in task.items]


def _words(kind: str, item: dict) -> str:
    """What an item of a kind says, the right answer to it included."""
    if kind == "multiple_choice":
        answer = item["choices"][item["gold"]]
        return f"{item['query']} {answer}"
    if kind == "schema":
        context = item["context_options"][item["gold"]]
    else:
        context = item["context"]
    return f"{context} {item['continuation']}"
