"""Decoding: tools in the loop, rows that come and go in one batch, and the whole of it in few
dispatches.

Everything here runs on an `Engine`: a fixed number of slots, each holding one row that is being
written. A row's last prompt token is not prefilled but fed to the first decoding step, so that
there is one place where tokens are chosen. `generate` and `stream` make `Engines` just for their
prompts; a server keeps them and lets rows join and leave.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lib import model
from lib.config import Config
from lib.files import UserError
from lib.generate import speculative
from lib.generate.sampling import (
    TOP,
    Sampling,
    empty_rows,
    new_row,
    sample,
    step_rows,
    top_alternatives,
)
from lib.model.cache import pick_rows, put_rows

# tokens decoded per dispatch: few enough to stream smoothly, many enough to hide the dispatch
CHUNK = 8
# the same when nobody is watching, but rows wait for a tool or for a free slot until it is over
LONG_CHUNK = 32
WHOLE_CHUNK = 128  # the same when no row waits for anything
PREFILL = 128  # prompt tokens per prefill pass
SIDES = 2  # engines side by side on a CPU, if it has the cores; more were not measured
SMALL = 32 * 2**20  # bytes of weights up to which that pays: each side reads them all


class Token(NamedTuple):
    """One new token. logprob is the model's own, before temperature and filters; `forced` ones came
    from a tool.

    top: the likeliest (id, logprob) pairs, as many as Sampling.logprobs asked for.
    """

    id: int
    logprob: float
    forced: bool = False
    top: list[tuple[int, float]] = []


# ---- what runs on the device ---------------------------------------------------------------------


@partial(jax.jit, donate_argnums=0)
def _set_rows(rows, slots_b, new):
    """Overwrite the rows `slots_b` (those outside are ignored) with the entries of `new`."""
    return rows | {
        name: rows[name].at[slots_b].set(value, mode="drop") for name, value in new.items()
    }


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _prefill(params, config: Config, cache, rows_b, tokens_bT, fresh):
    """Feed tokens_bT (-1 behind the end of a row) to some rows of a cache, emptied before if
    `fresh`.
    """
    part = pick_rows(cache, rows_b)
    part = part._replace(
        length=jnp.where(fresh, 0, part.length), last=jnp.where(fresh, -1, part.last)
    )
    _, part = model.hidden(params, config, tokens_bT, part)
    return put_rows(cache, rows_b, part)


@partial(jax.jit, donate_argnums=0)
def _repeat(cache, source_B):
    """A cache whose row i is a copy of row source_B[i]."""
    return pick_rows(cache, source_B)


@partial(jax.jit, static_argnames=("config", "pause"), donate_argnames=("cache", "rows"))
def _decode(params, config: Config, cache, rows, forced_BC, count, *, pause: int):
    """Up to `count` tokens for every row that is alive, in one dispatch; over early when no row can
    go on.

    forced_BC: ids that a row must take at step i instead of its own choice, or -1. A row that
    writes the token `pause` waits for the next call. Returns (cache, rows, out): ids (B, C), -1
    where a row wrote nothing, their logprobs, and alternatives (B, C, TOP).
    """
    B, C = forced_BC.shape
    out = dict(
        id=jnp.full((B, C), -1, jnp.int32),
        logprob=jnp.zeros((B, C)),
        top_id=jnp.zeros((B, C, TOP), jnp.int32),
        top_logprob=jnp.zeros((B, C, TOP)),
    )

    def go_on(carry):
        i, _, rows, waiting_B, _ = carry
        return (i < count) & jnp.any(rows["alive"] & ~waiting_B)

    def one(carry):
        i, cache, rows, waiting_B, out = carry
        active_B = rows["alive"] & ~waiting_B
        logits_BTV, cache = model.forward(
            params, config, jnp.where(active_B, rows["token"], -1)[:, None], cache
        )
        logits_BV, force_B = logits_BTV[:, 0], forced_BC[:, i]
        token_B = jnp.where(force_B >= 0, force_B, sample(logits_BV, rows))
        lse_B = jax.nn.logsumexp(logits_BV, axis=-1)
        logprob_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0] - lse_B
        top_id, top_logprob = top_alternatives(logits_BV, lse_B, jnp.any(rows["top"] & active_B))
        new = dict(
            id=jnp.where(active_B, token_B, -1),
            logprob=logprob_B,
            top_id=top_id,
            top_logprob=top_logprob,
        )
        out = {name: out[name].at[:, i].set(value) for name, value in new.items()}
        rows = step_rows(rows, token_B, active_B, force_B < 0)
        return i + 1, cache, rows, waiting_B | (active_B & (token_B == pause)), out

    _, cache, rows, _, out = jax.lax.while_loop(
        go_on, one, (0, cache, rows, jnp.zeros(B, bool), out)
    )
    return cache, rows, out


# ---- what runs on the host -----------------------------------------------------------------------


class _Writer:
    """The host's side of one row: tool calls, stop tokens and stop strings.

    `push` takes each token, `ready` are those let out.
    """

    def __init__(self, sampling: Sampling, tokenizer, tool):
        self.sampling, self.tokenizer, self.tool = sampling, tokenizer, tool
        self.special = tokenizer.special if tool else {}
        self.stops = [s.encode() for s in sampling.stop_strings]
        self.call = None  # ids since <|python_start|>, or None outside of a call
        self.forced = []  # ids that the row must still take
        self.held = []  # tokens that may turn out to be the beginning of a stop string
        self.ready, self.made, self.finish = [], 0, None

    def push(self, token: Token):
        """Take the row's next token; sets `finish` when it was the last, and runs the tool when it
        ends a call.
        """
        self.made += 1
        if token.forced:
            self.forced.pop(0)
        elif token.id in self.sampling.stop:
            self._close("stop")
            return
        self._let_out(token)
        if self.finish is None and self.made == self.sampling.max_tokens:
            self._close("length")
        if self.finish is None and self.tool:
            self._tool(token.id)

    def _close(self, reason):
        self.ready, self.held, self.finish = self.ready + self.held, [], reason

    def _tool(self, id: int):
        """The state machine of tool calls: the same on sampled and on forced ids."""
        if id == self.special["<|python_start|>"]:
            self.call = []
        elif id == self.special["<|python_end|>"] and self.call is not None:
            result = self.tool(self.tokenizer.decode(self.call)) if self.call else None
            self.call = None
            if result is not None:
                self.forced = [
                    self.special["<|output_start|>"],
                    *self.tokenizer.encode(result),
                    self.special["<|output_end|>"],
                ]
        elif self.call is not None:
            self.call.append(id)

    def _let_out(self, token: Token):
        """Find stop strings in the bytes of what the model wrote in one go, wherever they cross
        tokens.
        """
        # not the model's own, within a call, which nobody hears, or no text
        silent = not self.stops or token.forced or self.call is not None
        if silent or token.id >= len(self.tokenizer.tokens):
            self.ready += [*self.held, token]
            self.held = []
            return
        self.held.append(token)
        text = b"".join(self.tokenizer.tokens[t.id] for t in self.held)
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        # otherwise the longest end of the text that could begin a stop string is held back
        open_ = max(
            (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        end = min(found) if found else len(text) - open_
        while self.held and len(first := self.tokenizer.tokens[self.held[0].id]) <= end:
            self.ready.append(self.held.pop(0))
            end -= len(first)
        if found:
            # the stop string begins inside a token: keep what is before it, as tokens of its own
            if end:
                cut = self.tokenizer.encode(first[:end].decode("utf-8", "ignore"))
                self.ready += [self.held[0]._replace(id=id, top=[]) for id in cut]
            self.held, self.finish = [], "stop"


class Engine:
    """A batch of `slots` rows that are written together, each joining and leaving on its own
    (continuous batching).

    length: the most tokens a row may have, prompt and output together. tool(text) -> str | None
    answers what the model writes between <|python_start|> and <|python_end|>; its result is forced
    back as <|output_start|>...<|output_end|>, None as nothing. What a row writes depends on its
    prompt, its Sampling and the parameters, and not on the other rows, nor on speculation.

    speculate: tokens drafted ahead per forward (lib.generate.speculative), by draft=(params,
    config) of a smaller model or, without one, from the row's own text; 4 is a good start, 0 is
    off.
    """

    def __init__(
        self,
        params,
        config: Config,
        slots: int,
        length: int,
        tokenizer=None,
        tool: Callable[[str], str | None] | None = None,
        speculate: int = 0,
        draft=None,
    ):
        if slots < 1 or length < 2 or speculate < 0:
            raise UserError(
                f"a decoding engine needs slots >= 1, length >= 2 and speculate >= 0, got {slots}, {length}, {speculate}"
            )
        if tool and tokenizer is None:
            raise UserError("tools need the tokenizer: pass tokenizer= beside tool=")
        if draft and (not speculate or draft[1].vocab_size != config.vocab_size):
            raise UserError(
                f"a draft model needs speculate >= 1 and the model's vocabulary of {config.vocab_size}, got speculate={speculate} "
                f"and a vocabulary of {draft[1].vocab_size}"
            )
        self.config, self.slots, self.length, self.tokenizer, self.tool, self.speculate = (
            config,
            slots,
            length,
            tokenizer,
            tool,
            speculate,
        )
        self.configs = [config, *([draft[1]] if draft else [])]
        self.params = [
            model.decoding_params(params, config),
            *([model.decoding_params(*draft)] if draft else []),
        ]
        self.caches = [
            model.init_cache(c, slots, length + speculate, spare=speculate) for c in self.configs
        ]
        self.rows = empty_rows(slots, config.vocab_size)
        if speculate and not draft:
            self.rows["history"] = jnp.zeros((slots, length), jnp.int32)
        # how many tokens were drafted so far, and how many of them were accepted
        self.drafted = self.accepted = 0
        self.pause = tokenizer.special["<|python_end|>"] if tool else -1
        self.writers: dict[int, _Writer] = {}
        # the first token of a new row is due: hand it out without waiting for a whole chunk
        self.fresh = False

    @property
    def free(self) -> int:
        """How many rows could be added now."""
        return self.slots - len(self.writers)

    def add(self, prompt: list[int], sampling: Sampling) -> int:
        """Let a row join: its slot.

        UserError if its prompt is empty, foreign or too long, or if no slot is free.
        """
        return self.add_many([prompt], [sampling])[0]

    def add_many(self, prompts: list[list[int]], samplings: list[Sampling]) -> list[int]:
        """Let several rows join, prefilled together, and equal prompts only once."""
        if not prompts:
            return []
        for prompt, sampling in zip(prompts, samplings, strict=True):
            self.check(prompt, sampling)
        if len(prompts) > self.free:
            raise UserError(
                f"{len(prompts)} rows do not fit into {self.free} free slots: wait until some are finished"
            )
        slots = [i for i in range(self.slots) if i not in self.writers][: len(prompts)]
        first = {}  # of equal prompts, the slot that is prefilled
        for slot, prompt in zip(slots, prompts):
            first.setdefault(tuple(prompt), slot)
        self._fill(list(first.values()), [p[:-1] for p in first])
        if len(first) < len(prompts):
            source = np.arange(self.slots)
            source[slots] = [first[tuple(p)] for p in prompts]
            self.caches = [_repeat(cache, source) for cache in self.caches]
        rooms = [self.length - len(p) for p in prompts]
        states = [
            new_row(p, s, self.config.vocab_size) | dict(left=np.int32(min(s.max_tokens, room)))
            for p, s, room in zip(prompts, samplings, rooms)
        ]
        if "history" in self.rows:
            states = [
                s | dict(history=np.pad(np.int32(p), (0, self.length - len(p))))
                for s, p in zip(states, prompts)
            ]
        padded = np.full(bucket(len(slots)), self.slots)
        padded[: len(slots)] = slots
        states += states[:1] * (len(padded) - len(states))
        self.rows = _set_rows(
            self.rows, padded, {name: np.stack([s[name] for s in states]) for name in states[0]}
        )
        for slot, sampling, room in zip(slots, samplings, rooms):
            sampling = (
                sampling if sampling.max_tokens <= room else replace(sampling, max_tokens=room)
            )
            self.writers[slot] = _Writer(sampling, self.tokenizer, self.tool)
        self.fresh = True
        return slots

    def check(self, prompt: list[int], sampling: Sampling):
        """UserError if this could never be added."""
        if not prompt:
            raise UserError(
                "a prompt has no tokens: begin it with the tokenizer's <|bos|> at least"
            )
        if bad := [t for t in prompt if not 0 <= t < self.config.vocab_size]:
            raise UserError(
                f"token {bad[0]} is outside the model's vocabulary of {self.config.vocab_size}: "
                "encode with the tokenizer that the model was trained with"
            )
        if len(prompt) >= self.length:
            raise UserError(
                f"a prompt of {len(prompt)} tokens leaves no room in a cache of {self.length}: shorten it"
            )
        if sampling.stop_strings and self.tokenizer is None:
            raise UserError("stop strings need the tokenizer: pass tokenizer= too")

    def _fill(self, slots: list[int], prompts: list[list[int]]):
        """Prefill rows from empty, PREFILL tokens at a time, in few shapes: bucketed numbers of
        rows and of tokens.
        """
        rows, longest = bucket(len(slots)), max(map(len, prompts))
        width = min(PREFILL, bucket(longest, 16))
        tokens = np.full((rows, max(1, -(-longest // width)) * width), -1, np.int32)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = prompt
        slots = np.array(slots + [self.slots] * (rows - len(slots)))
        for at in range(0, tokens.shape[1], width):
            self.caches = [
                _prefill(params, config, cache, slots, tokens[:, at : at + width], at == 0)
                for params, config, cache in zip(self.params, self.configs, self.caches)
            ]

    def step(self, count: int = CHUNK) -> dict[int, tuple[list[Token], str | None]]:
        """Write about `count` tokens in every busy slot: {slot: (new tokens, None or why the row is
        finished)}.

        "stop": a stop token or string, which is not among the tokens. "length": max_tokens, or the
        slot is full. A finished slot is free again. Tokens may come later than they were made while
        they could be the beginning of a stop string.
        """
        if not self.writers:
            return {}
        forced, given = np.full((self.slots, WHOLE_CHUNK), -1, np.int32), {}
        for slot, w in self.writers.items():
            ids = w.forced[:WHOLE_CHUNK]
            forced[slot, : len(ids)], given[slot] = ids, len(ids)
        count, self.fresh = 1 if self.fresh else min(count, WHOLE_CHUNK), False
        out = self._decode(forced, count)
        if not any(w.sampling.logprobs for w in self.writers.values()):
            out = {name: a for name, a in out.items() if "top" not in name}
        out = jax.device_get(out)
        self.drafted += int(out.get("drafted", 0))
        self.accepted += int(out.get("accepted", 0))
        result, dead = {}, []
        for slot, w in list(self.writers.items()):
            n = w.sampling.logprobs
            for i, (id, logprob) in enumerate(
                zip(out["id"][slot].tolist(), out["logprob"][slot].tolist())
            ):
                if id < 0 or w.finish:
                    assert i, "a busy row must move on"
                    break
                top = (
                    list(
                        zip(
                            out["top_id"][slot, i, :n].tolist(),
                            out["top_logprob"][slot, i, :n].tolist(),
                        )
                    )
                    if n
                    else []
                )
                w.push(Token(id, logprob, i < given[slot], top))
            result[slot], w.ready = (w.ready, w.finish), []
            if w.finish:
                dead.append(slot)
        self._free(dead)
        return result

    def _decode(self, forced_BC, count: int):
        if not self.speculate:
            self.caches[0], self.rows, out = _decode(
                self.params[0],
                self.config,
                self.caches[0],
                self.rows,
                forced_BC,
                count,
                pause=self.pause,
            )
            return out
        self.caches, self.rows, out = speculative.decode(
            self.params,
            tuple(self.configs),
            self.caches,
            self.rows,
            forced_BC,
            count,
            pause=self.pause,
            speculate=self.speculate,
        )
        return out

    def cancel(self, slot: int):
        """Drop a row; its slot is free at once. A slot that is free already stays so."""
        if slot in self.writers:
            self._free([slot])

    def _free(self, slots: list[int]):
        for slot in slots:
            del self.writers[slot]
        if slots:
            alive = np.zeros(self.slots, bool)
            alive[list(self.writers)] = True
            self.rows = _set_rows(self.rows, np.arange(self.slots), {"alive": alive})


class Engines:
    """A batch of `slots` rows like one `Engine`'s, on a CPU split between engines that run side by
    side, each in a thread of its own.

    XLA:CPU gains little from a second core on the short products of a small model: waking it takes
    as long as it saves. Halves of the batch don't wait for each other until the chunk is written
    (LOG.md). `tool` may then be called by two threads at once. sides: how many engines, if not by
    the device and the model.
    """

    def __init__(
        self,
        params,
        config: Config,
        slots: int,
        length: int,
        tokenizer=None,
        tool: Callable[[str], str | None] | None = None,
        speculate: int = 0,
        draft=None,
        sides: int | None = None,
    ):
        params = model.decoding_params(params, config)
        draft = draft and (model.decoding_params(*draft), draft[1])
        sides = sides or sides_for(params, slots)
        if slots % sides:
            raise UserError(f"{slots} slots can't be split evenly between {sides} engines")
        self.parts = [
            Engine(params, config, slots // sides, length, tokenizer, tool, speculate, draft)
            for _ in range(sides)
        ]
        self.slots, self.length, self.threads = slots, length, ThreadPoolExecutor(sides, "engine")

    free = property(lambda self: sum(part.free for part in self.parts))
    drafted = property(lambda self: sum(part.drafted for part in self.parts))
    accepted = property(lambda self: sum(part.accepted for part in self.parts))

    def add_many(self, prompts: list[list[int]], samplings: list[Sampling]) -> list[int]:
        """As `Engine.add_many`; the rows are dealt out evenly, and equal prompts are prefilled once
        by each engine.
        """
        for prompt, sampling in zip(prompts, samplings, strict=True):
            self.parts[0].check(prompt, sampling)
        if len(prompts) > self.free:
            raise UserError(
                f"{len(prompts)} rows do not fit into {self.free} free slots: wait until some are finished"
            )
        free, hands, slots = [part.free for part in self.parts], [[] for _ in self.parts], {}
        for row in range(len(prompts)):
            i = free.index(max(free))
            free[i] -= 1
            hands[i].append(row)
        take = lambda i: self.parts[i].add_many(
            [prompts[row] for row in hands[i]], [samplings[row] for row in hands[i]]
        )
        for i, taken in enumerate(self._each(take)):
            slots |= {row: slot * len(self.parts) + i for row, slot in zip(hands[i], taken)}
        return [slots[row] for row in range(len(prompts))]

    def step(self, count: int = CHUNK) -> dict[int, tuple[list[Token], str | None]]:
        """As `Engine.step`."""
        count = 1 if any(part.fresh for part in self.parts) else count
        found = self._each(lambda i: self.parts[i].step(count))
        return {
            slot * len(self.parts) + i: new
            for i, part in enumerate(found)
            for slot, new in part.items()
        }

    def cancel(self, slot: int):
        """As `Engine.cancel`."""
        self.parts[slot % len(self.parts)].cancel(slot // len(self.parts))

    def _each(self, work: Callable[[int], object]) -> list:
        return (
            list(self.threads.map(work, range(len(self.parts))))
            if len(self.parts) > 1
            else [work(0)]
        )


def sides_for(params, slots: int) -> int:
    """How many `Engines` a batch of so many rows is split between: SIDES for a SMALL model on a
    CPU, otherwise one.
    """
    weights = jax.tree.leaves([params["blocks"], params.get("head", params["embed"])])
    small = sum(a.nbytes for a in weights) <= SMALL and jax.default_backend() == "cpu"
    return (
        SIDES
        if small and (os.cpu_count() or 1) >= SIDES and slots % SIDES == 0 and slots >= 2 * SIDES
        else 1
    )


def bucket(n: int, least: int = 1) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: one compilation serves many sizes at the cost
    of a third at most.
    """
    power = 1 << (n - 1).bit_length()
    return max(least, power * 3 // 4 if n <= power * 3 // 4 else power)


# ---- all at once ---------------------------------------------------------------------------------


def stream(
    params,
    config: Config,
    prompts: list[list[int]],
    sampling: Sampling,
    tokenizer=None,
    tool: Callable[[str], str | None] | None = None,
    speculate: int = 0,
    draft=None,
) -> Iterator[list[list[int]]]:
    """Generate after each prompt, yielding the new token ids of every row a few at a time.

    prompts: token ids, at least one each; several lengths may be mixed. tokenizer, tool, speculate
    and draft are those of `Engine`. Row b draws from sampling.seed + b, whatever else is in the
    batch; the same seed gives the same text.
    """
    engine, slots = _started(params, config, prompts, sampling, tokenizer, tool, speculate, draft)
    return _written(engine, slots, CHUNK)


def generate(
    params,
    config: Config,
    prompts: list[list[int]],
    sampling: Sampling,
    tokenizer=None,
    tool: Callable[[str], str | None] | None = None,
    speculate: int = 0,
    draft=None,
) -> list[list[int]]:
    """The whole of `stream` at once: for each prompt the list of new token ids, without the prompt."""
    engine, slots = _started(params, config, prompts, sampling, tokenizer, tool, speculate, draft)
    rows = [[] for _ in prompts]
    # rows that wait for a tool, or may end in the middle of a chunk, are looked at more often
    count = LONG_CHUNK if tool or sampling.stop_strings else WHOLE_CHUNK
    for new in _written(engine, slots, count):
        for row, ids in zip(rows, new):
            row += ids
    return rows


def _started(params, config, prompts, sampling, tokenizer, tool, speculate, draft):
    """Engines just large enough for these prompts, with all of them in it: (engines or None,
    slots).
    """
    if not prompts:
        return None, []
    slots = bucket(len(prompts))
    length = bucket(max(map(len, prompts)) + sampling.max_tokens, 64)
    engine = Engines(params, config, slots, length, tokenizer, tool, speculate, draft)
    samplings = [replace(sampling, seed=sampling.seed + b) for b in range(len(prompts))]
    return engine, engine.add_many(prompts, samplings)


def _written(engine, slots, count) -> Iterator[list[list[int]]]:
    """What each of the slots writes, about `count` tokens at a time, until the engine is empty."""
    while engine and engine.free < engine.slots:
        new = engine.step(count)
        yield [[t.id for t in new[slot][0]] if slot in new else [] for slot in slots]
