"""What a model said: ids become the parts of a message, and parts the text that a listener hears.

The inverse of a tokenizer's rendering of chats. Whoever shows, grades or cuts an answer comes
through here, because what a model called (a sum for the calculator) and what it was told back (the
result) are not what it said.
"""

from collections.abc import Iterable, Iterator

from lib.data.tokenizer import Tokenizer

# Special token: what kind of part begins behind it.
KINDS = {
    "<|python_start|>": "python",
    "<|python_end|>": "text",
    "<|output_start|>": "python_output",
    "<|output_end|>": "text",
}


def parts_of(tokenizer: Tokenizer, ids: Iterable[int]) -> list[dict]:
    """The content of an assistant's message, [{"type", "text"}, ...], from a model's ids.

    A call that was never closed is a call all the same. Other special tokens stand for no text.
    """
    kind_of = {tokenizer.special[name]: kind for name, kind in KINDS.items()}
    runs: list[tuple[str, bytearray]] = [("text", bytearray())]
    for id in ids:
        if id in kind_of:
            runs.append((kind_of[id], bytearray()))
        elif id < len(tokenizer.tokens):
            runs[-1][1].extend(tokenizer.tokens[id])
    return [{"type": kind, "text": raw.decode(errors="replace")} for kind, raw in runs if raw]


def joint(before: str, after: str) -> str:
    """What stands between two texts around a hidden call, so that no words are glued.

    Nothing, a blank or a new line, decided by the character on either side, so that an answer can
    be streamed. Blanks that are there are enough, signs such as "=" and "$" keep their number, and
    a capital letter begins a new line, as a sentence does.
    """
    if not before or not after or before[-1].isspace() or after[0].isspace():
        return ""
    if not after[0].isalnum() or not (before[-1].isalnum() or before[-1] in ".,:;!?)\"'"):
        return ""
    return "\n" if after[0].isupper() else " "


def pieces(content: str | list[dict]) -> Iterator[str]:
    """The spoken text of a message's content bit by bit, each with its joint before it."""
    heard, hidden = "", False
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] != "text":
            hidden = True
        elif part["text"]:
            yield (joint(heard, part["text"]) if hidden else "") + part["text"]
            heard, hidden = part["text"], False


def spoken(content: str | list[dict]) -> str:
    """The text of a message's content as a listener hears it: without calls and their results."""
    return "".join(pieces(content))


def said(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """What a model that wrote these ids said."""
    return spoken(parts_of(tokenizer, ids))
