"""A stand-in for the Hub's model repositories: made, listed, read at a revision, and committed to.

It can misbehave: it answers 401, 403, 429 or 500, breaks off before or after it has done its work,
and dies in the middle of a file.
"""

import base64
import hashlib
import http.server
import json
import threading
import time
import urllib.parse

import pytest

from tests.helpers.hub_stand_in import Handler

# what the Hub keeps apart from git, as its own rules have it for these names
LARGE = (".safetensors", ".gguf", ".onnx", ".tflite", ".stablehlo", ".pt")


class Models(Handler):
    """One file store for all repositories. A commit is one POST; large files go up before it."""

    protocol_version = "HTTP/1.1"

    # ---- reading

    def do_GET(self):
        server, path = self.server, urllib.parse.unquote(self.path.partition("?")[0])
        repo, revision, rest = self.parsed(path)
        if repo in server.private and not self.headers["Authorization"]:
            return self.answer(401, {"error": "Invalid username or password."})
        if not path.startswith("/api/models/"):
            return super().do_GET()

        # what a repository is, and what files it holds
        server.log.append((self.command, path, {}))
        if (status := self.fault("api")) is not None:
            return self.answer(status, {"error": "not now"})
        if repo not in server.repos:
            return self.answer(404, {"error": "Repository not found"}, "RepoNotFound")
        commit = server.commit_of(repo, revision)
        if commit is None:
            return self.answer(404, {"error": "Invalid rev id"}, "RevisionNotFound")
        files = server.history[repo][commit]
        if "/tree/" in path:
            folder = f"{rest}/" if rest else ""
            return self.answer(200, entries(files, folder))
        siblings = [dict(rfilename=name) for name in files]
        private = repo in server.private
        about = dict(id=repo, modelId=repo, sha=commit, private=private, siblings=siblings, tags=[])
        return self.answer(200, about)

    do_HEAD = do_GET  # noqa: N815

    def parsed(self, path: str) -> tuple[str, str, str]:
        """(repository, revision, what is behind it) of an address."""
        api = path.startswith("/api/models/")
        words = path.removeprefix("/api/models/").strip("/").split("/")
        if not api and len(words) < 5:
            return "", "main", ""
        revision = words[3] if len(words) > 3 else "main"
        return "/".join(words[:2]), revision, "/".join(words[4:])

    def content(self, path: str) -> tuple[bytes | None, str]:
        """(a file of a revision, the revision's commit), for Handler."""
        repo, revision, name = self.parsed(path)
        commit = self.server.commit_of(repo, revision)
        files = self.server.history.get(repo, {}).get(commit or "", {})
        return files.get(name), commit or "0" * 40

    # ---- writing

    def do_PUT(self):
        """A large file, under the hash of what it holds."""
        server, oid = self.server, self.path.rpartition("/")[2]
        size = int(self.headers["Content-Length"])
        fault = server.upload_faults["put"].pop(0) if server.upload_faults["put"] else None
        if fault == "die":
            # the line breaks when half of it has come
            self.rfile.read(size // 2)
            self.close_connection = True
            return self.connection.close()
        body = self.rfile.read(size)
        if fault is not None:
            return self.answer(fault, {"error": "not now"})
        server.puts.append(oid)
        assert hashlib.sha256(body).hexdigest() == oid
        server.large[oid] = body
        return self.answer(200, {})

    def do_POST(self):
        server, path = self.server, urllib.parse.unquote(self.path.partition("?")[0])
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.posts.append((path, self.headers["Authorization"]))
        if server.refused:
            return self.answer(403, {"error": "this token may not write"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        verb, work = self.work(path)
        fault = server.upload_faults[verb].pop(0) if server.upload_faults[verb] else None
        if fault == "die":
            self.close_connection = True
            return self.connection.close()
        if isinstance(fault, int):
            return self.answer(fault, {"error": "not now"})
        status, content = work(path, body)
        if fault == "die after":
            self.close_connection = True
            return self.connection.close()
        return self.answer(status, content)

    def work(self, path: str):
        """(what a POST is called here, what does it)."""
        if path == "/api/repos/create":
            return "create", self.create
        if path.endswith("/info/lfs/objects/batch"):
            return "batch", self.batch
        verb = path.split("/")[5]
        return verb, {"preupload": self.preupload, "commit": self.commit}[verb]

    def create(self, path: str, body: bytes):
        server, wanted = self.server, json.loads(body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        address = {"url": f"{server.address}/{repo}"}
        if repo in server.repos:
            return 409, address
        if wanted.get("private") or wanted.get("visibility") == "private":
            server.private.add(repo)
        server.put_commit(repo, {".gitattributes": b""} if server.attributes else {})
        return 200, address

    def preupload(self, path: str, body: bytes):
        modes = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            modes.append(dict(path=file["path"], uploadMode=mode, shouldIgnore=False))
        return 200, {"files": modes}

    def batch(self, path: str, body: bytes):
        """Where to put large files; nowhere those that are here already."""
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = dict(oid=wanted["oid"], size=wanted["size"])
            if wanted["oid"] not in self.server.large:
                href = f"{self.server.address}/large/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        return 200, dict(transfer="basic", objects=objects)

    def commit(self, path: str, body: bytes):
        """All of a commit, or nothing of it."""
        server, repo = self.server, "/".join(path.split("/")[3:5])
        files = dict(server.repos[repo])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in server.large:
                    return 400, {"error": f"{value['path']} was not uploaded"}
                files[value["path"]] = server.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        commit = server.put_commit(repo, files)
        server.commits += 1
        url = f"{server.address}/{repo}/commit/{commit}"
        return 200, dict(commitUrl=url, commitOid=commit, success=True)

    def fault(self, kind: str) -> int | None:
        """The next misbehaviour asked for, if there is one."""
        faults = self.server.upload_faults[kind]
        return faults.pop(0) if faults else None

    def answer(self, status: int, content, code: str = ""):
        text = json.dumps(content).encode()
        self.send_response(status)
        if status in (429, 500, 503):
            self.send_header("Retry-After", "0")
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)


def entries(files: dict[str, bytes], folder: str) -> list[dict]:
    """A listing of files, as the Hub words it."""
    return [
        dict(type="file", path=name, size=len(body), oid=hashlib.sha1(body).hexdigest())
        for name, body in files.items()
        if name.startswith(folder)
    ]


class ModelHub(http.server.ThreadingHTTPServer):
    """`repos`: their newest files; `history`: those of each commit; `posts`: (path, authorization)
    of each; `puts`: hashes of large files as they came; `refused`: no token may write.

    `upload_faults`: by verb (create, preupload, batch, put, commit, api) what goes wrong with the
    next requests: a status, "die" or "die after".
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Models)
        self.repos, self.history, self.heads = {}, {}, {}
        self.private, self.large = set(), {}
        self.posts, self.puts, self.commits = [], [], 0
        self.refused, self.attributes = False, False
        verbs = ("create", "preupload", "batch", "put", "commit", "api")
        self.upload_faults = {verb: [] for verb in verbs}
        self.files, self.faults, self.log = {}, [], []
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def put_commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Make these files the newest revision of a repository."""
        history = self.history.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo} {len(history)}".encode()).hexdigest()
        history[commit] = dict(files)
        self.repos[repo], self.heads[repo] = history[commit], commit
        return commit

    def commit_of(self, repo: str, revision: str) -> str | None:
        """The commit that a branch or the whole of an id means."""
        if revision == "main":
            return self.heads.get(repo)
        return revision if revision in self.history.get(repo, {}) else None

    def handle_error(self, request, client_address):
        """A line that was broken on purpose is no news."""


@pytest.fixture
def model_hub(tmp_path, monkeypatch):
    """A stand-in that the Hub's client takes for the Hub, with model repositories."""
    from huggingface_hub import constants

    server = ModelHub()
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf_cache"))
    # large files go by git's rules, which a stand-in can follow, and no wait is a real one
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("lib.hub.WAIT", 0.0)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    yield server
    server.shutdown()
    server.server_close()
