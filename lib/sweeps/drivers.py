"""Who says what to train next, hears how it goes and says when to stop: `Local` (the journal's folder), `Wandb` (a server).

Both keep the journal, so that tables, pictures and resuming work the same way, and both have
    take(count, stop)            trials to train now, [] when the sweep is over or stop() (waits while others may lose theirs)
    report(trial, step, values)  a validation, the sweep's metric among its values: "" to go on, "pruned" or "lost" to stop
    poll(trial)                  the same question without news; cheap enough for every step
    end(trial, state, …)         done, pruned or failed
    free(trial), drop(trial)     given back for whoever comes next; left to the worker that has it now
    close()                      leave nothing open
"""

import base64
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib

from lib.files import UserError, first_line
from lib.sweeps import space
from lib.sweeps.journal import BEAT, ENDS, TRIES, Journal, Trial

# why a trial of wandb's ended that has the assignment of an earlier one
NOT_AGAIN = "not trained again"
POLL = 2.0  # seconds between looks at the folder while all that is left is in others' hands


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
            mine = {
                t.id: t for t in trials if t.worker == self.book.worker and t.state == "running"
            }
            # without working locks another worker may have been first: its claim holds then
            if taken:
                if got := [mine[id] for id in taken if id in mine]:
                    return got
                continue
            others = [t for t in trials if t.state == "running"]
            if not others:
                return []
            if not waiting:
                self.say(
                    f"nothing left to begin; waiting for {len(others)} trial(s) of {len({t.worker for t in others})} other "
                    "worker(s), to take over what is lost (interrupt to leave)"
                )
                waiting = True
            time.sleep(POLL)
        return []

    def _take(self, count) -> list[str]:
        trials, taken = self.book.trials(), []
        for t in trials:
            if t.state == "lost" and len(taken) < count:
                if t.tries - t.freed >= TRIES:
                    self.book.end(
                        t.id,
                        "failed",
                        reason=f"its worker died {TRIES} times, most often for lack of memory",
                    )
                else:
                    taken.append(self.book.claim(t.assignment, t.tries + 1, t.id))
        while len(taken) < count and len(trials) < space.limit(self.spec):
            # the seed needs no luck between workers: a draw depends on the number of trials too
            assignment = space.ask(self.spec, trials, zlib.crc32(space.key(self.spec).encode()))
            if assignment is None:
                break
            taken.append(self.book.claim(assignment))
            trials = self.book.trials()
        return taken

    def report(self, trial: Trial, step: int, values: dict) -> str:
        self.book.report(trial.id, step, values[self.spec["metric"]["name"]])
        trials = self.book.trials()
        now = next(t for t in trials if t.id == trial.id)
        if now.worker != self.book.worker or now.state != "running":
            return "lost"
        return "pruned" if space.should_stop(self.spec, trials, now) else ""

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


# ---- wandb -----------------------------------------------------------------------------------------------------------------


class Server:
    """The five GraphQL calls that a sweep needs, over plain HTTP: no threads, nothing that outlives a call.

    wandb.agent would run each trial in a thread and stop it by an exception thrown into it, which JAX code may meet anywhere;
    it also gives up after three failures in a minute. Its protocol is simple, so we speak it ourselves.
    """

    def __init__(self, url: str, key: str, tries: int = 5, pause: float = 2.0):
        self.url, self.key, self.tries, self.pause = url.rstrip("/"), key, tries, pause

    def page(self, path) -> str:
        """The address at which people look at a sweep."""
        entity, project, sweep = map(urllib.parse.quote, path)
        return (
            f"{self.url.replace('//api.wandb.ai', '//wandb.ai')}/{entity}/{project}/sweeps/{sweep}"
        )

    def __call__(self, query: str, **variables) -> dict:
        body = json.dumps(dict(query=query, variables=variables)).encode()
        login = base64.b64encode(f"api:{self.key}".encode()).decode()
        for attempt in range(self.tries):
            request = urllib.request.Request(
                f"{self.url}/graphql",
                body,
                {"Content-Type": "application/json", "Authorization": f"Basic {login}"},
            )
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    answer = json.load(response)
                if answer.get("errors"):
                    raise UserError(
                        f"wandb refused: {answer['errors'][0].get('message', answer['errors'][0])}"
                    )
                return answer["data"]
            except urllib.error.HTTPError as e:
                problem = f"{e.code} {e.reason}"
                if e.code in (401, 403):
                    raise UserError(
                        "wandb does not accept the key: run `wandb login`, or set the secret WANDB_API_KEY"
                    ) from e
                if e.code == 404:
                    raise UserError(
                        "wandb does not know this sweep: check its id, ENTITY/PROJECT/ID"
                    ) from e
                if e.code < 500 and e.code != 429:
                    said = e.read(2000).decode("utf-8", "replace")
                    raise UserError(f"wandb refused ({problem}): {said[:300]}") from e
            except (OSError, ValueError) as e:  # URLError, time-outs, a proxy's HTML page
                problem = first_line(getattr(e, "reason", e))
            if attempt + 1 < self.tries:
                time.sleep(self.pause * 2**attempt)
        raise UserError(
            f"wandb at {self.url} cannot be reached ({problem}): check the network and run again, nothing is lost"
        )


_CREATE = """mutation UpsertSweep($config: String, $description: String, $entityName: String, $projectName: String) {
  upsertSweep(input: {config: $config, description: $description, entityName: $entityName, projectName: $projectName}) {
    sweep { name project { name entity { name } } } } }"""
_SWEEP = """query Sweep($entity: String, $project: String, $sweep: String!) {
  project(name: $project, entityName: $entity) { sweep(sweepName: $sweep) { name state config } } }"""
_AGENT = """mutation CreateAgent($host: String!, $projectName: String, $entityName: String, $sweep: String!) {
  createAgent(input: {host: $host, projectName: $projectName, entityName: $entityName, sweep: $sweep}) { agent { id } } }"""
_HEARTBEAT = """mutation Heartbeat($id: ID!, $metrics: JSONString, $runState: JSONString) {
  agentHeartbeat(input: {id: $id, metrics: $metrics, runState: $runState}) { agent { id } commands } }"""
_RUNS = """query SweepRuns($entity: String, $project: String, $sweep: String!, $after: String) {
  project(name: $project, entityName: $entity) { sweep(sweepName: $sweep) { runs(first: 100, after: $after) {
    edges { node { name state config summaryMetrics history(samples: 500) } } pageInfo { hasNextPage endCursor } } } } }"""


def create_sweep(
    server: Server, spec: dict, entity: str | None, project: str
) -> tuple[str, str, str]:
    """Make `spec` a sweep on the server; returns (entity, project, id)."""
    config = {k: v for k, v in spec.items() if k not in ("entity", "project")}
    made = server(
        _CREATE,
        config=json.dumps(config),
        description=spec.get("description"),
        entityName=entity or None,
        projectName=project,
    )["upsertSweep"]["sweep"]
    return made["project"]["entity"]["name"], made["project"]["name"], made["name"]


def parse_path(text: str) -> tuple[str, str, str]:
    """(entity, project, id) of "ENTITY/PROJECT/ID"."""
    parts = text.strip("/").split("/")
    if len(parts) != 3 or not all(parts):
        raise UserError(
            f"{text!r} is not a wandb sweep: write ENTITY/PROJECT/ID, as its page and the first worker say"
        )
    return tuple(parts)


def read_sweep(server: Server, path: tuple[str, str, str]) -> dict:
    """The checked sweep behind (entity, project, id)."""
    import yaml

    entity, project, id = path
    found = (server(_SWEEP, entity=entity, project=project, sweep=id).get("project") or {}).get(
        "sweep"
    )
    if not found:
        raise UserError(f"wandb knows no sweep {'/'.join(path)}: check entity, project and id")
    return space.check(
        {k: v for k, v in yaml.safe_load(found["config"]).items() if k in space.KEYS}
    )


class Wandb:
    """A worker of a wandb sweep, inside this process.

    start_run(trial id, assignment, stop) begins the wandb run that belongs to a trial and returns (log(step, {name: value}),
    finish(exit code)); stop() may be called from any thread when the server wants the run stopped. Every run is marked
    preemptible, so that the server gives it out again (same id, same assignment) when its machine vanishes.
    """

    def __init__(
        self,
        book: Journal,
        spec: dict,
        server: Server,
        path,
        start_run,
        say=print,
        poll: float = 5.0,
    ):
        self.book, self.spec, self.server, self.path, self.say, self.poll_seconds = (
            book,
            spec,
            server,
            path,
            say,
            poll,
        )
        self.start_run, self.runs, self.stopped, self.fresh, self.beaten = (
            start_run,
            {},
            set(),
            [],
            0.0,
        )
        entity, project, id = path
        self.agent = server(
            _AGENT, host=book.worker, projectName=project, entityName=entity, sweep=id
        )["createAgent"]["agent"]["id"]

    def _beat(self) -> bool:
        """Tell the server what runs here, take its orders; False when it says exit."""
        state = json.dumps({id: True for id in self.runs})
        answer = self.server(_HEARTBEAT, id=self.agent, metrics="{}", runState=state)[
            "agentHeartbeat"
        ]["commands"]
        for command in json.loads(answer or "[]"):
            if command.get("type") == "stop":
                self.stopped.add(command["run_id"])
            elif command.get("type") == "exit":
                return False
            elif command.get("type") in ("run", "resume"):
                self.fresh.append(command)
        return True

    def take(self, count: int = 1, stop=lambda: False) -> list[Trial]:
        # what a worker on this folder left unfinished: no need to wait until the server notices
        with self.book.deciding():
            known = self.book.trials()
            lost = [t for t in known if t.state == "lost"][:count]
            taken = [
                got
                for t in lost
                if (got := self._begin(t.id, space.constants(self.spec) | t.assignment)) is not None
            ]
        waiting = False
        while not taken and not stop():
            if not self.fresh and not self._beat():
                return []
            while self.fresh and len(taken) < count:
                command = self.fresh.pop(0)
                args = {
                    k: entry["value"]
                    for k, entry in (command.get("args") or {}).items()
                    if not k.startswith("_")
                }
                with self.book.deciding():
                    if (
                        got := self._begin(command["run_id"], space.constants(self.spec) | args)
                    ) is not None:
                        taken.append(got)
            if not taken:
                if not waiting:
                    self.say("waiting for the server to give out a trial (interrupt to leave)")
                    waiting = True
                time.sleep(self.poll_seconds)
        return taken

    def _begin(self, id: str, full: dict) -> Trial | None:
        known = self.book.trials()
        before = next((t for t in known if t.id == id), None)
        assignment = (
            before.assignment
            if before
            else {name: full[name] for name in space.varied(self.spec) if name in full}
        )
        ended = (
            before
            if before and before.state in ENDS
            else next(
                (
                    t
                    for t in known
                    if space.key(t.assignment) == space.key(assignment) and t.state == "done"
                ),
                None,
            )
        )
        if before and before.state == "running":
            self.say(f"{id} is being trained by {before.worker}: left to it")
            return None
        log, finish = self.start_run(id, full, lambda: self.stopped.add(id))
        # trained before, but the server was not told, or asks twice: tell it, and train nothing
        if ended is not None:
            for step, value in ended.reports.items():
                log(step, {self.spec["metric"]["name"]: value})
            if ended.state != "done":
                log(None, {ended.state: ended.reason or True})
            finish(1 if ended.state == "failed" else 0)
            if ended.id != id:
                self.book.claim(assignment, 1, id)
                self.book.end(
                    id,
                    "done",
                    ended.value,
                    f"{NOT_AGAIN}: the assignment of {ended.id}",
                    ended.curve,
                    **ended.facts,
                )
            self.say(
                f"{id}: the same assignment ended as {ended.id} ({ended.state}), that is reported without training again"
            )
            return None
        if before and before.tries - before.freed >= TRIES:
            self.book.end(
                id, "failed", reason=f"its worker died {TRIES} times, most often for lack of memory"
            )
            log(None, {"failed": f"its worker died {TRIES} times"})
            finish(1)
            return None
        self.book.claim(assignment, before.tries + 1 if before else 1, id)
        self.runs[id] = (log, finish)
        self.stopped.discard(id)
        return next(t for t in self.book.trials() if t.id == id)

    def report(self, trial: Trial, step: int, values: dict) -> str:
        self.book.report(trial.id, step, values[self.spec["metric"]["name"]])
        self.runs[trial.id][0](step, values)
        self.beaten = 0.0
        return self.poll(trial)

    def poll(self, trial: Trial) -> str:
        if time.monotonic() - self.beaten > BEAT:
            self.beaten = time.monotonic()
            try:
                if not self._beat():  # the sweep was stopped
                    self.stopped.add(trial.id)
            # wandb keeps the numbers of an offline run and sends them later: training goes on
            except UserError as e:
                self.say(f"{e}; training goes on")
        return "pruned" if trial.id in self.stopped else ""

    def end(self, trial: Trial, state: str, value=None, reason: str = "", curve=(), **facts):
        log, finish = self.runs.pop(trial.id)
        numbers = {
            k: v for k, v in facts.items() if isinstance(v, int | float) and math.isfinite(v)
        }
        log(None, numbers | ({state: reason or True} if state != "done" else {}))
        self.book.end(trial.id, state, value, reason, curve, **facts)
        finish(1 if state == "failed" else 0)

    def free(self, trial: Trial):
        self.book.free(trial.id)
        # with mark_preempting this puts the run back into the server's queue
        self.runs.pop(trial.id)[1](255)

    def drop(self, trial: Trial):
        self.runs.pop(trial.id)[1](255)

    def close(self):
        for id in list(self.runs):
            self.runs.pop(id)[1](255)


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
        settings = dict(sweep_id=sweep, silent=True)
        # else the client interrupts the main thread
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
                f"wandb cannot start a run ({first_line(e)}): run `wandb login` and check the network"
            ) from e
        run.mark_preempting()
        run.define_metric("*", step_metric="step")

        def log(step, values):
            if step is None:
                run.summary.update(values)
            else:
                run.log({"step": step} | values)

        return log, lambda code: run.finish(exit_code=code)

    return start_run


def wandb_login() -> Server:
    """The server and key that the installed wandb is set to (WANDB_BASE_URL, `wandb login`, WANDB_API_KEY)."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "sweeps on wandb need a package: pip install wandb; driver=local needs none"
        ) from None
    try:
        wandb.login()
        api = wandb.Api()
        key, url = api.api_key, api.settings["base_url"]
    except Exception as e:
        raise UserError(
            f"wandb does not let us in ({first_line(e)}): run `wandb login`, or set the secret WANDB_API_KEY"
        ) from e
    if not key:
        raise UserError(
            "wandb has no key here: run `wandb login`, set the secret WANDB_API_KEY, or use driver=local"
        )
    return Server(url, key)


def fetch_runs(server: Server, path, spec: dict) -> list[Trial]:
    """All runs of a wandb sweep, this worker's and everyone's, as trials."""
    entity, project, sweep = path
    found, after = [], None
    while True:
        page = server(_RUNS, entity=entity, project=project, sweep=sweep, after=after)["project"][
            "sweep"
        ]["runs"]
        found += [edge["node"] for edge in page["edges"]]
        after = page["pageInfo"]["endCursor"]
        if not page["pageInfo"]["hasNextPage"]:
            break
    metric, out = spec["metric"]["name"], []
    states = {
        "finished": "done",
        "running": "running",
        "killed": "pruned",
        "stopped": "pruned",
        "preempted": "lost",
        "preempting": "running",
        "pending": "lost",
        "crashed": "lost",
    }
    for node in reversed(found):
        config = {
            k: v["value"]
            for k, v in json.loads(node["config"] or "{}").items()
            if isinstance(v, dict) and "value" in v
        }
        summary = json.loads(node["summaryMetrics"] or "{}")
        rows = [
            json.loads(row) if isinstance(row, str) else row for row in node.get("history") or []
        ]
        reports = {
            int(row.get("step", row.get("_step", i))): float(row[metric])
            for i, row in enumerate(rows)
            if metric in row
        }
        state = "pruned" if summary.get("pruned") else states.get(node["state"], "failed")
        out.append(
            Trial(
                node["name"],
                len(out),
                {k: config.get(k) for k in space.varied(spec)},
                state,
                "wandb",
                value=float(summary[metric]) if state == "done" and metric in summary else None,
                reason=str(summary.get("failed", "")),
                reports=reports,
                facts={k: v for k, v in summary.items() if isinstance(v, int | float)},
            )
        )
    return out
