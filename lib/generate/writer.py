"""The host's side of one row that is being written: tool calls, stop tokens and stop strings."""

from collections.abc import Callable
from typing import Any, NamedTuple

from lib.generate.sampling import Sampling


class Token(NamedTuple):
    """One new token.

    logprob is the model's own, before temperature and filters. Forced tokens came from a tool.
    top: the likeliest (id, logprob) pairs, as many as Sampling.logprobs asked for.
    """

    id: int
    logprob: float
    forced: bool = False
    top: list[tuple[int, float]] = []


class Writer:
    """What becomes of a row's tokens: `push` takes each, and those that may be shown are `ready`.

    finish: None while the row goes on, then "stop" or "length". forced: ids that the row must take
    next, a tool's answer.
    """

    def __init__(
        self,
        sampling: Sampling,
        tokenizer: Any = None,
        tool: Callable[[str], str | None] | None = None,
    ):
        self.sampling = sampling
        self.tokenizer = tokenizer
        self.tool = tool
        self.special = tokenizer.special if tool else {}
        self.stops = [text.encode() for text in sampling.stop_strings]
        # ids since <|python_start|>, or None outside of a call
        self.call: list[int] | None = None
        self.forced: list[int] = []
        # tokens that may turn out to be the beginning of a stop string
        self.held: list[Token] = []
        self.ready: list[Token] = []
        self.made = 0
        self.finish: str | None = None

    def take_ready(self) -> list[Token]:
        """The tokens that were let out since the last time."""
        ready, self.ready = self.ready, []
        return ready

    def push(self, token: Token):
        """Take the row's next token; run the tool when it ends a call."""
        self.made += 1
        if token.forced:
            self.forced.pop(0)
        elif token.id in self.sampling.stop:
            if self.sampling.keep_stop:
                self.held.append(token)
            self._close("stop")
            return

        # a stop string may end the row here, and so may its length
        self._let_out(token)
        if self.finish is None and self.made == self.sampling.max_tokens:
            self._close("length")
        if self.finish is None and self.tool:
            self._follow_call(token.id, self.tool)

    def _close(self, reason: str):
        """End the row; what was held back was no stop string."""
        self.ready += self.held
        self.held = []
        self.finish = reason

    def _follow_call(self, id: int, tool: Callable[[str], str | None]):
        """The state machine of tool calls: the same on sampled and on forced ids."""
        if id == self.special["<|python_start|>"]:
            self.call = []
        elif self.call is None:
            return
        elif id == self.special["<|python_end|>"]:
            expression = self.tokenizer.decode(self.call)
            answer = tool(expression) if self.call else None
            self.call = None
            if answer is not None:
                first = self.special["<|output_start|>"]
                last = self.special["<|output_end|>"]
                self.forced = [first, *self.tokenizer.encode(answer), last]
        else:
            self.call.append(id)

    def _let_out(self, token: Token):
        """Let a token out, unless it may belong to a stop string, wherever that crosses tokens."""
        # not the model's own, within a call, which nobody hears, or no text
        silent = not self.stops or token.forced or self.call is not None
        if silent or token.id >= len(self.tokenizer.tokens):
            self.ready += [*self.held, token]
            self.held = []
            return

        # as bytes: a stop string may begin or end within a token
        self.held.append(token)
        parts = [self.tokenizer.tokens[held.id] for held in self.held]
        text = b"".join(parts)
        stops_at = [text.find(stop) for stop in self.stops if stop in text]
        if stops_at:
            self._let_out_before(min(stops_at), split=True)
            self.held = []
            self.finish = "stop"
        else:
            self._let_out_before(len(text) - self._open_end(text))

    def _open_end(self, text: bytes) -> int:
        """Bytes at the end of the text that could begin a stop string: the most."""
        longest = 0
        for stop in self.stops:
            for n in range(1, len(stop)):
                if text.endswith(stop[:n]):
                    longest = max(longest, n)
        return longest

    def _let_out_before(self, end: int, split: bool = False):
        """Let out the held tokens within the first `end` bytes; split: part of the next one too."""
        while self.held:
            first = self.tokenizer.tokens[self.held[0].id]
            if len(first) > end:
                break
            self.ready.append(self.held.pop(0))
            end -= len(first)
        if split and end:
            # a stop string begins inside a token: what is before it becomes tokens of its own
            before = self.tokenizer.encode_bytes(first[:end])
            self.ready += [self.held[0]._replace(id=id, top=[]) for id in before]
