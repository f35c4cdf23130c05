"""A wandb server as a sweep sees it: made, joined, its runs read, over plain HTTP.

wandb.agent would run each trial in a thread and stop it by an exception thrown into it, which JAX
code may meet anywhere; it also gives up after three failures in a minute. Its protocol is simple,
so we speak it ourselves.
"""

import base64
import json
import time
import urllib.error
import urllib.parse
import urllib.request

from lib.files import UserError, first_line
from lib.sweeps import space
from lib.sweeps.journal import Trial

# where a sweep goes that names no project
PROJECT = "rawchat"


class SweepServer:
    """The five GraphQL calls that a sweep needs: no threads, nothing that outlives a call."""

    def __init__(self, url: str, key: str, tries: int = 5, pause: float = 2.0):
        self.url, self.key, self.tries, self.pause = url.rstrip("/"), key, tries, pause

    def page(self, path) -> str:
        """The address at which people look at a sweep."""
        entity, project, sweep = map(urllib.parse.quote, path)
        site = self.url.replace("//api.wandb.ai", "//wandb.ai")
        return f"{site}/{entity}/{project}/sweeps/{sweep}"

    def __call__(self, query: str, **variables) -> dict:
        """Ask, again after a pause where the server or the network fails; UserError where that does
        not help.
        """
        problem = ""
        for attempt in range(self.tries):
            try:
                return self._ask(query, variables)
            except urllib.error.HTTPError as e:
                if not _passing(e):
                    raise _refusal(e) from e
                problem = f"{e.code} {e.reason}"
            # URLError, time-outs, a proxy's HTML page
            except (OSError, ValueError) as e:
                problem = first_line(getattr(e, "reason", e))

            # twice as long each time, for a server that is overrun
            if attempt + 1 < self.tries:
                time.sleep(self.pause * 2**attempt)
        raise UserError(
            f"wandb at {self.url} cannot be reached ({problem}): "
            "check the network and run again, nothing is lost"
        )

    def _ask(self, query: str, variables: dict) -> dict:
        """One POST, and the answer's data."""
        body = json.dumps(dict(query=query, variables=variables)).encode()
        login = base64.b64encode(f"api:{self.key}".encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {login}"}
        request = urllib.request.Request(f"{self.url}/graphql", body, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)

        # GraphQL tells of errors in answers that HTTP calls a success
        if answer.get("errors"):
            first = answer["errors"][0]
            raise UserError(f"wandb refused: {first.get('message', first)}")
        return answer["data"]


def _passing(error: urllib.error.HTTPError) -> bool:
    """Whether the same question may be answered a little later."""
    return error.code >= 500 or error.code == 429


def _refusal(error: urllib.error.HTTPError) -> UserError:
    """What a person can do about an answer that will not change."""
    if error.code in (401, 403):
        return UserError(
            "wandb does not accept the key: run `wandb login`, or set the secret WANDB_API_KEY"
        )
    if error.code == 404:
        return UserError("wandb does not know this sweep: check its id, ENTITY/PROJECT/ID")
    text = error.read(2000).decode("utf-8", "replace")
    return UserError(f"wandb refused ({error.code} {error.reason}): {text[:300]}")


CREATE = """
mutation UpsertSweep($config: String, $description: String, $entityName: String,
                     $projectName: String) {
  upsertSweep(input: {config: $config, description: $description, entityName: $entityName,
                      projectName: $projectName}) {
    sweep { name project { name entity { name } } } } }"""
SWEEP = """
query Sweep($entity: String, $project: String, $sweep: String!) {
  project(name: $project, entityName: $entity) {
    sweep(sweepName: $sweep) { name state config } } }"""
AGENT = """
mutation CreateAgent($host: String!, $projectName: String, $entityName: String, $sweep: String!) {
  createAgent(input: {host: $host, projectName: $projectName, entityName: $entityName,
                      sweep: $sweep}) { agent { id } } }"""
HEARTBEAT = """
mutation Heartbeat($id: ID!, $metrics: JSONString, $runState: JSONString) {
  agentHeartbeat(input: {id: $id, metrics: $metrics, runState: $runState}) {
    agent { id } commands } }"""
RUNS = """
query SweepRuns($entity: String, $project: String, $sweep: String!, $after: String) {
  project(name: $project, entityName: $entity) { sweep(sweepName: $sweep) {
    runs(first: 100, after: $after) {
      edges { node { name state config summaryMetrics history(samples: 500) } }
      pageInfo { hasNextPage endCursor } } } } }"""


def create_sweep(server: SweepServer, spec: dict, owner: str = "") -> tuple[str, str, str]:
    """Make `spec` a sweep on the server; returns (entity, project, id).

    owner: PROJECT or ENTITY/PROJECT; empty: what the sweep's own YAML says, else PROJECT.
    """
    entity, project = spec.get("entity"), spec.get("project", PROJECT)
    if owner:
        entity, project = ["", *owner.split("/")][-2:]

    # where it belongs is said beside the sweep, not in it
    config = {k: v for k, v in spec.items() if k not in ("entity", "project")}
    answer = server(
        CREATE,
        config=json.dumps(config),
        description=spec.get("description"),
        entityName=entity or None,
        projectName=project,
    )
    sweep = answer["upsertSweep"]["sweep"]
    home = sweep["project"]
    return home["entity"]["name"], home["name"], sweep["name"]


def parse_path(text: str) -> tuple[str, str, str]:
    """(entity, project, id) of "ENTITY/PROJECT/ID"."""
    parts = text.strip("/").split("/")
    if len(parts) != 3 or not all(parts):
        raise UserError(
            f"{text!r} is not a wandb sweep: write ENTITY/PROJECT/ID, "
            "as its page and the first worker say"
        )
    entity, project, sweep = parts
    return entity, project, sweep


def read_sweep(server: SweepServer, path: tuple[str, str, str]) -> dict:
    """The checked sweep behind (entity, project, id)."""
    import yaml

    entity, project, id = path
    answer = server(SWEEP, entity=entity, project=project, sweep=id)
    sweep = (answer.get("project") or {}).get("sweep")
    if not sweep:
        raise UserError(f"wandb knows no sweep {'/'.join(path)}: check entity, project and id")

    # the server adds entries of its own
    config = yaml.safe_load(sweep["config"])
    return space.check({k: v for k, v in config.items() if k in space.KEYS})


def wandb_login() -> SweepServer:
    """The server and key that the installed wandb is set to (WANDB_BASE_URL, `wandb login`,
    WANDB_API_KEY).
    """
    try:
        import wandb
    except ImportError:
        raise UserError(
            "sweeps on wandb need a package: pip install wandb; driver=local needs none"
        ) from None
    # its client knows where the key is kept: a file, the environment, a notebook's secrets
    try:
        wandb.login()
        api = wandb.Api()
        key, url = api.api_key, api.settings["base_url"]
    except Exception as e:
        raise UserError(
            f"wandb does not let us in ({first_line(e)}): "
            "run `wandb login`, or set the secret WANDB_API_KEY"
        ) from e
    if not key:
        raise UserError(
            "wandb has no key here: "
            "run `wandb login`, set the secret WANDB_API_KEY, or use driver=local"
        )
    return SweepServer(url, key)


# ---- everyone's runs as trials -------------------------------------------------------------------

STATES = {
    "finished": "done",
    "running": "running",
    "killed": "pruned",
    "stopped": "pruned",
    "preempted": "lost",
    "preempting": "running",
    "pending": "lost",
    "crashed": "lost",
}


def fetch_runs(server: SweepServer, path, spec: dict) -> list[Trial]:
    """All runs of a wandb sweep, this worker's and everyone's, as trials."""
    nodes = reversed(list(_nodes(server, path)))
    return [_trial(node, number, spec) for number, node in enumerate(nodes)]


def _nodes(server: SweepServer, path):
    """The runs as the server keeps them, the newest first."""
    entity, project, sweep = path
    after, more = None, True
    while more:
        # a hundred at a time
        answer = server(RUNS, entity=entity, project=project, sweep=sweep, after=after)
        runs = answer["project"]["sweep"]["runs"]
        for edge in runs["edges"]:
            yield edge["node"]

        page = runs["pageInfo"]
        after, more = page["endCursor"], page["hasNextPage"]


def _trial(node: dict, number: int, spec: dict) -> Trial:
    """A run as the server keeps it, as a trial."""
    metric = spec["metric"]["name"]

    # the assignment: wandb wraps each value, with a description beside it
    config = json.loads(node["config"] or "{}")
    values = {}
    for name, entry in config.items():
        if isinstance(entry, dict) and "value" in entry:
            values[name] = entry["value"]

    # a run that hyperband ended is one that finished, to wandb
    summary = json.loads(node["summaryMetrics"] or "{}")
    state = STATES.get(node["state"], "failed")
    if summary.get("pruned"):
        state = "pruned"

    # wandb gives a number that JSON has no name for as a text
    value = None
    if state == "done" and metric in summary:
        value = float(summary[metric])
    return Trial(
        node["name"],
        number,
        {name: values.get(name) for name in space.varied(spec)},
        state,
        worker="wandb",
        value=value,
        reason=str(summary.get("failed", "")),
        reports=_reports(node.get("history") or [], metric),
        facts={k: v for k, v in summary.items() if isinstance(v, int | float)},
    )


def _reports(history: list, metric: str) -> dict:
    """{step: metric} of a run's history, whose entries are dicts or JSON texts."""
    reports = {}
    for i, entry in enumerate(history):
        row = json.loads(entry) if isinstance(entry, str) else entry
        if metric in row:
            # our own step, else wandb's count of what was logged
            step = row.get("step", row.get("_step", i))
            reports[int(step)] = float(row[metric])
    return reports
