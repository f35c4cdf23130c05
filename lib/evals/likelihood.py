"""How likely a model finds given continuations: batched by length, each shared beginning read once.

Every measurement by likelihood rests on `score`: multiple choice, schemas, language modelling,
perplexity, lm_eval.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lib.config import KERNEL_TILE, Config
from lib.files import UserError
from lib.generate.engine import bucket
from lib.model import hidden, init_cache, logits
from lib.model.cache import pick_rows

# input tokens of a forward pass: on a CPU, activations that stay in its cache
BATCH_TOKENS = {"cpu": 1024}
BATCH_TOKENS_ELSEWHERE = 32768
# tokens that the caches of a batch of ends may hold, in batches
CACHE_BATCHES = 8
# batches that the device is given before the first one's answers are waited for
AHEAD = 2
# a beginning is read apart where that leaves less than this part of the tokens to read
SHARE_BELOW = 0.8
# tokens of a beginning, below which it is not looked at
SHORTEST = 8
# how far a common beginning may fall behind its neighbours': within a question, among questions
NEAR, FAR = 0.85, 0.5
# tokens and answers of a batch are padded to `bucket`s of at least these
LEAST_LENGTH = 8
LEAST_ANSWERS = 64
# input tokens, of all sequences together, below which a program more costs more than padding does,
# and what is padded to then
FEW, LEAST_LENGTH_OF_FEW, LEAST_ANSWERS_OF_FEW = 2**18, 64, 512


class Score(NamedTuple):
    """What `score` says of one continuation.

    logprob: natural log, summed over its tokens (0 for none). greedy: every token is the likeliest
    after those before it. cut: tokens left out at the beginning of the context, because the model's
    own context is too short.
    """

    logprob: float
    tokens: int
    greedy: bool
    cut: int


class Reading(NamedTuple):
    """How sequences are read.

    room: inputs that the model sees at most. stride: tokens that a window scores. share: read
    common beginnings once. progress(done, total): called with numbers of continuations.
    """

    batch_tokens: int
    room: int
    stride: int
    share: bool
    progress: Callable[[int, int], object] | None


@dataclass
class Row:
    """One sequence to read.

    Output position `first + u` answers for the u-th scored token of every alternative.
    key: the input tokens, big-endian, so that bytes sort as the ids do. targets: alternatives, all
    of one length. owners: per alternative, what to do with its answer.
    """

    key: bytes
    first: int
    targets: list[Sequence[int]]
    owners: list

    @property
    def ids(self) -> np.ndarray:
        return np.frombuffer(self.key, ">i4")

    @property
    def length(self) -> int:
        return len(self.key) // 4

    @property
    def scored(self) -> int:
        return len(self.targets[0])


@dataclass
class Group:
    """Rows that begin with the same `shared` tokens, read once; a single row shares nothing."""

    rows: list[Row]
    shared: int = 0

    @property
    def length(self) -> int:
        return self.shared or self.rows[0].length

    @property
    def key(self) -> bytes:
        return self.rows[0].key[: 4 * self.length]

    @property
    def key_ids(self) -> np.ndarray:
        return self.rows[0].ids[: self.length]

    @property
    def first(self) -> int:
        return self.shared or self.rows[0].first


class Tail(NamedTuple):
    """A row whose first `skip` tokens are in row `cached` of a cache."""

    cached: int
    row: Row
    skip: int


# ---- what is computed


def _read(params, config: Config, x_BTD, places_2M, targets_MA):
    """(log-probability of each target (M, A), likeliest id (M,)) at places (row, position) of x.

    The logits are made a chunk of places at a time.
    """
    # all places in chunks of one size, the last one padded
    M, A = targets_MA.shape
    chunk = min(config.loss_chunk, M)
    x_MD = x_BTD[places_2M[0], places_2M[1]]
    padding = ((0, -M % chunk), (0, 0))

    def in_chunks(array):
        return jnp.pad(array, padding).reshape(-1, chunk, array.shape[-1])

    chunks = in_chunks(x_MD), in_chunks(jnp.maximum(targets_MA, 0))

    def one(chunk):
        x, targets = chunk
        logits_V = logits(params, config, x)
        top = logits_V.max(axis=-1, keepdims=True)
        # of each target, its logit less the log of the sum of all exponentials
        picked = jnp.take_along_axis(logits_V, targets, axis=-1)
        total = jnp.exp(logits_V - top).sum(axis=-1, keepdims=True)
        lse = top + jnp.log(total)
        # argmax by plain reductions, which XLA:CPU vectorises: the first of the highest
        V = logits_V.shape[-1]
        best = jnp.where(logits_V == top, jnp.arange(V), V).min(axis=-1)
        return picked - lse, best

    logprob, best = jax.lax.map(one, chunks)
    # without the padding of the last chunk
    return logprob.reshape(-1, A)[:M], best.reshape(-1)[:M]


@partial(jax.jit, static_argnames="config")
def _whole(params, config: Config, tokens_BT, places_2M, targets_MA):
    """`_read` after a forward over whole rows."""
    x_BTD, _ = hidden(params, config, tokens_BT)
    return _read(params, config, x_BTD, places_2M, targets_MA)


@partial(jax.jit, static_argnames=("config", "slots"))
def _begin(params, config: Config, tokens_BT, *, slots: int):
    """A cache that has read `tokens_BT` (padded behind with -1)."""
    empty = init_cache(config, len(tokens_BT), slots)
    _, cache = hidden(params, config, tokens_BT, empty)
    return cache


@partial(jax.jit, static_argnames="config")
def _extend(params, config: Config, cache, rows_B, tokens_BT):
    """Rows of a cache, copied as `rows_B` says, that have read `tokens_BT` too."""
    _, cache = hidden(params, config, tokens_BT, pick_rows(cache, rows_B))
    return cache


@partial(jax.jit, static_argnames="config")
def _ends(params, config: Config, cache, rows_B, tokens_BT, places_2M, targets_MA):
    """`_read` after the cache's rows have read `tokens_BT`; positions count from those."""
    x_BTD, _ = hidden(params, config, tokens_BT, pick_rows(cache, rows_B))
    return _read(params, config, x_BTD, places_2M, targets_MA)


# ---- shapes: few of them, each compiled once


def _power(n: int, base: int = 2) -> int:
    """The next power of a base."""
    p = 1
    while p < n:
        p *= base
    return p


def _fit(tokens: int, width: int) -> int:
    """How many rows of a width hold so many tokens, as a power of two, at least 1."""
    rows = max(tokens // width, 1)
    return 1 << rows.bit_length() - 1


def _batches(things, size: Callable, batch_tokens: int, most: int | None = None):
    """(rows to pad to, things) with things of one bucket together.

    What fills no batch joins those of the next longer bucket.
    """
    pools = {}
    for thing in things:
        pools.setdefault(size(thing), []).append(thing)

    # from short to long, handing on what does not fill a batch
    left = []
    for i, width in enumerate(sorted(pools)):
        pool = left + pools[width]
        B = min(_fit(batch_tokens, width), most or batch_tokens)
        # the last have nobody to be handed on to
        last = i + 1 == len(pools)
        whole = len(pool)
        if not last:
            whole -= len(pool) % B
        for start in range(0, whole, B):
            part = pool[start : start + B]
            yield min(B, _power(len(part), 4)), part
        left = pool[whole:]


def _pad(rows, B: int, width: int, fill: int = -1) -> np.ndarray:
    """Lists of ids as (B, width), filled behind and below."""
    padded = np.full((B, width), fill, np.int32)
    for line, ids in zip(padded, rows):
        line[: len(ids)] = ids
    return padded


def _asked(rows: Sequence[Row], skips: Sequence[int], least: int) -> tuple[np.ndarray, np.ndarray]:
    """(places (2, M), targets (M, A)) of all that rows want to know, row by row.

    skips: how many first tokens of each row are not in the batch. least: of M.
    """
    # M answers, each for up to A alternatives
    scored = sum(row.scored for row in rows)
    alternatives = max(len(row.targets) for row in rows)
    M = max(least, _power(scored))
    A = _power(alternatives)
    places = np.zeros((2, M), np.int32)
    targets = np.full((M, A), -1, np.int32)

    # each row takes the next `scored` answers
    begin = 0
    for i, (row, skip) in enumerate(zip(rows, skips)):
        part = slice(begin, begin + row.scored)
        places[0, part] = i
        places[1, part] = np.arange(row.scored) + row.first - skip
        for a, target in enumerate(row.targets):
            targets[part, a] = target
        begin += row.scored
    return places, targets


# ---- which rows share what


def _common(a: bytes, b: bytes) -> int:
    """Length in tokens of the common beginning of two keys."""
    # four bytes a token
    n = min(len(a), len(b)) // 4
    ids_a = np.frombuffer(a[: 4 * n], "i4")
    ids_b = np.frombuffer(b[: 4 * n], "i4")
    differ = np.flatnonzero(ids_a != ids_b)
    return int(differ[0]) if differ.size else n


def _share(things, near: float, enough: int) -> list[tuple[int, list]]:
    """Neighbours in sorted order with a common beginning that is worth reading apart.

    (its length, things), or (0, [thing]) for a thing that shares nothing. Things have a key, a
    length and `first`, up to which they may share. Runs end where the common beginning of two
    neighbours is shorter than `near` times that of the pair before or behind. Each must leave less
    than SHARE_BELOW of its tokens to read.
    """
    things = sorted(things, key=lambda t: (t.key, t.first))

    # what each thing and the one before it have in common, nothing at both ends
    common = [0]
    for a, b in zip(things, things[1:]):
        shared = min(a.first, b.first, _common(a.key, b.key))
        common.append(shared)
    common.append(0)

    # runs of neighbours that have about as much in common
    runs = []
    for i, thing in enumerate(things):
        neighbours = max(common[i - 1], common[i + 1])
        if i and common[i] >= max(SHORTEST, near * neighbours):
            shared, run = runs[-1]
            run.append(thing)
            runs[-1] = min(shared, common[i]), run
        else:
            runs.append((thing.first, [thing]))
    # a run that saves too little falls apart
    worth = []
    for shared, run in runs:
        total = sum(t.length for t in run)
        saved = (len(run) - 1) * shared
        if saved >= max(enough, (1 - SHARE_BELOW) * total):
            worth.append((shared, run))
        else:
            worth += [(0, [t]) for t in run]
    return worth


def _plan(rows, batch_tokens: int) -> list[tuple[int, list[Group]]]:
    """Rows in groups (the options of a question), and those in sets with a common beginning.

    (length of the set's beginning, such as few-shot examples, or 0; groups). What does not save a
    batch has no use: groups must together, each set by itself.
    """
    groups = [Group(run, shared) for shared, run in _share(rows, NEAR, 1)]
    # too little to gain: every row by itself
    saved = sum((len(g.rows) - 1) * g.shared for g in groups)
    if saved < batch_tokens:
        groups = [Group([row]) for row in rows]

    # sets of groups that begin alike; those that don't are a set without a beginning
    sets, alone = [], []
    for shared, run in _share(groups, FAR, batch_tokens):
        if shared:
            sets.append((shared, run))
        else:
            alone += run
    return [*sets, (0, alone)] if alone else sets


# ---- reading them


class ForwardPasses(NamedTuple):
    """The model at work; its methods yield (rows, what `_read` gives for them).

    Answers are still being computed when they are yielded. few: little is to be read, so that few
    shapes matter more than little padding.
    """

    params: object
    config: Config
    batch_tokens: int
    few: bool = False

    def slots(self, tokens: int) -> int:
        """The slots of a cache for so many tokens, and what whole rows of them are padded to."""
        if self.few:
            return max(LEAST_LENGTH_OF_FEW, _power(tokens))
        return bucket(tokens, 16)

    def length(self, tokens: int, most: int) -> int:
        """The length that so many tokens are padded to; `most` is enough for them."""
        if self.few:
            # in fourfold steps: 64, 256, 1024, ...
            return min(most, max(LEAST_LENGTH_OF_FEW, _power(tokens, 4)))
        return bucket(tokens, LEAST_LENGTH)

    def asked(self, rows: list[Row], skips: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """`_asked`, in few shapes where little is to be read."""
        return _asked(rows, skips, LEAST_ANSWERS_OF_FEW if self.few else LEAST_ANSWERS)

    def read(self, rows: list[Row], share: bool) -> Iterator[tuple]:
        """All rows in batches, in no particular order."""
        if share:
            plan = _plan(rows, self.batch_tokens)
        elif rows:
            plan = [(0, [Group([row]) for row in rows])]
        else:
            plan = []

        for prefix, groups in plan:
            # the beginning of a set is read once, into a cache of one row
            longest = max(row.length for group in groups for row in group.rows)
            slots = self.slots(longest)
            start = self.begin(groups[0], prefix, slots) if prefix else None

            # rows that share nothing but that beginning; those longer than the context need a
            # cache, which knows how far a long layer sees
            single = [group.rows[0] for group in groups if not group.shared]
            if prefix or longest > self.config.sequence_len:
                yield from self.read_behind(start, prefix, single, slots)
            else:
                yield from self.read_whole(single)
            # and groups that share more
            shared = [group for group in groups if group.shared]
            yield from self.read_groups(start, prefix, shared, slots)

    def begin(self, group: Group, prefix: int, slots: int):
        """A cache of one row that has read the beginning of a set."""
        ids = _pad([group.key_ids[:prefix]], 1, self.length(prefix, slots))
        return _begin(self.params, self.config, ids, slots=slots)

    def most(self, slots: int) -> int:
        """Rows of a batch whose caches have so many slots."""
        return _fit(CACHE_BATCHES * self.batch_tokens, slots)

    def read_whole(self, rows: list[Row]) -> Iterator[tuple]:
        """Rows that share nothing, without a cache."""
        # TPU kernels want whole tiles of positions
        has_tiles = self.config.attention_name in ("splash", "pallas")
        tile = KERNEL_TILE if has_tiles else 1

        def width(row):
            tiles = -(-self.slots(row.length) // tile)
            return min(tiles * tile, self.config.sequence_len)

        for B, part in _batches(rows, width, self.batch_tokens):
            widest = max(map(width, part))
            ids = _pad([row.ids for row in part], B, widest, fill=0)
            asked = self.asked(part, [0] * len(part))
            yield part, _whole(self.params, self.config, ids, *asked)

    def read_behind(self, start, prefix: int, rows: list[Row], slots: int) -> Iterator[tuple]:
        """Rows one by one behind the beginning of their set, or in an empty cache without one."""

        def width(row):
            return self.length(row.length - prefix, slots)

        for B, part in _batches(rows, width, self.batch_tokens, self.most(slots)):
            cache = start if prefix else init_cache(self.config, 1, slots)
            tails = [Tail(0, row, prefix) for row in part]
            yield self.read_tails(cache, tails, B, max(map(width, part)))

    def read_groups(self, start, prefix: int, groups: list[Group], slots: int) -> Iterator[tuple]:
        """Groups, each one's shared tokens once, and then its rows behind them."""

        def width(group):
            return self.length(group.shared - prefix, slots)

        for B, part in _batches(groups, width, self.batch_tokens, self.most(slots)):
            # what the rows of each group share goes into the cache
            widest = max(map(width, part))
            ids = _pad([group.key_ids[prefix:] for group in part], B, widest)
            tails = []
            for i, group in enumerate(part):
                tails += [Tail(i, row, group.shared) for row in group.rows]
            longest = max(tail.row.length - tail.skip for tail in tails)
            end = self.length(longest, slots)
            if prefix:
                room = slots
                copies = np.zeros(B, np.int32)
                cache = _extend(self.params, self.config, start, copies, ids)
            else:
                room = slots if self.few else widest + end
                cache = _begin(self.params, self.config, ids, slots=room)

            # and then their ends, as many at a time as there is room for
            R = min(_power(len(tails)), _fit(self.batch_tokens, end), self.most(room))
            for begin in range(0, len(tails), R):
                yield self.read_tails(cache, tails[begin : begin + R], R, end)

    def read_tails(self, cache, tails: list[Tail], B: int, width: int) -> tuple:
        """What stands behind the tokens that rows of a cache have read."""
        rows = [tail.row for tail in tails]
        skips = [tail.skip for tail in tails]
        # which row of the cache each one goes on from
        cached = np.zeros(B, np.int32)
        cached[: len(tails)] = [tail.cached for tail in tails]
        ids = _pad([tail.row.ids[tail.skip :] for tail in tails], B, width)
        asked = self.asked(rows, skips)
        return rows, _ends(self.params, self.config, cache, cached, ids, *asked)


def _answers(batches, total: int, progress) -> Iterator[tuple]:
    """(owner, log-probabilities, whether each token is the likeliest) of every alternative.

    Runs a little behind the device, so that it always has something to do.
    """
    done, waiting = 0, deque()
    for batch in itertools.chain(batches, [None] * AHEAD):
        waiting.append(batch)
        if len(waiting) <= AHEAD:
            continue
        oldest = waiting.popleft()
        if oldest is None:
            continue

        # here the host waits for the device
        rows, answers = oldest
        logprob, best = map(np.asarray, answers)

        # each row takes the next `scored` answers, as `_asked` laid them out
        begin = 0
        for row in rows:
            part = slice(begin, begin + row.scored)
            for a, (target, owner) in enumerate(zip(row.targets, row.owners)):
                yield owner, logprob[part, a], best[part] == target
            begin += row.scored
        done += sum(len(row.owners) for row in rows)
        if progress:
            progress(done, total)


# ---- what callers use


def _reading(config: Config, batch_tokens, max_tokens, stride, share, progress) -> Reading:
    """How to read, with the defaults filled in and senseless values refused."""
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS.get(jax.default_backend(), BATCH_TOKENS_ELSEWHERE)
    room = max_tokens or config.sequence_len
    stride = stride or room
    if min(batch_tokens, room, stride) < 1 or stride > room:
        raise UserError(
            "scoring needs batch_tokens, max_tokens and stride of at least 1 and "
            f"stride <= max_tokens, got {batch_tokens}, {room}, {stride}"
        )
    return Reading(batch_tokens, room, stride, share, progress)


def _check_ids(config: Config, ids: np.ndarray, n: int) -> None:
    """UserError for a token that the model does not have."""
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if outside.size:
        raise UserError(
            f"request {n} holds token {outside[0]}, outside the model's vocabulary of "
            f"{config.vocab_size}: encode with the tokenizer that the model was trained with"
        )


def _windows(context: Sequence[int], continuation: Sequence[int], room: int, stride: int):
    """(context, tokens to score, tokens of context left out) that together score a continuation.

    Each token once: in one piece where it fits into `room` inputs (its last token is no input),
    else in pieces of `stride` tokens; each sees as much of what stands before it as there is room
    for.
    """
    whole = [*context, *continuation]
    fits = len(continuation) <= room
    step = room if fits else stride
    for start in range(len(context), len(whole), step):
        end = min(start + step, len(whole))
        seen = max(0, end - 1 - room)
        yield whole[seen:start], whole[start:end], seen


def _logprobs(params, config: Config, pairs: Iterable, reading: Reading) -> list[tuple]:
    """For each (context, continuation) what `_score` takes.

    Log-probability per token, whether each is the likeliest, tokens of context left out.
    """
    rows = {}
    pieces = []
    cuts = []
    for n, (context, continuation) in enumerate(pairs):
        _check_ids(config, np.array([*context, *continuation]), n)
        windows = list(_windows(context, continuation, reading.room, reading.stride))
        cuts.append(windows[0][2] if windows else 0)
        pieces.append([None] * len(windows))

        # equal sequences are read once, whatever is asked of them
        for i, (before, scored, _) in enumerate(windows):
            # the last scored token is never an input
            key = np.array([*before, *scored[:-1]], ">i4").tobytes()
            first = len(before) - 1
            row = rows.setdefault((key, first), Row(key, first, [], []))
            row.targets.append(scored)
            row.owners.append((n, i))

    # answers come in any order, and know where they belong
    few = sum(row.length for row in rows.values()) < FEW
    passes = ForwardPasses(params, config, reading.batch_tokens, few)
    batches = passes.read(list(rows.values()), reading.share)
    total = sum(map(len, pieces))
    for (n, i), logprob, greedy in _answers(batches, total, reading.progress):
        pieces[n][i] = logprob, greedy
    return [(*_joined(parts), cut) for parts, cut in zip(pieces, cuts)]


def _joined(parts: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """The pieces of one continuation put together."""
    logprobs, greedy = zip(*parts) if parts else ((), ())
    return (
        np.concatenate([np.zeros(0, np.float32), *logprobs]),
        np.concatenate([np.zeros(0, bool), *greedy]),
    )


def score(
    params,
    config: Config,
    tokenizer,
    requests: Sequence,
    *,
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    share: bool = True,
    progress: Callable | None = None,
) -> list[list[Score]]:
    """How likely each continuation is after its context: per request, a `Score` per continuation.

    requests: (context ids, [continuation ids, ...]); an empty context stands for the tokenizer's
    bos. max_tokens: inputs that the model sees at most, config.sequence_len by default; a context
    too long for that loses its beginning (`Score.cut` says how much), and a continuation that is
    itself too long is scored in pieces, each after as much before it as there is room for.
    batch_tokens: inputs per forward pass. share: read a beginning that several sequences have in
    common once, where that pays; the answers are the same. progress(done, total) is called after
    each batch with numbers of continuations.
    """
    reading = _reading(config, batch_tokens, max_tokens, None, share, progress)
    # one pair per continuation; the rows that they share are found later
    pairs = []
    for context, continuations in requests:
        before = list(context) or [tokenizer.bos]
        pairs += [(before, list(continuation)) for continuation in continuations]
    answers = iter(_logprobs(params, config, pairs, reading))

    # handed back as they were asked
    scores = []
    for _, continuations in requests:
        scores.append([_score(*next(answers)) for _ in continuations])
    return scores


def _score(logprobs: np.ndarray, greedy: np.ndarray, cut: int) -> Score:
    """The `Score` of a continuation from what is known of its tokens."""
    total = float(logprobs.sum(dtype=np.float64))
    return Score(total, len(logprobs), bool(greedy.all()), cut)


def rolling(
    params,
    config: Config,
    tokenizer,
    texts: Iterable,
    *,
    stride: int | None = None,
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    progress: Callable | None = None,
) -> list[np.ndarray]:
    """Log-probability of every token of each text (ids without bos), float32, each after bos.

    A text longer than max_tokens (config.sequence_len by default) goes through in windows that
    score `stride` tokens each: max_tokens by default, as lm_eval does it (the last window alone
    looks further back); smaller strides give every token more before it.
    """
    reading = _reading(config, batch_tokens, max_tokens, stride, False, progress)
    pairs = [([tokenizer.bos], list(ids)) for ids in texts]
    return [logprobs for logprobs, _, _ in _logprobs(params, config, pairs, reading)]
