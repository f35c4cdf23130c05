"""Running what a model wrote: sums and string questions by a calculator that knows nothing else, Python in a walled-off process."""

import ast
import contextlib
import functools
import json
import math
import os
import re
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from lib.files import UserError, choose

# ---------------------------------------------------------------------------------------------------------------- calculator

# longest expression, nesting, number, and string or list
EXPRESSION, DEPTH, BITS, STRING = 1000, 50, 4096, 10_000

QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


class Refused(Exception):
    """Not on the whitelist, or too big."""


def calculator(expression: str, *, wide: bool = False) -> str | None:
    """The value of an expression as text, or None where it is refused or has none. Never raises; the work is bounded.

    Numbers (commas between thousands are dropped) with + - * / // % and parentheses, or one 'text'.count('t'). Arithmetic is exact, on
    fractions; a whole result is written without a point (10/2 is 5, as in GSM8K), any other as the nearest float. Powers,
    exponent notation, functions and other methods are refused, as in the reference (golden data `generation_T.json`), because a model
    trained with one calculator should meet the same one later.

    wide: also **, 1e3, comparisons, `in`, strings everywhere, indexing and slicing, and FUNCTIONS and METHODS.

    Bounds: EXPRESSION characters, DEPTH levels, numbers of BITS bits above and below the fraction line, strings and lists of STRING.
    """
    if not isinstance(expression, str) or len(expression) > EXPRESSION:
        return None
    # Backslashes are refused so that the quoted parts are certain; digits run into letters because Python only warns of them.
    quoted = [*QUOTED.findall(expression), ""]
    plain = [THOUSANDS.sub("", part) for part in QUOTED.split(expression)]
    if "\\" in expression or any(
        re.search(r"\d[a-df-zA-DF-Z_]|[eE]\d*[a-zA-Z_]\d", part) for part in plain
    ):
        return None
    if not wide and (len(quoted) == 1 and not re.fullmatch(r"[\d\s+\-*/%.()]*", plain[0])):
        return None
    try:
        tree = ast.parse(
            "".join(a + b for a, b in zip(plain, quoted, strict=True)).strip(), mode="eval"
        ).body
        if not wide and len(quoted) > 1:
            call = (
                isinstance(tree, ast.Call)
                and isinstance(tree.func, ast.Attribute)
                and tree.func.attr == "count"
            )
            if not call or not all(
                isinstance(part, ast.Constant) for part in (tree.func.value, *tree.args)
            ):
                return None
        return written(value(tree, wide, DEPTH))
    except (
        Refused,
        SyntaxError,
        TypeError,
        ValueError,
        IndexError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    ):
        return None


def written(x) -> str:
    if isinstance(x, Fraction):
        return str(x.numerator) if x.denominator == 1 else repr(float(x))
    return str(x)


def bounded(x):
    """x itself, or Refused where it is of no kind we compute with or too big to go on with."""
    if isinstance(x, bool):
        return x
    if isinstance(x, int | Fraction):
        x = Fraction(x)
        if max(x.numerator.bit_length(), x.denominator.bit_length()) <= BITS:
            return x
    elif isinstance(x, float):
        return Fraction(repr(x))  # as written: 0.1 is a tenth; ValueError for infinity and nan
    elif isinstance(x, str):
        if len(x) <= STRING:
            return x
    elif (
        isinstance(x, list)
        and all(isinstance(s, str) for s in x)
        and sum(map(len, x)) + len(x) <= STRING
    ):
        return x
    raise Refused


def whole(x) -> int:
    """An int from a number without fraction."""
    if isinstance(x, Fraction) and x.denominator == 1:
        return x.numerator
    raise Refused


def kinds(*allowed):
    """A check that arguments are of these types, one for one."""
    return lambda args: (
        len(args) == len(allowed)
        and all(isinstance(a, t) for a, t in zip(args, allowed, strict=True))
    )


def power(a, b):
    if b.denominator != 1:
        return float(a) ** float(b)  # of a negative number: complex, which bounded refuses
    if abs(b) * max(a.numerator.bit_length(), a.denominator.bit_length()) > 2 * BITS:
        raise Refused
    return a ** int(b)


def times(a, b):
    """Product of numbers, or a string repeated."""
    if isinstance(a, str) or isinstance(b, str):
        text, n = (a, b) if isinstance(a, str) else (b, a)
        if len(text) * whole(n) > STRING:
            raise Refused
        return text * whole(n)
    return a * b


def replaced(text, old, new):
    if len(text) + text.count(old) * len(new) > STRING:
        raise Refused
    return text.replace(old, new)


def joined(between, parts):
    if sum(map(len, parts)) + len(between) * len(parts) > STRING:
        raise Refused
    return between.join(parts)


def rounded(x, digits=None):
    if digits is not None and abs(digits) > 100:
        raise Refused
    return round(x, None if digits is None else whole(digits))


def plus(a, b):
    if {type(a), type(b)} not in ({str}, {Fraction}):
        raise Refused
    return a + b


def to_int(x):
    if isinstance(x, str) and not re.fullmatch(r"\s*[+-]?\d+\s*", x):
        raise Refused
    return int(x)


def to_float(x):
    if isinstance(x, str):
        return Fraction(repr(float(x)))
    return x


def numbers(function):
    """`function` of numbers only."""

    def guarded(*args):
        if not all(type(a) is Fraction for a in args):
            raise Refused
        return function(*args)

    return guarded


def text_or_list(function):
    def guarded(x):
        if not isinstance(x, str | list):
            raise Refused
        return function(x)

    return guarded


BINARY = {
    ast.Add: plus,
    ast.Sub: numbers(lambda a, b: a - b),
    ast.Mult: times,
    ast.Div: numbers(lambda a, b: a / b),
    ast.FloorDiv: numbers(lambda a, b: a // b),
    ast.Mod: numbers(lambda a, b: a % b),
    ast.Pow: numbers(power),
}
UNARY = {ast.USub: numbers(lambda a: -a), ast.UAdd: numbers(lambda a: a)}
COMPARE = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
FUNCTIONS = {
    "abs": numbers(abs),
    "round": numbers(rounded),
    "min": numbers(min),
    "max": numbers(max),
    "int": to_int,
    "float": to_float,
    "str": written,
    "len": text_or_list(len),
    "list": text_or_list(list),
    "sorted": text_or_list(sorted),
    "sqrt": numbers(lambda x: math.sqrt(x)),
}
METHODS = {  # of strings: what the arguments must be, and the work where it isn't str's own
    **{name: ([kinds()], getattr(str, name)) for name in
       ("upper", "lower", "title", "capitalize", "swapcase", "isalpha", "isdigit", "isupper", "islower", "isalnum", "isspace")},
    **{name: ([kinds(str)], getattr(str, name)) for name in ("count", "find", "rfind", "index", "startswith", "endswith")},
    **{name: ([kinds(), kinds(str)], getattr(str, name)) for name in ("strip", "lstrip", "rstrip", "split")},
    "replace": ([kinds(str, str)], replaced),
    "join": ([kinds(str), kinds(list)], joined),
}  # fmt: skip


def value(node, wide, depth):
    """The bounded value (Fraction, str, bool, list of str) of a syntax tree of whitelisted nodes."""
    if depth == 0:
        raise Refused

    def of(child):
        return value(child, wide, depth - 1)

    match node:
        case ast.Constant(value=bool() | int() | float() | str() as x):
            return bounded(x)
        case ast.UnaryOp(op=op, operand=x) if type(op) in UNARY:
            return bounded(UNARY[type(op)](of(x)))
        case ast.BinOp(left=a, op=op, right=b) if type(op) in BINARY and (
            wide or not isinstance(op, ast.Pow)
        ):
            return bounded(BINARY[type(op)](of(a), of(b)))
        case ast.Call(func=ast.Attribute(value=text, attr=name), args=args, keywords=[]) if (
            name in METHODS
        ):
            text, args = of(text), [of(a) for a in args]
            checks, method = METHODS[name]
            if not isinstance(text, str) or not any(check(args) for check in checks):
                raise Refused
            return bounded(method(text, *args))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if wide and name in FUNCTIONS:
            return bounded(FUNCTIONS[name](*[of(a) for a in args]))
        case ast.Compare(left=a, ops=ops, comparators=rest) if all(
            type(op) in COMPARE for op in ops
        ):
            sides = [of(a), *map(of, rest)]
            return all(
                COMPARE[type(op)](x, y) for op, x, y in zip(ops, sides, sides[1:], strict=False)
            )
        case ast.Subscript(value=text, slice=ast.Slice(lower=low, upper=high, step=step)):
            return bounded(
                of(text)[slice(*[None if i is None else whole(of(i)) for i in (low, high, step)])]
            )
        case ast.Subscript(value=text, slice=i):
            return bounded(of(text)[whole(of(i))])
        case ast.List(elts=parts):
            return bounded([of(part) for part in parts])
    raise Refused


# -------------------------------------------------------------------------------------------------------------------- Python

LAYERS = ("namespaces", "landlock", "seccomp")
START = 20.0  # seconds a child may take to build its walls, on a very busy machine
MEMORY = 48 << 20  # Python's own need, with some room
JAIL = Path(__file__).with_name("jail.py")


class Result(NamedTuple):
    """How a program went. ok: it ran to its last line without an exception; reason: else one sentence, for people to read."""

    ok: bool
    stdout: str
    stderr: str
    reason: str


def run_python(code: str, *, timeout: float = 5.0, memory: int = 256 << 20, stdin: str = "", output: int = 256 << 10,
               layers: tuple[str, ...] | None = None) -> Result:  # fmt: skip
    """Run a Python program that nobody has read, in a process of its own, and say how it went.

    timeout: seconds from its first line; processor time is limited to about the same. memory: bytes of address space.
    stdin: what it can read there. output: bytes kept of stdout and of stderr each; one that prints more is killed. layers: only these of
    `available()`, for tests. Safe to call from several threads (`run_many`).
    Only the standard library can be imported. Hashes of strings are the same in every run.

    ok means that the last line was reached: a program that leaves early, by sys.exit(0) say, isn't ok (else a wrong answer could skip
    its tests by leaving). A program that is out to cheat the tests appended to it still can, as both share one interpreter; read ok
    as "an honest program is right". Raises UserError for senseless limits or a system that is neither Linux nor macOS, and OSError where
    a process can't be started or walled in; never because of what the program does.

    What is kept out, by layer (`available()` says which this machine has; what the kernel refuses is left out for all programs):

    always       Environment scrubbed; own temporary folder, deleted afterwards (unless the caller is killed); standard input never the
                 caller's; descriptors, size of one file and processor time limited; killed as a process group when time is up,
                 when it prints too much, and at its end. Linux: address space limited, capabilities dropped, dies with its caller;
                 run as root it becomes a user that nothing else belongs to, if such a one can read Python.
    namespaces   (Linux, where root or users may make them) A file system of Python's library, the shared libraries and four devices,
                 read-only, and its own folder, in memory and limited in size; no network devices; no other process to be seen or
                 signalled; all of its processes end with the first, and their number is limited.
    landlock     (Linux 5.13 and later) Opens only the same files; of others it can still learn whether they exist. From 6.7 on no TCP,
                 from 6.12 on no signals to others.
    seccomp      (Linux on x86_64 and aarch64) One process with threads: no other processes or programs, so nothing can outlive it;
                 no sockets; no signals, tracing, limits or priorities of other processes; no shared memory that stays; none of
                 the kernel's administrative calls.

    With seccomp and one of the other two a program can't read the caller's files (/etc/passwd, keys) or environment, reach the network,
    touch other processes or leave anything behind. Not kept out even then: bugs in the kernel, timing and other side channels, a
    processor per thread and `memory` until time is up; and, without namespaces, filling the disk with many files until then.
    With seccomp alone it can read and write what you (or, as root, everybody) can. With no layer at all (macOS, old kernels) it runs
    with your rights: it can read and delete your files, use the network, signal your processes. There it can start no other process
    and on Linux no thread either, unless you are root; and on macOS its memory isn't limited. Only run what you trust like that.
    """
    if sys.platform not in ("linux", "darwin"):
        raise UserError(
            "programs can be run on Linux and macOS only: this system has no way to limit them"
        )
    if not 0 < timeout <= 86_400:
        raise UserError(f"timeout {timeout} must be above 0 and at most a day (seconds)")
    if memory < MEMORY or output < 1:
        raise UserError(
            f"memory {memory} must be at least {MEMORY} bytes (Python's own need), output {output} at least 1"
        )
    if len(code) > 1 << 20:
        raise UserError(
            f"a program of {len(code):,} characters is too long to run: at most {1 << 20:,}"
        )
    layers = (
        available() if layers is None else tuple(choose("layer", name, LAYERS) for name in layers)
    )
    for _ in range(3):
        result = _run(code, timeout, memory, stdin, output, layers)
        if not isinstance(result, str):
            return result
    # they could be built before: don't go on without
    raise OSError(f"could not build the walls around a program: {result}")


def run_many(codes, *, workers: int | None = None, **options) -> list[Result]:
    """`run_python` of every program, `workers` at a time (None: one per processor), results in the order given."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda code: run_python(code, **options), codes))


@functools.cache
def available() -> tuple[str, ...]:
    """Those of LAYERS that this machine lets a program be put behind (tried once, by running an empty program)."""
    layers = LAYERS if sys.platform == "linux" else ()
    while isinstance(why := _run("", START, 256 << 20, "", 1 << 10, layers), str):
        layers = tuple(name for name in layers if name != why.split(":")[0])
    return layers


def _run(code, timeout, memory, stdin, output, layers) -> Result | str:
    """One run; a string "layer: why" where a wall couldn't be built (then the program wasn't run)."""
    folder = os.path.realpath(tempfile.mkdtemp(prefix="sandbox-"))
    work = "/tmp" if "namespaces" in layers else folder  # as the program will see it
    nonce = secrets.token_hex(8)
    order = dict(code=code, folder=folder, work=work, layers=layers, memory=memory, seconds=math.ceil(timeout) + 1, caller=os.getpid(),
                 nonce=nonce)  # fmt: skip
    try:
        with contextlib.ExitStack() as stack:
            config = stack.enter_context(tempfile.TemporaryFile())
            config.write(json.dumps(order).encode())
            config.flush()
            config.seek(0)
            given = subprocess.DEVNULL
            if stdin:
                given = stack.enter_context(tempfile.TemporaryFile())
                given.write(stdin.encode(errors="surrogatepass"))
                given.flush()
                given.seek(0)
            status_r, status_w = os.pipe()
            status = stack.enter_context(open(status_r, "rb", buffering=0))
            try:
                process = subprocess.Popen(
                    # -S and no bytecode: quick, and only the standard library; hash seed in place of -I, whose other parts are here
                    [sys.executable, "-s", "-P", "-S", "-B", "-X", "utf8", str(JAIL), str(config.fileno()), str(status_w)],
                    stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", start_new_session=True,
                    env={"PATH": "", "HOME": work, "TMPDIR": work, "LC_ALL": "C", "PYTHONHASHSEED": "0",
                         "MALLOC_ARENA_MAX": "2"},  # arenas, like locale files, eat address space
                    pass_fds=(config.fileno(), status_w))  # fmt: skip
            finally:
                os.close(status_w)
            stack.enter_context(process.stdout)
            stack.enter_context(process.stderr)
            pipes = {"status": status, "stdout": process.stdout, "stderr": process.stderr}
            try:
                got, why = _listen(pipes, timeout, output, nonce.encode())
            finally:
                # macOS: EPERM where only zombies are left
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    # not yet waited for, so the number can't be another's
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            _drain(pipes, got, output)
    finally:
        _remove(folder)
    return _verdict(got, why, process.returncode, nonce, timeout, memory, output)


def _listen(pipes, timeout, output, nonce):
    """Collect what comes through the pipes until the program ends, time is up or it has said too much: (bytes by pipe, why)."""
    got = {name: bytearray() for name in pipes}
    most = {"status": 4096, "stdout": output + 1, "stderr": output + 1}
    deadline, started = time.monotonic() + START, False
    with selectors.DefaultSelector() as selector:
        for name, pipe in pipes.items():
            selector.register(pipe, selectors.EVENT_READ, name)
        while True:
            left = deadline - time.monotonic()
            events = selector.select(left) if left > 0 else []
            if not events and deadline <= time.monotonic():
                return got, "timeout" if started else "start"
            for key, _ in events:
                data = os.read(key.fd, 1 << 16)
                kept = got[key.data]
                kept += data[: max(0, most[key.data] - len(kept))]
                if not data:
                    selector.unregister(key.fileobj)
                    if key.data == "status":
                        return got, ""
                elif key.data == "status" and not started and nonce + b'", "ready"' in kept:
                    started, deadline = True, time.monotonic() + timeout
                elif key.data != "status" and len(kept) > output:
                    return got, "output"


def _drain(pipes, got, output):
    """What a killed program had still in its pipes; never waits, since someone might hold them open."""
    for name, pipe in pipes.items():
        os.set_blocking(pipe.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            while len(got[name]) <= output and (data := os.read(pipe.fileno(), 1 << 16)):
                got[name] += data[: output + 1 - len(got[name])]


def _verdict(got, why, returncode, nonce, timeout, memory, output) -> Result | str:
    words = {}
    for line in bytes(got["status"]).splitlines():
        if line.startswith(f'["{nonce}", '.encode()):  # the program may have written there too
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                _, word, detail = json.loads(line)
                words.setdefault(word, " ".join(str(detail).split()))
    if "wall" in words and "ready" not in words:
        return words["wall"]
    stdout, stderr = (
        bytes(got[name][:output]).decode(errors="replace") for name in ("stdout", "stderr")
    )
    mib = memory / (1 << 20)
    code = -returncode if returncode < 0 else returncode - 128
    killed = signal.Signals(code).name if code in set(signal.Signals) else ""
    if why == "start" or "ready" not in words:
        # nothing of the program has run: not its fault, so never a Result
        raise OSError(
            f"a Python process for a program could not be started (status {returncode}): {stderr.strip()[-500:] or why}"
        )
    if why == "timeout":
        reason = f"it was stopped after {timeout:g} seconds"
    elif why == "output":
        reason = f"it was stopped because it printed more than {output:,} bytes"
    elif "memory" in words:
        reason = f"it needed more than its {mib:g} MiB of memory"
    elif "error" in words:
        reason = f"it raised {words['error']}"
    elif "exit" in words:
        reason = f"it left before its end by SystemExit with {words['exit']}"
    elif "done" in words and returncode == 0:
        reason = ""
    elif "done" in words:
        reason = f"it failed after its last line (status {returncode})"
    elif killed in ("SIGXCPU", "SIGKILL"):
        reason = "it was killed by the system, probably for using too much processor time"
    elif killed:
        reason = f"it was killed by {killed}"
    else:
        reason = f"it ended without reaching its last line (status {returncode})"
    return Result(not reason, stdout, stderr, reason)


def _remove(folder):
    """Delete a folder whatever a program made of it: unreadable folders, thousands of levels."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        subprocess.run(["chmod", "-R", "u+rwx", folder], stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)
