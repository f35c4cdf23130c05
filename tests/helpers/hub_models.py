"""A stand-in for the Hub's model repositories: they are made, listed, read, and committed to."""

import base64
import http.server
import json
import threading
import urllib.parse

import pytest

from tests.helpers.hub_stand_in import COMMIT, Handler


class Models(Handler):
    """One file store for all repositories, {"USER/NAME": {path: content}}; a commit is one POST."""

    def do_GET(self):
        server, path = self.server, urllib.parse.unquote(self.path.partition("?")[0])
        if path.startswith("/api/models/"):
            repo = "/".join(path.split("/")[3:5])
            files = server.repos.get(repo)
            if files is None:
                return self.answer(404, {"error": "Repository not found"})
            entries = [
                dict(type="file", path=name, size=len(body), oid="0" * 40)
                for name, body in files.items()
            ]
            return self.answer(200, entries)
        user, name, resolve, _, rest = [*path.strip("/").split("/", 4), "", "", "", "", ""][:5]
        if resolve == "resolve":
            server.files = {path: server.repos.get(f"{user}/{name}", {}).get(rest)}
        return super().do_GET()

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        server, path = self.server, urllib.parse.unquote(self.path.partition("?")[0])
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.posts.append((path, self.headers["Authorization"]))
        if server.refused:
            return self.answer(403, {"error": "this token may not write"})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if repo in server.repos:
                return self.answer(409, {"url": f"{server.address}/{repo}"})
            server.repos[repo] = {}
            return self.answer(200, {"url": f"{server.address}/{repo}"})
        repo, verb = "/".join(path.split("/")[3:5]), path.split("/")[5]
        if verb == "preupload":
            files = [
                dict(path=f["path"], uploadMode="regular", shouldIgnore=False)
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                server.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                server.repos[repo].pop(value["path"])
        server.commits += 1
        url = f"{server.address}/{repo}/commit/{COMMIT}"
        return self.answer(200, dict(commitUrl=url, commitOid=COMMIT, success=True))

    def answer(self, status: int, content):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)


class ModelHub(http.server.ThreadingHTTPServer):
    """`repos`: their files; `posts`: (path, authorization) of each; `refused`: no token may write."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Models)
        self.repos, self.posts, self.commits, self.refused = {}, [], 0, False
        self.files, self.faults, self.log = {}, [], []
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def model_hub(tmp_path, monkeypatch):
    """A stand-in that the Hub's client takes for the Hub, with model repositories."""
    from huggingface_hub import constants

    server = ModelHub()
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf_cache"))
    yield server
    server.shutdown()
    server.server_close()
