"""`benchmarks/one_kernel.cu`, compiled for a CPU whose threads stand for a GPU's."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

from benchmarks import one_kernel

FOLDER = Path(__file__).parent
NAMES = iter(range(100))

# three blocks of two warps: rows that don't come out even, and pieces that are not full
TINY = one_kernel.SMALL.replace(
    n_layer=2,
    n_embd=72,
    n_head=4,
    n_kv_head=2,
    head_dim=32,
    mlp_dim=200,
    sequence_len=160,
    microbatch=1,
    total_batch_size=160,
    compute_dtype="float32",
)


def compiled(folder: Path, *options: str) -> str:
    """The name under which XLA knows the kernel, compiled with these options."""
    path, name = folder / "one_kernel.so", f"one_kernel_{next(NAMES)}"
    shim = ["-x", "c++", "-include", str(FOLDER / "cuda_on_cpu.h")]
    include = f"-I{jax.ffi.include_dir()}"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", include, *shim, *options]
    subprocess.run(["g++", *flags, str(one_kernel.SOURCE), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library.OneKernel), platform="cpu")
    return name


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler here")
    return compiled(tmp_path_factory.mktemp("one_kernel"))


@pytest.mark.parametrize(
    "length, change",
    [
        # the first token, and one in a ring that came round
        (0, dict()),
        (150, dict()),
        (150, dict(compute_dtype="bfloat16")),
        # a part of a ring for each block, which are merged
        (150, dict(n_head=1, n_kv_head=1)),
        (150, dict(mlp="swiglu", n_kv_head=4)),
        (150, dict(mlp="gelu", qk_norm=False, value_embeds=False, x0_scales=False)),
    ],
)
def test_a_token_gets_what_the_formulas_give(target, length, change):
    config = TINY.replace(**change)
    bound = 1e-5 if config.compute_dtype == "float32" else 1e-2
    assert one_kernel.difference(config, target, length) < bound
