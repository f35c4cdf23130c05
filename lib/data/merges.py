"""Learning a byte-level BPE vocabulary: rustbpe, in a process of its own where the text is long.

It merges for half a minute then, and holds Python's lock meanwhile: here no bar could move, and
Ctrl-C would have to wait.
"""

import contextlib
import itertools
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import rustbpe

from lib.files import UserError
from lib.runtime import show_waiting

# what is shorter is learnt here, within a second or so
APART_CHARS = 1 << 20

# a text is sent behind its length in bytes, which takes so many; this is no length but the end
LENGTH_BYTES = 8
END = (1 << 64) - 1


def learn(texts: Iterable[str], size: int, pattern: str) -> tuple[bytes, ...]:
    """The bytes of `size` tokens, fewer if the text does not support so many: the 256 single ones,
    then what was merged, in that order. pattern: what cuts a text into words.
    """
    stream, first, chars = iter(texts), [], 0
    for text in stream:
        first.append(text)
        chars += len(text)
        if chars > APART_CHARS:
            return _learn_apart(itertools.chain(first, stream), size, pattern)
    return _learn_here(first, size, pattern)


def _learn_here(texts: Iterable[str], size: int, pattern: str) -> tuple[bytes, ...]:
    bpe = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    bpe.train_from_iterator(iter(texts), size, buffer_size=512, pattern=pattern)
    return tuple(token for token, _ in bpe.get_mergeable_ranks())


# ---- in a process of its own ---------------------------------------------------------------------


def _learn_apart(texts: Iterable[str], size: int, pattern: str) -> tuple[bytes, ...]:
    """`_learn_here` by a worker, which ends with this process or with what stops it here."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        worker = subprocess.Popen(
            [sys.executable, "-m", "lib.data.merges"],
            cwd=Path(__file__).resolve().parents[2],
            # Ctrl-C is for this process, which tells the worker
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert worker.stdin and worker.stdout
        answer = worker.stdout
        try:
            # where it died early, its return code tells why
            with contextlib.suppress(BrokenPipeError):
                _send(worker.stdin, json.dumps([size, pattern]), texts)
            show_waiting(lambda seconds: _is_ready(answer, seconds), desc="merging")
            lines = answer.read().decode().split()
            code = worker.wait()
        except BaseException:
            worker.kill()
            raise
        finally:
            answer.close()
            worker.wait()

        if code < 0:
            raise UserError(
                f"the process that learns the vocabulary was killed by signal {-code}, most often "
                "for lack of memory: lower max_chars or doc_cap and run again"
            )
        if code:
            errors.seek(0)
            raise RuntimeError(f"learning the vocabulary failed:\n{errors.read()}")
    return tuple(bytes.fromhex(line) for line in lines)


def _is_ready(pipe: IO[bytes], seconds: float) -> bool:
    """Whether there is something to read, or the other side has gone; waits so long at most."""
    return bool(select.select([pipe], [], [], seconds)[0])


def _send(pipe: IO[bytes], order: str, texts: Iterable[str]):
    """The order as a line, then the texts, then that they have ended."""
    with pipe:
        pipe.write(order.encode() + b"\n")
        for text in texts:
            data = text.encode()
            pipe.write(len(data).to_bytes(LENGTH_BYTES, "little"))
            pipe.write(data)
        pipe.write(END.to_bytes(LENGTH_BYTES, "little"))


def _received(pipe: IO[bytes]) -> Iterator[str]:
    """The texts that `_send` sends; a sender that is gone before the end ends this process."""
    while True:
        header = pipe.read(LENGTH_BYTES)
        if len(header) < LENGTH_BYTES:
            os._exit(1)
        length = int.from_bytes(header, "little")
        if length == END:
            return
        yield pipe.read(length).decode()


if __name__ == "__main__":  # the worker of `_learn_apart`
    wanted, words = json.loads(sys.stdin.buffer.readline())
    learnt = _learn_here(_received(sys.stdin.buffer), wanted, words)
    sys.stdout.write("\n".join(token.hex() for token in learnt))
