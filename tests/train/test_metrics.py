import errno
import gzip
import http.server
import json
import math
import sys
import threading
import time
import types
import warnings

import jax
import jax.numpy as jnp
import pytest

from lib.files import UserError
from lib.train import metrics
from lib.train.metrics import WRITERS, Metrics, column, parse_writers, read_jsonl, trace_window


@pytest.fixture
def fake_wandb(monkeypatch):
    """A wandb without a server: remembers what it is told."""
    said = types.SimpleNamespace(run=None, calls=[], rows=[], init_error=None)

    def init(**kwargs):
        if said.init_error:
            raise said.init_error
        said.calls.append(kwargs)
        return types.SimpleNamespace(
            define_metric=lambda *a, **k: None, log=said.rows.append, finish=lambda: None
        )

    said.init = init
    monkeypatch.setitem(sys.modules, "wandb", said)
    return said


@pytest.fixture
def collector(monkeypatch):
    """An OTLP collector on the loopback interface; the fixture's value is the list of request
    bodies.
    """
    bodies = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            bodies.append(
                gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            )
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield bodies
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_takes_any_number_and_jsonl_has_it_too(name, tmp_path, fake_wandb, collector):
    values = {
        "loss": jnp.float32(1.5),
        "half": jnp.bfloat16(0.5),
        "n": 3,
        "mfu": None,
        "bad": math.nan,
        "up": math.inf,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a writer that fails would warn
        with Metrics(tmp_path, 10, [name], config={"depth": 2}) as m:
            m.log(1, {"val_bpb": 2.0})
            got = m.log(2, values)
    assert math.isnan(got.pop("bad")) and got == {"loss": 1.5, "half": 0.5, "n": 3, "up": math.inf}
    assert list(map(type, got.values())) == [float, float, int, float]
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert (
        [row["step"] for row in rows] == [1, 2] and rows[1]["loss"] == 1.5 and "mfu" not in rows[1]
    )


def test_texts_go_to_jsonl_alone(tmp_path, fake_wandb):
    with warnings.catch_warnings(), Metrics(tmp_path, 1, ["wandb:online", "tensorboard"]) as log:
        warnings.simplefilter("error")  # a writer that cannot take them would be switched off
        log.log(1, {"loss": 2.0, "samples": "Once\n\nupon"})
        log.log(2, {"loss": 1.0})
    assert [row.get("samples") for row in read_jsonl(tmp_path / "metrics.jsonl")] == [
        "Once\n\nupon",
        None,
    ]
    assert fake_wandb.rows == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_jsonl_is_strict_json_and_not_a_number_comes_back(tmp_path):
    with Metrics(tmp_path, 1, []) as m:
        m.log(1, {"a": math.nan, "b": -math.inf, "c": 0.1})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["a"], line["b"]) == ("NaN", "-Infinity")
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert math.isnan(row["a"]) and row["b"] == -math.inf and row["c"] == 0.1


def test_resume_leaves_no_step_twice_and_repairs_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Metrics(tmp_path, 10, []) as m:
        for step in range(1, 8):
            m.log(step, {"loss": 1.0 / step})
    with open(path, "a") as f:
        f.write('{"step": 8, "lo')  # killed while writing
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3, 4, 5, 6, 7]
    with Metrics(tmp_path, 10, [], resumed=5) as m:
        m.log(6, {"loss": 9.0, "val_bpb": 2.0})
    rows = read_jsonl(path)
    assert column(rows, "loss") == ([1, 2, 3, 4, 5, 6], [1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 9.0])
    assert column(rows, "val_bpb") == ([6], [2.0])
    with Metrics(tmp_path, 10, []):
        pass
    assert read_jsonl(path) == []  # a new run


@pytest.mark.parametrize("bad", ['{"step": 2, "lo\n', "[1]\n", '{"loss": 1}\n'])
def test_damage_inside_the_file_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + bad + '{"step": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl line 2"):
        read_jsonl(path)


class FullDisk:
    """What `open` gives on a disk that takes a part of a line."""

    def __init__(self, path, mode):
        self.f = open(path, mode)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.f.close()

    def write(self, data):
        self.f.write(data[:7])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_loses_nothing_and_warns_once(tmp_path, monkeypatch):
    with Metrics(tmp_path, 9, []) as m:
        m.log(1, {"loss": 1.0})
        with (
            monkeypatch.context() as disk,
            pytest.warns(UserWarning, match="No space left.*goes on") as warned,
        ):
            disk.setattr(metrics, "open", FullDisk, raising=False)
            m.log(2, {"loss": 2.0})
            m.log(3, {"loss": 3.0})
        assert len(warned) == 1
        assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1]
        m.log(4, {"loss": 4.0})
    assert column(read_jsonl(tmp_path / "metrics.jsonl"), "loss") == (
        [1, 2, 3, 4],
        [1.0, 2.0, 3.0, 4.0],
    )


def test_of_more_lines_than_wait_for_room_the_newest_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_PENDING", 2)
    with Metrics(tmp_path, 9, []) as m:
        with monkeypatch.context() as disk, pytest.warns(UserWarning, match="No space left"):
            disk.setattr(metrics, "open", FullDisk, raising=False)
            for step in (1, 2, 3, 4):
                m.log(step, {"loss": 1.0})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 4]
    assert all(abs(row["time"] - time.time()) < 600 for row in rows)


def test_a_failing_writer_is_switched_off_alone(tmp_path, monkeypatch):
    calls = []

    def write(step, values):
        calls.append(step)
        raise ConnectionError("server away\nlong story")

    monkeypatch.setitem(WRITERS, "broken", lambda run: (write, lambda: calls.append("closed")))
    with Metrics(tmp_path, 9, ["broken"]) as m:
        with pytest.warns(
            UserWarning, match=r"no more metrics to broken \(ConnectionError: server away\)"
        ):
            m.log(1, {"loss": 1.0})
        m.log(2, {"loss": 2.0})
    assert calls == [1]
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2


def test_unknown_writer_lists_the_names_and_touches_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(
        UserError,
        match="unknown metrics writer 'tensorbord'.*tensorboard, wandb:off, wandb:offline",
    ):
        Metrics(tmp_path, 1, ["tensorbord"])
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1


def test_a_forms_list_of_writers_is_read_before_anything_is_computed():
    """Blanks and empty names are the form's; an unknown one is refused."""
    text = "console, otlp:http://127.0.0.1:9 ,,wandb:off"
    assert parse_writers(text) == ["console", "otlp:http://127.0.0.1:9", "wandb:off"]
    assert parse_writers("") == []
    with pytest.raises(UserError, match="unknown metrics writer 'tensorbord'"):
        parse_writers("console, tensorbord")


def test_run_folder_blocked_by_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        Metrics(tmp_path / "run", 1, [])


def test_console_prints_some_lines_to_a_log_file(tmp_path, capsys):
    with Metrics(tmp_path, 200, ["console"]) as m:
        for step in range(1, 201):
            m.log(step, {"loss": 2.0, "tokens_per_s": 12345.6, "mfu": 0.415, "lr": 1.0})
            if step == 101:
                m.log(step, {"val_bpb": 1.25})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 52  # the first, every fourth, and the evaluation
    assert lines[0] == "step 1/200  loss 2.0000  12,346 tok/s  MFU 41.5%"
    assert lines[-1].startswith(
        "step 200/200  loss 2.0000  val bpb 1.2500  12,346 tok/s  MFU 41.5%  ETA 00:0"
    )


def test_the_time_left_by_hand(tmp_path, capsys, monkeypatch):
    """99 steps in 99 seconds, a hundred more to come."""
    clock = types.SimpleNamespace(time=time.time, monotonic=iter([0.0, 99.0]).__next__)
    monkeypatch.setattr(metrics, "time", clock)
    with Metrics(tmp_path, 200, ["console"]) as m:
        m.log(1, {"loss": 2.0})
        m.log(100, {"loss": 2.0})
    assert "ETA 01:40" in capsys.readouterr().out


def test_console_shows_a_bar_in_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Metrics(tmp_path, 10, ["console"], resumed=4) as m:
        m.log(10, {"loss": 2.0, "mfu": 0.5})
    out, err = capsys.readouterr()
    assert out == "" and "10/10" in err and "loss 2.0000  MFU 50.0%" in err


def test_tensorboard_is_written_without_tensorflow(tmp_path, monkeypatch):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    # as in a process that has not imported tensorboard yet
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    with Metrics(tmp_path / "run", 10, ["tensorboard"]) as m:
        m.log(1, {"loss": 1.0})
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert events.stat().st_size > 100


def test_tensorboard_reads_the_events_and_resume_hides_the_rest(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(tmp_path, 10, ["tensorboard"]) as m:
        for step in range(1, 7):
            m.log(step, {"loss": float(step)})
    with Metrics(tmp_path, 10, ["tensorboard"], resumed=3) as m:
        m.log(4, {"loss": 40.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_wandb_takes_up_the_same_run(tmp_path, fake_wandb):
    for resumed in (None, 5, None):
        with Metrics(tmp_path, 10, ["wandb:offline"], resumed=resumed, config={"depth": 2}) as m:
            m.log(6, {"loss": 1.0})
    first, second, third = fake_wandb.calls
    assert first["id"] == second["id"] != third["id"]
    assert (
        first["mode"] == "offline"
        and first["config"] == {"depth": 2}
        and first["name"] == tmp_path.name
    )
    assert fake_wandb.rows[0] == {"step": 6, "loss": 1.0}


def test_wandb_shows_a_stage_as_a_run_beside_its_base(tmp_path, fake_wandb):
    (tmp_path / "config.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "sft"):
        Metrics(folder, 10, ["wandb:offline"]).close()
    base, sft = fake_wandb.calls
    assert (base["name"], sft["name"]) == (tmp_path.name, f"{tmp_path.name}/sft")
    assert base["id"] != sft["id"]


def test_wandb_without_login_or_package(tmp_path, monkeypatch, fake_wandb):
    fake_wandb.init_error = RuntimeError("No API key configured.")
    with pytest.raises(UserError, match="wandb cannot start .No API key.*wandb:offline"):
        Metrics(tmp_path, 1, ["wandb:online"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Metrics(tmp_path, 1, ["wandb:online"])
    Metrics(tmp_path, 1, ["wandb:off"]).close()


@pytest.mark.slow
def test_wandb_offline_for_real(tmp_path):
    pytest.importorskip("wandb", reason="needs the wandb extra")
    with Metrics(tmp_path, 2, ["wandb:offline"], config={"depth": 2}) as m:
        m.log(1, {"our_loss": 1.5})
    (data,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    # wandb's finish() may return before its service process has written the file
    deadline = time.monotonic() + 20
    while b"our_loss" not in data.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "name, module",
    [("tensorboard", "tensorboard.compat.proto.event_pb2"), ("otlp", "opentelemetry.sdk.metrics")],
)
def test_a_missing_package_says_what_to_install(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"the {name} writer needs .*: pip install"):
        Metrics(tmp_path, 1, [name])


def test_trace_window_profiles_its_steps_only(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda folder: calls.append(("start", step, folder))
    )
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", step)))
    with trace_window(tmp_path, 3, 5) as tick:
        for step in range(1, 10):
            tick(step, jnp.ones(()))
    assert calls == [("start", 3, str(tmp_path / "trace")), ("stop", 6)]
    calls.clear()
    with trace_window(tmp_path, 3, 5) as tick:
        for step in range(1, 5):
            tick(step)
    with trace_window(tmp_path, 1, 0) as tick:
        for step in range(5):
            tick(step)
    # a loop that ends early closes its trace
    assert [c[:2] for c in calls] == [("start", 3), ("stop", 4)]


def test_trace_is_written_with_scopes_and_a_failure_is_survived(tmp_path):
    @jax.jit
    def step(x):
        with jax.named_scope("attention"):
            return jnp.sin(x @ x)

    x = step(jnp.ones((64, 64)))
    with trace_window(tmp_path, 1, 1) as tick:
        for i in range(3):
            tick(i, x)
            x = step(x)
    (trace,) = (tmp_path / "trace").rglob("*.xplane.pb")
    assert b"attention" in trace.read_bytes() and b"jit_step" in trace.read_bytes()
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="no profiler trace .*training goes on"):
        with trace_window(tmp_path / "file", 0, 0) as tick:
            tick(0)
            step(x).block_until_ready()
            tick(1)
            tick(2)


def test_console_says_what_a_lost_machine_would_cost(tmp_path, capsys):
    minutes = iter([0.4, 3.2])
    with Metrics(tmp_path, 2, ["console"], at_risk=lambda: next(minutes)) as m:
        m.log(1, {"loss": 2.0})
        m.log(2, {"loss": 1.0})
    first, second = capsys.readouterr().out.splitlines()
    assert "since the last save" not in first
    assert "3 min since the last save" in second


# ---- by hand -------------------------------------------------------------------------------------


def test_what_a_run_is_called(tmp_path):
    stage = tmp_path / "nest" / "sft"
    stage.mkdir(parents=True)
    about = lambda folder: metrics.RunInfo(folder, 1, None, {})
    assert about(stage).names == ("sft", "base") and about(stage).title == "sft"
    (tmp_path / "nest" / "config.json").write_text("{}")
    assert about(stage).names == ("nest", "sft") and about(stage).title == "nest/sft"
    assert about(stage).at_risk() == 0


def test_of_several_processes_the_first_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    with Metrics(tmp_path / "run", 1, ["console", "nonsense"]) as log:
        assert log.log(1, {"loss": jnp.float32(2.0), "none": None}) == {"loss": 2.0}
    assert not (tmp_path / "run").exists()


def lines_of(capsys, run, steps, **values):
    """What the console shows of these steps."""
    write, close = metrics._console(run)
    for step in steps:
        write(step, {"loss": 2.0} | values)
    close()
    return [line.split("  ETA")[0] for line in capsys.readouterr().out.splitlines()]


def test_lines_on_the_console(tmp_path, capsys):
    about = lambda total, risk=0.0: metrics.RunInfo(tmp_path, total, None, {}, lambda: risk)
    assert lines_of(capsys, about(49), range(1, 50)) == [
        f"step {n}/49  loss 2.0000" for n in range(1, 50)
    ]
    # every second one, the first and the last
    shown = [1, *range(2, 101, 2), 101]
    assert lines_of(capsys, about(101), range(1, 102)) == [
        f"step {n}/101  loss 2.0000" for n in shown
    ]
    for minutes, words in ((0.99, ""), (1.0, "  1 min since the last save")):
        assert lines_of(capsys, about(9, minutes), [1]) == [f"step 1/9  loss 2.0000{words}"]


def test_what_a_collector_is_told_of_where_numbers_come_from(tmp_path, monkeypatch):
    from lib.train import otlp

    given, checked = [], []
    monkeypatch.setattr(otlp, "open_sender", lambda *what: given.append(what) or "sender")
    monkeypatch.setattr(otlp, "check_collector", checked.append)
    about = metrics.RunInfo(tmp_path / "nest", 1, None, {})
    assert metrics._find_writer("otlp")(about) == "sender"
    metrics._find_writer("otlp:grpc")(about)
    assert [address for address, _ in given] == ["http", "grpc"]
    attributes = dict(run="nest", stage="base", devices=len(jax.devices()))
    attributes |= dict(device=jax.devices()[0].device_kind, host=metrics.socket.gethostname())
    assert given[0][1] == attributes
    parse_writers("console, wandb:off, otlp, otlp:grpc")
    assert checked == ["http", "grpc"]
