"""Drivers say what to train next, hear how it goes and say when to stop: the journal's folder, or
a wandb server.

Both keep the journal, so that tables, pictures and resuming work the same way, and both have
    take(count, stop)            trials to train now; [] when the sweep is over or stop() says so
    report(trial, step, values)  a validation: "" to go on, "pruned" or "lost" to stop
    saved(trial, step)           a checkpoint, from which whoever takes the trial over goes on
    poll(trial)                  what report asks, without news; cheap enough for every step
    end(trial, state, …)         done, pruned or failed
    free(trial), drop(trial)     given back for anyone; left to the worker that has it now
    close()                      leave nothing open
"""

import json
import math
import time
import zlib
from typing import Any

from lib.files import UserError, first_line
from lib.sweeps import space
from lib.sweeps.hyperband import should_stop
from lib.sweeps.journal import BEAT, ENDS, TRIES, Journal, Trial
from lib.sweeps.server import AGENT, HEARTBEAT, SweepServer
from lib.sweeps.suggest import ask

# why a trial of wandb's ended that has the assignment of an earlier one
NOT_AGAIN = "not trained again"
POLL = 2.0  # seconds between looks at the folder while all that is left is in others' hands
HOPELESS = (
    f"its worker died {TRIES} times without getting any further, most often for lack of memory"
)


class Local:
    """Any number of workers on one folder; no account, no server."""

    def __init__(self, book: Journal, spec: dict, say=print):
        self.book, self.spec, self.say = book, spec, say

    def take(self, count: int = 1, stop=lambda: False) -> list[Trial]:
        waiting = False
        while not stop():
            with self.book.deciding():
                taken = self._take(count)
                trials = self.book.trials()
            running = [t for t in trials if t.state == "running"]

            # without working locks another worker may have been first: its claim holds then
            if taken:
                own = {t.id: t for t in running if t.worker == self.book.worker}
                claimed = [own[id] for id in taken if id in own]
                if claimed:
                    return claimed
                continue

            # the sweep is over once nobody trains: until then a worker may die and leave its trial
            if not running:
                return []
            if not waiting:
                workers = {t.worker for t in running}
                self.say(
                    f"nothing left to begin; waiting for {len(running)} trial(s) of "
                    f"{len(workers)} other worker(s), to take over what is lost "
                    "(interrupt to leave)"
                )
                waiting = True
            time.sleep(POLL)
        return []

    def _take(self, count: int) -> list[str]:
        """The ids of up to `count` trials that were claimed: lost ones first, then new ones."""
        trials, taken = self.book.trials(), []

        # what others have left, but not what several have died of
        for t in trials:
            if t.state != "lost" or len(taken) == count:
                continue
            if t.hopeless:
                self.book.end(t.id, "failed", reason=HOPELESS)
            else:
                taken.append(self.book.claim(t.assignment, t.tries + 1, t.id))

        # the seed needs no luck between workers: a draw depends on the number of trials too
        seed = zlib.crc32(space.key(self.spec).encode())
        while len(taken) < count and len(trials) < space.limit(self.spec):
            assignment = ask(self.spec, trials, seed)
            if assignment is None:
                break
            taken.append(self.book.claim(assignment))
            trials = self.book.trials()
        return taken

    def report(self, trial: Trial, step: int, values: dict) -> str:
        self.book.report(trial.id, step, values[self.spec["metric"]["name"]])
        trials = self.book.trials()
        now = next(t for t in trials if t.id == trial.id)

        # silent for too long, and taken over by another
        if now.worker != self.book.worker or now.state != "running":
            return "lost"
        return "pruned" if should_stop(self.spec, trials, now) else ""

    def saved(self, trial: Trial, step: int):
        self.book.saved(trial.id, step)

    def poll(self, trial: Trial) -> str:
        return ""

    def end(self, trial: Trial, state: str, value=None, reason: str = "", curve=(), **facts):
        self.book.end(trial.id, state, value, reason, curve, **facts)

    def free(self, trial: Trial):
        self.book.free(trial.id)

    def drop(self, trial: Trial):
        """Leave a trial that belongs to another worker now."""

    def close(self):
        """Nothing is held outside the journal."""


# ---- wandb ---------------------------------------------------------------------------------------


class Wandb:
    """A worker of a wandb sweep, inside this process.

    start_run(trial id, assignment, stop) begins the wandb run that belongs to a trial and returns
    (log(step, {name: value}), finish(exit code)); stop() may be called from any thread when the
    server wants the run stopped. Every run is marked preemptible, so that the server gives it out
    again (same id, same assignment) when its machine vanishes.
    """

    def __init__(
        self,
        book: Journal,
        spec: dict,
        server: SweepServer,
        path,
        start_run,
        *,
        say=print,
        poll=5.0,
    ):
        self.book, self.spec, self.server, self.path = book, spec, server, path
        self.start_run, self.say, self.poll_seconds = start_run, say, poll
        self.runs = {}  # {trial id: (log, finish)} of what is being trained here
        self.stopped = set()  # ids that the server wants stopped
        self.given = []  # commands of the server that wait for their turn
        self.beaten = 0.0  # when the server last heard of us

        # make ourselves known: the server gives trials to agents
        entity, project, sweep = path
        made = server(AGENT, host=book.worker, projectName=project, entityName=entity, sweep=sweep)
        self.agent = made["createAgent"]["agent"]["id"]

    def _beat(self) -> bool:
        """Tell the server what runs here, take its orders; False when it says exit."""
        state = json.dumps(dict.fromkeys(self.runs, True))
        answer = self.server(HEARTBEAT, id=self.agent, metrics="{}", runState=state)
        commands = json.loads(answer["agentHeartbeat"]["commands"] or "[]")
        for command in commands:
            kind = command.get("type")
            if kind == "stop":
                self.stopped.add(command["run_id"])
            elif kind == "exit":
                return False
            elif kind in ("run", "resume"):
                self.given.append(command)
        return True

    def take(self, count: int = 1, stop=lambda: False) -> list[Trial]:
        taken = self._take_lost(count)
        waiting = False
        while not taken and not stop():
            # a heartbeat brings what is given out; False: the sweep is over
            if not self.given and not self._beat():
                return []
            taken = self._take_given(count)
            if taken:
                break
            if not waiting:
                self.say("waiting for the server to give out a trial (interrupt to leave)")
                waiting = True
            time.sleep(self.poll_seconds)
        return taken

    def _take_lost(self, count: int) -> list[Trial]:
        """What a worker on this folder left unfinished: no need to wait until the server knows."""
        constants = space.constants(self.spec)
        with self.book.deciding():
            lost = [t for t in self.book.trials() if t.state == "lost"][:count]
            begun = [self._begin(t.id, constants | t.assignment) for t in lost]
        return [trial for trial in begun if trial is not None]

    def _take_given(self, count: int) -> list[Trial]:
        """What the server has given out."""
        taken = []
        while self.given and len(taken) < count:
            command = self.given.pop(0)
            # names that begin with an underscore are wandb's own
            entries = command.get("args") or {}
            args = {name: e["value"] for name, e in entries.items() if not name.startswith("_")}
            assignment = space.constants(self.spec) | args
            with self.book.deciding():
                trial = self._begin(command["run_id"], assignment)
            if trial is not None:
                taken.append(trial)
        return taken

    def _begin(self, id: str, full: dict) -> Trial | None:
        """Claim a run of the server's and begin it there; None where there is nothing to train."""
        trials = self.book.trials()
        before = next((t for t in trials if t.id == id), None)
        if before and before.state == "running":
            self.say(f"{id} is being trained by {before.worker}: left to it")
            return None

        if before:
            assignment = before.assignment
        else:
            names = space.varied(self.spec)
            assignment = {name: full[name] for name in names if name in full}
        log, finish = self.start_run(id, full, lambda: self.stopped.add(id))

        # answered already, or not to be answered: the server hears it, nothing is trained
        ended = _ended(trials, before, assignment)
        if ended is not None:
            self._tell_again(id, assignment, ended, log, finish)
            return None
        if before and before.hopeless:
            self.book.end(id, "failed", reason=HOPELESS)
            log(None, {"failed": HOPELESS})
            finish(1)
            return None

        # it is ours now
        tries = before.tries + 1 if before else 1
        self.book.claim(assignment, tries, id)
        self.runs[id] = (log, finish)
        self.stopped.discard(id)
        return next(t for t in self.book.trials() if t.id == id)

    def _tell_again(self, id: str, assignment: dict, ended: Trial, log, finish):
        """Tell a result that the server missed, or asks for twice; train nothing."""
        metric = self.spec["metric"]["name"]
        for step, value in ended.reports.items():
            log(step, {metric: value})
        if ended.state != "done":
            log(None, {ended.state: ended.reason or True})
        finish(1 if ended.state == "failed" else 0)

        # a run of another name is a trial of its own in the journal, with the same result
        if ended.id != id:
            reason = f"{NOT_AGAIN}: the assignment of {ended.id}"
            self.book.claim(assignment, 1, id)
            self.book.end(id, "done", ended.value, reason, ended.curve, **ended.facts)
        self.say(
            f"{id}: the same assignment ended as {ended.id} ({ended.state}), "
            "that is reported without training again"
        )

    def report(self, trial: Trial, step: int, values: dict) -> str:
        self.book.report(trial.id, step, values[self.spec["metric"]["name"]])
        log, _ = self.runs[trial.id]
        log(step, values)
        self.beaten = 0.0
        return self.poll(trial)

    def saved(self, trial: Trial, step: int):
        self.book.saved(trial.id, step)

    def poll(self, trial: Trial) -> str:
        # called at every step: the server need not hear of each
        if time.monotonic() - self.beaten > BEAT:
            self.beaten = time.monotonic()
            try:
                sweep_goes_on = self._beat()
                if not sweep_goes_on:
                    self.stopped.add(trial.id)
            # wandb keeps the numbers of an offline run and sends them later: training goes on
            except UserError as e:
                self.say(f"{e}; training goes on")
        return "pruned" if trial.id in self.stopped else ""

    def end(self, trial: Trial, state: str, value=None, reason: str = "", curve=(), **facts):
        log, finish = self.runs.pop(trial.id)

        # wandb's summary takes plain numbers, and says why a run is none of the finished ones
        summary: dict[str, Any] = {}
        for name, fact in facts.items():
            if isinstance(fact, int | float) and math.isfinite(fact):
                summary[name] = fact
        if state != "done":
            summary[state] = reason or True
        log(None, summary)
        self.book.end(trial.id, state, value, reason, curve, **facts)
        finish(1 if state == "failed" else 0)

    def free(self, trial: Trial):
        self.book.free(trial.id)
        self._leave(trial.id)

    def drop(self, trial: Trial):
        self._leave(trial.id)

    def close(self):
        for id in list(self.runs):
            self._leave(id)

    def _leave(self, id: str):
        """Put the run back into the server's queue: it was marked preemptible."""
        _, finish = self.runs.pop(id)
        finish(255)


def _ended(trials: list[Trial], before: Trial | None, assignment: dict) -> Trial | None:
    """The trial that has answered this assignment already: the run itself, or another that
    finished.
    """
    if before and before.state in ENDS:
        return before
    key = space.key(assignment)
    for t in trials:
        if t.state == "done" and space.key(t.assignment) == key:
            return t
    return None


def wandb_runs(path):
    """`start_run` for `Wandb`, with wandb's own client in this process."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "sweeps on wandb need a package: pip install wandb; driver=local needs none"
        ) from None
    entity, project, sweep = path

    def start_run(id, assignment, stop):
        settings: dict[str, Any] = dict(sweep_id=sweep, silent=True)
        # without it the client interrupts the main thread when the server says stop
        if "stop_fn" in getattr(wandb.Settings, "model_fields", {}):
            settings["stop_fn"] = stop
        try:
            run = wandb.init(
                entity=entity,
                project=project,
                id=id,
                config=assignment,
                resume="allow",
                reinit="finish_previous",
                settings=wandb.Settings(**settings),
            )
        except Exception as e:
            raise UserError(
                f"wandb cannot start a run ({first_line(e)}): run `wandb login` "
                "and check the network"
            ) from e
        # given out again when this machine vanishes; all is drawn over our steps, not wandb's
        run.mark_preempting()
        run.define_metric("*", step_metric="step")

        def log(step, values):
            if step is None:
                run.summary.update(values)
            else:
                run.log({"step": step} | values)

        return log, lambda code: run.finish(exit_code=code)

    return start_run
