"""A chat page and an OpenAI-compatible API over one model (`python -m lib.serve`).

One thread owns the decoding engine, where everybody's answers are written together; the web
server's event loop hands it jobs and gets tokens back. Nothing is kept: a conversation lives in the
browser, or wherever the caller keeps it.
"""

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import hmac
import importlib.util
import ipaddress
import json
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from lib.files import UserError
from lib.generate import Engines
from lib.model import quantized
from lib.runs import Model, load_model, open_run
from lib.serve.api import QUIET, Answers, Api, ApiError, EngineThread, no_model, warm_up
from lib.serve.counters import Counters, resident_bytes

PAGE = Path(__file__).with_name("page.html")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Settings:
    """Serve a trained model: a chat page at /, an OpenAI-compatible API under /v1, /health and
    /metrics.
    """

    run: str = ""
    """run folder, runs/NAME or a path; empty for the newest"""
    stage: str = ""
    """base, mid, sft or rl; empty for the furthest that the run has"""
    ckpt: str = ""
    """empty for the newest checkpoint, best, or a checkpoint's path or address"""
    int8: bool = False
    """decode with the matrices as 8-bit integers; `python -m benchmarks.decode --run RUN`
    measures what that costs and brings here
    """
    speculate: int = 0
    """tokens to draft ahead from what was said before, checked all at once: the same text,
    faster where it repeats itself; 0 for none
    """
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 for everybody who can reach this machine, which needs a
    token
    """
    port: int = 8000
    """port to listen on; 0 for any free one"""
    token: str = ""
    """what callers must send (Authorization: Bearer …) and the page asks for; auto makes one up and
    prints it. Other users of the machine don't see it if it is given as the environment variable
    RAWCHAT_TOKEN instead"""
    insecure: bool = False
    """listen on other addresses than loopback without a token"""
    hosts: tuple[str, ...] = ()
    """names under which the server may be addressed: on loopback besides localhost, by a proxy
    for example; elsewhere none means all
    """
    slots: int = 8
    """answers written at the same time; each takes its part of the cache"""
    queue: int = 64
    """answers that may wait for a slot; more are refused with 429"""
    context: int = 0
    """tokens of prompt and answer together; 0 for what the model was trained with"""
    max_tokens: int = 1024
    """longest answer, and what is assumed where a request doesn't say"""
    seconds: float = 300.0
    """longest time from a request to the end of its answer"""
    body_kib: int = 1024
    """largest request, in KiB"""
    grace: float = 10.0
    """seconds that running answers get to finish when the server is stopped"""

    def __post_init__(self):
        least = dict(
            port=0, slots=1, queue=1, context=0, max_tokens=1, seconds=0.1, body_kib=1, grace=0
        )
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if self.port > 65535:
            raise UserError(f"port must be at most 65535, not {self.port}")
        if not (self.token.isascii() and self.token.isprintable() and " " not in self.token):
            raise UserError(
                "the token must be printable ASCII without blanks: browsers can't send any other "
                "in a header"
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check_token(self):
        """UserError if everybody on the network could use the server without a token, and nobody
        said that this is wanted.
        """
        if not self.loopback and not self.token and not self.insecure:
            raise UserError(
                f"listening on {self.host} lets everybody who reaches this machine use it: give a "
                "--token (auto makes "
                "one), or say --insecure if that is what you want"
            )


# ---- the web application -------------------------------------------------------------------------


def page(framed: bool = False) -> tuple[bytes, str]:
    """The chat page and its Content-Security-Policy: its own script and style by their hashes,
    requests to this server, no more.

    framed: whether other sites may show it in a frame, as Colab does.
    """
    html = PAGE.read_text(encoding="utf-8")

    def hashes(tag):
        found = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.S)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
            for code in found
        )

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'" + ("" if framed else "; frame-ancestors 'none'")
    )
    return html.encode(), policy


def guarded(
    app, settings: Settings, hosts: tuple[str, ...] | None, metrics: Counters, paths: set[str]
):
    """`app` behind the checks that every request has to pass, with safe headers and a count on
    every answer.

    hosts: the names under which this server may be addressed, None for any. A page elsewhere whose
    name was made to point at loopback (DNS rebinding) sends its own name as Host; a page that just
    posts to us sends its own address as Origin.
    """

    async def asgi(scope, receive, send):
        if scope["type"] != "http":
            return await app(scope, receive, send)
        began, path = time.monotonic(), scope["path"] if scope["path"] in paths else "other"
        status = 0

        async def counted(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-content-type-options", b"nosniff"),
                    (b"cache-control", b"no-store"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        try:
            check = _refusal(scope, settings, hosts)
            await (_json_response(check.body, check.status, check.headers) if check else app)(
                scope, receive, counted
            )
        except Exception:
            status = status or 500  # Starlette answers it, outside of this
            raise
        finally:
            metrics.add("rawchat_requests_total", path=path, status=status or "gone")
            if path.startswith("/v1/") and path.endswith("completions"):
                metrics.observe("rawchat_request_seconds", time.monotonic() - began)

    return asgi


def _refusal(scope, settings: Settings, hosts) -> ApiError | None:
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    host, origin = headers.get("host", ""), headers.get("origin")
    if hosts is not None and _hostname(host) not in hosts:
        why = f"this server does not answer to the name {host[:100]!r}, only to {', '.join(hosts)}"
        return ApiError(403, why, code="wrong_host")
    if (
        hosts is not None
        and origin is not None
        and origin not in (f"http://{host}", f"https://{host}")
    ):
        return ApiError(
            403, f"pages of {origin[:100]!r} may not use this server", code="wrong_origin"
        )
    if settings.token and scope["path"] not in ("/", "/health"):
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            given.strip().encode("latin-1"), settings.token.encode()
        ):
            why = (
                "the token is missing or wrong: send it as Authorization: Bearer TOKEN "
                "(for OpenAI's client, as api_key)"
            )
            return ApiError(
                401, why, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )
    return None


def _hostname(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _json_response(body: dict, status: int = 200, headers: dict | None = None):
    from fastapi.responses import Response

    return Response(json.dumps(body, allow_nan=False), status, headers, "application/json")


async def _read_json(request, settings: Settings):
    """The body of a request, bounded in size and time."""
    most = settings.body_kib * 1024
    if (
        request.headers.get("content-type", "").partition(";")[0].strip().lower()
        != "application/json"
    ):
        # a foreign page can't do that unasked
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")
    too_large = ApiError(413, f"the request is larger than {settings.body_kib} KiB")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(settings.seconds):
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {settings.seconds:g} s") from None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ApiError(400, "the request body is not JSON", code="invalid_json") from None


async def _gone(request):
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _engine(model: Model, settings: Settings, context: int) -> Engines:
    """What answers are written with: the model's weights in their form, and the calculator."""
    from lib.sandbox import calculator

    params = quantized(model.params, model.config) if settings.int8 else model.params
    return Engines(
        params,
        model.config,
        settings.slots,
        context,
        model.tokenizer,
        calculator,
        speculate=settings.speculate,
    )


def _add_monitoring(app, metrics: Counters):
    """Routes that tell how the server is and what it serves."""
    from fastapi.responses import Response

    worker, api = app.state.worker, app.state.api
    engine = worker.engine

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health():
        state = {
            "status": "failed" if worker.failed else "ok",
            "slots": engine.slots,
            "busy": len(worker.busy),
            "waiting": len(worker.waiting),
            "warming": len(worker.cold),
        }
        return _json_response(state, 503 if worker.failed else 200)

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def show_metrics():
        gauges = {
            "rawchat_slots": engine.slots,
            "rawchat_busy_slots": len(worker.busy),
            "rawchat_queue_depth": len(worker.waiting),
            "process_resident_memory_bytes": resident_bytes(),
            "process_start_time_seconds": api.created,
        }
        text = metrics.text({name: value for name, value in gauges.items() if value is not None})
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.api_route("/v1/models", methods=["GET", "HEAD"])
    async def models():
        return _json_response({"object": "list", "data": [api.card()]})

    @app.api_route("/v1/models/{name}", methods=["GET", "HEAD"])
    async def one_model(name: str):
        if name != api.id:
            raise no_model(name, api.id)
        return _json_response(api.card())


def _add_errors(app):
    """Answers to what goes wrong, all in OpenAI's form."""
    from fastapi.responses import Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    @app.exception_handler(ApiError)
    async def api_error(request, e):
        return _json_response(e.body, e.status, e.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request, e):
        what = f"{request.method} {request.url.path[:100]}: {e.detail}"
        return await api_error(request, ApiError(e.status_code, what, headers=e.headers))

    @app.exception_handler(ClientDisconnect)
    async def hung_up(request, e):
        return Response(status_code=499)  # nobody reads it; nginx's number, for the count

    @app.exception_handler(Exception)
    async def bug(request, e):  # Starlette logs the traceback as well
        return await api_error(
            request, ApiError(500, "the server made a mistake; its log says which")
        )


def make_app(
    model: Model, settings: Settings, hosts: tuple[str, ...] | None = None, on_failure=lambda: None
):
    """The FastAPI application: page, API, health and metrics. hosts: see `guarded`. on_failure is
    called when the engine dies.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import Response, StreamingResponse
    from starlette.requests import ClientDisconnect

    api, metrics = Api(model, settings), Counters()
    engine = _engine(model, settings, api.context)
    worker = EngineThread(engine, settings.queue, metrics, on_failure)
    warm_up(engine, 1)
    for name in (
        "rawchat_prompt_tokens_total",
        "rawchat_completion_tokens_total",
        "rawchat_cancelled_answers_total",
    ):
        metrics.add(name, 0)
    html, policy = page(framed=hosts is None)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        worker.thread.start()
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.worker, app.state.api = worker, api

    class Events(StreamingResponse):
        """A stream that stops the writing when it ends, however it ends, and that a client who
        doesn't read can't keep open.
        """

        def __init__(self, answers: Answers):
            super().__init__(
                answers.stream(),
                media_type="text/event-stream",
                headers={"X-Accel-Buffering": "no"},
            )
            self.answers = answers

        async def __call__(self, scope, receive, send):
            try:
                async with asyncio.timeout(settings.seconds + 2 * QUIET):
                    await super().__call__(scope, receive, send)
            except TimeoutError:
                return  # the connection is closed without the end of the stream
            finally:
                self.answers.cancel()

    async def respond(request: Request, kind: str):
        body = await _read_json(request, settings)
        # encoding much text takes a while
        asked = await asyncio.to_thread(getattr(api, kind), body)
        answers = Answers(api, asked, kind, worker)
        if asked.stream:
            return Events(answers)
        whole, gone = asyncio.ensure_future(answers.whole()), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise ClientDisconnect
            return _json_response(whole.result())
        finally:
            for task in (whole, gone):
                task.cancel()
            answers.cancel()

    @app.api_route("/", methods=["GET", "HEAD"])
    async def index():
        return Response(
            html, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": policy}
        )

    _add_monitoring(app, metrics)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        return await respond(request, "chat")

    @app.post("/v1/completions")
    async def completions(request: Request):
        return await respond(request, "completion")

    _add_errors(app)
    routes: list[Any] = app.routes  # not all kinds have a path
    paths = {route.path for route in routes if hasattr(route, "path")}
    app.add_middleware(guarded, settings=settings, hosts=hosts, metrics=metrics, paths=paths)
    return app


# ---- running it ----------------------------------------------------------------------------------


def check_installed():
    """UserError if the packages of the serve extra are not there."""
    if missing := [name for name in ("fastapi", "uvicorn") if not importlib.util.find_spec(name)]:
        raise UserError(f"the server needs {' and '.join(missing)}: pip install -e '.[serve]'")


def listen(settings: Settings) -> socket.socket:
    """The socket that the settings name, listening; UserError if the port is taken, or no such
    address is ours.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=512)
    except (OSError, OverflowError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise UserError(
            f"cannot listen on {settings.host} port {settings.port} ({why}): choose another "
            "--port, or 0 for a free "
            "one"
        ) from None
    # connections inherit it; asyncio sets it only on sockets it made itself, and without it each
    # answer waits 40 ms for an ACK
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def patient_until(grace: float, worker: EngineThread, base):
    """`base`, uvicorn's server, that ends answers which outlast the grace period with an error that
    clients can read.
    """

    class Graceful(base):
        async def shutdown(self, sockets=None):
            loop = asyncio.get_running_loop()
            late = loop.call_later(grace, worker.end)
            try:
                await super().shutdown(sockets)
            finally:
                late.cancel()

    return Graceful


class Server:
    """A server that listens from the moment it is made; `run` serves in this thread, `start` in one
    of its own.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        hosts: tuple[str, ...] | None = None,
        listener: socket.socket | None = None,
    ):
        settings.check_token()
        check_installed()
        import uvicorn

        self.socket = listener or listen(settings)
        self.settings, self.port = settings, self.socket.getsockname()[1]
        name = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = (
            f"http://{'localhost' if settings.host in ('0.0.0.0', '::') else name}:{self.port}"
        )
        if hosts is None and (settings.loopback or settings.hosts):
            hosts = (*LOOPBACK, settings.host, *map(str.lower, settings.hosts))
        self.app = make_app(model, settings, hosts or None, self.stop)
        graceful = patient_until(settings.grace, self.app.state.worker, uvicorn.Server)
        self.uvicorn = graceful(
            uvicorn.Config(
                self.app,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=30,
                # a little longer than our own, so that what ends there can still be sent
                timeout_graceful_shutdown=round(settings.grace) + 5,
            )
        )
        self.thread = threading.Thread(target=self.run, name="server", daemon=True)

    def run(self) -> int:
        """Serve until a signal or `stop`; the exit status, 1 if the engine failed."""
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has obeyed it, and passes it on
            self.uvicorn.run(sockets=[self.socket])
        return int(self.app.state.worker.failed is not None)

    def start(self) -> "Server":
        """Serve in a thread, and return when requests are answered."""
        self.thread.start()
        while not self.uvicorn.started:
            if not self.thread.is_alive():
                raise RuntimeError("the server's thread ended before it began to serve")
            time.sleep(0.01)
        return self

    def stop(self):
        """Take no more requests, let running answers end within the grace period, then leave."""
        self.uvicorn.should_exit = True

    def close(self):
        """`stop`, and wait for it."""
        self.stop()
        self.thread.join()


def load(settings: Settings) -> Model:
    """The model that the settings name."""

    folder = (
        Path(settings.run)
        if "/" in settings.run
        else open_run(settings.run, needs="tokenizer.json")
    )
    return load_model(folder, settings.ckpt, settings.stage)


def with_token(settings: Settings) -> Settings:
    """The settings with a token made up and printed where it is "auto"."""
    if settings.token != "auto":
        return settings
    settings = dataclasses.replace(settings, token=secrets.token_urlsafe(18))
    print(f"token: {settings.token}")
    return settings


def address(url: str, settings: Settings) -> str:
    """The page's address with the token behind it, where the browser finds it and sends it to
    nobody.
    """
    return url.rstrip("/") + (f"/#token={quote(settings.token, safe='')}" if settings.token else "")


def colab_url(port: int) -> str:
    """In a Colab kernel, the address at which this browser (and nobody else) reaches a port of the
    machine.
    """
    from google.colab import output  # pyright: ignore[reportMissingImports]

    return output.eval_js(f"google.colab.kernel.proxyPort({port})")


def start(settings: Settings) -> Server:
    """For notebooks: serve from a thread of the kernel, which owns the accelerator; prints where
    the page is. `.close()` ends it.
    """
    from lib import notebook

    settings = with_token(settings)
    # Colab's proxy asks under names of its own, and nobody's browser can reach a Colab machine's
    # loopback otherwise
    server = Server(load(settings), settings, () if notebook.in_colab() else None).start()
    print(
        "chat page: "
        f"{address(colab_url(server.port) if notebook.in_colab() else server.url, settings)}"
    )
    return server


def main(settings: Settings, in_colab: bool):
    """Load, say where, and serve until stopped."""
    settings = with_token(settings)
    settings.check_token()
    check_installed()
    # first, so that a taken port is told before a large model was loaded
    listener = listen(settings)
    try:
        server = Server(load(settings), settings, () if in_colab else None, listener)
    except KeyboardInterrupt:
        print("Interrupted while loading", flush=True)
        raise SystemExit(130) from None
    api = server.app.state.api
    print(
        f"{api.id} (step {api.model.meta.get('step')}) at {address(server.url, settings)}\n"
        f"OpenAI-compatible API at {server.url}/v1   Ctrl-C stops",
        flush=True,
    )
    if in_colab:
        print(
            "In a Colab cell, this opens the page: from google.colab import output; "
            f"output.serve_kernel_port_as_window({server.port})",
            flush=True,
        )
    raise SystemExit(server.run())
