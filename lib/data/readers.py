"""How a file becomes documents, by its ending; and one way to read JSON Lines, for texts, chats and
tasks.

A reader is called as read(path, cut, begin, end) and yields (position behind them, list of
documents) for groups of documents between two positions of its own kind; None as end is the end of
the file. A document without text is "". One policy holds for all: what holds no text is left out by
the caller, who can count it, and what would be wrong is refused with file and line.
"""

import gzip
import zlib
from collections.abc import Iterator
from typing import Any

from lib.files import UserError, first_line, parse_json, read_text, regular

PIECE_CHARS = 8192
# Groups of documents hold about so many at most, so that a large file can be split among workers.
GROUP_DOCUMENTS, GROUP_CHARS, GROUP_PIECES = 1024, 1 << 20, 64

Groups = Iterator[tuple[int, list[str]]]


def pieces(text: str) -> Iterator[str]:
    """Cut a text behind a blank line, else a line, into pieces of one to two PIECE_CHARS, the last
    maybe less.
    """
    start = 0
    while start < len(text):
        low, high = start + PIECE_CHARS, start + 2 * PIECE_CHARS
        ends = (text.find(mark, low, high) + len(mark) for mark in ("\n\n", "\n"))
        end = next((end for end in ends if end > low), high)
        yield text[start:end]
        start = end


def _maybe_cut(texts: list[str], cut: bool) -> list[str]:
    if not cut:
        return texts
    return [piece for text in texts for piece in (pieces(text) if text else [""])]


# ---- text --------------------------------------------------------------------------------------


def _read_text(path: str, cut: bool, begin: int, end: int | None) -> Groups:
    """All of a file as one document, or its pieces; positions are characters."""
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    if not cut:
        yield len(text), [text]
        return
    group, position = [], begin
    for piece in pieces(text[begin:end]):
        group.append(piece)
        position += len(piece)
        if len(group) == GROUP_PIECES:
            yield position, group
            group = []
    if group or not text:
        yield position, group or [""]


# ---- JSON Lines --------------------------------------------------------------------------------


def lines_of(path, begin: int = 0, end: int | None = None) -> Iterator[tuple[str, int, str]]:
    """(where it stands, byte behind it, text) of the lines of a UTF-8 file that hold something.

    One that ends with .gz is unpacked on the way.
    """
    position, number = begin, 0
    try:
        opened: Any = gzip.open if str(path).endswith(".gz") else open
        with opened(regular(path), "rb") as lines:
            lines.seek(begin)
            for line in lines:
                number += 1
                position += len(line)
                # Whoever starts in the middle cannot count lines.
                where = f"line {number}" if not begin else f"the line that ends at byte {position}"
                if not begin and number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield where, position, line.decode()
                if end is not None and position >= end:
                    return
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path} is not UTF-8 text (line {number}, byte {e.start}): convert it first"
        ) from None
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from e


def json_lines(path) -> Iterator[tuple[int, Any]]:
    """(line number, record) of every line that holds something; UserError names file and line of
    one that is not JSON.
    """
    for where, _, line in lines_of(path):
        yield int(where.split()[-1]), parse_json(line, f"{path}, {where}", None)


def text_of(record: Any) -> str:
    """The text of a JSON record, "" where it says that there is none; ValueError where it is of
    another form.
    """
    if isinstance(record, dict) and "messages" not in record:
        text = record["text"]
    else:
        messages = record if isinstance(record, list) else record["messages"]
        contents = [message["content"] for message in messages]
        text = "\n\n".join(content for content in contents if content is not None)
    if text is not None and not isinstance(text, str):
        raise ValueError
    # JSON can spell half a character, which no tokenizer takes.
    return (text or "").encode("utf-8", "replace").decode()


def _read_jsonl(path: str, cut: bool, begin: int, end: int | None) -> Groups:
    """{"text"} or {"messages"} a line; positions are bytes."""
    texts, chars, position = [], 0, begin
    for where, position, line in lines_of(path, begin, end):
        place = f"{path}, {where}"
        try:
            text = text_of(parse_json(line, place, None))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f'{place}: expected a JSON object with a string "text" or a list "messages"'
                ' of objects with a string "content"'
            ) from None
        texts.append(text)
        chars += len(text)
        if len(texts) == GROUP_DOCUMENTS or chars >= GROUP_CHARS:
            yield position, _maybe_cut(texts, cut)
            texts, chars = [], 0
    if texts:
        yield position, _maybe_cut(texts, cut)


# ---- parquet -----------------------------------------------------------------------------------


def _read_parquet(path: str, cut: bool, begin: int, end: int | None) -> Groups:
    """The column "text"; positions are row groups, each a group of documents."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(regular(path)) as file:
            columns = {field.name: str(field.type) for field in file.schema_arrow}
            if columns.get("text") not in ("string", "large_string"):
                raise UserError(
                    f'{path} has no column "text" of strings, only {columns}: rename or convert one'
                )
            for group in range(begin, file.num_row_groups if end is None else end):
                column = file.read_row_group(group, ["text"])["text"].to_pylist()
                yield group + 1, _maybe_cut([text or "" for text in column], cut)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"cannot read {path} as parquet ({first_line(e)}): it is damaged, so load or make it"
            " anew"
        ) from e


READERS = {
    ".txt": _read_text,
    ".md": _read_text,
    ".py": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
