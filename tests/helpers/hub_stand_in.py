"""A stand-in for the Hugging Face Hub that can misbehave, reached as a mirror is: by
HF_ENDPOINT.
"""

import hashlib
import http.server
import json
import threading
import urllib.parse

import pytest

COMMIT = "a" * 40
PARQUET = "refs/convert/parquet"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves files of data sets and lists of them; each fault is used up by one request."""

    def do_GET(self):
        server, path = self.server, urllib.parse.unquote(self.path.partition("?")[0])
        if path.startswith("/api/agent"):  # the client's own business, once a process
            return self.send_error(404)
        server.log.append(
            (self.command, path, {name.title(): value for name, value in self.headers.items()})
        )
        fault = server.faults.pop(0) if server.faults else None
        body, commit = self.content(path)
        if body is None or isinstance(fault, int):
            self.send_response(fault or 404)
            self.send_header("Retry-After", "0")
            if not fault:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()

        asked = self.headers["Range"]
        start = int(asked[6:].partition("-")[0]) if asked else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.command == "GET":
            # a line that is kept open would only be waited on
            self.close_connection |= fault == "truncate"
            half = start + (len(body) - start) // 2
            self.wfile.write(body[start : half if fault == "truncate" else None])

    do_HEAD = do_GET  # noqa: N815

    def content(self, path: str) -> tuple[bytes | None, str]:
        """(what is at an address, the commit that it is of)."""
        if path.startswith("/api/datasets/"):
            return self.listing(path), COMMIT
        return self.server.files.get(path), COMMIT

    def listing(self, path: str):
        repo, _, rest = path.removeprefix("/api/datasets/").partition("/tree/")
        folder = rest.removeprefix(PARQUET + "/")
        place = f"/datasets/{repo}/resolve/{PARQUET}/"
        names = [name.removeprefix(place) for name in self.server.files if name.startswith(place)]
        names = [name for name in names if name.startswith(folder + "/")]
        if not names:
            return None
        entries = [dict(type="file", path=name, size=1, oid="0" * 40) for name in names]
        return json.dumps(entries).encode()

    def log_message(self, *args):
        pass


class HubStandIn(http.server.ThreadingHTTPServer):
    """`files` by address; `faults` are consumed one per request; `log` holds (method, path,
    headers).
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log = {}, [], []
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def put(self, repo: str, name: str, body: bytes, revision: str = "main"):
        self.files[f"/datasets/{repo}/resolve/{revision}/{name}"] = body

    def close(self):
        self.shutdown()
        self.server_close()


@pytest.fixture
def hub_server(tmp_path, monkeypatch):
    """A stand-in that the Hub's client takes for the Hub, with a cache of its own and no
    patience.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    server = HubStandIn()
    # What HF_ENDPOINT and HF_HOME set, when they are there before the client is imported.
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf_cache"))
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.setattr("lib.data.download.BACKOFF", 0.001)
    yield server
    server.close()
