"""`benchmarks/one_kernel.cu`, compiled for a CPU whose threads stand for a GPU's."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import one_kernel

SHIM = Path(__file__).with_name("cuda_on_cpu.h")
TARGET = "one_kernel"

# six blocks of four warps: rows that don't come out even, and pieces that are not full
TINY = one_kernel.SMALL.replace(
    n_layer=3,
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


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    if sys.platform != "linux" or not shutil.which("g++"):
        pytest.skip("no C++ compiler here that has what stands for a GPU's threads")
    path = tmp_path_factory.mktemp("one_kernel") / "one_kernel.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", f"-I{jax.ffi.include_dir()}"]
    source = ["-x", "c++", "-include", str(SHIM), str(one_kernel.SOURCE)]
    subprocess.run(["g++", *flags, *source, "-o", str(path)], check=True)
    function = jax.ffi.pycapsule(ctypes.CDLL(str(path)).OneKernel)
    jax.ffi.register_ffi_target(TARGET, function, platform="cpu")


@pytest.mark.parametrize(
    "length, change",
    [
        # the first token, whose ring has parts that hold nothing, and one in a ring that came round
        (0, dict(n_head=1, n_kv_head=1)),
        (150, dict()),
        (150, dict(compute_dtype="bfloat16")),
        # more warps than there is to do
        (150, dict(n_embd=32, mlp_dim=32)),
        (150, dict(mlp="swiglu", n_kv_head=4)),
        (150, dict(mlp="gelu", qk_norm=False, value_embeds=False, x0_scales=False, n_head=2)),
    ],
)
def test_a_token_gets_what_the_formulas_give(length, change):
    config = TINY.replace(**change)
    bound = 1e-5 if config.compute_dtype == "float32" else 1e-2
    assert one_kernel.difference(config, TARGET, length) < bound


@pytest.mark.parametrize("change", [dict(n_embd=74), dict(mlp_dim=202), dict(head_dim=24)])
def test_widths_that_no_lane_could_read_are_refused(change):
    with pytest.raises(Exception, match="16 bytes at once"):
        one_kernel.difference(TINY.replace(**change), TARGET, 0)
