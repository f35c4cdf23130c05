"""A stand-in for wandb's server, spoken to by wandb's own client and by ours."""

import gzip
import http.server
import json
import random
import threading

from lib.sweeps import space


class StandIn(http.server.ThreadingHTTPServer):
    """As much of wandb's server as a sweep needs:

    grid assignments, runs that are given out again after preemption, stops.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.sweep, self.given, self.runs, self.requeued, self.stop, self.failures = (
            None,
            0,
            {},
            [],
            set(),
            0,
        )
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def graphql(self, query, v):
        if "upsertSweep" in query:
            self.sweep = json.loads(v["config"])
            return {
                "upsertSweep": {
                    "sweep": {
                        "name": "swp1",
                        "project": {"name": v["projectName"], "entity": {"name": "team"}},
                    }
                }
            }
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": f"agent{random.random()}"}}}
        if "agentHeartbeat" in query:
            running, commands = json.loads(v["runState"]), []
            if running:
                commands = [{"type": "stop", "run_id": id} for id in running if id in self.stop]
            elif self.requeued:
                id = self.requeued.pop(0)
                commands = [{"type": "resume", "run_id": id, "args": self.runs[id]["args"]}]
            elif self.given < len(space.grid(self.sweep)):
                a = space.constants(self.sweep) | space.grid(self.sweep)[self.given]
                self.given += 1
                id = f"run{self.given}"
                self.runs[id] = dict(
                    args={k: {"value": x} for k, x in a.items()},
                    history=[],
                    state="running",
                    summary={},
                )
                commands = [{"type": "run", "run_id": id, "args": self.runs[id]["args"]}]
            else:
                commands = [{"type": "exit"}]
            return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(commands)}}
        if "upsertBucket" in query:
            self.runs[v["name"]] |= {k: v[k] for k in ("sweep", "config") if v.get(k)}
            return {
                "upsertBucket": {
                    "inserted": True,
                    "bucket": {
                        "id": v["name"],
                        "name": v["name"],
                        "displayName": v["name"],
                        "description": "",
                        "config": "{}",
                        "sweepName": "swp1",
                        "historyLineCount": 0,
                        "project": {
                            "id": "p",
                            "name": "proj",
                            "entity": {"id": "e", "name": "team"},
                        },
                    },
                }
            }
        if "query Sweep(" in query:
            return {
                "project": {
                    "sweep": {"name": "swp1", "state": "RUNNING", "config": json.dumps(self.sweep)}
                }
            }
        if "SweepRuns" in query:
            edges = [
                {
                    "node": dict(
                        name=id,
                        state=r["state"],
                        config=json.dumps(r["args"]),
                        summaryMetrics=json.dumps(r["summary"]),
                        history=[json.dumps(h) for h in r["history"]],
                    )
                }
                for id, r in reversed(self.runs.items())
            ]
            return {
                "project": {
                    "sweep": {
                        "runs": {
                            "edges": edges,
                            "pageInfo": {"hasNextPage": False, "endCursor": ""},
                        }
                    }
                }
            }
        if "viewer" in query:
            return {
                "viewer": {
                    "id": "v",
                    "entity": "team",
                    "username": "u",
                    "flags": "{}",
                    "email": "",
                    "admin": False,
                    "teams": {"edges": []},
                }
            }
        if "serverInfo" in query:
            return {"serverInfo": {"features": []}}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
        return {"model": {"bucket": None}, "project": {"run": {"stopped": False}}}

    def stream(self, id, body):
        run = self.runs[id]
        for line in body.get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
            run["history"].append(json.loads(line))
        for line in body.get("files", {}).get("wandb-summary.json", {}).get("content", []):
            run["summary"] |= json.loads(line)
        run["preempting"] = run.get("preempting") or body.get("preempting", False)
        if body.get("complete"):
            run["state"], run["exit"] = (
                "finished" if body["exitcode"] == 0 else "failed",
                body["exitcode"],
            )


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer({})

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.answer({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        if self.path == "/graphql":
            if self.server.failures:
                self.server.failures -= 1
                return self.answer({}, 503)
            asked = json.loads(body)
            return self.answer(
                {"data": self.server.graphql(asked["query"], asked.get("variables") or {})}
            )
        if self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body))
        self.answer({})

    def answer(self, what, code=200):
        data = json.dumps(what).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
