"""Running the web application: the socket, the signals, and how people learn where it is."""

import asyncio
import contextlib
import dataclasses
import importlib.util
import logging
import secrets
import socket
import threading
import time
from urllib.parse import quote

from lib.files import UserError
from lib.runs import Model
from lib.serve.connections import AT_ONCE, BACKLOG, Once, bounded
from lib.serve.settings import ServeSettings
from lib.serve.web import make_app
from lib.serve.worker import EngineThread

LOOPBACK = ("localhost", "127.0.0.1", "::1")

# who writes the server's log
LOGGERS = ("uvicorn.error", "asyncio")


def check_installed():
    """UserError if the packages of the serve extra are not there."""
    # neither is imported before somebody serves
    needed = ("fastapi", "uvicorn")
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"the server needs {' and '.join(missing)}: pip install -e '.[serve]'")


def listen(settings: ServeSettings) -> socket.socket:
    """The socket that the settings name, listening; UserError if the port is taken, or no such
    address is ours.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    address = settings.host, settings.port
    try:
        listener = socket.create_server(address, family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise UserError(
            f"cannot listen on {settings.host} port {settings.port} ({why}): choose another "
            "--port, or 0 for a free one"
        ) from None
    # connections inherit it; asyncio sets it only on sockets it made itself, and without it each
    # answer waits 40 ms for an ACK
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def graceful(grace: float, worker: EngineThread, base):
    """`base`, uvicorn's server, that accepts no more at once than it has files for, and ends
    answers that outlast the grace period with an error which clients can read.
    """

    class Graceful(base):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            # asyncio accepts as many in a turn as it was told that may queue (AT_ONCE), but more
            # may well queue
            for listener in sockets or ():
                listener.listen(BACKLOG)

        async def shutdown(self, sockets=None):
            loop = asyncio.get_running_loop()
            late = loop.call_later(grace, worker.end)
            try:
                await super().shutdown(sockets)
            finally:
                late.cancel()

    return Graceful


@contextlib.contextmanager
def quiet_log():
    """Within it the server's log says a thing once a minute, however often it happens."""
    # one for both, so that neither repeats the other
    once = Once()
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addFilter(once)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(once)


class Server:
    """A server that listens from the moment it is made; `run` serves in this thread, `start` in one
    of its own.

    hosts: the names under which it may be addressed, () for any, None for what the settings say.
    """

    def __init__(
        self,
        model: Model,
        settings: ServeSettings,
        hosts: tuple[str, ...] | None = None,
        listener: socket.socket | None = None,
    ):
        # whether it may and can be served at all
        settings.check_token()
        check_installed()
        self.settings = settings
        self.socket = listener or listen(settings)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://{_name(settings.host)}:{self.port}"

        # on loopback, or where names are given, no other name is answered to
        if hosts is None and (settings.loopback or settings.hosts):
            hosts = (*LOOPBACK, settings.host, *map(str.lower, settings.hosts))
        self.app = make_app(model, settings, hosts or None, self.stop)
        self.uvicorn = self._uvicorn()
        self.thread = threading.Thread(target=self.run, name="server", daemon=True)

    def _uvicorn(self):
        """The web server around the application."""
        import uvicorn

        state, settings = self.app.state, self.settings
        config = uvicorn.Config(
            self.app,
            http=bounded(settings, state.metrics),
            ws="none",
            backlog=AT_ONCE,
            # uvicorn's own configuration would close the log handlers of all others in this
            # process, and absl's closes the sys.stderr that it was made with
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=round(settings.idle_seconds) + 1,
            # a little longer than our own, so that what ends there can still be sent
            timeout_graceful_shutdown=round(settings.grace) + 5,
        )
        return graceful(settings.grace, state.worker, uvicorn.Server)(config)

    def run(self) -> int:
        """Serve until a signal or `stop`; the exit status, 1 if the engine failed."""
        # uvicorn has obeyed Ctrl-C, and passes it on
        with quiet_log(), contextlib.suppress(KeyboardInterrupt):
            self.uvicorn.run(sockets=[self.socket])
        return int(self.app.state.worker.failed is not None)

    def start(self) -> "Server":
        """Serve in a thread, and return when requests are answered."""
        self.thread.start()
        # requests are answered once uvicorn says so
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


# ---- where it is ---------------------------------------------------------------------------------


def _name(host: str) -> str:
    """What stands for an address to listen on in a URL."""
    if host in ("0.0.0.0", "::"):
        return "localhost"
    return f"[{host}]" if ":" in host else host


def with_token(settings: ServeSettings) -> ServeSettings:
    """The settings with a token made up and printed where it is "auto"."""
    if settings.token != "auto":
        return settings
    settings = dataclasses.replace(settings, token=secrets.token_urlsafe(18))
    print(f"token: {settings.token}")
    return settings


def address(url: str, settings: ServeSettings) -> str:
    """The page's address with the token behind it, where the browser finds it and sends it to
    nobody.
    """
    token = f"/#token={quote(settings.token, safe='')}" if settings.token else ""
    return url.rstrip("/") + token


def colab_url(port: int) -> str:
    """In a Colab kernel, the address at which this browser (and nobody else) reaches a port of the
    machine.
    """
    from google.colab import output  # pyright: ignore[reportMissingImports]

    return output.eval_js(f"google.colab.kernel.proxyPort({port})")


# ---- starting it ---------------------------------------------------------------------------------


def prepare(settings: ServeSettings, hosts: tuple[str, ...] | None) -> Server:
    """A server with the model that the settings name.

    It listens first, so that a taken port is told before a large model was loaded.
    """
    settings.check_token()
    check_installed()
    # the port is ours while the model is loaded
    listener = listen(settings)
    try:
        return Server(settings.load(), settings, hosts, listener)
    except BaseException:
        listener.close()
        raise


def start(settings: ServeSettings) -> Server:
    """For notebooks: serve from a thread of the kernel, which owns the accelerator; prints where
    the page is. `.close()` ends it.
    """
    from lib import notebook

    settings = with_token(settings)
    in_colab = notebook.in_colab()
    # Colab's proxy asks under names of its own, and nobody's browser can reach a Colab machine's
    # loopback otherwise
    server = prepare(settings, () if in_colab else None).start()
    url = colab_url(server.port) if in_colab else server.url
    print(f"chat page: {address(url, settings)}")
    return server


def main(settings: ServeSettings, in_colab: bool):
    """Load, say where, and serve until stopped."""
    settings = with_token(settings)
    try:
        server = prepare(settings, () if in_colab else None)
    except KeyboardInterrupt:
        print("Interrupted while loading", flush=True)
        raise SystemExit(130) from None

    # where it is, in words that a script can wait for
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
