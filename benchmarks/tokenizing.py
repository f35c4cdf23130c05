"""Tokenizer speed on the standard library's source text: seconds to train, MB/s to encode on
threads and on processes.

python -m benchmarks.tokenize --vocab-sizes 4096 32768 --workers 1 2 --json out.json
"""

import os
import sys

# Run as a file, Python looks for modules here first, and then this file hides the standard
# library's tokenize.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [os.path.dirname(_HERE), *(p for p in sys.path if os.path.abspath(p) != _HERE)]
if __name__ == "tokenize":  # something wanted that one: hand it over
    del sys.modules["tokenize"]
    import tokenize  # noqa: F401


def _start(tokenizer):
    global _tokenizer
    _tokenizer = tokenizer
    tokenizer.encode("warm")


def _encode(text):
    import numpy as np

    return np.array(_tokenizer.encode(text), np.int32)


def main(
    vocab_sizes: tuple[int, ...] = (4096, 32768),
    workers: tuple[int, ...] = (1, 2),
    max_chars: int = 2_000_000_000,
    json: str = "",
):
    """Train and time one tokenizer per vocabulary size.

    Args:
        vocab_sizes: ids, special tokens included
        workers: numbers of threads, and of processes, to encode with
        max_chars: characters of the corpus to use
        json: file to write the rows to
    """
    import multiprocessing
    import time
    from concurrent.futures import ProcessPoolExecutor

    from lib.data import documents
    from lib.data.tokenizer import Tokenizer
    from lib.files import write_json

    texts, size = [], 0
    for text in documents("stdlib", "train"):
        if size >= max_chars:
            break
        texts.append(text[: max_chars - size])
        size += len(text)
    mb = sum(len(t.encode()) for t in texts) / 1e6
    print(f"standard library: {len(texts):,} documents, {mb:.1f} MB, {os.cpu_count()} cores")
    rows = []
    for vocab_size in vocab_sizes:
        start = time.perf_counter()
        tokenizer = Tokenizer.train(texts, vocab_size)
        row = {"vocab_size": vocab_size, "train_s": time.perf_counter() - start}
        tokenizer.encode("warm")
        for n in workers:
            start = time.perf_counter()
            ids = tokenizer.encode_batch(texts, threads=n)
            row[f"threads_{n}_mb_per_s"] = mb / (time.perf_counter() - start)
        row["bytes_per_token"] = mb * 1e6 / sum(map(len, ids))
        for n in workers:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(n, context, initializer=_start, initargs=(tokenizer,)) as pool:
                list(pool.map(_encode, ["start every worker"] * 4 * n))
                start = time.perf_counter()
                list(pool.map(_encode, texts, chunksize=16))
                row[f"processes_{n}_mb_per_s"] = mb / (time.perf_counter() - start)
        rows.append(row)
        if len(rows) == 1:
            print("  ".join(f"{name:>{max(len(name), 8)}}" for name in row))
        print(
            "  ".join(
                f"{value:>{max(len(name), 8)}.{2 if isinstance(value, float) else 0}f}"
                for name, value in row.items()
            )
        )
    if json:
        write_json(
            json, {"documents": len(texts), "megabytes": mb, "cores": os.cpu_count(), "rows": rows}
        )


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
