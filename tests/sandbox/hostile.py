"""What hostile programs do, and which walls promise that they fail."""

# @NAME@ is replaced by what the test set up. A program that got what it wanted prints BREACH.
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


def hostile(walls, *lines, reason=""):
    """(code, walls, reason) of a program.

    walls: which of them promise that it fails. "always"; "files": namespaces or landlock; "others"
    (processes, signals, network): namespaces or seccomp; "filter": seccomp alone. reason: what the
    result's reason must contain ("" where any outcome will do).
    """
    return "\n".join(lines), walls, reason


HOSTILE = {
    # attribute walks
    "walk to Popen": hostile(
        "filter",
        "classes = ().__class__.__base__.__subclasses__()",
        "[c for c in classes if 'Popen' in c.__name__ or 'Quitter' in c.__name__]",
        "import subprocess",
        "attempt(subprocess.run, ['/bin/sh', '-c', 'touch @LATE@'])",
    ),
    "walk to the runner's frames": hostile(
        "always",
        "f = sys._getframe()",
        "while f: print(sorted(map(str, f.f_locals.values()))); f = f.f_back",
    ),
    "walk to the runner's globals": hostile(
        "always", "g = sys._getframe(1).f_globals", "attempt(g['wait_for'], os.getppid())"
    ),
    "garbage collector": hostile(
        "always", "import gc", "print([o for o in gc.get_objects() if isinstance(o, (str, dict))])"
    ),
    # processes
    "fork bomb": hostile("others", "while True: os.fork()"),
    "stubborn fork bomb": hostile(
        "others", "while True:", " try: os.fork()", " except OSError: pass", reason="stopped after"
    ),
    "daemon": hostile("filter", "attempt(os.fork) or os.setsid() or attempt(os.fork) or later()"),
    "double-forked daemon": hostile(
        "others",
        "if os.fork() == 0:",
        " os.setsid()",
        " if os.fork() == 0:",
        "  os.closerange(0, 99); later(); time.sleep(60)",
        " os._exit(0)",
        "",
    ),
    "child that outlives": hostile(
        "others",
        "if os.fork() == 0:",
        " signal.signal(15, signal.SIG_IGN); later(); time.sleep(60)",
        "os._exit(0)",
    ),
    "vfork by number": hostile(
        "filter", "attempt(syscall, 58) if os.uname().machine == 'x86_64' else None"
    ),
    "clone by number": hostile(
        "filter", "attempt(syscall, 56 if os.uname().machine == 'x86_64' else 220, 17, 0, 0, 0, 0)"
    ),
    "clone3": hostile(
        "filter",
        "import ctypes",
        "a = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17)",
        "attempt(syscall, 435, a, 88)",
    ),
    "32-bit calls": hostile(
        "filter", "attempt(syscall, 0x40000000 | 57) if os.uname().machine == 'x86_64' else None"
    ),
    "exec a shell": hostile("files", "attempt(os.execv, '/bin/sh', ['sh', '-c', 'echo BREACH'])"),
    "exec Python": hostile(
        "filter",
        "os.execv(sys.executable, ['python', '-c', 'print(\"BREA\" + \"CH\")'])",
        reason="raised",
    ),
    "os.system": hostile("filter", "os.system('echo BREACH; touch @LATE@')"),
    "posix_spawn": hostile(
        "filter", "attempt(os.posix_spawn, '/bin/sh', ['sh', '-c', 'echo BREACH'], {})"
    ),
    "multiprocessing": hostile(
        "filter",
        "import multiprocessing as m",
        "p = m.get_context('fork').Process(target=later)",
        "attempt(p.start)",
    ),
    "new session": hostile(
        "filter", "attempt(os.setsid)", "while True: pass", reason="stopped after"
    ),
    "thread that outlives": hostile(
        "others",
        "import threading",
        "threading.Thread(target=lambda: (later(), time.sleep(60))).start()",
        "os._exit(0)",
        reason="without reaching",
    ),
    "thread that never ends": hostile(
        "others",
        "import threading",
        "threading.Thread(target=time.sleep, args=(60,)).start()",
        reason="stopped after",
    ),
    "thread bomb": hostile(
        "always",
        "import threading",
        "while True: threading.Thread(target=time.sleep, args=(60,)).start()",
    ),
    # signals to others
    "kill the caller": hostile(
        "others", "attempt(os.kill, @PID@, signal.SIGTERM)", "attempt(os.kill, @PID@, 0)"
    ),
    "kill the parent": hostile("filter", "attempt(os.kill, os.getppid(), signal.SIGKILL)"),
    "kill everybody": hostile("filter", "attempt(os.kill, -1, signal.SIGTERM)"),
    "kill the group": hostile(
        "filter", "attempt(os.kill, 0, signal.SIGTERM)", "attempt(os.killpg, 0, signal.SIGKILL)"
    ),
    "thread signal to the caller": hostile(
        "others",
        "attempt(syscall, 234 if os.uname().machine == 'x86_64' else 131, @PID@, @PID@, 15)",
    ),
    "pidfd to the caller": hostile(
        "others", "fd = syscall(434, @PID@, 0)", "attempt(syscall, 424, fd, 15, 0, 0)"
    ),
    "trace the parent": hostile(
        "filter",
        "attempt(syscall, 101 if os.uname().machine == 'x86_64' else 117, 16, os.getppid(), 0, 0)",
    ),
    "limits of the caller": hostile(
        "others",
        "import resource",
        "attempt(resource.prlimit, @PID@, resource.RLIMIT_NOFILE, (3, 3))",
    ),
    "priority of the caller": hostile(
        "others",
        "attempt(os.setpriority, os.PRIO_PROCESS, @PID@, 19)",
        "attempt(os.sched_setaffinity, @PID@, {0})",
    ),
    "stop itself": hostile(
        "always", "os.kill(os.getpid(), signal.SIGSTOP)", reason="stopped after"
    ),
    # indirect ways to a signal and to a socket
    "signal by a pipe's owner": hostile(
        "others",
        "import fcntl, struct",
        "r, w = os.pipe()",
        "F_SETFL, F_SETOWN, F_SETSIG, F_SETOWN_EX, O_ASYNC = 4, 8, 10, 15, 0x2000",
        "try: fcntl.fcntl(r, F_SETSIG, signal.SIGTERM)",
        "except OSError: pass",
        "fcntl.fcntl(r, F_SETFL, O_ASYNC)",
        "attempt(fcntl.fcntl, r, F_SETOWN, @PID@)",
        "attempt(fcntl.fcntl, r, F_SETOWN_EX, struct.pack('ii', 1, @PID@))",
        "os.write(w, b'x')",
    ),
    "signal by a socket's owner": hostile(
        "others",
        "import fcntl, socket, struct",
        "a, b = socket.socketpair()",
        "FIOSETOWN, SIOCSPGRP = 0x8901, 0x8902",
        "attempt(fcntl.ioctl, a, FIOSETOWN, struct.pack('i', @PID@))",
        "attempt(fcntl.ioctl, a, SIOCSPGRP, struct.pack('i', @PID@))",
        "fcntl.fcntl(a, 4, 0x2000)",
        "b.send(b'x')",
    ),
    "send by a pair of datagram sockets": hostile(
        "others",
        "import socket",
        "def send(kind):",
        "    a, b = socket.socketpair(socket.AF_UNIX, kind)",
        "    return a.sendto(b'x', '@DATAGRAMS@')",
        "attempt(send, socket.SOCK_DGRAM)",
        "attempt(send, socket.SOCK_RAW)",
    ),
    # files
    "read /etc/passwd": hostile("files", "attempt(open, '/etc/passwd')"),
    "read by symlink": hostile("files", "os.symlink('/etc/passwd', 'link'); attempt(open, 'link')"),
    "read by hard link": hostile("files", "attempt(os.link, '/etc/passwd', 'link')"),
    "read through /proc": hostile(
        "files",
        "for p in ('self', '1', '@PID@', str(os.getppid())):",
        "    attempt(open, f'/proc/{p}/root/etc/passwd')",
    ),
    "read by ..": hostile("files", "attempt(open, '../' * 40 + 'etc/passwd')"),
    "list folders": hostile(
        "files",
        "attempt(os.listdir, '@CANARY@')",
        "attempt(os.listdir, '@CANARY@/..')",
        "attempt(os.listdir, '/home')",
    ),
    "delete": hostile(
        "files", "attempt(os.unlink, '@CANARY@/precious')", "attempt(os.rmdir, '@CANARY@/folder')"
    ),
    "delete a tree": hostile("files", "import shutil; attempt(shutil.rmtree, '@CANARY@')"),
    "overwrite": hostile(
        "files",
        "attempt(open, '@CANARY@/precious', 'w')",
        "attempt(os.truncate, '@CANARY@/precious', 0)",
    ),
    "move": hostile(
        "files",
        "attempt(os.rename, '@CANARY@/precious', 'mine')",
        "attempt(os.rename, 'program.py', '@CANARY@/precious')",
    ),
    "add a file": hostile(
        "files",
        "attempt(open, '@CANARY@/new', 'w')",
        "attempt(os.mkdir, '@CANARY@/new')",
        "attempt(os.symlink, '/', '@CANARY@/new')",
    ),
    "change rights": hostile(
        "files+filter",
        "attempt(os.chmod, '@CANARY@/precious', 0)",
        "attempt(os.chown, '@CANARY@/precious', 1, 1)",
        "attempt(os.utime, '@CANARY@/precious', (1, 1))",
    ),
    "change Python": hostile(
        "files",
        "attempt(open, os.__file__, 'a')",
        "attempt(os.unlink, os.__file__)",
        "attempt(open, os.path.dirname(os.__file__) + '/evil.py', 'w')",
    ),
    "symlink left behind": hostile(
        "always", "os.symlink('@CANARY@', 'link')", "os.symlink('@CANARY@/precious', 'file')"
    ),
    "folder hard to delete": hostile(
        "always",
        "os.makedirs('locked/deep')",
        "open('locked/deep/f', 'w')",
        "os.umask(0o777)",
        "os.mkdir('none')",
        "try: os.chmod('locked', 0)",
        "except OSError: pass",
        "",
    ),
    "a thousand levels": hostile("always", "for i in range(1500): os.mkdir('d'); os.chdir('d')"),
    "chroot and mount": hostile(
        "filter",
        "import ctypes",
        "c = ctypes.CDLL(None)",
        "attempt(os.chroot, '/')",
        "attempt(lambda: c.mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0)",
        "attempt(lambda: c.unshare(0x10000000) == 0)",
    ),
    "device node": hostile(
        "files",
        "import stat",
        "attempt(os.mknod, 'disk', stat.S_IFBLK | 0o600, os.makedev(254, 0))",
    ),
    "huge file": hostile("always", "f = open('big', 'wb')", "while True: f.write(bytes(1 << 20))"),
    "many files": hostile(
        "namespaces",
        "for i in range(10**9): open(f'f{i}', 'wb').write(bytes(1 << 20))",
        reason="No space left",
    ),
    "sparse file": hostile("always", "attempt(lambda: open('s', 'w').truncate(1 << 40))"),
    "all the descriptors": hostile(
        "always",
        "fs = []",
        "while True: fs.append(open('/dev/null'))",
        reason="Too many open files",
    ),
    "descriptors of the caller": hostile(
        "always",
        "for fd in range(3, 1024):",
        " try: print(os.read(fd, 999))",
        " except OSError: pass",
    ),
    # environment
    "environment": hostile(
        "always",
        "print(dict(os.environ))",
        "import ctypes",
        "c = ctypes.CDLL(None)",
        "c.getenv.restype = ctypes.c_char_p",
        "attempt(lambda: c.getenv(b'SANDBOX_CANARY') or False)",
    ),
    "environments of others": hostile(
        "files",
        "for p in range(1, 40000):",
        " for n in ('environ', 'cmdline', 'mem'):",
        "  try: print(open(f'/proc/{p}/{n}', 'rb').read(9999)); print('BREACH')",
        "  except OSError: pass",
    ),
    # network
    "TCP": hostile(
        "others", "import socket", "attempt(socket.create_connection, ('127.0.0.1', @PORT@), 1)"
    ),
    "UDP": hostile(
        "filter",
        "import socket",
        "udp = lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "attempt(lambda: udp().sendto(b'x', ('127.0.0.1', @PORT@)))",
    ),
    "abstract socket": hostile(
        "others",
        "import socket",
        "attempt(lambda: socket.socket(socket.AF_UNIX).connect('\\0@ABSTRACT@'))",
    ),
    "socket by number": hostile(
        "filter", "attempt(syscall, 41 if os.uname().machine == 'x86_64' else 198, 2, 1, 0)"
    ),
    "io_uring": hostile(
        "filter", "import ctypes", "attempt(syscall, 425, 8, ctypes.create_string_buffer(256))"
    ),
    "web": hostile(
        "others",
        "import urllib.request as u",
        "attempt(u.urlopen, 'http://127.0.0.1:@PORT@/', None, 1)",
    ),
    "server": hostile("filter", "import socket; attempt(socket.create_server, ('0.0.0.0', 0))"),
    # memory, time, output
    "memory bomb": hostile("always", "x = [0] * 10**10", reason="memory"),
    "creeping memory bomb": hostile(
        "always", "x = []", "while True: x.append(bytearray(1 << 20))", reason="memory"
    ),
    "memory bomb by children": hostile(
        "filter",
        "while True:",
        " try: os.fork()",
        " except OSError: pass",
        " try: x = bytearray(90 << 20)",
        " except MemoryError: pass",
        reason="stopped after",
    ),
    "memory files": hostile(
        "filter",
        "attempt(os.memfd_create, 'x')",
        "import ctypes",
        "attempt(syscall, 29 if os.uname().machine == 'x86_64' else 194, 7777, 1 << 20, 0o1600)",
    ),
    "mapped memory": hostile(
        "always", "import mmap", "x = []", "while True: x.append(mmap.mmap(-1, 1 << 24))"
    ),
    "endless loop": hostile("always", "while True: pass", reason="stopped after"),
    "endless sleep": hostile("always", "time.sleep(10**6)", reason="stopped after"),
    "nothing stops me": hostile(
        "always",
        "for s in range(1, 65):",
        " try: signal.signal(s, signal.SIG_IGN)",
        " except (OSError, ValueError): pass",
        "while True:",
        " try: time.sleep(9)",
        " except BaseException: pass",
        reason="stopped after",
    ),
    "huge power": hostile("always", "10**10**9"),
    "bad regular expression": hostile(
        "always", "import re; re.match('(a+)+$', 'a' * 60 + 'b')", reason="stopped after"
    ),
    "endless output": hostile(
        "always", "while True: print('x' * 1000)", reason="printed more than"
    ),
    "endless errors": hostile(
        "always", "while True: sys.stderr.write('x' * 1000)", reason="printed more than"
    ),
    "one huge write": hostile(
        "always", "while True: os.write(1, bytes(1 << 20))", reason="printed more than"
    ),
    "endless recursion": hostile(
        "always", "def f(n): return f(n + 1)", "f(0)", reason="RecursionError"
    ),
    "recursion into the stack's end": hostile(
        "always",
        "sys.setrecursionlimit(10**9)",
        "class A:",
        " def __repr__(self): return repr(self)",
        "repr(A())",
    ),
    "end that never ends": hostile(
        "always", "import atexit; atexit.register(time.sleep, 60)", reason="stopped after"
    ),
    "waits for input": hostile("always", "input()", reason="EOFError"),
    # ways to end
    "os._exit": hostile("always", "os._exit(0)", reason="without reaching its last line"),
    "sys.exit": hostile("always", "sys.exit(0)", reason="SystemExit"),
    "exit": hostile("always", "exit()", reason="SystemExit"),
    "abort": hostile("always", "os.abort()", reason="SIGABRT"),
    "null pointer": hostile("always", "import ctypes; ctypes.string_at(0)", reason="SIGSEGV"),
    "kills itself": hostile("always", "os.kill(os.getpid(), signal.SIGKILL)", reason="killed"),
    "closes everything": hostile("always", "os.closerange(0, 999)", "while True: pass"),
    "claims to be done": hostile(
        "always",
        "for fd in range(3, 999):",
        ' try: os.write(fd, b\'["0", "done", ""]\\n\')',
        " except OSError: pass",
        "os._exit(0)",
        reason="without reaching",
    ),
    "forges with the runner's secret": hostile(
        "always",
        "secret = sys._getframe(1).f_locals['nonce']",
        "for word in ('\"wall\", \"seccomp: x\"', '[], 1', '[' * 3000, '{\"a\": 1}'):",
        " for fd in range(3, 9):",
        "  try: os.write(fd, f'[\"{secret}\", {word}]\\n'.encode())",
        "  except OSError: pass",
        "1/0",
        reason="raised",
    ),
    "floods the runner": hostile(
        "always",
        "while True:",
        " for fd in range(3, 9):",
        "  try: os.write(fd, b'[' * 9999)",
        "  except OSError: pass",
        reason="stopped after",
    ),
    "error that can't be told": hostile(
        "always",
        "class E(Exception):",
        " def __str__(self): raise SystemExit(0)",
        "raise E",
        reason="without reaching",
    ),
    "error of many lines": hostile(
        "always", "raise ValueError('a\\n' * 10**4)", reason="ValueError: a a a"
    ),
    "syntax bomb": hostile(
        "always",
        "x = " + "(" * 10**4,
        reason="SyntaxError",
    ),
    "deep syntax": hostile(
        "always",
        "x = " + "-" * 10**5 + "1",
    ),
    "null byte": hostile("always", "print(1)\x00", reason="raised"),
    "half a character": hostile("always", "print('\ud800')", reason="raised"),
    "terminal": hostile(
        "always", "import fcntl, termios", "attempt(fcntl.ioctl, 0, termios.TIOCSTI, b'x')"
    ),
}
