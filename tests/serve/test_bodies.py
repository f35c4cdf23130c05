"""Answers without a server and without an engine: tokens put in by hand, bodies and events read."""

import asyncio
import json
import math
import types

import pytest

from lib.data.tokenizer import Tokenizer
from lib.generate import Sampling, Token
from lib.serve import answers
from lib.serve.answers import Answers, chat_logprobs, completion_logprobs, spelled
from lib.serve.api import ApiError, Asked
from lib.serve.counters import Counters
from lib.serve.settings import ServeSettings
from tests.helpers.golden import PARITY

TOKENIZER = Tokenizer.load(PARITY / "tokenizer.json")
SPECIAL = TOKENIZER.special
A, B, C = (TOKENIZER.encode(letter)[0] for letter in "abc")


class Line:
    """What stands for the engine's thread: jobs wait until the test delivers something."""

    def __init__(self):
        self.metrics = Counters()
        self.jobs = []
        self.cancelled = []

    def submit(self, jobs):
        self.jobs = jobs

    def cancel(self, jobs):
        self.cancelled.append(jobs)


def asked(prompts=((1, 2, 3),), n=1, **fields):
    fields = dict(stream=False, usage_wanted=False, logprobs=False) | fields
    return Asked([list(prompt) for prompt in prompts], n, Sampling(9, seed=40), **fields)


API = types.SimpleNamespace(tokenizer=TOKENIZER, id="nest-sft", settings=ServeSettings(seconds=7.0))


def begun(request, kind="chat") -> Answers:
    """Answers to a request, in a running event loop."""
    return Answers(API, request, kind, Line())


def tokens(*ids):
    return [Token(id, -0.5 - i) for i, id in enumerate(ids)]


def whole(request, kind, *news):
    """The body of answers that are handed (number, tokens, reason) one after the other."""

    async def run():
        answer = begun(request, kind)
        for i, new, reason in news:
            answer.worker.jobs[i].deliver(new, reason)
        return answer, await answer.whole()

    return asyncio.run(run())


def streamed(request, kind, *news):
    """The same as the events of a stream, each a dict or what else was sent."""

    async def run():
        answer = begun(request, kind)
        for i, new, reason in news:
            answer.worker.jobs[i].deliver(new, reason)
        return answer, [event async for event in answer.stream()]

    answer, events = asyncio.run(run())
    assert all(event.endswith("\n\n") for event in events)
    read = []
    for event in events:
        text = event.removeprefix("data: ").strip()
        read.append(json.loads(text) if text.startswith("{") else event)
    return answer, read


def clock(*seconds):
    """A time that has passed differently each time it is looked at."""
    monotonic = iter(seconds).__next__
    return types.SimpleNamespace(monotonic=monotonic, time=lambda: 5.5)


# ---- tokens as logprobs show them ----------------------------------------------------------------


def test_tokens_as_they_are_spelled():
    half = TOKENIZER.tokens.index(b"\xd8\xa7"[:1])
    assert spelled(TOKENIZER, A, -0.5) == {"token": "a", "logprob": -0.5, "bytes": [97]}
    assert spelled(TOKENIZER, half, 0.0) == {
        "token": "bytes:\\xd8",
        "logprob": 0.0,
        "bytes": [0xD8],
    }
    bos = spelled(TOKENIZER, TOKENIZER.bos, -math.inf)
    assert bos == {"token": "<|bos|>", "logprob": -9999.0, "bytes": None}
    # the first id behind the ordinary ones, and one behind all
    first = len(TOKENIZER.tokens)
    assert spelled(TOKENIZER, first, -1.0)["bytes"] is None
    assert spelled(TOKENIZER, 7777, -1.0)["token"] == "<|7777|>"
    assert spelled(TOKENIZER, first - 1, -1.0)["bytes"] == list(TOKENIZER.tokens[-1])


def test_logprobs_in_both_forms():
    written = [Token(A, -0.5, top=[(A, -0.5), (B, -2.0)]), Token(C, -1.0, top=[(C, -1.0)])]
    entry = lambda letter, p: {"token": letter, "logprob": p, "bytes": list(letter.encode())}
    assert chat_logprobs(TOKENIZER, written) == {
        "content": [
            entry("a", -0.5) | {"top_logprobs": [entry("a", -0.5), entry("b", -2.0)]},
            entry("c", -1.0) | {"top_logprobs": [entry("c", -1.0)]},
        ],
        "refusal": None,
    }
    assert completion_logprobs(TOKENIZER, written, [3, 4]) == {
        "tokens": ["a", "c"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"a": -0.5, "b": -2.0}, {"c": -1.0}],
        "text_offset": [3, 4],
    }
    # only one of them has alternatives; none has
    some = completion_logprobs(TOKENIZER, [written[0], Token(B, -1.0)], [0, 1])
    assert some["top_logprobs"] == [{"a": -0.5, "b": -2.0}, {}]
    assert completion_logprobs(TOKENIZER, tokens(A), [0])["top_logprobs"] is None


# ---- what is asked of the engine -----------------------------------------------------------------


def test_each_answer_is_a_job_with_its_own_seed_and_one_deadline(monkeypatch):
    monkeypatch.setattr(answers, "time", clock(1000.0))

    async def run():
        return begun(asked([[1, 2], [3]], n=2), "completion")

    answer = asyncio.run(run())
    jobs = answer.worker.jobs
    assert [job.prompt for job in jobs] == [[1, 2], [1, 2], [3], [3]]
    assert [job.sampling.seed for job in jobs] == [40, 41, 42, 43]
    assert {job.sampling.max_tokens for job in jobs} == {9}
    assert {job.deadline for job in jobs} == {1007.0} and answer.created == 5
    assert answer.worker.metrics.counters["rawchat_prompt_tokens_total", ()] == 3


def test_only_what_is_unfinished_is_cancelled():
    async def run(ended):
        answer = begun(asked(n=3))
        for i in ended:
            answer.readers[i].finish = "stop"
        answer.cancel()
        return answer

    answer = asyncio.run(run([1]))
    assert answer.worker.cancelled == [[answer.jobs[0], answer.jobs[2]]]
    assert answer.worker.metrics.counters["rawchat_cancelled_answers_total", ()] == 2
    answer = asyncio.run(run([0, 1, 2]))
    assert answer.worker.cancelled == []
    assert answer.worker.metrics.counters["rawchat_cancelled_answers_total", ()] == 0


# ---- whole bodies --------------------------------------------------------------------------------

CALL = [SPECIAL["<|python_start|>"], *TOKENIZER.encode("1"), SPECIAL["<|python_end|>"]]
RESULT = [SPECIAL["<|output_start|>"], *TOKENIZER.encode("2"), SPECIAL["<|output_end|>"]]


def test_a_chats_body():
    news = [(0, tokens(A), None), (0, tokens(B, *CALL, *RESULT, C), None), (0, [], "stop")]
    answer, body = whole(asked(dropped=4), "chat", *news)
    assert body.pop("id") == answer.id and answer.id.startswith("chatcmpl-")
    assert body.pop("created") == answer.created
    parts = [
        {"index": 0, "type": "text", "text": "ab"},
        {"index": 1, "type": "python", "text": "1"},
        {"index": 2, "type": "python_output", "text": "2"},
        {"index": 3, "type": "text", "text": "c"},
    ]
    message = {"role": "assistant", "content": "ab c", "refusal": None, "parts": parts}
    choice = {"index": 0, "logprobs": None, "finish_reason": "stop", "message": message}
    assert body == {
        "object": "chat.completion",
        "model": "nest-sft",
        "dropped_messages": 4,
        "choices": [choice],
        "usage": {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12},
    }


def test_a_completions_body_with_several_answers_to_several_prompts():
    request = asked([[1], [2, 3]], n=2, echo=["one ", "two "])
    # they come as they come
    news = [(i, tokens(id), "length") for i, id in ((2, C), (0, A), (3, A), (1, B))]
    answer, body = whole(request, "completion", *news)
    assert answer.id.startswith("cmpl-") and body["object"] == "text_completion"
    assert "dropped_messages" not in body
    texts = ["one a", "one b", "two c", "two a"]
    assert body["choices"] == [
        {"index": i, "logprobs": None, "finish_reason": "length", "text": text}
        for i, text in enumerate(texts)
    ]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_an_answer_that_took_too_long_says_so():
    _, body = whole(asked(), "completion", (0, tokens(A), None), (0, [], "time"))
    [choice] = body["choices"]
    assert (choice["finish_reason"], choice["ended_by"], choice["text"]) == ("length", "time", "a")


def test_an_error_of_one_answer_ends_all():
    error = ApiError(500, "no")

    async def run():
        answer = begun(asked(n=3))
        answer.worker.jobs[0].deliver(tokens(A), "stop")
        answer.worker.jobs[1].deliver([], error)
        with pytest.raises(ApiError) as e:
            await answer.whole()
        return answer, e.value

    answer, raised = asyncio.run(run())
    assert raised is error
    assert [reader.finish for reader in answer.readers] == ["stop", "error", "error"]
    assert answer.worker.cancelled == [answer.jobs]


def test_probabilities_of_what_was_said_and_of_calls():
    news = (0, tokens(A, *CALL, *RESULT, C), "stop")
    _, body = whole(asked(logprobs=True), "chat", news)
    [choice] = body["choices"]
    said = [(entry["token"], entry["logprob"]) for entry in choice["logprobs"]["content"]]
    assert said == [("a", -0.5), ("c", -7.5)]
    call = choice["message"]["parts"][1]
    assert (call["tokens"], call["token_logprobs"]) == (["1"], [-2.5])
    for part in (0, 2, 3):
        assert set(choice["message"]["parts"][part]) == {"index", "type", "text"}
    # a completion's have offsets in what was said, with the blank around the call
    _, body = whole(asked(logprobs=True), "completion", news)
    [choice] = body["choices"]
    assert choice["text"] == "a c"
    assert choice["logprobs"]["tokens"] == ["a", "c"]
    assert choice["logprobs"]["text_offset"] == [0, 2]


def test_the_first_token_is_timed_once(monkeypatch):
    monkeypatch.setattr(answers, "time", clock(10.0, 12.5, 99.0))
    answer, _ = whole(asked(), "chat", (0, tokens(A), None), (0, tokens(B), "stop"))
    [histogram] = answer.worker.metrics.histograms.values()
    assert histogram.total == 2.5 and sum(histogram.counts) == 1
    assert list(answer.worker.metrics.histograms) == ["rawchat_time_to_first_token_seconds"]


# ---- streams -------------------------------------------------------------------------------------


def test_the_events_of_a_chat():
    news = [(0, tokens(A), None), (0, tokens(*CALL), None), (0, tokens(*RESULT, C), "stop")]
    answer, events = streamed(asked(), "chat", *news)
    assert events.pop() == "data: [DONE]\n\n"
    head = {
        "id": answer.id,
        "object": "chat.completion.chunk",
        "created": answer.created,
        "model": "nest-sft",
    }
    choices = []
    for event in events:
        [choice] = event.pop("choices")
        assert event == head and choice.pop("index") == 0 and choice.pop("logprobs") is None
        choices.append(choice)
    part = lambda i, kind, text: {"index": i, "type": kind, "text": text}
    last = [part(2, "python_output", "2"), part(3, "text", "c")]
    assert choices == [
        {"finish_reason": None, "delta": {"role": "assistant", "content": "", "refusal": None}},
        {"finish_reason": None, "delta": {"content": "a", "parts": [part(0, "text", "a")]}},
        # what is called is not said
        {"finish_reason": None, "delta": {"parts": [part(1, "python", "1")]}},
        {"finish_reason": None, "delta": {"content": " c", "parts": last}},
        {"finish_reason": "stop", "delta": {}},
    ]


def test_the_events_of_a_completion():
    request = asked([[1], [2]], echo=["one ", "two "], usage_wanted=True)
    news = [(1, tokens(A), None), (0, tokens(B), "length"), (1, [], "time")]
    _, events = streamed(request, "completion", *news)
    assert events.pop() == "data: [DONE]\n\n"
    counts = events.pop()
    assert counts["choices"] == []
    assert counts["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    assert all(event["usage"] is None for event in events)
    told = [event["choices"][0] for event in events]
    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in told] == [
        (0, "one ", None),
        (1, "two ", None),
        (1, "a", None),
        (0, "b", None),
        (0, "", "length"),
        (1, "", "length"),
    ]
    assert ["ended_by" in choice for choice in told] == [False] * 5 + [True]
    # neither a repeated prompt nor counts unless they are asked for; nothing is said of a call
    _, events = streamed(asked(), "completion", (0, tokens(*CALL), None), (0, [], "stop"))
    [end, _] = events
    assert "usage" not in end and end["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_probabilities_in_a_stream(kind):
    news = [(0, tokens(A), None), (0, tokens(*CALL), None), (0, tokens(C), "stop")]
    _, events = streamed(asked(logprobs=True), kind, *news)
    told = [event["choices"][0]["logprobs"] for event in events if isinstance(event, dict)]
    given = [logprobs for logprobs in told if logprobs]
    if kind == "chat":
        assert [[entry["token"] for entry in one["content"]] for one in given] == [["a"], ["c"]]
    else:
        assert [one["tokens"] for one in given] == [["a"], ["c"]]
        assert [one["text_offset"] for one in given] == [[0], [2]]


def test_an_error_within_a_stream_is_its_last_event():
    error = ApiError(503, "the server was stopped", code="unavailable")
    request = asked(usage_wanted=True)
    _, events = streamed(request, "completion", (0, tokens(A), None), (0, [], error))
    assert events[0]["choices"][0]["text"] == "a"
    assert events[1:] == [error.body]


def test_a_silent_stream_sends_a_comment(monkeypatch):
    monkeypatch.setattr(answers, "QUIET", 0.01)

    async def run():
        answer = begun(asked(), "completion")
        stream = answer.stream()
        first = await anext(stream)
        answer.worker.jobs[0].deliver(tokens(A), "stop")
        rest = [event async for event in stream]
        return first, rest

    first, rest = asyncio.run(run())
    assert first == ": waiting\n\n" and rest[-1] == "data: [DONE]\n\n"
    texts = [json.loads(event[6:])["choices"][0]["text"] for event in rest[-3:-1]]
    assert texts == ["a", ""]
