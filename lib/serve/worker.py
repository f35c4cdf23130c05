"""The thread that owns the decoding engine, where everybody's answers are written together."""

import collections
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from lib.files import UserError
from lib.generate import Engines, Sampling
from lib.generate.engine import NARROWEST, PREFILL, bucket, pad_to
from lib.serve.api import ApiError
from lib.serve.counters import Counters

# answers begun between two steps: the others wait meanwhile
ADMIT = 4

# (rows, tokens) of a prefill
Shape = tuple[int, int]


@dataclass(eq=False)
class Job:
    """One answer to be written. `deliver(tokens, reason)` is called with what is new: a list of
    tokens, and why it ended or None.

    reason: stop or length as the engine says, "time" past `deadline` (time.monotonic), or an
    ApiError.
    """

    prompt: list[int]
    sampling: Sampling
    deliver: Callable
    deadline: float
    cancelled: bool = False


# ---- warming up ----------------------------------------------------------------------------------


def shapes(engine: Engines) -> list[Shape]:
    """Every shape that prompts are prefilled in, the first to be needed first.

    One row of any length, then several rows together.
    """
    lengths = sorted({bucket(n, NARROWEST) for n in range(1, PREFILL + 1)})
    # a prompt's last token is not prefilled, and its answer needs room behind it
    lengths = [length for length in lengths if length + 1 < engine.length]
    most = min(ADMIT, engine.parts[0].slots)
    counts = sorted({bucket(n) for n in range(1, most + 1)})
    return [(rows, length) for rows in counts if rows <= most for length in lengths]


def widest(engine: Engines) -> int:
    """The length of one row's prefill that serves all prompts."""
    return max((length for rows, length in shapes(engine) if rows == 1), default=NARROWEST)


def warm_up(engine: Engines, shape: Shape | None = None):
    """Answer prompts of one shape into the void, so that no guest waits for what that compiles.

    shape: None for the one that serves all prompts until the others are compiled. UserError if the
    model computes no numbers.
    """
    rows, length = shape or (1, 0)
    pad_to(engine, NARROWEST if shape else widest(engine))
    # parts of one engine share what they compile, so that one of them is enough
    part = engine.parts[0]
    # equal prompts would be prefilled only once
    prompts = [[row] * (length + 1) for row in range(rows)]
    slots = part.add_many(prompts, [Sampling(max_tokens=1)] * rows)
    part.step()
    # the slots are free again before anybody asks
    for slot in slots:
        part.cancel(slot)


def warm_up_copies(engine: Engines):
    """The same for several answers to one prompt, which is prefilled once and copied."""
    part = engine.parts[0]
    if part.slots > 1:
        for slot in part.add_many([[0], [0]], [Sampling(max_tokens=1)] * 2):
            part.cancel(slot)


# ---- the thread ----------------------------------------------------------------------------------


class EngineThread:
    """A thread that writes jobs in an engine, as many together as it has slots, in the order they
    came.

    If the engine fails, every job gets an error, `failed` holds the exception and on_failure() is
    called: nothing more is written.
    """

    def __init__(
        self,
        engine: Engines,
        queue: int,
        metrics: Counters,
        on_failure: Callable[[], None] = lambda: None,
    ):
        self.engine = engine
        self.queue = queue
        self.metrics = metrics
        self.on_failure = on_failure

        # the line, and what is being written
        self.waiting: collections.deque[Job] = collections.deque()
        self.busy: dict[int, Job] = {}  # by slot
        self.wake = threading.Condition()
        self.closing = False
        self.failed: Exception | None = None

        # what was not compiled yet; the last is the next
        self.cold = shapes(engine)[::-1]
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- called by anybody

    def submit(self, jobs: list[Job]):
        """Line up all of `jobs` or none: ApiError if the line is too long, or if nothing is written
        any more.
        """
        with self.wake:
            # nothing is written any more
            if self.closing:
                raise ApiError(503, "the server is shutting down", code="unavailable")
            if self.failed:
                raise ApiError(503, _blame(self.failed), code="unavailable")

            # more than could ever wait, and more than can wait now
            if len(jobs) > self.queue:
                raise ApiError(
                    400,
                    f"this asks for {len(jobs)} answers at once and the server takes {self.queue}: "
                    "ask for fewer",
                    code="too_many_answers",
                )
            if len(self.waiting) + len(jobs) > self.queue:
                raise ApiError(
                    429,
                    f"too many people are waiting ({len(self.waiting)} answers): try again in a "
                    "moment",
                    code="queue_full",
                    headers={"Retry-After": "2"},
                )
            self.waiting.extend(jobs)
            self.wake.notify()

    def cancel(self, jobs: list[Job]):
        """Forget jobs; those that are being written end at the next step.

        Finished ones don't mind.
        """
        with self.wake:
            for job in jobs:
                # the engine's thread looks at this between two steps
                job.cancelled = True
                if job in self.waiting:
                    self.waiting.remove(job)

    def end(self):
        """Let the thread end after the step it is at; whatever was not finished gets an error."""
        with self.wake:
            self.closing = True
            self.wake.notify()

    def close(self):
        """`end`, and wait for it."""
        self.end()
        if self.thread.is_alive():
            self.thread.join()

    # ---- in the thread

    def _run(self):
        try:
            while self._turn():
                pass
            error = ApiError(503, "the server was stopped", code="unavailable")
        except Exception as e:
            self.failed = e
            error = ApiError(500, _blame(e), code="engine_failed")
            _log(e)

        # nobody waits for ever
        with self.wake:
            left = [*self.busy.values(), *self.waiting]
            self.busy, self.waiting = {}, collections.deque()
        for job in left:
            job.deliver([], error)
        if self.failed:
            self.on_failure()

    def _turn(self) -> bool:
        """Let jobs in and out, then write a little; False when it is time to end."""
        with self.wake:
            while not (self.waiting or self.busy or self.closing or self.cold):
                self.wake.wait()
            if self.closing:
                return False
            # what changes the line happens under the lock, what takes long outside of it
            idle = not (self.waiting or self.busy)
            now = time.monotonic()
            late = self._take_late(now)
            new = self._take_next()

        if idle:
            self._warm_up()
            return True
        # those who leave, those who come, and a few tokens for all who are there
        for job in late:
            why = "no slot became free in time: try again later"
            job.deliver([], ApiError(503, why, code="timeout", headers={"Retry-After": "10"}))
        self._drop(now)
        self._begin(new)
        self._write()
        return True

    def _take_late(self, now: float) -> list[Job]:
        """Jobs that have waited too long, out of the line."""
        late = [job for job in self.waiting if job.deadline < now]
        for job in late:
            self.waiting.remove(job)
        return late

    def _take_next(self) -> list[Job]:
        """Jobs that may begin, out of the line."""
        count = min(ADMIT, self.engine.free, len(self.waiting))
        return [self.waiting.popleft() for _ in range(count)]

    def _warm_up(self):
        """Compile the next shape while nobody asks for anything."""
        warm_up(self.engine, self.cold[-1])
        if len(self.cold) == 1:
            warm_up_copies(self.engine)
        # only now, so that whoever waits for a warm server sees one
        self.cold.pop()

    def _drop(self, now: float):
        """Free the slots of answers that nobody wants, or that have taken too long."""
        for slot, job in list(self.busy.items()):
            if not job.cancelled and job.deadline >= now:
                continue
            self.engine.cancel(slot)
            del self.busy[slot]
            if not job.cancelled:
                job.deliver([], "time")

    def _begin(self, jobs: list[Job]):
        """Give jobs their slots."""
        # As long as the shapes of several rows are not compiled, one after the other: so the first
        # crowd of a cold server does not wait for the compiler.
        # Each is padded to the one shape that was compiled before anybody could ask.
        together = 1 if self.cold else ADMIT
        pad_to(self.engine, widest(self.engine) if self.cold else NARROWEST)
        for start in range(0, len(jobs), together):
            group = jobs[start : start + together]
            prompts = [job.prompt for job in group]
            slots = self.engine.add_many(prompts, [job.sampling for job in group])
            self.busy |= zip(slots, group)

    def _write(self):
        """Write some tokens of every answer and hand them out."""
        for slot, (tokens, reason) in self.engine.step().items():
            job = self.busy[slot]
            if reason:
                del self.busy[slot]
            self.metrics.add("rawchat_completion_tokens_total", len(tokens))
            if not job.cancelled and (tokens or reason):
                job.deliver(tokens, reason)


def _blame(error: Exception) -> str:
    """What people are told of a failed engine: all of a sentence that is meant for them."""
    if isinstance(error, UserError):
        return str(error)
    return "the model failed; the server's log says how"


def _log(error: Exception):
    """The same for the one who runs the server: with a traceback, unless a sentence says all."""
    if isinstance(error, UserError):
        print(f"Error: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
