"""Conversations: read from the files that people have, rendered, and packed into rows that teach
the assistant's words alone.
"""

import collections
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lib.data.download import tell
from lib.data.packing import Batch, Packer, Packing, Piece, check_cursor, pack
from lib.data.readers import lines_of
from lib.data.roles import in_turns
from lib.data.tokenizer import Tokenizer, turns
from lib.files import UserError, choose, local_path, parse_json

FORMAT = 1  # of cursors; raise it when they change meaning
BUFFER = 100  # conversations to choose from when a row is filled
# Who speaks in a ShareGPT file, as files of different origin call them.
SPEAKERS = {"system": "system", "human": "user", "user": "user"} | dict.fromkeys(
    "assistant gpt chatgpt model bing bard".split(), "assistant"
)
# Keys of a line whose loss would change what it means, and which are not known here.
UNKNOWN = ("tools", "functions")
CHAT_FORMS = (
    'expected {"messages": [{"role", "content"}, …]}, a list of such messages, or'
    ' {"conversations": [{"from", "value"}, …]}'
)


# ---- reading -----------------------------------------------------------------------------------


def read_chats(path, skip_bad: bool = False) -> list[list[dict]]:
    """The conversations of a JSONL file, each a list of {"role", "content"}.

    A line is {"messages": [{"role", "content"}, …]} (OpenAI), such a list alone, or
    {"conversations": [{"from", "value"}, …]} (ShareGPT); a "system" beside them speaks first.
    UserError names file and line of anything else; with `skip_bad` such lines are left out and
    counted.
    """
    path = local_path(path)
    chats, bad, silent = [], [], 0
    for where, _, line in lines_of(path):
        try:
            chat = _chat(line, f"{path}, {where}")
        except UserError as e:
            if not skip_bad:
                raise
            bad.append(str(e))
            continue
        chats.append(chat)
        silent += any(message["content"] in ("", []) for message in chat[1:])
    if bad:
        lines = len(bad) + len(chats)
        tell(f"{path}: {len(bad):,} of {lines:,} lines are bad and left out, the first: {bad[0]}")
    if silent:
        tell(f"{path}: in {silent:,} of {len(chats):,} conversations a message is empty")
    if not chats:
        raise UserError(f'{path} has no conversations: write one {{"messages": […]}} per line')
    return chats


def _chat(line: str, where: str) -> list[dict]:
    record = parse_json(line, where, None)
    try:
        return messages_of(record)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{where}: {CHAT_FORMS} ({type(e).__name__}: {e})") from None


def messages_of(record) -> list[dict]:
    """The chat that a JSON record of any known form holds, as turns.

    UserError, ValueError, KeyError or TypeError says what is wrong with it.
    """
    if isinstance(record, list):
        record = dict(messages=record)
    for key in UNKNOWN:
        if record.get(key):
            raise UserError(f"it holds {key}, which are not known here: leave such lines out")
    if "conversations" in record:
        messages = _sharegpt(record["conversations"])
    else:
        messages = record["messages"]
        if not isinstance(messages, list):
            raise ValueError('messages must be a list of objects with "role" and "content"')
    if record.get("system"):
        messages = [dict(role="system", content=record["system"]), *messages]
    messages = in_turns(messages)
    # What remains to be wrong, such as a chat without any message.
    list(turns(messages))
    return messages


def _sharegpt(conversation: list[dict]) -> list[dict]:
    messages = []
    for message in conversation:
        role = choose("speaker", message["from"], SPEAKERS)
        messages.append(message | dict(role=role, content=message["value"]))
    return messages


@dataclass(frozen=True)
class Chats:
    """The conversations (or texts) of one side of a mixture, `messages[i]` from `source[i]`;
    `identity` names their content.
    """

    messages: list[list[dict] | str]
    source: list[str]
    identity: str

    def __len__(self) -> int:
        return len(self.messages)


def render(
    tokenizer: Tokenizer, chat: list[dict] | str, max_tokens: int
) -> tuple[list[int], list[int]]:
    """(ids, mask) as of `Tokenizer.render_conversation`; of a text, all but its bos is learnt."""
    if not isinstance(chat, str):
        return tokenizer.render_conversation(chat, max_tokens)
    ids = tokenizer.encode(chat, bos=True)[:max_tokens]
    return ids, [0] + [1] * (len(ids) - 1)


# ---- packing -----------------------------------------------------------------------------------

# Whether epochs are shuffled -> how rows are made: whole conversations, each time the longest
# waiting one that fits (of equals the first), then bos.
CHAT_PACKING = {
    True: Packing(lambda count, rng: rng.permutation(count), oldest_first=False, rest="wait"),
    False: Packing(lambda count, rng: np.arange(count), oldest_first=False, rest="wait"),
}


class ChatFeed:
    """Conversations rendered as they enter the buffer, epoch after epoch; those that teach nothing
    are left out.
    """

    counted: tuple[str, ...] = (
        "conversations",
        "truncated",
        "empty",
        "targets",
        "cells",
        "padding",
    )

    def __init__(
        self, chats: Chats, tokenizer: Tokenizer, settings: dict, cursor: dict, loop: bool
    ):
        self.chats, self.tokenizer, self.settings, self.loop = chats, tokenizer, settings, loop
        self.width = settings["sequence_len"] + 1
        self.epoch, self.index = cursor["epoch"], cursor["index"]
        self.counts = collections.Counter({name: cursor[name] for name in self.counted})
        self.order = functools.lru_cache(1)(self.order_of)

    def order_of(self, epoch: int) -> np.ndarray:
        # RandomState: its numbers never change with numpy's version.
        rng = np.random.RandomState([self.settings["seed"], epoch])
        return CHAT_PACKING[self.settings["shuffle"]].order(len(self.chats), rng)

    def read(self) -> list[Piece]:
        for _ in range(len(self.chats)):
            if self.index == len(self.chats):
                if not self.loop:
                    return []
                self.epoch, self.index = self.epoch + 1, 0
            piece = self.piece(int(self.order(self.epoch)[self.index]))
            self.index += 1
            if piece.learn is not None and piece.learn[1:].any():
                return [piece]
            self.counts["empty"] += 1
        raise UserError(
            f"in none of {len(self.chats)} conversations does the assistant say anything within"
            f" {self.width} "
            "tokens: use a longer sequence_len or other conversations"
        )

    def piece(self, number: int) -> Piece:
        # One token more than fits, to see whether there is one.
        ids, mask = render(self.tokenizer, self.chats.messages[number], self.width + 1)
        learn = np.array(mask[: self.width], bool)
        return Piece((number,), np.array(ids[: self.width]), learn, len(ids) > self.width)

    def place(self) -> dict:
        return dict(epoch=self.epoch, index=self.index)

    def restore(self, origins: list[int]) -> list[Piece]:
        return [self.piece(number) for number in origins]


def chat_batches(  # noqa: PLR0913  (each is a setting of the cursor, and most have a default)
    chats: Chats,
    tokenizer: Tokenizer,
    batch_size: int,
    sequence_len: int,
    *,
    cursor: dict | None = None,
    seed: int = 0,
    buffer_size: int = BUFFER,
    shuffle: bool = True,
    loop: bool = True,
) -> Iterator[Batch]:
    """Packed batches: (inputs_BT int32, targets_BT int32, the cursor after this batch), for ever or
    for one epoch.

    A row holds sequence_len + 1 tokens: whole conversations, each time the longest waiting one that
    fits (of equals the first), then bos. Targets are -1 on all that the assistant does not say
    itself, so no conversation is asked to predict another. One that is longer than a row is cut to
    it; one in which the assistant says nothing (before the cut) is left out. The cursor counts
    both, and targets, cells and padding; it is JSON: give it back with the same arguments and the
    very batches that would have come follow. Each epoch has its own order, from `seed`.
    """
    sound = min(batch_size, sequence_len, buffer_size) >= 1 and 0 <= seed < 1 << 32
    if not sound or not len(chats):
        raise UserError(
            f"batch_size {batch_size}, sequence_len {sequence_len}, buffer_size {buffer_size} and"
            " the number of "
            f"conversations ({len(chats)}) must be at least 1, seed {seed} in 32 bits"
        )
    settings = dict(
        format=FORMAT,
        chats=chats.identity,
        tokenizer=tokenizer.fingerprint,
        batch_size=batch_size,
        sequence_len=sequence_len,
        seed=seed,
        buffer_size=buffer_size,
        shuffle=shuffle,
    )
    check_cursor(settings, cursor, "the conversations", "restore that, or start the phase anew")

    beginning: dict = dict(epoch=1, index=0, waiting=[]) | dict.fromkeys(ChatFeed.counted, 0)
    position = beginning | (cursor or {})
    feed = ChatFeed(chats, tokenizer, settings, position, loop)
    packer = Packer(feed, CHAT_PACKING[shuffle], sequence_len + 1, tokenizer.bos, buffer_size)
    return pack(packer, batch_size, settings, position["waiting"])
