"""Set-up before jax is there: missing packages, the libtpu that jax names, devices, sessions."""

import ctypes
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import pytest

from lib import runtime
from lib.config import Config
from lib.files import UserError

ROOT = Path(__file__).parents[1]


# ---- memory --------------------------------------------------------------------------------------

# Computes with a temporary array of 64 MiB. In a "kernel" threads have heaps of their own when
# set-up comes; a "thread" computes as engines of ours do. Prints the pages that the system had to
# give each time, behind two that warm up, whether memory is in huge pages, and whether a program
# was over as soon as it was sent.
COMPUTES = """
import ctypes, resource, sys, threading

where, how = sys.argv[1:]
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
if how != "set up":
    libc.prctl(41, 1, 0, 0, 0)  # no huge pages
has_heap, may_end = threading.Barrier(5), threading.Event()

def wait():
    libc.malloc(1000)
    has_heap.wait()
    may_end.wait()

if where == "kernel":
    for _ in range(4):
        threading.Thread(target=wait, daemon=True).start()
    has_heap.wait()

from lib import notebook, runtime
from lib.train.loop import _is_there
if how == "set up":
    notebook.setup()

import jax
import jax.numpy as jnp

given, at_once = [], False

def compute():
    global at_once
    program = jax.jit(lambda x: jnp.sum(jnp.sin(x @ x[:256])))
    x = jnp.ones((2**16, 256))
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        y = program(x)
        at_once = _is_there(y)
        y.block_until_ready()
        given.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if where == "kernel":
    compute()
else:
    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
print(max(given[2:]), int(runtime.in_huge_pages()), int(at_once))
"""


def computing(where: str, how: str) -> list[int]:
    """Pages that the system gives while jax computes, at most; whether any are huge; whether a
    program is over as soon as it was sent.
    """
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", COMPUTES, where, how]
    told = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [int(word) for word in told.stdout.split()]


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("where", ["kernel", "thread"])
def test_what_jax_frees_stays(where):
    array = 2**26 // os.sysconf("SC_PAGE_SIZE")
    pages, huge, at_once = computing(where, "set up")
    assert pages < array / 10 and at_once
    if runtime._huge_pages_on_request():
        assert huge

    pages, huge, at_once = computing(where, "as it is")
    assert pages > array / 2 and not huge and not at_once


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_another_allocator_is_left_alone(monkeypatch):
    """One that was loaded before glibc's, as Colab does."""
    assert runtime._glibc() is not None

    class Library:
        def __init__(self, place):
            self.malloc = ctypes.CFUNCTYPE(ctypes.c_void_p)(place)

    libraries = {None: Library(1000), "libc.so.6": Library(2000)}
    monkeypatch.setattr(runtime.ctypes, "CDLL", libraries.get)
    assert runtime._glibc() is None


def test_memory_is_kept_where_that_brings_something(monkeypatch):
    asked = []

    class Library:
        def mallopt(self, setting, value):
            asked.append(setting)

    monkeypatch.setattr(runtime, "_glibc", Library)
    monkeypatch.setattr(runtime, "_huge_pages_on_request", lambda: False)
    monkeypatch.setattr("jax.config.update", lambda *_: asked.append(_[0]))
    monkeypatch.setattr(runtime, "tpu_attached", lambda: False)
    monkeypatch.setattr(runtime, "_has_gpu", lambda: False)
    for name in os.environ:
        if name.startswith(("JAX_", "MALLOC_", "GLIBC_")):
            monkeypatch.delenv(name)

    kept_from = [
        lambda patch: patch.setattr(runtime, "tpu_attached", lambda: True),
        lambda patch: patch.setattr(runtime, "_has_gpu", lambda: True),
        lambda patch: patch.setattr(runtime, "_glibc", lambda: None),
        # a person's own settings
        lambda patch: patch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0"),
        lambda patch: patch.setenv("MALLOC_ARENA_MAX", "2"),
        lambda patch: patch.setenv("JAX_CPU_ENABLE_ASYNC_DISPATCH", "1"),
    ]
    for change in kept_from:
        with monkeypatch.context() as patch:
            change(patch)
            runtime.keep_memory()
    assert not asked

    # none of these: each of them was what kept it
    runtime.keep_memory()
    wanted = [
        runtime.ARENA_MAX,
        runtime.MMAP_MAX,
        runtime.TRIM_THRESHOLD,
        "jax_cpu_enable_async_dispatch",
    ]
    assert asked == wanted
    # nor does a GPU, where jax is told to take the CPU
    monkeypatch.setattr(runtime, "_has_gpu", lambda: True)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    runtime.keep_memory()
    assert asked == 2 * wanted


@pytest.mark.parametrize("which", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_rationed_addresses_are_left_alone(monkeypatch, which):
    """Half the machine's memory in addresses could be more than `ulimit` leaves for the rest."""
    import resource

    def limits(kind):
        return (2**34 if kind == getattr(resource, which) else resource.RLIM_INFINITY, 0)

    monkeypatch.setattr(resource, "getrlimit", limits)
    # it has no functions: none may be called
    runtime._ask_for_huge_pages(object())


@pytest.mark.parametrize("promises, wanted", [("0\n", False), ("1\n", False), ("2\n", True)])
def test_a_system_that_promises_no_more_than_it_has_rations_addresses(
    monkeypatch, promises, wanted
):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, 0))
    monkeypatch.setattr(runtime.Path, "read_text", lambda _: promises)
    assert runtime._addresses_are_rationed() is wanted


# ---- packages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version, good, bad",
    [
        ("0.0.23", "==0.0.23 ==0.0.23.* >=0.0.20 <=0.0.23", "==0.0.2 ==0.0.2.* <0.0.23 >0.0.23"),
        ("0.0.21.1", "==0.0.21.* !=0.0.21 >0.0.21 >=0.0.20,<1", "==0.0.21 ==0.0.23 >=0.0.22,<1"),
        ("0.10.2", ">=0.7.2 >0.9 ~=0.9", "<0.7.2 !=0.10.*"),
        ("1.0", "==1.0.0 ~=1.0 ===1.0", "!=1.0.0 ~=1.1 ===1.0.0"),
        ("2.1.0rc1", ">=2.0", ">=3"),
    ],
)
def test_versions_compare_by_their_numbers(version, good, bad):
    assert all(runtime.satisfies(version, versions) for versions in good.split())
    assert not any(runtime.satisfies(version, versions) for versions in bad.split())


def test_comparison_agrees_with_packaging():
    specifiers = pytest.importorskip("packaging.specifiers")
    versions = ("0.0.17", "0.0.21", "0.0.21.1", "0.0.23", "0.0.23.2", "0.1", "1", "1.0.0", "2.10.3")
    for version in versions:
        for comparison in ("==", "!=", ">=", "<=", ">", "<"):
            for wanted in versions:
                expected = specifiers.SpecifierSet(comparison + wanted).contains(version)
                assert runtime.satisfies(version, comparison + wanted) == expected


def test_requirements_are_read_as_metadata_write_them():
    parse = runtime.parse_requirement
    assert parse('libtpu==0.0.23; extra == "tpu"') == ("libtpu", "==0.0.23")
    assert parse("jaxlib<=0.7.2,>=0.7.2") == ("jaxlib", "<=0.7.2,>=0.7.2")
    assert parse("uvicorn[standard] (>=0.3, <1)") == ("uvicorn", ">=0.3,<1")
    assert parse("regex") == ("regex", "")


def test_only_what_is_missing_or_too_old_is_installed(monkeypatch, tmp_path):
    """And jax, numpy and libtpu are held as they are."""
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["jax>=0.7.2", "rustbpe>=99", "no-such-package", "numpy>=2"]\n'
    )
    held = []

    def install(requirements, *options):
        held.extend([list(map(str, requirements)), Path(options[1]).read_text().splitlines()])

    monkeypatch.setattr(runtime, "install", install)
    runtime.install_missing(tmp_path / "pyproject.toml")
    assert held[0] == ["rustbpe>=99", "no-such-package"]
    for name in ("jax", "jaxlib", "numpy", "ml_dtypes"):
        assert f"{name}=={importlib.metadata.version(name)}" in held[1]


@pytest.mark.parametrize(
    "complaint, says",
    [
        ("WARNING: x\nERROR: no matching version\n", "ERROR: no matching version"),
        ("NewConnectionError('<pip._vendor.urllib3')", "cannot be reached: connect the machine"),
        ("error: externally-managed-environment", "choose a kernel in a virtual environment"),
        ("/usr/bin/python: No module named pip", "python -m ensurepip"),
    ],
)
def test_a_failing_pip_is_one_sentence(monkeypatch, complaint, says):
    failed = subprocess.CompletedProcess([], 1, "", complaint)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(UserError, match="pip could not install rustbpe>=0.1: .*") as error:
        runtime.install([runtime.Requirement("rustbpe", ">=0.1")])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_extras_are_installed_where_they_are_asked_for(monkeypatch):
    wanted = []
    monkeypatch.setattr(runtime, "missing", lambda requirements: wanted.extend(requirements))
    runtime.install_missing(ROOT / "pyproject.toml", ["sweeps"])
    assert any(text.startswith("jax") for text in wanted)
    assert any(text.startswith("optuna") for text in wanted)


def test_a_progress_bar_in_a_kernel_without_widgets_is_text_on_stdout(monkeypatch, capsys):
    with runtime.progress(total=2, desc="in a script") as bar:
        bar.update(2)
    shown = capsys.readouterr()
    assert "in a script" in shown.err and shown.out == ""

    monkeypatch.setattr(runtime, "shell", lambda: object())
    find = runtime.importlib.util.find_spec
    lost = {"ipywidgets": None}
    monkeypatch.setattr(
        runtime.importlib.util, "find_spec", lambda name: lost[name] if name in lost else find(name)
    )
    with runtime.progress(total=2, desc="in a kernel") as bar:
        bar.update(2)
    shown = capsys.readouterr()
    assert "in a kernel" in shown.out and shown.err == ""


# ---- the pair ------------------------------------------------------------------------------------


@pytest.fixture
def pair(monkeypatch):
    """A function that pretends which jax, which libtpu and which requirements are installed."""

    def pretend(libtpu, requires, jax="0.7.2"):
        versions = {"jax": jax, "libtpu": libtpu}
        monkeypatch.setattr(runtime, "version", versions.get)
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires)

    return pretend


NAMED = ["numpy>=2.0", 'libtpu==0.0.23; extra == "tpu"', 'libtpu-nightly; extra == "x"']


@pytest.mark.parametrize(
    "libtpu, requires, wrong",
    [
        ("0.0.17", NAMED, "libtpu==0.0.23"),
        ("0.0.21.1", NAMED, "libtpu==0.0.23"),
        ("0.0.23", NAMED, None),
        ("0.0.30", NAMED, None),  # newer ones read the kernels of older jax's
        (None, NAMED, None),
        ("0.0.21.1", ["numpy>=2.0"], None),
        ("0.0.23", ["libtpu==0.0.42.*; extra == 'tpu'"], "libtpu==0.0.42.*"),
        ("0.0.42.1", ["libtpu==0.0.42.*; extra == 'tpu'"], None),
    ],
)
def test_the_installed_jax_names_its_libtpu(pair, libtpu, requires, wrong):
    pair(libtpu, requires)
    named = runtime.wrong_libtpu()
    assert (named and str(named)) == wrong


def test_the_pair_is_mended_and_jax_left_alone(pair, monkeypatch, capsys):
    pair("0.0.21.1", NAMED)
    ran = []
    monkeypatch.setattr(runtime, "install", lambda *args: ran.append(args))
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    runtime.mend_pair()
    assert ran == [([("libtpu", "==0.0.23")], "--no-deps")]
    assert capsys.readouterr().out.count("\n") == 1

    # with jax loaded, the kernel has to start anew
    monkeypatch.setitem(sys.modules, "jax", types.ModuleType("jax"))
    with pytest.raises(UserError, match="restart the session .* and run all cells"):
        runtime.mend_pair()


def test_a_pair_that_cannot_be_mended_is_said_in_one_line(pair, monkeypatch, capsys):
    pair("0.0.21.1", NAMED)

    def refuse(*args):
        raise UserError("pip could not install libtpu==0.0.23: no network")

    monkeypatch.setattr(runtime, "install", refuse)
    runtime.mend_pair()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "no network; going on with libtpu 0.0.21.1" in said[1]
    note = runtime.fallback("Unsupported version")
    assert "attention=auto is einsum: steps take a fifth longer" in note
    assert "pip install 'libtpu==0.0.23' mends it" in note


@pytest.mark.parametrize(
    "backend, fault, attention",
    [
        ("tpu", "", "splash"),
        ("tpu", "Unsupported version", "einsum"),
        ("gpu", "", "jax"),
        ("cpu", "", "einsum"),
    ],
)
def test_attention_follows_what_compiles_here(monkeypatch, backend, fault, attention):
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    monkeypatch.setattr(runtime, "kernel_fault", lambda: fault)
    assert Config.preset("colab_v5e").attention_name == attention


# ---- devices, sessions ---------------------------------------------------------------------------


def test_without_tpu_and_gpu_jax_is_told_to_take_the_cpu(monkeypatch):
    monkeypatch.setattr(runtime, "version", lambda name: "0.0.23")
    monkeypatch.setattr(runtime, "tpu_attached", lambda: False)
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    runtime.quiet()
    assert runtime.os.environ["JAX_PLATFORMS"] == "tpu"

    monkeypatch.setattr(runtime, "tpu_attached", lambda: True)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    runtime.quiet()
    assert runtime.os.environ["JAX_PLATFORMS"] == ""

    monkeypatch.setattr(runtime, "tpu_attached", lambda: False)
    runtime.quiet()
    gpu = Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()
    assert runtime.os.environ["JAX_PLATFORMS"] == ("" if gpu else "cpu")


def test_tpus_are_told_from_googles_other_devices(tmp_path):
    def device(name, vendor, kind):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")
        return tmp_path / name

    assert runtime._is_tpu(device("v5e", "0x1ae0", "0xff0000"))
    assert not runtime._is_tpu(device("network", "0x1ae0", "0x020000"))
    assert not runtime._is_tpu(device("disk", "0x1ae0", "0x010802"))
    assert not runtime._is_tpu(device("gpu", "0x10de", "0x030200"))
    assert not runtime._is_tpu(tmp_path / "gone")


@pytest.mark.parametrize(
    "host, age, hours, left",
    [
        ("", 1, 0, None),  # nobody ends a machine of one's own
        ("", 1, 8, 7),
        ("", 100, 8, 8),  # of a machine that has been up for longer, this process's
        ("colab", 1, 0, 11),
        ("colab", 13, 0, 11),  # it lasts longer than 12 hours, so it is one of 24
        ("colab", 25, 0, None),
        ("colab", 1, 24, 23),
        ("kaggle", 8, 0, 1),
    ],
)
def test_a_session_ends_some_hours_after_the_machine_began(monkeypatch, host, age, hours, left):
    monkeypatch.setattr(runtime, "host", lambda: host)
    clock = [1000.0]
    monkeypatch.setattr(runtime, "BEGAN", clock[0])
    monkeypatch.setattr(runtime.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(runtime, "_age", lambda: age * 3600 + clock[0] - 1000)
    assert runtime.seconds_left(hours) == (None if left is None else left * 3600)
    assert not runtime.ends_within(300, hours)
    clock[0] += (left or 0) * 3600 - 240
    assert runtime.ends_within(300, hours) == (left is not None)
    for impossible in (-1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="must be 0 .not known. or more"):
            runtime.seconds_left(impossible)


def test_the_age_of_the_machine_is_known():
    assert 0 < runtime._age() < 10 * 365 * 86400


def test_what_runs_before_anything_is_installed_needs_the_standard_library_alone():
    """The first cell of a notebook imports it on machines that lack all of our packages."""
    code = (
        "import sys; before = set(sys.modules); import lib.notebook; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names) - {'lib'}))"
    )
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, '.'); {code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    "flags, fast",
    [("avx512f avx512_bf16", True), ("amx_bf16 amx_tile", True), ("avx512f avx2", False)],
)
def test_which_cpus_multiply_bfloat16(monkeypatch, flags, fast):
    monkeypatch.setattr(
        runtime.Path, "read_text", lambda self: f"model name\t: x\nflags\t\t: {flags}\n"
    )
    assert runtime.multiplies_bfloat16() is fast

    def missing(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(runtime.Path, "read_text", missing)
    assert runtime.multiplies_bfloat16() is False
