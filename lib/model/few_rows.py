"""Products of a few rows with weights read as they are stored, for decoding on a CPU.

A token needs every weight once, so narrow weights should be fast ones; XLA:CPU first writes them
out as float32. `few_rows.cc` reads each in place. The C++ compiler found on this machine builds it
once, in .cache/few_rows; where there is none, XLA's products serve.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp

from lib.files import UserError, replacing

SOURCE = Path(__file__).with_suffix(".cc")
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "few_rows"

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-w")
# not every compiler knows it on every processor
NATIVE = "-march=native"

# the names by which XLA calls its functions
BY_OUTPUT, BY_INPUT = TARGETS = "rawchat_few_rows", "rawchat_few_rows_by_input"

# beyond so many rows XLA's products of float32 are as fast
MOST_ROWS = 32


def product(x_MI, w_OI):
    """Each row of x times each output's weights: (M, O) in float32.

    `x_MI` in float32, `w_OI` in float32, bfloat16 or int8. Only on a CPU, and where `is_built`.
    """
    return products(x_MI[None], w_OI)[0]


def products(x_XMI, w_XOI):
    """As `product`, for X pairs of rows and weights: (X, M, O)."""
    shape = *x_XMI.shape[:2], w_XOI.shape[-2]
    return _call(BY_OUTPUT, shape, x_XMI, w_XOI)


def products_by_input(x_XMI, w_XIO):
    """As `products`, for weights in float32 whose inputs come first: (X, M, O)."""
    shape = *x_XMI.shape[:2], w_XIO.shape[-1]
    return _call(BY_INPUT, shape, x_XMI, w_XIO)


def _call(target: str, shape: tuple, *operands):
    return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, jnp.float32))(*operands)


@functools.cache
def is_built() -> bool:
    """Whether `product` can be called here. On a new machine it is built first, in a few seconds;
    where it cannot be, a warning says why.
    """
    try:
        library = ctypes.CDLL(str(_library()))
    except (UserError, OSError) as e:
        warnings.warn(f"a CPU decodes more slowly here, above all in int8: {e}", stacklevel=2)
        return False
    for target, function in zip(TARGETS, (library.FewRows, library.FewRowsByInput)):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
    return True


def _library() -> Path:
    """The compiled source, made where it is missing; UserError where it cannot be."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise UserError(
            "no C++ compiler was found, install one (on Debian and Ubuntu: apt install g++)"
        )
    path = CACHE / f"{_key(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    return path


def _compile(compiler: str, path: Path):
    """Write the compiled source to `path`; UserError where the compiler refuses."""
    include = f"-I{jax.ffi.include_dir()}"
    with replacing(path) as beside:
        command = [compiler, *FLAGS, include, str(SOURCE), "-o", str(beside)]
        for options in ([NATIVE], []):
            done = subprocess.run(command + options, capture_output=True, text=True)
            if done.returncode == 0:
                return
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        why = (errors or [f"exit status {done.returncode}"])[0]
        raise UserError(f"{compiler} cannot compile {SOURCE}: {why}")


def _key(compiler: str) -> str:
    """A name for what is compiled: of the source, and of the machine that it is for."""
    parts = [
        SOURCE.read_text(),
        FLAGS,
        NATIVE,
        compiler,
        importlib.metadata.version("jaxlib"),
        _processor(),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What tells one kind of processor from another: a folder may be shared by several."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    kinds = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return " ".join(sorted(set(kinds)))
