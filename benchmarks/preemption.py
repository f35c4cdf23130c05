"""Kills trainings at random moments and starts them again on machines that know nothing of them.

    python -m benchmarks.preemption --kills 100
    python -m benchmarks.preemption --kills 12 --what pretraining rl --json out.json
    python -m benchmarks.preemption --kills 20 --home gs://mine/drill

What is killed are the notebooks themselves, at tiny shapes, as scripts: 02 (pretraining), 04
(fine-tuning), 05 (reinforcement) and 03 (a sweep). Each life of a run has an empty folder, as a new
machine has, and finds what there is at its home, a bucket. A life ends by SIGTERM (with a cloud's
notice of 30 s), by SIGKILL, or by SIGKILL after the network to the bucket was away for a while.

The same was trained before without any disturbance. Afterwards the newest checkpoint, as the bucket
has it, must be that one bit for bit: weights, optimizer state and all. (A sweep keeps no weights;
there every number of every trial must be the same.) Told are the steps that were lost with each
machine, and how long a new one takes to its first new step.

Pretraining is done once more with one or two devices, by lot. Two devices add up a sum in another
order, so that weights differ by rounding, which training lets grow. How far that alone leads is
measured, too: an undisturbed run on two devices. The disturbed one must not be farther away than
twice that. Reinforcement would write other words after such a difference, so it is not compared.

Compiled programs are kept from one life to the next, which a new machine would have to compile, so
that recovery here is without that time.

The bucket is moto's (pip install "moto[server]" s3fs), behind a proxy that is the network; with
--home it is a real one, whose network is not touched. Code: 1 where something differs.
"""

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib.files import UserError, write_json
from lib.home import Mirror, open_home, pull
from lib.sweeps import journal
from lib.train import checkpoint
from lib.train.metrics import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
RUN = "drill"
CORPUS = f"{sysconfig.get_path('stdlib')}/[a-c]*.py"

# a cloud's notice before a machine goes, in seconds
NOTICE = 30
# steps between two kills, the mean
STEPS_A_LIFE = 16
# a share of the kills that come before the first new step
EARLY = 0.2
# a life that does nothing new for so long is stuck
STUCK = 600
# how often the supervisor looks, in seconds
LOOK = 0.05

TINY = (
    "total_batch_size=1024 microbatch=2 sequence_len=64 n_embd=64 n_head=2 n_kv_head=1 "
    "head_dim=32 mlp_dim=128 warmup_steps=1"
)
SWEEP = """
method: grid
metric: {name: val_bpb, goal: minimize}
parameters:
  matrix_lr: {values: [0.01, 0.02, 0.04]}
  seed: {values: SEEDS}
  depth: {value: 2}
  num_steps: {value: 40}
  eval_bytes: {value: 4000}
  evals: {value: 4}
"""


# ---- what is trained -----------------------------------------------------------------------------


class Part(NamedTuple):
    """A kind of training: the script that does it, its flags, and where its steps are written."""

    script: str
    flags: dict[str, Any]
    steps: tuple[str, ...] = ()  # files of metrics, in their order; none: a sweep's journals
    store: str = ""  # checkpoints of what it makes; none: a sweep
    varied: bool = False  # with another number of devices now and then


def parts_of(kills: int, folder: Path) -> dict[str, Part]:
    """All parts, each long enough for so many kills."""
    steps = max(40, kills * STEPS_A_LIFE)
    text = dict(source=CORPUS)
    pretraining = Part(
        "02_train",
        text
        | dict(preset="cpu_demo", depth=2, num_steps=steps, overrides=TINY, strategy="dp")
        | dict(eval_bytes=4000, eval_every=10**6, sample_every=10**6, save_every=5),
        ("metrics.jsonl",),
        "checkpoints",
    )

    # conversations of so many passes; a row of it holds about as many as a step of the others takes
    passes = round(0.3 + steps / 150, 2)
    fine_tuning = Part(
        "04_eval_chat",
        dict(eval_bytes=4000, max_tokens=4, num_samples=1, tasks="none", say="Hi")
        | dict(mid=f"identity:{passes}", sft_mixture=f"identity:{passes / 2}"),
        ("mid/metrics.jsonl", "sft/metrics.jsonl"),
        "sft",
    )
    reward = ROOT / "tests/programs/reward_of_length.py"
    reinforcement = Part(
        "05_rl",
        dict(task="identity", reward=f"{reward}:of_length", num_steps=steps, questions=4)
        | dict(samples=4, max_tokens=8, test_items=4, test_samples=2, eval_every=5),
        ("rl/metrics.jsonl",),
        "rl",
    )
    sweep = folder / "sweep.yaml"
    sweep.write_text(SWEEP.replace("SEEDS", str(list(range(1 + steps // 120)))))
    trials = Part(
        "03_worker",
        text | dict(sweep=str(sweep), budget="cpu_demo", overrides=TINY, save_minutes=0.02),
    )
    return dict(
        pretraining=pretraining,
        devices=pretraining._replace(varied=True),
        finetuning=fine_tuning,
        rl=reinforcement,
        sweep=trials,
    )


# ---- a bucket, and the network to it -------------------------------------------------------------


class Network:
    """A way to a port of this machine that can be cut: nothing comes through, nothing is told."""

    def __init__(self, target: int):
        self.target = target
        self.there = threading.Event()
        self.there.set()
        self.pairs: list[socket.socket] = []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        """Let nothing through, and break what is open."""
        self.there.clear()
        for one in self.pairs:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self.pairs.clear()

    def mend(self):
        self.there.set()

    def _accept(self):
        while True:
            client, _ = self.server.accept()
            if not self.there.is_set():
                client.close()
                continue
            bucket = socket.create_connection(("127.0.0.1", self.target))
            self.pairs += [client, bucket]
            for pair in ((client, bucket), (bucket, client)):
                threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket):
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                if not self.there.is_set():
                    break
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.close()


def start_bucket() -> tuple[Network, str]:
    """A bucket in this process and the network to it; sets what S3's client reads."""
    import boto3
    from moto.server import ThreadedMotoServer

    # moto names every request otherwise
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0)
    server.start()
    network = Network(server.get_host_and_port()[1])
    os.environ |= dict(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{network.port}",
        AWS_ACCESS_KEY_ID="nobody",
        AWS_SECRET_ACCESS_KEY="nothing",
        AWS_DEFAULT_REGION="us-east-1",
    )
    boto3.client("s3").create_bucket(Bucket="drill")
    return network, "s3://drill"


# ---- one life ------------------------------------------------------------------------------------


class Life(NamedTuple):
    """What became of a run between a start and its end."""

    kind: str  # term, kill, network, or "" where it came to its own end
    devices: int
    began_at: int  # steps that were there when it began its first new one; -1: it never did
    reached: int  # its last new step
    recovery: float  # seconds from its start to its first new step
    step_seconds: float  # the mean


class Machine:
    """A folder that was empty, and the process that works in it."""

    def __init__(self, part: Part, home: str, folder: Path, devices: int):
        self.part, self.folder, self.devices = part, folder, devices
        folder.mkdir(parents=True)
        flags = part.flags | dict(run=RUN, home=home)
        words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        env = os.environ | dict(
            JAX_PLATFORMS="cpu",
            XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
            MPLBACKEND="agg",
        )
        # the notebooks' own, which keeps small programs too
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
        self.log = folder / "output.txt"
        self.started = time.time()
        with open(self.log, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / f"{part.script}.py", *words],
                cwd=folder,
                env=env,
                stdout=output,
                stderr=output,
            )

    def run(self, home: str) -> Path:
        """The run's folder on this machine."""
        place = Path(home) if home.startswith("/") else self.folder
        return place / "runs" / RUN

    def new_steps(self, run: Path) -> list[tuple[int, float, float]]:
        """(step counted over all files, when, seconds) of what this life has written."""
        before, steps = 0, []
        for name in self.part.steps:
            rows = [row for row in read_steps(run / name) if "loss" in row]
            for row in rows:
                if row["time"] >= self.started:
                    steps.append((before + row["step"], row["time"], row["step_time"]))
            before += rows[-1]["step"] if rows else 0
        if not self.part.steps:
            steps = [(n, t, 0.0) for n, t in enumerate(self._reports(run)) if t >= self.started]
        return steps

    def _reports(self, run: Path) -> list[float]:
        """When a trial of the sweep was validated, by the journals of all workers."""
        events = []
        for path in run.glob("sweeps/*/journal/*.jsonl"):
            for line in path.read_text().splitlines():
                # a killed worker's last line may be torn
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    events += [row["t"]] if row["e"] == "report" else []
        return sorted(events)


def read_steps(path: Path) -> list[dict]:
    """The whole lines of a file that another process writes."""
    if not path.exists():
        return []
    with contextlib.suppress(UserError, FileNotFoundError):
        return read_jsonl(path)
    return []


def live(machine: Machine, home: str, kind: str, most: int, dice: random.Random, network) -> Life:
    """Let a machine work, and end it by `kind` at a random moment; "" lets it finish.

    most: new steps before its end, if it comes to any.
    """
    run = machine.run(home)
    early = dice.random() < EARLY
    wanted = 0 if early else dice.randint(1, most)
    moment = dice.uniform(0, 15) if early else dice.uniform(0, 0.6)

    # wait for the step by which it is to end
    steps, changed = [], time.time()
    while machine.process.poll() is None:
        fresh = machine.new_steps(run)
        if len(fresh) != len(steps):
            steps, changed = fresh, time.time()
        if kind and len(steps) >= wanted:
            break
        if time.time() - changed > STUCK:
            machine.process.kill()
            raise SystemExit(f"stuck: {machine.log.read_text()[-3000:]}")
        time.sleep(LOOK)

    if machine.process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            machine.process.wait(moment)
    ended = machine.process.poll()
    if ended is None:
        end(machine, kind, dice, network)
    elif ended:
        # not killed, and not well
        raise SystemExit(f"code {ended} by itself: {machine.log.read_text()[-3000:]}")
    else:
        kind = ""

    steps = machine.new_steps(run)
    if not steps:
        return Life(kind, machine.devices, -1, -1, 0.0, 0.0)
    return Life(
        kind,
        machine.devices,
        steps[0][0] - 1,
        steps[-1][0],
        steps[0][1] - machine.started,
        statistics.fmean(seconds for _, _, seconds in steps),
    )


def end(machine: Machine, kind: str, dice: random.Random, network):
    """End a machine's process as clouds and accidents do."""
    if kind == "network":
        network.cut()
        with contextlib.suppress(subprocess.TimeoutExpired):
            machine.process.wait(dice.uniform(1, 6))
        machine.process.kill()
        machine.process.wait()
        network.mend()
    elif kind == "term":
        machine.process.send_signal(signal.SIGTERM)
        try:
            machine.process.wait(NOTICE)
        except subprocess.TimeoutExpired:
            machine.process.kill()
    else:
        machine.process.kill()
    machine.process.wait()


# ---- a run that is disturbed, and one that is not ------------------------------------------------


def undisturbed(part: Part, home: Path, work: Path, devices: int = 1) -> int:
    """Train a part in a folder that serves as home; how many steps that were.

    SystemExit where it fails.
    """
    machine = Machine(part, str(home), work, devices)
    if machine.process.wait():
        raise SystemExit(f"undisturbed, {part.script}: {machine.log.read_text()[-3000:]}")
    shutil.rmtree(work)
    return len(machine.new_steps(machine.run(str(home))))


def send(run: Path, home: str):
    """Put a run's folder into a bucket, as its home: the reference as it stands now."""
    Mirror(open_home(home), run).wait()


def disturbed(
    part: Part, home: str, work: Path, plan: tuple[int, int], dice: random.Random, network
) -> list[Life]:
    """The lives of a run until it is finished. plan: how often it is killed, and its steps."""
    kinds = ["term", "kill", "network"] if network else ["term", "kill"]
    kills, total = plan
    lives = []
    while not lives or lives[-1].kind:
        kind = ""
        if len(lives) < kills:
            # each in its turn, so that all come equally often
            kind = kinds[len(lives) % len(kinds)]
        # so far that each of the kills to come finds something to interrupt
        reached = max((life.reached for life in lives), default=0)
        most = max(1, 2 * (total - reached) // (kills - len(lives) + 1))
        devices = dice.choice((1, 2)) if part.varied else 1
        place = work / f"life-{len(lives)}"
        machine = Machine(part, home, place, devices)
        try:
            life = live(machine, home, kind, most, dice, network)
        finally:
            machine.process.kill()
        lives.append(life)
        print(f"    {len(lives):3} {told(life)}", flush=True)
        shutil.rmtree(place)
    return lives


def told(life: Life) -> str:
    """A life in a line."""
    ending = life.kind or "finished"
    if life.began_at < 0:
        return f"{ending:9} before its first new step"
    return (
        f"{ending:9} steps {life.began_at + 1} to {life.reached} on {life.devices} device(s), "
        f"the first after {life.recovery:.1f} s"
    )


def losses(lives: list[Life]) -> list[int]:
    """Steps that were lost with each machine that had taken any."""
    lost, last = [], None
    for life in lives:
        if life.began_at < 0:
            continue
        if last is not None:
            lost.append(max(0, last - life.began_at))
        last = life.reached
    return lost


# ---- is it the same? -----------------------------------------------------------------------------


def arrays_of(store: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint by file and name."""
    from safetensors.numpy import load_file

    path = checkpoint.latest(store)
    if path is None:
        raise SystemExit(f"no checkpoint in {store}")
    arrays = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        for name, array in load_file(file).items():
            arrays[f"{file.stem}/{name}"] = array
    return arrays


def differing(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> list[str]:
    """Names of arrays that are not the same to the last bit."""
    names = sorted(ours.keys() | theirs.keys())
    return [
        name
        for name in names
        if name not in ours or name not in theirs or ours[name].tobytes() != theirs[name].tobytes()
    ]


def distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The norm of the difference of all parameters, as a share of the parameters' norm."""
    names = [name for name in ours if name.startswith("params/")]
    difference = sum(float(np.sum((ours[n] - theirs[n]) ** 2.0)) for n in names)
    return (difference / sum(float(np.sum(ours[n] ** 2.0)) for n in names)) ** 0.5


def trials_of(run: Path) -> dict[str, Any]:
    """All numbers of all trials that do not depend on the clock."""
    [folder] = run.glob("sweeps/*")
    trials = journal.trials(folder)
    return {
        json.dumps(t.assignment, sort_keys=True): [t.state, t.value, t.reports, t.curve]
        for t in trials
    }


def verdict(part: Part, before: Path, after: Path, noise: float | None) -> tuple[bool, str]:
    """(whether the disturbed run is the undisturbed one, in words)."""
    if not part.steps:
        ours, theirs = trials_of(before), trials_of(after)
        # text compares numbers to their last bit
        same = json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True)
        return same, f"{len(ours)} trials, every number {'the same' if same else 'NOT the same'}"
    ours, theirs = arrays_of(before / part.store), arrays_of(after / part.store)
    if noise is not None:
        far = distance(ours, theirs)
        within = far <= 2 * noise
        return within, (
            f"parameters {far:.1e} away (relative norm), {noise:.1e} by two devices alone: "
            f"{'within' if within else 'NOT within'} twice that"
        )
    names = differing(ours, theirs)
    if names:
        return False, f"{len(names)} of {len(ours)} arrays differ: {', '.join(names[:3])}"
    return True, f"{len(ours)} arrays, bit for bit the same"


# ---- the drill -----------------------------------------------------------------------------------


def drill(
    name: str, part: Part, folder: Path, home: str, kills: int, dice: random.Random, network
) -> dict[str, Any]:
    """Disturb one part, whose undisturbed twin is trained first in `folder`/reference."""
    reference = folder / "reference"
    run = reference / "runs" / RUN
    home = f"{home}/{name}-{dice.randrange(10**9)}"
    began = time.time()

    # with other devices, the undisturbed run is there already; a second one tells the noise
    noise = None
    if part.varied:
        other = folder / "other"
        (other / "runs").mkdir(parents=True)
        shutil.copytree(folder / "before-pretraining", other / "runs" / RUN)
        send(other / "runs" / RUN, home)
        steps = undisturbed(part, other, folder / "alone", devices=2)
        stores = (run / part.store, other / "runs" / RUN / part.store)
        noise = distance(*map(arrays_of, stores))
    else:
        shutil.copytree(run, folder / f"before-{name}")
        send(run, home)
        steps = undisturbed(part, reference, folder / "alone")

    print(f"{name}: {kills} kills", flush=True)
    lives = disturbed(part, home, folder / "machines", (kills, steps), dice, network)

    # what the bucket has is what counts
    place = open_home(home)._replace(runs_dir=folder / "back" / name)
    pull(place, RUN)
    same, words = verdict(part, run, place.runs_dir / RUN, noise)
    row = dict(part=name, same=same, words=words, kills=sum(bool(life.kind) for life in lives))
    row |= figures(lives) | dict(minutes=(time.time() - began) / 60)
    print(f"  {'ok  ' if same else 'FAIL'} {words}\n  {summary(row)}", flush=True)
    return row


def figures(lives: list[Life]) -> dict[str, Any]:
    """What the lives come to, in numbers."""
    kinds = [life.kind for life in lives if life.kind]
    recoveries = [life.recovery for life in lives if life.began_at >= 0]
    lost = losses(lives)
    seconds = [life.step_seconds for life in lives if life.began_at >= 0]
    return dict(
        kinds={kind: kinds.count(kind) for kind in sorted(set(kinds))},
        before_first_step=sum(life.began_at < 0 for life in lives),
        # the last life may have found all steps done
        steps=max(life.reached for life in lives),
        lost_steps=lost,
        step_seconds=statistics.fmean(seconds) if seconds else 0.0,
        recovery_seconds=recoveries,
        devices=sorted({life.devices for life in lives}),
    )


def summary(row: dict[str, Any]) -> str:
    """The figures of a part in a line or two."""
    lost, recovery = row["lost_steps"] or [0], row["recovery_seconds"] or [0.0]
    kinds = ", ".join(f"{count} {kind}" for kind, count in row["kinds"].items())
    return (
        f"{row['kills']} kills ({kinds}; {row['before_first_step']} before a first new step): "
        f"lost {statistics.median(lost):.0f} steps (median), {max(lost)} at most, "
        f"{sum(lost)} of {row['steps']} in all, a step {row['step_seconds']:.2f} s; "
        f"first new step after {statistics.median(recovery):.1f} s (median), "
        f"{max(recovery):.1f} at most"
    )


def main(
    kills: int = 100,
    what: tuple[str, ...] = ("pretraining", "devices", "finetuning", "rl", "sweep"),
    home: str = "",
    seed: int = 0,
    json: str | None = None,
) -> bool:
    """Kill trainings and compare what becomes of them with undisturbed ones.

    Args:
        kills: in all, shared equally among the parts
        what: of pretraining, devices (pretraining on one or two devices), finetuning, rl, sweep
        home: a bucket of yours (gs://…, s3://…); empty: a stand-in here, whose network is cut too
        seed: of the moments; what else the machine does moves them all the same
        json: file to write the figures to
    """
    dice = random.Random(seed)
    network, address = (None, home) if home else start_bucket()
    results = []
    with tempfile.TemporaryDirectory(prefix="drill-") as temporary:
        folder = Path(temporary)
        each = max(1, kills // len(what))
        parts = parts_of(each, folder)
        unknown = set(what) - parts.keys()
        if unknown:
            raise SystemExit(f"no part {', '.join(unknown)}: {', '.join(parts)}")

        # a tokenizer for all of them
        tokens = Part("01_tokenizer", dict(source=CORPUS, vocab_size=512))
        undisturbed(tokens, folder / "reference", folder / "alone")
        for name, part in parts.items():
            if name in what:
                results.append(drill(name, part, folder, address, each, dice, network))
            elif needed(name, what):
                # what a later part begins with
                shutil.copytree(folder / "reference/runs" / RUN, folder / f"before-{name}")
                undisturbed(part, folder / "reference", folder / "alone")
    if json:
        write_json(json, results)
    return all(row["same"] for row in results)


def needed(name: str, what: tuple[str, ...]) -> bool:
    """Whether another part begins with what this one makes."""
    later = dict(pretraining=("devices", "finetuning", "rl"), finetuning=("rl",))
    return bool(set(later.get(name, ())) & set(what))


if __name__ == "__main__":
    import tyro

    raise SystemExit(0 if tyro.cli(main) else 1)
