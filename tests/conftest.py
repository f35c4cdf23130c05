"""JAX on the CPU, and compiled programs kept between test runs."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

pytest.register_assert_rewrite("tests.helpers")

from tests.helpers import ROOT  # noqa: E402
from tests.helpers.hub_models import model_hub  # noqa: E402, F401  (a fixture)
from tests.helpers.hub_stand_in import hub_server  # noqa: E402, F401  (a fixture)

jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
