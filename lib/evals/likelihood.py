"""How likely a model finds given continuations: batched by length, each shared beginning read once.

Every measurement by likelihood rests on `score`: multiple choice, schemas, language modelling, perplexity, lm_eval.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lib import model
from lib.config import KERNEL_TILE, Config
from lib.files import UserError
from lib.model.cache import pick_rows

# input tokens of a forward pass: on a CPU, activations that stay in its cache
BATCH_TOKENS = {"cpu": 1024}
BATCH_TOKENS_ELSEWHERE = 32768
CACHE_BATCHES = 8  # tokens that the caches of a batch of ends may hold, in batches
AHEAD = 2  # batches that the device is given before the first one's answers are waited for
# a beginning is read apart where that leaves less than this part of the tokens to read
SHARE_BELOW = 0.8
SHORTEST = 8  # tokens of a beginning, below which it is not looked at
# how far a common beginning may fall behind its neighbours': within a question, among questions
NEAR, FAR = 0.85, 0.5


class Score(NamedTuple):
    """What `score` says of one continuation. logprob: natural log, summed over its tokens (0 for none)."""

    logprob: float
    tokens: int
    greedy: bool  # every token is the likeliest after those before it
    # tokens of the context that were left out at its beginning, because the model's context is too
    # short
    cut: int


@dataclass
class Row:
    """One sequence to read. Output position `first + u` answers for the u-th scored token of every alternative."""

    key: bytes  # the input tokens, big-endian, so that bytes sort as the ids do
    first: int
    targets: list  # alternatives: lists of target ids, all of one length
    owners: list  # per alternative: what to do with its answer

    @property
    def ids(self):
        return np.frombuffer(self.key, ">i4")

    @property
    def length(self) -> int:
        return len(self.key) // 4

    @property
    def scored(self) -> int:
        return len(self.targets[0])


@dataclass
class Group:
    """Rows that begin with the same `shared` tokens, which are read once; a single row shares nothing."""

    rows: list
    shared: int = 0

    @property
    def length(self) -> int:
        return self.shared or self.rows[0].length

    @property
    def key(self) -> bytes:
        return self.rows[0].key[: 4 * self.length]

    @property
    def key_ids(self):
        return self.rows[0].ids[: self.length]

    @property
    def first(self) -> int:
        return self.shared or self.rows[0].first


# ---- what is computed


def _read(params, config: Config, x_BTD, places_2M, targets_MA):
    """(log-probability of each target (M, A), likeliest id (M,)) at places (row, position) of x, a chunk of them at a time."""
    x, t = x_BTD[places_2M[0], places_2M[1]], jnp.maximum(targets_MA, 0)
    chunk = min(config.loss_chunk, len(x))
    short = -len(x) % chunk
    x, t = (jnp.pad(a, ((0, short), (0, 0))).reshape(-1, chunk, a.shape[-1]) for a in (x, t))

    def part(xt):
        logits = model.logits(params, config, xt[0])
        picked, top = (
            jnp.take_along_axis(logits, xt[1], axis=-1),
            logits.max(axis=-1, keepdims=True),
        )
        lse = top + jnp.log(jnp.exp(logits - top).sum(axis=-1, keepdims=True))
        # argmax by plain reductions, which XLA:CPU vectorises: the first of the highest
        best = jnp.where(logits == top, jnp.arange(logits.shape[-1]), logits.shape[-1]).min(axis=-1)
        return picked - lse, best

    logprob, best = jax.lax.map(part, (x, t))
    return logprob.reshape(-1, logprob.shape[-1])[: len(targets_MA)], best.reshape(-1)[
        : len(targets_MA)
    ]


@partial(jax.jit, static_argnames="config")
def _whole(params, config: Config, tokens_BT, places_2M, targets_MA):
    """`_read` after a forward over whole rows."""
    return _read(params, config, model.hidden(params, config, tokens_BT)[0], places_2M, targets_MA)


@partial(jax.jit, static_argnames=("config", "slots"))
def _begin(params, config: Config, tokens_BT, *, slots: int):
    """A cache that has read `tokens_BT` (padded behind with -1)."""
    return model.hidden(params, config, tokens_BT, model.init_cache(config, len(tokens_BT), slots))[
        1
    ]


@partial(jax.jit, static_argnames="config")
def _extend(params, config: Config, cache, rows_B, tokens_BT):
    """Rows of a cache, copied as `rows_B` says, that have read `tokens_BT` too."""
    return model.hidden(params, config, tokens_BT, pick_rows(cache, rows_B))[1]


@partial(jax.jit, static_argnames="config")
def _ends(params, config: Config, cache, rows_B, tokens_BT, places_2M, targets_MA):
    """`_read` after the cache's rows have read `tokens_BT`; positions count from those."""
    return _read(
        params,
        config,
        model.hidden(params, config, tokens_BT, pick_rows(cache, rows_B))[0],
        places_2M,
        targets_MA,
    )


# ---- shapes: few of them, each compiled once


def bucket(n: int, least: int = 8) -> int:
    """The next of 8, 12, 16, 24, 32, 48 …: one compilation serves many lengths, and at most a third is padding."""
    power = max(least, 1 << max(n - 1, 0).bit_length())
    return power * 3 // 4 if power > least and n <= power * 3 // 4 else power


def _power(n: int, base: int = 2) -> int:
    p = 1
    while p < n:
        p *= base
    return p


def _fit(tokens: int, width: int) -> int:
    """How many rows of a width hold so many tokens, as a power of two, at least 1."""
    return max(1, 1 << (tokens // width).bit_length() - 1) if tokens >= width else 1


def _batches(things, size: Callable, batch_tokens: int, most: int | None = None):
    """(rows to pad to, things) with things of one bucket together; what fills no batch joins those of the next longer bucket."""
    pools = {}
    for thing in things:
        pools.setdefault(size(thing), []).append(thing)
    left = []
    for i, width in enumerate(sorted(pools)):
        pool = left + pools[width]
        B = min(_fit(batch_tokens, width), most or batch_tokens)
        whole = len(pool) - len(pool) % B if i + 1 < len(pools) else len(pool)
        for start in range(0, whole, B):
            part = pool[start : start + B]
            yield min(B, _power(len(part), 4)), part
        left = pool[whole:]


def _pad(rows, B: int, width: int, fill: int = -1):
    """Lists of ids as (B, width), filled behind and below."""
    out = np.full((B, width), fill, np.int32)
    for line, ids in zip(out, rows):
        line[: len(ids)] = ids
    return out


def _asked(rows, skips):
    """(places (2, M), targets (M, A)) of all that rows want to know, row by row, where the first `skips` tokens are not in the batch."""
    M = max(64, _power(sum(row.scored for row in rows)))
    places, targets = (
        np.zeros((2, M), np.int32),
        np.full((M, _power(max(len(row.targets) for row in rows))), -1, np.int32),
    )
    at = 0
    for i, (row, skip) in enumerate(zip(rows, skips)):
        end = at + row.scored
        places[0, at:end], places[1, at:end] = i, np.arange(row.scored) + row.first - skip
        for a, target in enumerate(row.targets):
            targets[at:end, a] = target
        at = end
    return places, targets


# ---- which rows share what


def _common(a: bytes, b: bytes) -> int:
    """Length in tokens of the common beginning of two keys."""
    n = min(len(a), len(b)) // 4
    differ = np.flatnonzero(np.frombuffer(a[: 4 * n], "i4") != np.frombuffer(b[: 4 * n], "i4"))
    return int(differ[0]) if differ.size else n


def _share(things, near: float, enough: int) -> list[tuple[int, list]]:
    """Neighbours in sorted order with a common beginning that is worth reading apart: (its length, things), else (0, one thing).

    things have a key, a length and `first`, up to which they may share. Runs end where the common beginning of two neighbours is
    shorter than `near` times that of the pair before or behind. Each must leave less than SHARE_BELOW of its tokens to read.
    """
    things = sorted(things, key=lambda t: (t.key, t.first))
    common = [
        0,
        *(min(a.first, b.first, _common(a.key, b.key)) for a, b in zip(things, things[1:])),
        0,
    ]
    runs = []
    for i, thing in enumerate(things):
        if i and common[i] >= SHORTEST and common[i] >= near * max(common[i - 1], common[i + 1]):
            shared, run = runs[-1]
            run.append(thing)
            runs[-1] = min(shared, common[i]), run
        else:
            runs.append((thing.first, [thing]))
    worth = []
    for shared, run in runs:
        total, saved = sum(t.length for t in run), (len(run) - 1) * shared
        if saved >= max(enough, (1 - SHARE_BELOW) * total):
            worth.append((shared, run))
        else:
            worth += [(0, [t]) for t in run]
    return worth


def _plan(rows, batch_tokens: int) -> list[tuple[int, list[Group]]]:
    """Rows in groups (the options of a question), and those in sets with a beginning in common (few-shot examples), 0 for none.

    What does not save a batch has no use: groups must together, each set by itself.
    """
    groups = [Group(run, shared) for shared, run in _share(rows, NEAR, 1)]
    if sum((len(g.rows) - 1) * g.shared for g in groups) < batch_tokens:
        groups = [Group([row]) for row in rows]
    sets, alone = [], []
    for shared, run in _share(groups, FAR, batch_tokens):
        if shared:
            sets.append((shared, run))
        else:
            alone += run
    return [*sets, (0, alone)] if alone else sets


# ---- what callers use


def _windows(context: Sequence[int], continuation: Sequence[int], room: int, stride: int):
    """(context, tokens to score, tokens of context left out) that together score each token of a continuation once.

    One piece where it fits into `room` inputs (its last token is no input), else pieces of `stride` tokens; each sees as much of
    what stands before it as there is room for.
    """
    whole = [*context, *continuation]
    begin = len(context)
    step = room if len(continuation) <= room else stride
    for start in range(begin, len(whole), step):
        end = min(start + step, len(whole))
        seen = max(0, end - 1 - room)
        yield whole[seen:start], whole[start:end], seen


def _run(params, config: Config, rows, batch_tokens: int, share: bool):
    """All rows in batches, in no particular order: yields (rows of a batch, what `_read` gives for them, still being computed)."""
    tile = KERNEL_TILE if config.attention_name in ("splash", "pallas") else 1
    context = config.sequence_len  # longer rows need a cache, which knows how far a long layer sees

    def ends(cache, at, part, skips, B, width):
        """Rows behind the first `skips` tokens, which rows `at` of the cache have read."""
        at = np.array([*at] + [0] * (B - len(part)), np.int32)
        ids = _pad([row.ids[skip:] for row, skip in zip(part, skips)], B, width)
        return part, _ends(params, config, cache, at, ids, *_asked(part, skips))

    def whole_width(row):
        return min(-(-bucket(row.length, 16) // tile) * tile, context)

    apart = [(0, [Group([row]) for row in rows])] if rows else []
    for prefix, groups in _plan(rows, batch_tokens) if share else apart:
        single, shared = (
            [g.rows[0] for g in groups if not g.shared],
            [g for g in groups if g.shared],
        )
        longest = max(row.length for g in groups for row in g.rows)
        slots = bucket(longest, 16)
        most = _fit(CACHE_BATCHES * batch_tokens, slots)
        if prefix:
            start = _begin(
                params, config, _pad([groups[0].key_ids[:prefix]], 1, bucket(prefix)), slots=slots
            )
        if prefix or longest > context:
            rest = lambda row: bucket(row.length - prefix)
            for B, part in _batches(single, rest, batch_tokens, most):
                cache = start if prefix else model.init_cache(config, 1, slots)
                yield ends(
                    cache, [0] * len(part), part, [prefix] * len(part), B, max(map(rest, part))
                )
        else:
            for B, part in _batches(single, whole_width, batch_tokens):
                ids = _pad([row.ids for row in part], B, max(map(whole_width, part)), fill=0)
                yield part, _whole(params, config, ids, *_asked(part, [0] * len(part)))
        rest = lambda g: bucket(g.shared - prefix)
        for B, part in _batches(shared, rest, batch_tokens, most):
            width = max(map(rest, part))
            tails = [(i, row, g.shared) for i, g in enumerate(part) for row in g.rows]
            end = bucket(max(row.length - skip for _, row, skip in tails))
            ids = _pad([g.key_ids[prefix:] for g in part], B, width)
            if prefix:
                cache = _extend(params, config, start, np.zeros(B, np.int32), ids)
            else:
                cache = _begin(params, config, ids, slots=width + end)
                most = _fit(CACHE_BATCHES * batch_tokens, width + end)
            R = min(_power(len(tails)), _fit(batch_tokens, end), most)
            for begin in range(0, len(tails), R):
                at, chunk, skips = zip(*tails[begin : begin + R])
                yield ends(cache, at, chunk, skips, R, end)


def _answers(batches, total: int, progress):
    """(owner, log-probabilities, whether each token is the likeliest) of every alternative of every row, a little behind the device."""
    done, waiting = 0, collections.deque()
    for batch in itertools.chain(batches, [None] * AHEAD):
        waiting.append(batch)
        if len(waiting) <= AHEAD or (oldest := waiting.popleft()) is None:
            continue
        part, (logprob, best) = oldest[0], map(np.asarray, oldest[1])
        at = 0
        for row in part:
            end = at + row.scored
            for a, (target, owner) in enumerate(zip(row.targets, row.owners)):
                yield owner, logprob[at:end, a], best[at:end] == target
            at = end
        done += sum(len(row.owners) for row in part)
        if progress:
            progress(done, total)


def _logprobs(
    params,
    config: Config,
    pairs: Iterable,
    *,
    batch_tokens: int | None,
    room: int,
    stride: int,
    share: bool,
    progress,
):
    """For each (context, continuation): log-probability per token, whether each is the likeliest, tokens of context left out."""
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS.get(jax.default_backend(), BATCH_TOKENS_ELSEWHERE)
    if min(batch_tokens, room, stride) < 1 or stride > room:
        raise UserError(
            f"scoring needs batch_tokens, max_tokens and stride of at least 1 and stride <= max_tokens, got "
            f"{batch_tokens}, {room}, {stride}"
        )
    rows, pieces, cuts = {}, [], []
    for n, (context, continuation) in enumerate(pairs):
        ids = np.array([*context, *continuation])
        if not (ids.min() >= 0 and ids.max() < config.vocab_size):
            raise UserError(
                f"request {n} holds token {ids.max() if ids.min() >= 0 else ids.min()}, outside the model's vocabulary "
                f"of {config.vocab_size}: encode with the tokenizer that the model was trained with"
            )
        pieces.append([])
        cuts.append(0)
        for before, scored, seen in _windows(context, continuation, room, stride):
            if not pieces[n]:
                cuts[n] = seen
            key, first = np.array([*before, *scored[:-1]], ">i4").tobytes(), len(before) - 1
            row = rows.setdefault((key, first), Row(key, first, [], []))
            row.targets.append(scored)
            row.owners.append((n, len(pieces[n])))
            pieces[n].append(None)
    batches = _run(params, config, list(rows.values()), batch_tokens, share)
    for (n, i), logprob, greedy in _answers(batches, sum(map(len, pieces)), progress):
        pieces[n][i] = logprob, greedy
    join = lambda parts, kind: np.concatenate([np.zeros(0, kind), *parts])
    return [
        (join([p[0] for p in parts], np.float32), join([p[1] for p in parts], bool), cut)
        for parts, cut in zip(pieces, cuts)
    ]


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
    """How likely each continuation is after its context: for each request, in order, one `Score` per continuation.

    requests: (context ids, [continuation ids, ...]); an empty context stands for the tokenizer's bos. max_tokens: inputs that the
    model sees at most, config.sequence_len by default; a context too long for that loses its beginning (`Score.cut` says how much),
    and a continuation that is itself too long is scored in pieces, each after as much before it as there is room for. batch_tokens:
    inputs per forward pass. share: read a beginning that several sequences have in common once, where that pays; the answers are the
    same. progress(done, total) is called after each batch with numbers of continuations.
    """
    room = max_tokens or config.sequence_len
    pairs = [
        (list(context) or [tokenizer.bos], list(c))
        for context, continuations in requests
        for c in continuations
    ]
    found = iter(
        _logprobs(
            params,
            config,
            pairs,
            batch_tokens=batch_tokens,
            room=room,
            stride=room,
            share=share,
            progress=progress,
        )
    )
    out = []
    for _, continuations in requests:
        parts = [next(found) for _ in continuations]
        out.append(
            [
                Score(float(lp.sum(dtype=np.float64)), len(lp), bool(greedy.all()), cut)
                for lp, greedy, cut in parts
            ]
        )
    return out


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
    """Log-probability of every token of each text (a list of ids without bos), float32: each token is scored once, after bos.

    A text longer than max_tokens (config.sequence_len by default) goes through in windows that score `stride` tokens each: max_tokens
    by default, as lm_eval does it (the last window alone looks further back); smaller strides give every token more before it.
    """
    room = max_tokens or config.sequence_len
    found = _logprobs(
        params,
        config,
        [([tokenizer.bos], list(ids)) for ids in texts],
        batch_tokens=batch_tokens,
        room=room,
        stride=stride or room,
        share=False,
        progress=progress,
    )
    return [logprob for logprob, _, _ in found]
