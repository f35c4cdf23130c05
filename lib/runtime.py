"""The machine that a notebook was given: what set-up does on it before jax is there.

Everything at the top level needs the standard library alone, for it runs before anything is
installed: where we are (Colab, Kaggle, a machine of one's own), which packages are missing, whether
libtpu is the one that the installed jax names, whether there is a TPU at all, and when it ends.
Nothing here goes by a table of versions: the metadata of the installed packages decide.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import math
import mmap
import operator
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from lib.files import UserError, first_line

# beginnings of variables by which a person has chosen how memory is kept, or where jax computes
CHOSEN = ("GLIBC_TUNABLES", "MALLOC_", "JAX_CPU_ENABLE_ASYNC_DISPATCH")
# glibc's own names for settings of a process that runs (malloc.h)
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8

# Hours that sessions last: free Colab and Pro 12, Pro+ 24; Kaggle's TPUs 9, its other machines 12.
HOURS = {"colab": (12.0, 24.0), "kaggle": (9.0, 12.0)}
BEGAN = time.monotonic()  # this process, nearly
CAREFUL_WITH = re.compile(r"jax|libtpu|numpy|ml[-_.]dtypes")  # packages that pip must leave alone


# ---- where we are --------------------------------------------------------------------------------


def shell():
    """The IPython shell of the kernel that this runs in, or None in a script or a terminal."""
    ipython = sys.modules.get("IPython")
    active = ipython.get_ipython() if ipython else None
    return active if hasattr(active, "kernel") else None


def host() -> str:
    """Whose kernel this runs in: "colab", "kaggle", or empty for any other, and for a script."""
    if shell() is None:
        return ""
    if "google.colab" in sys.modules:
        return "colab"
    return "kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else ""


def environment(name: str) -> str:
    """A variable of the environment, "" where it is not set."""
    return os.environ.get(name, "")


def progress(**options: Any):
    """A progress bar of tqdm's with these options, fit for where it is shown.

    In a notebook a widget, or text on stdout where widgets are not installed: stderr and tqdm's own
    complaint about them look like errors there.
    """
    from tqdm import tqdm

    if shell() is None:
        return tqdm(**options)
    if importlib.util.find_spec("ipywidgets") is None:
        options["file"] = sys.stdout
        return tqdm(**options)
    from tqdm.notebook import tqdm as widget

    return widget(**options)


# seconds of silence after which a bar appears, and between two looks whether it is over
BAR_AFTER, LOOK_EVERY = 2, 0.25


def show_waiting(
    is_over: Callable[[float], bool], count: Callable[[], int] | None = None, **options: Any
):
    """Wait under a bar, which appears once that takes long and goes when it is over.

    is_over(seconds) waits so long at most. count() says how many of `total` are done; without it
    the bar shows the time alone. options: of `progress`.
    """
    if count is None:
        options["bar_format"] = "{desc}: {elapsed}"
    begun = time.monotonic()
    with progress(delay=BAR_AFTER, leave=False, **options) as bar:
        while not is_over(LOOK_EVERY):
            bar.n = count() if count else 0
            if time.monotonic() - begun > BAR_AFTER:
                bar.refresh()


def tpu_attached() -> bool:
    """Whether this machine has a TPU, by what the operating system and the environment show."""
    named = ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "COLAB_TPU_ADDR")
    if any(os.environ.get(name) for name in named):
        return True
    if any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*")):
        return True
    return any(_is_tpu(device) for device in Path("/sys/bus/pci/devices").glob("*"))


def _is_tpu(device: Path) -> bool:
    """A PCI device of Google's that is neither storage (class 01) nor network (class 02)."""
    try:
        vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
    except OSError:
        return False
    return vendor.strip() == "0x1ae0" and kind[:4] not in ("0x01", "0x02")


def _has_gpu() -> bool:
    """Whether a driver of NVIDIA's or AMD's is there."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 by itself, twice as fast as float32 or faster."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in words or "amx_bf16" in words


def quiet():
    """Where libtpu is installed and there is neither TPU nor GPU, tell jax to take the CPU.

    Else libtpu prints six lines of INVALID_ARGUMENT at every start. A JAX_PLATFORMS that is set
    stays. Call it before jax looks for devices.
    """
    if os.environ.get("JAX_PLATFORMS") or version("libtpu") is None or _has_gpu() or tpu_attached():
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    # jax read the variable when it was imported
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")


# ---- memory --------------------------------------------------------------------------------------


def keep_memory():
    """Where a CPU computes, let memory that is freed stay here, in huge pages if those are given
    on request. Call it before jax looks for devices.

    A step's temporary arrays are allocated anew each time. Memory that went back to the system in
    between comes in cleared pages of 4 KB, and clearing them takes a quarter of a step (LOG.md).
    Of glibc's heaps only the main thread's can hold large blocks. So that is kept, and jax runs a
    program of one device in the thread that asks for it, not in one of its own.
    """
    # settings that a person chose stay as they are
    if any(os.environ[name] for name in os.environ if name.startswith(CHOSEN)):
        return
    elsewhere = environment("JAX_PLATFORMS") != "cpu" and (tpu_attached() or _has_gpu())
    malloc = None if elsewhere else _glibc()
    if malloc is None:
        return
    # threads to come share the heaps that are there, no block is too large, and -1 is without end
    for setting, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):
        malloc.mallopt(setting, value)
    if _huge_pages_on_request():
        _ask_for_huge_pages(malloc)

    import jax

    # a later jax may not have it any more
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def _glibc() -> ctypes.CDLL | None:
    """The C library, where memory is really allocated by glibc: not on a Mac, nor where another
    allocator was loaded before it, as Colab does with tcmalloc.
    """
    if platform.libc_ver()[0] != "glibc":
        return None
    everything, glibc = ctypes.CDLL(None), ctypes.CDLL("libc.so.6")
    places = [ctypes.cast(library.malloc, ctypes.c_void_p).value for library in (everything, glibc)]
    return glibc if places[0] == places[1] else None


def _ask_for_huge_pages(malloc: ctypes.CDLL):
    """Let the heap grow by half of this machine's memory, and come in huge pages when it is used.

    Only addresses are taken until then. Where they are rationed, nothing is done.
    """
    if _addresses_are_rationed():
        return
    malloc.malloc.restype = ctypes.c_void_p
    malloc.malloc.argtypes = [ctypes.c_size_t]
    malloc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    malloc.free.argtypes = [ctypes.c_void_p]

    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_PHYS_PAGES") // 2 * page
    block = malloc.malloc(size)
    if block is None:
        return
    first = -(-block // page) * page
    malloc.madvise(first, block + size - first, mmap.MADV_HUGEPAGE)
    malloc.free(block)


def _addresses_are_rationed() -> bool:
    """Whether memory counts before it is used: under `ulimit -v` or `-d`, or where the system
    promises no more than it has.
    """
    import resource  # Windows has none

    limits = [resource.getrlimit(which)[0] for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return True
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return False


def _huge_pages_on_request() -> bool:
    """Whether the system gives huge pages to programs that ask for them, and to no others."""
    try:
        return "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False


def in_huge_pages() -> bool:
    """Whether any of this process's memory is in huge pages."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith("AnonHugePages:") and int(line.split()[1]) for line in lines)


# ---- packages ------------------------------------------------------------------------------------


class Requirement(NamedTuple):
    """A package and the versions of it that will do, as its metadata write them: >=0.7.2,<1."""

    name: str
    versions: str

    def __str__(self):
        return self.name + self.versions


def parse_requirement(text: str) -> Requirement:
    """The requirement in a line of metadata, without extras and without its marker."""
    parts = re.match(r"([\w.-]+)\s*(?:\[[^]]*\])?\s*\(?([^;)]*)", text.strip())
    if parts is None:
        raise ValueError(f"{text!r} is not a requirement")
    return Requirement(parts[1], parts[2].replace(" ", ""))


def version(name: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def satisfies(installed: str, versions: str) -> bool:
    """Whether a version is among `versions`, such as ">=0.7.2,<1" or "==0.0.23.*".

    Compares the numbers of the release; what follows them (rc1, .dev3, +local) does not count.
    """
    return all(_meets(installed, clause) for clause in versions.split(",") if clause)


def _meets(installed: str, clause: str) -> bool:
    parts = re.fullmatch(r"([=!<>~]+)(.*)", clause)
    assert parts, f"{clause!r} compares with no version"
    comparison, wanted = parts.groups()
    if comparison == "===":
        return installed == wanted
    have, want = _release(installed), _release(wanted)
    if wanted.endswith(".*"):
        return (have[: len(want)] == want) == (comparison == "==")
    if comparison == "~=":
        return have >= want and have[: len(want) - 1] == want[:-1]
    # 1.0 and 1.0.0 are one version
    have, want = zip(*zip_longest(have, want, fillvalue=0))
    compare = {"==": "eq", "!=": "ne", ">=": "ge", "<=": "le", ">": "gt", "<": "lt"}[comparison]
    return getattr(operator, compare)(have, want)


def _release(text: str) -> tuple[int, ...]:
    release = re.match(r"\D*(\d+(?:\.\d+)*)", text)
    assert release, f"{text!r} is no version"
    return tuple(map(int, release[1].split(".")))


def missing(requirements) -> list[Requirement]:
    """Those of the requirements that the installed packages do not meet."""
    parsed = [parse_requirement(text) for text in requirements]
    lacking = []
    for requirement in parsed:
        have = version(requirement.name)
        if have is None or not satisfies(have, requirement.versions):
            lacking.append(requirement)
    return lacking


def install(requirements, *options: str):
    """pip install them, quietly; UserError with the reason where that fails."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, *options, *map(str, requirements)], capture_output=True, text=True
    )
    if done.returncode:
        names = ", ".join(map(str, requirements))
        raise UserError(f"pip could not install {names}: {_reason(done.stderr)}")
    importlib.invalidate_caches()


def _reason(errors: str) -> str:
    """What went wrong and what to do, from pip's complaints."""
    known = {
        "No module named pip": "this kernel has no pip: run python -m ensurepip with its Python",
        "externally-managed-environment": "this Python belongs to the system: choose a kernel "
        "in a virtual environment",
        "NewConnectionError|ConnectTimeout|Temporary failure in name|Connection refused": "the "
        "package index cannot be reached: connect the machine to the internet (on Kaggle: "
        "Settings > Internet on), then run the cell again",
    }
    for pattern, advice in known.items():
        if re.search(pattern, errors):
            return advice
    lines = [line for line in errors.splitlines() if line.startswith("ERROR")]
    return (lines or errors.strip().splitlines() or ["it did not say why"])[-1]


def install_missing(pyproject: Path, extras=()):
    """Install what pyproject.toml asks for and is not there, without touching jax and numpy.

    extras: names of its optional dependencies that are wanted too.
    """
    import tomllib

    project = tomllib.loads(pyproject.read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    lacking = missing(wanted)
    if not lacking:
        return
    print(f"installing {', '.join(requirement.name for requirement in lacking)} ...", flush=True)
    kept = [d for d in importlib.metadata.distributions() if CAREFUL_WITH.match(d.name or "")]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("".join(f"{d.name}=={d.version}\n" for d in kept))
        install(lacking, "--constraint", str(constraints))


# ---- jax and the libtpu that it names ------------------------------------------------------------


def named_libtpu() -> Requirement | None:
    """The libtpu that the installed jax asks for in its extra `tpu`; None where there is none."""
    try:
        lines = importlib.metadata.requires("jax") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for line in lines:
        if re.match(r"libtpu\b(?!-)", line) and re.search(r"extra\s*==\s*['\"]tpu['\"]", line):
            return parse_requirement(line)
    return None


def wrong_libtpu() -> Requirement | None:
    """The libtpu that jax names, where an older one is installed; None where there is no fault.

    A libtpu compiles the kernels of jax's that are older than itself, not of newer ones, so that a
    newer one than named may stay.
    """
    have, named = version("libtpu"), named_libtpu()
    if have is None or named is None or satisfies(have, named.versions):
        return None
    return named if _release(have) < _release(named.versions) else None


def mend_pair():
    """Where libtpu is older than the one that jax names, install that one; jax stays as it is.

    Where the kernel of the notebook has jax loaded already, a UserError asks to restart it. Where
    the right one cannot be installed, one line says so, and `kernel_fault` decides what follows.
    """
    before, named = version("libtpu"), wrong_libtpu()
    if named is None:
        if _replaced_while_loaded():
            raise UserError(_RESTART.format(f"libtpu {before}"))
        return
    print(f"installing {named}, the one that jax {version('jax')} names (here was {before}) ...")
    try:
        install([named], "--no-deps")
    except UserError as e:
        return print(f"note: {e}; going on with libtpu {before}")
    # a path to the other one that something has set
    if not os.environ.get("TPU_LIBRARY_PATH", "").startswith(sys.prefix):
        os.environ.pop("TPU_LIBRARY_PATH", None)
    if "jax" in sys.modules:
        raise UserError(_RESTART.format(str(named)))


_RESTART = (
    "this kernel had loaded jax before {} was installed: restart the session (Runtime > Restart "
    "session) and run all cells"
)


def _replaced_while_loaded() -> bool:
    """Whether this process holds a libtpu that has since been replaced on disk."""
    try:
        return bool(re.search(r"libtpu\.so.*\(deleted\)", Path("/proc/self/maps").read_text()))
    except OSError:
        return False


@functools.cache
def kernel_fault(device=None) -> str:
    """Why a Pallas kernel of one line does not compile for a TPU; empty where it does.

    device: jax's, which need not be there; None for the first one here. Tried once a process.
    """
    import jax
    from jax.experimental import pallas as pl

    def add_one(x_ref, out_ref):
        out_ref[...] = x_ref[...] + 1.0

    place = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
    block = jax.ShapeDtypeStruct((8, 128), "float32", sharding=place)
    kernel = pl.pallas_call(add_one, out_shape=jax.ShapeDtypeStruct((8, 128), "float32"))
    try:
        jax.jit(kernel).lower(block).compile()
    except Exception as e:  # each layer below has its own class
        return first_line(e)
    return ""


def fallback(fault: str) -> str:
    """What it means that Pallas kernels do not compile, and what to do, in one sentence.

    By the compiler (libtpu 0.0.52), colab_v5e on a v5e-1 makes at best 215 thousand tokens a second
    with splash, 185 with einsum and 88 with jax, and needs 5.8, 6.0 and 13.8 GiB.
    """
    named = wrong_libtpu()
    mend = f"; python -m pip install '{named}' mends it" if named else ""
    return (
        f"note: libtpu {version('libtpu')} does not compile Pallas kernels of jax {version('jax')} "
        f"({fault}), so attention=auto is einsum: steps take a fifth longer{mend}"
    )


# ---- how long it lasts ---------------------------------------------------------------------------


def seconds_left(hours: float = 0.0) -> float | None:
    """Seconds until this session ends, None where nobody ends it or it has lasted longer already.

    hours: how long a session lasts (0: as long as the host's do, the shortest of HOURS that is not
    over; UserError below 0). It began when the first process of the machine did; but where that is
    longer ago than the hours that were asked for, when this process did.
    """
    if not 0 <= hours < math.inf:
        raise UserError(f"session_hours={hours} must be 0 (not known) or more")
    if hours:
        here = time.monotonic() - BEGAN
        before = _age() - here
        age = here if before >= hours * 3600 else before + here
        return hours * 3600 - age
    ahead = [length * 3600 - _age() for length in HOURS.get(host(), ())]
    return min((left for left in ahead if left > 0), default=None)


def ends_within(seconds: float, hours: float = 0.0) -> bool:
    """Whether this session ends within so many seconds: time to save and leave."""
    left = seconds_left(hours)
    return left is not None and left < seconds


def _age() -> float:
    """Seconds since the first process of this machine or container started."""
    try:
        # the 22nd field, in ticks since the start of the system; the 2nd, a name, may hold blanks
        fields = Path("/proc/1/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - started
    except (OSError, ValueError, IndexError):
        return time.monotonic()


def give_back():
    """Give a Colab runtime back, which ends this session and what it costs; elsewhere say so."""
    if host() != "colab":
        return print("give_back: this is no Colab runtime, so nothing was given back")
    from google.colab import runtime  # pyright: ignore[reportMissingImports]

    print("giving the runtime back: nothing more is charged for it")
    runtime.unassign()
