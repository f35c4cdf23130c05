"""`python -m lib.data.records`: tokenises a text once, into a corpus of array_record files.

As many workers as one starts share the shards (`--worker 3/16`); each shard is made once, and who
runs again goes on where they stopped. `write_texts` does the same below another engine, such as
datatrove or Beam: each of its tasks hands its texts on.
"""

import hashlib
import itertools
import os
import re
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lib.data import record_files
from lib.data.corpus import TOKENIZER, Entry, bring, read_corpus, read_whole
from lib.data.download import CACHE
from lib.data.record_files import CorpusShard, part_name
from lib.data.regions import warn_if_far
from lib.data.sources import SPLITS, Shard, find_shards
from lib.data.tokenizer import Tokenizer
from lib.data.tokens import TokenShard, tokenised
from lib.files import UserError, join, local_path, sha256

# documents that are tokenised together, and form a row group
GROUP = 1024


def write(
    source: str,
    to: str,
    tokenizer: str = "",
    worker: str = "1/1",
    shards: int = 8,
    processes: int = 0,
    cache_dir: str = str(CACHE),
):
    """Tokenise a text into a corpus of array_record files; run again, it goes on.

    Args:
        source: a name, or a path or glob, as in 02_train
        to: where the corpus goes: a folder, gs://bucket/corpus or s3://bucket/corpus
        tokenizer: a run folder or tokenizer.json; empty for the one that the corpus has already
        worker: which of how many this is, from 1/16 to 16/16
        shards: training shards of a source on the Hub
        processes: that tokenise at once (0: one per core, at most 8)
        cache_dir: where downloads and looks at files are kept
    """
    number, count = _parse_worker(worker)
    record_files.package()
    warn_if_far(to)
    words = _tokenizer(to, tokenizer)
    texts = _texts(source, shards, cache_dir)
    parts = list(texts)
    # a folder may be called otherwise on another machine
    title = Path(source).name if Path(source).exists() else source
    plan = record_files.begin(to, title, words, parts)

    # each worker makes every count-th shard, and leaves out what is there
    own = record_files.missing(to, parts[number - 1 :: count])
    print(f"worker {number} of {count}: {len(own)} of {len(parts)} shards are to be made")

    def make(part: CorpusShard) -> Entry:
        with tempfile.TemporaryDirectory() as folder:
            spec = Path(folder, TOKENIZER)
            words.save(spec)
            shard = tokenised(texts[part], spec, Path(folder, "ids.npy"))
            return record_files.write_shard(to, part, shard, words)

    with ThreadPoolExecutor(processes or min(os.cpu_count() or 1, 8)) as pool:
        try:
            for entry in pool.map(make, own):
                print(f"{entry.name}: {entry.documents:,} documents, {entry.tokens:,} tokens")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    record_files.finish(to, plan, parts)


def check(at: str):
    """Read a whole corpus and compare it with its checksums.

    Args:
        at: where it stands: a folder, gs://bucket/corpus or s3://bucket/corpus
    """
    corpus = read_corpus(at)
    for entry in corpus.entries:
        for name, digest in entry.files.items():
            with tempfile.TemporaryDirectory() as folder:
                bring(corpus.address, name, Path(folder, name))
                if sha256(Path(folder, name)) != digest:
                    raise UserError(f"{join(at, name)} does not match its checksum: write it again")
    tokens = sum(entry.tokens for entry in corpus.entries)
    print(f"{at}: {len(corpus.entries)} shards, {tokens:,} tokens, all as they were written")


def write_texts(texts: Iterable[str], to: str, tokenizer: Tokenizer, task: int, tasks: int):
    """Write what one task of another engine hands on, as one shard of a corpus.

    task: counted from 0, of `tasks`, which are two or more: the last one's texts validate. Texts
    without a character are left out. Whichever task ends last writes the manifest; a task whose
    shard is there already does nothing.
    """
    if not 0 <= task < tasks or tasks < 2:
        raise UserError(
            f"task {task} of {tasks} is out of range: tasks are counted from 0, and take two"
        )
    record_files.package()
    parts = [CorpusShard(part_name("train", i, tasks - 1), "train", "") for i in range(tasks - 1)]
    parts.append(CorpusShard(part_name("val", 0, 1), "val", ""))
    plan = record_files.begin(to, "texts of another engine", tokenizer, parts)

    if record_files.missing(to, [parts[task]]):
        # half a character becomes a question mark, as in files that are read here
        sound = (text.encode("utf-8", "replace").decode() for text in texts if text)
        shard = _tokens(sound, tokenizer)
        if not shard.ids.size and parts[task].split == "val":
            raise UserError(
                f"the last of {tasks} tasks, whose text validates, has none: take no more tasks "
                "than there are files, and another place to write to"
            )
        part = parts[task]._replace(identity=hashlib.sha256(shard.ids.tobytes()).hexdigest())
        record_files.write_shard(to, part, shard, tokenizer)
    record_files.finish(to, plan, parts)


def _tokens(texts: Iterable[str], tokenizer: Tokenizer) -> TokenShard:
    """All tokens of some texts, GROUP of them at a time."""
    texts = iter(texts)
    ids, groups, size = [np.empty(0, np.uint32)], [], 0
    while group := list(itertools.islice(texts, GROUP)):
        ids += [np.array(row, np.uint32) for row in tokenizer.encode_batch(group, bos=True)]
        groups.append(len(group))
        size += sum(len(text.encode()) for text in group)
    return TokenShard(np.concatenate(ids), groups, size)


def _parse_worker(worker: str) -> tuple[int, int]:
    """(which, of how many) of a text such as 3/16."""
    match = re.fullmatch(r"(\d+)/(\d+)", worker.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(
            f"worker {worker} is out of range: workers are counted from 1, as in 1/16 to 16/16"
        )
    return int(match[1]), int(match[2])


def _tokenizer(to: str, path: str) -> Tokenizer:
    """The tokenizer at a path, or the one that the corpus has already."""
    if path:
        place = local_path(path)
        return Tokenizer.load(place / TOKENIZER if place.is_dir() else place)
    text = read_whole(to, TOKENIZER)
    if text is None:
        raise UserError(f"{to} has no tokenizer yet: pass --tokenizer runs/NAME, which 01 makes")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, TOKENIZER).write_bytes(text)
        return Tokenizer.load(Path(folder, TOKENIZER))


def _texts(source: str, shards: int, cache_dir: str) -> dict[CorpusShard, Shard]:
    """All shards of both sides of a text, by the shards that they become."""
    texts = {}
    for split in SPLITS:
        sides = find_shards(source, split, shards, cache_dir)
        for i, shard in enumerate(sides):
            texts[CorpusShard(part_name(split, i, len(sides)), split, shard.identity)] = shard
    return texts


if __name__ == "__main__":
    import tyro

    from lib.notebook import setup

    setup()
    tyro.extras.subcommand_cli_from_dict(
        {"write": write, "check": check}, prog="python -m lib.data.records"
    )
