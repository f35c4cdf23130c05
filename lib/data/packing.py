"""From token shards to rows: pieces wait in a buffer, rows are filled from it, a cursor tells
exactly where it stands.

`Packer` fills rows for texts (here) and for conversations (`lib.data.chats`) alike; the two differ
in the feed that hands it pieces, and in their `Packing`.
"""

import bisect
import collections
import itertools
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from lib.data.streams import RecordShard
from lib.data.tokens import FORMAT, Tokens, TokenShard
from lib.files import UserError, choose


class Piece(NamedTuple):
    """Tokens that are to lie in one row together, such as a document or a conversation."""

    # what the cursor keeps of it: (shard, begin, length) of a text, (number,) of a conversation
    origin: tuple[int, ...]
    ids: np.ndarray
    # 1 for the ids that are targets; None for all of them
    learn: np.ndarray | None = None
    # whether it was cut to the length of a row before it came here
    truncated: bool = False


class Feed(Protocol):
    """Where pieces come from, in an order of its own, with its place in that order."""

    # what has been counted so far, by feed and packer; the names in `counted` go into the cursor
    counts: collections.Counter[str]
    counted: tuple[str, ...]

    def read(self) -> list[Piece]:
        """The next pieces, at least one; none at the end of an epoch that is not repeated."""
        ...

    def place(self) -> dict:
        """Its part of the cursor: where it reads on."""
        ...

    def restore(self, origins: list[int]) -> list[Piece]:
        """The pieces that a cursor's flat list "waiting" names."""
        ...


class Packing(NamedTuple):
    """How rows are made."""

    # The order in which a feed reads, of a text's shard:
    # order(shard, bos, sequence_len, host, hosts, rng) -> where pieces begin, their lengths, and up
    # to which to read on from each. Of conversations: order(count, rng) -> their numbers.
    order: Callable
    # start a row with the piece that has waited longest, not with the longest
    oldest_first: bool
    # What becomes of a piece that does not fit. It is cut, and its rest is put back behind a bos
    # ("bos"), put back as it is ("plain") or lost ("drop"); or it waits, and the row ends ("wait").
    rest: str
    # pieces to choose from, where the caller's buffer_size does not apply
    buffer: int | None = None


# How often a token of text may be repeated before `epochs` warns.
MOST_EPOCHS = 4

# ---- the buffer and the rows -------------------------------------------------------------------


class Packer:
    """Rows of `width` tokens, filled from a buffer of pieces that a feed tops up."""

    def __init__(self, feed: Feed, packing: Packing, width: int, bos: int, buffer_size: int):
        self.feed, self.packing = feed, packing
        self.width, self.bos = width, bos
        self.buffer_size = packing.buffer or buffer_size
        # A piece is known by its age, an arrival number that only grows.
        self.waiting: dict[int, Piece] = {}
        self.by_length: list[tuple[int, int]] = []  # sorted (length, -age)
        self.arrivals = itertools.count()
        self.counts = feed.counts

    def add(self, piece: Piece):
        age = next(self.arrivals)
        self.waiting[age] = piece
        bisect.insort(self.by_length, (len(piece.ids), -age))

    def top_up(self):
        """Read pieces until the buffer is full or the feed has ended."""
        while len(self.waiting) < self.buffer_size:
            pieces = self.feed.read()
            if not pieces:
                return
            for piece in pieces:
                self.add(piece)

    def choose(self, room: int) -> int | None:
        """Age of the piece that comes next into a row with `room` tokens left; it leaves
        `by_length`.
        """
        if not self.waiting:
            return None

        if room == self.width and self.packing.oldest_first:
            age = next(iter(self.waiting))
            where = bisect.bisect_left(self.by_length, (len(self.waiting[age].ids), -age))
            return -self.by_length.pop(where)[1]

        # The longest that fits, of these the oldest; 1 is more than any -age.
        where = bisect.bisect_right(self.by_length, (room, 1)) - 1
        if where < 0 and self.packing.rest == "wait":
            return None
        if where < 0 and self.packing.rest == "drop":
            # What does not fit is lost, so cut the shortest, of these the oldest.
            shortest = self.by_length[0][0]
            where = bisect.bisect_right(self.by_length, (shortest, 1)) - 1
        # A `where` of -1 is the longest: it loses nothing, and is most often a part already.
        return -self.by_length.pop(where)[1]

    def fill_row(self, row: np.ndarray, learn: np.ndarray) -> int:
        """Fill a row from the left; returns the number of tokens in it.

        learn: the row's mask of targets, true everywhere before, false behind the last token after.
        """
        filled = 0
        while filled < self.width:
            self.top_up()
            age = self.choose(self.width - filled)
            if age is None:
                break

            piece = self.waiting[age]
            length = len(piece.ids)
            used = min(length, self.width - filled)
            row[filled : filled + used] = piece.ids if used == length else piece.ids[:used]
            if piece.learn is not None:
                learn[filled : filled + used] = piece.learn[:used]
            if self.packing.rest == "bos":
                # The rest of a cut document carries a bos in place of the last token used.
                self.counts["added"] += int(row[filled] != self.bos or used == 1)
                row[filled] = self.bos
            filled += used

            if used == length or self.packing.rest == "drop":
                del self.waiting[age]
                self.counts["conversations"] += 1
                self.counts["truncated"] += piece.truncated
                self.counts["discarded"] += length - used
            else:
                self.put_back(age, piece, used)
        learn[filled:] = False
        return filled

    def put_back(self, age: int, piece: Piece, used: int):
        """Keep what is left of a piece; it keeps its age too."""
        if self.packing.rest == "bos":
            used -= 1
        shard, begin, length = piece.origin
        rest = piece._replace(origin=(shard, begin + used, length - used), ids=piece.ids[used:])
        self.waiting[age] = rest
        bisect.insort(self.by_length, (len(rest.ids), -age))

    def cursor(self) -> dict:
        """Where feed and buffer stand: enough, with the settings, to go on exactly here."""
        origins = [piece.origin for piece in self.waiting.values()]
        counts = {name: self.counts[name] for name in self.feed.counted}
        return self.feed.place() | dict(waiting=list(itertools.chain(*origins))) | counts


Batch = tuple[np.ndarray, np.ndarray, dict]


def pack(packer: Packer, batch_size: int, settings: dict, waiting: list[int]) -> Iterator[Batch]:
    """Batches from a packer, each with `settings` and the packer's cursor; ends when one would hold
    no target.

    waiting: of the cursor to go on from.
    """
    for piece in packer.feed.restore(waiting):
        packer.add(piece)
    while True:
        rows = np.full((batch_size, packer.width), packer.bos, np.int32)
        learn = np.ones(rows.shape, bool)
        filled = [packer.fill_row(row, mask) for row, mask in zip(rows, learn)]
        if not learn.any():
            return

        inputs = rows[:, :-1].copy()
        targets = np.where(learn[:, 1:], rows[:, 1:], -1)
        packer.counts["cells"] += rows.size
        packer.counts["padding"] += rows.size - sum(filled)
        packer.counts["targets"] += int((targets >= 0).sum())
        yield inputs, targets, settings | packer.cursor()


def check_cursor(settings: dict, cursor: dict | None, what: str, advice: str):
    """Refuse a cursor that was made with other settings, naming the first that differs."""
    if not cursor:
        return
    for name, value in settings.items():
        if cursor.get(name) != value:
            raise UserError(
                f"cannot resume {what}: the cursor was made with {name} {_short(cursor.get(name))},"
                f" now it is {_short(value)}; {advice}"
            )


def _short(value) -> str:
    """A setting for a message; of a long hash its beginning."""
    text = repr(value)
    return text if len(text) <= 20 else f"{text[:9]}…'"


# ---- texts -------------------------------------------------------------------------------------


def _shuffled_pieces(shard: TokenShard | RecordShard, bos, sequence_len, host, hosts, rng):
    """Documents cut to the context's length, so that a long one neither blocks the buffer nor fills
    whole batches.
    """
    begins, lengths = shard.spans(bos)
    counts = np.maximum(1, -(-(lengths - 1) // sequence_len))
    firsts = np.repeat(counts.cumsum() - counts, counts)
    offsets = (np.arange(counts.sum()) - firsts) * sequence_len

    own = rng.permutation(offsets.size)[host::hosts]
    left = np.repeat(lengths - 1, counts) - offsets
    pieces = np.minimum(sequence_len, left) + 1
    return (np.repeat(begins, counts) + offsets)[own], pieces[own], np.arange(1, own.size + 1)


def _shuffled_documents(shard: TokenShard | RecordShard, bos, sequence_len, host, hosts, rng):
    """Whole documents in a random order."""
    begins, lengths = shard.spans(bos)
    own = rng.permutation(begins.size)[host::hosts]
    return begins[own], lengths[own], np.arange(1, own.size + 1)


def _row_groups(shard: TokenShard | RecordShard, bos, sequence_len, host, hosts, rng, at_once=128):
    """Documents as they come; each host reads every hosts-th row group, and takes `at_once` of it
    into the buffer.
    """
    begins, lengths = shard.spans(bos)
    ends = np.cumsum(shard.groups)
    groups = [np.arange(end - size, end) for size, end in zip(shard.groups, ends)][host::hosts]

    # How many documents are read together, counted from each document of a group.
    reads = [np.empty(0, int)]
    for group in groups:
        places = np.arange(group.size)
        reads.append(np.minimum(places // at_once * at_once + at_once, group.size) - places)

    own = np.concatenate([np.empty(0, int), *groups])
    return begins[own], lengths[own], np.arange(own.size) + np.concatenate(reads)


PACKING = {
    # Loses nothing, costs one bos per cut. Because of `oldest_first` no piece waits for ever;
    # because the longest is cut, most often one that is a part of a document already, nearly all
    # documents that fit the context stay whole.
    "bestfit": Packing(_shuffled_pieces, oldest_first=True, rest="bos"),
    # The algorithm of nanochat, row for row.
    "reference": Packing(_row_groups, oldest_first=False, rest="drop"),
    # Documents one after another, cut wherever a row ends.
    "stream": Packing(_shuffled_documents, oldest_first=True, rest="plain", buffer=1),
}


class TextFeed:
    """The pieces of one host's part of the corpus, shard after shard, epoch after epoch."""

    counted: tuple[str, ...] = ("cells", "discarded", "padding", "added")

    def __init__(self, tokens: Tokens, packing: Packing, settings: dict, cursor: dict, loop: bool):
        self.tokens, self.packing, self.settings, self.loop = tokens, packing, settings, loop
        self.epoch, self.shard, self.index = cursor["epoch"], cursor["shard"], cursor["index"]
        # of the current shard: where pieces begin, their lengths, and how far to read at once
        self.order: tuple[list[int], list[int], np.ndarray] | None = None
        # the tokens of those pieces, from `index` on
        self.stream: Iterator[np.ndarray] = iter(())
        self.idle = False  # nothing has come since this epoch began
        self.counts = collections.Counter({name: cursor[name] for name in self.counted})

    def read(self) -> list[Piece]:
        while self.loop or self.epoch == 1:
            if self.order is None:
                self.order = self.open_shard()
            begins, lengths, stops = self.order
            if self.index < len(stops):
                chosen = slice(self.index, int(stops[self.index]))
                self.index, self.idle = chosen.stop, False
                return [
                    Piece((self.shard, begin, length), next(self.stream))
                    for begin, length in zip(begins[chosen], lengths[chosen])
                ]
            self.next_shard()
        return []

    def open_shard(self):
        """The order of the current shard's pieces in this epoch."""
        host, hosts = self.settings["host_index"], self.settings["host_count"]
        # RandomState: its numbers never change with numpy's version.
        rng = np.random.RandomState([self.settings["seed"], self.epoch, self.shard])
        shard = self.tokens[self.shard]
        begins, lengths, stops = self.packing.order(
            shard, self.tokens.bos, self.settings["sequence_len"], host, hosts, rng
        )
        self.stream = shard.pieces(begins[self.index :], lengths[self.index :])
        return begins.tolist(), lengths.tolist(), stops

    def next_shard(self):
        self.order, self.index, self.shard = None, 0, self.shard + 1
        if self.shard < len(self.tokens):
            return
        if self.idle:
            host, hosts = self.settings["host_index"], self.settings["host_count"]
            raise UserError(f"no documents for host {host} of {hosts}: give a larger corpus")
        self.epoch, self.shard, self.idle = self.epoch + 1, 0, True

    def place(self) -> dict:
        return dict(epoch=self.epoch, shard=self.shard, index=self.index)

    def restore(self, origins: list[int]) -> list[Piece]:
        triples = list(zip(origins[::3], origins[1::3], origins[2::3]))
        streams = {}
        for number in {shard for shard, _, _ in triples}:
            places = [(begin, length) for shard, begin, length in triples if shard == number]
            # read now: a later shard may need this one's place
            streams[number] = iter(list(self.tokens[number].pieces(*zip(*places))))
        return [Piece(triple, next(streams[triple[0]])) for triple in triples]


def batches(  # noqa: PLR0913  (each is a setting of the cursor, and most have a default)
    tokens: Tokens,
    batch_size: int,
    sequence_len: int,
    *,
    packing: str = "bestfit",
    cursor: dict | None = None,
    host_index: int = 0,
    host_count: int = 1,
    seed: int = 0,
    buffer_size: int = 1000,
    loop: bool = True,
) -> Iterator[Batch]:
    """Packed batches: (inputs_BT int32, targets_BT int32, the cursor after this batch), for ever or
    for one epoch.

    A row holds sequence_len + 1 tokens and starts with bos (but for "stream"); inputs drop its
    last, targets its first token. The cursor is JSON: give it back with the same arguments and the
    very batches that would have come follow. Each epoch has its own order, from `seed`. host_count
    hosts together read everything once an epoch, each its part. When `loop` is false, the last rows
    are filled with targets -1, and hosts may differ in their number of batches.
    """
    mode = choose("packing", packing, PACKING)
    sound = min(batch_size, sequence_len, buffer_size) >= 1 and 0 <= seed < 1 << 32
    if not sound or not 0 <= host_index < host_count:
        raise UserError(
            f"batch_size {batch_size}, sequence_len {sequence_len} and buffer_size {buffer_size}"
            " must be at"
            f" least 1, host_index {host_index} below host_count {host_count}, seed {seed} in 32"
            " bits"
        )
    settings = dict(
        format=FORMAT,
        corpus=tokens.identity,
        packing=packing,
        batch_size=batch_size,
        sequence_len=sequence_len,
        host_index=host_index,
        host_count=host_count,
        seed=seed,
        buffer_size=buffer_size,
    )
    check_cursor(settings, cursor, "the data", "restore that, or start a new run")

    beginning: dict = dict(epoch=1, shard=0, index=0, waiting=[]) | dict.fromkeys(
        TextFeed.counted, 0
    )
    position = beginning | (cursor or {})
    feed = TextFeed(tokens, mode, settings, position, loop)
    packer = Packer(feed, mode, sequence_len + 1, tokens.bos, buffer_size)
    return pack(packer, batch_size, settings, position["waiting"])


def waste(cursor: dict) -> dict[str, float]:
    """What packing has cost so far: share of source tokens "discarded", of cells that are "padding"
    or "added" bos.
    """
    used = cursor["cells"] - cursor["padding"] - cursor["added"]
    return dict(
        discarded=cursor["discarded"] / max(used + cursor["discarded"], 1),
        padding=cursor["padding"] / cursor["cells"],
        added=cursor["added"] / cursor["cells"],
    )


def epochs(planned: int, available: int) -> tuple[float, str]:
    """How often `planned` tokens of training go through `available` tokens of text, and a warning
    or "".

    Up to about four epochs a repeated token is worth nearly a new one; beyond, returns fall fast
    (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models").
    """
    passes = planned / max(available, 1)
    if passes <= MOST_EPOCHS:
        return passes, ""
    return passes, (
        f"{planned:,} tokens of training are {passes:.1f} passes over {available:,} tokens of text:"
        f" above {MOST_EPOCHS} a repeated token teaches little, so take more text or a smaller"
        " model"
    )


# ---- ahead of the device -----------------------------------------------------------------------


def prefetch(
    iterator: Iterator[tuple], put: Callable, depth: int = 2
) -> Generator[tuple, None, None]:
    """The items of `batches`, arrays moved by `put((inputs, targets))` (such as jax.device_put),
    `depth` items ahead.

    Runs in one background thread that ends with this generator. Errors of `iterator` and `put`
    surface in their place.
    """

    def step() -> tuple | None:
        item = next(iterator, None)
        if item is None:
            return None
        *arrays, cursor = item
        return (*put(tuple(arrays)), cursor)

    pool = ThreadPoolExecutor(1, "prefetch")
    try:
        ahead = collections.deque(pool.submit(step) for _ in range(depth))
        while item := ahead.popleft().result():
            ahead.append(pool.submit(step))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
