"""ONNX files run by onnxruntime. Needs jax2onnx and onnxruntime (extra `onnx`)."""

import numpy as np
import pytest

from lib.files import UserError
from lib.interop import onnx_files, plain
from lib.interop.proof import our_logits
from tests.helpers.models import config_of, random_params, tokenizer

pytestmark = pytest.mark.slow
pytest.importorskip("jax2onnx", reason="pip install -e '.[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install -e '.[onnx]'")


@pytest.mark.parametrize("kind", ["whole", "qwen3"])
def test_forward_and_step_are_proved(tmp_path, kind):
    config = config_of(kind)
    params = random_params(config)
    proof = onnx_files.export(params, config, tokenizer(), tmp_path / "out")
    assert proof.holds and proof.greedy == (200, 200) and proof.difference < 1e-4

    # any number of rows
    run = onnx_files.opened(tmp_path / "out" / "forward.onnx")
    tokens = np.random.default_rng(7).integers(700, size=(3, 256)).astype(np.int32)
    (logits,) = run(tokens)
    np.testing.assert_allclose(logits, our_logits(params, config, tokens), atol=1e-4)


def test_what_differs_is_not_kept(tmp_path, monkeypatch):
    config = config_of("llama", n_layer=1)
    params = random_params(config)
    monkeypatch.setattr(onnx_files.proof, "our_logits", lambda *args: np.zeros((2, 256, 700)))
    with pytest.raises(UserError, match="was not kept"):
        onnx_files.export(params, config, tokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_one_file_cannot_hold_is_refused(tmp_path, monkeypatch):
    config = config_of("llama", n_layer=1)
    monkeypatch.setattr(plain, "LARGEST", 1000)
    with pytest.raises(UserError, match="n_layer=1, .* one ONNX file holds 2 GB"):
        onnx_files.export(random_params(config), config, tokenizer(), tmp_path / "out")
