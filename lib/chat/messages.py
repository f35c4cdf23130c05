"""What every way of talking needs: answers read as they are written, chats that fit."""

import codecs
from bisect import bisect_left
from collections.abc import Generator
from typing import NamedTuple

from lib.data.speech import KINDS, spoken
from lib.data.tokenizer import Tokenizer
from lib.files import UserError
from lib.generate import Engine, Sampling, Token


def ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: all special ones but those around tool calls, which have no
    place inside a turn.
    """
    return tuple(id for name, id in tokenizer.special.items() if name not in KINDS)


class Delta(NamedTuple):
    """A bit more of an answer: `text` of part number `index`, of kind text, python or
    python_output.

    tokens: what it is made of; offsets: where in the spoken answer each one's text begins.
    joint: what the spoken answer has before it, so that no words are glued around a hidden call.
    """

    index: int
    kind: str
    text: str
    tokens: list[Token]
    offsets: list[int] = []
    joint: str = ""

    @property
    def said(self) -> str:
        """What it adds to the spoken answer."""
        return self.joint + self.text if self.kind == "text" else ""


class Reader:
    """Turns tokens into text as they arrive; `parts` is the answer so far, as a chat message's list
    of {"type", "text"}.

    A character whose bytes are spread over tokens waits for the last of them, and is dropped if
    that never comes. Bytes that can't be UTF-8 become U+FFFD. `finish` says why the answer ended,
    None before that.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokens = tokenizer.tokens
        self.kinds = {tokenizer.special[name]: kind for name, kind in KINDS.items()}
        self.parts: list[dict] = []
        self.finish: str | None = None
        self._begin("text")

    def _begin(self, kind):
        self.kind, self.waiting = kind, []
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.open = False  # whether the last of `parts` is the one being written

    def read(self, tokens: list[Token]) -> list[Delta]:
        """What these tokens add; at most one piece per part."""
        pieces = []
        for token in tokens:
            if token.id in self.kinds:
                self._begin(self.kinds[token.id])
            if token.id >= len(self.tokens):
                continue
            self.waiting.append(token)
            if not (text := self.decoder.decode(self.tokens[token.id])):
                continue
            if not self.open:
                self.parts.append({"type": self.kind, "text": ""})
                self.open = True
            new = self._piece(text)
            if pieces and pieces[-1].index == new.index:
                last = pieces[-1]
                pieces[-1] = last._replace(
                    text=last.text + text,
                    tokens=last.tokens + new.tokens,
                    offsets=last.offsets + new.offsets,
                )
            else:
                pieces.append(new)
        return pieces

    def _piece(self, text: str) -> Delta:
        """Add a bit of text to the open part."""
        before = spoken(self.parts)
        self.parts[-1]["text"] += text
        tokens, self.waiting = self.waiting, []
        if self.kind != "text":
            return Delta(len(self.parts) - 1, self.kind, text, tokens)

        # all the tokens that wait begin where this text does: each but the last is a piece of its
        # first character
        joint = spoken(self.parts)[len(before) : -len(text)]
        offsets = [len(before) + len(joint)] * len(tokens)
        return Delta(len(self.parts) - 1, self.kind, text, tokens, offsets, joint)


def compact(parts: list[dict]) -> str | list[dict]:
    """The content of an assistant's message: just text, unless tools were called."""
    return parts if any(part["type"] != "text" for part in parts) else spoken(parts)


def fit(
    tokenizer: Tokenizer, messages: list[dict], context: int, max_tokens: int
) -> tuple[list[int], int]:
    """Ids that ask for an answer to a chat, and how many of its oldest messages were left out to
    make room for that.

    Room is made for max_tokens, but for half of the context at most; what the last message and the
    system's leave must do. UserError if these two alone fill the context.
    """
    first = int(
        messages[:1] != [] and isinstance(messages[0], dict) and messages[0].get("role") == "system"
    )
    ids = tokenizer.render_for_completion(messages)  # checks all of them
    room = context - min(max_tokens, context // 2)
    if len(ids) <= room:
        return ids, 0

    def without(turns: int) -> list[int]:
        kept = messages[:first] + messages[first + 2 * turns :]
        return tokenizer.render_for_completion(kept)

    turns = (len(messages) - first - 1) // 2
    drop = bisect_left(range(turns), True, key=lambda n: len(without(n)) <= room)
    ids = without(drop)
    if len(ids) >= context:
        raise UserError(
            f"the last message makes {len(ids)} tokens and the model's context has {context}: "
            "shorten it"
        )
    return ids, 2 * drop


def reply(
    engine: Engine, ids: list[int], sampling: Sampling, reader: Reader
) -> Generator[Delta, None, None]:
    """Write the answer to a prompt in an engine of its own, piece by piece.

    Leaving the loop early frees the slot.
    """
    slot = engine.add(ids, sampling)
    try:
        while not reader.finish:
            tokens, reader.finish = engine.step()[slot]
            yield from reader.read(tokens)
    finally:
        engine.cancel(slot)
