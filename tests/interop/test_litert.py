"""LiteRT files run by its own interpreter. Needs litert-converter, ai-edge-litert and
ai-edge-quantizer (extra `litert`).
"""

import numpy as np
import pytest

from lib.files import UserError
from lib.interop import litert
from lib.interop.proof import our_logits
from tests.helpers.models import KINDS, config_of, random_params, tokenizer

pytestmark = pytest.mark.slow
for package in ("litert_converter", "ai_edge_litert", "ai_edge_quantizer"):
    pytest.importorskip(package, reason="pip install -e '.[litert]'")


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_step_are_proved_and_int8_is_measured(tmp_path, kind):
    config = config_of(kind, n_layer=2)
    params = random_params(config)
    proof = litert.export(params, config, tokenizer(), tmp_path / "out")
    assert proof.holds and proof.greedy == (200, 200) and proof.difference < 1e-4

    # int8 is another model, though near, and smaller
    names = {path.stem for path in (tmp_path / "out").glob("*.tflite")}
    assert names == {"forward", "forward_int8", "step", "step_int8"}
    sizes = {name: (tmp_path / "out" / f"{name}.tflite").stat().st_size for name in names}
    assert sizes["step_int8"] < 0.9 * sizes["step"]
    tokens = np.random.default_rng(7).integers(700, size=(2, 256))
    ours = our_logits(params, config, tokens)
    theirs = litert.opened_forward(tmp_path / "out" / "forward_int8.tflite")(tokens)
    difference = np.abs(ours - theirs).max()
    assert 1e-3 < difference < 0.2 * np.abs(ours).max()
    assert "int8 bits per byte" in proof.table() and "instead of" in proof.table()


def test_what_differs_is_not_kept(tmp_path, monkeypatch):
    config = config_of("llama", n_layer=1)
    monkeypatch.setattr(litert.proof, "our_logits", lambda *args: np.zeros((2, 256, 700)))
    with pytest.raises(UserError, match="was not kept"):
        litert.export(random_params(config), config, tokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
