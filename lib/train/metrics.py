"""Metrics: one `log(step, values)` to many writers, and a profiler window.

metrics.jsonl in the run folder is always written: one object per line with step, time (Unix
seconds) and the values. JSON has no NaN and no infinity: they stand there as the strings "NaN",
"Infinity", "-Infinity", and `read_jsonl` turns them back.
"""

import contextlib
import functools
import json
import math
import os
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax

from lib.files import UserError, choose, first_line, read_bytes, write_atomic
from lib.runtime import progress

MAX_PENDING = 100_000  # jsonl lines kept in memory while the disk is full


class RunInfo(NamedTuple):
    """What a writer may want to know about the run."""

    folder: Path
    total_steps: int
    resumed: int | None  # the step it goes on from; None for a new run
    config: dict
    # minutes of training that would be lost if this machine vanished now
    at_risk: Callable[[], float] = lambda: 0.0

    @property
    def names(self) -> tuple[str, str]:
        """(the run's name, its stage), whose folder lies within the run's but for `base`."""
        if (self.folder.parent / "config.json").exists():
            return self.folder.parent.name, self.folder.name
        return self.folder.name, "base"

    @property
    def title(self) -> str:
        """What a run is called where stages stand side by side: NAME, NAME/sft."""
        name, stage = self.names
        return name if stage == "base" else f"{name}/{stage}"


def _number(value):
    """A scalar array as Python's own number; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


class Metrics:
    """Writes metrics.jsonl in `run_dir` and to the named writers; a context manager.

    writers: names from WRITERS, or otlp with an address. One that can't start is a UserError,
    before anything is computed; one that fails later is switched off with one warning, and training
    goes on. resumed: the step a resumed run goes on from: lines beyond it are dropped, so that no
    step is there twice. None starts metrics.jsonl anew. config: JSON-able settings, shown by wandb.
    at_risk: minutes since the last save, shown on the console. On several hosts process 0 writes.
    """

    def __init__(
        self,
        run_dir,
        total_steps: int,
        writers: Sequence[str] = ("console",),
        *,
        resumed: int | None = None,
        config: dict | None = None,
        at_risk: Callable[[], float] = lambda: 0.0,
    ):
        self._writers = {}
        # of several processes one writes
        if jax.process_index():
            return
        run = RunInfo(Path(run_dir), total_steps, resumed, config or {}, at_risk)
        for name in dict.fromkeys([*writers, "jsonl"]):
            if writer := _find_writer(name)(run):
                self._writers[name] = writer

    def log(self, step: int, values: dict) -> dict:
        """Send {name: number or scalar array} to all writers and return it as Python numbers; None
        values are left out.

        Texts, such as samples, go to metrics.jsonl alone.
        This waits for device arrays: call it after the next step was dispatched.
        """
        host = jax.device_get(values)
        values = {name: _number(host[name]) for name in values if host[name] is not None}
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}

        # a list, as one that fails is taken out
        for name in list(self._writers):
            write, _ = self._writers[name]
            self._guard(name, write, step, values if name == "jsonl" else numbers)
        return values

    def close(self):
        """Let the writers send what they still hold."""
        for name in list(self._writers):
            _, close = self._writers[name]
            self._guard(name, close)
        self._writers = {}

    def _guard(self, name, function, *args):
        """Call a part of a writer, which is switched off when it fails."""
        try:
            function(*args)
        except Exception as e:
            del self._writers[name]
            warnings.warn(
                f"no more metrics to {name} ({type(e).__name__}: {first_line(e)}); "
                "training goes on",
                stacklevel=3,
            )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


# ---- writers: run -> (write(step, values), close()) ----------------------------------------------


SHOWN = {
    "loss": "loss {:.4f}",
    "val_bpb": "val bpb {:.4f}",
    "tokens_per_s": "{:,.0f} tok/s",
    "mfu": "MFU {:.1%}",
}


def _console(run: RunInfo):
    """A progress bar in a terminal or notebook, and about fifty lines a run elsewhere."""
    from tqdm import tqdm

    kernel = "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")
    every = max(1, run.total_steps // 50)
    first = None  # (step, time) of the first that was written
    shown = {}  # name: text of its newest value
    bar = progress(
        total=run.total_steps,
        initial=run.resumed or 0,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5,
        disable=not (kernel or sys.stderr.isatty()),
    )

    def write(step, values):
        nonlocal first
        now = time.monotonic()
        # what came before was compiling, and tells nothing about the rest
        first = first or (step, now)
        for name, form in SHOWN.items():
            if name in values:
                shown[name] = form.format(values[name])
        text = "  ".join(shown[name] for name in SHOWN if name in shown)
        # what a lost machine would cost
        if (minutes := run.at_risk()) >= 1:
            text += f"  {minutes:.0f} min since the last save"

        # the bar, or a line now and then
        if not bar.disable:
            bar.set_postfix_str(text, refresh=False)
            bar.update(step - bar.n)
            return
        begun, since = first
        if step > begun:
            left = (now - since) / (step - begun) * (run.total_steps - step)
            text += f"  ETA {tqdm.format_interval(left)}"
        if step % every == 0 or step in (begun, run.total_steps) or "loss" not in values:
            print(f"step {step}/{run.total_steps}  {text}", flush=True)

    return write, bar.close


def _jsonl(run: RunInfo):
    """Appends a line per log.

    When the disk is full, lines wait in memory and are written once there is room.
    """
    path = run.folder / "metrics.jsonl"
    # of a resumed run what it had written beyond its checkpoint goes: it will come again
    rows = []
    if run.resumed is not None and path.exists():
        rows = [row for row in read_jsonl(path) if row["step"] <= run.resumed]
    write_atomic(path, "".join(map(_line, rows)))
    size, pending = path.stat().st_size, []

    def flush():
        nonlocal size
        data = "".join(pending).encode()
        try:
            with open(path, "ab") as f:
                f.write(data)
        except OSError:
            os.truncate(path, size)  # no half lines
            raise
        size += len(data)
        pending.clear()

    def write(step, values):
        full = bool(pending)
        pending.append(_line({"step": step, "time": round(time.time(), 3)} | values))
        del pending[:-MAX_PENDING]
        try:
            flush()
        except OSError as e:
            # told once, not at each step
            if not full:
                warnings.warn(
                    f"cannot write {path} ({e.strerror}): metrics are kept in memory until there "
                    "is room; training goes on",
                    stacklevel=4,
                )

    return write, lambda: pending and flush()


def _tensorboard(run: RunInfo):
    """Event files in run/tensorboard.

    From tensorboard's parts: its own writer would import a TensorFlow that it finds.
    """
    try:
        # protobuf makes these classes at run time
        from tensorboard.compat.proto.event_pb2 import (
            Event,  # pyright: ignore[reportAttributeAccessIssue]
            SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
        )
        from tensorboard.compat.proto.summary_pb2 import (
            Summary,  # pyright: ignore[reportAttributeAccessIssue]
        )
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError:
        raise UserError("the tensorboard writer needs a package: pip install tensorboard") from None
    folder = run.folder / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
    events = RecordWriter(open(folder / name, "wb"))

    def send(step, **what):
        events.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())
        events.flush()

    send(0, file_version="brain.Event:2")
    # hides what came beyond, if resumed
    send((run.resumed or 0) + 1, session_log=SessionLog(status=SessionLog.START))

    def write(step, values):
        scalars = [Summary.Value(tag=name, simple_value=v) for name, v in values.items()]
        send(step, summary=Summary(value=scalars))

    return write, events.close


def _wandb(run: RunInfo, mode: Literal["online", "offline"]):
    """A Weights & Biases run named after the run folder, or the sweep's where one is active."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "the wandb writer needs a package: pip install wandb, or use wandb:off"
        ) from None
    # a resumed run goes on in the run that it began there
    id_file = run.folder / "wandb_id.txt"
    if run.resumed is None or not id_file.exists():
        write_atomic(id_file, uuid.uuid4().hex[:8])
    try:
        active = wandb.run or wandb.init(
            project="rawchat",
            name=run.title,
            dir=run.folder,
            mode=mode,
            config=run.config,
            id=id_file.read_text(),
            resume="allow",
        )
    except Exception as e:
        raise UserError(
            f"wandb cannot start ({first_line(e)}): run `wandb login`, check the network, "
            "or use wandb:offline or wandb:off"
        ) from e
    # its own counter could not go back to an earlier checkpoint's step
    active.define_metric("*", step_metric="step")
    return lambda step, values: active.log({"step": step} | values), active.finish


def _otlp(run: RunInfo, address: str = "http"):
    """OpenTelemetry gauges of every step; address: as lib.train.otlp.open_sender has it."""
    from lib.train.otlp import open_sender

    name, stage = run.names
    devices = jax.devices()
    attributes = {
        "run": name,
        "stage": stage,
        "host": socket.gethostname(),
        "device": devices[0].device_kind,
        "devices": len(devices),
    }
    return open_sender(address, attributes)


WRITERS = {
    "console": _console,
    "jsonl": _jsonl,
    "tensorboard": _tensorboard,
    "wandb:online": functools.partial(_wandb, mode="online"),
    "wandb:offline": functools.partial(_wandb, mode="offline"),
    "wandb:off": lambda run: None,
    "otlp": _otlp,
}


def _find_writer(name: str) -> Callable:
    """The entry of WRITERS, or otlp with an address: otlp:grpc, otlp:http://HOST:4318."""
    kind, _, address = name.partition(":")
    if kind == "otlp" and address:
        return functools.partial(_otlp, address=address)
    return choose("metrics writer", name, WRITERS)


def parse_writers(text: str) -> list[str]:
    """The names in a form's list, such as "console, wandb:online"; UserError for one that is
    unknown, and for a collector that speaks another protocol.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        _find_writer(name)
        if name.startswith("otlp"):
            from lib.train.otlp import check_collector

            check_collector(name.partition(":")[2] or "http")
    return names


# ---- reading back --------------------------------------------------------------------------------


# what JSON has no number for: as it stands in a line
NO_NUMBERS = {json.dumps(value): value for value in (math.nan, math.inf, -math.inf)}


def _line(row: dict) -> str:
    """A row as a line of metrics.jsonl."""
    values = {}
    for name, value in row.items():
        is_number = not isinstance(value, float) or math.isfinite(value)
        values[name] = value if is_number else json.dumps(value)
    return json.dumps(values, allow_nan=False) + "\n"


def _row(line: bytes) -> dict:
    """What `_line` wrote; ValueError, TypeError or KeyError where it is something else."""
    row = json.loads(line)
    values = {name: NO_NUMBERS.get(value, value) for name, value in row.items()}
    return {"step": row["step"]} | values


def read_jsonl(path) -> list[dict]:
    """The rows of a metrics.jsonl, oldest first.

    A last line torn by a crash is left out; other damage is a UserError.
    """
    rows = []
    lines = read_bytes(path).splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_row(line))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            # cut while it was written
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise UserError(
                f"{path} line {number} is not a metrics row: remove it, or start a new run"
            ) from None
    return rows


def column(rows: list[dict], name: str) -> tuple[list, list]:
    """(steps, values) of the rows that have `name`, for plotting."""
    having = [row for row in rows if name in row]
    return [row["step"] for row in having], [row[name] for row in having]


# ---- profiling -----------------------------------------------------------------------------------


@contextlib.contextmanager
def trace_window(run_dir, start: int, stop: int):
    """Yield `tick(step, state)`, to be called before each step is dispatched: steps start..stop are
    profiled.

    The trace lands in run_dir/trace (`tensorboard --logdir run_dir/trace`, Profile). `state` is
    waited for before the window opens and closes, so that it holds whole steps. stop < start
    profiles nothing.
    """
    active = False

    def switch(state=None):
        nonlocal active, stop
        active = not active
        try:
            jax.block_until_ready(state)
            if active:
                jax.profiler.start_trace(str(Path(run_dir) / "trace"))
            else:
                jax.profiler.stop_trace()
        except Exception as e:
            # a profiler that fails must not end the run
            active, stop = False, start - 1
            warnings.warn(f"no profiler trace ({first_line(e)}); training goes on", stacklevel=3)

    def tick(step, state=None):
        if active != (start <= step <= stop):
            switch(state)

    try:
        yield tick
    finally:
        if active:
            switch()
