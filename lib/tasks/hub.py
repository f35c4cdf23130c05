"""Tasks whose data comes from the Hugging Face Hub, from a folder of files of the same schema, or from a JSONL file of the user's own.

The Hub keeps a parquet copy of every data set; its list of files, then the files, are downloaded once into the cache. A folder that
holds the same files (a copied cache, or clones of the data sets) takes the place of both: see `make`.
"""

import json
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

import numpy as np

from lib import data
from lib.files import UserError
from lib.sandbox import run_python
from lib.tasks import Task
from lib.tasks.stdlib import TASKS as STDLIB

# seed of the order of items, so that the first few are a fair sample; nanochat's order too
ORDER = 42
IDENTITY = "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl"
IDENTITY_HELD_OUT = 20  # of those one conversation in so many is for tests
LISTING = "listing.json"


# ---- files -----------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where data comes from: a folder `root`, else the cache below `cache_dir`, filled from the Hub."""

    root: str | None = None
    cache_dir: str = data.CACHE
    hub: str = data.HUB
    token: str | None = None
    identity: str = IDENTITY


def parquet_files(place: Place, repo: str, config: str, split: str) -> list[Path]:
    """The parquet files of one split of a Hub data set in order, downloaded unless they are there."""
    if place.root:
        shapes = (
            f"{config}/{split}/*.parquet",
            f"{config}/{split}-*.parquet",
            f"data/{split}-*.parquet",
        )
        for shape in shapes:
            for folder in (repo, repo.rpartition("/")[2]):
                if found := sorted(Path(place.root, folder).glob(shape)):
                    return found
        raise UserError(
            f"no data of {repo} ({config}, {split}) in {place.root}: put its parquet files at "
            f"{Path(place.root, repo, config, split)}"
        )
    folder = Path(place.cache_dir, "hub", repo, config, split)
    listing = folder / LISTING
    if not listing.exists() and (found := sorted(folder.glob("*.parquet"))):
        return found  # put there by hand
    # two tries: without a network a dozen tasks should not take minutes to say so
    data.fetch(
        f"{place.hub}/api/datasets/{repo}/parquet/{config}/{split}", listing, place.token, tries=2
    )
    try:
        urls = [url.replace(data.HUB, place.hub, 1) for url in json.loads(listing.read_text())]
        if not urls:
            raise ValueError
    except (ValueError, AttributeError, TypeError):
        listing.unlink()
        raise UserError(
            f"{place.hub} gave no list of parquet files for {repo} ({config}, {split}): does it have that split?"
        ) from None
    files = [folder / f"{i:04d}.parquet" for i in range(len(urls))]
    for url, file in zip(urls, files):
        data.fetch(url, file, place.token if url.startswith(place.hub + "/") else None)
    return files


def rows(place: Place, repo: str, config: str, split: str, columns: list[str]) -> list[dict]:
    """All rows of one split of a Hub data set, `columns` only, in the order of its files."""
    import pyarrow
    import pyarrow.parquet

    found = []
    for path in parquet_files(place, repo, config, split):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if missing := set(columns) - set(file.schema_arrow.names):
                    raise UserError(
                        f"{path} has no column {', '.join(sorted(missing))}, only {', '.join(file.schema_arrow.names)}: is"
                        f" it of {repo}?"
                    )
                found += file.read(columns).to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as e:
            raise UserError(
                f"cannot read {path} as parquet ({str(e).splitlines()[0]}): delete it and run again"
            ) from e
    return found


# ---- rows -> items ---------------------------------------------------------------------------------------------------


def choice_item(
    id: str, question: str, options: list[str], gold: int, letters=None, **more
) -> dict:
    """A multiple choice question as a chat whose answer is one letter.

    A letter stands behind its option, for a model that finds an option reads on to its letter, and behind "=" with no blank, for
    " A" and "A" are different tokens and the answer begins with "A". White space around question and options is dropped.
    """
    letters = list(letters or ascii_uppercase[: len(options)])
    if not 0 <= gold < len(options) == len(letters) or len(set(letters)) < len(letters):
        raise ValueError(f"{len(options)} options, letters {letters}, answer {gold}")
    question, options = question.strip(), [option.strip() for option in options]
    lines = "".join(f"- {option}={letter}\n" for option, letter in zip(options, letters))
    asked = f"{question}\n\n{lines}\nAnswer with the letter alone."
    messages = [dict(role="user", content=asked), dict(role="assistant", content=letters[gold])]
    return dict(
        id=id,
        messages=messages,
        letters=letters,
        gold=gold,
        question=question,
        options=options,
        **more,
    )


def shuffled(item: dict, order: list[int]) -> dict:
    """A choice or likelihood item with its options in another order: option i is the old order[i]."""
    gold = order.index(item["gold"])
    if "letters" in item:
        if "options" not in item:
            raise UserError(
                f"item {item['id']} does not tell its options apart, so their order cannot be changed"
            )
        return item | choice_item(
            item["id"], item["question"], [item["options"][i] for i in order], gold, item["letters"]
        )
    move = lambda of: [of[i] for i in order] if isinstance(of, list) else of
    return item | dict(context=move(item["context"]), choices=move(item["choices"]), gold=gold)


def smoltalk(row, id):
    return dict(id=id, messages=row["messages"])


def mmlu(row, id):
    return choice_item(id, row["question"], row["choices"], row["answer"], subject=row["subject"])


def arc(row, id):
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    return choice_item(id, row["question"], texts, labels.index(row["answerKey"]), labels)


def gsm8k(row, id):
    """The solution with each <<12*3=36>> as a use of the calculator and its answer; the value after #### is the item's answer."""
    parts = []
    for i, piece in enumerate(re.split(r"<<(.*?)>>", row["answer"])):
        if i % 2:
            expression, _, result = piece.rpartition("=")
            parts += [dict(type="python", text=expression), dict(type="python_output", text=result)]
        elif piece:
            parts.append(dict(type="text", text=piece))
    if (answer := number_after_mark(row["answer"])) is None:
        raise ValueError("no number after ####")
    messages = [
        dict(role="user", content=row["question"].strip()),
        dict(role="assistant", content=parts),
    ]
    return dict(id=id, messages=messages, answer=str(answer))


def number(text: str) -> Decimal | None:
    """The number that a text begins with: "$1,234.", "-0.50" and "5 %" are 1234, -0.5 and 5."""
    found = re.match(r"\s*([-+−]?)\s*[$€£]?\s*([-−]?)(\d[\d,]*(?:\.\d+)?|\.\d+)", text)
    if not found:
        return None
    try:
        value = Decimal(found[3].replace(",", ""))
    except InvalidOperation:  # pragma: no cover  (the pattern lets only numbers through)
        return None
    return -value if found[1] in "-−" and found[1] or found[2] else value


def number_after_mark(text: str) -> Decimal | None:
    """The number behind the first ####, as GSM8K's own grader takes it."""
    before, mark, after = text.partition("####")
    return number(after) if mark else None


def grade_gsm8k(item, text) -> bool:
    given = number_after_mark(text)
    return given is not None and given == Decimal(item["answer"])


def humaneval(row, id):
    solution = f"```python\n{row['prompt']}{row['canonical_solution']}```"
    messages = [
        dict(role="user", content=f"Complete this Python program:\n```python\n{row['prompt']}```"),
        dict(role="assistant", content=solution),
    ]
    return dict(
        id=id,
        messages=messages,
        prompt=row["prompt"],
        test=row["test"],
        entry_point=row["entry_point"],
    )


def program_of(text: str) -> str:
    """The code of an answer: its first fenced block, closed or not, else all of it."""
    text = re.sub(r"<\|\w+\|>", "", text)
    found = re.search(r"```(?:[Pp]ython[3]?|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.S)
    return found[1] if found else text


def grade_humaneval(item, text) -> bool:
    """Whether the program passes the item's tests in the sandbox.

    The prompt stays in front of it whole, with its imports and helper functions: an answer that defines the function asked for replaces the
    unfinished one, any other is taken for its body.
    """
    code = program_of(text)
    defines = re.search(rf"^(async )?def {re.escape(item['entry_point'])}\b", code, re.M)
    program = (
        item["prompt"].rstrip() + "\n    pass\n\n" + code if defines else item["prompt"] + code
    )
    return run_python(f"{program}\n\n{item['test']}\n\ncheck({item['entry_point']})\n").ok


def hellaswag(row, id):
    def plain(text):  # marks of the how-to articles that half of the items come from
        return re.sub(
            r" {2,}", " ", re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        ).strip()

    context = plain(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return dict(
        id=id,
        context=context,
        choices=[" " + plain(ending) for ending in row["endings"]],
        gold=int(row["label"]),
    )


def piqa(row, id):
    choices = [" " + row["sol1"].strip(), " " + row["sol2"].strip()]
    return dict(
        id=id,
        context=f"Question: {row['goal'].strip()}\nAnswer:",
        choices=choices,
        gold=int(row["label"]),
    )


def winogrande(row, id):
    """Two contexts, one continuation: what follows the blank is scored after each way to fill it (Trinh and Le 2018)."""
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
    context, _, word = row["text"].strip().rpartition(" ")
    return dict(id=id, context=context, choices=[" " + word], gold=0)


def wikitext_articles(found: list[dict]) -> list[dict]:
    """Lines joined into articles: each begins with a line such as " = Title = "."""
    articles = []
    for row in found:
        if (
            re.fullmatch(r" = (?!=).* = \n?", row["text"])
            and not row["text"].endswith("= = \n")
            or not articles
        ):
            articles.append([])
        articles[-1].append(row["text"])
    return [dict(text="".join(lines)) for lines in articles if "".join(lines).strip()]


def wikitext(row, id):
    """An article as people write; its words are counted as the data set has them, where every sign is a word."""
    return dict(id=id, text=detokenised(row["text"]), words=len(row["text"].split()))


def detokenised(text: str) -> str:
    """WikiText's tokens put together again: "1 @,@ 000 ( km ) , and" becomes "1,000 (km), and"."""
    for pattern, to in (
        (r" @([-,.])@ ", r"\1"),
        (
            r"^ ?((?:= )+)(.*?)((?: =)+) ?$",
            lambda m: f"{m[1].replace(' ', '')} {m[2]} {m[3].replace(' ', '')}",
        ),
        (r" ([,.;:!?%)\]}])", r"\1"),
        (r"([(\[{$£]) ", r"\1"),
        (r'" ([^"\n]*?) "', r'"\1"'),
        (r" (n't|'(?:s|re|ve|ll|d|m|t)\b)", r"\1"),
        (r"(s) ' ", r"\1' "),
        (r"^ +| +$", ""),
    ):
        text = re.sub(pattern, to, text, flags=re.M)
    return text


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
    found = source.join(
        rows(place, source.repo, source.config, source.splits[split], source.columns.split())
    )
    items = []
    for i in np.random.default_rng(ORDER).permutation(len(found)).tolist():
        try:
            items.append(source.item(found[i], f"{name}/{split}/{i}"))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
            raise UserError(
                f"row {i} of {source.repo} ({source.config}, {source.splits[split]}) is not as task {name} expects "
                f"({type(e).__name__}: {e}): was the data set changed?"
            ) from e
    return items


def identity_items(place: Place, split: str) -> list[dict]:
    """Conversations in which an assistant tells who it is: nanochat's, one list of messages a line."""
    if place.root:
        path = Path(place.root, "identity_conversations.jsonl")
        if not path.is_file():
            raise UserError(
                f"no identity conversations in {place.root}: put them at {path}, one list of messages a line"
            )
    else:
        path = Path(place.cache_dir, "hub", "identity_conversations.jsonl")
        data.fetch(place.identity, path, tries=2)
    items = []
    for number_, record in read_jsonl(path):
        messages = record.get("messages") if isinstance(record, dict) else record
        if not isinstance(messages, list) or not messages:
            raise UserError(f"{path}, line {number_}: expected a list of messages")
        if ((number_ % IDENTITY_HELD_OUT) == 0) == (split == "test"):
            items.append(dict(id=f"identity_conversations/{split}/{number_}", messages=messages))
    return items


def make(
    root=None,
    cache_dir=data.CACHE,
    hub: str = data.HUB,
    token: str | None = None,
    identity: str = IDENTITY,
) -> dict[str, Task]:
    """The tasks of the Hub by name, with their data from one place.

    root: a folder that holds data sets as USER/NAME/CONFIG/SPLIT/*.parquet, which is how the cache (cache_dir/hub) keeps them, or as
    clones of their repositories (USER/NAME/CONFIG/SPLIT-*.parquet or USER/NAME/data/SPLIT-*.parquet); then nothing is downloaded.
    hub: address of the Hub or a mirror; token: for data sets that ask for one; identity: address of the identity conversations.
    """
    place = Place(root and str(root), str(cache_dir), hub, token, identity)
    made = {
        name: Task(s.kind, partial(hub_items, place, name), s.baseline, s.grade)
        for name, s in SOURCES.items()
    }
    return made | {
        "identity_conversations": Task("perplexity", partial(identity_items, place), None)
    }


TASKS: dict[str, Task] = {**STDLIB, **make()}


# ---- a file of the user's own ----------------------------------------------------------------------------------------


def read_jsonl(path):
    """(line number, record) of every line that holds something; UserError names file and line of one that is not JSON."""
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number_, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield number_, json.loads(line)
                    except ValueError as e:
                        raise UserError(f"{path}, line {number_}: not JSON ({e})") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}): convert it first") from e
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e


def _bare(text: str) -> str:
    return " ".join(text.split()).casefold().strip(" .!\"'`")


# How an answer is compared: (given, wanted) -> bool.
MATCH: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda given, wanted: _bare(given) == _bare(wanted),
    "contains": lambda given, wanted: (
        re.search(rf"(?<!\w){re.escape(_bare(wanted))}(?!\w)", _bare(given)) is not None
    ),
    "number": lambda given, wanted: (
        (found := re.findall(r"[-+−]?[$€£]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", given)) != []
        and number(found[-1]) == number(wanted)
    ),
}


def grade_own(item, text) -> bool:
    """What was said after the last use of a tool, against each accepted answer."""
    said = re.sub(r"<\|\w+\|>", "", text.rpartition("<|output_end|>")[2])
    return any(MATCH[item["match"]](said, wanted) for wanted in item["answers"])


def jsonl(path) -> Task:
    """A task from a file of one JSON object a line, all of the same shape; an "id" may be given, else it is the line's number.

    {"question": "…", "choices": ["…", …], "answer": 1}       choice: answered by a letter. answer: a choice's index, text or letter
    {"question": "…", "answer": "…"}                          generate: the model writes. answer: text, or a list of them; "match" is
                                                              exact (case, white space and final stops apart), contains or number (the
                                                              last one written); "messages" may stand for "question"
    {"context": "…", "choices": ["…", …], "answer": 0}        likelihood: which continuation is likelier
    {"text": "…"} or {"messages": [{"role", "content"}, …]}   perplexity: of the text, or of what the assistant says

    UserError names the file and line of anything else.
    """
    path, items, kind, seen = Path(path), [], None, set()
    for number_, record in read_jsonl(path):
        try:
            this, item = own_item(record)
            item["id"] = str(record.get("id", f"{path.stem}/{number_}"))
            if item["id"] in seen:
                raise ValueError(f"the id {item['id']!r} is taken by an earlier line")
            if this != (kind or this):
                raise ValueError(
                    f"a {this} item, but the lines above are {kind} items: make a file of each"
                )
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            why = f"{e.args[0]!r} is missing" if isinstance(e, KeyError) else e
            raise UserError(f"{path}, line {number_}: {why}") from None
        kind = this
        seen.add(item["id"])
        items.append(item)
    if not items:
        raise UserError(f"{path} has no items: write one JSON object a line")
    return Task(
        kind,
        partial(own_split, items),
        None if kind == "perplexity" else 0.0,
        grade_own if kind == "generate" else None,
    )


def own_split(items: list[dict], split: str) -> list[dict]:
    return items if split == "test" else []


def own_item(record: dict) -> tuple[str, dict]:
    """(kind, item without an id) of a line of a user's file; ValueError, KeyError or TypeError says what is wrong with it."""

    def strings(value, what) -> list[str]:
        value = [value] if isinstance(value, str) else value
        if (
            not isinstance(value, list)
            or not value
            or not all(isinstance(v, str) and v.strip() for v in value)
        ):
            raise ValueError(f"{what} must be text, or a list of texts, none of them empty")
        return value

    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    if "choices" in record:
        (context,) = strings(
            record["question" if "question" in record else "context"], "question or context"
        )
        options = strings(record["choices"], "choices")
        answer, letters = record["answer"], ascii_uppercase[: len(options)]
        gold = (
            options.index(answer)
            if answer in options
            else letters.find(answer)
            if isinstance(answer, str) and answer
            else answer
        )
        if not 2 <= len(options) <= 26 or type(gold) is not int or not 0 <= gold < len(options):
            raise ValueError(
                f"answer {answer!r} is none of the {len(options)} choices, by index from 0, text or letter "
                "(2 to 26 are needed)"
            )
        if "question" in record:
            return "choice", choice_item("", context, options, gold)
        choices = [option if option[0].isspace() else " " + option for option in options]
        return "likelihood", dict(context=context, choices=choices, gold=gold)
    if "answer" in record:
        answers, match = strings(record["answer"], "answer"), record.get("match", "exact")
        if match not in MATCH:
            raise ValueError(f"match {match!r} is none of {', '.join(MATCH)}")
        if match == "number" and any(number(answer) is None for answer in answers):
            raise ValueError(f"answer {record['answer']!r} is no number")
        messages = record.get("messages") or [
            dict(role="user", content=strings(record["question"], "question")[0].strip())
        ]
        if checked(messages)[-1]["role"] != "user":
            raise ValueError("messages must end with the user's: the model writes what follows")
        return "generate", dict(
            messages=[*messages, dict(role="assistant", content=answers[0])],
            answers=answers,
            match=match,
        )
    if "messages" in record:
        if not any(m["role"] == "assistant" for m in checked(record["messages"])):
            raise ValueError("no message is the assistant's, so there is nothing to measure")
        return "perplexity", dict(messages=record["messages"])
    if "text" in record:
        return "perplexity", dict(text="\n".join(strings(record["text"], "text")))
    raise ValueError(
        'expected "question" or "context" with "choices" and "answer", "question" with "answer", "messages", or "text"'
    )


def checked(messages) -> list[dict]:
    """The messages of a user's file, unless they have another form than a chat's."""
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    ):
        raise ValueError('messages must be a list of objects with "role" and "content"')
    return messages
