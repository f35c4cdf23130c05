"""Bits per byte: how well a model foresees text, of all of it and by kind of text."""

import ast
import io
import itertools
import keyword
import math
import re
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from lib.config import Config
from lib.evals import likelihood, stats
from lib.model import token_losses as _token_losses

token_losses = jax.jit(_token_losses, static_argnames="config")


class Bits(NamedTuple):
    """How well a text was foreseen. stderr: of bpb, None where fewer than two rows hold text; loss:
    nats per target that stands for text.
    """

    bpb: float
    stderr: float | None
    nats: float
    bytes: int
    loss: float


class Span(NamedTuple):
    """Characters start to end of a text, all of one kind."""

    start: int
    end: int
    kind: str


# ---- of batches


def target_bytes(targets, token_bytes) -> np.ndarray:
    """Bytes of text that each target stands for: 0 for ignored ones and for special tokens."""
    targets = np.asarray(targets)
    sizes = np.asarray(token_bytes)[np.maximum(targets, 0)]
    return np.where(targets >= 0, sizes, 0)


def bits_per_byte(
    params,
    config: Config,
    batches: Iterable,
    token_bytes,
    max_batches: int | None = None,
    losses_of: Callable = token_losses,
) -> Bits:
    """`Bits` over (inputs_BT, targets_BT, ...) batches of one shape, independent of the vocabulary.

    The sum of nats / (ln 2 * the sum of bytes), over targets that stand for text. token_bytes: raw
    UTF-8 bytes per token id, 0 for specials. Without any bytes bpb is inf. The rows are the
    independent draws of the standard error. losses_of: `token_losses`, or several devices'.
    """
    # by rows, which the error is made of
    nats = []
    sizes = []
    tokens = 0
    for inputs_BT, targets_BT, *_ in itertools.islice(batches, max_batches):
        losses_BT = losses_of(params, config, inputs_BT, targets_BT)
        losses_BT = np.asarray(losses_BT, np.float64)
        # special tokens have no bytes, and their loss does not count
        bytes_BT = target_bytes(targets_BT, token_bytes)
        is_text_BT = bytes_BT > 0
        nats.append((losses_BT * is_text_BT).sum(axis=1))
        sizes.append(bytes_BT.sum(axis=1))
        tokens += int(is_text_BT.sum())

    # no batches at all give empty arrays
    nats = np.concatenate([np.zeros(0), *nats])
    sizes = np.concatenate([np.zeros(0, np.int64), *sizes])
    bpb, stderr = ratio_bits(nats, sizes)
    total = float(nats.sum())
    return Bits(bpb, stderr, total, int(sizes.sum()), total / max(tokens, 1))


def ratio_bits(nats, sizes) -> tuple[float, float | None]:
    """(bits per byte, its standard error) from nats and bytes of rows, which are independent.

    The error is None where fewer than two rows have bytes.
    """
    if not np.sum(sizes):
        return math.inf, None
    bits = np.asarray(nats, np.float64) / math.log(2)
    return stats.ratio(bits, sizes)


# ---- what in a text is of which kind

BLANK = "white space"
NOTATION = {
    tokenize.COMMENT: "comment",
    tokenize.STRING: "string",
    tokenize.NUMBER: "number",
    tokenize.OP: "operator",
}
CHARACTERS = re.compile(r"(?P<letters>[^\W\d_]+)|(?P<digits>\d+)|(?P<punctuation>[^\w\s]+|_+)")


def plain_kinds(text: str) -> Iterator[Span]:
    """A text's letters, digits and punctuation."""
    for match in CHARACTERS.finditer(text):
        yield Span(match.start(), match.end(), match.lastgroup or "")


def python_kinds(text: str) -> Iterator[Span]:
    """Comments, docstrings, strings, keywords, names, numbers and operators of Python source.

    SyntaxError or ValueError where the text is not Python.
    """
    docstrings = _docstring_lines(text)

    # the tokenizer counts lines and columns; this is where each line begins
    lengths = map(len, io.StringIO(text))
    begins = list(itertools.accumulate(lengths, initial=0))

    # where a string began that is made of several tokens, as f-strings are; how many are open
    opened = depth = 0
    for token in _tokens(text):
        line, column = token.start
        start = begins[line - 1] + column
        line, column = token.end
        end = begins[line - 1] + column

        # since Python 3.12 an f-string is several tokens; it counts as one string
        name = tokenize.tok_name[token.type]
        if name.endswith("STRING_START"):
            if depth == 0:
                opened = start
            depth += 1
        elif name.endswith("STRING_END"):
            depth -= 1
            if depth == 0:
                yield Span(opened, end, "string")
        elif depth == 0 and (kind := _python_kind(token, docstrings)):
            yield Span(start, end, kind)


def _tokens(text: str) -> list[tokenize.TokenInfo]:
    """Python's tokens of a text; SyntaxError where it is not Python."""
    try:
        return list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, IndentationError) as e:
        raise SyntaxError(str(e)) from e


def _docstring_lines(text: str) -> set[int]:
    """The lines on which docstrings begin."""
    with warnings.catch_warnings():
        # about the escapes of somebody else's strings
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            lines.add(node.body[0].lineno)
    return lines


def _python_kind(token: tokenize.TokenInfo, docstrings: set[int]) -> str | None:
    """The kind of a token that is no part of another string, None for what is no text."""
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    line, column = token.start
    alone = not token.line[:column].strip()
    if token.type == tokenize.STRING and line in docstrings and alone:
        return "docstring"
    return NOTATION.get(token.type)


def automatic(text: str) -> Iterator[Span]:
    """`python_kinds` of what parses as several lines of Python, else `plain_kinds`."""
    if "\n" in text.strip():
        try:
            return iter(list(python_kinds(text)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            # not Python, or too deep for its parser: plain text then
            pass
    return plain_kinds(text)


KINDS: dict[str, Callable[[str], Iterator[Span]]] = {
    "auto": automatic,
    "python": python_kinds,
    "text": plain_kinds,
}


def kinds_of(text: str, sizes, spans: Iterable[Span]) -> list[str]:
    """The kind of each token: that of its first character which is not white space.

    sizes: bytes per token.
    """
    # spans count characters, tokens bytes: where each character's bytes begin
    place = np.arange(len(text) + 1)
    if not text.isascii():
        widths = [len(character.encode()) for character in text]
        place = np.cumsum([0, *widths])

    # the kind of each byte, as a number
    raw = text.encode()
    names = [BLANK]
    number_of_byte = np.zeros(len(raw) + 1, np.int16)
    for start, end, kind in spans:
        if kind not in names:
            names.append(kind)
        number_of_byte[place[start] : place[end]] = names.index(kind)
    is_blank = np.isin(np.frombuffer(raw, np.uint8), list(b" \t\r\n\f\v"))
    inked = np.append(np.flatnonzero(~is_blank), len(raw))

    # a token is of the kind of its first byte that is no white space
    ends = np.cumsum(sizes)
    first_inked = inked[np.searchsorted(inked, ends - sizes)]
    numbers = np.where(first_inked < ends, number_of_byte[first_inked], 0)
    return [names[number] for number in numbers]


# ---- of documents, by kind


def bits_by_kind(
    params,
    config: Config,
    tokenizer,
    texts: Iterable[str],
    kinds: str | Callable[[str], Iterable[Span]] = "auto",
    **options,
) -> dict:
    """Bits per byte of documents, in all and by kind, as an evaluation record holds them.

    {"bpb", "stderr", "nats", "bytes", "kinds": {kind: {"bpb", "stderr", "bytes"}},
    "items": [{"id", "nats", "bytes"}]}.

    kinds: one of KINDS or a function like them; what no span covers is white space. Each document
    is read from bos on, in windows of the model's context; documents are the independent draws of
    the standard errors, which are None for what occurs in one alone. options: of
    `likelihood.rolling`. "items" lets `stats.compare` test two checkpoints on the same documents.
    """
    spans_of = KINDS[kinds] if isinstance(kinds, str) else kinds
    # as bytes would have it: half a character becomes a question mark
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    ids = tokenizer.encode_batch(texts)
    logprobs = likelihood.rolling(params, config, tokenizer, ids, **options)

    items = []
    by_kind = {}
    for number, (text, tokens, logprob) in enumerate(zip(texts, ids, logprobs)):
        sizes = tokenizer.token_bytes[tokens]
        nats = -logprob.astype(np.float64)
        item = dict(id=str(number), nats=float(nats.sum()), bytes=int(sizes.sum()))
        items.append(item)

        # nats and bytes of the document's tokens of each kind
        kind_of_token = np.array(kinds_of(text, sizes, spans_of(text)))
        for kind in np.unique(kind_of_token):
            mask = kind_of_token == kind
            part = (nats[mask].sum(), sizes[mask].sum())
            by_kind.setdefault(str(kind), []).append(part)

    # in all, and kind by kind
    whole = _summary([(item["nats"], item["bytes"]) for item in items])
    return dict(
        **whole,
        nats=sum(item["nats"] for item in items),
        kinds={kind: _summary(parts) for kind, parts in sorted(by_kind.items())},
        items=items,
    )


def _summary(parts: list[tuple[float, int]]) -> dict:
    """Bits per byte of (nats, bytes) pairs."""
    nats, sizes = np.array(parts, np.float64).reshape(-1, 2).T
    bpb, stderr = ratio_bits(nats, sizes)
    return dict(bpb=bpb, stderr=stderr, bytes=int(sizes.sum()))
