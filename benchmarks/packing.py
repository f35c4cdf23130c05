"""What each way of packing costs on the standard library's source text, and how fast it is on one
core.

python -m benchmarks.packing --vocab-sizes 4096 32768 --sequence-lens 512 2048 --json out.json
"""


def kept_whole(tokens, packing: str, sequence_len: int) -> float:
    """Share of the documents that fit the context that one epoch shows in one piece."""
    import numpy as np

    from lib import data

    fitting, shown = set(), set()
    for shard in tokens:
        begins = np.flatnonzero(shard.ids == tokens.bos)
        for document in np.split(shard.ids.astype(np.int32), begins[1:]):
            if document.size <= sequence_len + 1:
                fitting.add(document.tobytes())
    for inputs, targets, _ in data.batches(tokens, 8, sequence_len, packing=packing, loop=False):
        for row in np.c_[inputs, targets[:, -1]]:
            shown |= {piece.tobytes() for piece in np.split(row, np.flatnonzero(row == tokens.bos))}
    return len(fitting & shown) / len(fitting)


def main(
    vocab_sizes: tuple[int, ...] = (4096, 32768),
    sequence_lens: tuple[int, ...] = (512, 2048),
    json: str = "",
) -> list[dict]:
    """Pack two epochs' worth of tokens in batches of 8 rows, for every vocabulary size, context and
    way of packing.

    Args:
        vocab_sizes: ids, special tokens included; a tokenizer is trained for each
        sequence_lens: tokens of context
        json: file to write the rows to
    """
    import itertools
    import tempfile
    import time

    from lib import data
    from lib.data.tokenizer import Tokenizer
    from lib.files import write_json

    rows = []
    for vocab_size in vocab_sizes:
        tokenizer = Tokenizer.train(data.documents("stdlib", "train"), vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            tokens = data.open_tokens("stdlib", "train", tokenizer, cache_dir=folder)
            size = sum(shard.ids.size for shard in tokens)
            print(
                f"vocabulary {vocab_size}: {size:,} tokens in "
                f"{sum(sum(s.groups) for s in tokens)} "
                "documents"
            )
            for sequence_len, packing in itertools.product(sequence_lens, data.PACKING):
                steps, start = 2 * size // (8 * sequence_len), time.process_time()
                *_, (_, _, cursor) = itertools.islice(
                    data.batches(tokens, 8, sequence_len, packing=packing), steps
                )
                speed = steps * 8 * sequence_len / (time.process_time() - start) / 1e6
                whole = kept_whole(tokens, packing, sequence_len)
                rows.append(
                    dict(
                        vocab_size=vocab_size,
                        sequence_len=sequence_len,
                        packing=packing,
                        **data.waste(cursor),
                        kept_whole=whole,
                        mtokens_per_s=speed,
                    )
                )
                print(
                    f"  {sequence_len:5} {packing:10}"
                    + "".join(
                        f"  {name} {rows[-1][name]:7.2%}"
                        for name in ("discarded", "padding", "added", "kept_whole")
                    )
                    + f"  {speed:6.1f} Mtok/s"
                )
    if json:
        write_json(json, rows)
    return rows


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
