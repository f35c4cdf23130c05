"""OpenAI's API, the answering half: answers while they are written, whole or as a stream."""

import asyncio
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, Literal, NamedTuple

from lib import chat
from lib.data.speech import spoken
from lib.data.tokenizer import Tokenizer
from lib.generate import Token
from lib.serve.api import Api, ApiError, Asked
from lib.serve.worker import EngineThread, Job

# seconds after which a silent stream sends a comment, so that nothing on the way gives it up
QUIET = 15.0

# JSON has no infinity; this is OpenAI's stand-in for the logarithm of 0
NEVER = -9999.0

# which of the two endpoints asks
Kind = Literal["chat", "completion"]


# ---- tokens as logprobs show them ----------------------------------------------------------------


def spelled(tokenizer: Tokenizer, id: int, logprob: float) -> dict:
    """A token as logprobs show it.

    A piece of a character can't be text, and is spelled as OpenAI does.
    """
    logprob = max(logprob, NEVER)
    if id >= len(tokenizer.tokens):
        names = {number: name for name, number in tokenizer.special.items()}
        return {"token": names.get(id, f"<|{id}|>"), "logprob": logprob, "bytes": None}
    # bytes of an ordinary token
    raw = tokenizer.tokens[id]
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return {"token": text, "logprob": logprob, "bytes": list(raw)}


def chat_logprobs(tokenizer: Tokenizer, tokens: list[Token]) -> dict:
    """`logprobs` of a chat's answer."""
    entries = []
    for token in tokens:
        top = [spelled(tokenizer, *pair) for pair in token.top]
        entries.append(spelled(tokenizer, token.id, token.logprob) | {"top_logprobs": top})
    return {"content": entries, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, tokens: list[Token], offsets: list[int]) -> dict:
    """`logprobs` of a completion; offsets: where in the text each token begins."""
    own = [spelled(tokenizer, token.id, token.logprob) for token in tokens]
    # alternatives by their spelling, as this older form has them
    tops = []
    for token in tokens:
        alternatives = [spelled(tokenizer, *pair) for pair in token.top]
        tops.append({entry["token"]: entry["logprob"] for entry in alternatives})
    return {
        "tokens": [entry["token"] for entry in own],
        "token_logprobs": [entry["logprob"] for entry in own],
        "top_logprobs": tops if any(tops) else None,
        "text_offset": offsets,
    }


# ---- one request's answers -----------------------------------------------------------------------


class News(NamedTuple):
    """What is new of one answer: its number, pieces of text, and None or why it ended."""

    index: int
    pieces: list[chat.Delta]
    reason: str | None


class Answers:
    """The answers to one request while they are written.

    Made in the event loop; ApiError if there is no room for them.
    """

    def __init__(self, api: Api, asked: Asked, kind: Kind, worker: EngineThread):
        self.api = api
        self.asked = asked
        self.kind = kind
        self.worker = worker
        self.began = time.monotonic()
        self.first: float | None = None  # when the first token came
        self.made = 0  # tokens so far

        # what the envelope of every body says
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue = asyncio.Queue()

        # n answers to each prompt, one behind the other
        prompts = [prompt for prompt in asked.prompts for _ in range(asked.n)]
        self.readers = [chat.Reader(api.tokenizer) for _ in prompts]
        self.jobs = [self._job(i, prompt) for i, prompt in enumerate(prompts)]
        worker.submit(self.jobs)
        worker.metrics.add("rawchat_prompt_tokens_total", sum(map(len, asked.prompts)))

    def _job(self, i: int, prompt: list[int]) -> Job:
        """The work for answer i, whose tokens come to the event loop."""

        def deliver(tokens, reason):
            self.loop.call_soon_threadsafe(self.events.put_nowait, (i, tokens, reason))

        # each of several answers has a seed of its own
        sampling = dataclasses.replace(self.asked.sampling, seed=self.asked.sampling.seed + i)
        return Job(prompt, sampling, deliver, self.began + self.api.settings.seconds)

    def cancel(self):
        """Stop whatever is still being written."""
        unfinished = [job for job, reader in zip(self.jobs, self.readers) if not reader.finish]
        if unfinished:
            self.worker.cancel(unfinished)
            self.worker.metrics.add("rawchat_cancelled_answers_total", len(unfinished))

    async def __aiter__(self) -> AsyncIterator[News | None]:
        """What is new, until all answers have ended; None when nothing came for a while."""
        while not all(reader.finish for reader in self.readers):
            try:
                # unlike wait_for, it can't lose what comes at the last moment
                async with asyncio.timeout(QUIET):
                    i, tokens, reason = await self.events.get()
            except TimeoutError:
                yield None
                continue

            # an error of one ends all
            if isinstance(reason, ApiError):
                self._fail()
                raise reason
            # tokens become text
            if self.first is None:
                self._note_first()
            self.made += len(tokens)
            pieces = self.readers[i].read(tokens)
            self.readers[i].finish = reason
            yield News(i, pieces, reason)

    def _fail(self):
        """End all answers because of one's error."""
        for reader in self.readers:
            reader.finish = reader.finish or "error"
        self.worker.cancel(self.jobs)

    def _note_first(self):
        """Count how long the first token took."""
        self.first = time.monotonic()
        took = self.first - self.began
        self.worker.metrics.observe("rawchat_time_to_first_token_seconds", took)

    # ---- parts of a body

    def _envelope(self, name: str) -> dict:
        envelope = {"id": self.id, "object": name, "created": self.created, "model": self.api.id}
        if self.asked.dropped:
            envelope["dropped_messages"] = self.asked.dropped
        return envelope

    def _usage(self) -> dict:
        prompt = sum(map(len, self.asked.prompts))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.made,
            "total_tokens": prompt + self.made,
        }

    def _choice(self, i: int, reason: str | None) -> dict:
        """What every choice begins with; time is a reason that OpenAI does not know."""
        choice = {"index": i, "logprobs": None, "finish_reason": reason}
        if reason == "time":
            choice |= {"finish_reason": "length", "ended_by": "time"}
        return choice

    def _echo(self, i: int) -> str:
        """What is repeated before answer i."""
        return self.asked.echo[i // self.asked.n] if self.asked.echo else ""

    def _logprobs(self, pieces: list[chat.Delta]) -> dict | None:
        """`logprobs` of what was said, None where nobody asked for them."""
        if not self.asked.logprobs:
            return None
        said = [piece for piece in pieces if piece.kind == "text"]
        tokens = [token for piece in said for token in piece.tokens]
        if self.kind == "chat":
            return chat_logprobs(self.api.tokenizer, tokens)
        offsets = [offset for piece in said for offset in piece.offsets]
        return completion_logprobs(self.api.tokenizer, tokens, offsets)

    def _part(self, piece: chat.Delta) -> dict:
        """A piece as an entry of `parts`: numbered, so that clients that put streams together make
        the same of them.

        `logprobs` has what was said; the tokens of a call are beside its text. The calculator's
        result is not the model's, and has no probabilities.
        """
        part: dict = {"index": piece.index, "type": piece.kind, "text": piece.text}
        if self.asked.logprobs and piece.kind == "python":
            entries = [spelled(self.api.tokenizer, t.id, t.logprob) for t in piece.tokens]
            part["tokens"] = [entry["token"] for entry in entries]
            part["token_logprobs"] = [entry["logprob"] for entry in entries]
        return part

    # ---- whole bodies

    async def whole(self) -> dict:
        """The body of an answer that is not streamed."""
        pieces: list[list[chat.Delta]] = [[] for _ in self.readers]
        reasons: list[str | None] = [None for _ in self.readers]
        # all that comes, by answer
        async for news in self:
            if news:
                pieces[news.index] += news.pieces
                reasons[news.index] = news.reason

        # one choice for each answer, in the form of its endpoint
        choices = []
        for i, reader in enumerate(self.readers):
            text = spoken(reader.parts)
            choice = self._choice(i, reasons[i])
            if self.kind == "chat":
                parts = [self._part(piece) for piece in _joined(pieces[i])]
                choice["message"] = {
                    "role": "assistant",
                    "content": text,
                    "refusal": None,
                    "parts": parts,
                }
            else:
                choice["text"] = self._echo(i) + text
            choice["logprobs"] = self._logprobs(pieces[i])
            choices.append(choice)
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return self._envelope(name) | {"choices": choices, "usage": self._usage()}

    # ---- streams

    async def stream(self) -> AsyncIterator[str]:
        """The same as server-sent events.

        Tool calls are in `parts` of a delta, beside `content`, which has only the text.
        """
        # what comes before the first token
        for i in range(len(self.readers)):
            if self.kind == "chat":
                start = {"role": "assistant", "content": "", "refusal": None}
                yield self._event(i, delta=start)
            elif self.asked.echo:
                yield self._event(i, text=self._echo(i))

        # once the status is sent, an error can only be an event
        try:
            async for news in self:
                if news is None:
                    yield ": waiting\n\n"
                    continue
                for event in self._events(news):
                    yield event
        except ApiError as e:
            yield _event(e.body)
            return

        # what comes behind the last
        if self.asked.usage_wanted:
            yield _event(self._envelope(self._chunk) | {"choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _event(self, i: int, reason: str | None = None, **content) -> str:
        """One event of answer i."""
        envelope = self._envelope(self._chunk)
        if self.asked.usage_wanted:
            envelope["usage"] = None
        return _event(envelope | {"choices": [self._choice(i, reason) | content]})

    def _events(self, news: News) -> list[str]:
        """The events that tell what is new of an answer."""
        # a hidden call adds parts, but no text
        text = "".join(piece.said for piece in news.pieces)
        events = []
        if self.kind == "chat" and news.pieces:
            delta: dict[str, Any] = {"content": text} if text else {}
            delta["parts"] = [self._part(piece) for piece in news.pieces]
            said = any(piece.kind == "text" for piece in news.pieces)
            logprobs = self._logprobs(news.pieces) if said else None
            events.append(self._event(news.index, delta=delta, logprobs=logprobs))
        elif text:
            events.append(self._event(news.index, text=text, logprobs=self._logprobs(news.pieces)))

        # the end is an event of its own
        if news.reason:
            end = {"delta": {}} if self.kind == "chat" else {"text": ""}
            events.append(self._event(news.index, news.reason, **end))
        return events


def _joined(pieces: list[chat.Delta]) -> list[chat.Delta]:
    """The pieces of one answer with those of each part put together."""
    parts: dict[int, chat.Delta] = {}
    for piece in pieces:
        if piece.index in parts:
            before = parts[piece.index]
            text, tokens = before.text + piece.text, before.tokens + piece.tokens
            piece = before._replace(text=text, tokens=tokens)
        parts[piece.index] = piece
    return list(parts.values())


def _event(data: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, allow_nan=False)}\n\n"
