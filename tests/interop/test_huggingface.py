"""Exports opened by transformers itself. Needs torch and transformers (extra `hf`)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lib.files import UserError
from lib.interop import export_run, huggingface
from lib.interop.proof import our_greedy, our_logits, probe_tokens
from tests.helpers import ROOT, parrot
from tests.helpers.models import KINDS, config_of, random_params, tokenizer

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch", reason="pip install -e '.[hf]'")
transformers = pytest.importorskip("transformers", reason="pip install -e '.[hf]'")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """export(kind) -> (params, config, folder, proof), each made once."""
    made = {}

    def export(kind):
        if kind not in made:
            config = config_of(kind)
            params = random_params(config)
            folder = tmp_path_factory.mktemp("export") / "model"
            proof = huggingface.export(params, config, tokenizer(), folder)
            made[kind] = params, config, folder, proof
        return made[kind]

    return export


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_proved(exported, kind):
    _, config, folder, proof = exported(kind)
    assert proof.holds
    assert proof.greedy == (200, 200) and proof.texts == (130, 130)
    assert (folder / huggingface.CUSTOM.name).exists() == kind.startswith("whole")
    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"][0] in proof.format
    assert proof.bytes == sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["whole", "whole, swiglu"])
def test_our_file_attends_either_way(exported, kind, attention):
    params, config, folder, _ = exported(kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, attn_implementation=attention
    )
    tokens = probe_tokens(config)
    with torch.no_grad():
        logits = model(torch.as_tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, our_logits(params, config, tokens), atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        dict(use_cache=False),
        dict(cache_implementation="static"),
        dict(cache_implementation="dynamic"),
    ],
    ids=["no cache", "static", "dynamic"],
)
def test_our_file_writes_the_same_with_any_cache(exported, options):
    params, config, folder, _ = exported("whole")
    model, _ = huggingface.load(folder)
    prompt = probe_tokens(config, 1)[0][:16].tolist()
    written = model.generate(
        torch.tensor([prompt]), max_new_tokens=200, do_sample=False, eos_token_id=None, **options
    )
    assert written[0, 16:].tolist() == our_greedy(params, config)


def test_left_padding_changes_nothing(exported):
    params, config, folder, _ = exported("whole")
    model, _ = huggingface.load(folder)
    prompt = probe_tokens(config, 1)[0][:16].tolist()
    # a row of its own length beside it, and padding of any id
    other = probe_tokens(config, 2)[1][:23].tolist()
    ids = torch.tensor([[5] * 7 + prompt, other])
    mask = torch.tensor([[0] * 7 + [1] * 16, [1] * 23])
    written = model.generate(
        ids, attention_mask=mask, max_new_tokens=100, do_sample=False, eos_token_id=None
    )
    assert written[0, 23:].tolist() == our_greedy(params, config)[:100]


def test_beams_are_the_same_with_and_without_a_cache(exported):
    _, config, folder, _ = exported("whole")
    model, _ = huggingface.load(folder)
    ids = torch.as_tensor(probe_tokens(config)[:, :16])
    options = dict(num_beams=3, max_new_tokens=40, do_sample=False, eos_token_id=None)
    cached = model.generate(ids, use_cache=True, **options)
    assert cached.tolist() == model.generate(ids, use_cache=False, **options).tolist()


def test_a_bare_cache_is_refused_where_the_token_before_is_needed(exported):
    _, config, folder, _ = exported("whole")
    model, _ = huggingface.load(folder)
    ids = torch.as_tensor(probe_tokens(config))
    kept = model(ids[:, :8], use_cache=True)
    kept = getattr(kept, "cache", None) or kept.past_key_values
    with pytest.raises(ValueError, match="previous_ids"):
        model(ids[:, 8:9], past_key_values=kept)


def test_a_loss_comes_back(exported):
    _, config, folder, _ = exported("whole")
    model, _ = huggingface.load(folder)
    ids = torch.as_tensor(probe_tokens(config))
    out = model(ids, labels=ids)
    shifted = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    assert abs(float(out.loss) - float(shifted)) < 1e-5


def test_chats_are_rendered_alike(exported):
    _, _, folder, _ = exported("llama")
    _, theirs = huggingface.load(folder)
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What's 12345?"},
        {"role": "assistant", "content": "A number."},
        {"role": "user", "content": "naïve 東京"},
    ]
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert list(ids) == tokenizer().render_for_completion(chat)


def test_what_differs_is_not_kept(tmp_path, monkeypatch):
    config = config_of("llama")
    params = random_params(config)
    # the halves left as they are: rotations turn the wrong way
    monkeypatch.setattr(huggingface, "swap_halves", lambda w: w)
    with pytest.raises(UserError, match="was not kept"):
        huggingface.export(params, config, tokenizer(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a trained chat model."""
    folder = tmp_path_factory.mktemp("runs") / "parrot"
    return Path(shutil.copytree(parrot.run(), folder))


def test_a_trained_run_leaves_by_the_command(run):
    command = ["-m", "lib.interop", "export", "--run", "parrot", "--runs-dir", str(run.parent)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RawchatForCausalLM" in done.stdout and "200 of 200" in done.stdout

    # and says there what it has learnt
    model, theirs = huggingface.load(run / "exports" / "transformers")
    question, answer = next((q, a) for q, a in parrot.CHATS.items() if isinstance(a, str))
    ids = theirs.apply_chat_template(
        parrot.messages(question)[:1], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    written = model.generate(ids, max_new_tokens=200, do_sample=False)
    assert theirs.decode(written[0, ids.shape[1] :], skip_special_tokens=True) == answer


def test_other_formats_and_stages_are_one_sentence(run):
    with pytest.raises(UserError, match="unknown export format 'word': choose one of"):
        export_run(run, "word")
    with pytest.raises(UserError, match="has no rl checkpoint"):
        export_run(run, "transformers", stage="rl")
