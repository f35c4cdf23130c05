"""A stand-in for an OpenTelemetry collector over HTTP."""

import contextlib
import gzip
import http.server
import socket
import threading


class Receiver(http.server.BaseHTTPRequestHandler):
    """Hands what it gets to its server's `take`, which says how to answer."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        status, answer = self.server.take(body)
        if status is None:
            # hangs up in the middle
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def http_receiver(take, port=0):
    """A receiver on the loopback interface; yields its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Receiver)
    server.daemon_threads = True
    server.take = take
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
