"""The golden data of the PyTorch reference."""

import json

from safetensors.numpy import load_file

from lib.interop.nanochat import config_from_nanochat, from_nanochat
from tests.helpers import ROOT

PARITY = ROOT / "tests" / "golden"


def load(name: str):
    """A file of tests/golden: a dict from JSON, or of numpy arrays from safetensors."""
    path = PARITY / name
    return json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


def parity_model(name: str):
    """(Config, params) of a golden model."""
    config = config_from_nanochat(load(f"model_{name}_config.json")["GPTConfig"])
    return config, from_nanochat(load(f"model_{name}_state.safetensors"), config)
