"""One folder holds a sweep; its state is what all workers wrote, read together.

    sweep.json           the sweep, constants included: all that a further worker needs
    journal/WORKER.jsonl what that worker did, one event a line; only that worker ever writes to it
    journal/WORKER.lock  locked while the worker lives
    lock                 held while a worker decides what it takes

Because no two write to one file, a folder that is merely synchronised (Drive) loses nothing. Where locks work (a disk, NFS) two
workers never take the same trial. Where they don't, both may, when they choose within the time the folder needs to synchronise:
then the earlier claim holds, the other worker finds out at its next report and leaves the trial, and only one result ever counts.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import socket
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from lib.files import UserError, write_json, writing
from lib.sweeps import space

FORMAT = 1
# seconds without a sign of life after which a worker on another machine counts as dead
LEASE = 150.0
BEAT = 20.0  # seconds between signs of life
TRIES = 3  # workers that may die on one trial before it counts as failed
ENDS = ("done", "pruned", "failed")


@dataclass
class Trial:
    """One assignment and what became of it.

    state: running, lost (its worker died or gave it back: to be taken again), done, pruned or failed. `assignment` holds the
    varied parameters, `reports` {step: metric}, `facts` numbers about the run, `tries` how often it was
    begun, `freed` how often of these it was given back rather than lost with its worker, `curve` (step, training loss) pairs.
    """

    id: str
    number: int
    assignment: dict
    state: str = "running"
    worker: str = ""
    tries: int = 1
    freed: int = 0
    begun: float = 0.0
    ended: float | None = None
    value: float | None = None
    reason: str = ""
    reports: dict = field(default_factory=dict)
    curve: list = field(default_factory=list)
    facts: dict = field(default_factory=dict)


def create(folder, spec: dict) -> dict:
    """Make the sweep's folder, or check that what is there is this sweep; returns the sweep as stored."""
    folder = Path(folder)
    with writing(folder):
        (folder / "journal").mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.json"
    if path.exists():
        there = read(folder)
        if there != spec:
            raise UserError(
                f"{folder} holds another sweep: take another folder, or join that one by its id"
            )
        return there
    write_json(path, dict(format=FORMAT, sweep=spec))
    return spec


def read(folder) -> dict:
    """The checked sweep in a folder."""
    path = Path(folder) / "sweep.json"
    try:
        record = json.loads(path.read_text())
        if record["format"] != FORMAT:
            raise UserError(f"{path} is of format {record['format']}, this version reads {FORMAT}")
        return space.check(record["sweep"])
    except FileNotFoundError:
        raise UserError(
            f"no sweep in {folder}: start one, or give the id and place that the first worker printed"
        ) from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{path} is damaged ({e}): restore it, or start the sweep in another folder"
        ) from None


def host() -> str:
    """This machine since it was started: the scope within which file locks say who is alive."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}:{Path('/proc/sys/kernel/random/boot_id').read_text().strip()[:8]}"
    return socket.gethostname()


def _flock(file, wait: bool) -> bool | None:
    """True once locked, False where another holds it, None where this file system has no locks."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


class Journal:
    """A worker's place in a sweep's folder; a context manager. Everything it writes is on disk when the call returns.

    While it is open a thread gives signs of life. `lease`, `beat`: seconds, see LEASE and BEAT.
    """

    def __init__(self, folder, worker: str = "", *, lease: float = LEASE, beat: float = BEAT):
        self.folder, self.lease, self.beat = Path(folder), lease, beat
        name = re.sub(r"\W", "-", worker or socket.gethostname())
        self.worker = f"{name[:40]}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.path = self.folder / "journal" / f"{self.worker}.jsonl"
        self._lock, self._stop, self._seq = threading.Lock(), threading.Event(), 0
        with writing(self.path):
            self._alive = open(self.path.with_suffix(".lock"), "w")
        _flock(self._alive, wait=False)
        self.write("worker", host=host())
        self._thread = threading.Thread(target=self._beats, daemon=True, name="sweep-heartbeat")
        self._thread.start()

    def _beats(self):
        while not self._stop.wait(self.beat):
            # a disk that is full or away for a while: the next one may succeed
            with contextlib.suppress(OSError, UserError):
                self.write("beat")

    def write(self, what: str, **entries):
        """Append one event."""
        with self._lock, writing(self.path):
            self._seq += 1
            row = dict(e=what, t=time.time(), n=self._seq) | entries
            data = json.dumps(row).encode() + b"\n"
            # opened anew each time: a synchronised folder uploads what is closed
            with open(self.path, "ab", buffering=0) as f:
                size = f.tell()
                try:
                    if f.write(data) < len(data):
                        raise OSError(errno.ENOSPC, "there was room for a part of it only")
                    os.fsync(f.fileno())
                except OSError:
                    f.truncate(size)  # half a line would spoil the next one
                    raise

    @contextlib.contextmanager
    def deciding(self):
        """While this is held, no other worker on a file system with locks takes anything."""
        with writing(self.folder), open(self.folder / "lock", "w") as f:
            _flock(f, wait=True)
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

    # ---- the state ---------------------------------------------------------------------------------------------------

    def trials(self) -> list[Trial]:
        """All trials by age, from everything that is in the journals now."""
        return trials(self.folder, self.lease, me=self.worker)

    def claim(self, assignment: dict, tries: int = 1, id: str = "") -> str:
        """Take an assignment; `tries` counts how often it was begun, this time included."""
        id = id or space.key(assignment)
        self.write("claim", id=id, a=assignment, tries=tries)
        return id

    def report(self, id: str, step: int, value: float):
        self.write("report", id=id, step=step, value=value)

    def end(
        self, id: str, state: str, value: float | None = None, reason: str = "", curve=(), **facts
    ):
        """The last word on a trial: done, pruned or failed. curve: (step, training loss) pairs to draw."""
        assert state in ENDS, state
        self.write(
            "end", id=id, state=state, value=value, reason=reason, curve=list(curve), facts=facts
        )

    def free(self, id: str):
        """Give a trial back unfinished: any worker may take it at once."""
        self.write("free", id=id)


def _events(folder):
    """(worker, its events) of every journal. A last line without its end was cut by a crash, or is being written or
    synchronised right now: it counts as not there."""
    for path in sorted((Path(folder) / "journal").glob("*.jsonl")):
        events = []
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:  # a folder that is being synchronised
            continue
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                events.append(json.loads(line))
            except ValueError:
                raise UserError(f"{path} line {number} is not an event: remove that line") from None
        yield path.stem, events


def _dead(folder, worker: str, events: list, lease: float, me: str) -> bool:
    """Whether a worker has ended: by its lock on the same machine, by its silence on another."""
    if worker == me:
        return False
    if events[0].get("host") == host():
        try:
            with open(Path(folder) / "journal" / f"{worker}.lock", "r+") as f:
                got = _flock(f, wait=False)
        except FileNotFoundError:
            return True
        except OSError:
            got = None
        if got is not None:
            return got
    return time.time() - events[-1]["t"] > lease


def trials(folder, lease: float = LEASE, me: str = "") -> list[Trial]:
    """The trials of a sweep, oldest first: a function of the journals (and of who is alive) alone.

    A trial belongs to its first claim, or to the first one that counts one try more (made by whoever found it lost). Its first
    end is its end. What others say of it is ignored.
    """
    journals = dict(_events(folder))
    dead = {
        worker: _dead(folder, worker, events, lease, me)
        for worker, events in journals.items()
        if events
    }
    rows = []
    # a clock that was set back does not reorder what one worker did
    for worker, events in journals.items():
        times = itertools.accumulate((e["t"] for e in events), max)
        rows += [(t, worker, e["n"], e) for t, e in zip(times, events)]
    rows.sort(key=lambda row: row[:3])
    found: dict[str, Trial] = {}
    for t, worker, _, e in rows:
        if e["e"] == "claim":
            trial = found.get(e["id"])
            if trial is None:
                found[e["id"]] = Trial(
                    e["id"], len(found), e["a"], worker=worker, begun=t, tries=e["tries"]
                )
            elif e["tries"] > trial.tries and trial.state not in ENDS:
                trial.worker, trial.begun, trial.tries, trial.state, trial.reports = (
                    worker,
                    t,
                    e["tries"],
                    "running",
                    {},
                )
        elif "id" in e and (trial := found.get(e["id"])) and trial.state not in ENDS:
            if e["e"] == "report" and worker == trial.worker:
                trial.reports[e["step"]] = e["value"]
            elif e["e"] == "free" and worker == trial.worker:
                trial.state, trial.freed = "lost", trial.freed + 1
            elif e["e"] == "end":
                trial.state, trial.value, trial.reason, trial.ended = (
                    e["state"],
                    e["value"],
                    e["reason"],
                    t,
                )
                trial.worker, trial.curve, trial.facts = worker, e["curve"], e["facts"]
    for trial in found.values():
        if trial.state == "running" and dead[trial.worker]:
            trial.state = "lost"
    return list(found.values())
