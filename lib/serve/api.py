"""OpenAI's API over one decoding engine, without the web around it: the engine's thread, checked
requests, and their answers.
"""

import asyncio
import collections
import dataclasses
import json
import re
import secrets
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib import chat
from lib.data.roles import BadMessage, in_turns
from lib.data.speech import spoken
from lib.files import UserError
from lib.generate import Engines, Sampling, Token
from lib.generate.engine import PREFILL, bucket
from lib.generate.sampling import TOP
from lib.runs import Model

ADMIT = 4  # answers begun between two steps: the others wait meanwhile
# seconds after which a silent stream sends a comment, so that nothing on the way gives it up
QUIET = 15.0


class ApiError(Exception):
    """An answer that is an error, in the shape that OpenAI's clients understand."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# ---- the thread that owns the engine -------------------------------------------------------------


def warm_up(engine: Engines, length: int):
    """Answer a prompt of so many tokens into the void, so that no guest waits for what that
    compiles.
    """
    [slot] = engine.add_many([[0] * length], [Sampling(max_tokens=1)])
    engine.step()
    engine.cancel(slot)


@dataclass(eq=False)
class Job:
    """One answer to be written. `deliver(tokens, reason)` is called with what is new: a list of
    tokens, and why it ended or None.

    reason: stop or length as the engine says, "time" past `deadline` (time.monotonic), or an
    ApiError.
    """

    prompt: list[int]
    sampling: Sampling
    deliver: Callable
    deadline: float
    cancelled: bool = False


class EngineThread:
    """A thread that writes jobs in an engine, as many together as it has slots, in the order they
    came.

    If the engine fails, every job gets an error, `failed` holds the exception and on_failure() is
    called: nothing more is written.
    """

    def __init__(self, engine: Engines, queue: int, metrics, on_failure=lambda: None):
        self.engine, self.queue, self.metrics, self.on_failure = engine, queue, metrics, on_failure
        self.waiting, self.busy = collections.deque(), {}
        self.wake, self.closing, self.failed = threading.Condition(), False, None
        # what a prompt of any length is prefilled as
        lengths = {1 + bucket(n, 16) for n in range(1, PREFILL + 1)}
        self.cold = sorted((n for n in lengths if n < engine.length), reverse=True)
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def submit(self, jobs: list[Job]):
        """Line up all of `jobs` or none: ApiError if the line is too long, or if nothing is written
        any more.
        """
        with self.wake:
            if self.failed or self.closing:
                why = (
                    "the server is shutting down"
                    if self.closing
                    else "the model failed; the server's log says how"
                )
                raise ApiError(503, why, code="unavailable")
            if len(jobs) > self.queue:
                raise ApiError(
                    400,
                    f"this asks for {len(jobs)} answers at once and the server takes {self.queue}: "
                    "ask for fewer",
                    code="too_many_answers",
                )
            if len(self.waiting) + len(jobs) > self.queue:
                raise ApiError(
                    429,
                    f"too many people are waiting ({len(self.waiting)} answers): try again in a "
                    "moment",
                    code="queue_full",
                    headers={"Retry-After": "2"},
                )
            self.waiting.extend(jobs)
            self.wake.notify()

    def cancel(self, jobs: list[Job]):
        """Forget jobs; those that are being written end at the next step.

        Finished ones don't mind.
        """
        with self.wake:
            for job in jobs:
                job.cancelled = True
                if job in self.waiting:
                    self.waiting.remove(job)

    def end(self):
        """Let the thread end after the step it is at; whatever was not finished gets an error."""
        with self.wake:
            self.closing = True
            self.wake.notify()

    def close(self):
        """`end`, and wait for it."""
        self.end()
        if self.thread.is_alive():
            self.thread.join()

    def _run(self):
        try:
            while self._turn():
                pass
            error = ApiError(503, "the server was stopped", code="unavailable")
        except Exception as e:
            traceback.print_exc()
            error, self.failed = (
                ApiError(500, "the model failed; the server's log says how", code="engine_failed"),
                e,
            )
        with self.wake:
            left = [*self.busy.values(), *self.waiting]
            self.busy, self.waiting = {}, collections.deque()
        for job in left:
            job.deliver([], error)
        if self.failed:
            self.on_failure()

    def _turn(self) -> bool:
        """Let jobs in and out, then write a little; False when it is time to end."""
        with self.wake:
            while not (self.waiting or self.busy or self.closing or self.cold):
                self.wake.wait()
            if self.closing:
                return False
            idle = not (self.waiting or self.busy)
            now = time.monotonic()
            late = [job for job in self.waiting if job.deadline < now]
            for job in late:
                self.waiting.remove(job)
            new = [
                self.waiting.popleft()
                for _ in range(min(ADMIT, self.engine.free, len(self.waiting)))
            ]
        if idle:
            warm_up(self.engine, self.cold.pop())
            return True
        for job in late:
            why = "no slot became free in time: try again later"
            job.deliver([], ApiError(503, why, code="timeout", headers={"Retry-After": "10"}))
        for slot, job in list(self.busy.items()):
            if job.cancelled or job.deadline < now:
                self.engine.cancel(slot)
                del self.busy[slot]
                if not job.cancelled:
                    job.deliver([], "time")
        if new:
            self.busy |= zip(
                self.engine.add_many([j.prompt for j in new], [j.sampling for j in new]), new
            )
        for slot, (tokens, reason) in self.engine.step().items():
            job = self.busy[slot]
            if reason:
                del self.busy[slot]
            self.metrics.add("rawchat_completion_tokens_total", len(tokens))
            if not job.cancelled and (tokens or reason):
                job.deliver(tokens, reason)
        return True


# ---- what a request may hold ---------------------------------------------------------------------

NUMBERS = {  # field: (type, lowest, highest, default)
    "max_tokens": (int, 1, 2**31 - 1, None),
    "max_completion_tokens": (int, 1, 2**31 - 1, None),
    "temperature": (float, 0, 2, 1.0),
    "top_p": (float, 0, 1, 1.0),
    "top_k": (int, 0, 2**31 - 1, 0),
    "min_p": (float, 0, 1, 0.0),
    "repetition_penalty": (float, 0.01, 100, 1.0),
    "seed": (int, -(2**63), 2**63 - 1, None),
    "n": (int, 1, 128, 1),
}
NEUTRAL = {  # what we don't do: only these values, which ask for nothing
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
}
NOTES = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)  # for the provider's own books: they change no answer
COMMON = {"model", "stream", "stream_options", "stop", "logprobs", *NUMBERS, *NEUTRAL, *NOTES}
CHAT_FIELDS = COMMON | {"messages", "top_logprobs", "truncation"}
COMPLETION_FIELDS = COMMON - {"max_completion_tokens"} | {"prompt", "echo", "best_of"}


@dataclass
class Asked:
    """A checked request: one prompt or more, n answers to each."""

    prompts: list[list[int]]
    n: int
    sampling: Sampling
    stream: bool
    usage_wanted: bool  # in a stream: a last event with the token counts
    logprobs: bool
    # of each prompt, what to repeat before the answer
    echo: list[str] = field(default_factory=list)
    dropped: int = 0  # oldest messages that were left out


def _bad(message: str, param: str | None = None, code: str | None = None):
    raise ApiError(400, message, param, code)


def no_model(wanted: str, ours: str) -> ApiError:
    """For a request that names another model than the one that is served."""
    return ApiError(
        404,
        f"the model {wanted[:100]!r} does not exist here: this server has {ours!r}",
        "model",
        "model_not_found",
    )


def _number(body: dict, name: str) -> Any:
    kind, low, high, default = NUMBERS[name]
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        _bad(
            f"{name} must be {'a number' if kind is float else 'an integer'}, not "
            f"{type(value).__name__}",
            name,
            "invalid_type",
        )
    if not low <= value <= high:
        bounds = f"at least {low}" if high >= 2**31 - 1 and low >= 0 else f"from {low} to {high}"
        _bad(f"{name} must be {bounds}", name, "out_of_range")
    return kind(value)


def _flag(body: dict, name: str) -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        _bad(f"{name} must be true or false", name, "invalid_type")
    return bool(value)


def _fields(body, known: set[str], model_id: str):
    """Refuse what is not known, not supported or meant for another model."""
    if not isinstance(body, dict):
        _bad("the request body must be a JSON object")
    for name in body:
        if name not in known:
            _bad(f"unknown field {name[:50]!r}", name[:50], "unknown_parameter")
    for name, allowed in NEUTRAL.items():
        if name in body and not any(
            body[name] == value and not isinstance(body[name], bool) for value in allowed
        ):
            _bad(f"{name} is not supported here: leave it out", name, "unsupported_parameter")
    wanted = body.get("model", model_id)
    if not isinstance(wanted, str):
        _bad("model must be a string", "model", "invalid_type")
    if wanted != model_id:
        raise no_model(wanted, model_id)


def _stops(body: dict) -> tuple[str, ...]:
    stop = body.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stop, list)
        or len(stop) > 4
        or not all(isinstance(s, str) and 0 < len(s) <= 200 for s in stop)
    ):
        _bad(
            "stop must be a text or a list of at most 4 texts, of 1 to 200 characters each",
            "stop",
            "invalid_type",
        )
    return tuple(s.encode("utf-8", "replace").decode() for s in stop)


def _asked(body: dict, *, logprobs: int, stop: tuple[int, ...], max_tokens: int) -> dict:
    """The fields of Asked that both endpoints have in common; `logprobs`: how many alternatives."""
    seed = _number(body, "seed")
    options = body.get("stream_options")
    stream = _flag(body, "stream")
    if options is not None and not (isinstance(options, dict) and stream):
        _bad(
            "stream_options must be an object, and only where stream is true",
            "stream_options",
            "invalid_type",
        )
    options = options or {}
    chosen = {
        name: _number(body, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    # 0 is allowed by OpenAI, and leaves the likeliest token alone
    chosen["top_p"] = max(chosen["top_p"], 1e-9)
    sampling = Sampling(
        max_tokens=max_tokens,
        seed=secrets.randbits(31) if seed is None else seed,
        stop=stop,
        stop_strings=_stops(body),
        logprobs=logprobs,
        **chosen,
    )
    return dict(
        n=_number(body, "n"),
        sampling=sampling,
        stream=stream,
        usage_wanted=_flag(options, "include_usage"),
    )


def _messages(messages) -> list[dict]:
    """The messages of a request in turns, the last one the user's."""
    if not isinstance(messages, list) or not messages:
        _bad("messages must be a list of at least one message", "messages", "invalid_type")
    try:
        turns = in_turns(messages)
    except BadMessage as e:
        where = f"messages.{e.index}" + (f".{e.key}" if e.key else "")
        _bad(str(e), where, "invalid_value")
    if not turns or turns[-1]["role"] != "user":
        _bad("the last message must be the user's", "messages", "invalid_value")
    return turns


class Api:
    """What requests mean for this model: checking them, and the names and bounds that answers
    need.
    """

    def __init__(self, model: Model, settings):
        self.model, self.settings, self.tokenizer = model, settings, model.tokenizer
        self.context = settings.context or model.config.sequence_len
        # bytes of a token: a text of more than context * longest can't fit
        self.longest = max(map(len, self.tokenizer.tokens))
        run = Path(settings.run).name or Path(model.path).parent.parent.name
        self.id = re.sub(r"[^\w.-]", "-", f"{run}-{model.stage}")
        self.created = int(time.time())

    def card(self) -> dict:
        """The model as /v1/models shows it, with some facts of ours."""
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "rawchat",
            "stage": self.model.stage,
            "step": self.model.meta.get("step"),
            "context_length": self.context,
            "max_tokens": self.settings.max_tokens,
        }

    def _too_long(self, tokens, param: str):
        _bad(
            f"this model's maximum context length is {self.context} tokens and your {param} has "
            f"{tokens}: shorten it",
            param,
            "context_length_exceeded",
        )

    def _check_size(self, texts, param: str):
        """Refuse before encoding what can't fit."""
        if sum(map(len, texts)) > self.context * self.longest:
            self._too_long(f"more than {self.context}", param)

    def _room(self, ids: list[int], wanted: int | None, param: str) -> int:
        """How many tokens the answer to a prompt may have: what is wanted, or as many as there is
        room for.

        Client libraries send a max_tokens that nobody chose, so that more than there is room for is
        no error: an answer that was cut says so by its finish_reason, length.
        """
        room = self.context - len(ids)
        if room < 1:
            self._too_long(len(ids), param)
        most = self.settings.max_tokens
        return min(room, most, wanted or most)

    def chat(self, body) -> Asked:
        """A request for /v1/chat/completions."""
        _fields(body, CHAT_FIELDS, self.id)
        if self.model.stage == "base":
            _bad(
                "this model was only pretrained and has not learnt to chat: let it go on with a "
                "text at /v1/completions",
                code="not_a_chat_model",
            )
        wanted, other = _number(body, "max_completion_tokens"), _number(body, "max_tokens")
        wanted = other if wanted is None else wanted
        logprobs, top = _flag(body, "logprobs"), body.get("top_logprobs")
        if top is not None and (
            isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= TOP
        ):
            _bad(f"top_logprobs must be an integer from 0 to {TOP}", "top_logprobs", "out_of_range")
        if top and not logprobs:
            _bad("top_logprobs needs logprobs to be true", "top_logprobs", "invalid_value")
        truncation = body.get("truncation", "disabled")
        if truncation not in ("disabled", "auto"):
            _bad("truncation must be disabled or auto", "truncation", "invalid_value")
        messages, dropped = _messages(body.get("messages")), 0
        try:
            if truncation == "auto":
                most = min(wanted or self.settings.max_tokens, self.settings.max_tokens)
                self._check_size([spoken(m["content"]) for m in messages[-1:]], "messages")
                ids, dropped = chat.fit(self.tokenizer, messages, self.context, most)
                wanted = wanted and min(wanted, self.context - len(ids))
            else:
                self._check_size([spoken(m["content"]) for m in messages], "messages")
                ids = self.tokenizer.render_for_completion(messages)
        except UserError as e:
            long = truncation == "auto" and "context" in str(e)
            _bad(str(e), "messages", "context_length_exceeded" if long else "invalid_value")
        common = _asked(
            body,
            logprobs=top or 0,
            stop=chat.ends(self.tokenizer),
            max_tokens=self._room(ids, wanted, "messages"),
        )
        return Asked([ids], logprobs=logprobs, dropped=dropped, **common)

    def completion(self, body) -> Asked:
        """A request for /v1/completions."""
        _fields(body, COMPLETION_FIELDS, self.id)
        prompt = body.get("prompt", "")
        if (
            isinstance(prompt, str)
            or isinstance(prompt, list)
            and prompt
            and all(type(t) is int for t in prompt)
        ):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt or len(prompt) > self.settings.queue:
            _bad(
                "prompt must be a text, a list of token ids, or a list of 1 to "
                f"{self.settings.queue} of these",
                "prompt",
                "invalid_type",
            )
        prompts, echo = [], []
        for p in prompt:
            if isinstance(p, str):
                self._check_size([p], "prompt")
                prompts.append(self.tokenizer.encode(p, bos=True))
                echo.append(p)
            elif (
                isinstance(p, list)
                and p
                and all(type(t) is int and 0 <= t < self.model.config.vocab_size for t in p)
            ):
                if len(p) >= self.context:
                    self._too_long(len(p), "prompt")
                prompts.append(p)
                echo.append(self.tokenizer.decode(p))
            else:
                _bad(
                    "prompt must hold texts or lists of token ids within the vocabulary",
                    "prompt",
                    "invalid_type",
                )
        best_of = body.get("best_of")
        if best_of is not None and best_of != _number(body, "n"):
            _bad(
                "best_of is not supported beside n: leave it out",
                "best_of",
                "unsupported_parameter",
            )
        logprobs = body.get("logprobs")
        if logprobs is not None and (
            isinstance(logprobs, bool) or not isinstance(logprobs, int) or not 0 <= logprobs <= 5
        ):
            _bad("logprobs must be an integer from 0 to 5", "logprobs", "out_of_range")
        repeat = _flag(body, "echo")
        if repeat and logprobs is not None:
            _bad(
                "echo together with logprobs is not supported: ask for one of them",
                "echo",
                "unsupported_parameter",
            )
        # 16 is OpenAI's default here
        wanted = 16 if body.get("max_tokens") is None else _number(body, "max_tokens")
        room = min(self._room(p, wanted, "prompt") for p in prompts)
        return Asked(
            prompts,
            logprobs=logprobs is not None,
            echo=echo if repeat else [],
            **_asked(
                body,
                logprobs=logprobs or 0,
                stop=(self.tokenizer.bos,),
                max_tokens=min(room, wanted),
            ),
        )

    # ---- answers

    def _token(self, id: int, logprob: float) -> dict:
        """A token as logprobs show it.

        A piece of a character can't be text, and is spelled as OpenAI does.
        """
        logprob = max(logprob, -9999.0)  # JSON has no infinity; this is OpenAI's stand-in
        if id >= len(self.tokenizer.tokens):
            name = next((n for n, i in self.tokenizer.special.items() if i == id), f"<|{id}|>")
            return {"token": name, "logprob": logprob, "bytes": None}
        raw = self.tokenizer.tokens[id]
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = "bytes:" + "".join(f"\\x{b:02x}" for b in raw)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    def chat_logprobs(self, tokens: list[Token]) -> dict:
        entries = [
            self._token(t.id, t.logprob) | {"top_logprobs": [self._token(*pair) for pair in t.top]}
            for t in tokens
        ]
        return {"content": entries, "refusal": None}

    def completion_logprobs(self, tokens: list[Token], offsets: list[int]) -> dict:
        own = [self._token(t.id, t.logprob) for t in tokens]
        tops = [
            {(e := self._token(*pair))["token"]: e["logprob"] for pair in t.top} for t in tokens
        ]
        return {
            "tokens": [e["token"] for e in own],
            "token_logprobs": [e["logprob"] for e in own],
            "top_logprobs": tops if any(tops) else None,
            "text_offset": offsets,
        }


class Answers:
    """The answers to one request while they are written.

    Made in the event loop; ApiError if there is no room for them.
    """

    def __init__(self, api: Api, asked: Asked, kind: str, worker: EngineThread):
        self.api, self.asked, self.kind, self.worker = api, asked, kind, worker
        self.began, self.first = time.monotonic(), None
        self.id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
        self.created, self.made = int(time.time()), 0
        loop, self.events = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(i, tokens, reason):
            loop.call_soon_threadsafe(self.events.put_nowait, (i, tokens, reason))

        prompts = [prompt for prompt in asked.prompts for _ in range(asked.n)]
        self.readers = [chat.Reader(api.tokenizer) for _ in prompts]
        self.jobs = [
            Job(
                prompt,
                dataclasses.replace(asked.sampling, seed=asked.sampling.seed + i),
                lambda tokens, reason, i=i: deliver(i, tokens, reason),
                self.began + api.settings.seconds,
            )
            for i, prompt in enumerate(prompts)
        ]
        worker.submit(self.jobs)
        worker.metrics.add("rawchat_prompt_tokens_total", sum(map(len, asked.prompts)))

    def cancel(self):
        """Stop whatever is still being written."""
        if unfinished := [job for job, reader in zip(self.jobs, self.readers) if not reader.finish]:
            self.worker.cancel(unfinished)
            self.worker.metrics.add("rawchat_cancelled_answers_total", len(unfinished))

    async def __aiter__(self) -> AsyncIterator[tuple[int, list[chat.Piece], str | None] | None]:
        """(which answer, what is new, None or why it ended) until all have; None when nothing came
        for a while.
        """
        while not all(reader.finish for reader in self.readers):
            try:
                # unlike wait_for, it can't lose what comes at the last moment
                async with asyncio.timeout(QUIET):
                    i, tokens, reason = await self.events.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(reason, ApiError):
                for reader in self.readers:
                    reader.finish = reader.finish or "error"
                self.worker.cancel(self.jobs)
                raise reason
            if self.first is None:
                self.first = time.monotonic()
                self.worker.metrics.observe(
                    "rawchat_time_to_first_token_seconds", self.first - self.began
                )
            self.made += len(tokens)
            pieces = self.readers[i].read(tokens)
            self.readers[i].finish = reason
            yield i, pieces, reason

    def _envelope(self, name: str) -> dict:
        extra = {"dropped_messages": self.asked.dropped} if self.asked.dropped else {}
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.api.id,
            **extra,
        }

    def _usage(self) -> dict:
        prompt = sum(map(len, self.asked.prompts))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.made,
            "total_tokens": prompt + self.made,
        }

    @staticmethod
    def _ending(reason: str | None) -> dict:
        return (
            {"finish_reason": "length", "ended_by": "time"}
            if reason == "time"
            else {"finish_reason": reason}
        )

    def _echo(self, i: int) -> str:
        return self.asked.echo[i // self.asked.n] if self.asked.echo else ""

    async def whole(self) -> dict:
        """The body of an answer that is not streamed."""
        tokens = [[] for _ in self.readers]
        offsets = [[] for _ in self.readers]
        reasons = {}
        async for event in self:
            if event:
                i, pieces, reasons[i] = event
                heard = [piece for piece in pieces if piece.kind == "text"]
                tokens[i] += [token for piece in heard for token in piece.tokens]
                offsets[i] += [offset for piece in heard for offset in piece.offsets]
        choices = []
        for i, reader in enumerate(self.readers):
            text, choice = (
                spoken(reader.parts),
                {"index": i, "logprobs": None, **self._ending(reasons[i])},
            )
            if self.kind == "chat":
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
                # numbered, so that clients that put streams together make the same of them
                parts = [{"index": n, **part} for n, part in enumerate(reader.parts)]
                choice["message"]["parts"] = parts
                if self.asked.logprobs:
                    choice["logprobs"] = self.api.chat_logprobs(tokens[i])
            else:
                choice["text"] = self._echo(i) + text
                if self.asked.logprobs:
                    choice["logprobs"] = self.api.completion_logprobs(tokens[i], offsets[i])
            choices.append(choice)
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return self._envelope(name) | {"choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[str]:
        """The same as server-sent events.

        Tool calls are in `parts` of a delta, beside `content`, which has only the text.
        """
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        empty = self._envelope(name) | ({"usage": None} if self.asked.usage_wanted else {})

        def event(i, choice, ending=None):
            choice = {"index": i, "logprobs": None, **self._ending(ending), **choice}
            return _event(empty | {"choices": [choice]})

        for i in range(len(self.readers)):
            if self.kind == "chat":
                yield event(i, {"delta": {"role": "assistant", "content": "", "refusal": None}})
            elif self.asked.echo:
                yield event(i, {"text": self._echo(i)})
        try:
            async for item in self:
                if item is None:
                    yield ": waiting\n\n"
                    continue
                i, pieces, reason = item
                text = "".join(piece.said for piece in pieces)
                heard = [piece for piece in pieces if piece.kind == "text"]
                tokens = [token for piece in heard for token in piece.tokens]
                offsets = [offset for piece in heard for offset in piece.offsets]
                if self.kind == "chat" and pieces:
                    delta: dict[str, Any] = {"content": text} if text else {}
                    delta["parts"] = [
                        {"index": p.index, "type": p.kind, "text": p.text} for p in pieces
                    ]
                    probabilities = (
                        self.api.chat_logprobs(tokens) if self.asked.logprobs and tokens else None
                    )
                    yield event(i, {"delta": delta, "logprobs": probabilities})
                elif text:
                    probabilities = (
                        self.api.completion_logprobs(tokens, offsets)
                        if self.asked.logprobs
                        else None
                    )
                    yield event(i, {"text": text, "logprobs": probabilities})
                if reason:
                    yield event(i, {"delta": {}} if self.kind == "chat" else {"text": ""}, reason)
        except ApiError as e:
            yield _event(e.body)
            return
        if self.asked.usage_wanted:
            yield _event(self._envelope(name) | {"choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"


def _event(data: dict) -> str:
    return f"data: {json.dumps(data, allow_nan=False)}\n\n"
