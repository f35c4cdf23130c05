"""Running Python that nobody has read: in a process of its own, behind the walls of jail.py.

What is kept out, by layer (`available()` says which this machine has; what the kernel refuses
is left out for all programs):

always       Environment scrubbed; own temporary folder, deleted afterwards (unless the caller
             is killed); standard input never the caller's; descriptors, size of one file and
             processor time limited; killed as a process group when time is up, when it prints
             too much, and at its end. Linux: address space limited, capabilities dropped, dies
             with its caller; run as root it becomes a user that nothing else belongs to, if
             such a one can read Python.
namespaces   (Linux, where root or users may make them) A file system of Python's library, the
             shared libraries and four devices, read-only, and its own folder, in memory and
             limited in size; no network devices; no other process to be seen or signalled; all
             of its processes end with the first, and their number is limited.
landlock     (Linux 5.13 and later) Opens only the same files; of others it can still learn
             whether they exist. From 6.7 on no TCP, from 6.12 on no signals to others.
seccomp      (Linux on x86_64 and aarch64) One process with threads: no other processes or
             programs, so nothing can outlive it; no sockets but pairs of its own; no signals,
             tracing, limits or priorities of other processes, and no descriptor that signals
             them; no shared memory that stays; none of the kernel's administrative calls.

With seccomp and one of the other two a program can't read the caller's files (/etc/passwd,
keys) or environment, reach the network, touch other processes or leave anything behind. Not
kept out even then: bugs in the kernel, timing and other side channels, a processor per thread
and `memory` until time is up; and, without namespaces, filling the disk with many files until
then. With seccomp alone it can read and write what you (or, as root, everybody) can. With no
layer at all (macOS, old kernels) it runs with your rights: it can read and delete your files,
use the network, signal your processes. There it can start no other process and on Linux no
thread either, unless you are root; and on macOS its memory isn't limited. Only run what you
trust like that.
"""

import contextlib
import functools
import json
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lib.files import UserError, choose

LAYERS = ("namespaces", "landlock", "seccomp")
START = 20.0  # seconds a child may take to build its walls, on a very busy machine
MIB = 1 << 20
MEMORY = 48 * MIB  # Python's own need, with some room
LONGEST = 1 << 20  # characters of a program
STATUS_BYTES = 4096  # that are kept of what the child tells about itself
JAIL = Path(__file__).with_name("jail.py")

# -S and no bytecode: quick, and only the standard library. A fixed hash seed in place of -I, whose
# other parts are here.
PYTHON = [sys.executable, "-s", "-P", "-S", "-B", "-X", "utf8"]


class Result(NamedTuple):
    """How a program went.

    ok: it ran to its last line without an exception. reason: else one sentence, for people to read.
    """

    ok: bool
    stdout: str
    stderr: str
    reason: str


class Limits(NamedTuple):
    """What a program may use. output: bytes of stdout and of stderr each."""

    timeout: float
    memory: int
    output: int


class Wall(NamedTuple):
    """A wall that could not be built, so that the program was not run."""

    layer: str
    why: str


def run_python(
    code: str,
    *,
    timeout: float = 5.0,
    memory: int = 256 * MIB,
    stdin: str = "",
    output: int = 256 << 10,
    name: str = "__main__",
    layers: tuple[str, ...] | None = None,
) -> Result:
    """Run a Python program that nobody has read, in a process of its own, and say how it went.

    timeout: seconds from its first line; processor time is limited to about the same.
    memory: bytes of address space. stdin: what it can read there. output: bytes kept of stdout and
    of stderr each; one that prints more is killed. name: its `__name__`; any but "__main__" leaves
    out its main part. layers: only these of `available()`, for tests. Safe to call from several
    threads (`run_many`). Only the standard library can be imported. Hashes of strings are the same
    in every run.

    ok means that the last line was reached: a program that leaves early, by sys.exit(0) say, isn't
    ok (else a wrong answer could skip its tests by leaving). A program that is out to cheat the
    tests appended to it still can, as both share one interpreter; read ok as "an honest program is
    right". Raises UserError for senseless limits or a system that is neither Linux nor macOS, and
    OSError where a process can't be started or walled in; never because of what the program does.
    What the walls keep out, and what they do not, stands at the top of this file.
    """
    limits = Limits(timeout, memory, output)
    _check(code, limits)
    if layers is None:
        layers = available()
    else:
        layers = tuple(choose("layer", layer, LAYERS) for layer in layers)
    for _ in range(3):
        result = _run(code, stdin, name, limits, layers)
        if isinstance(result, Result):
            return result
    # they could be built before: don't go on without
    raise OSError(f"could not build the walls around a program: {result.layer}: {result.why}")


def run_many(codes: Iterable[str], *, workers: int | None = None, **options) -> list[Result]:
    """`run_python` of every program, in the order given.

    workers: programs at a time, one per processor for None.
    """
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda code: run_python(code, **options), codes))


@functools.cache
def available() -> tuple[str, ...]:
    """Those of LAYERS that this machine lets a program be put behind; tried once."""
    layers = LAYERS if sys.platform == "linux" else ()
    limits = Limits(START, 256 * MIB, 1 << 10)
    while isinstance(failed := _run("", "", "__main__", limits, layers), Wall):
        layers = tuple(name for name in layers if name != failed.layer)
    return layers


def _check(code: str, limits: Limits) -> None:
    """UserError for limits that make no sense, and for systems that have none."""
    if sys.platform not in ("linux", "darwin"):
        raise UserError(
            "programs can be run on Linux and macOS only: this system has no way to limit them"
        )
    if not 0 < limits.timeout <= 86_400:
        raise UserError(f"timeout {limits.timeout} must be above 0 and at most a day (seconds)")
    if limits.memory < MEMORY or limits.output < 1:
        raise UserError(
            f"memory {limits.memory} must be at least {MEMORY} bytes (Python's own need), "
            f"output {limits.output} at least 1"
        )
    if len(code) > LONGEST:
        raise UserError(
            f"a program of {len(code):,} characters is too long to run: at most {LONGEST:,}"
        )


# ---- one run


def _run(
    code: str, stdin: str, name: str, limits: Limits, layers: tuple[str, ...]
) -> Result | Wall:
    """One run, or the wall that couldn't be built."""
    folder = os.path.realpath(tempfile.mkdtemp(prefix="sandbox-"))
    nonce = secrets.token_hex(8)
    work = "/tmp" if "namespaces" in layers else folder  # as the program will see it
    order = dict(
        code=code,
        name=name,
        folder=folder,
        work=work,
        layers=layers,
        memory=limits.memory,
        seconds=math.ceil(limits.timeout) + 1,
        caller=os.getpid(),
        nonce=nonce,
    )
    try:
        with contextlib.ExitStack() as stack:
            process, pipes = _start(stack, order, stdin)
            try:
                heard, why = _listen(pipes, limits, nonce.encode())
            finally:
                _end(process)
            _drain(pipes, heard, limits.output)
    finally:
        _remove(folder)
    return _verdict(heard, why, process.returncode, nonce, limits)


def _file_with(stack: contextlib.ExitStack, content: bytes):
    """A nameless file that holds `content`, at its beginning."""
    file = stack.enter_context(tempfile.TemporaryFile())
    file.write(content)
    file.flush()
    file.seek(0)
    return file


def _start(stack: contextlib.ExitStack, order: dict, stdin: str):
    """The child process and its pipes by name: status, stdout, stderr."""
    config = _file_with(stack, json.dumps(order).encode())
    given = subprocess.DEVNULL
    if stdin:
        given = _file_with(stack, stdin.encode(errors="surrogatepass"))
    environment = {
        "PATH": "",
        "HOME": order["work"],
        "TMPDIR": order["work"],
        "LC_ALL": "C",
        "PYTHONHASHSEED": "0",
        "MALLOC_ARENA_MAX": "2",  # arenas, like locale files, eat address space
    }
    status_r, status_w = os.pipe()
    status = stack.enter_context(open(status_r, "rb", buffering=0))
    try:
        process = subprocess.Popen(
            [*PYTHON, str(JAIL), str(config.fileno()), str(status_w)],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            start_new_session=True,
            env=environment,
            pass_fds=(config.fileno(), status_w),
        )
    finally:
        os.close(status_w)
    pipes = {"status": status, "stdout": process.stdout, "stderr": process.stderr}
    for pipe in (process.stdout, process.stderr):
        stack.callback(lambda pipe=pipe: pipe and pipe.close())
    return process, pipes


def _end(process: subprocess.Popen) -> None:
    """Kill the whole process group."""
    # it is not yet waited for, so its number can't be another's
    # macOS: EPERM where only zombies are left
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _listen(pipes: dict, limits: Limits, nonce: bytes) -> tuple[dict[str, bytearray], str]:
    """Collect what comes through the pipes until the program ends: (bytes by pipe, why it is over).

    why: "start" or "timeout" when time is up, "output" when it has said too much, else "".
    """
    heard = {name: bytearray() for name in pipes}
    started = False
    deadline = time.monotonic() + START
    with selectors.DefaultSelector() as selector:
        for name, pipe in pipes.items():
            selector.register(pipe, selectors.EVENT_READ, name)
        while True:
            left = deadline - time.monotonic()
            events = selector.select(left) if left > 0 else []
            if not events and deadline <= time.monotonic():
                return heard, "timeout" if started else "start"
            for key, _ in events:
                over = _hear(selector, key, heard, limits.output)
                if over is not None:
                    return heard, over
            # time counts from the program's first line
            if not started and nonce + b'", "ready"' in heard["status"]:
                started = True
                deadline = time.monotonic() + limits.timeout


def _hear(selector, key, heard: dict[str, bytearray], output: int) -> str | None:
    """Read once from a pipe that has something: why the program is over, or None if it goes on."""
    name = key.data
    most = STATUS_BYTES if name == "status" else output + 1
    data = os.read(key.fd, 1 << 16)
    heard[name] += data[: max(0, most - len(heard[name]))]
    if not data:
        selector.unregister(key.fileobj)
        # whoever closes its status has ended
        return "" if name == "status" else None
    too_much = name != "status" and len(heard[name]) > output
    return "output" if too_much else None


def _drain(pipes: dict, heard: dict[str, bytearray], output: int) -> None:
    """Read what a killed program had still in its pipes.

    Never waits, since someone might hold them open.
    """
    for name, pipe in pipes.items():
        os.set_blocking(pipe.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            while len(heard[name]) <= output and (data := os.read(pipe.fileno(), 1 << 16)):
                heard[name] += data[: output + 1 - len(heard[name])]


def _remove(folder: str) -> None:
    """Delete a folder whatever a program made of it: unreadable folders, thousands of levels."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        subprocess.run(["chmod", "-R", "u+rwx", folder], stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)


# ---- what it came to


def _verdict(
    heard: dict[str, bytearray], why: str, returncode: int, nonce: str, limits: Limits
) -> Result | Wall:
    """The result, from what was heard and how the process ended."""
    words = _words(bytes(heard["status"]), nonce)
    stdout = bytes(heard["stdout"][: limits.output]).decode(errors="replace")
    stderr = bytes(heard["stderr"][: limits.output]).decode(errors="replace")
    if "wall" in words and "ready" not in words:
        return Wall(*words["wall"].split(": ", 1))
    if why == "start" or "ready" not in words:
        # nothing of the program has run: not its fault, so never a Result
        raise OSError(
            f"a Python process for a program could not be started (status {returncode}): "
            f"{stderr.strip()[-500:] or why}"
        )
    reason = _reason(words, why, returncode, limits)
    return Result(not reason, stdout, stderr, reason)


def _words(status: bytes, nonce: str) -> dict[str, str]:
    """What the child told about itself, {word: detail}; lines without the nonce are not its own."""
    words: dict[str, str] = {}
    for line in status.splitlines():
        if not line.startswith(f'["{nonce}", '.encode()):
            continue
        # a program that has found the nonce may write there what it likes
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            _, word, detail = json.loads(line)
            words.setdefault(word, " ".join(str(detail).split()))
    return words


def _reason(words: dict[str, str], why: str, returncode: int, limits: Limits) -> str:
    """Why a program that was run is not right, "" where it is."""
    reasons = {
        "timeout": f"it was stopped after {limits.timeout:g} seconds",
        "output": f"it was stopped because it printed more than {limits.output:,} bytes",
    }
    if why in reasons:
        return reasons[why]
    if "memory" in words:
        return f"it needed more than its {limits.memory / MIB:g} MiB of memory"
    if "error" in words:
        return f"it raised {words['error']}"
    if "exit" in words:
        return f"it left before its end by SystemExit with {words['exit']}"
    if "done" in words:
        return f"it failed after its last line (status {returncode})" if returncode else ""
    # a shell's way to tell of signals: 128 and the number
    code = -returncode if returncode < 0 else returncode - 128
    if code in (signal.SIGXCPU, signal.SIGKILL):
        return "it was killed by the system, probably for using too much processor time"
    if code in set(signal.Signals):
        return f"it was killed by {signal.Signals(code).name}"
    return f"it ended without reaching its last line (status {returncode})"
