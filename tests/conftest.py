"""JAX on the CPU, compiled with little effort, and compiled programs kept for other tests and runs.

Compiling is most of what the tests cost, and their models are tiny. All stands in the environment,
so that programs that tests start do the same.
"""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# A training step of one device compiles in a quarter of the time: fused loops by XLA's older
# generator, in one piece each.
QUICK = (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK])
# threads of OpenBLAS that wait for each other keep a core busy, and tests have one each
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# a shell's background jobs ignore Ctrl-C, and so would all programs that the tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402

pytest.register_assert_rewrite("tests.helpers")

from tests.helpers.hub_models import model_hub  # noqa: E402, F401  (a fixture)
from tests.helpers.hub_stand_in import hub_server  # noqa: E402, F401  (a fixture)

# rooms whose files take longest: they begin first, so that no core waits for one at the end
LONGEST = ("notebooks", "parallel", "preflight", "serve", "sweeps", "chat", "train")


def pytest_collection_modifyitems(items):
    rank = {room: i for i, room in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.parent.name, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_go():
    """What a file has compiled would fill the memory, some GB by the end."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
