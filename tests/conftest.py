"""JAX on the CPU, compiled programs kept between test runs, and the golden data of the PyTorch reference."""

import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]
PARITY = Path(__file__).parent / "golden"

jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def parity() -> Path:
    return PARITY


def load(name: str):
    """A file of tests/golden: a dict from JSON, or of numpy arrays from safetensors."""
    from safetensors.numpy import load_file

    path = PARITY / name
    return json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


def parity_model(name: str):
    """(Config, params) of a golden model."""
    from lib.interop.nanochat import config_from_nanochat, from_nanochat

    config = config_from_nanochat(load(f"model_{name}_config.json")["GPTConfig"])
    return config, from_nanochat(load(f"model_{name}_state.safetensors"), config)
