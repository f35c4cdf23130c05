"""StableHLO files run by jax alone, in a process without our code."""

import json
import subprocess
import sys

import numpy as np
import pytest
from jax import export as jax_export

from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.files import UserError
from lib.interop import plain, stablehlo
from lib.interop.proof import our_greedy, our_logits
from tests.helpers.models import config_of, random_params, tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["whole", "llama", "qwen3"])
def exported(request, tmp_path_factory):
    config = config_of(request.param)
    params = random_params(config)
    folder = tmp_path_factory.mktemp("export") / "model"
    return params, config, folder, stablehlo.export(params, config, tokenizer(), folder)


def test_it_says_the_same(exported):
    params, config, folder, proof = exported
    assert proof.holds and proof.greedy == (200, 200)
    names = {path.name for path in folder.iterdir()}
    files = {"config.json", "tokenizer.json", "run.py", "weights.safetensors"}
    assert names == files | {f"{name}.stablehlo" for name in ("forward", "start", "step")}
    assert Config.load(folder / "config.json") == config
    assert Tokenizer.load(folder).fingerprint == tokenizer().fingerprint


def test_one_file_is_for_all_platforms_and_any_number_of_rows(exported):
    params, config, folder, _ = exported
    forward = jax_export.deserialize(bytearray((folder / "forward.stablehlo").read_bytes()))
    assert forward.platforms == ("cpu", "cuda", "tpu")
    named, _ = stablehlo.named_weights(params)
    for rows in (1, 3):
        tokens = np.random.default_rng(rows).integers(700, size=(rows, config.sequence_len))
        tokens = tokens.astype(np.int32)
        logits = np.asarray(forward.call(named, tokens))
        np.testing.assert_allclose(logits, our_logits(params, config, tokens), atol=1e-4)


def test_its_program_writes_from_ids(exported):
    params, config, folder, _ = exported
    from lib.interop.proof import greedy_prompt

    prompt, _ = greedy_prompt(config)
    words = [sys.executable, str(folder / "run.py"), *map(str, prompt)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == our_greedy(params, config)[:20]


def test_the_weights_inside(tmp_path):
    """One file is a whole model: nothing beside it is read."""
    config = config_of("whole", n_layer=2)
    params = random_params(config)
    proof = stablehlo.export_inside(params, config, tokenizer(), tmp_path / "model")
    assert proof.holds and proof.greedy == (200, 200) and "weights inside" in proof.format
    assert not (tmp_path / "model" / "weights.safetensors").exists()

    data = bytearray((tmp_path / "model" / "forward.stablehlo").read_bytes())
    forward = jax_export.deserialize(data)
    assert forward.platforms == ("cpu", "cuda", "tpu")
    tokens = np.random.default_rng(3).integers(700, size=(3, config.sequence_len))
    tokens = tokens.astype(np.int32)
    logits = np.asarray(forward.call(tokens))
    np.testing.assert_allclose(logits, our_logits(params, config, tokens), atol=1e-4)


def test_what_one_file_cannot_hold_is_refused(tmp_path, monkeypatch):
    config = config_of("llama", n_layer=1)
    monkeypatch.setattr(plain, "LARGEST", 1000)
    with pytest.raises(UserError, match="n_layer=1, .* make .* one StableHLO file holds 2 GB"):
        stablehlo.export_inside(random_params(config), config, tokenizer(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_run_is_not_kept(tmp_path, monkeypatch):
    config = config_of("llama", n_layer=1)
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('no such luck')")
    monkeypatch.setattr(stablehlo, "RUNNER", broken)
    with pytest.raises(UserError, match="it does not run .*no such luck"):
        stablehlo.export(random_params(config), config, tokenizer(), tmp_path / "model")
    assert not (tmp_path / "model").exists()
