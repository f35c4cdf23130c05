"""Connections that ask for nothing: how many may be open and for how long, and a log that does not
drown.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from lib.serve.counters import Counters
from lib.serve.settings import ServeSettings

# connections that the system keeps for us until they are accepted
BACKLOG = 128

# connections that are accepted in one turn of the event loop
AT_ONCE = 8

# turns from the one that accepts a connection to the one that has closed another for it
TURNS = 4

# files that the process may need besides connections
SPARE = 32

# seconds for the last bytes of an answer, beyond what writing it may take
TO_SEND = 60.0

FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\nConnection: close\r\n"
    b"Content-Length: 0\r\n\r\n"
)


def room_for(connections: int) -> int:
    """How many connections may be open: those asked for, or what the system leaves of them.

    A process that has run out of files can't even refuse a connection.
    """
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return connections
    already = len(os.listdir("/dev/fd"))
    return max(1, min(connections, most - already - TURNS * AT_ONCE - SPARE))


class ConnectionWatch:
    """Looks after connections: how many are open, and how long each has been at what it does."""

    def __init__(self, settings: ServeSettings, metrics: Counters):
        self.most = room_for(settings.connections)
        self.metrics = metrics
        self.for_a_request = settings.idle_seconds
        self.for_an_answer = settings.body_seconds + settings.seconds + TO_SEND
        # what ends a connection that takes too long
        self.timers: dict[Any, asyncio.TimerHandle] = {}
        # those without a request, the one that has waited longest first
        self.idle: dict[Any, None] = {}

    def admit(self, newcomer):
        """Take a connection in; if there are too many, the one that has waited longest leaves."""
        self.look(newcomer)
        if len(newcomer.connections) <= self.most:
            return
        # somebody has to leave
        self.metrics.add("rawchat_refused_connections_total")
        leaving = next(iter(self.idle))
        self.forget(leaving)
        if leaving is newcomer:
            # all others wait for an answer
            newcomer.transport.write(FULL)
            newcomer.transport.close()
        else:
            leaving.transport.abort()

    def look(self, connection):
        """Note whether a connection has a request now; its time begins when that changes."""
        # uvicorn's record of the request that is being answered, None before the first
        cycle = connection.cycle
        is_idle = cycle is None or cycle.response_complete
        was_idle = connection in self.idle
        known = connection in self.timers
        if connection.transport.is_closing() or (known and is_idle == was_idle):
            return

        # its clock starts anew
        self.forget(connection)
        seconds = self.for_an_answer
        if is_idle:
            seconds = self.for_a_request
            self.idle[connection] = None
        abort = connection.transport.abort
        self.timers[connection] = connection.loop.call_later(seconds, abort)

    def forget(self, connection):
        """Stop looking after a connection."""
        self.idle.pop(connection, None)
        timer = self.timers.pop(connection, None)
        if timer:
            timer.cancel()


def bounded(settings: ServeSettings, metrics: Counters) -> type[asyncio.Protocol]:
    """uvicorn's protocol for HTTP with a bound on the number of connections and a time limit on
    each, whatever it is at.

    The limits hold before a request is there to be checked, where uvicorn has none of its own.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    watch = ConnectionWatch(settings, metrics)

    class Bounded(H11Protocol):
        def connection_made(self, transport):
            super().connection_made(transport)
            watch.admit(self)

        def connection_lost(self, exc):
            watch.forget(self)
            super().connection_lost(exc)

        def data_received(self, data):
            super().data_received(data)
            watch.look(self)

        def on_response_complete(self):
            super().on_response_complete()
            watch.look(self)

    return Bounded


class Once(logging.Filter):
    """Lets each message through once a minute, with the number of times that it was held back."""

    def __init__(self, seconds: float = 60.0, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self.seconds = seconds
        self.clock = clock
        # message: when it was let through last, and how often it came since
        self.said: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        # addresses and the like differ further down
        key = f"{record.levelname} {text.splitlines()[0] if text else ''}"
        now = self.clock()
        when, more = self.said.get(key, (-self.seconds, 0))
        if now - when < self.seconds:
            self.said[key] = when, more + 1
            return False

        # messages that are never alike must not pile up
        if len(self.said) > 1000:
            self.said.clear()
        self.said[key] = now, 0
        if more:
            record.msg, record.args = f"{text} (and {more} times since it was said last)", ()
        return True
