"""Bad input, one kind after another: one sentence, and nothing half-written."""

import json
import sys

import pytest

from lib.files import UserError
from lib.interop import imports, stablehlo
from lib.interop.exports import FORMATS, export_run
from lib.interop.huggingface import write
from lib.interop.imports import import_run
from lib.train import checkpoint
from tests.helpers.models import config_of, random_params, tokenizer

SMALL = dict(n_layer=1, n_embd=32, n_head=2, mlp_dim=32)
# what a format needs: a package, and the extra that brings it
NEEDS = {
    "transformers": ("torch", "hf"),
    "gguf": ("xllamacpp", "gguf"),
    "onnx": ("jax2onnx", "onnx"),
    "litert": ("litert_converter", "litert"),
    "stablehlo": ("flatbuffers", "stablehlo"),
    "stablehlo_inside": ("flatbuffers", "stablehlo"),
}


@pytest.fixture(scope="module")
def model():
    config = config_of("llama", **SMALL)
    return random_params(config), config


@pytest.fixture
def run(tmp_path, model):
    """A run with a base model, as 02 leaves it."""
    params, config = model
    folder = tmp_path / "run"
    tokenizer().save(folder / "tokenizer.json")
    meta = dict(config=config.to_dict(), tokenizer=tokenizer().fingerprint)
    checkpoint.save(folder / "checkpoints", 1, {"params": params}, meta)
    config.save(folder / "config.json")
    return folder


@pytest.fixture
def theirs(tmp_path, model):
    """A Llama's folder, as transformers has it."""
    params, config = model
    folder = tmp_path / "theirs"
    folder.mkdir()
    write(params, config, tokenizer(), folder, "llama")
    return folder


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("format", FORMATS)
def test_a_missing_extra_names_the_pip_command(run, monkeypatch, format):
    package, extra = NEEDS[format]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"is not installed: run pip install -e '\.\[{extra}\]'"):
        export_run(run, format)
    assert not (run / "exports").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_a_stage_that_the_run_has_not(run, format):
    with pytest.raises(UserError, match="has no sft checkpoint, only base"):
        export_run(run, format, stage="sft")
    assert not (run / "exports").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(hidden_size=64), r"has shape \(32,\) where its config.json asks for \(64,\)"),
        (dict(num_hidden_layers=2), "lack layers.1.input_layernorm"),
        (dict(intermediate_size=48), "mlp.* has shape"),
        (dict(vocab_size=650), "do not belong together"),
        (dict(model_type="gpt_neox"), "gpt_neox"),
    ],
)
def test_what_does_not_fit_does_not_come_in(theirs, tmp_path, settings, words):
    """Shapes that the config does not ask for, more ids than rows, another architecture."""
    path = theirs / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(UserError, match=words):
        import_run(str(theirs), tmp_path / "new", prove=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("where", ["tokenizer", "checkpoint", "config"])
def test_a_disk_that_fills_while_a_model_comes_in(theirs, tmp_path, monkeypatch, where):
    places = {
        "tokenizer": (imports.Tokenizer, "save"),
        "checkpoint": (imports.checkpoint, "save"),
        "config": (imports.Config, "save"),
    }
    with monkeypatch.context() as disk:
        disk.setattr(*places[where], full)
        with pytest.raises(UserError, match="the disk is full"):
            import_run(str(theirs), tmp_path / "new", prove=False)
    assert {path.name for path in tmp_path.iterdir()} == {"theirs"}
    # and with room again it comes in
    assert "kept as" in import_run(str(theirs), tmp_path / "new", prove=False)


def test_a_disk_that_fills_while_a_model_goes_out(run, monkeypatch):
    """The export that was there before stays."""
    old = run / "exports" / "stablehlo"
    old.mkdir(parents=True)
    (old / "forward.stablehlo").write_bytes(b"old")
    monkeypatch.setattr(stablehlo, "functions", lambda *args: {})
    monkeypatch.setattr(stablehlo, "save_tensors", full)
    with pytest.raises(UserError, match="cannot write .*stablehlo: the disk is full"):
        export_run(run, "stablehlo")
    assert (old / "forward.stablehlo").read_bytes() == b"old"
    assert [path.name for path in (run / "exports").iterdir()] == ["stablehlo"]


def test_nothing_of_the_user_s_gives_way_to_an_export(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "theirs.gguf").write_text("precious")
    for out in (tmp_path / "models", tmp_path / "models" / "theirs.gguf", run):
        with pytest.raises(UserError, match="is there already: name a folder that is new"):
            export_run(run, "stablehlo", out=str(out))
    assert (tmp_path / "models" / "theirs.gguf").read_text() == "precious"
    assert (run / "checkpoints").is_dir()
    # a new folder, or an empty one, is taken: what is missing here is told by the export itself
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(UserError, match="is not installed"):
            export_run(run, "stablehlo", out=str(out))
