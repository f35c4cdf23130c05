"""What can be set about the server, in the groups that `--help` shows."""

import ipaddress
import re
from dataclasses import dataclass

from lib.chat.settings import Which, Writing
from lib.files import UserError


@dataclass(frozen=True)
class Doors:
    """Where, and who may ask."""

    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 for everybody who can reach this machine, which needs a
    token"""
    port: int = 8000
    """port to listen on; 0 for any free one"""
    token: str = ""
    """what callers must send (Authorization: Bearer …) and the page asks for; auto makes one up and
    prints it. Other users of the machine don't see it if it is given as the environment variable
    RAWCHAT_TOKEN instead"""
    insecure: bool = False
    """listen on other addresses than loopback without a token"""
    hosts: tuple[str, ...] = ()
    """names under which the server may be addressed: on loopback besides localhost, by a proxy for
    example; elsewhere none means all"""
    origins: tuple[str, ...] = ()
    """pages elsewhere whose scripts may use the API (CORS), like https://chat.example.org; * for
    all, none by default"""


@dataclass(frozen=True)
class Crowd:
    """How much at once."""

    slots: int = 8
    """answers written at the same time; each takes its part of the cache"""
    queue: int = 64
    """answers that may wait for a slot; more are refused with 429"""
    context: int = 0
    """tokens of prompt and answer together; 0 for what the model was trained with"""
    max_tokens: int = 1024
    """longest answer, and what is assumed where a request doesn't say"""
    body_kib: int = 1024
    """largest request, in KiB"""
    connections: int = 1000
    """connections kept open; beyond that whoever has asked for nothing for the longest time is cut
    off. Never more than the system lets this process open"""


@dataclass(frozen=True)
class Patience:
    """How long."""

    seconds: float = 300.0
    """longest time from a request to the end of its answer"""
    body_seconds: float = 30.0
    """longest time that a request may take to arrive, once it has begun"""
    idle_seconds: float = 30.0
    """longest time that a connection may go without a request"""
    grace: float = 10.0
    """seconds that running answers get to finish when the server is stopped"""


# setting: its least value
LEAST = {
    "port": 0,
    "slots": 1,
    "queue": 1,
    "context": 0,
    "max_tokens": 1,
    "body_kib": 1,
    "connections": 1,
    "seconds": 0.1,
    "body_seconds": 0.1,
    "idle_seconds": 0.1,
    "grace": 0,
}


@dataclass(frozen=True)
class ServeSettings(Which, Writing, Doors, Crowd, Patience):
    """Serve a trained model: a chat page at /, an OpenAI-compatible API under /v1, /health and
    /metrics.
    """

    def __post_init__(self):
        # told now, before a model is loaded
        for name, low in LEAST.items():
            if getattr(self, name) < low:
                raise UserError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if self.port > 65535:
            raise UserError(f"port must be at most 65535, not {self.port}")

        # the token goes through a browser
        if not (self.token.isascii() and self.token.isprintable() and " " not in self.token):
            raise UserError(
                "the token must be printable ASCII without blanks: browsers can't send any other "
                "in a header"
            )
        # one that is written otherwise would never match
        for origin in self.origins:
            if not re.fullmatch(r"\*|https?://[^/\s]+", origin):
                raise UserError(
                    f"{origin!r} is no origin: write it as a browser does, without a path, like "
                    "https://chat.example.org, or * for all"
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
                "--token (auto makes one), or say --insecure if that is what you want"
            )
