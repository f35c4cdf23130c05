"""The checks that every request has to pass before it is answered."""

import asyncio
import hmac
import json
import time
from typing import Any
from urllib.parse import urlsplit

from lib.serve.api import ApiError
from lib.serve.counters import Counters
from lib.serve.settings import ServeSettings

# for everybody: the page has no secret, and whoever checks the server's health has no token
OPEN = ("/", "/health")

SAFE_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
]


def guarded(
    app, settings: ServeSettings, hosts: tuple[str, ...] | None, metrics: Counters, paths: set[str]
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
        # unknown paths are counted as one, or anybody could fill the metrics
        began = time.monotonic()
        path = scope["path"] if scope["path"] in paths else "other"
        status = 0

        async def counted(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *SAFE_HEADERS]
            await send(message)

        # a refusal is an answer like any other: counted, and with safe headers
        refusal = _refusal(scope, settings, hosts)
        answer = app
        if refusal:
            answer = json_response(refusal.body, refusal.status, refusal.headers)
        try:
            await answer(scope, receive, counted)
        except Exception:
            # Starlette answers it, outside of this
            status = status or 500
            raise
        finally:
            metrics.add("rawchat_requests_total", path=path, status=status or "gone")
            if path.startswith("/v1/") and path.endswith("completions"):
                metrics.observe("rawchat_request_seconds", time.monotonic() - began)

    return asgi


def _refusal(scope, settings: ServeSettings, hosts: tuple[str, ...] | None) -> ApiError | None:
    """Why a request is not answered, None if it is."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    refusal = None
    if hosts is not None:
        refusal = _wrong_name(headers, settings, hosts)
    if refusal is None and settings.token and scope["path"] not in OPEN:
        refusal = _wrong_token(headers, settings.token)
    return refusal


def _wrong_name(headers: dict, settings: ServeSettings, hosts: tuple[str, ...]) -> ApiError | None:
    """Refuses other names of this server, and pages of other servers."""
    # a name that somebody else has made to point here
    host = headers.get("host", "")
    if _hostname(host) not in hosts:
        why = f"this server does not answer to the name {host[:100]!r}, only to {', '.join(hosts)}"
        return ApiError(403, why, code="wrong_host")

    # only browsers send one
    origin = headers.get("origin")
    welcome = {f"http://{host}", f"https://{host}", *settings.origins}
    if origin is not None and origin not in welcome and "*" not in welcome:
        why = f"pages of {origin[:100]!r} may not use this server"
        return ApiError(403, why, code="wrong_origin")
    return None


def _wrong_token(headers: dict, token: str) -> ApiError | None:
    """Refuses whoever does not send the token."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    # takes as long for a wrong first character as for a wrong last one
    is_right = hmac.compare_digest(given.strip().encode("latin-1"), token.encode())
    if scheme.lower() == "bearer" and is_right:
        return None
    why = (
        "the token is missing or wrong: send it as Authorization: Bearer TOKEN "
        "(for OpenAI's client, as api_key)"
    )
    return ApiError(401, why, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _hostname(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def json_response(body: dict, status: int = 200, headers: dict | None = None):
    """A response of strict JSON."""
    from fastapi.responses import Response

    return Response(json.dumps(body, allow_nan=False), status, headers, "application/json")


async def read_json(request, settings: ServeSettings) -> Any:
    """The body of a request, bounded in size and time; ApiError if it is not JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind.strip().lower() != "application/json":
        # a foreign page can't do that unasked
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")

    # what is too large by its own account is not even read
    most = settings.body_kib * 1024
    too_large = ApiError(413, f"the request is larger than {settings.body_kib} KiB")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise too_large

    # chunks tell no length, so that each is counted
    data = bytearray()
    seconds = min(settings.body_seconds, settings.seconds)
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {seconds:g} s") from None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ApiError(400, "the request body is not JSON", code="invalid_json") from None
