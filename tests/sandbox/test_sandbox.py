"""Programs that try to harm, hang, spy or outlive their sandbox, and honest ones."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.files import UserError
from lib.sandbox import available, jail, programs, run_many, run_python
from tests.helpers.programs import start
from tests.sandbox.hostile import HOSTILE, TRY

# ---- programs

pytestmark = pytest.mark.slow
LEVELS = [programs.LAYERS, ("landlock", "seccomp"), ("namespaces",), ("seccomp",), ()]
BUILT = [level for level in LEVELS if set(level) <= set(available())]
MEMORY = 128 << 20


def promised(walls, level):
    """Whether `level` has what a row of HOSTILE asks for."""
    have = {"always"} | set(level)
    have |= {"files"} if have & {"namespaces", "landlock"} else set()
    have |= {"others"} if have & {"namespaces", "seccomp"} else set()
    have |= {"filter"} if "seccomp" in have else set()
    return set(walls.split("+")) <= have


# What never depends on the layers is run with all of them and with none.
RUNS = [(name, level) for level in BUILT for name, (_, walls, _) in HOSTILE.items()
        if promised(walls, level) and (walls != "always" or level in (BUILT[0], ()))]  # fmt: skip
LABEL = {level: "+".join(level) or "limits" for level in LEVELS}


@pytest.fixture(scope="module")
def world():
    """What programs may not touch, set up so that a touch is seen; and `results` of all RUNS."""
    # pytest's own folders let no other user in, and only the sandbox is to keep out
    base = Path(tempfile.mkdtemp(prefix="world-"))
    base.chmod(0o755)
    (base / "canary" / "folder").mkdir(parents=True)
    (base / "canary" / "precious").write_text("precious")
    (base / "late").touch()
    (base / "temp").mkdir()
    for path in base.rglob("*"):
        path.chmod(0o777)
    # a name by which its processes, and no other's, are known
    shutil.copy(programs.JAIL, base / "jail.py")

    tcp, abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(tcp.getsockname())
    # a socket with a path, which any user may send to
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    datagrams.bind(str(base / "datagrams"))
    (base / "datagrams").chmod(0o777)
    abstract_name = f"canary-{os.getpid()}"
    abstract.bind("\0" + abstract_name if sys.platform == "linux" else str(base / "socket"))
    abstract.listen()
    signals = []
    handlers = {
        s: signal.signal(s, lambda number, frame: signals.append(number))
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGIO)
    }
    secret_r, secret_w = os.pipe()
    os.write(secret_w, b"secret of a pipe")
    os.set_inheritable(secret_r, True)
    env = Path("/proc/self/environ")
    secrets = [
        line.split("=", 1)[-1] for line in (env.read_text().split("\0") if env.exists() else [])
    ]
    secrets = [s for s in secrets if len(s) > 12 and "UTF-8" not in s] + [
        "secret of a variable",
        "secret of a pipe",
    ]
    place = {
        "CANARY": base / "canary",
        "LATE": base / "late",
        "PORT": tcp.getsockname()[1],
        "PID": os.getpid(),
        "ABSTRACT": abstract_name,
        "DATAGRAMS": base / "datagrams",
    }

    def source(name):
        code = HOSTILE[name][0]
        if "attempt(" in code or any(
            word in code for word in ("os.", "sys.", "signal.", "time.", "later")
        ):
            code = TRY + code
        for key, value in place.items():
            code = code.replace(f"@{key}@", str(value))
        return code

    w = SimpleNamespace(
        base=base,
        tcp=tcp,
        udp=udp,
        abstract=abstract,
        datagrams=datagrams,
        signals=signals,
        secrets=secrets,
        source=source,
        place=place,
        results={},
    )
    patch = pytest.MonkeyPatch()
    patch.setenv("SANDBOX_CANARY", "secret of a variable")
    patch.setattr(programs, "JAIL", base / "jail.py")
    patch.setattr(tempfile, "tempdir", str(base / "temp"))

    def go(run):
        name, level = run
        began, expected = time.monotonic(), HOSTILE[name][2]
        seconds = 0.4 if expected == "stopped after" else 5 if expected else 1
        return run_python(
            source(name), timeout=seconds, memory=MEMORY, output=1 << 16, layers=level
        ), time.monotonic() - began

    w.before = limits_of_the_caller()
    with ThreadPoolExecutor(8) as pool:
        w.results = dict(zip(RUNS, pool.map(go, RUNS), strict=True))
    w.ended = time.monotonic()
    yield w
    for s, handler in handlers.items():
        signal.signal(s, handler)
    for s in (tcp, udp, abstract, datagrams):
        s.close()
    os.close(secret_r)
    os.close(secret_w)
    patch.undo()
    shutil.rmtree(base)


def limits_of_the_caller():
    import resource

    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return resource.getrlimit(resource.RLIMIT_NOFILE), os.getpriority(os.PRIO_PROCESS, 0), affinity


def test_there_are_enough_of_them():
    assert len(HOSTILE) >= 40 and RUNS


@pytest.mark.parametrize(
    "name, level", RUNS, ids=[f"{name}-{LABEL[level]}" for name, level in RUNS]
)
def test_hostile_program(world, name, level):
    result, seconds = world.results[name, level]
    assert "BREACH" not in result.stdout + result.stderr, result
    assert HOSTILE[name][2] in result.reason, result
    assert (
        (not result.ok or not result.reason)
        and "\n" not in result.reason
        and len(result.reason) < 600
    )
    assert not any(secret in result.stdout + result.stderr for secret in world.secrets)
    assert len(result.stdout) <= 1 << 16 and len(result.stderr) <= 1 << 16
    assert seconds < 15  # with seven others on a busy machine


def test_nothing_was_harmed(world):
    assert sorted(p.name for p in (world.base / "canary").iterdir()) == ["folder", "precious"]
    precious = world.base / "canary" / "precious"
    assert (
        precious.read_text() == "precious"
        and precious.stat().st_mode & 0o777 == 0o777
        and precious.stat().st_mtime > 1e9
    )
    assert list((world.base / "temp").iterdir()) == []  # every program's own folder is gone
    assert world.signals == []
    assert limits_of_the_caller() == world.before
    for s in (world.tcp, world.udp, world.abstract, world.datagrams):
        s.settimeout(0.05)
        with pytest.raises(TimeoutError):
            s.recv(9) if s in (world.udp, world.datagrams) else s.accept()


# ---- the filter, call by call

# Harmless should a call get through: most fail with any number of -1, these would not.
ARGUMENTS = {name: (12345, 0, 0, 0) for name in ("shmget", "msgget", "semget")}
CONDITIONAL = {
    **{f"fcntl {name}": (jail.FCNTL, (0, order, 0)) for name, order in jail.OWNER_FCNTL.items()},
    **{f"ioctl {name}": (jail.IOCTL, (0, order, 0)) for name, order in jail.OWNER_IOCTL.items()},
    "socketpair of datagrams": (jail.SOCKETPAIR, (1, 2, 0, 0)),
    "socketpair of raw sockets": (jail.SOCKETPAIR, (1, 3 | 0x80000, 0, 0)),
    "socketpair of another family": (jail.SOCKETPAIR, (30, 1, 0, 0)),
    "kill another": (jail.KILL, (1, 0)),
    "tgkill another": (jail.TGKILL, (1, 1, 0)),
    "limits of another": (jail.PRLIMIT, (1, 7, 0, 0)),
    "clone a process": (jail.CLONE, (0x20000, 0, 0, 0, 0)),
}
WALK = """
import ctypes, json, os
libc = ctypes.CDLL(None, use_errno=True)
for name, number, arguments in json.loads('''CALLS'''):
    ctypes.set_errno(0)
    libc.syscall(number, *[ctypes.c_long(a) for a in arguments])
    print(ctypes.get_errno(), name)
"""
EPERM = 1
STARTERS = {"fork", "vfork", "clone a process"}  # that would leave a process behind


def refused_by(layers, leave_out=frozenset()):
    """Names of system calls that end with EPERM behind these walls."""
    column = list(jail.AUDIT_ARCH).index(jail.machine())
    calls = []
    for name, numbers in (jail.REFUSED | jail.METADATA).items():
        if numbers[column] is not None:
            calls.append((name, numbers[column], ARGUMENTS.get(name, (-1,) * 6)))
    for name, (numbers, arguments) in CONDITIONAL.items():
        calls.append((name, numbers[column], arguments))
    calls = [call for call in calls if call[0] not in leave_out]
    result = run_python(WALK.replace("CALLS", json.dumps(calls)), layers=layers)
    assert result.ok, result
    answers = [line.split(" ", 1) for line in result.stdout.splitlines()]
    assert len(answers) == len(calls)
    return {name for errno, name in answers if int(errno) == EPERM}


@pytest.fixture(scope="module")
def walks():
    """What is refused with the filter alone, and what the kernel refuses to everybody here."""
    if "seccomp" not in available():
        pytest.skip("no filter of system calls here")
    return refused_by(("seccomp",)), refused_by((), STARTERS)


NAMES = [*jail.REFUSED, *jail.METADATA, *CONDITIONAL]


@pytest.mark.parametrize("name", NAMES)
def test_the_filter_refuses_each_call(walks, name):
    filtered, bare = walks
    column = list(jail.AUDIT_ARCH).index(jail.machine())
    if (jail.REFUSED | jail.METADATA).get(name, (0, 0))[column] is None:
        pytest.skip(f"{name} does not exist on {jail.machine()}")
    assert name in filtered
    if name in bare:
        pytest.skip(f"the kernel refuses {name} here, with or without the filter")


# The names once more, so that none is lost from the tables: those that libc has functions for are
# called by these, and not by the tables' numbers.
BY_LIBC = """
fork vfork execve execveat setsid setpgid pidfd_send_signal pidfd_open pidfd_getfd ptrace
process_vm_readv process_vm_writev process_madvise setpriority sched_setaffinity
sched_setscheduler sched_setparam socket shmget shmat shmctl msgget msgsnd msgrcv msgctl semget
semop semtimedop mq_open memfd_create mount umount2 pivot_root chroot unshare setns open_tree
move_mount fsopen fsconfig fsmount fspick mount_setattr init_module delete_module reboot swapon
swapoff acct quotactl syslog clock_settime adjtimex clock_adjtime sethostname setdomainname
personality name_to_handle_at open_by_handle_at fanotify_init chmod fchmod chown fchown lchown
fchownat utime utimes futimesat utimensat setxattr lsetxattr fsetxattr removexattr lremovexattr
fremovexattr
""".split()
BY_NUMBER_ONLY = """
tkill rt_sigqueueinfo rt_tgsigqueueinfo kcmp sched_setattr ioprio_set migrate_pages move_pages
io_uring_setup memfd_secret bpf perf_event_open userfaultfd keyctl add_key request_key
finit_module kexec_load semctl mq_unlink settimeofday fchmodat fchmodat2 setxattrat removexattrat
file_setattr
""".split()
CALL_BY_NAME = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
word = ctypes.create_string_buffer(b"/nothing", 64)
for name in NAMES:
    function = getattr(libc, name, None)
    if function is not None:
        ctypes.set_errno(0)
        function(word, word, word, word)
        print(ctypes.get_errno(), name, flush=True)
"""


def test_the_tables_have_all_that_is_refused_under_its_own_number():
    assert set(jail.REFUSED | jail.METADATA) == {*BY_LIBC, *BY_NUMBER_ONLY}
    # Linux's own numbers of orders, the same on every machine
    assert jail.OWNER_FCNTL == dict(F_SETOWN=8, F_SETSIG=10, F_SETOWN_EX=15)
    assert jail.OWNER_IOCTL == dict(FIOSETOWN=0x8901, SIOCSPGRP=0x8902, TIOCSTI=0x5412)
    if "seccomp" not in available():
        pytest.skip("no filter of system calls here")
    result = run_python(CALL_BY_NAME.replace("NAMES", repr(BY_LIBC)), layers=("seccomp",))
    answers = [line.split() for line in result.stdout.splitlines()]
    assert result.ok and len(answers) > 40, result
    assert [name for errno, name in answers if int(errno) != EPERM] == []


def processes(word):
    return [p for p in Path("/proc").glob("[0-9]*/cmdline") if word in read(p)]


def read(path):
    try:
        return path.read_text()
    except OSError:  # it has just ended
        return ""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_nothing_outlives(world):
    word = str(world.base / "jail.py")
    with ThreadPoolExecutor(1) as pool:  # that the search finds them while they run
        running = pool.submit(run_python, "import time; time.sleep(1)", layers=BUILT[0])
        seen = False
        while not running.done() and not seen:
            seen = bool(processes(word))
        assert seen and running.result().ok
    time.sleep(max(0, world.ended + 2 - time.monotonic()))  # `later` waits 1.5 s
    assert processes(word) == []
    assert (world.base / "late").read_text() == ""


def test_the_traps_close(world, tmp_path):
    """Without a sandbox these programs do what they are kept from: the tests above can fail."""
    canary = tmp_path / "canary"
    shutil.copytree(world.base / "canary", canary)
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(5)

    def unprotected(name):
        code = world.source(name)
        for old, new in ((world.base / "canary", canary), (world.base / "late", tmp_path / "late")):
            code = code.replace(str(old), str(new))
        code = code.replace(str(world.place["PORT"]), str(server.getsockname()[1])).replace(
            str(world.place["PID"]), "0"
        )
        return subprocess.run(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            cwd=tmp_path,
            text=True,
            timeout=20,
        ).stdout

    for name in (
        "read /etc/passwd",
        "TCP",
        "change rights",
        "environment",
        "socket by number",
        "read by symlink",
        "delete",
        "signal by a pipe's owner",
        "signal by a socket's owner",
        "send by a pair of datagram sockets",
    ):
        assert "BREACH" in unprotected(name), name
    server.accept()
    world.datagrams.settimeout(5)
    assert world.datagrams.recv(9) == world.datagrams.recv(9) == b"x"
    assert not (canary / "precious").exists()
    unprotected("double-forked daemon")
    deadline = time.monotonic() + 10
    while not (tmp_path / "late").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- honest programs

HONEST = '''
import typing, math, collections, re, itertools, functools, heapq, bisect, string, random, decimal
import fractions, datetime, dataclasses, copy, json, socket
import hashlib, asyncio, threading, tempfile, os, sys, typing
from typing import List

@dataclasses.dataclass
class Point:
    x: int

def closest(numbers: List[float], threshold: float) -> bool:
    """ >>> closest([1.0, 2.0], 0.5)
    False """
    return any(abs(a - b) < threshold for a, b in itertools.combinations(numbers, 2))

assert closest([1.0, 2.8, 3.0], 0.3) and typing.get_type_hints(Point) == {"x": int}
async def answer():
    await asyncio.sleep(0)
    return 42
assert asyncio.run(answer()) == 42
thread = threading.Thread(target=print, args=("from a thread",)); thread.start(); thread.join()
with tempfile.NamedTemporaryFile("w+") as f:
    f.write("x"); f.seek(0); assert f.read() == "x"
open("own", "w").write("é"); assert open("own").read() == "é" and os.listdir()
assert __name__ == "__main__"
near, far = socket.socketpair(); near.send(b"x"); assert far.recv(1) == b"x"
print(input(), sys.stdin.read(), hashlib.md5(b"").hexdigest(), math.comb(60, 30))
'''


@pytest.mark.parametrize("level", BUILT, ids=[LABEL[level] for level in BUILT])
def test_honest_program(level):
    code = HONEST
    if not promised("others", level) and sys.platform == "linux":  # no thread may start there
        code = code.replace("thread.start(); thread.join()", "print('from a thread')")
    result = run_python(code, stdin="first\nrest", layers=level)
    assert result == (
        True,
        f"from a thread\nfirst rest d41d8cd98f00b204e9800998ecf8427e {math.comb(60, 30)}\n",
        "",
        "",
    )


def test_result_tells_what_happened():
    result = run_python("print('before', flush=True)\ndef f():\n    return 1 / 0\nf()\n")
    assert (
        not result.ok
        and result.stdout == "before\n"
        and result.reason == "it raised ZeroDivisionError: division by zero"
    )
    assert (
        "line 3, in f" in result.stderr
        and "return 1 / 0" in result.stderr
        and "jail" not in result.stderr
    )
    late = run_python("import time; print('said', flush=True); time.sleep(60)", timeout=0.3)
    assert late == (False, "said\n", "", "it was stopped after 0.3 seconds")
    much = run_python("print('é' * 100)", output=50)
    assert much.stdout == "é" * 25 and "more than 50 bytes" in much.reason


def test_many_at_once_keep_their_order():
    results = run_many([f"print({i})\nassert {i} != 3" for i in range(12)], workers=4)
    assert [r.stdout for r in results] == [f"{i}\n" for i in range(12)] and [
        r.ok for r in results
    ] == [i != 3 for i in range(12)]


def test_hashes_are_the_same_every_time():
    a, b = run_many(["print(hash('a'), list({'x', 'y', 'z'}))"] * 2)
    assert a.ok and a == b


def test_senseless_limits_are_refused():
    for options in (
        dict(timeout=0),
        dict(timeout=float("nan")),
        dict(memory=1000),
        dict(output=0),
        dict(layers=("moat",)),
        dict(code=" " * (1 << 21)),
    ):
        with pytest.raises(UserError):
            run_python(**{"code": "", **options})


def test_the_least_memory_is_enough_to_start():
    result = run_python("import typing, math, collections, re; print(1)", memory=programs.MEMORY)
    assert result == (True, "1\n", "", "")


@pytest.mark.skipif(not available(), reason="no wall to leave out here")
def test_a_wall_that_fails_is_left_out_or_told(monkeypatch, tmp_path):
    """available() does without it; once it has been there, no program is run without it."""
    broken = tmp_path / "jail.py"
    broken.write_text(
        programs.JAIL.read_text().replace(
            "def seccomp(metadata):",
            "def seccomp(metadata):\n    raise OSError('not here')\n\n\ndef unused(metadata):",
        )
    )
    monkeypatch.setattr(programs, "JAIL", broken)
    assert available.__wrapped__() == tuple(layer for layer in available() if layer != "seccomp")
    with pytest.raises(OSError, match="seccomp: not here"):
        run_python("print(1)", layers=("seccomp",))


def test_a_child_that_cannot_start_is_told(monkeypatch, tmp_path):
    (tmp_path / "jail.py").write_text("raise SystemError('broken')")
    monkeypatch.setattr(programs, "JAIL", tmp_path / "jail.py")
    with pytest.raises(OSError, match="broken"):
        run_python("print(1)", layers=())


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
@pytest.mark.parametrize("level", BUILT, ids=[LABEL[level] for level in BUILT])
def test_dies_with_its_caller(level, tmp_path):
    shutil.copy(programs.JAIL, tmp_path / "jail.py")
    jail = str(tmp_path / "jail.py")
    caller = start("run_for_ever", jail, json.dumps(level))
    wanted = 3 if "namespaces" in level else 1
    # the caller's own command line holds the word too
    wait_until(lambda: len(processes(jail)) >= wanted + 1)
    caller.kill()
    caller.wait()
    wait_until(lambda: processes(jail) == [])


def wait_until(true, seconds=10):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_leaves_no_thread_and_no_descriptor():
    run_python("")
    threads, fds = threading.active_count(), len(os.listdir("/dev/fd"))
    run_many(["print(1)", "1/0", "import os; os._exit(3)"])
    assert (threading.active_count(), len(os.listdir("/dev/fd"))) == (threads, fds)
