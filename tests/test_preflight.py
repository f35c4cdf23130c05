"""The real train step compiles for a TPU that isn't there, and says what it needs or that it does not fit."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT

CODE = """
import json, sys
from lib import preflight
from lib.files import UserError
try:
    preflight.tpu_device("v99:1x1")
except UserError as e:
    print(json.dumps(str(e)))
device = preflight.tpu_device("v6e:1x1")
from lib.config import Config
config = Config(vocab_size=512, sequence_len=256, n_layer=5, n_embd=128, n_head=1, n_kv_head=1, head_dim=128, mlp_dim=512,
                window_pattern="SL", microbatch=2, total_batch_size=1024, attention="splash", compute_dtype="bfloat16",
                remat="dots", loss_chunk=256)
made = preflight.compile_step(config, device)
made.pop("compiled")
print(json.dumps(made))
from lib import train
print(json.dumps(sum(a.size * a.dtype.itemsize for a in __import__("jax").tree.leaves(train.state_template(config)))))
try:
    preflight.compile_step(config.replace(microbatch=65536, total_batch_size=65536 * 256), device)
except UserError as e:
    print(json.dumps(str(e)))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                    reason="compiling for a TPU without one needs the preflight extra: pip install libtpu")
def test_the_train_step_compiles_for_a_v6e():
    run = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    unknown, made, state, too_big = map(json.loads, run.stdout.splitlines())
    assert "v99:1x1" in unknown and "v6e:1x1" in unknown
    assert state <= made["arguments"] < made["peak"] and made["temporary"] > 0
    assert too_big.startswith("does not fit: ") and "\n" not in too_big
