"""What every export must show: run by its own program, it says what our model says."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lib import model
from lib.config import Config
from lib.data.sources import documents
from lib.data.tokenizer import Tokenizer
from lib.files import UserError, replacing

# how far logits may be apart, for each unit of the largest one (1 at least)
CLOSE = 1e-4
GREEDY = 200  # tokens to write, where the context has room for them
PROMPT = 16
TEXTS = 130
TEXT_CHARS = 1000

# texts that tokenizers like to disagree on
HARD_TEXTS = (
    "",
    " ",
    "It's 12345 o'clock, they'LL say; we've 7 and 42.",
    "naïve café, Straße, ½ Ⅷ ٣٤٥, 東京タワー 🙂👍🏽",
    "\ttabs\t\tand  two  blanks \r\n\r\n  lines \n\n\n end   ",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 22, 333, 4444]}\n",
    "https://example.org/a?b=c&d=%20#e -- !!!??? ...",
    "\u00a0non-breaking\u3000wide\u200bzero \ufeffmark",
)


@dataclass(frozen=True)
class Proof:
    """What an export showed.

    difference: largest between two logits, and `bound`, what it may be. greedy: (tokens equal, of
    how many). texts: (texts of equal ids, of how many), None where no tokenizer goes along. lost:
    what the format could not express, a sentence each.
    """

    format: str
    path: Path
    bytes: int
    seconds: float
    difference: float
    bound: float
    greedy: tuple[int, int]
    texts: tuple[int, int] | None = None
    measured: tuple[tuple[str, str], ...] = ()
    lost: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        # all of it, or nothing
        same_logits = self.difference <= self.bound
        same_tokens = self.greedy[0] == self.greedy[1]
        same_texts = self.texts is None or self.texts[0] == self.texts[1]
        return same_logits and same_tokens and same_texts

    def table(self) -> str:
        """The proof for people to read."""
        lines = [
            ("format", self.format),
            ("where", str(self.path)),
            ("size", f"{self.bytes / 1e6:,.1f} MB"),
            ("seconds", f"{self.seconds:.1f}"),
            ("largest logit difference", f"{self.difference:.1e} (may be {self.bound:.1e})"),
            ("greedy tokens equal", f"{self.greedy[0]} of {self.greedy[1]}"),
        ]
        if self.texts:
            lines.append(("texts of equal ids", f"{self.texts[0]} of {self.texts[1]}"))
        lines += self.measured
        lines += [("not expressed", sentence) for sentence in self.lost]
        return "\n".join(f"{label:<25} {text}" for label, text in lines)

    def check(self) -> "Proof":
        """Itself, or a UserError: an export that says something else is not handed out."""
        if not self.holds:
            equal = f"{self.greedy[0]} of {self.greedy[1]} greedy tokens"
            if self.texts:
                equal += f" and {self.texts[0]} of {self.texts[1]} texts"
            raise UserError(
                f"the {self.format} export was not kept: its logits are up to "
                f"{self.difference:.1e} from ours (allowed {self.bound:.1e}), and {equal} are equal"
            )
        return self


def proved(folder, write: Callable[[Path], Any], prove: Callable[[Path], Proof]) -> Proof:
    """Write an export into a folder, prove it there, and only then put it in its place.

    What is not proved never stands where it was asked for.
    """
    start = time.perf_counter()
    with replacing(folder) as draft:
        draft.mkdir()
        write(draft)
        shown = prove(draft).check()
    return replace(shown, path=Path(folder), seconds=time.perf_counter() - start)


def exact(config: Config) -> Config:
    """The config to prove with: float32 all through, the attention that every device has."""
    return config.replace(compute_dtype="float32", attention="einsum", attention_block=0)


def probe_tokens(config: Config, rows: int = 2) -> np.ndarray:
    """Random ids (rows, T) that reach beyond the short windows, as far as the context allows."""
    length = min(config.sequence_len, max(64, min(config.windows) + 32))
    return np.random.default_rng(0).integers(config.vocab_size, size=(rows, length))


def our_logits(params, config: Config, tokens_BT: np.ndarray) -> np.ndarray:
    """What our forward says, in float32."""
    run = jax.jit(lambda params, tokens: model.forward(params, exact(config), tokens)[0])
    return np.asarray(run(params, jnp.asarray(tokens_BT, jnp.int32)))


def apart(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """(largest difference of two logits, what it may be)."""
    bound = CLOSE * max(1.0, float(np.abs(ours).max()))
    difference = float(np.abs(ours - theirs).max())
    # a NaN is no agreement
    return (difference if np.isfinite(difference) else float("inf")), bound


def greedy_prompt(config: Config) -> tuple[list[int], int]:
    """(ids to go on from, how many tokens to write), within the context."""
    prompt = probe_tokens(config, 1)[0][: min(PROMPT, config.sequence_len // 2)]
    return prompt.tolist(), min(GREEDY, config.sequence_len - len(prompt))


def our_greedy(params, config: Config) -> list[int]:
    """What our decoder writes after `greedy_prompt`, the likeliest token each time."""
    from lib.generate import Sampling, generate

    prompt, count = greedy_prompt(config)
    sampling = Sampling(temperature=0, max_tokens=count)
    return list(generate(params, exact(config), [prompt], sampling)[0])


def agreeing(ours: list[int], theirs: list[int]) -> tuple[int, int]:
    """(how many tokens are equal from the first on, how many there are)."""
    count = 0
    while count < min(len(ours), len(theirs)) and ours[count] == theirs[count]:
        count += 1
    return count, max(len(ours), len(theirs))


def probe_texts() -> list[str]:
    """Texts to compare tokenizers on: the hard ones, then pieces of documents."""
    texts: list[str] = [*HARD_TEXTS]
    for document in documents("stdlib", "val"):
        texts += [document[i : i + TEXT_CHARS] for i in range(0, len(document), TEXT_CHARS)]
        if len(texts) >= TEXTS:
            break
    return texts[:TEXTS]


def agreeing_texts(tokenizer: Tokenizer, encode: Callable[[str], Any]) -> tuple[int, int]:
    """(texts that another program makes the same ids of, <|bos|> first; texts tried)."""
    texts = probe_texts()
    equal = sum(list(encode(text)) == tokenizer.encode(text, bos=True) for text in texts)
    return equal, len(texts)


def folder_size(folder) -> int:
    """Bytes of all files below a folder, or of one file."""
    path = Path(folder)
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
