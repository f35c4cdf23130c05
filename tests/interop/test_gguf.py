"""GGUF files run by llama.cpp itself. Needs gguf and xllamacpp (extra `gguf`)."""

import numpy as np
import pytest

from lib.files import UserError
from lib.interop import gguf_file
from tests.helpers.models import config_of, random_params, tokenizer

pytestmark = pytest.mark.slow
gguf = pytest.importorskip("gguf", reason="pip install -e '.[gguf]'")
pytest.importorskip("xllamacpp", reason="pip install -e '.[gguf]'")

KINDS = {
    "llama": config_of("llama"),
    "llama, scaled": config_of("llama, scaled"),
    "arcee": config_of("arcee"),
    "qwen3": config_of("qwen3", window_pattern="L"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_is_proved(tmp_path, kind):
    params = random_params(KINDS[kind])
    proof = gguf_file.export(params, KINDS[kind], tokenizer(), tmp_path / "out")
    assert proof.holds and proof.greedy == (200, 200) and proof.difference < 1e-4
    assert f"({kind.split(',')[0]}, float32)" in proof.format
    # no splitter of llama.cpp takes digits by two
    assert len(proof.lost) == 1 and "give it ids" in proof.lost[0]
    assert proof.path == tmp_path / "out" / "model.gguf" and proof.path.exists()


def test_a_pattern_of_its_list_makes_equal_ids(tmp_path):
    config = config_of("llama", vocab_size=700)
    ours = tokenizer()
    other = type(ours)(gguf_file.DIGITS_PATTERN, ours.tokens)
    proof = gguf_file.export(random_params(config), config, other, tmp_path / "out")
    assert proof.texts == (130, 130) and proof.lost == ()


def test_chats_are_rendered_alike(tmp_path):
    config = config_of("llama")
    path = tmp_path / "model.gguf"
    gguf_file.write(random_params(config), config, tokenizer(), path, "llama")
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is it?"},
    ]
    with gguf_file.serving(path, config) as ask:
        text = ask("apply-template", messages=chat)["prompt"]
    # it puts what begins a document before every text, and so takes it from the template's
    ids = tokenizer().encoding.encode("<|bos|>" + text, allowed_special="all")
    assert ids == tokenizer().render_for_completion(chat)


def test_what_differs_is_not_kept(tmp_path, monkeypatch):
    config = config_of("llama")
    monkeypatch.setattr(gguf_file, "interleave_halves", lambda w: w)
    with pytest.raises(UserError, match="was not kept"):
        gguf_file.export(random_params(config), config, tokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("whole", "against .* stand .*smear=True"),
        ("qwen3", "against qwen3, the nearest, stand window_pattern=SSSL"),
        ("gpt2", "against .*, the nearest, stand mlp=gelu"),
    ],
)
def test_a_config_that_no_architecture_holds_is_refused(tmp_path, kind, words):
    config = config_of(kind)
    with pytest.raises(UserError, match=words):
        gguf_file.export(random_params(config), config, tokenizer(), tmp_path / "out")


def test_tensors_have_names_that_gguf_knows():
    for kind, config in KINDS.items():
        architecture = kind.split(",")[0]
        known = gguf.MODEL_TENSORS[gguf.MODEL_ARCH[architecture.upper()]]
        names = {gguf.TENSOR_NAMES[tensor] for tensor in known}
        for name, tensor in gguf_file.tensors(random_params(config), config, architecture).items():
            plain = name.removesuffix(".weight")
            parts = plain.split(".")
            if parts[0] == "blk":
                plain = f"blk.{{bid}}.{parts[2]}"
            assert plain in names and tensor.dtype == np.float32
