"""What runs in the child process of lib.sandbox: it walls itself in, then runs the program.

A script of its own, importing next to nothing, because it starts once per program. What the walls
keep out is told in programs.py. Every function here raises OSError where the kernel refuses; the
parent then does without that wall, for all programs alike.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import types

# The only parts of the file system that a program can read, apart from its own folder: Python and
# what its extensions link to.
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
FILE_BYTES, FOLDER_BYTES, FOLDER_FILES = 16 << 20, 32 << 20, 4096
OPEN_FILES, THREADS = 64, 64

# Refused with EPERM: name -> number on x86_64 and on aarch64 (None: has no such call). From the
# kernel's unistd headers.
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
    # network, and memory that outlives the process or escapes its limits; with a number that was
    # guessed, what other processes share could be used without being opened
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
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
# Landlock lets these through; a mount that can't be written stops them itself.
METADATA = {
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
# Allowed with some arguments only.
CLONE, CLONE3 = (56, 220), (435, 435)
KILL, TGKILL, PRLIMIT = (62, 129), (234, 131), (302, 261)
FCNTL, IOCTL, SOCKETPAIR = (72, 25), (16, 29), (53, 199)
# Orders to a descriptor that make the kernel signal a process of one's choice, or type for it.
OWNER_FCNTL = {"F_SETOWN": 8, "F_SETSIG": 10, "F_SETOWN_EX": 15}
OWNER_IOCTL = {"FIOSETOWN": 0x8901, "SIOCSPGRP": 0x8902, "TIOCSTI": 0x5412}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

libc = ctypes.CDLL(None, use_errno=True)


def call(function, *args):
    """A libc function's result, or OSError with its errno."""
    result = function(*[_argument(a) for a in args])
    if result < 0:
        e = ctypes.get_errno()
        raise OSError(e, os.strerror(e), function.__name__)
    return result


def _argument(a):
    """An argument as C takes it: text as bytes, numbers as long as a register."""
    if isinstance(a, str):
        return a.encode()
    return ctypes.c_ulong(a) if isinstance(a, int) else a


def syscall(number, *args):
    return call(libc.syscall, number, *args)


def prctl(option, value, *rest):
    return call(libc.prctl, option, value, *rest, *[0] * (3 - len(rest)))


def machine():
    """The processor's name as the tables of system calls have it."""
    name = os.uname().machine
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(name, name)


def drop_capabilities():
    """Give up every capability (and, by PR_SET_NO_NEW_PRIVS, any way to gain one)."""
    prctl(38, 1)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call(libc.capset, header, (ctypes.c_uint32 * 6)())


# ---- namespaces

NEWNS, NEWUTS, NEWIPC = 0x20000, 0x4000000, 0x8000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
NOSUID, NODEV, BIND, RECURSIVE, PRIVATE = 2, 4, 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
DETACH = 2


def enter_namespaces(folder, work):
    """Enter own mount, network, process, IPC and host-name namespaces.

    `folder` becomes a new root of READABLE, DEVICES and an empty `work`. The caller's next child is
    process 1 of the new process namespace.
    """
    leave_namespaces_of_the_caller()
    build_root(folder, work)
    os.chdir(folder)
    # pivot_root: the old root now lies over the new one
    syscall({"x86_64": 155}.get(machine(), 41), ".", ".")
    call(libc.umount2, ".", DETACH)
    os.chdir(work)


def leave_namespaces_of_the_caller():
    """New namespaces, with a user namespace where they can't be had without.

    That is the second choice for root: without it one can become another user afterwards, to whom
    the kernel's limit on processes applies.
    """
    uid, gid = os.geteuid(), os.getegid()
    wanted = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    try:
        call(libc.unshare, wanted)
        return
    except OSError:
        call(libc.unshare, NEWUSER | wanted)
    maps = {"setgroups": "deny", "uid_map": f"1000 {uid} 1", "gid_map": f"1000 {gid} 1"}
    for name, text in maps.items():
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)


def build_root(folder, work):
    """A small file system in memory at `folder`, which can be read but not written."""
    call(libc.mount, None, "/", None, RECURSIVE | PRIVATE, None)
    small = "size=1m,nr_inodes=1024,mode=755"
    call(libc.mount, "tmpfs", folder, "tmpfs", NOSUID | NODEV, small)
    for path in READABLE + DEVICES:
        if os.path.lexists(path) and not os.path.lexists(folder + path):
            show_inside(path, folder + path)
    os.makedirs(folder + work)
    room = f"size={FOLDER_BYTES},nr_inodes={FOLDER_FILES},mode=700"
    call(libc.mount, "tmpfs", folder + work, "tmpfs", NOSUID | NODEV, room)
    read_only(folder, 0)


def show_inside(path, inside):
    """Let a file or folder be seen at another place too, read-only."""
    os.makedirs(os.path.dirname(inside), exist_ok=True)
    if os.path.islink(path) and os.path.isdir(path):  # /lib -> usr/lib
        os.symlink(os.readlink(path), inside)
        return
    # something to mount it over
    if os.path.isdir(path):
        os.mkdir(inside)
    else:
        open(inside, "w").close()
    call(libc.mount, path, inside, None, BIND | RECURSIVE, None)
    read_only(inside, AT_RECURSIVE)


def read_only(path, flags):
    """Let nothing below a mount be written or give rights."""
    # set MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, clear nothing
    attributes = (ctypes.c_uint64 * 4)(1 | 2)
    size = ctypes.sizeof(attributes)
    syscall(MOUNT_SETATTR, AT_FDCWD, path, flags, attributes, size)


# ---- Landlock

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE, READ, READ_DIR, TRUNCATE = 1, 2, 4, 8, 1 << 14


def landlock(folder):
    """Files by Landlock: all rights in `folder`, reading of READABLE, the DEVICES, nothing else.

    No TCP and no signals outside where the kernel is new enough.
    """
    abi = syscall(CREATE_RULESET, None, 0, 1)
    every = file_rights(abi)
    scoped = 3 if abi >= 6 else 0  # abstract sockets and signals
    # the kernel's record grew: files, then network, then scopes
    size = 8 * (1 + (abi >= 4) + (abi >= 6))
    rules = syscall(CREATE_RULESET, (ctypes.c_uint64 * 3)(every, 3, scoped), size, 0)
    for path in [folder, *READABLE, *DEVICES]:
        if os.path.exists(path):
            allow_path(rules, path, rights_of(path, folder, every))
    syscall(RESTRICT_SELF, rules, 0)
    os.close(rules)


def file_rights(abi):
    """All rights on files that this version of Landlock knows."""
    every = (1 << 13) - 1
    if abi >= 2:
        every |= 1 << 13  # to move files between folders
    if abi >= 3:
        every |= TRUNCATE
    if abi >= 5:
        every |= 1 << 15  # ioctl on devices
    return every


def rights_of(path, folder, every):
    """What a program may do with one of the paths it is shown."""
    if path == folder:
        return every & ~EXECUTE
    if path in DEVICES:
        return READ | WRITE | TRUNCATE & every
    return READ | READ_DIR if os.path.isdir(path) else READ


def allow_path(rules, path, rights):
    """Add a path and what may be done below it to a ruleset."""
    fd = os.open(path, os.O_PATH)
    record = rights.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder)
    syscall(ADD_RULE, rules, 1, ctypes.create_string_buffer(record, 12), 0)
    os.close(fd)


# ---- the filter of system calls: a small program of (code, jump if so, jump if not, operand)

LOAD, EQUAL, ABOVE, TEST, AND, GIVE = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
ALLOW = (GIVE, 0, 0, 0x7FFF0000)
DENY = (GIVE, 0, 0, 0x50001)  # EPERM
ABSENT = (GIVE, 0, 0, 0x50026)  # ENOSYS
# Low halves of a call's record: both processors are little-endian.
LOAD_NUMBER, LOAD_ARCH = (LOAD, 0, 0, 0), (LOAD, 0, 0, 4)
ARGUMENT = 16  # where its arguments begin, of eight bytes each
CLONE_THREAD = 0x10000
AF_UNIX, SOCK_STREAM, SOCK_TYPE = 1, 1, 0xF


def argument(i):
    """Load the low half of argument i."""
    return (LOAD, 0, 0, ARGUMENT + 8 * i)


def for_call(number, body):
    """Run `body` for one system call, and go on behind it for all others."""
    return [(EQUAL, 0, len(body), number), *body]


def one_of(i, allowed):
    """Allow a call whose argument i is one of `allowed`, deny any other."""
    checks = [(EQUAL, len(allowed) - n, 0, value) for n, value in enumerate(allowed)]
    return [argument(i), *checks, DENY, ALLOW]


def none_of(i, denied):
    """Deny a call whose argument i is one of `denied`, allow any other."""
    checks = [(EQUAL, len(denied) - n, 0, value) for n, value in enumerate(denied)]
    return [argument(i), *checks, ALLOW, DENY]


def filter_code(column, pid, metadata):
    """The filter for one processor (its column in the tables) and one process."""
    arch = list(AUDIT_ARCH.values())[column]
    code = [LOAD_ARCH, (EQUAL, 1, 0, arch), DENY, LOAD_NUMBER]
    # numbers of the 32-bit kind
    code += [(ABOVE, 0, 1, 0x40000000), DENY]
    for numbers in (REFUSED | (METADATA if metadata else {})).values():
        if numbers[column] is not None:
            code += for_call(numbers[column], [DENY])
    # its flags can't be seen from here; libc then uses clone
    code += for_call(CLONE3[column], [ABSENT])
    only_threads = [argument(0), (TEST, 1, 0, CLONE_THREAD), DENY, ALLOW]
    code += for_call(CLONE[column], only_threads)
    # no process but this one
    code += for_call(KILL[column], one_of(0, [pid]))
    code += for_call(TGKILL[column], one_of(0, [pid]))
    code += for_call(PRLIMIT[column], one_of(0, [0, pid]))
    code += for_call(FCNTL[column], none_of(1, list(OWNER_FCNTL.values())))
    code += for_call(IOCTL[column], none_of(1, list(OWNER_IOCTL.values())))
    # a pair of datagram sockets could send to any socket there is
    code += for_call(
        SOCKETPAIR[column],
        [
            argument(0),
            (EQUAL, 1, 0, AF_UNIX),
            DENY,
            argument(1),
            (AND, 0, 0, SOCK_TYPE),
            (EQUAL, 1, 0, SOCK_STREAM),
            DENY,
            ALLOW,
        ],
    )
    return [*code, ALLOW]


class Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("yes", ctypes.c_uint8),
        ("no", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    ]


class FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("code", ctypes.POINTER(Instruction))]


def seccomp(metadata):
    """A system-call filter: one process with threads, no new ones, nothing of REFUSED.

    No sockets but pairs of streams, no signals to others. metadata: refuse METADATA as well.
    OSError on a processor whose system-call numbers aren't listed here.
    """
    if machine() not in AUDIT_ARCH or sys.maxsize < 1 << 32:
        raise OSError(f"no list of system calls for {machine()}")
    code = filter_code(list(AUDIT_ARCH).index(machine()), os.getpid(), metadata)
    prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    program = FilterProgram(len(code), (Instruction * len(code))(*code))
    prctl(22, 2, ctypes.byref(program))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


# ---- user and limits


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
    """As root: become a user id that nothing else has, and that owns `folder`.

    Stay where that user couldn't read Python.
    """
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
    hard = soft if hard is None else hard
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))


def set_limits(memory, seconds, layers):
    """Limit processor time, memory, files and, where no wall does it, processes."""
    limit(resource.RLIMIT_CPU, seconds, seconds + 1)
    limit(resource.RLIMIT_FSIZE, FILE_BYTES)
    limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    limit(resource.RLIMIT_CORE, 0)
    if hasattr(resource, "RLIMIT_MEMLOCK"):
        limit(resource.RLIMIT_MEMLOCK, 0)
    if sys.platform == "linux":
        limit(resource.RLIMIT_AS, memory)
    # The kernel counts a user's processes and threads together: in namespaces, where the user is
    # new, those of this program, else all that the user has. So there the number of threads is left
    # to RLIMIT_AS; and with no filter to keep processes from leaving, none may start.
    if "namespaces" in layers:
        limit(resource.RLIMIT_NPROC, THREADS)
    elif "seccomp" not in layers:
        limit(resource.RLIMIT_NPROC, 1)


def wait_for(pid):
    """End as the child `pid` ends: with its status, or 128 + the signal that killed it."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def stay_behind():
    """Fork; the parent keeps no output open and ends with the child, and the other way round."""
    pid = os.fork()
    if pid:
        for fd in (0, 1, 2):
            os.close(fd)
        wait_for(pid)
    if sys.platform == "linux":
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# ---- all of it


def build_walls(order, failed):
    """Everything between this process and the outside, strongest first.

    order: as for `run`. `failed(layer, error)` tells what couldn't be built and ends.
    """
    layers, work = order["layers"], order["work"]

    def attempt(layer, build, *args):
        if layer in layers:
            try:
                build(*args)
            except (OSError, AttributeError) as e:  # AttributeError: a libc without that function
                failed(layer, e)

    attempt("namespaces", enter_namespaces, order["folder"], work)
    os.chdir(work)
    if sys.platform == "linux":
        if os.geteuid() == 0:
            become_nobody(work)
        drop_capabilities()
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing outlives the thread that started this
        if os.getppid() != order["caller"]:  # too late for that
            os._exit(1)
        prctl(4, 0)  # PR_SET_DUMPABLE: other programs of the same user can't look into this process
    if "namespaces" in layers:
        stay_behind()  # outside the process namespace
        stay_behind()  # its process 1: the namespace ends with it
    attempt("landlock", landlock, work)
    set_limits(order["memory"], order["seconds"], layers)
    attempt("seccomp", seccomp, "namespaces" not in layers)


def run(order, status):
    """Build the walls, run the program, and tell the pipe `status` how it goes.

    order: a dict of
      code, name                what to run, and its `__name__`
      folder                    the program's own; for namespaces the place of their new root
      work                      the path of its own folder as the program sees it
      layers, memory, seconds   the walls and limits
      caller, nonce             the process that waits, and the secret it knows this one by

    Each line to `status` is JSON, [nonce, word, detail]. Words: wall (layer and why; nothing was
    run), ready, done (reached its end), exit (SystemExit; its code), memory, error.
    """
    nonce = order["nonce"]

    def tell(word, detail=""):
        line = json.dumps([nonce, word, detail[:500]])
        os.write(status, line.encode() + b"\n")

    def failed(layer, error):
        tell("wall", f"{layer}: {error}")
        os._exit(1)

    build_walls(order, failed)
    add_exit()
    path = os.path.join(order["work"], "program.py")
    with open(path, "w", encoding="utf-8", errors="surrogatepass") as f:
        f.write(order["code"])
    module = types.ModuleType(order["name"])
    module.__file__ = path
    sys.modules["__main__"] = sys.modules[order["name"]] = module
    tell("ready")
    try:
        exec(compile(order["code"], path, "exec"), module.__dict__)
        word, detail, leave = "done", "", None
    except SystemExit as e:
        word, detail, leave = "exit", repr(e.code), e.code
    except MemoryError as e:
        e.__traceback__ = None  # frees what the frames hold
        word, detail, leave = "memory", "", "MemoryError"
    except BaseException as e:
        frames = e.__traceback__
        e.__traceback__ = frames and frames.tb_next  # without this one
        sys.__excepthook__(type(e), e, e.__traceback__)
        name = type(e).__name__
        word, detail, leave = "error", f"{name}: {e}" if str(e) else name, 1
    tell(word, detail)
    sys.exit(leave)


def add_exit():
    """exit() and quit(), which -S leaves out."""
    import _sitebuiltins
    import builtins

    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D"))


if __name__ == "__main__":
    with open(int(sys.argv[1]), encoding="utf-8", errors="surrogatepass") as f:
        order = json.load(f)
    status = int(sys.argv[2])
    sys.argv[:] = ["program.py"]
    run(order, status)
