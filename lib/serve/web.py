"""The web application: the chat page, OpenAI's API, health and metrics.

One thread owns the decoding engine; the web server's event loop hands it jobs and gets tokens back.
Nothing is kept: a conversation lives in the browser, or wherever the caller keeps it.
"""

import asyncio
import base64
import contextlib
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.generate import Engines
from lib.runs import Model
from lib.serve.answers import QUIET, Answers, Kind
from lib.serve.api import Api, ApiError, no_model
from lib.serve.counters import Counters, resident_bytes
from lib.serve.guard import guarded, json_response, read_json
from lib.serve.settings import ServeSettings
from lib.serve.worker import EngineThread, warm_up

PAGE = Path(__file__).with_name("page.html")

# those that are there before the first answer
COUNTED = (
    "rawchat_prompt_tokens_total",
    "rawchat_completion_tokens_total",
    "rawchat_cancelled_answers_total",
    "rawchat_refused_connections_total",
)


def make_app(
    model: Model,
    settings: ServeSettings,
    hosts: tuple[str, ...] | None = None,
    on_failure: Callable[[], None] = lambda: None,
):
    """The FastAPI application: page, API, health and metrics. hosts: see `guarded`. on_failure is
    called when the engine dies. UserError if the model computes no numbers.
    """
    from fastapi import FastAPI

    # what answers, and what counts
    api, metrics = Api(model, settings), Counters()
    for name in COUNTED:
        metrics.add(name, 0)
    # the engine in its thread, warm enough for a first prompt
    engine = _engine(model, settings, api.context)
    worker = EngineThread(engine, settings.queue, metrics, on_failure)
    warm_up(engine)

    # the thread lives as long as the application
    @contextlib.asynccontextmanager
    async def lifespan(app):
        worker.thread.start()
        yield
        await asyncio.to_thread(worker.close)

    # no pages of FastAPI's own: they load scripts from elsewhere
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.worker, app.state.api, app.state.metrics = worker, api, metrics
    _add_page(app, framed=hosts is None)
    _add_monitoring(app)
    _add_answers(app)
    _add_errors(app)

    # the last that is added is the first that a request meets
    routes: list[Any] = app.routes
    paths = {route.path for route in routes if hasattr(route, "path")}
    app.add_middleware(guarded, settings=settings, hosts=hosts, metrics=metrics, paths=paths)
    if settings.origins:
        _welcome(app, settings.origins)
    return app


def _engine(model: Model, settings: ServeSettings, context: int) -> Engines:
    """What answers are written with: the model's weights in their form, and the calculator."""
    from lib.sandbox import calculator

    return Engines(
        settings.weights(model),
        model.config,
        settings.slots,
        context,
        model.tokenizer,
        calculator,
        speculate=settings.speculate,
    )


def _welcome(app, origins: tuple[str, ...]):
    """Let the scripts of pages elsewhere use the API (CORS)."""
    from starlette.middleware.cors import CORSMiddleware

    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        # OpenAI's client in a browser sends many headers of its own
        allow_headers=["*"],
    )


# ---- the page ------------------------------------------------------------------------------------


def page(framed: bool = False) -> tuple[bytes, str]:
    """The chat page and its Content-Security-Policy: its own script and style by their hashes,
    requests to this server, no more.

    framed: whether other sites may show it in a frame, as Colab does.
    """
    # whatever is not named here the browser refuses
    html = PAGE.read_text(encoding="utf-8")
    policy = [
        "default-src 'none'",
        f"script-src {_hashes(html, 'script')}",
        f"style-src {_hashes(html, 'style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    if not framed:
        policy.append("frame-ancestors 'none'")
    return html.encode(), "; ".join(policy)


def _hashes(html: str, tag: str) -> str:
    """The hashes of what stands in all elements of a kind, as the policy names them."""
    hashes = []
    for code in re.findall(f"<{tag}>(.*?)</{tag}>", html, re.S):
        digest = hashlib.sha256(code.encode()).digest()
        hashes.append(f"'sha256-{base64.b64encode(digest).decode()}'")
    return " ".join(hashes)


def _add_page(app, framed: bool):
    from fastapi.responses import Response

    html, policy = page(framed)

    @app.api_route("/", methods=["GET", "HEAD"])
    async def index():
        headers = {"Content-Security-Policy": policy}
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)


# ---- answers -------------------------------------------------------------------------------------


def _add_answers(app):
    """Routes that let the model write."""
    from fastapi import Request
    from starlette.requests import ClientDisconnect

    api, worker = app.state.api, app.state.worker
    settings = api.settings
    events = _events_class(settings.seconds + 2 * QUIET)

    async def respond(request: Request, kind: Kind):
        body = await read_json(request, settings)
        # encoding much text takes a while
        check = api.chat if kind == "chat" else api.completion
        asked = await asyncio.to_thread(check, body)
        # from here on the engine works for this request
        answers = Answers(api, asked, kind, worker)
        if asked.stream:
            return events(answers)

        # nothing is written for a client who has hung up
        whole = asyncio.ensure_future(answers.whole())
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise ClientDisconnect
            return json_response(whole.result())
        finally:
            for task in (whole, gone):
                task.cancel()
            answers.cancel()

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        return await respond(request, "chat")

    @app.post("/v1/completions")
    async def completions(request: Request):
        return await respond(request, "completion")


async def _gone(request):
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _events_class(seconds: float):
    """The response that streams answers for at most so many seconds."""
    from fastapi.responses import StreamingResponse

    class Events(StreamingResponse):
        """A stream that stops the writing when it ends, however it ends, and that a client who
        doesn't read can't keep open.
        """

        def __init__(self, answers: Answers):
            headers = {"X-Accel-Buffering": "no"}
            super().__init__(answers.stream(), media_type="text/event-stream", headers=headers)
            self.answers = answers

        async def __call__(self, scope, receive, send):
            try:
                async with asyncio.timeout(seconds):
                    await super().__call__(scope, receive, send)
            except TimeoutError:
                # the connection is closed without the end of the stream
                return
            finally:
                self.answers.cancel()

    return Events


# ---- how it is -----------------------------------------------------------------------------------


def _add_monitoring(app):
    """Routes that tell how the server is and what it serves."""
    from fastapi.responses import Response

    worker, api, metrics = app.state.worker, app.state.api, app.state.metrics
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
        return json_response(state, 503 if worker.failed else 200)

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def show_metrics():
        # what is read at this moment, beside what was counted
        gauges = {
            "rawchat_slots": engine.slots,
            "rawchat_busy_slots": len(worker.busy),
            "rawchat_queue_depth": len(worker.waiting),
            "process_start_time_seconds": api.created,
        }
        resident = resident_bytes()
        if resident is not None:
            gauges["process_resident_memory_bytes"] = resident
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(metrics.text(gauges), media_type=kind)

    @app.api_route("/v1/models", methods=["GET", "HEAD"])
    async def models():
        return json_response({"object": "list", "data": [api.card()]})

    @app.api_route("/v1/models/{name}", methods=["GET", "HEAD"])
    async def one_model(name: str):
        if name != api.id:
            raise no_model(name, api.id)
        return json_response(api.card())


def _add_errors(app):
    """Answers to what goes wrong, all in OpenAI's form."""
    from fastapi.responses import Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    @app.exception_handler(ApiError)
    async def api_error(request, e):
        return json_response(e.body, e.status, e.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request, e):
        what = f"{request.method} {request.url.path[:100]}: {e.detail}"
        return await api_error(request, ApiError(e.status_code, what, headers=e.headers))

    @app.exception_handler(ClientDisconnect)
    async def hung_up(request, e):
        # nobody reads it; nginx's number, for the count
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def bug(request, e):
        # Starlette logs the traceback as well
        error = ApiError(500, "the server made a mistake; its log says which")
        return await api_error(request, error)
