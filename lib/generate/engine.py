"""Rows that come and go in one batch (continuous batching), with tools in the loop.

Everything that writes runs on an `Engine`: a fixed number of slots, each holding one row. A row's
last prompt token is not prefilled but fed to the first decoding step, so that there is one place
where tokens are chosen. `generate` and `stream` make `Engines` just for their prompts; a server
keeps them and lets rows join and leave.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lib import model
from lib.config import Config
from lib.files import UserError
from lib.generate import speculative
from lib.generate.decode import Chunk, decode, empty_cache, prefill, repeat_rows, set_rows
from lib.generate.sampling import Sampling, empty_rows, new_row
from lib.generate.writer import Token, Writer

# tokens decoded per dispatch: few enough to stream smoothly, many enough to hide the dispatch
CHUNK = 8
# the same when nobody is watching, but rows wait for a tool or for a free slot until it is over
LONG_CHUNK = 32
# the same when no row waits for anything
WHOLE_CHUNK = 128
# prompt tokens per prefill pass
PREFILL = 128
# and this many at least, however short the prompts
NARROWEST = 16
# slots of a cache, however little is to be written: one program serves all that is short
SHORTEST = 128
# engines side by side on a CPU, if it has the cores; more were not measured
SIDES = 2
# bytes of weights up to which that pays: each side reads them all
SMALL = 32 * 2**20

Tool = Callable[[str], str | None]
Written = dict[int, tuple[list[Token], str | None]]


class Engine:
    """A batch of `slots` rows that are written together, each joining and leaving on its own.

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
        tokenizer: Any = None,
        tool: Tool | None = None,
        speculate: int = 0,
        draft=None,
    ):
        if slots < 1 or length < 2 or speculate < 0:
            raise UserError(
                "a decoding engine needs slots >= 1, length >= 2 and speculate >= 0, "
                f"got {slots}, {length}, {speculate}"
            )
        if tool and tokenizer is None:
            raise UserError("tools need the tokenizer: pass tokenizer= beside tool=")
        if draft:
            check_draft(config, draft[1], speculate)
        self.config = config
        self.slots = slots
        self.length = length
        self.tokenizer = tokenizer
        self.tool = tool
        self.speculate = speculate
        # who wants few shapes of prefill has prompts padded to a width, and rows to a number that
        # is prefilled together (`pad_to`)
        self.narrowest = NARROWEST
        self.together: int | None = None

        # the model, and behind it the draft model if there is one
        models = [(params, config)]
        if draft:
            models.append(draft)
        self.params = [model.decoding_params(params, config) for params, config in models]
        self.configs = [config for _, config in models]
        self.caches = [
            empty_cache(config, slots, length + speculate, speculate) for config in self.configs
        ]
        self.rows = empty_rows(slots, config.vocab_size)
        if speculate and not draft:
            self.rows["history"] = jnp.zeros((slots, length), jnp.int32)

        # the programs that read prompts and write tokens (lib.generate.kept takes them from disk)
        self.prefill: Callable = prefill
        self.decode: Callable = decode
        # how many tokens were drafted so far, and how many of them were accepted
        self.drafted = self.accepted = 0
        # a row that has written this id waits for its tool
        self.pause = tokenizer.special["<|python_end|>"] if tool else -1
        self.writers: dict[int, Writer] = {}
        # the first token of a new row is due: hand it out without waiting for a whole chunk
        self.fresh = False

    @property
    def free(self) -> int:
        """How many rows could be added now."""
        return self.slots - len(self.writers)

    # ---- rows join -------------------------------------------------------------------------------

    def add(self, prompt: list[int], sampling: Sampling) -> int:
        """Let a row join: its slot.

        UserError if its prompt is empty, foreign or too long, or if no slot is free.
        """
        return self.add_many([prompt], [sampling])[0]

    def add_many(self, prompts: list[list[int]], samplings: list[Sampling]) -> list[int]:
        """Let several rows join, prefilled together or in groups (`pad_to`), and equal prompts of a
        group only once.
        """
        if not prompts:
            return []
        # all or nothing: nothing changes before all are known to fit
        for prompt, sampling in zip(prompts, samplings, strict=True):
            self.check(prompt, sampling)
        check_room(len(prompts), self.free)

        # a row ends at the latest when its slot is full
        cut = []
        for prompt, sampling in zip(prompts, samplings):
            room = self.length - len(prompt)
            cut.append(replace(sampling, max_tokens=min(sampling.max_tokens, room)))

        # the prompts go into the caches of the first free slots
        free = [slot for slot in range(self.slots) if slot not in self.writers]
        slots = free[: len(prompts)]
        together = self.together or len(prompts)
        for start in range(0, len(prompts), together):
            part = slice(start, start + together)
            self._fill_distinct(slots[part], prompts[part])
            self._set_new(slots[part], prompts[part], cut[part])
        for slot, sampling in zip(slots, cut):
            self.writers[slot] = Writer(sampling, self.tokenizer, self.tool)
        self.fresh = True
        return slots

    def check(self, prompt: list[int], sampling: Sampling):
        """UserError if this could never be added."""
        if not prompt:
            raise UserError(
                "a prompt has no tokens: begin it with the tokenizer's <|bos|> at least"
            )
        foreign = [token for token in prompt if not 0 <= token < self.config.vocab_size]
        if foreign:
            raise UserError(
                f"token {foreign[0]} is outside the model's vocabulary of "
                f"{self.config.vocab_size}: encode with the tokenizer that the model was trained "
                "with"
            )
        if len(prompt) >= self.length:
            raise UserError(
                f"a prompt of {len(prompt)} tokens leaves no room in a cache of {self.length}: "
                "shorten it"
            )
        if sampling.stop_strings and self.tokenizer is None:
            raise UserError("stop strings need the tokenizer: pass tokenizer= too")

    def _fill_distinct(self, slots: list[int], prompts: list[list[int]]):
        """Prefill each distinct prompt once, all but its last token, and copy it for the others."""
        # the slot that is prefilled, by prompt
        first = {}
        for slot, prompt in zip(slots, prompts):
            first.setdefault(tuple(prompt), slot)
        without_last = [list(prompt[:-1]) for prompt in first]
        self._fill(list(first.values()), without_last)

        # every other slot stays a copy of itself
        if len(first) < len(prompts):
            source = np.arange(self.slots)
            source[slots] = [first[tuple(prompt)] for prompt in prompts]
            self.caches = [repeat_rows(cache, source) for cache in self.caches]

    def _fill(self, slots: list[int], prompts: list[list[int]]):
        """Prefill rows from empty, PREFILL tokens at a time, in few shapes: bucketed numbers of
        rows and of tokens.
        """
        longest = max(map(len, prompts))
        width = min(PREFILL, bucket(longest, self.narrowest))
        passes = max(1, -(-longest // width))

        # the prompts as one array, -1 behind the end of each
        padded = self._padded(slots)
        tokens = np.full((len(padded), passes * width), -1, np.int32)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = prompt

        # a width at a time, into the cache of every model
        for start in range(0, passes * width, width):
            part = tokens[:, start : start + width]
            fresh = start == 0
            for i, (params, config) in enumerate(zip(self.params, self.configs)):
                self.caches[i] = self.prefill(params, config, self.caches[i], padded, part, fresh)

    def _set_new(self, slots: list[int], prompts: list[list[int]], samplings: list[Sampling]):
        """Write the sampling states of new rows."""
        states = []
        for prompt, sampling in zip(prompts, samplings):
            state = new_row(prompt, sampling, self.config.vocab_size)
            if "history" in self.rows:
                history = np.zeros(self.length, np.int32)
                history[: len(prompt)] = prompt
                state["history"] = history
            states.append(state)

        # one state for each padded slot; those behind are ignored, whatever they are
        padded = self._padded(slots)
        states += states[:1] * (len(padded) - len(states))
        stacked = {}
        for name in states[0]:
            stacked[name] = np.stack([state[name] for state in states])
        self.rows = set_rows(self.rows, padded, stacked)

    def _padded(self, slots: list[int]) -> np.ndarray:
        """Slots up to a number that programs are made for; those behind are outside, and
        ignored.
        """
        padded = np.full(self.together or bucket(len(slots)), self.slots)
        padded[: len(slots)] = slots
        return padded

    # ---- rows are written ------------------------------------------------------------------------

    def step(self, count: int = CHUNK) -> Written:
        """Write about `count` tokens in every busy slot: {slot: (new tokens, None or its end)}.

        "stop": a stop token or string, which is not among the tokens (see Sampling.keep_stop).
        "length": max_tokens, or the slot is full. A finished slot is free again. Tokens may come
        later than they were made while they could be the beginning of a stop string. UserError if
        the model computes no numbers.
        """
        if not self.writers:
            return {}

        # the answers of tools that rows must take
        forced = np.full((self.slots, WHOLE_CHUNK), -1, np.int32)
        for slot, writer in self.writers.items():
            ids = writer.forced[:WHOLE_CHUNK]
            forced[slot, : len(ids)] = ids

        # one dispatch, short if a new row waits for its first token
        count = 1 if self.fresh else min(count, WHOLE_CHUNK)
        self.fresh = False
        chunk = self._fetch(self._decode(forced, count))
        self.drafted += int(chunk.drafted)
        self.accepted += int(chunk.accepted)

        # every writer takes its row's part; finished rows leave
        result = {}
        finished = []
        for slot, writer in self.writers.items():
            self._push(slot, writer, chunk, forced[slot] >= 0)
            result[slot] = writer.take_ready(), writer.finish
            if writer.finish:
                finished.append(slot)
        self._free(finished)
        return result

    def _decode(self, forced_BC, count: int) -> Chunk:
        """Up to `count` tokens for every row, still on the device; caches and rows move on."""
        if self.speculate:
            self.caches, self.rows, chunk = speculative.decode(
                self.params,
                tuple(self.configs),
                self.caches,
                self.rows,
                forced_BC,
                count,
                pause=self.pause,
                speculate=self.speculate,
            )
        else:
            self.caches[0], self.rows, chunk = self.decode(
                self.params[0],
                self.config,
                self.caches[0],
                self.rows,
                forced_BC,
                count,
                pause=self.pause,
            )
        return chunk

    def _fetch(self, chunk: Chunk) -> Chunk:
        """The chunk on the host, without alternatives where nobody asked for them."""
        wanted = any(writer.sampling.logprobs for writer in self.writers.values())
        if not wanted:
            chunk = chunk._replace(top_id=None, top_logprob=None)
        return jax.device_get(chunk)

    def _push(self, slot: int, writer: Writer, chunk: Chunk, is_forced_C):
        """Hand a row's part of a chunk to its writer, up to where the row ends."""
        alternatives = writer.sampling.logprobs
        ids = chunk.id[slot].tolist()
        logprobs = chunk.logprob[slot].tolist()
        assert ids[0] >= 0, "a busy row must move on"
        for i, (id, logprob) in enumerate(zip(ids, logprobs)):
            if id < 0 or writer.finish:
                break
            if np.isnan(logprob):
                raise UserError(
                    "the model computes no numbers (NaN): its weights are damaged or its training "
                    "diverged, so load an earlier checkpoint"
                )
            # as many alternatives as the row asked for
            top = []
            if alternatives:
                top_ids = chunk.top_id[slot, i, :alternatives].tolist()
                top_logprobs = chunk.top_logprob[slot, i, :alternatives].tolist()
                top = list(zip(top_ids, top_logprobs))
            writer.push(Token(id, logprob, bool(is_forced_C[i]), top))

    # ---- rows leave ------------------------------------------------------------------------------

    def cancel(self, slot: int):
        """Drop a row; its slot is free at once. A slot that is free already stays so."""
        if slot in self.writers:
            self._free([slot])

    def _free(self, slots: list[int]):
        """Forget rows, here and on the device, where they would be written on."""
        for slot in slots:
            del self.writers[slot]
        if slots:
            alive = np.zeros(self.slots, bool)
            alive[list(self.writers)] = True
            self.rows |= {"alive": jax.device_put(alive, may_alias=False)}


class Engines:
    """A batch of `slots` rows like one `Engine`'s, on a CPU split between engines that run side by
    side, each in a thread of its own.

    XLA:CPU gains little from a second core on the short products of a small model: waking it takes
    as long as it saves. Halves of the batch don't wait for each other until the chunk is written
    (LOG.md). `tool` may then be called by two threads at once. sides: how many engines, if not by
    the device and the model. speculation: `speculate` and `draft`, as of `Engine`.
    """

    def __init__(
        self,
        params,
        config: Config,
        slots: int,
        length: int,
        tokenizer: Any = None,
        tool: Tool | None = None,
        *,
        sides: int | None = None,
        **speculation,
    ):
        params = model.decoding_params(params, config)
        draft = speculation.pop("draft", None)
        if draft:
            draft = model.decoding_params(*draft), draft[1]
        sides = sides or sides_for(params, slots)
        if slots % sides:
            raise UserError(f"{slots} slots can't be split evenly between {sides} engines")
        self.parts = []
        for _ in range(sides):
            part = Engine(
                params,
                config,
                slots // sides,
                length,
                tokenizer,
                tool,
                draft=draft,
                **speculation,
            )
            self.parts.append(part)
        self.slots = slots
        self.length = length
        self.threads = ThreadPoolExecutor(sides, "engine")

    @property
    def free(self) -> int:
        """How many rows could be added now."""
        return sum(part.free for part in self.parts)

    @property
    def drafted(self) -> int:
        """How many tokens were drafted so far."""
        return sum(part.drafted for part in self.parts)

    @property
    def accepted(self) -> int:
        """How many of the drafted tokens were accepted."""
        return sum(part.accepted for part in self.parts)

    def add_many(self, prompts: list[list[int]], samplings: list[Sampling]) -> list[int]:
        """As `Engine.add_many`; the rows are dealt out evenly, and equal prompts are prefilled once
        by each engine.
        """
        # all or nothing, as in one engine
        for prompt, sampling in zip(prompts, samplings, strict=True):
            self.parts[0].check(prompt, sampling)
        check_room(len(prompts), self.free)

        # each row to the part with most room
        free = [part.free for part in self.parts]
        hands: list[list[int]] = [[] for _ in self.parts]
        for row in range(len(prompts)):
            i = free.index(max(free))
            free[i] -= 1
            hands[i].append(row)

        def take(i: int) -> list[int]:
            part_prompts = [prompts[row] for row in hands[i]]
            part_samplings = [samplings[row] for row in hands[i]]
            return self.parts[i].add_many(part_prompts, part_samplings)

        # slots of the parts are counted in turns
        slots = {}
        for i, part_slots in enumerate(self._each(take)):
            for row, slot in zip(hands[i], part_slots):
                slots[row] = slot * len(self.parts) + i
        return [slots[row] for row in range(len(prompts))]

    def step(self, count: int = CHUNK) -> Written:
        """As `Engine.step`."""
        # a new row's first token waits for the slowest part: all make one
        if any(part.fresh for part in self.parts):
            count = 1

        def step(i: int) -> Written:
            return self.parts[i].step(count)

        written: Written = {}
        for i, by_slot in enumerate(self._each(step)):
            for slot, new in by_slot.items():
                written[slot * len(self.parts) + i] = new
        return written

    def cancel(self, slot: int):
        """As `Engine.cancel`."""
        part = self.parts[slot % len(self.parts)]
        part.cancel(slot // len(self.parts))

    def _each(self, work: Callable) -> list:
        """What `work` makes of the number of each part, all at once."""
        if len(self.parts) == 1:
            return [work(0)]
        return list(self.threads.map(work, range(len(self.parts))))


def check_draft(config: Config, draft: Config, speculate: int):
    """UserError if a model of config `draft` can't draft for one of `config`."""
    if not speculate or draft.vocab_size != config.vocab_size:
        raise UserError(
            f"a draft model needs speculate >= 1 and the model's vocabulary of "
            f"{config.vocab_size}, got speculate={speculate} and a vocabulary of "
            f"{draft.vocab_size}"
        )


def check_room(rows: int, free: int):
    """UserError if so many rows can't be added."""
    if rows > free:
        raise UserError(
            f"{rows} rows do not fit into {free} free slots: wait until some are finished"
        )


def sides_for(params, slots: int) -> int:
    """How many `Engines` a batch of so many rows is split between: SIDES for a SMALL model on a
    CPU, otherwise one.
    """
    # what a token reads: a table that is only looked up does not count
    head = params.get("head", params["embed"])
    weights = jax.tree.leaves([params["blocks"], head])
    is_small = sum(a.nbytes for a in weights) <= SMALL
    has_cores = jax.default_backend() == "cpu" and (os.cpu_count() or 1) >= SIDES
    divides = slots % SIDES == 0 and slots >= 2 * SIDES
    return SIDES if is_small and has_cores and divides else 1


def pad_to(engine: Engines, length: int, together: int | None = None):
    """Let no prompt be prefilled in a shape that is shorter, and each part prefill so many rows at
    a time, None for as many as there are: one program each way serves them all.
    """
    for part in engine.parts:
        part.narrowest = length
        part.together = together


def bucket(n: int, least: int = 1) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: one compilation serves many sizes, and at most
    a third is padding.
    """
    power = 1 << max(n - 1, 0).bit_length()
    three_quarters = power * 3 // 4
    size = three_quarters if n <= three_quarters else power
    return max(least, size)


# ---- all at once ---------------------------------------------------------------------------------


def stream(
    params,
    config: Config,
    prompts: list[list[int]],
    sampling: Sampling,
    tokenizer=None,
    tool: Tool | None = None,
    speculate: int = 0,
    draft=None,
) -> Iterator[list[list[int]]]:
    """Generate after each prompt, yielding the new token ids of every row a few at a time.

    prompts: token ids, at least one each; several lengths may be mixed. tokenizer, tool, speculate
    and draft are those of `Engine`. Row b draws from sampling.seed + b, whatever else is in the
    batch; the same seed gives the same text.
    """
    started = _start(params, config, prompts, sampling, tokenizer, tool, speculate, draft)
    return _written(*started, CHUNK)


def generate(
    params,
    config: Config,
    prompts: list[list[int]],
    sampling: Sampling,
    tokenizer=None,
    tool: Tool | None = None,
    speculate: int = 0,
    draft=None,
) -> list[list[int]]:
    """The whole of `stream` at once: the new token ids of each prompt, without the prompt."""
    started = _start(params, config, prompts, sampling, tokenizer, tool, speculate, draft)
    # rows that wait for a tool, or may end in the middle of a chunk, are looked at more often
    count = LONG_CHUNK if tool or sampling.stop_strings else WHOLE_CHUNK
    texts: list[list[int]] = [[] for _ in prompts]
    for new in _written(*started, count):
        for text, ids in zip(texts, new):
            text += ids
    return texts


def _start(params, config, prompts, sampling, tokenizer, tool, speculate, draft):
    """Engines just large enough for these prompts, with all of them in it: (engines, slots)."""
    if not prompts:
        return None, []
    longest = max(map(len, prompts))
    length = bucket(longest + sampling.max_tokens, SHORTEST)
    engines = Engines(
        params,
        config,
        bucket(len(prompts)),
        length,
        tokenizer,
        tool,
        speculate=speculate,
        draft=draft,
    )
    # every row draws by a seed of its own
    samplings = [replace(sampling, seed=sampling.seed + b) for b in range(len(prompts))]
    slots = engines.add_many(prompts, samplings)
    return engines, slots


def _written(engines: Engines | None, slots: list[int], count: int) -> Iterator[list[list[int]]]:
    """What each of the slots writes, about `count` tokens at a time, until the engine is empty."""
    while engines and engines.free < engines.slots:
        written = engines.step(count)
        new = []
        for slot in slots:
            # a slot that was free before this step writes nothing
            tokens, _ = written.get(slot, ([], None))
            new.append([token.id for token in tokens])
        yield new
