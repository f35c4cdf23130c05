"""People who connect and ask for nothing, or not to the end; and a log that says a thing once."""

import contextlib
import io
import json
import logging
import re
import socket
import subprocess
import sys
import time
from functools import cache
from unittest.mock import MagicMock

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from lib import serve
from lib.runs import load_model
from lib.serve.connections import Once, bounded, room_for
from lib.serve.counters import Counters
from lib.serve.server import Server
from lib.serve.settings import ServeSettings
from tests.helpers import ROOT, parrot, programs

# a server and its clients
pytestmark = pytest.mark.slow

# requests that are never whole
UNFINISHED = {
    "nothing": b"",
    "half a head": b"GET /health HTTP/1.1\r\nHost: local",
    "half a body": b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    "half a head after an answer": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he",
    "half a body of a question": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
}


@cache
def model():
    return load_model(parrot.run())


@contextlib.contextmanager
def serving(**settings):
    server = Server(model(), serve.ServeSettings(run=str(parrot.run()), port=0, **settings)).start()
    try:
        yield server
    finally:
        server.close()


def connect(server) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.settimeout(20)
    return connection


def read_to_the_end(connection) -> bytes:
    """All that comes until the server hangs up; TimeoutError if it does not."""
    text = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            text += data
    return text


def counter(server, name) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return float(re.search(rf"(?m)^{name} (\S+)$", text)[1])


@pytest.fixture(scope="module")
def impatient():
    with serving(idle_seconds=1.0, body_seconds=1.0) as server:
        yield server


@pytest.mark.parametrize("kind", UNFINISHED)
def test_what_is_never_finished_is_ended(impatient, kind):
    with connect(impatient) as connection:
        connection.sendall(UNFINISHED[kind])
        began = time.monotonic()
        answer = read_to_the_end(connection)
        assert time.monotonic() - began < 10
    assert (b" 408 " in answer) == (kind == "half a body of a question")
    assert (b'"ok"' in answer) == ("GET" in str(UNFINISHED[kind]) and kind != "half a head")


def test_a_head_that_drips_is_ended_all_the_same(impatient):
    with connect(impatient) as connection:
        began = time.monotonic()
        with pytest.raises(OSError):
            for byte in b"GET /health HTTP/1.1\r\nX: " + b"a" * 1000:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - began < 10


def test_an_answer_may_take_longer_than_a_connection_may_idle(impatient):
    engine = impatient.app.state.worker.engine
    engine.step = lambda: (time.sleep(0.5), type(engine).step(engine))[1]
    try:
        ask = dict(messages=parrot.messages("hello")[:1], temperature=0)
        url = f"{impatient.url}/v1/chat/completions"
        began = time.monotonic()
        answer = httpx.post(url, json=ask, timeout=60).json()
        assert time.monotonic() - began > 1.5
        assert answer["choices"][0]["message"]["content"] == parrot.CHATS["hello"]
    finally:
        del engine.step


def test_whoever_has_idled_longest_makes_room():
    with serving(connections=4) as server:
        idle = [connect(server) for _ in range(4)]
        # a new one is served, and only the oldest is gone
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert read_to_the_end(idle[0]) == b""
        assert counter(server, "rawchat_refused_connections_total") == 1
        idle[1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in idle[1].recv(1000)
        for connection in idle:
            connection.close()


def test_where_all_wait_for_an_answer_a_newcomer_is_told_so():
    with serving(connections=2) as server:
        engine = server.app.state.worker.engine
        engine.step = lambda: (time.sleep(0.3), type(engine).step(engine))[1]
        ask = json.dumps(dict(prompt="a", max_tokens=60, temperature=0, stream=True)).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            b"\r\nContent-Length: %d\r\n\r\n%b" % (len(ask), ask)
        )
        busy = [connect(server) for _ in range(2)]
        for connection in busy:
            connection.sendall(head)
            assert b"200 OK" in connection.recv(100)
        with connect(server) as newcomer:
            assert read_to_the_end(newcomer).startswith(b"HTTP/1.1 503 ")
        for connection in busy:
            connection.close()


def test_whoever_hangs_up_is_looked_after_no_longer():
    config = uvicorn.Config(lambda: None, log_config=None)
    loop, transport = MagicMock(), MagicMock()
    transport.get_extra_info.return_value = None
    transport.is_closing.return_value = False
    protocol = bounded(ServeSettings(), Counters())
    connection = protocol(config, ServerState(), {}, _loop=loop)
    connection.connection_made(transport)
    timer = loop.call_later.return_value
    assert loop.call_later.called and not timer.cancel.called
    connection.connection_lost(None)
    assert timer.cancel.called


def test_more_connections_than_files_keep_nobody_out():
    """300 connections that ask for nothing, for a process that may open 256 files."""
    arguments = [sys.executable, "-m", "lib.serve", "--run", str(parrot.run()), "--port", "0"]
    process = subprocess.Popen(
        ["bash", "-c", 'ulimit -n 256; exec "$@"', "bash", *arguments],
        cwd=ROOT,
        env=programs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    idle = []
    try:
        url = re.search(r"http://[\d.]+:(\d+)", process.stdout.readline())
        for _ in range(300):
            idle.append(socket.create_connection(("127.0.0.1", int(url[1])), timeout=20))
        for _ in range(5):
            assert httpx.get(f"{url[0]}/health", timeout=20).status_code == 200
    finally:
        for connection in idle:
            connection.close()
        process.terminate()
        out, err = process.communicate(timeout=60)
        process.kill()
        # where the server is gone by itself, what it said last, and how it ended
        print(process.returncode, err[:5000])
    # asyncio says so of a server that runs out of files, however briefly
    assert "out of system resource" not in err
    assert len(err) < 5000, f"{len(err)} characters of log"


def test_the_system_says_how_many_connections_there_can_be(monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1000, 4000))
    assert room_for(20) == 20 and 500 < room_for(5000) < 940
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))
    assert room_for(20) == 1


def test_a_log_says_a_thing_once_a_minute_and_then_how_often():
    shown = []
    now = 0.0
    once = Once(clock=lambda: now)
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.addFilter(once)
    for number in range(100):
        logger.warning("no more files\nfor socket %d", number)
        logger.warning("another %s", "thing")
    assert shown == ["no more files\nfor socket 0", "another thing"]
    # what is said again within the minute does not put it off
    now = 59.0
    logger.warning("another thing")
    now = 61.0
    logger.warning("another thing")
    # counted since then, not since ever
    now = 122.0
    logger.warning("another thing")
    assert shown[2:] == ["another thing (and 100 times since it was said last)", "another thing"]
    for number in range(3000):
        logger.warning("thing %d", number)
    assert len(shown) == 3004 and len(once.said) <= 1001


def test_a_broken_request_is_logged_once(caplog):
    logger = logging.getLogger("uvicorn.error")
    filters = list(logger.filters)
    with serving() as server:
        for _ in range(50):
            with connect(server) as connection:
                connection.sendall(b"\x00\x01\r\n\r\n")
                assert b" 400 " in read_to_the_end(connection)
    assert caplog.text.count("Invalid HTTP request") == 1
    assert logger.filters == filters


def test_a_server_leaves_the_logs_of_others_alone():
    """absl, which optax brings, closes with its handler the sys.stderr of the time it was made."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.close = stream.close
    Server(model(), serve.ServeSettings(run=str(parrot.run()), port=0)).socket.close()
    assert not stream.closed and not logging.getLogger("uvicorn").handlers
