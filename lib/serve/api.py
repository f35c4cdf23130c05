"""OpenAI's API, the asking half: what a request may hold, and what it means for this model."""

import re
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lib import chat
from lib.data.roles import BadMessage, in_turns
from lib.data.speech import spoken
from lib.files import UserError
from lib.generate import Sampling
from lib.generate.sampling import TOP
from lib.runs import Model
from lib.serve.settings import ServeSettings

# OpenAI's default at /v1/completions
SHORT = 16
# alternatives that /v1/completions may ask for
TOP_OF_COMPLETIONS = 5
MOST_STOPS = 4
LONGEST_STOP = 200


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
        self.status = status
        self.headers = headers or {}
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        other = "invalid_request_error" if status < 500 else "server_error"
        kind = kinds.get(status, other)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def no_model(wanted: str, ours: str) -> ApiError:
    """For a request that names another model than the one that is served."""
    return ApiError(
        404,
        f"the model {wanted[:100]!r} does not exist here: this server has {ours!r}",
        "model",
        "model_not_found",
    )


def _refuse(message: str, param: str | None = None, code: str | None = None) -> NoReturn:
    raise ApiError(400, message, param, code)


# ---- fields --------------------------------------------------------------------------------------


class Number(NamedTuple):
    """A field that holds a number: its type, its bounds, and what stands for a missing one."""

    kind: type
    low: float
    high: float
    default: float | None


COUNT = 2**31 - 1
NUMBERS = {
    "max_tokens": Number(int, 1, COUNT, None),
    "max_completion_tokens": Number(int, 1, COUNT, None),
    "temperature": Number(float, 0, 2, 1.0),
    "top_p": Number(float, 0, 1, 1.0),
    "top_k": Number(int, 0, COUNT, 0),
    "min_p": Number(float, 0, 1, 0.0),
    "repetition_penalty": Number(float, 0.01, 100, 1.0),
    "seed": Number(int, -(2**63), 2**63 - 1, None),
    "n": Number(int, 1, 128, 1),
}

# what we don't do: only these values, which ask for nothing
NEUTRAL = {
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

# for the provider's own books: they change no answer
NOTES = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)

# what each endpoint knows
COMMON = {"model", "stream", "stream_options", "stop", "logprobs", *NUMBERS, *NEUTRAL, *NOTES}
CHAT_FIELDS = COMMON | {"messages", "top_logprobs", "truncation"}
COMPLETION_FIELDS = COMMON - {"max_completion_tokens"} | {"prompt", "echo", "best_of"}


def _is_int(value) -> bool:
    """Whether a value of JSON is an integer; Python thinks so of true and false as well."""
    return isinstance(value, int) and not isinstance(value, bool)


def _number(body: dict, name: str) -> Any:
    """The number in a field, or its default."""
    number = NUMBERS[name]
    value = body.get(name)
    if value is None:
        return number.default

    # an integer will do for a real number
    right_type = _is_int(value) or (number.kind is float and isinstance(value, float))
    if not right_type:
        due = "a number" if number.kind is float else "an integer"
        _refuse(f"{name} must be {due}, not {type(value).__name__}", name, "invalid_type")
    # a count without end: no bound that nobody reaches is spoken of
    is_open = number.high == COUNT
    if is_open:
        value = min(value, COUNT)
    if not number.low <= value <= number.high:
        bounds = f"at least {number.low}" if is_open else f"from {number.low} to {number.high}"
        _refuse(f"{name} must be {bounds}", name, "out_of_range")
    return number.kind(value)


def _flag(body: dict, name: str) -> bool:
    """The truth in a field, false where it is missing."""
    value = body.get(name)
    if not isinstance(value, bool | None):
        _refuse(f"{name} must be true or false", name, "invalid_type")
    return bool(value)


def _up_to(body: dict, name: str, most: int) -> int | None:
    """A small integer in a field, None where it is missing."""
    value = body.get(name)
    if value is None:
        return None
    if not _is_int(value) or not 0 <= value <= most:
        _refuse(f"{name} must be an integer from 0 to {most}", name, "out_of_range")
    return value


def _stops(body: dict) -> tuple[str, ...]:
    """The texts that end an answer."""
    stop = body.get("stop")
    if stop is None:
        return ()
    texts = [stop] if isinstance(stop, str) else stop

    sound = isinstance(texts, list) and len(texts) <= MOST_STOPS
    if not sound or not all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in texts):
        _refuse(
            f"stop must be a text or a list of at most {MOST_STOPS} texts, of 1 to {LONGEST_STOP} "
            "characters each",
            "stop",
            "invalid_type",
        )
    # half of a pair of surrogates is no text
    return tuple(text.encode("utf-8", "replace").decode() for text in texts)


def _check_fields(body, known: set[str], model_id: str):
    """Refuse what is not known, not supported or meant for another model."""
    # a field that does nothing would be a promise
    if not isinstance(body, dict):
        _refuse("the request body must be a JSON object")
    for name in body:
        if name not in known:
            _refuse(f"unknown field {name[:50]!r}", name[:50], "unknown_parameter")

    for name, allowed in NEUTRAL.items():
        # false equals 0 in Python
        if name in body and (isinstance(body[name], bool) or body[name] not in allowed):
            _refuse(f"{name} is not supported here: leave it out", name, "unsupported_parameter")

    # there is one model; a client that names none means it
    wanted = body.get("model", model_id)
    if not isinstance(wanted, str):
        _refuse("model must be a string", "model", "invalid_type")
    if wanted != model_id:
        raise no_model(wanted, model_id)


def _usage_wanted(body: dict, stream: bool) -> bool:
    """Whether a stream is to end with an event that has the token counts."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not stream:
        _refuse(
            "stream_options must be an object, and only where stream is true",
            "stream_options",
            "invalid_type",
        )
    return _flag(options, "include_usage")


def _sampling(body: dict, logprobs: int, stop: tuple[int, ...], max_tokens: int) -> Sampling:
    """How tokens are to be chosen; `logprobs`: how many alternatives are asked for."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    chosen = {name: _number(body, name) for name in names}
    # without a seed each answer is another
    seed = _number(body, "seed")
    return Sampling(
        max_tokens=max_tokens,
        seed=secrets.randbits(31) if seed is None else seed,
        stop=stop,
        stop_strings=_stops(body),
        logprobs=logprobs,
        **chosen,
    )


def _messages(messages) -> list[dict]:
    """The messages of a request in turns, the last one the user's."""
    if not isinstance(messages, list) or not messages:
        _refuse("messages must be a list of at least one message", "messages", "invalid_type")
    # the same rule as for files and for the terminal
    try:
        turns = in_turns(messages)
    except BadMessage as e:
        where = f"messages.{e.index}" + (f".{e.key}" if e.key else "")
        _refuse(str(e), where, "invalid_value")
    if not turns or turns[-1]["role"] != "user":
        _refuse("the last message must be the user's", "messages", "invalid_value")
    return turns


# ---- requests ------------------------------------------------------------------------------------


@dataclass
class Asked:
    """A checked request: one prompt or more, n answers to each."""

    prompts: list[list[int]]
    n: int
    sampling: Sampling
    stream: bool
    # in a stream: a last event with the token counts
    usage_wanted: bool
    logprobs: bool
    # of each prompt, what to repeat before the answer
    echo: list[str] = field(default_factory=list)
    # oldest messages that were left out
    dropped: int = 0


class Api:
    """What requests mean for this model: checking them, and the names and bounds that answers
    need.
    """

    def __init__(self, model: Model, settings: ServeSettings):
        self.model = model
        self.settings = settings
        self.tokenizer = model.tokenizer
        self.context = settings.context or model.config.sequence_len
        # bytes of a token: a text of more than context * longest can't fit
        self.longest = max(map(len, self.tokenizer.tokens))
        # the name under which clients ask for the model
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

    # ---- chats

    def chat(self, body) -> Asked:
        """A request for /v1/chat/completions."""
        _check_fields(body, CHAT_FIELDS, self.id)
        # one that has never seen a chat would write nonsense
        if self.model.stage == "base":
            _refuse(
                "this model was only pretrained and has not learnt to chat: let it go on with a "
                "text at /v1/completions",
                code="not_a_chat_model",
            )

        # the new name of a field that has two
        wanted = _number(body, "max_completion_tokens")
        older = _number(body, "max_tokens")
        if wanted is None:
            wanted = older

        # probabilities, and of how many alternatives
        logprobs = _flag(body, "logprobs")
        top = _up_to(body, "top_logprobs", TOP) or 0
        if top and not logprobs:
            _refuse("top_logprobs needs logprobs to be true", "top_logprobs", "invalid_value")

        # the prompt, and the room that it leaves
        ids, dropped = self._chat_prompt(body, wanted)
        room = self._room(ids, wanted, "messages")
        stream = _flag(body, "stream")
        return Asked(
            [ids],
            n=_number(body, "n"),
            sampling=_sampling(body, top, chat.ends(self.tokenizer), room),
            stream=stream,
            usage_wanted=_usage_wanted(body, stream),
            logprobs=logprobs,
            dropped=dropped,
        )

    def _chat_prompt(self, body: dict, wanted: int | None) -> tuple[list[int], int]:
        """The ids that ask for an answer, and how many of the oldest messages were left out.

        With truncation "auto" these make room for the answer.
        """
        truncation = body.get("truncation", "disabled")
        if truncation not in ("disabled", "auto"):
            _refuse("truncation must be disabled or auto", "truncation", "invalid_value")
        shorten = truncation == "auto"
        messages = _messages(body.get("messages"))

        # what can't be left out must fit
        needed = messages[-1:] if shorten else messages
        self._check_size([spoken(message["content"]) for message in needed], "messages")
        # a chat that cannot be rendered is told in the tokenizer's words
        try:
            if not shorten:
                return self.tokenizer.render_for_completion(messages), 0
            most = min(wanted or self.settings.max_tokens, self.settings.max_tokens)
            return chat.fit(self.tokenizer, messages, self.context, most)
        except UserError as e:
            too_long = shorten and "context" in str(e)
            code = "context_length_exceeded" if too_long else "invalid_value"
            _refuse(str(e), "messages", code)

    # ---- completions

    def completion(self, body) -> Asked:
        """A request for /v1/completions."""
        _check_fields(body, COMPLETION_FIELDS, self.id)
        prompts, texts = self._prompts(body.get("prompt", ""))

        # of n answers all are given back
        n = _number(body, "n")
        best_of = body.get("best_of")
        if best_of is not None and best_of != n:
            why = "best_of is not supported beside n: leave it out"
            _refuse(why, "best_of", "unsupported_parameter")

        # the prompt itself has no probabilities
        logprobs = _up_to(body, "logprobs", TOP_OF_COMPLETIONS)
        echo = _flag(body, "echo")
        if echo and logprobs is not None:
            why = "echo together with logprobs is not supported: ask for one of them"
            _refuse(why, "echo", "unsupported_parameter")

        # all prompts get the room of the longest
        wanted = _number(body, "max_tokens")
        if wanted is None:
            wanted = SHORT
        room = min(self._room(prompt, wanted, "prompt") for prompt in prompts)
        stream = _flag(body, "stream")
        return Asked(
            prompts,
            n=n,
            sampling=_sampling(body, logprobs or 0, (self.tokenizer.bos,), room),
            stream=stream,
            usage_wanted=_usage_wanted(body, stream),
            logprobs=logprobs is not None,
            echo=texts if echo else [],
        )

    def _prompts(self, prompt) -> tuple[list[list[int]], list[str]]:
        """The prompts of a request as ids and as texts: it holds one or a list of them, each a text
        or token ids.
        """
        is_ids = isinstance(prompt, list) and prompt and all(type(id) is int for id in prompt)
        if isinstance(prompt, str) or is_ids:
            prompt = [prompt]

        # no more than can wait in line
        most = self.settings.queue
        if not isinstance(prompt, list) or not 1 <= len(prompt) <= most:
            _refuse(
                f"prompt must be a text, a list of token ids, or a list of 1 to {most} of these",
                "prompt",
                "invalid_type",
            )
        both = [self._prompt(one) for one in prompt]
        return [ids for ids, _ in both], [text for _, text in both]

    def _prompt(self, prompt) -> tuple[list[int], str]:
        """One prompt, a text or token ids, as both."""
        if isinstance(prompt, str):
            self._check_size([prompt], "prompt")
            return self.tokenizer.encode(prompt, bos=True), prompt

        # ids of this model, and no text between them
        vocabulary = range(self.model.config.vocab_size)
        is_list = isinstance(prompt, list) and prompt
        if not is_list or not all(type(id) is int and id in vocabulary for id in prompt):
            _refuse(
                "prompt must hold texts or lists of token ids within the vocabulary",
                "prompt",
                "invalid_type",
            )
        if len(prompt) >= self.context:
            self._too_long(len(prompt), "prompt")
        return prompt, self.tokenizer.decode(prompt)

    # ---- room

    def _too_long(self, tokens: int | str, param: str) -> NoReturn:
        _refuse(
            f"this model's maximum context length is {self.context} tokens and your {param} has "
            f"{tokens}: shorten it",
            param,
            "context_length_exceeded",
        )

    def _check_size(self, texts: list[str], param: str):
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
