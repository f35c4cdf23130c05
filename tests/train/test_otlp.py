"""Every step reaches a collector, and no collector stalls or kills a training."""

import contextlib
import math
import shutil
import signal
import socket
import subprocess
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lib.files import UserError
from lib.train import otlp
from lib.train.metrics import Metrics, parse_writers, read_jsonl
from tests.helpers.collector import http_receiver

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the otlp extra")
grpc = pytest.importorskip("grpc", reason="needs the otlp extra")
pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="needs the otlp extra")

from opentelemetry.proto.collector.metrics.v1 import (  # noqa: E402
    metrics_service_pb2 as messages,
)
from opentelemetry.proto.collector.metrics.v1 import (  # noqa: E402
    metrics_service_pb2_grpc as service,
)

STEPS = 40


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Tries in quick succession, so that a test takes no time."""
    monkeypatch.setattr(otlp, "EVERY", 0.02)
    monkeypatch.setattr(otlp, "MAX_PAUSE", 0.1)
    monkeypatch.setattr(otlp, "TIMEOUT", 1.0)
    monkeypatch.setattr(otlp, "LAST", 2.0)


def test_steps_that_did_not_arrive_come_again_in_their_order(monkeypatch):
    """The first batch of two is refused; of five steps four have room in the queue."""
    monkeypatch.setattr(otlp, "BATCH", 2)
    monkeypatch.setattr(otlp, "MAX_WAITING", 4)
    refused, arrived = [], []

    def export(steps):
        if not refused:
            refused.append(steps)
            return False
        arrived.extend(steps)
        return True

    monkeypatch.setattr(otlp, "EVERY", 0.2)
    sender = otlp.Sender(export, "there", lambda: "it was away")
    for step in range(5):
        sender.write(step, {})
    with pytest.warns(UserWarning, match="1 of 5 logged steps did not reach"):
        sender.close()
    assert [numbers["step"] for _, numbers in arrived] == [1, 2, 3, 4]
    assert all(abs(nanoseconds / 1e9 - time.time()) < 600 for nanoseconds, _ in arrived)


@contextlib.contextmanager
def grpc_receiver(take):
    """The same over gRPC."""

    class Service(service.MetricsServiceServicer):
        def Export(self, request, context):
            take(request.SerializeToString())
            return messages.ExportMetricsServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    service.add_MetricsServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(0)


def points(bodies) -> dict[str, list]:
    """{metric: its values in order of time, each once}, and the attributes under ""."""
    values, attributes = {}, {}
    for body in bodies:
        request = messages.ExportMetricsServiceRequest.FromString(body)
        for resource in request.resource_metrics:
            for a in resource.resource.attributes:
                attributes[a.key] = a.value.string_value or a.value.int_value
            for metric in (m for s in resource.scope_metrics for m in s.metrics):
                for point in metric.gauge.data_points:
                    kind = point.WhichOneof("value")
                    values.setdefault(metric.name, {})[point.time_unix_nano] = getattr(point, kind)
    ordered = {name: [v for _, v in sorted(of.items())] for name, of in values.items()}
    return ordered | {"": attributes}


def train(folder, address, steps=STEPS, pause=0.005):
    """Log as a training does; the longest that a step waited for it."""
    longest = 0.0
    with Metrics(folder, steps, [f"otlp:{address}"]) as m:
        for step in range(1, steps + 1):
            start = time.monotonic()
            m.log(step, {"loss": 1.0 / step, "bad": math.nan, "huge": 2**70})
            longest = max(longest, time.monotonic() - start)
            time.sleep(pause)
    # whatever the collector did, the file has all
    assert len(read_jsonl(folder / "metrics.jsonl")) == steps
    return longest


@pytest.mark.parametrize("receiver", [http_receiver, grpc_receiver])
def test_every_step_arrives_with_run_stage_host_and_device(receiver, tmp_path):
    bodies = []
    run = tmp_path / "run7"
    run.mkdir()
    (run / "config.json").write_text("{}")

    def take(body):
        bodies.append(body)
        return 200, b""

    with receiver(take) as address, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(run / "sft", address) < 0.5
    got = points(bodies)
    assert got["step"] == list(range(1, STEPS + 1))
    assert got["loss"] == [1.0 / step for step in got["step"]]
    assert "bad" not in got and got["huge"] == [2.0**70] * STEPS
    about = got[""]
    assert (about["run"], about["stage"], about["device"]) == ("run7", "sft", "cpu")
    assert about["host"] == socket.gethostname() and about["devices"] >= 1


def bad_answers(kind, bodies):
    """A receiver that behaves badly for its first half a dozen requests, or always."""
    calls = []

    def take(body):
        calls.append(body)
        bad = 1 < len(calls) <= 6
        if kind == "delays" and bad:
            time.sleep(3.0)
        if kind == "refuses" and bad:
            return 503, b""
        if kind == "drops" and bad:
            return None, b""
        if kind == "lies" and bad:
            return 400, b"<html>certainly not protobuf"
        bodies.append(body)
        return 200, b"\xff" * 100 if kind == "lies" else b""

    return take


@pytest.mark.parametrize("kind", ["delays", "refuses", "drops", "lies"])
def test_a_bad_collector_is_waited_for_by_nobody(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(otlp, "LAST", 30.0)
    monkeypatch.setattr(otlp, "TIMEOUT", 0.2)
    bodies = []
    with http_receiver(bad_answers(kind, bodies)) as address, warnings.catch_warnings():
        warnings.simplefilter("always")
        assert train(tmp_path, address) < 0.5
    # what it had refused came again, in order
    assert points(bodies)["step"] == list(range(1, STEPS + 1))


def test_a_collector_that_dies_and_one_that_comes_back(tmp_path):
    bodies = []

    def take(body):
        bodies.append(body)
        return 200, b""

    with contextlib.ExitStack() as stack:
        address = stack.enter_context(http_receiver(take))
        with Metrics(tmp_path, 9, [f"otlp:{address}"]) as m:
            m.log(1, {"loss": 1.0})
            time.sleep(0.3)
            stack.close()
            m.log(2, {"loss": 2.0})
            time.sleep(1.5)
            with pytest.warns(UserWarning, match="takes no metrics.*training goes on") as told:
                m.log(3, {"loss": 3.0})
                m.log(4, {"loss": 4.0})
            assert len(told) == 1
            port = int(address.rpartition(":")[2])
            with http_receiver(take, port):
                m.log(5, {"loss": 5.0})
                time.sleep(1.0)
    assert points(bodies)["loss"] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_without_any_collector_the_queue_stays_bounded_and_the_end_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(otlp, "MAX_WAITING", 10)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.warns(UserWarning) as told:
        start = time.monotonic()
        assert train(tmp_path, f"http://127.0.0.1:{port}") < 0.5
        assert time.monotonic() - start < 5
    texts = [str(w.message) for w in told]
    assert "no collector answers at" in texts[0]
    assert f"{STEPS} of {STEPS} logged steps did not reach" in texts[-1]
    assert len(texts) <= 3


def test_a_hanging_collector_cannot_hold_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(otlp, "TIMEOUT", 30.0)
    monkeypatch.setattr(otlp, "LAST", 0.3)
    hang = threading.Event()
    calls = []

    def take(body):
        calls.append(body)
        if len(calls) > 1:
            hang.wait(20)
        return 200, b""

    with http_receiver(take) as address, pytest.warns(UserWarning, match="did not reach"):
        start = time.monotonic()
        train(tmp_path, address, pause=0.0)
        assert time.monotonic() - start < 3
        hang.set()


def test_another_protocol_is_one_sentence_before_anything_is_trained(tmp_path):
    with grpc_receiver(lambda body: None) as address:
        http_address = address.replace("grpc", "http")
        with pytest.raises(UserError, match="not as an OTLP collector over HTTP .*grpc://") as e:
            Metrics(tmp_path, 1, [f"otlp:{http_address}"])
        assert "\n" not in str(e.value)
    with http_receiver(lambda body: (404, b"")) as address:
        with pytest.raises(UserError, match="HTTP 404"):
            Metrics(tmp_path, 1, [f"otlp:{address}"])
        grpc_address = address.replace("http", "grpc")
        with pytest.raises(UserError, match="not as an OTLP collector over gRPC .*http://") as e:
            Metrics(tmp_path, 1, [f"otlp:{grpc_address}"])
        assert "\n" not in str(e.value)
        # a form is read before anything is compiled
        with pytest.raises(UserError, match="not as an OTLP collector over gRPC"):
            parse_writers(f"console, otlp:{grpc_address}")
    with pytest.raises(UserError, match="use http://HOST:4318"):
        Metrics(tmp_path, 1, ["otlp:ftp://host:21"])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_real_collector_passes_everything_on(protocol, tmp_path):
    rotel = pytest.importorskip("rotel", reason="needs a collector: pip install rotel")
    agent = shutil.which(str(Path(rotel.__file__).parent / "rotel-agent"))
    assert agent
    ports = dict(http=free_port(), grpc=free_port())
    bodies = []

    def take(body):
        bodies.append(body)
        return 200, b""

    with http_receiver(take) as beyond:
        command = [agent, "start", "--otlp-grpc-endpoint", f"127.0.0.1:{ports['grpc']}"]
        command += ["--otlp-http-endpoint", f"127.0.0.1:{ports['http']}", "--exporter", "otlp"]
        command += ["--otlp-exporter-endpoint", beyond, "--otlp-exporter-protocol", "http"]
        command += ["--batch-timeout", "100ms"]
        with open(tmp_path / "log", "w") as log:
            collector = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(ports[protocol])
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                train(tmp_path / "run8", f"{protocol}://127.0.0.1:{ports[protocol]}")
            deadline = time.monotonic() + 10
            while len(points(bodies).get("step", [])) < STEPS and time.monotonic() < deadline:
                time.sleep(0.1)
            got = points(bodies)
            assert got["step"] == list(range(1, STEPS + 1)), (tmp_path / "log").read_text()
            assert got[""]["run"] == "run8" and got[""]["stage"] == "base"

            # its other port speaks the other protocol
            wrong = dict(http="grpc", grpc="http")[protocol]
            with pytest.raises(UserError, match="not as an OTLP collector"):
                Metrics(tmp_path / "run9", 1, [f"otlp:{wrong}://127.0.0.1:{ports[protocol]}"])
        finally:
            collector.send_signal(signal.SIGTERM)
            collector.wait(20)


def wait_for(port):
    """Until something listens there."""
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert time.monotonic() < deadline
        time.sleep(0.05)
