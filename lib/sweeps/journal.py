"""One folder holds a sweep; its state is what all workers wrote, read together.

    sweep.json           the sweep, constants included: all that a further worker needs
    journal/WORKER.jsonl what that worker did, one event a line; only that worker ever writes to it
    journal/WORKER.lock  locked while the worker lives
    lock                 held while a worker decides what it takes

Because no two write to one file, a folder that is merely synchronised (Drive) loses nothing. Where
locks work (a disk, NFS) two workers never take the same trial. Where they don't, both may, when
they choose within the time the folder needs to synchronise: then the earlier claim holds, the other
worker finds out at its next report and leaves the trial, and only one result ever counts.
"""

import contextlib
import errno
import itertools
import math
import os
import re
import socket
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from lib import locks
from lib.files import UserError, parse_json, read_json, to_json, write_json, writing
from lib.sweeps import space

FORMAT = 1
# seconds without a sign of life after which a worker on another machine counts as dead
LEASE = 150.0
BEAT = 20.0  # seconds between signs of life
# workers that may die one after another on a trial that gets no further: then it counts as failed
TRIES = 3
ENDS = ("done", "pruned", "failed")


@dataclass
class Trial:
    """One assignment and what became of it.

    state: running, lost (its worker died or gave it back: to be taken again), done, pruned or
    failed.
    """

    id: str
    number: int
    assignment: dict  # the varied parameters
    state: str = "running"
    worker: str = ""
    tries: int = 1  # how often it was begun
    deaths: int = 0  # workers that died on it, one after another, without getting it any further
    reached: int = 0  # the furthest step that any of them came to
    begun: float = 0.0
    ended: float | None = None
    value: float | None = None
    reason: str = ""
    reports: dict = field(default_factory=dict)  # {step: metric}
    curve: list = field(default_factory=list)  # (step, training loss) pairs
    facts: dict = field(default_factory=dict)  # numbers about the run
    came_from: int = 0  # how far it had come when its present worker took it

    @property
    def scored(self) -> bool:
        """Whether it finished with a number that can be compared."""
        return self.state == "done" and self.value is not None and math.isfinite(self.value)

    @property
    def hopeless(self) -> bool:
        """Whether so many workers died on it in vain that it is not tried again."""
        return self.deaths >= TRIES

    def lose(self):
        """Its worker died: that counts against it only where it came no further."""
        self.deaths = 0 if self.reached > self.came_from else self.deaths + 1
        self.state = "lost"


def create(folder, spec: dict) -> dict:
    """Make the sweep's folder, or check that what is there is this sweep; returns the sweep as
    stored.
    """
    folder = Path(folder)
    with writing(folder):
        (folder / "journal").mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.json"
    if not path.exists():
        write_json(path, dict(format=FORMAT, sweep=spec))
        return spec

    # another worker was here before
    stored = read(folder)
    if stored != spec:
        raise UserError(
            f"{folder} holds another sweep: take another folder, or join that one by its id"
        )
    return stored


def read(folder) -> dict:
    """The checked sweep in a folder."""
    path = Path(folder) / "sweep.json"
    if not path.exists():
        raise UserError(
            f"no sweep in {folder}: "
            "start one, or give the id and place that the first worker printed"
        )
    cure = "restore it, or start the sweep in another folder"
    record = read_json(path, cure=cure)
    version = record.get("format")
    if version != FORMAT:
        raise UserError(f"{path} is of format {version}, this version reads {FORMAT}: {cure}")

    # checked again: people edit files
    try:
        return space.check(record.get("sweep"))
    except UserError as e:
        raise UserError(f"{path} is damaged ({e}): {cure}") from None


def host() -> str:
    """This machine since it was started: the scope within which file locks say who is alive."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}:{boot[:8]}"
    return socket.gethostname()


class Journal:
    """A worker's place in a sweep's folder; a context manager. Everything it writes is on disk when
    the call returns.

    While it is open a thread gives signs of life. `lease`, `beat`: seconds, see LEASE and BEAT.
    """

    def __init__(self, folder, worker: str = "", *, lease: float = LEASE, beat: float = BEAT):
        self.folder, self.lease, self.beat = Path(folder), lease, beat

        # a name that no other worker has, on whatever machine
        name = re.sub(r"\W", "-", worker or socket.gethostname())
        self.worker = f"{name[:40]}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.path = self.folder / "journal" / f"{self.worker}.jsonl"
        self._lock, self._stop, self._seq = threading.Lock(), threading.Event(), 0

        # on this machine the lock says that we live, on others the heartbeat does
        with writing(self.path):
            self._alive = locks.open_lock(self.path.with_suffix(".lock"))
        locks.take(self._alive, wait=False)
        self.write("worker", host=host())
        self._thread = threading.Thread(target=self._beats, daemon=True, name="sweep-heartbeat")
        self._thread.start()

    def _beats(self):
        """Give signs of life until the journal is closed."""
        while not self._stop.wait(self.beat):
            # a disk that is full or away for a while: the next one may succeed
            with contextlib.suppress(OSError, UserError):
                self.write("beat")

    def write(self, what: str, **entries):
        """Append one event."""
        with self._lock, writing(self.path):
            self._seq += 1
            event = dict(e=what, t=time.time(), n=self._seq) | entries
            data = to_json(event, indent=None).encode() + b"\n"

            # opened anew each time: a synchronised folder uploads what is closed
            with open(self.path, "ab", buffering=0) as f:
                size = f.tell()
                try:
                    written = f.write(data)
                    if written < len(data):
                        raise OSError(errno.ENOSPC, "there was room for a part of it only")
                    os.fsync(f.fileno())
                # half a line would spoil the next one
                except OSError:
                    f.truncate(size)
                    raise

    @contextlib.contextmanager
    def deciding(self):
        """While this is held, no other worker on a file system with locks takes anything."""
        with writing(self.folder), locks.open_lock(self.folder / "lock") as f:
            locks.take(f, wait=True)
            yield

    def close(self):
        self._stop.set()
        self._thread.join()
        self._alive.close()
        with contextlib.suppress(OSError):
            self.path.with_suffix(".lock").unlink()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    # ---- the state -------------------------------------------------------------------------------

    def trials(self) -> list[Trial]:
        """All trials by age, from everything that is in the journals now."""
        return trials(self.folder, self.lease, me=self.worker)

    def claim(self, assignment: dict, tries: int = 1, id: str = "") -> str:
        """Take an assignment; `tries` counts how often it was begun, this time included."""
        id = id or space.key(assignment)
        self.write("claim", id=id, a=assignment, tries=tries)
        return id

    def report(self, id: str, step: int, value: float):
        """Tell of a validation."""
        self.write("report", id=id, step=step, value=value)

    def saved(self, id: str, step: int):
        """Tell of a checkpoint: whoever takes the trial over begins there."""
        self.write("saved", id=id, step=step)

    def end(
        self, id: str, state: str, value: float | None = None, reason: str = "", curve=(), **facts
    ):
        """Say the last word on a trial: done, pruned or failed. curve: (step, training loss) pairs
        to draw.
        """
        assert state in ENDS, state
        self.write(
            "end", id=id, state=state, value=value, reason=reason, curve=list(curve), facts=facts
        )

    def free(self, id: str):
        """Give a trial back unfinished: any worker may take it at once."""
        self.write("free", id=id)


# ---- reading what all workers wrote --------------------------------------------------------------

# what each kind of event must hold beside its name (e), time (t) and number (n)
NUMBER = int | float | None
EVENTS = {
    "worker": dict(host=str),
    "claim": dict(id=str, a=dict, tries=int),
    "report": dict(id=str, step=int, value=NUMBER),
    "saved": dict(id=str, step=int),
    "end": dict(id=str, state=str, value=NUMBER, reason=str, curve=list, facts=dict),
    "free": dict(id=str),
}


def _is_event(event) -> bool:
    """Whether a line holds an event that a worker could have written."""
    if not isinstance(event, dict) or not isinstance(event.get("e"), str):
        return False

    # all have a time and a number; a beat has no more, nor need a kind that a later version writes
    what = event["e"]
    needed = EVENTS.get(what, {}) | dict(t=int | float, n=int)
    for name, kind in needed.items():
        if name not in event or not isinstance(event[name], kind):
            return False

    # what types alone do not say
    if what == "end" and event["state"] not in ENDS:
        return False
    for point in event.get("curve", ()):
        if not isinstance(point, list) or len(point) != 2:
            return False
    return math.isfinite(event["t"])


def _events(folder):
    """(worker, its events) of every journal.

    A last line without its end was cut by a crash, or is being written or synchronised right now:
    it counts as not there.
    """
    for path in sorted((Path(folder) / "journal").glob("*.jsonl")):
        # gone while the folder is synchronised, or never a journal
        if not path.is_file():
            continue
        events = []
        lines = path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                event = parse_json(line, path, expect=None)
            except UserError:
                event = None
            if not _is_event(event):
                raise UserError(f"{path} line {number} is not an event: remove that line")
            events.append(event)
        yield path.stem, events


def _dead(folder, worker: str, events: list, lease: float, me: str) -> bool:
    """Whether a worker has ended: by its lock on the same machine, by its silence on another."""
    if worker == me:
        return False

    # here: its lock is free, or was taken away when it ended; where locks do not work, see below
    if events[0].get("host") == host():
        lock = Path(folder) / "journal" / f"{worker}.lock"
        try:
            with open(lock, "r+b", buffering=0) as f:
                free = locks.take(f, wait=False)
        except FileNotFoundError:
            return True
        except OSError:
            free = None
        if free is not None:
            return free

    # elsewhere: nothing was heard of it for too long
    silence = time.time() - events[-1]["t"]
    return silence > lease


def trials(folder, lease: float = LEASE, me: str = "") -> list[Trial]:
    """The trials of a sweep, oldest first: a function of the journals (and of who is alive) alone.

    A trial belongs to its first claim, or to the first one that counts one try more (made by
    whoever found it lost). Its first end is its end. What others say of it is ignored.
    """
    # what was claimed, and what those who claimed it say
    journals = {worker: events for worker, events in _events(folder) if events}
    known: dict[str, Trial] = {}
    for t, worker, event in _in_order(journals):
        if event["e"] == "claim":
            _claim(known, event, worker, t)
        elif event.get("id") in known:
            _tell(known[event["id"]], event, worker, t)

    # what is in the hands of the dead is lost
    running = [trial for trial in known.values() if trial.state == "running"]
    workers = {trial.worker for trial in running}
    dead = {w for w in workers if _dead(folder, w, journals[w], lease, me)}
    for trial in running:
        if trial.worker in dead:
            trial.lose()
    return list(known.values())


def _in_order(journals: dict) -> list[tuple]:
    """(time, worker, event) of all journals by age.

    A clock that was set back does not reorder what one worker did.
    """
    ordered = []
    for worker, events in journals.items():
        # never before what the same worker did earlier
        times = itertools.accumulate((event["t"] for event in events), max)
        for t, event in zip(times, events):
            ordered.append((t, worker, event["n"], event))
    ordered.sort(key=lambda entry: entry[:3])
    return [(t, worker, event) for t, worker, _, event in ordered]


def _claim(known: dict[str, Trial], event: dict, worker: str, t: float):
    """A worker begins a trial, or takes over one whose worker was lost."""
    id, tries = event["id"], event["tries"]
    trial = known.get(id)

    # the first claim makes the trial; a later one holds only if it counts a try more
    if trial is None:
        known[id] = Trial(id, len(known), event["a"], worker=worker, begun=t, tries=tries)
    elif tries > trial.tries and trial.state not in ENDS:
        # nobody gave it back: its worker died
        if trial.state == "running":
            trial.lose()
        trial.worker, trial.begun, trial.tries = worker, t, tries
        trial.state, trial.reports, trial.came_from = "running", {}, trial.reached


def _tell(trial: Trial, event: dict, worker: str, t: float):
    """What a worker says of a trial; that counts where the trial is its own, an end always, and
    nothing after the end.
    """
    what, own = event["e"], worker == trial.worker
    if trial.state in ENDS:
        return
    if what == "end":
        trial.state, trial.reason, trial.ended = event["state"], event["reason"], t
        trial.worker, trial.value, trial.facts = worker, event["value"], event["facts"]
        trial.curve = [(step, _number(loss)) for step, loss in event["curve"]]
    elif what == "free" and own:
        trial.state, trial.deaths = "lost", 0
    elif what in ("report", "saved") and own:
        trial.reached = max(trial.reached, event["step"])
        if what == "report":
            trial.reports[event["step"]] = _number(event["value"])


def _number(value: float | None) -> float:
    """A number as JSON keeps it, which has no name for nan."""
    return math.nan if value is None else value
