"""Bits per byte by kind of text: what in a document is easy and what is hard."""

import ast
import io
import keyword
import re
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from lib.config import Config
from lib.evals import likelihood, ratio_bits

BLANK = "white space"
_NAMES = {
    tokenize.COMMENT: "comment",
    tokenize.STRING: "string",
    tokenize.NUMBER: "number",
    tokenize.OP: "operator",
}
_CLASSES = {"letters": r"[^\W\d_]+", "digits": r"\d+", "punctuation": r"[^\w\s]+|_+"}
_CLASS = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _CLASSES.items()))


def plain_kinds(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, kind) in characters of a text's letters, digits and punctuation."""
    return ((m.start(), m.end(), m.lastgroup) for m in _CLASS.finditer(text))


def python_kinds(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, kind) of Python source: comment, docstring, string, keyword, name, number, operator.

    SyntaxError or ValueError where the text is not Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the escapes of somebody else's strings
        tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        node.body[0].lineno
        for node in ast.walk(tree)
        if isinstance(node, documented)
        and node.body
        and isinstance(node.body[0], ast.Expr)
        and isinstance(node.body[0].value, ast.Constant)
        and isinstance(node.body[0].value.value, str)
    }
    lines = [0]
    for line in io.StringIO(text):
        lines.append(lines[-1] + len(line))
    at = lambda place: lines[place[0] - 1] + place[1]
    try:
        found = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, IndentationError) as e:
        raise SyntaxError(str(e)) from e
    spans, opened = [], None
    for token in found:
        kind, name = token.type, tokenize.tok_name[token.type]
        # since Python 3.12 (f-strings) a string of several tokens: all of it counts as one
        if name.endswith("STRING_START"):
            opened = opened or [at(token.start), 0]
            opened[1] += 1
        elif name.endswith("STRING_END"):
            opened[1] -= 1
            if not opened[1]:
                spans.append((opened[0], at(token.end), "string"))
                opened = None
        elif opened:
            continue
        elif (
            kind == tokenize.STRING
            and token.start[0] in docstrings
            and not token.line[: token.start[1]].strip()
        ):
            spans.append((at(token.start), at(token.end), "docstring"))
        elif kind == tokenize.NAME:
            spans.append(
                (
                    at(token.start),
                    at(token.end),
                    "keyword" if keyword.iskeyword(token.string) else "name",
                )
            )
        elif kind in _NAMES:
            spans.append((at(token.start), at(token.end), _NAMES[kind]))
    return iter(spans)


def automatic(text: str) -> Iterator[tuple[int, int, str]]:
    """`python_kinds` of what parses as several lines of Python, `plain_kinds` of everything else."""
    if "\n" in text.strip():
        try:
            return python_kinds(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass  # not Python, or too deep for its parser: plain text then
    return plain_kinds(text)


KINDS: dict[str, Callable] = {"auto": automatic, "python": python_kinds, "text": plain_kinds}


def kinds_of(text: str, sizes, spans) -> list[str]:
    """The kind of each token: that of its first character which is not white space. sizes: bytes per token."""
    raw = text.encode()
    names, by_byte = [BLANK], np.zeros(len(raw) + 1, np.int16)
    place = (
        np.arange(len(text) + 1)
        if text.isascii()
        else np.cumsum([0, *(len(c.encode()) for c in text)])
    )
    for start, end, kind in spans:
        if kind not in names:
            names.append(kind)
        by_byte[place[start] : place[end]] = names.index(kind)
    blank = np.array([c in b" \t\r\n\f\v" for c in raw] + [True])
    ends = np.cumsum(sizes)
    out = []
    for begin, end in zip(ends - sizes, ends):
        inked = np.flatnonzero(~blank[begin:end])
        out.append(names[by_byte[begin + inked[0]]] if inked.size else BLANK)
    return out


def bits_by_kind(
    params,
    config: Config,
    tokenizer,
    texts: Iterable[str],
    kinds: str | Callable = "auto",
    **options,
) -> dict:
    """{"bpb", "stderr", "nats", "bytes", "kinds": {kind: {"bpb", "stderr", "bytes"}}, "items": [{"id", "nats", "bytes"}]} over documents.

    kinds: one of KINDS or a function like them: text -> (start, end, kind) in characters; what no span covers is white space. Each
    document is read from bos on, in windows of the model's context; documents are the independent draws of the standard errors.
    options: of `likelihood.rolling`. "items" lets `stats.compare` test two checkpoints on the same documents.
    """
    spans_of = KINDS[kinds] if isinstance(kinds, str) else kinds
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    ids = tokenizer.encode_batch(texts)
    rows = likelihood.rolling(params, config, tokenizer, ids, **options)
    items, found = [], {}
    for number, (text, tokens, logprob) in enumerate(zip(texts, ids, rows)):
        sizes, nats = tokenizer.token_bytes[tokens], -logprob.astype(np.float64)
        items.append({"id": str(number), "nats": float(nats.sum()), "bytes": int(sizes.sum())})
        of = np.array(kinds_of(text, sizes, spans_of(text)))
        for kind in np.unique(of):
            found.setdefault(str(kind), []).append(
                (nats[of == kind].sum(), sizes[of == kind].sum())
            )

    def summary(pairs):
        nats, size = np.array(pairs, np.float64).reshape(-1, 2).T
        bpb, stderr = ratio_bits(nats, size)
        return dict(bpb=bpb, stderr=stderr, bytes=int(size.sum()))

    whole = summary([(i["nats"], i["bytes"]) for i in items])
    return whole | dict(
        nats=sum(i["nats"] for i in items),
        kinds={k: summary(v) for k, v in sorted(found.items())},
        items=items,
    )
