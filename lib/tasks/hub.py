"""Tasks whose data comes from the Hugging Face Hub, or from a folder of files of the same schema.

The Hub keeps a parquet copy of every data set; its list of files is kept beside our other caches,
the files in the Hub client's own. A folder that holds the same files (a copied cache, or clones of
the data sets) takes the place of both: see `make`.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib import data
from lib.data.download import hub_parquet
from lib.data.readers import json_lines
from lib.files import UserError, first_line, regular
from lib.tasks.answers import number_after_mark
from lib.tasks.code import grade_humaneval, humaneval
from lib.tasks.items import Task, choice_item
from lib.tasks.stdlib import TASKS as STDLIB

# seed of the order of items, so that the first few are a fair sample; nanochat's order too
ORDER = 42
# nanochat's conversations in which an assistant tells who it is
IDENTITY = "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl"
# of those one conversation in so many is for tests
IDENTITY_HELD_OUT = 20


# ---- files ---------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where data comes from: a folder `root`, else the Hub, with lists of files below
    `cache_dir`.
    """

    root: str | None = None
    cache_dir: str = data.CACHE
    identity: str = IDENTITY


def parquet_files(place: Place, repo: str, config: str, split: str) -> list[Path]:
    """The parquet files of one split of a Hub data set in order, downloaded unless they are
    there.
    """
    # what was put there by hand comes before what the Hub has
    if not place.root:
        by_hand = Path(place.cache_dir, "hub", repo, config, split).glob("*.parquet")
        return sorted(by_hand) or hub_parquet(repo, config, split, place.cache_dir)

    # a folder: our own order, or that of clones
    shapes = (
        f"{config}/{split}/*.parquet",
        f"{config}/{split}-*.parquet",
        f"data/{split}-*.parquet",
    )
    for shape in shapes:
        for folder in (repo, repo.rpartition("/")[2]):
            files = sorted(Path(place.root, folder).glob(shape))
            if files:
                return files
    raise UserError(
        f"no data of {repo} ({config}, {split}) in {place.root}: "
        f"put its parquet files at {Path(place.root, repo, config, split)}"
    )


def rows(place: Place, repo: str, config: str, split: str, columns: list[str]) -> list[dict]:
    """All rows of one split of a Hub data set, `columns` only, in the order of its files."""
    import pyarrow
    import pyarrow.parquet

    table = []
    for path in parquet_files(place, repo, config, split):
        try:
            with pyarrow.parquet.ParquetFile(regular(path)) as file:
                names = file.schema_arrow.names
                missing = ", ".join(sorted(set(columns) - set(names)))
                if missing:
                    raise UserError(
                        f"{path} has no column {missing}, only {', '.join(names)}: is it of {repo}?"
                    )
                table += file.read(columns).to_pylist()
        except (pyarrow.ArrowException, OSError) as e:
            raise UserError(
                f"cannot read {path} as parquet ({first_line(e)}): "
                "it is damaged, so delete it and run again"
            ) from e
    return table


# ---- rows -> items -------------------------------------------------------------------------------


def smoltalk(row, id):
    """A chat as it is."""
    return dict(id=id, messages=row["messages"])


def mmlu(row, id):
    """A question with four options, of a subject."""
    return choice_item(id, row["question"], row["choices"], row["answer"], subject=row["subject"])


def arc(row, id):
    """A question with its own letters: some have five options, some have digits."""
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    return choice_item(id, row["question"], texts, labels.index(row["answerKey"]), labels)


def gsm8k(row, id):
    """The solution with each <<12*3=36>> as a use of the calculator and its answer; the value after
    #### is the item's answer.
    """
    # text and calls take turns
    parts = []
    for i, piece in enumerate(re.split(r"<<(.*?)>>", row["answer"])):
        if i % 2:
            expression, _, result = piece.rpartition("=")
            parts += [dict(type="python", text=expression), dict(type="python_output", text=result)]
        elif piece:
            parts.append(dict(type="text", text=piece))

    answer = number_after_mark(row["answer"])
    if answer is None:
        raise ValueError("no number after ####")
    messages = [
        dict(role="user", content=row["question"].strip()),
        dict(role="assistant", content=parts),
    ]
    return dict(id=id, messages=messages, answer=str(answer))


def grade_gsm8k(item, text) -> bool:
    """The number behind #### is the item's."""
    given = number_after_mark(text)
    return given is not None and given == Decimal(item["answer"])


def hellaswag(row, id):
    """Which of four endings goes on from the beginning of a scene or a how-to."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return dict(
        id=id,
        context=_without_marks(context),
        choices=[" " + _without_marks(ending) for ending in row["endings"]],
        gold=int(row["label"]),
    )


def _without_marks(text: str) -> str:
    """A text without the marks of the how-to articles that half of HellaSwag's items come from."""
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)
    return re.sub(r" {2,}", " ", text).strip()


def piqa(row, id):
    """Which of two ways reaches a goal."""
    choices = [" " + row["sol1"].strip(), " " + row["sol2"].strip()]
    return dict(
        id=id,
        context=f"Question: {row['goal'].strip()}\nAnswer:",
        choices=choices,
        gold=int(row["label"]),
    )


def winogrande(row, id):
    """Two contexts, one continuation: what follows the blank is scored after each way to fill it
    (Trinh and Le 2018).
    """
    before, blank, after = row["sentence"].partition("_")
    if not blank:
        raise ValueError("no blank in the sentence")
    return dict(
        id=id,
        context=[before + row["option1"], before + row["option2"]],
        choices=[" " + after.strip()] * 2,
        gold=int(row["answer"]) - 1,
    )


def lambada(row, id):
    """The last word of a passage: one choice, of which the likelihood is asked."""
    context, _, word = row["text"].strip().rpartition(" ")
    return dict(id=id, context=context, choices=[" " + word], gold=0)


def wikitext_articles(lines: list[dict]) -> list[dict]:
    """Lines joined into articles: each begins with a line such as " = Title = " between blank
    ones.
    """
    texts = ["", *(row["text"] for row in lines), ""]
    articles: list[list[str]] = []
    for before, text, after in zip(texts, texts[1:], texts[2:]):
        # a formula may begin with " = " too, but stands in a paragraph; "= =" is a section
        title = re.fullmatch(r" = (?!=).*(?<!=) = \n?", text)
        alone = not before.strip() and not after.strip()
        if (title and alone) or not articles:
            articles.append([])
        articles[-1].append(text)
    joined = ["".join(article) for article in articles]
    return [dict(text=text) for text in joined if text.strip()]


def wikitext(row, id):
    """An article as people write; its words are counted as the data set has them, where every sign
    is a word.
    """
    return dict(id=id, text=detokenised(row["text"]), words=len(row["text"].split()))


# How WikiText's tokens are put together again, after quotes were paired.
TOGETHER = (
    (r" @([-,.])@ ", r"\1"),
    (r"(?<!=) ([,.;:!?%)\]}])", r"\1"),
    (r"([(\[{$£]) ", r"\1"),
    (r" (n't|'(?:s|re|ve|ll|d|m|t)\b)", r"\1"),
    (r"(s) ' ", r"\1' "),
    (r"^ +| +$", ""),
)


def detokenised(text: str) -> str:
    """WikiText's tokens put together again: "1 @,@ 000 ( km ) , and" becomes "1,000 (km), and"."""
    # quotes and headings are a matter of whole lines
    text = "\n".join(map(_paired_quotes, text.split("\n")))
    text = re.sub(r"^ ?((?:= )+)(.*?)((?: =)+) ?$", _heading, text, flags=re.M)
    for pattern, replacement in TOGETHER:
        text = re.sub(pattern, replacement, text, flags=re.M)
    return text


def _heading(match: re.Match) -> str:
    """= = Title = = as == Title ==."""
    left, title, right = match.groups()
    return f"{left.replace(' ', '')} {title} {right.replace(' ', '')}"


def _paired_quotes(line: str) -> str:
    """A line with each opening quote put before the word behind it, each closing one behind the
    word before it.
    """
    first, *rest = re.split(r'(?:^|(?<= ))"(?= |$)', line)
    out = first
    for number, part in enumerate(rest, 1):
        opening = number % 2 == 1
        # the last one, whose partner is missing, stays as it is
        if opening and number == len(rest):
            out += '"' + part
        elif opening:
            out += '"' + part.removeprefix(" ")
        else:
            out = out.removesuffix(" ") + '"' + part
    return out


class Source(NamedTuple):
    """A data set on the Hub and how it becomes a task."""

    kind: str
    repo: str
    config: str
    splits: dict[str, str]  # ours -> its own
    columns: str
    item: Callable[[dict, str], dict]
    baseline: float | None = 0.0
    grade: Callable | None = None
    join: Callable[[list[dict]], list[dict]] = list  # rows -> what items are made of


# labels of some test splits are secret
BOTH, HELD_OUT = dict(train="train", test="test"), dict(train="train", test="validation")
SOURCES: dict[str, Source] = {
    "smoltalk": Source(
        "perplexity", "HuggingFaceTB/smol-smoltalk", "default", BOTH, "messages", smoltalk, None
    ),
    "mmlu": Source(
        "choice",
        "cais/mmlu",
        "all",
        dict(train="auxiliary_train", test="test"),
        "question choices answer subject",
        mmlu,
        0.25,
    ),
    "arc_easy": Source(
        "choice", "allenai/ai2_arc", "ARC-Easy", BOTH, "question choices answerKey", arc, 0.25
    ),
    "arc_challenge": Source(
        "choice", "allenai/ai2_arc", "ARC-Challenge", BOTH, "question choices answerKey", arc, 0.25
    ),
    "gsm8k": Source(
        "generate", "openai/gsm8k", "main", BOTH, "question answer", gsm8k, 0.0, grade_gsm8k
    ),
    "humaneval": Source(
        "generate",
        "openai/openai_humaneval",
        "openai_humaneval",
        dict(test="test"),
        "prompt canonical_solution test entry_point",
        humaneval,
        0.0,
        grade_humaneval,
    ),
    "hellaswag": Source(
        "likelihood",
        "Rowan/hellaswag",
        "default",
        HELD_OUT,
        "activity_label ctx_a ctx_b endings label",
        hellaswag,
        0.25,
    ),
    "piqa": Source(
        "likelihood", "baber/piqa", "default", HELD_OUT, "goal sol1 sol2 label", piqa, 0.5
    ),
    "winogrande": Source(
        "likelihood",
        "allenai/winogrande",
        "winogrande_xl",
        HELD_OUT,
        "sentence option1 option2 answer",
        winogrande,
        0.5,
    ),
    "lambada": Source(
        "likelihood",
        "EleutherAI/lambada_openai",
        "default",
        dict(test="test"),
        "text",
        lambada,
        0.0,
    ),
    "wikitext103": Source(
        "perplexity",
        "Salesforce/wikitext",
        "wikitext-103-raw-v1",
        BOTH,
        "text",
        wikitext,
        None,
        join=wikitext_articles,
    ),
}


def hub_items(place: Place, name: str, split: str) -> list[dict]:
    """The items of a task of SOURCES; [] where it has no such split."""
    source = SOURCES[name]
    if split not in source.splits:
        return []
    theirs = source.splits[split]
    table = rows(place, source.repo, source.config, theirs, source.columns.split())
    records = source.join(table)

    # an item is known by its row, whatever the order
    items = []
    order = np.random.default_rng(ORDER).permutation(len(records))
    for i in order.tolist():
        try:
            items.append(source.item(records[i], f"{name}/{split}/{i}"))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
            raise UserError(
                f"row {i} of {source.repo} ({source.config}, {theirs}) is not as task {name} "
                f"expects ({type(e).__name__}: {e}): was the data set changed?"
            ) from e
    return items


def identity_items(place: Place, split: str) -> list[dict]:
    """Conversations in which an assistant tells who it is: nanochat's, one list of messages a
    line.
    """
    # a file beside the data sets, or nanochat's own
    if place.root:
        path = Path(place.root, "identity_conversations.jsonl")
        if not path.is_file():
            raise UserError(
                f"no identity conversations in {place.root}: "
                f"put them at {path}, one list of messages a line"
            )
    else:
        path = Path(place.cache_dir, "hub", "identity_conversations.jsonl")
        data.fetch(place.identity, path, tries=2)

    items = []
    for line, record in json_lines(path):
        messages = record.get("messages") if isinstance(record, dict) else record
        if not isinstance(messages, list) or not messages:
            raise UserError(f"{path}, line {line}: expected a list of messages")
        if (line % IDENTITY_HELD_OUT == 0) == (split == "test"):
            items.append(dict(id=f"identity_conversations/{split}/{line}", messages=messages))
    return items


def make(root=None, cache_dir=data.CACHE, identity: str = IDENTITY) -> dict[str, Task]:
    """The tasks of the Hub by name, with their data from one place.

    root: a folder that holds data sets as USER/NAME/CONFIG/SPLIT/*.parquet or as clones of their
    repositories (USER/NAME/CONFIG/SPLIT-*.parquet or USER/NAME/data/SPLIT-*.parquet); then nothing
    is downloaded. cache_dir: where lists of files are kept, and where files put by hand are looked
    for first. identity: address of the identity conversations.
    """
    place = Place(root and str(root), str(cache_dir), identity)
    tasks = {}
    for name, source in SOURCES.items():
        items = partial(hub_items, place, name)
        tasks[name] = Task(source.kind, items, source.baseline, source.grade)
    tasks["identity_conversations"] = Task("perplexity", partial(identity_items, place), None)
    return tasks


TASKS: dict[str, Task] = {**STDLIB, **make()}
