"""Other people's tokenizer.json as a Tokenizer of ours: byte-level BPE, in our order of ids.

Ours are ordered by merges with our special tokens behind, so ids change: `Vocabulary.theirs` tells
which row of their tables each id of ours reads.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from lib.files import UserError, read_json
from lib.interop.tokenizer_files import LETTERS

BYTES = {letter: byte for byte, letter in LETTERS.items()}

# what a ByteLevel pre-tokenizer splits by when it uses its own pattern, GPT-2's
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same behind a pre-tokenizer that has cut out every digit: blanks before one stay together
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


class Vocabulary(NamedTuple):
    """A tokenizer of ours, which old id each of its ids has (-1: none), what is not as it was."""

    tokenizer: Tokenizer
    theirs: np.ndarray
    lost: tuple[str, ...]


def read_tokenizer(folder: Path, bos: int | None, source: str) -> Vocabulary:
    """The tokenizer of a model's folder. bos: their id of what begins a document.

    UserError where its tokenizer.json is missing or is not byte-level BPE.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(
            f"{source} has no tokenizer.json: only byte-level BPE in that form comes along"
        )
    data = read_json(path, cure="get it again")
    model = data.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UserError(
            f"the tokenizer of {source} is no byte-level BPE (its type is {model.get('type')}"
            f"{', on characters' if model.get('byte_fallback') else ''}): it cannot come along"
        )
    # what text is cut by, and the ordinary tokens in our order
    pattern = pattern_of(data.get("pre_tokenizer"), source)
    added = {token["content"]: token["id"] for token in data.get("added_tokens", [])}
    ids = {text: i for text, i in model["vocab"].items() if text not in added}
    texts = in_merge_order(ids, model["merges"])

    # our special tokens: by their name where they were ours before, else only the first has one
    special = [added.get(name, -1) for name in SPECIAL_TOKENS]
    if special[0] < 0 and bos is not None:
        special[0] = bos
    tokenizer = _tokenizer(pattern, texts, source)
    theirs = np.array([ids[text] for text in texts] + special)
    return Vocabulary(tokenizer, theirs, tuple(_losses(data, added, special)))


def pattern_of(pre_tokenizer, source: str) -> str:
    """The one pattern that a pre-tokenizer's steps come to."""
    # one step, or several in a row
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        # the last step spells bytes, and may cut by GPT-2's pattern before that
        own = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and own:
            return GPT2_PATTERN
        if kinds == ["Digits", "ByteLevel"] and own and steps[0].get("individual_digits"):
            return DIGITS_PATTERN
        if kinds == ["Split", "ByteLevel"] and not own and "Regex" in steps[0]["pattern"]:
            return steps[0]["pattern"]["Regex"]
    raise UserError(
        f"the tokenizer of {source} splits text by {' and '.join(map(str, kinds))} in a way that "
        "is not known here"
    )


def in_merge_order(ids: dict[str, int], merges: list) -> list[str]:
    """The tokens in the order that a rank means: bytes, what merges make, then all others."""
    ordered = {text: None for text in ids if len(text) == 1}
    for merge in merges:
        # two forms: "a b" and ["a", "b"]
        joined = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if joined in ids:
            ordered.setdefault(joined)
    # what no merge makes is only reached as a whole word
    for text in sorted(ids, key=lambda text: ids[text]):
        ordered.setdefault(text)
    return list(ordered)


def _tokenizer(pattern: str, texts: list[str], source: str) -> Tokenizer:
    """A Tokenizer of tokens spelled in letters; UserError where it cannot read text back."""
    try:
        tokens = tuple(bytes(BYTES[letter] for letter in text) for text in texts)
    except KeyError as e:
        raise UserError(
            f"the tokenizer of {source} has tokens that spell no bytes ({e.args[0]!r}): "
            "it is not byte-level"
        ) from None
    # read back as a stranger's: it must hold all bytes and give texts back in time
    made = Tokenizer(pattern, tokens, {"source": source})
    return Tokenizer.from_json(made.to_json(), f"the tokenizer of {source}")


def _losses(data: dict, added: dict[str, int], special: list[int]):
    """What of their tokenizer ours does not do, a sentence each."""
    normalizer = data.get("normalizer")
    if normalizer:
        yield f"their tokenizer normalizes text ({normalizer.get('type')}), ours takes it as it is"
    dropped = [name for name, i in added.items() if i not in special]
    if dropped:
        yield f"special tokens left out: {', '.join(dropped[:5])} ({len(dropped)} in all)"
    if special.count(-1):
        yield (
            "the marks of a chat are new to the model and begin as the mean of all tokens: "
            "fine-tune it with 04 before you chat"
        )
