"""The calculator's whitelist and bounds, and programs that try to harm, hang, spy or outlive their sandbox."""

import json
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
from lib.sandbox import programs as sandbox
from lib.sandbox.programs import available, calculator, run_many, run_python

# ---------------------------------------------------------------------------------------------------------------- calculator


def test_answers_of_the_reference(parity):
    """Every refusal and every value; 333.0 and 333 are the same number, and we write whole ones without a point."""
    for case in json.loads((parity / "generation_T.json").read_text())["calculator"]:
        ours = calculator(case["expr"])
        assert (None if ours is None else float(ours)) == case["result"], case


@pytest.mark.parametrize(
    "expression, result",
    [("10/2", "5"), ("(1,000 - 1)/3", "333"), ("7/2", "3.5"), ("0.1+0.2", "0.3"), ("1/3", "0.3333333333333333"), ("1/3*3", "1"), ("-7//2", "-4"),
     ("7 % 3", "1"), ("1,234,567*1", "1234567"), ("2.50*2", "5"), (" 3 + 4 ", "7"), ("12345678901234567890*10", "123456789012345678900"),
     ("'a,b,1,000'.count(',')", "3"), ('"mississippi".count("ss")', "2"), ("1,2", None), ("2^3", None), ("3 == 3", None), ("(1,2)", None),
     ("'a'*3", None), ("len('abc')", None), ("'abc'[0]", None), ("f'{1}'.count('1')", None), ("x", None), ("'a'.count(1)", None)],
)  # fmt: skip
def test_arithmetic_and_counting(expression, result):
    assert calculator(expression) == result


@pytest.mark.parametrize(
    "expression, result",
    [("2**10", "1024"), ("2**-1", "0.5"), ("2**0.5", "1.4142135623730951"), ("(-8)**0.5", None), ("0**-1", None), ("1e3", "1000"), ("1e-3*2", "0.002"),
     ("abs(-3)", "3"), ("round(2/3, 2)", "0.67"), ("max(1, 2.5)", "2.5"), ("len('strawberry')", "10"), ("'abc'[::-1]", "cba"), ("'abc'[-1]", "c"),
     ("'abc'.upper()", "ABC"), ("'-'.join('abc')", "a-b-c"), ("' '.join(list('cat'))", "c a t"), ("'a b'.split()", "['a', 'b']"),
     ("len('a b c'.split(' '))", "3"), ("'b' in 'abc'", "True"), ("1 < 2 < 2", "False"), ("'banana'.replace('a', 'o')", "bonono"), ("'x'.count('x') + 1", "2"),
     ("'ab' * 2 + 'c'", "ababc"), ("'abc'.find('z')", "-1"), ("''.join(sorted('cab'))", "abc"), ("int('42') + 1", "43"), ("str(5) + '1'", "51"),
     ("'abc'[9]", None), ("'a' + 1", None), ("'%999999999d' % 1", None), ("'{:9999999}'.format(1)", None), ("'a'.join([1])", None), ("True + 1", None),
     ("'abc'.encode()", None), ("'abc'.__class__", None), ("().__class__", None), ("[x for x in 'abc']", None), ("(lambda: 1)()", None), ("f'{1:9999}'", None),
     ("print(1)", None), ("open('/etc/passwd')", None), ("eval('1')", None), ("'a'.count(sub='a')", None), ("len(*['a'])", None), ("b'a'", None), ("...", None)],
)  # fmt: skip
def test_the_wider_calculator(expression, result):
    assert calculator(expression, wide=True) == result


@pytest.mark.parametrize(
    "expression",
    ["9**9**9", "9**99999999999", "2**0.5**-99999999", "1e999999999", "9" * 900 + "*9" * 50 + "**50", "'a'*10**12", "10**12*'a'", "'a'*9999*9999", "(" * 500, "(" * 60 + "1" + ")" * 60,
     "-" * 999 + "1", "1" + "+1" * 499, "1" * 100_000, "'" + "a" * 100_000 + "'.count('a')", "''.join(['" + "a" * 900 + "'])*20", "'aa'.replace('a','" + "b" * 900 + "')*50",
     "'" + "a" * 400 + "'.replace('', '" + "b" * 400 + "')", "round(1.5, 10**9)", "1/10**1000/10**1000", "'a'[::0]", "1//0", "1%0", "int('9'*5000)", "'\\x41'.count('A')", "\x00", "1\n2",
     "'a" * 300, "[" * 400, "'𝔘'.count('𝔘'", "1__0", "1if 1else 2", "lambda: 0", "x:=1", "max()", "sqrt(-1)", "float('nan')", "float('inf')", "", " ", "#", "'a'.count('a')" * 60],
)  # fmt: skip
def test_calculator_is_quick_and_never_raises(expression):
    began = time.process_time()
    for wide in (False, True):
        result = calculator(expression, wide=wide)
        assert result is None or len(result) <= sandbox.STRING
    assert time.process_time() - began < 0.5


def test_calculator_refuses_what_is_no_text():
    assert calculator(None) is None and calculator(b"1+1") is None and calculator(12) is None


# ------------------------------------------------------------------------------------------------------------------ programs

# What a hostile program does. @NAME@ is replaced by what the test set up. A program that got what it wanted prints BREACH.
# The second item: which walls promise that it fails. "always"; "files": namespaces or landlock; "others" (processes, signals, network):
# namespaces or seccomp; "filter": seccomp alone. The third: what the reason must contain ("" where any outcome will do).
TRY = """
import os, sys, time, signal
def attempt(f, *a):
    try: r = f(*a)
    except BaseException as e: print('refused', type(e).__name__, flush=True)
    else: print('BREA' + 'CH' if r is not False else 'refused', f, flush=True)
def syscall(*a):
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    r = libc.syscall(*[ctypes.c_long(x) if isinstance(x, int) else x for x in a])
    return r if r >= 0 else False
def later():
    time.sleep(1.5)
    open('@LATE@', 'a').write('alive')
"""
HOSTILE = {
    # attribute walks
    "walk to Popen": ("[c for c in ().__class__.__base__.__subclasses__() if 'Popen' in c.__name__ or 'Quitter' in c.__name__]\n"
                      "import subprocess; attempt(subprocess.run, ['/bin/sh', '-c', 'touch @LATE@'])", "filter", ""),
    "walk to the runner's frames": ("f = sys._getframe()\nwhile f: print(sorted(map(str, f.f_locals.values()))); f = f.f_back", "always", ""),
    "walk to the runner's globals": ("g = sys._getframe(1).f_globals; attempt(g['wait_for'], os.getppid())", "always", ""),
    "garbage collector": ("import gc; print([o for o in gc.get_objects() if isinstance(o, (str, dict))])", "always", ""),
    # processes
    "fork bomb": ("while True: os.fork()", "others", ""),
    "stubborn fork bomb": ("while True:\n try: os.fork()\n except OSError: pass", "others", "stopped after"),
    "daemon": ("attempt(os.fork) or os.setsid() or attempt(os.fork) or later()", "filter", ""),
    "double-forked daemon": ("if os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  os.closerange(0, 99); later(); time.sleep(60)\n os._exit(0)\n", "others", ""),
    "child that outlives": ("if os.fork() == 0:\n signal.signal(15, signal.SIG_IGN); later(); time.sleep(60)\nos._exit(0)", "others", ""),
    "vfork by number": ("attempt(syscall, 58) if os.uname().machine == 'x86_64' else None", "filter", ""),
    "clone by number": ("attempt(syscall, 56 if os.uname().machine == 'x86_64' else 220, 17, 0, 0, 0, 0)", "filter", ""),
    "clone3": ("import ctypes; a = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17); attempt(syscall, 435, a, 88)", "filter", ""),
    "32-bit calls": ("attempt(syscall, 0x40000000 | 57) if os.uname().machine == 'x86_64' else None", "filter", ""),
    "exec a shell": ("attempt(os.execv, '/bin/sh', ['sh', '-c', 'echo BREACH'])", "files", ""),
    "exec Python": ("os.execv(sys.executable, ['python', '-c', 'print(\"BREA\" + \"CH\")'])", "filter", "raised"),
    "os.system": ("os.system('echo BREACH; touch @LATE@')", "filter", ""),
    "posix_spawn": ("attempt(os.posix_spawn, '/bin/sh', ['sh', '-c', 'echo BREACH'], {})", "filter", ""),
    "multiprocessing": ("import multiprocessing as m; p = m.get_context('fork').Process(target=later); attempt(p.start)", "filter", ""),
    "new session": ("attempt(os.setsid)\nwhile True: pass", "filter", "stopped after"),
    "thread that outlives": ("import threading; threading.Thread(target=lambda: (later(), time.sleep(60))).start(); os._exit(0)", "others", "without reaching"),
    "thread that never ends": ("import threading; threading.Thread(target=time.sleep, args=(60,)).start()", "others", "stopped after"),
    "thread bomb": ("import threading\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()", "always", ""),
    # signals to others
    "kill the caller": ("attempt(os.kill, @PID@, signal.SIGTERM); attempt(os.kill, @PID@, 0)", "others", ""),
    "kill the parent": ("attempt(os.kill, os.getppid(), signal.SIGKILL)", "filter", ""),
    "kill everybody": ("attempt(os.kill, -1, signal.SIGTERM)", "filter", ""),
    "kill the group": ("attempt(os.kill, 0, signal.SIGTERM); attempt(os.killpg, 0, signal.SIGKILL)", "filter", ""),
    "thread signal to the caller": ("attempt(syscall, 234 if os.uname().machine == 'x86_64' else 131, @PID@, @PID@, 15)", "others", ""),
    "pidfd to the caller": ("fd = syscall(434, @PID@, 0); attempt(syscall, 424, fd, 15, 0, 0)", "others", ""),
    "trace the parent": ("attempt(syscall, 101 if os.uname().machine == 'x86_64' else 117, 16, os.getppid(), 0, 0)", "filter", ""),
    "limits of the caller": ("import resource; attempt(resource.prlimit, @PID@, resource.RLIMIT_NOFILE, (3, 3))", "others", ""),
    "priority of the caller": ("attempt(os.setpriority, os.PRIO_PROCESS, @PID@, 19); attempt(os.sched_setaffinity, @PID@, {0})", "others", ""),
    "stop itself": ("os.kill(os.getpid(), signal.SIGSTOP)", "always", "stopped after"),
    # files
    "read /etc/passwd": ("attempt(open, '/etc/passwd')", "files", ""),
    "read by symlink": ("os.symlink('/etc/passwd', 'link'); attempt(open, 'link')", "files", ""),
    "read by hard link": ("attempt(os.link, '/etc/passwd', 'link')", "files", ""),
    "read through /proc": ("for p in ('self', '1', '@PID@', str(os.getppid())): attempt(open, f'/proc/{p}/root/etc/passwd')", "files", ""),
    "read by ..": ("attempt(open, '../' * 40 + 'etc/passwd')", "files", ""),
    "list folders": ("attempt(os.listdir, '@CANARY@'); attempt(os.listdir, '@CANARY@/..'); attempt(os.listdir, '/home')", "files", ""),
    "delete": ("attempt(os.unlink, '@CANARY@/precious'); attempt(os.rmdir, '@CANARY@/folder')", "files", ""),
    "delete a tree": ("import shutil; attempt(shutil.rmtree, '@CANARY@')", "files", ""),
    "overwrite": ("attempt(open, '@CANARY@/precious', 'w'); attempt(os.truncate, '@CANARY@/precious', 0)", "files", ""),
    "move": ("attempt(os.rename, '@CANARY@/precious', 'mine'); attempt(os.rename, 'program.py', '@CANARY@/precious')", "files", ""),
    "add a file": ("attempt(open, '@CANARY@/new', 'w'); attempt(os.mkdir, '@CANARY@/new'); attempt(os.symlink, '/', '@CANARY@/new')", "files", ""),
    "change rights": ("attempt(os.chmod, '@CANARY@/precious', 0); attempt(os.chown, '@CANARY@/precious', 1, 1); attempt(os.utime, '@CANARY@/precious', (1, 1))", "files+filter", ""),
    "change Python": ("attempt(open, os.__file__, 'a'); attempt(os.unlink, os.__file__); attempt(open, os.path.dirname(os.__file__) + '/evil.py', 'w')", "files", ""),
    "symlink left behind": ("os.symlink('@CANARY@', 'link'); os.symlink('@CANARY@/precious', 'file')", "always", ""),
    "folder hard to delete": ("os.makedirs('locked/deep'); open('locked/deep/f', 'w'); os.umask(0o777); os.mkdir('none')\n"
                              "try: os.chmod('locked', 0)\nexcept OSError: pass\n", "always", ""),
    "a thousand levels": ("for i in range(1500): os.mkdir('d'); os.chdir('d')", "always", ""),
    "chroot and mount": ("import ctypes; c = ctypes.CDLL(None); attempt(os.chroot, '/')\n"
                         "attempt(lambda: c.mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0); attempt(lambda: c.unshare(0x10000000) == 0)", "filter", ""),
    "device node": ("import stat; attempt(os.mknod, 'disk', stat.S_IFBLK | 0o600, os.makedev(254, 0))", "files", ""),
    "huge file": ("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))", "always", ""),
    "many files": ("for i in range(10**9): open(f'f{i}', 'wb').write(bytes(1 << 20))", "namespaces", "No space left"),
    "sparse file": ("attempt(lambda: open('s', 'w').truncate(1 << 40))", "always", ""),
    "all the descriptors": ("fs = []\nwhile True: fs.append(open('/dev/null'))", "always", "Too many open files"),
    "descriptors of the caller": ("for fd in range(3, 1024):\n try: print(os.read(fd, 999))\n except OSError: pass", "always", ""),
    # environment
    "environment": ("print(dict(os.environ)); import ctypes; c = ctypes.CDLL(None); c.getenv.restype = ctypes.c_char_p; attempt(lambda: c.getenv(b'SANDBOX_CANARY') or False)",
                    "always", ""),
    "environments of others": ("for p in range(1, 40000):\n for n in ('environ', 'cmdline', 'mem'):\n  try: print(open(f'/proc/{p}/{n}', 'rb').read(9999)); print('BREACH')\n"
                               "  except OSError: pass", "files", ""),
    # network
    "TCP": ("import socket; attempt(socket.create_connection, ('127.0.0.1', @PORT@), 1)", "others", ""),
    "UDP": ("import socket; attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@)))", "filter", ""),
    "abstract socket": ("import socket; attempt(lambda: socket.socket(socket.AF_UNIX).connect('\\0@ABSTRACT@'))", "others", ""),
    "socket by number": ("attempt(syscall, 41 if os.uname().machine == 'x86_64' else 198, 2, 1, 0)", "filter", ""),
    "io_uring": ("import ctypes; attempt(syscall, 425, 8, ctypes.create_string_buffer(256))", "filter", ""),
    "web": ("import urllib.request as u; attempt(u.urlopen, 'http://127.0.0.1:@PORT@/', None, 1)", "others", ""),
    "server": ("import socket; attempt(socket.create_server, ('0.0.0.0', 0))", "filter", ""),
    # memory, time, output
    "memory bomb": ("x = [0] * 10**10", "always", "memory"),
    "creeping memory bomb": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "always", "memory"),
    "memory bomb by children": ("while True:\n try: os.fork()\n except OSError: pass\n try: x = bytearray(90 << 20)\n except MemoryError: pass", "filter", "stopped after"),
    "memory files": ("attempt(os.memfd_create, 'x'); import ctypes; attempt(syscall, 29 if os.uname().machine == 'x86_64' else 194, 7777, 1 << 20, 0o1600)", "filter", ""),
    "mapped memory": ("import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 24))", "always", ""),
    "endless loop": ("while True: pass", "always", "stopped after"),
    "endless sleep": ("time.sleep(10**6)", "always", "stopped after"),
    "nothing stops me": ("for s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n except (OSError, ValueError): pass\n"
                         "while True:\n try: time.sleep(9)\n except BaseException: pass", "always", "stopped after"),
    "huge power": ("10**10**9", "always", ""),
    "bad regular expression": ("import re; re.match('(a+)+$', 'a' * 60 + 'b')", "always", "stopped after"),
    "endless output": ("while True: print('x' * 1000)", "always", "printed more than"),
    "endless errors": ("while True: sys.stderr.write('x' * 1000)", "always", "printed more than"),
    "one huge write": ("while True: os.write(1, bytes(1 << 20))", "always", "printed more than"),
    "endless recursion": ("def f(n): return f(n + 1)\nf(0)", "always", "RecursionError"),
    "recursion into the stack's end": ("sys.setrecursionlimit(10**9)\nclass A:\n def __repr__(self): return repr(self)\nrepr(A())", "always", ""),
    "end that never ends": ("import atexit; atexit.register(time.sleep, 60)", "always", "stopped after"),
    "waits for input": ("input()", "always", "EOFError"),
    # ways to end
    "os._exit": ("os._exit(0)", "always", "without reaching its last line"),
    "sys.exit": ("sys.exit(0)", "always", "SystemExit"),
    "exit": ("exit()", "always", "SystemExit"),
    "abort": ("os.abort()", "always", "SIGABRT"),
    "null pointer": ("import ctypes; ctypes.string_at(0)", "always", "SIGSEGV"),
    "kills itself": ("os.kill(os.getpid(), signal.SIGKILL)", "always", "killed"),
    "closes everything": ("os.closerange(0, 999)\nwhile True: pass", "always", ""),
    "claims to be done": ("for fd in range(3, 999):\n try: os.write(fd, b'[\"0\", \"done\", \"\"]\\n')\n except OSError: pass\nos._exit(0)", "always", "without reaching"),
    "forges with the runner's secret": ("secret = sys._getframe(1).f_locals['nonce']\nfor word in ('\"wall\", \"seccomp: x\"', '[], 1', '[' * 3000, '{\"a\": 1}'):\n"
                                        " for fd in range(3, 9):\n  try: os.write(fd, f'[\"{secret}\", {word}]\\n'.encode())\n  except OSError: pass\n1/0", "always", "raised"),
    "floods the runner": ("while True:\n for fd in range(3, 9):\n  try: os.write(fd, b'[' * 9999)\n  except OSError: pass", "always", "stopped after"),
    "error that can't be told": ("class E(Exception):\n def __str__(self): raise SystemExit(0)\nraise E", "always", "without reaching"),
    "error of many lines": ("raise ValueError('a\\n' * 10**4)", "always", "ValueError: a a a"),
    "syntax bomb": ("x = " + "(" * 10**4, "always", "SyntaxError"),
    "deep syntax": ("x = " + "-" * 10**5 + "1", "always", ""),
    "null byte": ("print(1)\0", "always", "raised"),
    "half a character": ("print('\ud800')", "always", "raised"),
    "terminal": ("import fcntl, termios; attempt(fcntl.ioctl, 0, termios.TIOCSTI, b'x')", "always", ""),
}  # fmt: skip

LEVELS = [sandbox.LAYERS, ("landlock", "seccomp"), ("namespaces",), ("seccomp",), ()]
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
    """What programs may not touch, set up so that a touch is seen; and `results` of all RUNS, made side by side."""
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
    shutil.copy(sandbox.JAIL, base / "jail.py")

    tcp, abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(tcp.getsockname())
    abstract_name = f"canary-{os.getpid()}"
    abstract.bind("\0" + abstract_name if sys.platform == "linux" else str(base / "socket"))
    abstract.listen()
    signals = []
    handlers = {
        s: signal.signal(s, lambda number, frame: signals.append(number))
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
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
        signals=signals,
        secrets=secrets,
        source=source,
        place=place,
        results={},
    )
    patch = pytest.MonkeyPatch()
    patch.setenv("SANDBOX_CANARY", "secret of a variable")
    patch.setattr(sandbox, "JAIL", base / "jail.py")
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
    for s in (tcp, udp, abstract):
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
    for s in (world.tcp, world.udp, world.abstract):
        s.settimeout(0.05)
        with pytest.raises(TimeoutError):
            s.recv(9) if s is world.udp else s.accept()


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
    ):
        assert "BREACH" in unprotected(name), name
    server.accept()
    assert not (canary / "precious").exists()
    unprotected("double-forked daemon")
    deadline = time.monotonic() + 10
    while not (tmp_path / "late").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------------------ honest programs

HONEST = '''
import typing, math, collections, re, itertools, functools, heapq, bisect, string, random, decimal, fractions, datetime, dataclasses, copy, json
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
open("own", "w").write("é"); assert open("own").read() == "é" and os.listdir() and __name__ == "__main__"
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
        f"from a thread\nfirst rest d41d8cd98f00b204e9800998ecf8427e {__import__('math').comb(60, 30)}\n",
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
    result = run_python("import typing, math, collections, re; print(1)", memory=sandbox.MEMORY)
    assert result == (True, "1\n", "", "")


@pytest.mark.skipif(not available(), reason="no wall to leave out here")
def test_a_wall_that_fails_is_left_out_or_told(monkeypatch, tmp_path):
    """available() does without it; once it has been there, no program is run without it."""
    broken = tmp_path / "jail.py"
    broken.write_text(
        sandbox.JAIL.read_text().replace(
            "def seccomp(metadata):",
            "def seccomp(metadata):\n    raise OSError('not here')\n\n\ndef unused(metadata):",
        )
    )
    monkeypatch.setattr(sandbox, "JAIL", broken)
    assert available.__wrapped__() == tuple(layer for layer in available() if layer != "seccomp")
    with pytest.raises(OSError, match="seccomp: not here"):
        run_python("print(1)", layers=("seccomp",))


def test_a_child_that_cannot_start_is_told(monkeypatch, tmp_path):
    (tmp_path / "jail.py").write_text("raise SystemError('broken')")
    monkeypatch.setattr(sandbox, "JAIL", tmp_path / "jail.py")
    with pytest.raises(OSError, match="broken"):
        run_python("print(1)", layers=())


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
@pytest.mark.parametrize("level", BUILT, ids=[LABEL[level] for level in BUILT])
def test_dies_with_its_caller(level, tmp_path):
    shutil.copy(sandbox.JAIL, tmp_path / "jail.py")
    code = (f"import tempfile; from pathlib import Path; from lib import sandbox; tempfile.tempdir = {str(tmp_path)!r}\n"
            f"sandbox.JAIL = Path({str(tmp_path / 'jail.py')!r}); "
            f"sandbox.run_python('while True: pass', timeout=60, layers={level!r})")  # fmt: skip
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    wanted = 3 if "namespaces" in level else 1
    # the caller's own command line holds the word too
    wait_until(lambda: len(processes(str(tmp_path / "jail.py"))) >= wanted + 1)
    caller.kill()
    caller.wait()
    wait_until(lambda: processes(str(tmp_path / "jail.py")) == [])


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
