"""The server as its users meet it: OpenAI's own client, raw requests, crowds, people who hang up,
and requests that make no sense.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import gc
import io
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import httpx
import pytest

from lib import notebook, serve
from lib.chat import messages
from lib.chat.terminal import ChatSettings as ChatSettings
from lib.files import UserError
from lib.generate import Sampling, generate
from lib.runs import load_model
from lib.serve import api
from lib.serve.answers import Answers, spelled
from lib.serve.counters import Counters
from lib.serve.guard import guarded
from lib.serve.server import Server, listen, main
from lib.serve.web import _engine
from lib.serve.worker import EngineThread, Job, warm_up
from tests.helpers import parrot, programs

# a server and its clients
pytestmark = pytest.mark.slow

openai = pytest.importorskip("openai")
ROOT = Path(__file__).parents[2]


@cache
def model():
    return load_model(parrot.run())


@contextlib.contextmanager
def serving(**settings):
    """A server on a free port, and a raw client for it."""
    settings = serve.ServeSettings(run=str(parrot.run()), port=0, **settings)
    server = Server(model(), settings).start()
    try:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            client.server = server
            yield client
    finally:
        server.close()


@pytest.fixture(scope="module")
def http():
    with serving(max_tokens=400) as client:
        yield client


@pytest.fixture(scope="module")
def ai(http):
    return openai.OpenAI(base_url=f"{http.server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def name(http):
    return http.server.app.state.api.id


ASK = {q: parrot.messages(q)[:1] for q in parrot.CHATS}
SUM, SCRIPTS = "What is 37 plus 85?", "Say it in other scripts."


def until(http, timeout=30, **wanted):
    """Wait until /health says that so many answers are being written and so many are waiting."""
    ends = time.monotonic() + timeout
    while wanted != {k: (state := http.get("/health").json())[k] for k in wanted}:
        assert time.monotonic() < ends, f"wanted {wanted}, got {state}"
        time.sleep(0.01)


def settle(http):
    until(http, busy=0, waiting=0)


@contextlib.contextmanager
def slowly(client, seconds=0.2):
    """Let the server's engine take so long for each step."""
    engine = client.server.app.state.worker.engine
    engine.step = lambda: (time.sleep(seconds), type(engine).step(engine))[1]
    try:
        yield
    finally:
        del engine.step


# ---- OpenAI's client


def test_models(ai, name):
    assert [m.id for m in ai.models.list()] == [name] and ai.models.retrieve(
        name
    ).owned_by == "rawchat"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ai.models.retrieve("gpt-4o")


def test_a_chat(ai, name):
    answer = ai.chat.completions.create(model=name, messages=ASK[SUM], temperature=0)
    choice = answer.choices[0]
    assert (
        choice.message.content == "Let me see. 37 plus 85 is **122**."
        and choice.message.role == "assistant"
    )
    numbered = [{"index": i, **part} for i, part in enumerate(parrot.CHATS[SUM])]
    assert choice.message.parts == numbered, "who knows of tools sees the calls"
    assert (
        choice.finish_reason == "stop"
        and answer.model == name
        and answer.object == "chat.completion"
    )
    prompt = len(model().tokenizer.render_for_completion(ASK[SUM]))
    # without <|assistant_end|>
    made = len(model().tokenizer.render_conversation(parrot.messages(SUM))[0]) - prompt - 1
    assert (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
        answer.usage.total_tokens,
    ) == (
        prompt,
        made,
        prompt + made,
    )


def test_a_streamed_chat_is_the_same_and_never_cuts_a_character(ai, name):
    for question in (SCRIPTS, SUM):
        chunks = list(
            ai.chat.completions.create(
                model=name,
                messages=ASK[question],
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        deltas = [c.choices[0].delta for c in chunks if c.choices]
        assert deltas[0].role == "assistant" and len({c.id for c in chunks}) == 1
        assert "".join(d.content or "" for d in deltas) == messages.spoken(parrot.CHATS[question])
        assert not any("\ufffd" in (d.content or "") for d in deltas) and len(deltas) > 4
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        assert (
            chunks[-1].usage.total_tokens > 0
            and not chunks[-1].choices
            and all(c.usage is None for c in chunks[:-1])
        )
    parts = {}
    for d in deltas:
        pieces = getattr(d, "parts", None) or (
            [{"index": 0, "type": "text", "text": d.content}] if d.content else []
        )
        for p in pieces:
            parts.setdefault(p["index"], {"type": p["type"], "text": ""})["text"] += p["text"]
    assert [parts[i] for i in sorted(parts)] == parrot.CHATS[SUM]


@pytest.mark.parametrize("question", [SUM, SCRIPTS])
def test_a_stream_put_together_by_openais_client_is_the_whole_answer(ai, name, question):
    from openai.lib.streaming.chat import ChatCompletionStreamState

    ask = dict(model=name, messages=ASK[question], temperature=0, logprobs=True)
    whole = ai.chat.completions.create(**ask)
    state = ChatCompletionStreamState()
    for chunk in ai.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **ask
    ):
        state.handle_chunk(chunk)
    streamed = state.get_final_completion().to_dict()["choices"][0]
    choice = whole.choices[0].to_dict()
    for field in ("content", "role", "parts"):
        assert streamed["message"][field] == choice["message"][field]
    assert streamed["finish_reason"] == choice["finish_reason"]
    tokens = [entry["token"] for entry in streamed["logprobs"]["content"]]
    assert tokens == [entry["token"] for entry in choice["logprobs"]["content"]]


def test_more_tokens_than_there_is_room_for_are_fewer_tokens(ai, name):
    messages = [{"role": "user", "content": "word " * 120}]
    room = 768 - len(model().tokenizer.render_for_completion(messages))
    for stream in (False, True):
        answer = ai.chat.completions.create(
            model=name, messages=messages, max_tokens=5000, top_p=0, stream=stream, temperature=2
        )
        if not stream:
            assert 0 < answer.usage.completion_tokens <= min(room, 400)
            continue
        reasons = [choice.finish_reason for event in answer for choice in event.choices]
        assert reasons[-1] in ("stop", "length")
        assert not any(reasons[:-1])


def test_the_servers_limit_bounds_what_is_asked_for():
    served = api.Api(model(), serve.ServeSettings(run=str(parrot.run()), max_tokens=7))
    for wanted, given in (({}, 7), ({"max_tokens": 5000}, 7), ({"max_tokens": 3}, 3)):
        asked = served.chat({"messages": ASK["hello"]} | wanted)
        assert asked.sampling.max_tokens == given


def test_a_base_model_does_not_chat():
    served = serve.ServeSettings(run=str(parrot.run()))
    base = api.Api(model()._replace(stage="base"), served)
    with pytest.raises(api.ApiError, match="has not learnt to chat"):
        base.chat({"messages": ASK["hello"]})
    assert base.completion({"prompt": "a"}).prompts


def test_usual_health_checks_are_answered(http):
    for path in ("/", "/health", "/metrics", "/v1/models"):
        answer = http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_the_parts_of_an_answer_may_be_sent_back(ai, http, name):
    messages = [*parrot.messages(SUM), *ASK["hello"]]
    prompt = ai.chat.completions.create(
        model=name, messages=messages, max_tokens=1
    ).usage.prompt_tokens
    assert prompt == len(model().tokenizer.render_for_completion(messages))


def test_system_messages_and_content_parts(ai, name):
    messages = [
        {"role": "system", "content": "A"},
        {"role": "developer", "content": [{"type": "text", "text": "B"}]},
        {"role": "user", "content": [{"type": "text", "text": "C"}, {"type": "text", "text": "D"}]},
        {"role": "user", "content": "E"},
    ]
    prompt = ai.chat.completions.create(
        model=name, messages=messages, max_tokens=1
    ).usage.prompt_tokens
    same = [{"role": "system", "content": "A\n\nB"}, {"role": "user", "content": "CD\n\nE"}]
    assert prompt == len(model().tokenizer.render_for_completion(same))


def test_seeds_repeat_and_every_answer_of_several_has_its_own(ai, name):
    ask = dict(model=name, messages=ASK["hello"], temperature=1.7, max_tokens=24)
    several = [c.message.content for c in ai.chat.completions.create(n=3, seed=5, **ask).choices]
    assert len(set(several)) == 3
    alone = [
        ai.chat.completions.create(seed=5 + i, **ask).choices[0].message.content for i in range(3)
    ]
    assert several == alone
    ids = model().tokenizer.render_for_completion(ASK["hello"])
    sampling = Sampling(24, temperature=1.7, seed=5, stop=messages.ends(model().tokenizer))
    made = generate(model().params, model().config, [ids], sampling)[0]
    reader = messages.Reader(model().tokenizer)
    reader.read([messages.Token(i, 0.0) for i in made])
    assert several[0] == messages.spoken(reader.parts), "the server writes what generate writes"
    streamed = ["", "", ""]
    for chunk in ai.chat.completions.create(n=3, seed=5, stream=True, **ask):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == several
    # without a seed answers differ; what was called counts too, for some say nothing aloud
    drawn = [ai.chat.completions.create(**ask).choices[0].message.parts for _ in range(4)]
    assert any(parts != drawn[0] for parts in drawn)


def test_the_logarithm_of_nothing_is_a_number_that_json_has():
    assert spelled(model().tokenizer, 65, -math.inf)["logprob"] == -9999.0


def test_a_prompt_counts_once_however_many_answers_it_gets(ai, http, name):
    counted = _counter(http, "rawchat_prompt_tokens_total")
    both = ["1 2 3", "4 5"]
    answer = ai.completions.create(model=name, prompt=both, n=3, max_tokens=1)
    tokens = sum(len(model().tokenizer.encode(text, bos=True)) for text in both)
    assert answer.usage.prompt_tokens == tokens
    assert _counter(http, "rawchat_prompt_tokens_total") == counted + tokens


def test_stop_strings_and_lengths(ai, name):
    ask = dict(model=name, messages=ASK["Count to 120."], temperature=0)
    for stop in ("6 7", [" 9", "6 7 8"]):
        for stream in (False, True):
            answer = ai.chat.completions.create(stop=stop, stream=stream, **ask)
            if stream:
                chunks = list(answer)
                text, reason = (
                    "".join(c.choices[0].delta.content or "" for c in chunks),
                    chunks[-1].choices[0].finish_reason,
                )
            else:
                text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
            assert (text, reason) == ("1 2 3 4 5 ", "stop")
    for limit in ({"max_tokens": 7}, {"max_completion_tokens": 7}):
        answer = ai.chat.completions.create(**limit, **ask)
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 7
        assert parrot.COUNT.startswith(answer.choices[0].message.content)


def test_logprobs_of_a_chat(ai, name):
    for stream in (False, True):
        answer = ai.chat.completions.create(
            model=name,
            messages=ASK[SCRIPTS],
            temperature=0,
            logprobs=True,
            top_logprobs=3,
            stream=stream,
        )
        found = [c.choices[0].logprobs for c in answer] if stream else [answer.choices[0].logprobs]
        entries = [e for logprobs in found if logprobs for e in logprobs.content]
        assert b"".join(bytes(e.bytes) for e in entries).decode() == parrot.CHATS[SCRIPTS], (
            "the tokens make up the text"
        )
        assert all(
            e.logprob <= 0
            and len(e.top_logprobs) == 3
            and e.top_logprobs[0].logprob == max(t.logprob for t in e.top_logprobs)
            for e in entries
        )
        assert all(e.top_logprobs[0].token == e.token for e in entries), (
            "greedy takes the likeliest"
        )


def test_completions(ai, name):
    ids = model().tokenizer.encode("1 2 3", bos=True)
    one = ai.completions.create(model=name, prompt="1 2 3", temperature=0, max_tokens=12)
    assert (
        one.object == "text_completion"
        and one.usage.prompt_tokens == len(ids)
        and one.usage.completion_tokens <= 12
    )
    assert (
        ai.completions.create(model=name, prompt=ids, temperature=0, max_tokens=12).choices[0].text
        == one.choices[0].text
    )
    several = ai.completions.create(
        model=name, prompt=["1 2 3", "4 5"], temperature=0, max_tokens=12, n=2, echo=True
    )
    texts = [c.text for c in several.choices]
    assert (
        texts[0] == texts[1] == "1 2 3" + one.choices[0].text
        and texts[2].startswith("4 5")
        and [c.index for c in several.choices] == [0, 1, 2, 3]
    )
    streamed = "".join(
        c.choices[0].text
        for c in ai.completions.create(
            model=name, prompt="1 2 3", temperature=0, max_tokens=12, echo=True, stream=True
        )
    )
    assert streamed == texts[0]
    assert ai.completions.create(model=name, prompt="1 2 3").usage.completion_tokens <= 16
    scored = ai.completions.create(
        model=name, prompt="1 2 3", temperature=0, max_tokens=12, logprobs=2
    ).choices[0]
    logprobs = scored.logprobs
    assert (
        len(logprobs.tokens)
        == len(logprobs.token_logprobs)
        == len(logprobs.text_offset)
        == len(logprobs.top_logprobs)
    )
    for token, offset in zip(logprobs.tokens, logprobs.text_offset):
        assert token.startswith("bytes:") or scored.text[offset:].startswith(token)


def test_errors_are_openais(ai, name):
    cases = [
        (dict(temperature=3), "temperature"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(top_logprobs=3), "top_logprobs"),
        (dict(presence_penalty=1.0), "presence_penalty"),
        (dict(stop=["a"] * 5), "stop"),
        (dict(extra_body={"colour": 1}), "colour"),
        (dict(tools=[{"type": "function", "function": {"name": "f"}}]), "tools"),
        (dict(n=1000), "n"),
        (dict(stream_options={"include_usage": True}), "stream_options"),
        (dict(extra_body={"top_k": True}), "top_k"),
        (dict(messages=[]), "messages"),
        (
            dict(
                messages=[
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ]
            ),
            None,
        ),
        (dict(messages=[{"role": "tool", "content": "x"}]), "messages.0.role"),
        (dict(messages=parrot.messages("hello")), "messages"),
    ]
    for change, param in cases:
        with pytest.raises(openai.BadRequestError) as e:
            ai.chat.completions.create(**{"model": name, "messages": ASK["hello"], **change})
        assert (
            e.value.type == "invalid_request_error"
            and (param is None or e.value.param == param)
            and len(e.value.body["message"]) > 10
        )
    with pytest.raises(openai.NotFoundError) as e:
        ai.chat.completions.create(model="gpt-4o", messages=ASK["hello"])
    assert e.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as e:
        ai.completions.create(model=name, prompt="a", echo=True, logprobs=1)
    assert e.value.param == "echo"
    with pytest.raises(openai.BadRequestError) as e:
        ai.completions.create(model=name, prompt=[])
    assert e.value.param == "prompt"


@pytest.mark.parametrize(
    "change",
    [
        dict(messages=[{"role": "user", "content": "word " * 600}]),
        dict(messages=[{"role": "user", "content": "w" * 200_000}]),
    ],
)
def test_too_long_for_the_context_is_said(ai, name, change):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 768 tokens") as e:
        ai.chat.completions.create(**{"model": name, **change})
    assert e.value.code == "context_length_exceeded"
    text = change["messages"][0]["content"]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 768 tokens"):
        ai.completions.create(model=name, prompt=text, max_tokens=change.get("max_tokens", 16))


def test_the_oldest_turns_are_left_out_when_asked(ai, name):
    messages = [
        m
        for i in range(30)
        for m in (
            {"role": "user", "content": f"{i} " + "word " * 12},
            {"role": "assistant", "content": "hm"},
        )
    ] + ASK[SUM]
    with pytest.raises(openai.BadRequestError) as e:
        ai.chat.completions.create(model=name, messages=messages)
    assert e.value.code == "context_length_exceeded"
    answer = ai.chat.completions.create(
        model=name, messages=messages, max_tokens=50, extra_body={"truncation": "auto"}
    )
    assert answer.dropped_messages > 20 and answer.usage.total_tokens <= 768
    # a longer answer needs more room
    dropped = []
    for most in (50, 350):
        with ai.chat.completions.create(
            model=name,
            messages=messages,
            max_tokens=most,
            stream=True,
            extra_body={"truncation": "auto"},
        ) as parts:
            dropped.append(next(iter(parts)).dropped_messages)
    assert dropped[0] == answer.dropped_messages < dropped[1]
    with pytest.raises(openai.BadRequestError) as e:
        ai.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": "word " * 600}],
            extra_body={"truncation": "auto"},
        )
    assert e.value.code == "context_length_exceeded"


# ---- crowds


def test_32_streaming_clients_get_what_each_would_get_alone(http, name):
    """A crowd with settings of their own, more than there are slots: each answer is the one its
    seed gives to a lonely client.
    """
    questions = list(ASK)
    asks = [
        dict(
            model=name,
            messages=ASK[questions[i % len(questions)]],
            seed=i,
            temperature=(0, 0.8, 1.5)[i % 3],
            top_k=(0, 20)[i % 2],
            max_tokens=20 + i,
            **({"logprobs": True} if i % 5 == 0 else {}),
        )
        for i in range(32)
    ]

    async def crowd():
        async with openai.AsyncOpenAI(
            base_url=f"{http.server.url}/v1", api_key="none", max_retries=0
        ) as client:

            async def one(ask):
                ask = dict(ask)
                chunks = [
                    c
                    async for c in await client.chat.completions.create(
                        **{k: v for k, v in ask.items() if k != "top_k"},
                        stream=True,
                        extra_body={"top_k": ask["top_k"]},
                    )
                ]
                return "".join(c.choices[0].delta.content or "" for c in chunks), chunks[
                    -1
                ].choices[0].finish_reason

            return await asyncio.gather(*map(one, asks))

    together = asyncio.run(crowd())
    for ask, got in zip(asks, together):
        alone = http.post("/v1/chat/completions", json=ask).json()["choices"][0]
        assert got == (alone["message"]["content"], alone["finish_reason"])
    assert len({text for text, _ in together}) > 20


def load(url, n):
    """n requests by 8 clients, streamed and not, some hung up on."""

    def one(i):
        body = dict(messages=ASK["hello"], max_tokens=4, stream=i % 2 == 0, seed=i)
        with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=60) as answer:
            assert answer.status_code == 200
            if i % 5:
                answer.read()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(n)))


def test_requests_leave_nothing_behind(http):
    load(http.server.url, 40)
    settle(http)
    gc.collect()
    left = [o for o in gc.get_objects() if isinstance(o, Answers | Job | messages.Reader)]
    assert len(left) <= 3, left


@contextlib.contextmanager
def process(*args, **env):
    """`python -m lib.serve` on a free port, and the first line that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lib.serve", "--run", str(parrot.run()), "--port", "0", *args],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        process.first_line = process.stdout.readline()
        process.url = re.search(r"http://[\d.:]+", process.first_line)[0]
        yield process
    finally:
        process.kill()
        process.communicate()


def test_memory_stays_flat():
    """The short version of benchmarks/serve.py, in a process of its own."""
    with process() as server, httpx.Client(base_url=server.url) as client:
        # what is compiled in idle time takes memory too
        until(client, timeout=120, warming=0)
        sizes = []
        for n in (60, 60, 120):
            load(server.url, n)
            settle(client)
            sizes.append(_counter(client, "process_resident_memory_bytes") / 2**20)
        assert sizes[2] - sizes[1] < 8, f"MiB after each load: {sizes}"


def test_hanging_up_stops_the_writing(http, name):
    ask = dict(model=name, messages=ASK["Count to 120."], temperature=0, max_tokens=400)
    before = _counter(http, "rawchat_cancelled_answers_total")
    for stream in (True, False):
        settle(http)
        with slowly(http), socket.create_connection(("127.0.0.1", http.server.port)) as raw:
            body = json.dumps(ask | {"stream": stream, "n": 4}).encode()
            raw.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                % (len(body), body)
            )
            until(http, busy=4)
            raw.close()
            began = time.monotonic()
            settle(http)
            assert time.monotonic() - began < 3, "to the end it would have taken four times as long"
    assert _counter(http, "rawchat_cancelled_answers_total") == before + 8


def _counter(http, name) -> float:
    return float(re.search(rf"(?m)^{re.escape(name)} (\S+)$", http.get("/metrics").text)[1])


@pytest.fixture(scope="module")
def narrow():
    """A server of one slot and little patience."""
    with serving(
        slots=1, queue=2, seconds=3.0, body_seconds=1.0, body_kib=8, max_tokens=700
    ) as client:
        while client.server.app.state.worker.cold:  # compiling in idle time would take its patience
            time.sleep(0.05)
        yield client


def test_a_full_queue_is_429_and_late_ones_503(narrow):
    ask = dict(messages=ASK["Count to 120."], temperature=0, max_tokens=600)

    def late():
        return httpx.post(f"{narrow.server.url}/v1/chat/completions", json=ask, timeout=60)

    with concurrent.futures.ThreadPoolExecutor(3) as pool, slowly(narrow, 0.3):
        jobs = [pool.submit(late)]
        until(narrow, busy=1)
        jobs += [pool.submit(late), pool.submit(late)]
        until(narrow, waiting=2)
        refused = narrow.post("/v1/chat/completions", json=ask)
        assert (
            refused.status_code == 429
            and refused.headers["retry-after"]
            and refused.json()["error"]["code"] == "queue_full"
        )
        answers = [job.result() for job in jobs]
    choice = answers[0].json()["choices"][0]
    assert (choice["finish_reason"], choice["ended_by"]) == ("length", "time"), (
        "what was written in time is delivered"
    )
    assert choice["message"]["content"]
    assert {a.status_code for a in answers[1:]} <= {200, 503} and 503 in {
        a.status_code for a in answers[1:]
    }
    assert all(a.json()["error"]["code"] == "timeout" for a in answers if a.status_code == 503)
    assert narrow.post("/v1/completions", json={"prompt": ["a", "b", "c"]}).status_code == 400, (
        "more than could ever wait"
    )
    settle(narrow)


def test_large_and_slow_requests_are_refused(narrow):
    big = json.dumps({"messages": [{"role": "user", "content": "x" * 9000}]})
    # with a length, and in chunks of none
    for content in (big, iter([big[:5000].encode(), big[5000:].encode()])):
        answer = narrow.post(
            "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 413 and "8 KiB" in answer.json()["error"]["message"]
    with socket.create_connection(("127.0.0.1", narrow.server.port)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        raw.settimeout(20)
        assert b" 408 " in raw.recv(4096)


def test_a_failing_engine_is_an_error_for_all_and_ends_the_server(capsys):
    with serving() as client:
        worker = client.server.app.state.worker
        step = worker.engine.step

        def broken():
            if worker.busy:  # not while it warms up: the request would come too late
                raise RuntimeError("no more memory")
            return step()

        worker.engine.step = broken
        answer = client.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 500 and answer.json()["error"] == {
            "message": "the model failed; the server's log says how",
            "type": "server_error",
            "param": None,
            "code": "engine_failed",
        }
        client.server.thread.join(timeout=30)
        assert not client.server.thread.is_alive() and client.server.app.state.worker.failed
    assert "no more memory" in capsys.readouterr().err


def damaged():
    """The model after a training that diverged."""
    import jax

    return model()._replace(params=jax.tree.map(lambda leaf: leaf * float("nan"), model().params))


def test_a_model_that_computes_no_numbers_says_so():
    settings = serve.ServeSettings(run=str(parrot.run()), port=0)
    with pytest.raises(UserError, match="computes no numbers"):
        Server(damaged(), settings)


def test_an_engine_that_computes_no_numbers_any_more_says_so_to_all():
    engine = _engine(model(), serve.ServeSettings(slots=1), 768)
    news, failed = [], []
    thread = EngineThread(engine, 4, Counters(), lambda: failed.append(1))
    thread.cold = []
    engine.parts[0].params[0] = damaged().params
    job = Job([1, 2], Sampling(max_tokens=9), lambda *new: news.append(new), time.monotonic() + 60)
    thread.submit([job])
    with contextlib.redirect_stderr(io.StringIO()) as log:
        thread._run()
    [(tokens, error)] = news
    assert tokens == [] and error.status == 500 and failed == [1]
    assert "computes no numbers (NaN)" in error.body["error"]["message"]
    assert log.getvalue().startswith("Error: the model computes no numbers")
    assert log.getvalue().count("\n") == 1, "no traceback"
    with pytest.raises(api.ApiError, match="computes no numbers"):
        thread.submit([job])


def test_a_crowd_on_a_warm_server_waits_for_no_compiler(http, caplog):
    until(http, timeout=300, warming=0)
    texts = ["a", "word " * 9, "word " * 14, "word " * 25, "word " * 45, "word " * 90]
    asks = [dict(prompt=f"{i}{texts[i % 6]}", max_tokens=3, seed=i) for i in range(24)]
    asks += [dict(prompt="the same", max_tokens=3, n=4)] * 2
    with compiling() as compiled, concurrent.futures.ThreadPoolExecutor(12) as pool:
        post = lambda ask: httpx.post(f"{http.server.url}/v1/completions", json=ask, timeout=60)
        assert {answer.status_code for answer in pool.map(post, asks)} == {200}
    assert compiled == []


@contextlib.contextmanager
def compiling():
    """The programs that are compiled, or fetched from where compiled ones are kept, meanwhile."""
    import jax

    events, watching = [], True

    def note(event, seconds, **about):
        if watching and event == "/jax/core/compile/backend_compile_duration":
            events.append(about)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield events
    watching = False


def test_the_first_crowd_of_a_cold_server_is_begun_one_by_one():
    engine = _engine(model(), serve.ServeSettings(slots=4), 768)
    thread = EngineThread(engine, 8, Counters())
    assert {rows for rows, _ in thread.cold} >= {1, 2}, "several rows are warmed up too"
    added, add_many = [], engine.add_many
    engine.add_many = lambda p, s: (added.append(len(p)), add_many(p, s))[1]
    for cold, together in (([(2, 16)], [1, 1, 1, 1]), ([], [4])):
        thread.cold = cold
        ended = []
        thread.submit([greedy_job([1, i], ended) for i in range(4)])
        while len(ended) < 4:
            thread._turn()
        assert added == together and ended == ["length"] * 4
        added.clear()


def test_the_first_crowd_of_a_cold_server_waits_for_no_compiler():
    """What was compiled before anybody could ask serves prompts of every length."""
    engine = _engine(model(), serve.ServeSettings(slots=4), 768)
    thread = EngineThread(engine, 8, Counters())
    warm_up(engine)
    ended = []
    thread.submit([greedy_job([1] * n, ended) for n in (1, 2, 30, 90, 128, 300)])
    with compiling() as compiled:
        while len(ended) < 6:
            thread._turn()
    assert compiled == [] and len(thread.cold) > 10


def line_of(*deadlines):
    """A warm engine thread that is turned by hand, jobs that wait in it, and what each is told."""
    thread = EngineThread(_engine(model(), serve.ServeSettings(slots=1), 768), 4, Counters())
    thread.cold = []
    told = [[] for _ in deadlines]
    jobs = []
    for news, deadline in zip(told, deadlines):
        deliver = lambda tokens, reason, news=news: news.append(reason)
        jobs.append(Job([1], Sampling(1), deliver, time.monotonic() + deadline))
    thread.submit(jobs)
    return thread, jobs, told


def test_who_came_too_late_is_told_once_and_never_written():
    thread, _, [news] = line_of(-1)
    thread._turn()
    assert [error.status for error in news] == [503] and not thread.waiting and not thread.busy


def test_who_hangs_up_while_waiting_leaves_the_line_at_once():
    thread, jobs, [_, news] = line_of(60, 60)
    thread.cancel(jobs[1:])
    assert list(thread.waiting) == jobs[:1] and news == []


def test_who_waits_when_the_server_ends_is_told():
    thread, _, told = line_of(60, 60)
    thread.end()
    thread._run()
    assert [[error.status for error in news] for news in told] == [[503], [503]]


def greedy_job(prompt, ended) -> Job:
    """A job of two tokens that notes in `ended` why it ended."""
    note = lambda tokens, reason: ended.extend([reason] if reason else [])
    return Job(prompt, Sampling(max_tokens=2, temperature=0), note, time.monotonic() + 60)


# ---- who may ask


def test_only_loopback_without_a_token():
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        with pytest.raises(UserError, match="--token"):
            serve.ServeSettings(host=host).check_token()
        serve.ServeSettings(host=host, token="x").check_token()
        serve.ServeSettings(host=host, insecure=True).check_token()
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        serve.ServeSettings(host=host).check_token()


def test_a_token_is_asked_for():
    with serving(token="s3cret", host="0.0.0.0") as client:
        base = f"http://127.0.0.1:{client.server.port}"
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "s3cret"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": "Bearer s3cret2"},
        ):
            for path in ("/v1/models", "/metrics", "/v1/chat/completions", "/nowhere"):
                answer = httpx.get(base + path, headers=headers)
                assert (
                    answer.status_code == 401
                    and answer.json()["error"]["code"] == "invalid_api_key"
                    and answer.headers["www-authenticate"]
                )
        assert httpx.get(base + "/").status_code == httpx.get(base + "/health").status_code == 200
        assert (
            httpx.get(base + "/metrics", headers={"Authorization": "Bearer s3cret"}).status_code
            == 200
        )
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=base + "/v1", api_key="wrong").models.list()
        assert openai.OpenAI(base_url=base + "/v1", api_key="s3cret").models.list().data


def test_tokens_that_a_browser_cannot_send_are_refused():
    for token in ("zwei Worte", "schlüssel", "a\nb"):
        with pytest.raises(UserError, match="printable ASCII"):
            serve.ServeSettings(token=token)


def test_names_given_for_an_open_server_are_the_only_ones():
    with serving(token="t", host="0.0.0.0", hosts=("Chat.test",), int8=True, speculate=2) as client:
        url = f"http://127.0.0.1:{client.server.port}/health"
        for host, status in (("chat.test", 200), ("localhost", 200), ("evil.test", 403)):
            assert httpx.get(url, headers={"Host": host}).status_code == status
        ask = dict(messages=ASK["hello"], temperature=0)
        url, headers = (
            url.replace("health", "v1/chat/completions"),
            {"Host": "chat.test", "Authorization": "Bearer t"},
        )
        answer = httpx.post(url, json=ask, headers=headers, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == parrot.CHATS["hello"], (
            "with int8 weights and speculation as well"
        )
        assert client.server.app.state.worker.engine.drafted


def test_a_bug_of_ours_is_counted_as_500():
    async def app(scope, receive, send):
        raise RuntimeError("a bug")

    metrics = Counters()
    asgi = guarded(app, serve.ServeSettings(), None, metrics, {"/"})
    with pytest.raises(RuntimeError):
        asyncio.run(asgi({"type": "http", "path": "/", "headers": []}, None, None))
    assert 'rawchat_requests_total{path="/",status="500"} 1' in metrics.text({})


def test_other_pages_and_other_names_are_kept_out(http):
    port = http.server.port
    for host in (
        "evil.test",
        f"evil.test:{port}",
        "127.0.0.1.evil.test",
        "localhost@evil.test",
        "evil-localhost",
        "[",
        "",
    ):
        assert http.get("/v1/models", headers={"Host": host}).status_code == 403, host
    for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST"):
        assert http.get("/v1/models", headers={"Host": host}).status_code == 200, host
    for origin, status in (
        ("https://evil.test", 403),
        ("null", 403),
        (f"http://localhost:{port + 1}", 403),
        (http.server.url, 200),
    ):
        assert http.get("/v1/models", headers={"Origin": origin}).status_code == status, origin
    # what a form on a foreign page could send
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert (
            http.post(
                "/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": kind}
            ).status_code
            == 415
        )


def test_pages_elsewhere_are_let_in_by_name():
    """CORS: what a browser asks before it lets a page's script read answers."""
    friend, stranger = "https://chat.example.org", "https://evil.test"
    asking = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    with serving(origins=(friend,), token="t") as client:
        path = "/v1/chat/completions"
        # a browser sends no token with this question
        answer = client.options(path, headers={"Origin": friend, **asking})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == friend
        assert "authorization" in answer.headers["access-control-allow-headers"].lower()
        answer = client.options(path, headers={"Origin": stranger, **asking})
        assert "access-control-allow-origin" not in answer.headers

        ask = dict(messages=ASK["hello"], max_tokens=3)
        token = {"Authorization": "Bearer t"}
        for stream in (False, True):
            headers = {"Origin": friend, **token}
            answer = client.post(path, json=ask | {"stream": stream}, headers=headers)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == friend
        # an error can be read too, and neither the name nor the token is asked for any less
        for headers, status in (
            ({"Origin": friend}, 401),
            ({"Origin": stranger, **token}, 403),
            ({"Origin": friend, "Host": "evil.test", **token}, 403),
        ):
            assert client.post(path, json=ask, headers=headers).status_code == status
    with serving(origins=("*",)) as client:
        answer = client.get("/v1/models", headers={"Origin": stranger})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "*"


def test_no_page_elsewhere_is_let_in_by_default(http):
    answer = http.options("/v1/models", headers={"Access-Control-Request-Method": "GET"})
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in http.get("/v1/models").headers


def test_an_origin_is_written_as_browsers_do():
    for origin in ("chat.example.org", "https://a.test/", "https://a.test/path", ""):
        with pytest.raises(UserError, match="is no origin"):
            serve.ServeSettings(origins=(origin,))


def test_the_page_may_run_its_own_code_only(http):
    answer = http.get("/")
    policy = answer.headers["content-security-policy"]
    assert (
        "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
    )
    assert answer.headers["x-content-type-options"] == "nosniff" and "http://" not in re.sub(
        r"http://www\.w3\.org\S*", "", answer.text
    )
    assert "innerHTML" not in answer.text and "style=" not in answer.text


# ---- requests that make no sense


SEEDS = [  # valid requests that the mutations start from
    (
        "/v1/chat/completions",
        dict(
            messages=[{"role": "system", "content": "s"}, *parrot.messages(SUM), *ASK["hello"]],
            max_tokens=2,
            temperature=0.5,
            stop=["a"],
            logprobs=True,
            top_logprobs=2,
            n=1,
            stream=False,
            seed=3,
            truncation="auto",
        ),
    ),
    (
        "/v1/completions",
        dict(
            prompt=["a", "b"],
            max_tokens=2,
            temperature=0.5,
            top_p=0.9,
            echo=False,
            logprobs=1,
            stop="x",
            n=1,
        ),
    ),
]
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**63,
    -(2**70),
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    0.5,
    "",
    "a",
    "\ud800",
    "\x00",
    "é" * 50,
    [],
    [[]],
    [None],
    [0],
    [-1],
    [10**9],
    ["a", 1],
    {},
    {"a": {}},
    {"role": "user"},
    [{"role": "user", "content": None}],
    [[[[[[1]]]]]],
    "x" * 5000,
]


def mutated(random, value, depth=0):
    """`value` with something strange somewhere in it."""
    if depth and (random.random() < 0.35 or not isinstance(value, dict | list) or not value):
        return random.choice(ODD)
    if isinstance(value, dict):
        key = random.choice(list(value))
        choice = random.random()
        if choice < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if choice < 0.3:
            return value | {
                random.choice(
                    [
                        "stream",
                        "tools",
                        "n",
                        "best_of",
                        "suffix",
                        "user",
                        "nonsense",
                        "\ud800",
                        "max_tokens",
                        "stream_options",
                    ]
                ): random.choice(ODD)
            }
        return value | {key: mutated(random, value[key], depth + 1)}
    i = random.randrange(len(value))
    return [*value[:i], mutated(random, value[i], depth + 1), *value[i + 1 :]]


def test_mutated_requests_are_answered_or_refused_and_never_break_the_server(http, capfd, caplog):
    random_ = random.Random(0)
    statuses = []
    for i in range(400):
        path, body = random_.choice(SEEDS)
        for _ in range(random_.randint(1, 3)):
            body = mutated(random_, body) if isinstance(body, dict | list) and body else body
        data = json.dumps(body).encode()
        if i % 7 == 0:  # not even JSON
            at = random_.randrange(len(data))
            data = (
                data[:at]
                + random_.choice([b"", b"\xff", b"{", b"]", b"\x00", b"[" * 5000])
                + data[at + random_.randint(0, 9) :]
            )
        answer = http.post(path, content=data, headers={"Content-Type": "application/json"})
        statuses.append(answer.status_code)
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, (
            answer.status_code,
            path,
            data[:300],
            answer.text,
        )
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert (
                set(error) == {"message", "type", "param", "code"}
                and error["message"]
                and "Traceback" not in answer.text
            )
    assert statuses.count(400) > 120 and statuses.count(200) > 15
    settle(http)
    out = capfd.readouterr()
    assert "Traceback" not in out.err + out.out + caplog.text
    assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"GET / HTTP/x.y\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json\r\n\r\nzz\r\n",
    ],
)
def test_what_is_not_http_is_refused(http, raw, capfd, caplog):
    with socket.create_connection(("127.0.0.1", http.server.port)) as connection:
        connection.settimeout(20)
        connection.sendall(raw)
        with contextlib.suppress(ConnectionResetError):
            answer = connection.recv(4096)
            assert answer == b"" or re.match(rb"HTTP/1.1 4\d\d ", answer)
    assert http.get("/health").status_code == 200
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_wrong_paths_and_methods(http):
    for method, path, status in [
        ("GET", "/nowhere", 404),
        ("GET", "/../etc/passwd", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/v1/models/%00%ff", 404),
    ]:
        answer = http.request(method, path)
        assert (
            answer.status_code == status
            and answer.json()["error"]["type"] == "invalid_request_error"
        ), (
            method,
            path,
            answer.status_code,
        )


# ---- health, figures, and the command


def test_metrics_add_up(http, name):
    before, made = _counter(http, "rawchat_completion_tokens_total"), 0
    for i in range(3):
        made += http.post(
            "/v1/completions", json={"prompt": "a", "max_tokens": 5, "temperature": 2, "seed": i}
        ).json()["usage"]["completion_tokens"]
    text = http.get("/metrics").text
    assert _counter(http, "rawchat_completion_tokens_total") == before + made
    for line in text.splitlines():
        assert re.fullmatch(
            r'# TYPE \w+ (counter|gauge|histogram)|\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [-+.\de]+',
            line,
        ), line
    for name in ("rawchat_time_to_first_token_seconds", "rawchat_request_seconds"):
        counts = [float(c) for c in re.findall(rf'{name}_bucket{{le="[^"]*"}} (\d+)', text)]
        assert counts == sorted(counts) and counts[-1] == _counter(http, f"{name}_count") > 0
    names = re.findall(r"# TYPE (\w+)", text)
    assert len(names) == len(set(names)) and {
        "rawchat_queue_depth",
        "rawchat_busy_slots",
        "process_resident_memory_bytes",
    } <= set(names)


def test_the_dashboard_asks_for_metrics_that_are_there(http):
    """docs/observability: every name in its queries, but what Prometheus makes of a histogram."""
    http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
    stream = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "stream": True}
    http.post("/v1/chat/completions", json=stream)
    names = set(re.findall(r"# TYPE (\w+)", http.get("/metrics").text))
    board = json.loads((ROOT / "docs/observability/dashboards/server.json").read_text())
    asked = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            asked |= set(re.findall(r"(?:rawchat|process)_\w+", target["expr"]))
    assert asked
    assert {re.sub("_bucket$", "", name) for name in asked} <= names
    # and shows all that the server counts
    assert {name for name in names if name.startswith("rawchat_")} <= {
        re.sub("_bucket$", "", name) for name in asked
    }


def test_settings_out_of_bounds_are_told():
    for change in (
        dict(port=70000),
        dict(slots=0),
        dict(queue=0),
        dict(seconds=0),
        dict(max_tokens=0),
    ):
        with pytest.raises(UserError, match=next(iter(change))):
            serve.ServeSettings(**change)


def test_a_taken_port_is_told(http):
    with pytest.raises(UserError, match="choose another --port"):
        Server(model(), serve.ServeSettings(port=http.server.port))


def test_a_taken_port_is_told_before_the_model_is_loaded(http, monkeypatch):
    loaded = []
    monkeypatch.setattr(serve.ServeSettings, "load", lambda self: loaded.append(self))
    settings = serve.ServeSettings(run=str(parrot.run()), port=http.server.port)
    for begin in (serve.start, lambda settings: main(settings, in_colab=False)):
        with pytest.raises(UserError, match="choose another --port"):
            begin(settings)
    assert loaded == []


def test_the_example_of_the_papers_works(monkeypatch, tmp_path, capsys):
    """docs/chat.md's lines for a notebook, where the newest run is the one that is served."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "chat.md").read_text(), re.S)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(parrot.run())
    monkeypatch.chdir(tmp_path)
    # somebody may have the usual port
    free = lambda settings: listen(dataclasses.replace(settings, port=0))
    monkeypatch.setattr("lib.serve.server.listen", free)
    names = {}
    exec(code.partition("server.close()")[0], names)
    try:
        url = re.search(r"chat page: (\S+)", capsys.readouterr().out)[1]
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "mine-sft"
    finally:
        exec("server.close()", names)
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_options_are_grouped_and_name_the_command(capsys):
    for kind, name, options in (
        (serve.ServeSettings, "serve", ("which", "doors", "crowd", "patience")),
        (ChatSettings, "chat", ("which", "choosing", "saying")),
    ):
        with pytest.raises(SystemExit):
            notebook.options(kind, f"python -m lib.{name}", ["--help"])
        shown = capsys.readouterr().out
        assert f"usage: python -m lib.{name} " in shown
        assert all(f"{group} options" in shown for group in options)
    settings = notebook.options(
        serve.ServeSettings, "", ["--run", "a", "--hosts", "b", "c", "--int8"]
    )
    assert settings == serve.ServeSettings(run="a", hosts=("b", "c"), int8=True)
    with pytest.raises(UserError, match="slots must be"):
        notebook.options(serve.ServeSettings, "", ["--slots", "0"])


def test_colabs_address_is_printed(monkeypatch, capsys):
    import types

    import lib.notebook

    output = types.SimpleNamespace(
        eval_js=lambda code: (
            "https://proxy.test/"
            + re.fullmatch(r"google\.colab\.kernel\.proxyPort\((\d+)\)", code)[1]
        )
    )
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(output=output))
    monkeypatch.setattr(lib.notebook, "in_colab", lambda: True)
    server = serve.start(serve.ServeSettings(run=str(parrot.run()), port=0))
    try:
        assert f"https://proxy.test/{server.port}" in capsys.readouterr().out
        proxied = {"Host": "abc-8000.colab.dev", "Origin": "https://abc-8000.colab.dev"}
        assert httpx.get(server.url + "/v1/models", headers=proxied).status_code == 200
        assert (
            "frame-ancestors" not in httpx.get(server.url + "/").headers["content-security-policy"]
        )
    finally:
        server.close()


def test_a_notebooks_server_makes_up_its_token_too(capsys):
    server = serve.start(serve.ServeSettings(run=str(parrot.run()), port=0, token="auto"))
    try:
        token = re.search(r"token: (\S{20,})", shown := capsys.readouterr().out)[1]
        assert f"{server.url}/#token={token}\n" in shown
        assert (
            httpx.get(
                server.url + "/v1/models", headers={"Authorization": "Bearer auto"}
            ).status_code
            == 401
        )
        assert (
            httpx.get(
                server.url + "/v1/models", headers={"Authorization": f"Bearer {token}"}
            ).status_code
            == 200
        )
    finally:
        server.close()


def test_the_command_serves_finishes_what_it_began_and_leaves():
    with process(RAWCHAT_TOKEN="t0ken") as server:
        headers, text = {"Authorization": "Bearer t0ken"}, ""
        assert (
            "#token=t0ken" in server.first_line
            and httpx.get(server.url + "/v1/models").status_code == 401
        )
        ask = dict(messages=ASK["Count to 120."], temperature=0, stream=True)
        with httpx.stream(
            "POST", server.url + "/v1/chat/completions", json=ask, headers=headers, timeout=60
        ) as answer:
            for i, line in enumerate(answer.iter_lines()):
                if i == 4:
                    server.send_signal(signal.SIGINT)
                text += line
        assert "[DONE]" in text, "the running answer was finished"
        assert server.wait(timeout=60) == 0 and server.stderr.read() == ""
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url)


# flags, and what the sentence says
REFUSED = [
    (["--host", "0.0.0.0"], "--token"),
    (["--run", "no/such"], "no tokenizer|no checkpoint"),
    (["--slots", "0"], "slots must be"),
]


def test_the_commands_errors_are_one_sentence():
    runs = [("lib.serve", *flags) for flags, _ in REFUSED]
    for done, (_, said) in zip(programs.run_scripts(*runs, cwd=ROOT, timeout=120), REFUSED):
        assert done.returncode == 2 and re.search(said, done.stderr), done.stderr
        assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1


def test_answers_that_outlast_the_grace_period_end_with_an_error_and_no_traceback(capfd, caplog):
    ask = dict(messages=ASK["Count to 120."], temperature=0, stream=True, max_tokens=400)
    with serving(grace=0.5) as client, slowly(client, 0.3):
        text = ""
        with client.stream("POST", "/v1/chat/completions", json=ask) as answer:
            for line in answer.iter_lines():
                client.server.stop()
                text += line
        assert '"code": "unavailable"' in text and "[DONE]" not in text
    shown = capfd.readouterr()
    assert "Traceback" not in shown.out + shown.err + caplog.text


def test_threads_end_with_their_server():
    before = set(threading.enumerate())
    with serving():
        assert {"engine", "server"} <= {t.name for t in set(threading.enumerate()) - before}
    assert not [t for t in set(threading.enumerate()) - before if t.name in ("engine", "server")]


def test_small_answers_do_not_wait_for_the_network(http):
    seconds = []
    for _ in range(15):
        began = time.perf_counter()
        http.get("/health")
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.02, (
        "an answer in two packets waits 40 ms for an acknowledgement unless TCP_NODELAY is set"
    )
