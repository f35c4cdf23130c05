"""Who is let in, how requests are read, how long connections are kept, and what is counted: by
hand, without a server.
"""

import asyncio
import json
import re
import types

import pytest
import yaml

from lib.files import UserError
from lib.serve import connections, counters, guard, server
from lib.serve.api import ApiError
from lib.serve.connections import ConnectionWatch, room_for
from lib.serve.counters import Counters
from lib.serve.guard import guarded, read_json
from lib.serve.settings import ServeSettings
from tests.helpers import ROOT

HOSTS = ("localhost", "chat.test", "::1")
CHATS = "/v1/chat/completions"


def answered(path="/v1/models", hosts=HOSTS, settings=None, app=None, **headers):
    """(status, headers, body, counters) of a request that meets the checks, 200 from the app."""
    metrics, sent = Counters(), []

    async def ok(scope, receive, send):
        start = {"type": "http.response.start", "status": 200, "headers": [(b"own", b"x")]}
        await send(start)
        await send({"type": "http.response.body", "body": b"fine"})

    async def send(message):
        sent.append(message)

    headers = {"host": "localhost:80"} | headers
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "headers": pairs, "method": "GET"}
    paths = {"/", "/health", "/v1/models", "/v1/completions", CHATS}
    asgi = guarded(app or ok, settings or ServeSettings(), hosts, metrics, paths)
    asyncio.run(asgi(scope, None, send))
    start, body = sent
    return start["status"], dict(start["headers"]), body["body"], metrics


# ---- who may ask ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers, code",
    [
        ({}, None),
        ({"host": "CHAT.test:8000"}, None),
        ({"host": "[::1]:8000"}, None),
        ({"host": "other.test"}, "wrong_host"),
        ({"host": "["}, "wrong_host"),
        ({"host": ""}, "wrong_host"),
        ({"origin": "http://localhost:80"}, None),
        ({"origin": "https://localhost:80"}, None),
        ({"origin": "https://friend.test"}, None),
        ({"origin": "http://localhost:81"}, "wrong_origin"),
        ({"origin": ""}, "wrong_origin"),
        ({"origin": "null"}, "wrong_origin"),
    ],
    ids=str,
)
def test_names_and_pages(headers, code):
    settings = ServeSettings(origins=("https://friend.test",))
    status, _, body, metrics = answered(settings=settings, **headers)
    assert status == (403 if code else 200)
    if code:
        error = json.loads(body)["error"]
        assert error["code"] == code and error["type"] == "permission_error"
    # a refusal is counted like any answer
    counted = metrics.counters[
        "rawchat_requests_total", (("path", "/v1/models"), ("status", str(status)))
    ]
    assert counted == 1
    # where any name will do, none is looked at
    assert answered(hosts=None, settings=settings, **headers)[0] == 200
    everybody = ServeSettings(origins=("*",))
    assert (answered(settings=everybody, **headers)[0] == 200) == (code != "wrong_host")


@pytest.mark.parametrize(
    "given, status",
    [
        ("Bearer s3cret", 200),
        ("bearer  s3cret ", 200),
        ("Bearer s3cre", 401),
        ("Bearer s3cret2", 401),
        ("Bearer", 401),
        ("Basic s3cret", 401),
        ("s3cret", 401),
        ("Bearer schlüssel", 401),
        (None, 401),
    ],
)
def test_tokens(given, status):
    settings = ServeSettings(token="s3cret")
    headers = {} if given is None else {"authorization": given}
    for path in ("/v1/models", "/metrics", "/nowhere", "/health/"):
        got, told, body, _ = answered(path, settings=settings, **headers)
        assert got == status
        if status == 401:
            assert told[b"www-authenticate"] == b"Bearer"
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
    # the page has no secret, and whoever looks at the health no token
    for path in ("/", "/health"):
        assert answered(path, settings=settings, **headers)[0] == 200
    # a foreign name is told first, whatever the token
    assert answered(settings=settings, host="evil.test", **headers)[0] == 403
    assert answered(hosts=None, settings=settings, host="evil.test", **headers)[0] == status


def test_prometheus_has_the_token_that_its_page_gives_the_server():
    folder = ROOT / "docs" / "observability"
    [command] = re.findall(r"python -m lib\.serve (.*?)  ", (folder / "README.md").read_text())
    arguments = dict(zip(*[iter(command.split())] * 2))
    settings = ServeSettings(host=arguments["--host"], token=arguments["--token"])
    settings.check_token()
    [job] = yaml.safe_load((folder / "prometheus.yaml").read_text())["scrape_configs"]
    given = f"Bearer {job['authorization']['credentials']}"
    [target] = job["static_configs"][0]["targets"]
    answer = answered("/metrics", settings=settings, hosts=None, host=target, authorization=given)
    assert answer[0] == 200


def test_every_answer_is_safe_and_counted(monkeypatch):
    for host, status in (("localhost", 200), ("evil.test", 403)):
        got, headers, _, _ = answered(host=host)
        assert got == status
        assert headers[b"x-content-type-options"] == b"nosniff"
        assert headers[b"cache-control"] == b"no-store"
        assert headers[b"referrer-policy"] == b"no-referrer"
        assert (b"own" in headers) == (status == 200)

    # only what writes an answer is timed; unknown paths are one
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(guard, "time", types.SimpleNamespace(monotonic=clock.__next__))
    for path, name, timed in (
        ("/v1/completions", "/v1/completions", True),
        (CHATS, CHATS, True),
        ("/v1/models", "/v1/models", False),
        ("/x/completions", "other", False),
    ):
        *_, metrics = answered(path)
        key = "rawchat_requests_total", (("path", name), ("status", "200"))
        assert dict(metrics.counters) == {key: 1}
        totals = {name: one.total for name, one in metrics.histograms.items()}
        assert totals == ({"rawchat_request_seconds": 3.0} if timed else {})


def test_who_is_gone_before_the_answer_is_counted_so():
    async def silent(scope, receive, send):
        return None

    async def lifespan(scope, receive, send):
        return scope["type"]

    metrics = Counters()
    asgi = guarded(silent, ServeSettings(), None, metrics, {"/"})
    asyncio.run(asgi({"type": "http", "path": "/", "headers": []}, None, None))
    assert 'rawchat_requests_total{path="/",status="gone"} 1' in metrics.text({})
    # what is no request passes
    asgi = guarded(lifespan, ServeSettings(), None, metrics, {"/"})
    assert asyncio.run(asgi({"type": "lifespan"}, None, None)) == "lifespan"


def test_a_fault_of_ours_is_counted_and_passed_on():
    async def broken(scope, receive, send):
        if scope["path"] == "/health":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    async def send(message):
        pass

    metrics = Counters()
    asgi = guarded(broken, ServeSettings(), None, metrics, {"/", "/health"})
    # what was begun keeps the status that it was begun with
    for path, status in (("/", 500), ("/health", 200)):
        with pytest.raises(ZeroDivisionError):
            asyncio.run(asgi({"type": "http", "path": path, "headers": []}, None, send))
        line = f'rawchat_requests_total{{path="{path}",status="{status}"}} 1'
        assert line in metrics.text({})


def test_responses_are_strict_json():
    plain = guard.json_response({"a": [1, None]})
    assert (plain.status_code, plain.body) == (200, b'{"a": [1, null]}')
    assert plain.headers["content-type"] == "application/json"
    told = guard.json_response({}, 503, {"Retry-After": "2"})
    assert told.status_code == 503 and told.headers["retry-after"] == "2"
    with pytest.raises(ValueError):
        guard.json_response({"a": float("nan")})


# ---- the body of a request -----------------------------------------------------------------------


def read(chunks, settings=None, wait=0.0, **headers):
    """What `read_json` makes of a body that comes in chunks."""

    async def stream():
        for chunk in chunks:
            await asyncio.sleep(wait)
            yield chunk

    headers = {"content-type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    request = types.SimpleNamespace(headers=headers, stream=stream)
    return asyncio.run(read_json(request, settings or ServeSettings(body_kib=1)))


def refused(*args, **kwargs) -> tuple:
    with pytest.raises(ApiError) as e:
        read(*args, **kwargs)
    return e.value.status, str(e.value)


def test_bodies_are_json_and_bounded():
    assert read([b'{"a"', b": 1}"]) == {"a": 1}
    assert read([b"1"], content_type="Application/JSON ; charset=utf-8") == 1
    for kind in ("text/plain", "", "application/jsonx"):
        assert refused([b"1"], content_type=kind)[0] == 415
    # 1 KiB and a byte more, by its own account and by what comes
    exact = [b'"', b"a" * 1022, b'"']
    assert read(exact) == "a" * 1022
    assert read(exact, content_length="1024") == "a" * 1022
    assert refused(exact, content_length="1025") == (413, "the request is larger than 1 KiB")
    assert refused([b'"', b"a" * 1023, b'"'])[0] == 413
    # nonsense as a length is no length
    assert read([b"1"], content_length="many") == 1
    for body in (b"{", b"\xff", b"[" * 1000, b""):
        status, why = refused([body], ServeSettings(body_kib=1))
        assert (status, why) == (400, "the request body is not JSON")


@pytest.mark.parametrize("limits", [dict(body_seconds=0.1), dict(seconds=0.1)], ids=str)
def test_slow_bodies_are_given_up(limits):
    status, why = refused([b"1", b"2"], ServeSettings(**limits), wait=0.15)
    assert (status, why) == (408, "the request did not arrive within 0.1 s")


# ---- connections ---------------------------------------------------------------------------------


class Connection:
    """What the watch sees of one; `later` are the seconds after which it would be cut off."""

    def __init__(self, everybody):
        self.connections = everybody
        everybody.add(self)
        self.cycle = None
        self.done = []
        self.later = []
        self.set = 0  # how often a clock was set
        note = self.done.append
        self.transport = types.SimpleNamespace(
            is_closing=lambda: "abort" in self.done or "close" in self.done,
            abort=lambda: note("abort"),
            close=lambda: note("close"),
            write=note,
        )
        self.loop = types.SimpleNamespace(call_later=self.call_later)

    def call_later(self, seconds, abort):
        assert abort is self.transport.abort
        self.later.append(seconds)
        self.set += 1
        return types.SimpleNamespace(cancel=lambda: self.later.remove(seconds))

    def asks(self, watch):
        self.cycle = types.SimpleNamespace(response_complete=False)
        watch.look(self)

    def is_answered(self, watch):
        self.cycle.response_complete = True
        watch.look(self)


def crowd(monkeypatch, most, count):
    """A watch for so many connections, and as many that it knows."""
    monkeypatch.setattr(connections, "room_for", lambda wanted: wanted)
    limits = dict(idle_seconds=3.0, body_seconds=5.0, seconds=11.0)
    watch = ConnectionWatch(ServeSettings(connections=most, **limits), Counters())
    everybody = set()
    people = [Connection(everybody) for _ in range(count)]
    for one in people:
        watch.look(one)
    return watch, everybody, people


def test_a_connections_time_begins_when_it_asks_and_when_it_is_answered(monkeypatch):
    watch, _, [one] = crowd(monkeypatch, 5, 1)
    assert one.later == [3.0]
    watch.look(one)
    assert one.later == [3.0] and one.set == 1, "nothing has changed"
    one.asks(watch)
    # to come, to be written, and a minute to be sent
    assert one.later == [5.0 + 11.0 + 60.0] and one not in watch.idle
    watch.look(one)
    assert len(one.later) == 1 and one.set == 2
    one.is_answered(watch)
    assert one.later == [3.0] and one in watch.idle
    watch.forget(one)
    watch.forget(one)
    assert one.later == [] and not watch.idle and not watch.timers
    one.transport.close()
    watch.look(one)
    assert one.later == [], "who is gone is not looked after"


def test_who_has_waited_longest_leaves(monkeypatch):
    watch, everybody, [busy, first, second] = crowd(monkeypatch, 3, 3)
    busy.asks(watch)
    # who asked in between has waited less long than those who did not
    first.asks(watch)
    first.is_answered(watch)
    newcomer = Connection(everybody)
    watch.admit(newcomer)
    assert second.done == ["abort"] and busy.done == first.done == newcomer.done == []
    assert second not in watch.timers and newcomer.later == [3.0]
    everybody.remove(second)
    assert watch.metrics.counters["rawchat_refused_connections_total", ()] == 1
    # one more than there may be, and as many as there may be
    everybody.remove(first)
    watch.forget(first)
    watch.admit(Connection(everybody))
    assert watch.metrics.counters["rawchat_refused_connections_total", ()] == 1


def test_where_all_are_answered_the_newcomer_is_told(monkeypatch):
    watch, everybody, people = crowd(monkeypatch, 2, 2)
    for one in people:
        one.asks(watch)
    newcomer = Connection(everybody)
    watch.admit(newcomer)
    assert newcomer.done == [connections.FULL, "close"] and newcomer.later == []
    assert connections.FULL.startswith(b"HTTP/1.1 503 ")
    assert [one.done for one in people] == [[], []]


def test_files_that_are_left_for_connections(monkeypatch):
    import resource

    monkeypatch.setattr(connections.os, "listdir", lambda folder: ["fd"] * 40)
    for most, room in ((1000, 1000 - 40 - 4 * 8 - 32), (105, 1), (104, 1), (10, 1)):
        limits = most, most + 1000
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limits=limits: limits)
        assert room_for(5000) == room
        assert room_for(1) == 1
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, 0))
    assert room_for(5000) == 5000


# ---- what is counted -----------------------------------------------------------------------------


def test_figures_as_prometheus_reads_them():
    metrics = Counters()
    metrics.add("b_total", path="/x", status=200)
    metrics.add("b_total", 2, path="/x", status=200)
    metrics.add("b_total", path="/y", status="gone")
    metrics.add("a_total", 0)
    for seconds in (0.01, 0.011, 0.05, 100, 100.5, 300):
        metrics.observe("h", seconds)
    lines = metrics.text({"g": 4}).split("\n")
    assert lines[:5] == [
        "# TYPE a_total counter",
        "a_total 0",
        "# TYPE b_total counter",
        'b_total{path="/x",status="200"} 3',
        'b_total{path="/y",status="gone"} 1',
    ]
    # what is as long as a bound is within it
    counts = [1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 6]
    bounds = [*counters.BUCKETS, "+Inf"]
    assert lines[5] == "# TYPE h histogram"
    assert lines[6:20] == [f'h_bucket{{le="{b}"}} {n}' for b, n in zip(bounds, counts)]
    assert lines[20] == f"h_sum {0.01 + 0.011 + 0.05 + 100 + 100.5 + 300}"
    assert lines[21:] == ["h_count 6", "# TYPE g gauge", "g 4", ""]


def test_memory_in_bytes(monkeypatch, tmp_path):
    statm = tmp_path / "statm"
    statm.write_text("9 7 5 3")
    monkeypatch.setattr(counters, "Path", lambda path: statm)
    assert counters.resident_bytes() == 7 * counters.os.sysconf("SC_PAGE_SIZE")
    statm.unlink()
    assert counters.resident_bytes() is None


# ---- where it is ---------------------------------------------------------------------------------


def test_addresses():
    names = [server._name(host) for host in ("0.0.0.0", "::", "::1", "127.0.0.1", "a.test")]
    assert names == ["localhost", "localhost", "[::1]", "127.0.0.1", "a.test"]
    assert server.address("http://a/", ServeSettings()) == "http://a"
    assert server.address("http://a/", ServeSettings(token="a/b+c")) == "http://a/#token=a%2Fb%2Bc"


def test_a_token_is_made_up_where_that_is_asked_for(capsys):
    kept = ServeSettings(token="own", port=1234)
    assert server.with_token(kept) is kept and capsys.readouterr().out == ""
    made = [server.with_token(ServeSettings(token="auto", port=1234)) for _ in range(2)]
    assert made[0].token != made[1].token and len(made[0].token) == 24 and made[0].port == 1234
    assert capsys.readouterr().out == "".join(f"token: {one.token}\n" for one in made)


def test_what_is_listened_to():
    listener = server.listen(ServeSettings(port=0))
    try:
        host, port = listener.getsockname()
        assert host == "127.0.0.1" and port > 0
        nodelay = listener.getsockopt(server.socket.IPPROTO_TCP, server.socket.TCP_NODELAY)
        assert nodelay != 0
        for settings in (ServeSettings(port=port), ServeSettings(host="192.0.2.1", port=0)):
            with pytest.raises(UserError, match=f"cannot listen on {settings.host} port"):
                server.listen(settings)
    finally:
        listener.close()


def test_a_server_begins_and_ends_as_the_system_allows():
    """It lets more queue than it takes in a turn, and ends late answers after the grace period."""
    done = []

    class Base:
        async def startup(self, sockets=None):
            done.append("started")

        async def shutdown(self, sockets=None):
            await asyncio.sleep(self.seconds)
            done.append("shut down")

    listener = types.SimpleNamespace(listen=lambda backlog: done.append(backlog))
    worker = types.SimpleNamespace(end=lambda: done.append("ended"))
    one = server.graceful(0.3, worker, Base)()
    asyncio.run(one.startup([listener]))
    asyncio.run(one.startup())
    assert done == ["started", connections.BACKLOG, "started"] and connections.BACKLOG == 128
    for seconds, told in ((0.0, ["shut down"]), (0.5, ["ended", "shut down"])):
        done.clear()
        one.seconds = seconds

        async def shut_down_and_wait():
            await one.shutdown()
            await asyncio.sleep(0.4)

        asyncio.run(shut_down_and_wait())
        assert done == told


def test_a_thing_is_logged_once_a_minute():
    now = 0.0
    once = connections.Once(clock=lambda: now)

    def said(text, level="WARNING"):
        record = types.SimpleNamespace(getMessage=lambda: text, levelname=level, msg="", args=(1,))
        return once.filter(record) and (record.msg or text)

    assert [said("a\n1"), said("a\n2"), said("b"), said("a", "ERROR")] == ["a\n1", False, "b", "a"]
    assert said("") == ""
    now = 59.9
    assert said("a") is False
    now = 60.0
    assert said("a") == "a (and 2 times since it was said last)"
    now = 120.0
    assert said("a") == "a", "counted since then"
    # messages that are never alike do not pile up
    for number in range(1100):
        assert said(f"other {number}")
    assert len(once.said) <= 1001


# setting: its least value
LEAST = dict(
    port=0, slots=1, queue=1, context=0, max_tokens=1, body_kib=1, connections=1, grace=0
) | dict.fromkeys(("seconds", "body_seconds", "idle_seconds"), 0.1)


@pytest.mark.parametrize("name", LEAST)
def test_settings_have_a_least_value(name):
    least = LEAST[name]
    assert getattr(ServeSettings(**{name: least}), name) == least
    with pytest.raises(UserError, match=f"{name} must be at least {least}, not"):
        ServeSettings(**{name: least - 0.05})


def test_ports_origins_and_loopback():
    assert ServeSettings(port=65535).port == 65535
    with pytest.raises(UserError, match="at most 65535"):
        ServeSettings(port=65536)
    ServeSettings(origins=("*", "https://a.test", "http://a.test:81"))
    for origin in ("a.test", "https://a.test/", "https://a.test/x", "ftp://a", "", "**"):
        with pytest.raises(UserError, match="is no origin"):
            ServeSettings(origins=("*", origin))
    hosts = ("localhost", "127.0.0.9", "::1", "0.0.0.0", "::", "10.0.0.1", "a.test")
    assert [ServeSettings(host=host).loopback for host in hosts] == [True] * 3 + [False] * 4
