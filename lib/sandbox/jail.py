"""What runs in the child process of lib.sandbox: builds the walls around itself, then runs the program.

A script of its own, importing next to nothing, because it starts once per program. What the walls keep out is told in lib.sandbox.
Every function here raises OSError where the kernel refuses; the parent then does without that wall, for all programs alike.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import types

# The only parts of the file system that a program can read, apart from its own folder: Python and what its extensions link to.
READABLE = [
    os.path.dirname(os.path.realpath(os.__file__)),
    os.path.join(sys.base_prefix, "lib"),
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
    "/etc/localtime",
]
DEVICES = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
FILE_BYTES, FOLDER_BYTES, FOLDER_FILES, OPEN_FILES, THREADS = 16 << 20, 32 << 20, 4096, 64, 64

# Refused with EPERM: name -> number on x86_64 and on aarch64 (None: has no such call). From the kernel's unistd headers.
REFUSED = {
    # other programs, other processes
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # network, and memory that outlives the process or escapes its limits
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # the kernel's own affairs
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "personality": (135, 92),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
}
METADATA = {  # Landlock lets these through; a mount that can't be written stops them itself
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
}
CLONE, CLONE3, KILL, TGKILL, PRLIMIT = (56, 220), (435, 435), (62, 129), (234, 131), (302, 261)
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

libc = ctypes.CDLL(None, use_errno=True)


def call(function, *args):
    """A libc function's result, or OSError with its errno."""
    result = function(
        *[
            a.encode() if isinstance(a, str) else ctypes.c_ulong(a) if isinstance(a, int) else a
            for a in args
        ]
    )
    if result < 0:
        e = ctypes.get_errno()
        raise OSError(e, os.strerror(e), function.__name__)
    return result


def syscall(number, *args):
    return call(libc.syscall, number, *args)


def prctl(option, value, *rest):
    return call(libc.prctl, option, value, *rest, *[0] * (3 - len(rest)))


def drop_capabilities():
    """Give up every capability (and, by PR_SET_NO_NEW_PRIVS, any way to gain one)."""
    prctl(38, 1)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call(libc.capset, header, (ctypes.c_uint32 * 6)())


def enter_namespaces(folder, work):
    """Own mount, network, process, IPC and host-name namespaces; `folder` becomes a new root of READABLE, DEVICES and an empty `work`.

    The caller's next child is process 1 of the new process namespace. As root a user namespace is the second choice: without it one can
    become another user afterwards, to whom the kernel's limit on processes applies.
    """
    newns, newuts, newipc, newuser, newpid, newnet = (
        0x20000,
        0x4000000,
        0x8000000,
        0x10000000,
        0x20000000,
        0x40000000,
    )
    uid, gid = os.geteuid(), os.getegid()
    rest = newns | newuts | newipc | newpid | newnet
    try:
        call(libc.unshare, rest)
    except OSError:
        call(libc.unshare, newuser | rest)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"1000 {uid} 1"),
            ("gid_map", f"1000 {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as f:
                f.write(text)
    nosuid, nodev, bind, rec, private = 2, 4, 4096, 16384, 1 << 18
    at_fdcwd, at_recursive = -100, 0x8000

    def read_only(path, flags):
        # set MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, clear nothing
        attributes = (ctypes.c_uint64 * 4)(1 | 2)
        syscall(442, at_fdcwd, path, flags, attributes, ctypes.sizeof(attributes))

    call(libc.mount, None, "/", None, rec | private, None)
    call(libc.mount, "tmpfs", folder, "tmpfs", nosuid | nodev, "size=1m,nr_inodes=1024,mode=755")
    for path in READABLE + DEVICES:
        inside = folder + path
        if not os.path.lexists(path) or os.path.lexists(inside):
            continue
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path) and os.path.isdir(path):  # /lib -> usr/lib
            os.symlink(os.readlink(path), inside)
            continue
        if os.path.isdir(path):
            os.mkdir(inside)
        else:
            open(inside, "w").close()
        call(libc.mount, path, inside, None, bind | rec, None)
        read_only(inside, at_recursive)
    os.makedirs(folder + work)
    call(
        libc.mount,
        "tmpfs",
        folder + work,
        "tmpfs",
        nosuid | nodev,
        f"size={FOLDER_BYTES},nr_inodes={FOLDER_FILES},mode=700",
    )
    read_only(folder, 0)
    os.chdir(folder)
    # pivot_root: the old root now lies over the new one
    syscall({"x86_64": 155}.get(platform_machine(), 41), ".", ".")
    call(libc.umount2, ".", 2)  # MNT_DETACH
    os.chdir(work)


def landlock(folder):
    """Files by Landlock: all rights in `folder`, reading of READABLE, the DEVICES, and nothing else; no TCP and no signals outside
    where the kernel is new enough."""
    abi = syscall(444, None, 0, 1)
    execute, write, read, read_dir, truncate = 1, 2, 4, 8, 1 << 14
    every = (
        (1 << 13) - 1
        | (1 << 13 if abi >= 2 else 0)
        | (truncate if abi >= 3 else 0)
        | (1 << 15 if abi >= 5 else 0)
    )
    scoped = 3 if abi >= 6 else 0  # abstract sockets and signals
    rules = syscall(
        444, (ctypes.c_uint64 * 3)(every, 3, scoped), 24 if abi >= 6 else 16 if abi >= 4 else 8, 0
    )
    for path in [folder, *READABLE, *DEVICES]:
        if not os.path.exists(path):
            continue
        rights = (
            every & ~execute if path == folder else read | read_dir if os.path.isdir(path) else read
        )
        if path in DEVICES:
            rights |= write | truncate & every
        fd = os.open(path, os.O_PATH)
        rule = ctypes.create_string_buffer(
            rights.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder), 12
        )
        syscall(445, rules, 1, rule, 0)
        os.close(fd)
    syscall(446, rules, 0)
    os.close(rules)


def platform_machine():
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(os.uname().machine, os.uname().machine)


def seccomp(metadata):
    """A system-call filter: one process with threads, no new ones, no sockets, no signals to others, nothing of REFUSED.

    metadata: refuse METADATA as well. OSError on a processor whose system-call numbers aren't listed here.
    """
    if platform_machine() not in AUDIT_ARCH or sys.maxsize < 1 << 32:
        raise OSError(f"no list of system calls for {platform_machine()}")
    column = list(AUDIT_ARCH).index(platform_machine())
    load, equal, above, test, give = 0x20, 0x15, 0x35, 0x45, 0x06
    # EPERM, ENOSYS
    allow, deny, absent = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x50001), (give, 0, 0, 0x50026)
    # low halves: both processors are little-endian
    number, arch, arg0 = (load, 0, 0, 0), (load, 0, 0, 4), (load, 0, 0, 16)
    pid = os.getpid()
    code = [
        arch,
        (equal, 1, 0, AUDIT_ARCH[platform_machine()]),
        deny,
        number,
        (above, 0, 1, 0x40000000),
        deny,
    ]
    for numbers in (REFUSED | (METADATA if metadata else {})).values():
        if numbers[column] is not None:
            code += [(equal, 0, 1, numbers[column]), deny]
    # its flags can't be seen from here; libc then uses clone
    code += [(equal, 0, 1, CLONE3[column]), absent]
    code += [(equal, 0, 4, CLONE[column]), arg0, (test, 1, 0, 0x10000), deny, allow]  # CLONE_THREAD
    for numbers in (KILL, TGKILL):
        code += [(equal, 0, 4, numbers[column]), arg0, (equal, 1, 0, pid), deny, allow]
    code += [
        (equal, 0, 5, PRLIMIT[column]),
        arg0,
        (equal, 2, 0, 0),
        (equal, 1, 0, pid),
        deny,
        allow,
    ]
    code += [allow]

    class Instruction(ctypes.Structure):
        _fields_ = [
            ("code", ctypes.c_uint16),
            ("yes", ctypes.c_uint8),
            ("no", ctypes.c_uint8),
            ("k", ctypes.c_uint32),
        ]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint16), ("code", ctypes.POINTER(Instruction))]

    prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    program = Program(len(code), (Instruction * len(code))(*code))
    prctl(22, 2, ctypes.byref(program))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def open_to_all(path):
    """Whether any user can read the file or enter the folder at `path`."""
    path = os.path.realpath(path)
    ways = [os.path.dirname(path)]
    while ways[-1] != "/":
        ways.append(os.path.dirname(ways[-1]))
    return all(os.stat(way).st_mode & 1 for way in ways) and (
        os.path.isdir(path) or os.stat(path).st_mode & 4
    )


def become_nobody(folder):
    """As root: a user id that nothing else has, now owning `folder`; where that user couldn't read Python, stay."""
    if not (open_to_all(os.__file__) and open_to_all(folder)):
        return
    uid = 1 << 30 | os.getpid()
    try:
        os.chown(folder, uid, uid)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError:  # a root that may not: in a container without these capabilities
        os.chown(folder, os.geteuid(), os.getegid())


def limit(kind, soft, hard=None):
    """Lower a resource limit (never above the hard one in force)."""
    ceiling = resource.getrlimit(kind)[1]
    values = [
        v if ceiling == resource.RLIM_INFINITY else min(v, ceiling)
        for v in (soft, soft if hard is None else hard)
    ]
    resource.setrlimit(kind, tuple(values))


def set_limits(memory, seconds, layers):
    limit(resource.RLIMIT_CPU, seconds, seconds + 1)
    limit(resource.RLIMIT_FSIZE, FILE_BYTES)
    limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    limit(resource.RLIMIT_CORE, 0)
    if hasattr(resource, "RLIMIT_MEMLOCK"):
        limit(resource.RLIMIT_MEMLOCK, 0)
    if sys.platform == "linux":
        limit(resource.RLIMIT_AS, memory)
    # The kernel counts a user's processes and threads together: in namespaces, where the user is new, those of this program, else all that
    # the user has. So there the number of threads is left to RLIMIT_AS; and with no filter to keep processes from leaving, none may start.
    if "namespaces" in layers:
        limit(resource.RLIMIT_NPROC, THREADS)
    elif "seccomp" not in layers:
        limit(resource.RLIMIT_NPROC, 1)


def wait_for(pid):
    """End as the child `pid` ends: with its status, or 128 + the signal that killed it."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def stay_behind():
    """Fork; the parent keeps no output open and ends with the child, the child dies with its parent."""
    pid = os.fork()
    if pid:
        for fd in (0, 1, 2):
            os.close(fd)
        wait_for(pid)
    if sys.platform == "linux":
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def build_walls(folder, work, layers, memory, seconds, caller, failed):
    """Everything between this process and the outside, strongest first; `failed(layer, error)` tells what couldn't be built and ends."""

    def attempt(layer, build, *args):
        if layer in layers:
            try:
                build(*args)
            except (OSError, AttributeError) as e:  # AttributeError: a libc without that function
                failed(layer, e)

    attempt("namespaces", enter_namespaces, folder, work)
    os.chdir(work)
    if sys.platform == "linux":
        if os.geteuid() == 0:
            become_nobody(work)
        drop_capabilities()
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing outlives the thread that started this
        if os.getppid() != caller:  # too late for that
            os._exit(1)
        prctl(4, 0)  # PR_SET_DUMPABLE: other programs of the same user can't look into this process
    if "namespaces" in layers:
        stay_behind()  # outside the process namespace
        stay_behind()  # its process 1: the namespace ends with it
    attempt("landlock", landlock, work)
    set_limits(memory, seconds, layers)
    attempt("seccomp", seccomp, "namespaces" not in layers)


def run(code, folder, work, layers, memory, seconds, caller, nonce, status):
    """Build the walls, run `code` as __main__, and write to the pipe `status` how it goes, as JSON lines of [nonce, word, detail].

    folder: the program's own, for namespaces the place of their new root; work: the path of its own folder as the program sees it.
    Words: wall (detail: layer and why; nothing was run), ready, done (reached its end), exit (SystemExit; its code), memory, error.
    """

    def tell(word, detail=""):
        os.write(status, json.dumps([nonce, word, detail[:500]]).encode() + b"\n")

    def failed(layer, error):
        tell("wall", f"{layer}: {error}")
        os._exit(1)

    build_walls(folder, work, layers, memory, seconds, caller, failed)
    import _sitebuiltins  # exit() and quit(), which -S leaves out
    import builtins

    builtins.exit, builtins.quit = (
        _sitebuiltins.Quitter(name, "Ctrl-D") for name in ("exit", "quit")
    )
    path = os.path.join(work, "program.py")
    with open(path, "w", encoding="utf-8", errors="surrogatepass") as f:
        f.write(code)
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__file__ = path
    tell("ready")
    try:
        exec(compile(code, path, "exec"), module.__dict__)
        word, detail, leave = "done", "", None
    except SystemExit as e:
        word, detail, leave = "exit", repr(e.code), e.code
    except MemoryError as e:
        e.__traceback__ = None  # frees what the frames hold
        word, detail, leave = "memory", "", "MemoryError"
    except BaseException as e:
        e.__traceback__ = e.__traceback__.tb_next  # without this frame
        sys.__excepthook__(type(e), e, e.__traceback__)
        word, detail, leave = "error", f"{type(e).__name__}: {e}" if str(e) else type(e).__name__, 1
    tell(word, detail)
    sys.exit(leave)


if __name__ == "__main__":
    with open(int(sys.argv[1]), encoding="utf-8", errors="surrogatepass") as f:
        order = json.load(f)
    status = int(sys.argv[2])
    sys.argv[:] = ["program.py"]
    run(status=status, **order)
