"""How the server is put together, begun and ended, by hand: nothing listens, nothing is loaded."""

import logging
import sys
import types

import pytest

from lib.files import UserError
from lib.serve import answers, connections, counters, server
from lib.serve.connections import AT_ONCE, Once
from lib.serve.server import Server
from lib.serve.settings import ServeSettings

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def test_what_must_be_installed(monkeypatch):
    there = {"fastapi", "uvicorn"}
    util = types.SimpleNamespace(find_spec=lambda name: name if name in there else None)
    monkeypatch.setattr(server, "importlib", types.SimpleNamespace(util=util))
    server.check_installed()
    there.remove("fastapi")
    with pytest.raises(UserError, match="the server needs fastapi: pip install"):
        server.check_installed()
    there.clear()
    with pytest.raises(UserError, match="needs fastapi and uvicorn"):
        server.check_installed()


def test_names_under_which_a_server_answers(monkeypatch):
    given = []
    monkeypatch.setattr(server, "check_installed", lambda: None)
    monkeypatch.setattr(server, "make_app", lambda *what: given.append(what))
    monkeypatch.setattr(Server, "_uvicorn", lambda self: "uvicorn")
    listener = types.SimpleNamespace(getsockname=lambda: ("127.0.0.1", 81))

    def hosts_of(named=None, **settings):
        one = Server("model", ServeSettings(**settings), named, listener)
        model, _, hosts, stop = given.pop()
        assert (model, stop, one.port) == ("model", one.stop, 81) and one.socket is listener
        assert one.thread.daemon and one.uvicorn == "uvicorn"
        assert one.url == f"http://{server._name(one.settings.host)}:81"
        return hosts

    assert hosts_of() == (*LOOPBACK, "127.0.0.1")
    assert hosts_of(host="localhost", hosts=("A.test",)) == (*LOOPBACK, "localhost", "a.test")
    # where everybody may come any name will do, unless some are given
    assert hosts_of(host="0.0.0.0", token="x") is None
    names = hosts_of(host="0.0.0.0", token="x", hosts=("A.test",))
    assert names == (*LOOPBACK, "0.0.0.0", "a.test")
    assert hosts_of(()) is None and hosts_of(("b.test",)) == ("b.test",)
    with pytest.raises(UserError, match="lets everybody who reaches this machine use it"):
        hosts_of(host="0.0.0.0")


def test_what_the_web_server_is_told(monkeypatch):
    uvicorn = types.SimpleNamespace(Config=lambda app, **more: (app, more), Server="base")
    monkeypatch.setitem(sys.modules, "uvicorn", uvicorn)
    monkeypatch.setattr(server, "bounded", lambda settings, metrics: ("bounded", metrics))
    monkeypatch.setattr(server, "graceful", lambda *given: lambda config: (*given, config))
    state = types.SimpleNamespace(worker="worker", metrics="metrics")
    app = types.SimpleNamespace(state=state)
    settings = ServeSettings(idle_seconds=7.4, grace=2.6)
    grace, worker, base, (served, options) = Server._uvicorn(
        types.SimpleNamespace(app=app, settings=settings)
    )
    assert (grace, worker, base) == (2.6, "worker", "base") and served is app
    assert options == dict(
        http=("bounded", "metrics"),
        ws="none",
        backlog=AT_ONCE,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=8,
        timeout_graceful_shutdown=8,
    )


def test_how_serving_ends_and_what_is_logged_meanwhile():
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")]
    before = [list(logger.filters) for logger in loggers]
    seen = []

    def run(sockets):
        seen.append(sockets)
        [one, other] = [logger.filters[-1] for logger in loggers]
        assert isinstance(one, Once) and one is other and one.seconds == 60.0
        if len(seen) == 3:
            raise KeyboardInterrupt

    worker = types.SimpleNamespace(failed=None)
    one = types.SimpleNamespace(socket="socket", uvicorn=types.SimpleNamespace(run=run))
    one.app = types.SimpleNamespace(state=types.SimpleNamespace(worker=worker))
    assert Server.run(one) == 0 and seen == [["socket"]]
    worker.failed = ValueError()
    # a failed engine, and Ctrl-C that uvicorn has obeyed
    assert Server.run(one) == Server.run(one) == 1 and len(seen) == 3
    assert [logger.filters for logger in loggers] == before


def test_a_thread_serves_once_it_says_so(monkeypatch):
    begun = []
    one = types.SimpleNamespace(uvicorn=types.SimpleNamespace(started=False, should_exit=False))
    alive = types.SimpleNamespace(start=lambda: begun.append("start"), is_alive=lambda: True)
    alive.join = lambda: begun.append("join")
    one.thread = alive

    def sleep(seconds):
        begun.append(seconds)
        one.uvicorn.started = len(begun) == 3

    monkeypatch.setattr(server, "time", types.SimpleNamespace(sleep=sleep))
    assert Server.start(one) is one and begun == ["start", 0.01, 0.01]
    Server.stop(one)
    assert one.uvicorn.should_exit is True
    one.stop = lambda: begun.append("stop")
    Server.close(one)
    assert begun[3:] == ["stop", "join"]
    one.uvicorn.started, alive.is_alive = False, lambda: False
    with pytest.raises(RuntimeError, match="ended before it began to serve"):
        Server.start(one)


def test_the_port_is_taken_before_the_model_is_loaded_and_given_back(monkeypatch):
    done = []
    listener = types.SimpleNamespace(close=lambda: done.append("closed"))
    monkeypatch.setattr(server, "check_installed", lambda: done.append("checked"))
    monkeypatch.setattr(server, "listen", lambda settings: done.append("listens") or listener)
    monkeypatch.setattr(server, "Server", lambda *given: given)
    monkeypatch.setattr(ServeSettings, "load", lambda self: done.append("loaded") or "model")
    settings = ServeSettings()
    assert server.prepare(settings, ()) == ("model", settings, (), listener)
    assert done == ["checked", "listens", "loaded"]
    done.clear()
    for error in (KeyboardInterrupt, UserError):
        monkeypatch.setattr(
            ServeSettings, "load", lambda self, error=error: (_ for _ in ()).throw(error)
        )
        with pytest.raises(error):
            server.prepare(settings, ())
        assert done.pop() == "closed"
    done.clear()
    with pytest.raises(UserError, match="lets everybody"):
        server.prepare(ServeSettings(host="0.0.0.0"), ())
    assert done == []


@pytest.fixture
def prepared(monkeypatch):
    """A server that is no server; `hosts` are the names that each was prepared with."""
    api = types.SimpleNamespace(id="nest-sft", model=types.SimpleNamespace(meta={"step": 7}))
    one = types.SimpleNamespace(url="http://u", port=81, hosts=[], run=lambda: 3)
    one.app = types.SimpleNamespace(state=types.SimpleNamespace(api=api))
    one.start = lambda: one
    monkeypatch.setattr(server, "prepare", lambda settings, hosts: one.hosts.append(hosts) or one)
    monkeypatch.setattr(server, "colab_url", lambda port: f"https://colab/{port}")
    return one


@pytest.mark.parametrize("in_colab", [False, True])
def test_where_a_notebooks_page_is(prepared, monkeypatch, capsys, in_colab):
    monkeypatch.setattr("lib.notebook.in_colab", lambda: in_colab)
    assert server.start(ServeSettings(token="t")) is prepared
    assert prepared.hosts == [() if in_colab else None]
    url = "https://colab/81" if in_colab else "http://u"
    assert capsys.readouterr().out == f"chat page: {url}/#token=t\n"


@pytest.mark.parametrize("in_colab", [False, True])
def test_what_the_command_says_and_how_it_ends(prepared, monkeypatch, capsys, in_colab):
    with pytest.raises(SystemExit) as end:
        server.main(ServeSettings(), in_colab)
    assert end.value.code == 3 and prepared.hosts == [() if in_colab else None]
    first, second, *more = capsys.readouterr().out.splitlines()
    assert first == "nest-sft (step 7) at http://u"
    assert second == "OpenAI-compatible API at http://u/v1   Ctrl-C stops"
    assert len(more) == in_colab and all("port_as_window(81)" in line for line in more)

    def interrupted(settings, hosts):
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "prepare", interrupted)
    with pytest.raises(SystemExit) as end:
        server.main(ServeSettings(), in_colab)
    assert end.value.code == 130 and capsys.readouterr().out == "Interrupted while loading\n"


def test_connections_are_watched_from_the_first_to_the_last(monkeypatch):
    log = []

    class Protocol:
        def connection_made(self, transport):
            log.append("made")

        def connection_lost(self, exc):
            log.append("lost")

        def data_received(self, data):
            log.append(data)

        def on_response_complete(self):
            log.append("complete")

    class Watch:
        def __init__(self, *given):
            log.append(given)

        def __getattr__(self, name):
            return lambda connection: log.append((name, connection is one))

    http = types.SimpleNamespace(H11Protocol=Protocol)
    monkeypatch.setitem(sys.modules, "uvicorn.protocols.http.h11_impl", http)
    monkeypatch.setattr(connections, "ConnectionWatch", Watch)
    one = connections.bounded("settings", "metrics")()
    one.connection_made(None)
    one.data_received("data")
    one.on_response_complete()
    one.connection_lost(None)
    look = ("look", True)
    began = [("settings", "metrics"), "made", ("admit", True), "data", look, "complete", look]
    assert log == [*began, ("forget", True), "lost"]


def test_bounds_and_times_that_people_rely_on():
    bounds = [line.split('"')[1] for line in counters.Histogram().lines("x") if "le=" in line]
    small = ["0.01", "0.025", "0.05", "0.1", "0.25", "0.5"]
    assert bounds == [*small, "1", "2.5", "5", "10", "25", "50", "100", "+Inf"]
    assert answers.QUIET == 15.0 and connections.TO_SEND == 60.0 and AT_ONCE == 8
