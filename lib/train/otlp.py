"""Every step to an OpenTelemetry collector, by a thread that training never waits for.

What is logged goes into a bounded queue; the thread takes it out in batches. A collector that is
away, slow or refuses costs nothing but the oldest steps in the queue, once that is full, and one
warning: metrics.jsonl has them all the same.
"""

import http.client
import logging
import math
import threading
import time
import urllib.parse
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

from lib.files import UserError, first_line

MAX_WAITING = 10_000  # steps in the queue; then the oldest go
BATCH = 500  # steps sent at once
EVERY = 1.0  # seconds between batches
MAX_PAUSE = 30.0  # seconds between tries while nobody takes them
TIMEOUT = 5.0  # seconds that a try may take
LAST = 5.0  # seconds in which the rest is sent at the end

INSTALL = (
    "the otlp writer needs packages: pip install opentelemetry-sdk "
    "opentelemetry-exporter-otlp-proto-http opentelemetry-exporter-otlp-proto-grpc"
)


class Sender:
    """A queue of steps and the thread that empties it.

    export(steps): sends [(nanoseconds, {name: number}), ...]; whether they arrived, or an error.
    """

    def __init__(self, export: Callable[[list], bool], where: str, reason: Callable[[], str]):
        self._export = export
        self._where = where
        self._reason = reason
        self._queue = deque()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._failed = False
        self._told = False
        self.logged = 0
        self.sent = 0
        # a daemon, so that a call that hangs cannot keep the process
        self._thread = threading.Thread(target=self._work, name="otlp", daemon=True)
        self._thread.start()

    def write(self, step: int, values: dict):
        """Put a step into the queue; never waits."""
        numbers = {}
        for name, value in ({"step": step} | values).items():
            if math.isfinite(value):
                # beyond 64 bits a whole number has no place in the protocol
                numbers[name] = value if abs(value) < 2**63 else float(value)
        with self._lock:
            self._queue.append((time.time_ns(), numbers))
            self.logged += 1
            self._trim()
        if self._failed and not self._told:
            self._told = True
            warnings.warn(
                f"the collector at {self._where} takes no metrics ({self._reason()}): they wait "
                "for it; training goes on",
                stacklevel=4,
            )

    def close(self):
        """Send what is left, for at most LAST seconds."""
        self._ending.set()
        self._thread.join(LAST)
        lost = self.logged - self.sent
        if lost:
            warnings.warn(
                f"{lost} of {self.logged} logged steps did not reach the collector at "
                f"{self._where} ({self._reason()}); metrics.jsonl has them all",
                stacklevel=4,
            )

    def _trim(self):
        """Let the oldest go where there are too many."""
        while len(self._queue) > MAX_WAITING:
            self._queue.popleft()

    def _work(self):
        pause = EVERY
        while True:
            ending = self._ending.wait(pause)
            arrived = self._send_all()
            self._failed = self._failed or not arrived
            if ending:
                break
            # ask less often where nobody is
            pause = EVERY if arrived else min(2 * pause, MAX_PAUSE)

        # at the end as often as there is time for
        last = time.monotonic() + LAST
        while not arrived and time.monotonic() < last:
            time.sleep(EVERY)
            arrived = self._send_all()

    def _send_all(self) -> bool:
        """Send batches until the queue is empty; False as soon as one does not arrive."""
        while True:
            with self._lock:
                batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            if not batch:
                return True
            try:
                arrived = self._export(batch)
            except Exception:
                arrived = False
            if not arrived:
                # back to where they were
                with self._lock:
                    self._queue.extendleft(reversed(batch))
                    self._trim()
                return False
            self.sent += len(batch)


# ---- OpenTelemetry -------------------------------------------------------------------------------


class Heard(logging.Filter):
    """Keeps the last complaint of a logger, and lets none be printed."""

    last = ""

    def filter(self, record):
        self.last = first_line(record.getMessage())
        return False


def open_sender(address: str, attributes: dict[str, Any]) -> tuple[Callable, Callable]:
    """(write(step, values), close()) that send to the collector at `address`.

    address: http://HOST:4318, grpc://HOST:4317 (https, grpcs: with TLS), or http or grpc alone,
    whose address is then OpenTelemetry's own: OTEL_EXPORTER_OTLP_ENDPOINT, else this machine.
    attributes: of all that is sent. UserError where a package is missing, or where something
    answers that speaks another protocol.
    """
    kind, endpoint, exporter = _open_exporter(address)

    # its complaints are heard, not printed: one for each try would be many
    heard = Heard()
    loggers = [
        logging.getLogger(name)
        for name in list(logging.root.manager.loggerDict)
        if name.startswith("opentelemetry.exporter")
    ]
    for logger in loggers:
        logger.addFilter(heard)
    check_protocol(kind, endpoint)

    export = _export(exporter, attributes)
    sender = Sender(export, endpoint, lambda: heard.last or "no reason given")

    def close():
        sender.close()
        for logger in loggers:
            logger.removeFilter(heard)

    return sender.write, close


def check_collector(address: str):
    """UserError where `open_sender` would raise one; nothing is opened, and nobody there is no
    matter yet.
    """
    kind, endpoint, exporter = _open_exporter(address)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_protocol(kind, endpoint)
    finally:
        exporter.shutdown()


def _open_exporter(address: str) -> tuple[str, str, Any]:
    """(http, https, grpc or grpcs, the address that is meant, OpenTelemetry's exporter)."""
    kind, _, place = address.partition("://")
    if kind not in ("http", "https", "grpc", "grpcs"):
        raise UserError(
            f"otlp address {address!r}: use http://HOST:4318 or grpc://HOST:4317 "
            "(https and grpcs with TLS)"
        )
    exporter = _exporter(kind, place)
    return kind, getattr(exporter, "_endpoint", "") or place, exporter


def _exporter(kind: str, place: str):
    """OpenTelemetry's own, which knows its headers, certificates and environment."""
    try:
        if kind.startswith("grpc"):
            from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

            endpoint = f"{kind.replace('grpc', 'http')}://{place}" if place else None
            return OTLPMetricExporter(endpoint=endpoint, timeout=TIMEOUT)

        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

        endpoint = f"{kind}://{place.rstrip('/')}/v1/metrics" if place else None
        return OTLPMetricExporter(endpoint=endpoint, timeout=TIMEOUT)
    except ImportError:
        raise UserError(INSTALL) from None


def _export(exporter, attributes: dict[str, Any]) -> Callable[[list], bool]:
    """A function that sends steps as gauges, a point for each step."""
    try:
        from opentelemetry.sdk.metrics import export as sdk
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    except ImportError:
        raise UserError(INSTALL) from None
    resource = Resource.create({"service.name": "rawchat"} | attributes)
    scope = InstrumentationScope("rawchat")

    def send(steps: list) -> bool:
        points = {}
        for nanoseconds, numbers in steps:
            for name, value in numbers.items():
                point = sdk.NumberDataPoint({}, 0, nanoseconds, value)
                points.setdefault(name, []).append(point)
        metrics = [
            sdk.Metric(name, "", "1", sdk.Gauge(of_name)) for name, of_name in points.items()
        ]
        of_scope = sdk.ScopeMetrics(scope, metrics, "")
        data = sdk.MetricsData([sdk.ResourceMetrics(resource, [of_scope], "")])
        return exporter.export(data) is sdk.MetricExportResult.SUCCESS

    return send


# ---- who answers there ---------------------------------------------------------------------------

OTHER = (
    "{endpoint} answers, but not as an OTLP collector over {asked} ({what}): "
    "try otlp:{other}, or another port"
)


def check_protocol(kind: str, endpoint: str):
    """UserError where something answers that speaks another protocol; a warning where nothing does.

    Nothing is sent but an empty request. Over TLS nothing is asked.
    """
    if kind == "http" and endpoint.startswith("http://"):
        _check_http(endpoint)
    elif kind == "grpc":
        _check_grpc(endpoint)


def _check_http(endpoint: str):
    url = urllib.parse.urlsplit(endpoint)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=TIMEOUT)
    try:
        headers = {"Content-Type": "application/x-protobuf"}
        connection.request("POST", url.path, b"", headers)
        status = connection.getresponse().status
        strange = f"HTTP {status}" if status in (404, 405, 406, 415, 501, 505) else ""
    except http.client.RemoteDisconnected as e:
        strange = ""
        _nobody(endpoint, e)
    except (http.client.HTTPException, ConnectionResetError) as e:
        strange = f"{type(e).__name__}, no HTTP"
    except OSError as e:
        strange = ""
        _nobody(endpoint, e)
    finally:
        connection.close()
    if strange:
        other = f"grpc://{url.hostname}:4317"
        raise UserError(OTHER.format(endpoint=endpoint, asked="HTTP", what=strange, other=other))


def _check_grpc(endpoint: str):
    import grpc
    from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as messages
    from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as service

    target = urllib.parse.urlsplit(f"//{endpoint.rpartition('//')[2]}").netloc
    channel = grpc.insecure_channel(target)
    try:
        # protobuf makes this class at run time
        made: Any = messages
        request = made.ExportMetricsServiceRequest()
        service.MetricsServiceStub(channel).Export(request, timeout=TIMEOUT)
    except grpc.RpcError as e:
        error: Any = e
        code, details = error.code(), first_line(error.details() or "")
        unknown = code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNKNOWN)
        if unknown or "http1" in details or "parsing HTTP/2" in details:
            what = f"{code.name}: {details}"
            other = f"http://{target.rpartition(':')[0]}:4318"
            raise UserError(
                OTHER.format(endpoint=endpoint, asked="gRPC", what=what, other=other)
            ) from None
        _nobody(endpoint, details)
    finally:
        channel.close()


def _nobody(endpoint: str, why):
    warnings.warn(
        f"no collector answers at {endpoint} ({first_line(why)}): metrics wait for one; "
        "training goes on",
        stacklevel=8,
    )
