"""Other people's byte-level BPE as a Tokenizer of ours, from a tokenizer.json or tiktoken's file.

Ours are ordered by merges with our special tokens behind, so ids change: `theirs` of an
ImportedVocabulary tells which row of their tables each id of ours reads.
"""

import base64
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from lib.files import UserError, read_bytes, read_json
from lib.interop.tokenizer_files import LETTERS

BYTES = {letter: byte for byte, letter in LETTERS.items()}

# what a ByteLevel pre-tokenizer splits by when it uses its own pattern, GPT-2's
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same behind a pre-tokenizer that has cut out every digit: blanks before one stay together
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# what Llama 3 and Qwen split by: they differ in how many digits stay together
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_PATTERN = _WORDS % "{1,3}"
QWEN_PATTERN = _WORDS % ""
# type of a model: the pattern that goes with its file of tiktoken's, which holds none
PATTERNS = {"llama": LLAMA_PATTERN, "qwen3": QWEN_PATTERN}
# how those files are called
RANKS = ("tokenizer.model", "*.tiktoken")


class ImportedVocabulary(NamedTuple):
    """A tokenizer of ours, which old id each of its ids has (-1: none), what is not as it was."""

    tokenizer: Tokenizer
    theirs: np.ndarray
    lost: tuple[str, ...]


def read_tokenizer(
    folder: Path, bos: int | None, source: str, model_type: str
) -> ImportedVocabulary:
    """The tokenizer of a model's folder. bos: their id of what begins a document.

    UserError where there is neither a tokenizer.json nor a file of tiktoken's, and where it is not
    byte-level BPE.
    """
    if (folder / "tokenizer.json").exists():
        data = read_json(folder / "tokenizer.json", cure="get it again")
        return _from_json(data, bos, source)
    for pattern in RANKS:
        for path in sorted(folder.glob(pattern)):
            return _from_ranks(path, bos, source, PATTERNS[model_type])
    raise UserError(
        f"{source} has no tokenizer.json and no file of tiktoken's: only byte-level BPE in one of "
        "these forms comes along"
    )


def _from_json(data: dict, bos: int | None, source: str) -> ImportedVocabulary:
    """What a tokenizer.json holds."""
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

    special = _special(added, bos)
    tokenizer = _tokenizer(pattern, _as_bytes(texts, source), source)
    theirs = np.array([ids[text] for text in texts] + special)
    return ImportedVocabulary(
        tokenizer, theirs, tuple(_losses(data.get("normalizer"), added, special))
    )


def _from_ranks(path: Path, bos: int | None, source: str, pattern: str) -> ImportedVocabulary:
    """What a file of tiktoken's holds: a token in base64 and its rank a line, in order of merges.

    The names of its special tokens stand in tokenizer_config.json, if anywhere.
    """
    ranks: dict[bytes, int] = {}
    for line in read_bytes(path).splitlines():
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(
                f"{path.name} of {source} is none of tiktoken's files (a token in base64 and its "
                "rank on each line): tokenizers of SentencePiece cannot come along"
            ) from None

    # special tokens are behind them
    settings = path.with_name("tokenizer_config.json")
    named = {}
    if settings.exists():
        named = read_json(settings, cure="get it again").get("added_tokens_decoder") or {}
    added = {token["content"]: int(i) for i, token in named.items()}
    special = _special(added, bos)

    tokens = tuple(sorted(ranks, key=lambda token: ranks[token]))
    theirs = np.array([ranks[token] for token in tokens] + special)
    tokenizer = _tokenizer(pattern, tokens, source)
    return ImportedVocabulary(tokenizer, theirs, tuple(_losses(None, added, special)))


def _special(added: dict[str, int], bos: int | None) -> list[int]:
    """Their ids of our special tokens, -1 where they have none.

    By their name where they were ours before, else only what begins a document has one.
    """
    special = [added.get(name, -1) for name in SPECIAL_TOKENS]
    if special[0] < 0 and bos is not None:
        special[0] = bos
    return special


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


def _as_bytes(texts: list[str], source: str) -> tuple[bytes, ...]:
    """Tokens that are spelled in letters; UserError where they are not."""
    try:
        return tuple(bytes(BYTES[letter] for letter in text) for text in texts)
    except KeyError as e:
        raise UserError(
            f"the tokenizer of {source} has tokens that spell no bytes ({e.args[0]!r}): "
            "it is not byte-level"
        ) from None


def _tokenizer(pattern: str, tokens: tuple[bytes, ...], source: str) -> Tokenizer:
    """A Tokenizer of a stranger's tokens; UserError where it cannot read text back."""
    # it must hold all bytes and give texts back in time
    made = Tokenizer(pattern, tokens, {"source": source})
    return Tokenizer.from_json(made.to_json(), f"the tokenizer of {source}")


def _losses(normalizer: dict | None, added: dict[str, int], special: list[int]):
    """What of their tokenizer ours does not do, a sentence each."""
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
