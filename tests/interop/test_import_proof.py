"""Models that transformers made come in and say the same. Needs torch and transformers (`hf`)."""

import subprocess
import sys

import pytest

from lib.data.sources import documents
from lib.files import UserError
from lib.interop import imports
from lib.runs import load_model
from tests.helpers import ROOT

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch", reason="pip install -e '.[hf]'")
transformers = pytest.importorskip("transformers", reason="pip install -e '.[hf]'")

SIZES = dict(
    vocab_size=520,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=0,
)
# name: (class, settings)
MODELS = {
    "llama": ("Llama", dict(rms_norm_eps=1e-5)),
    "smollm": ("Llama", dict(tie_word_embeddings=True, num_key_value_heads=1, rms_norm_eps=1e-5)),
    "wide heads": ("Llama", dict(head_dim=32, rope_parameters=None, num_key_value_heads=4)),
    "other base": (
        "Llama",
        dict(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}),
    ),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
}


def make_tokenizer(folder, kind: str, vocab_size: int):
    """A byte-level tokenizer with its special token first, as SmolLM's and Llama 3's are made."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "split")
    steps = {
        "gpt2": [as_bytes],
        "digits": [pre_tokenizers.Digits(individual_digits=True), as_bytes],
        "split": [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}|\s+(?!\S)|[^\s]|\s"), "isolated"),
            as_bytes,
        ],
    }[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for text, _ in zip(documents("stdlib", "train"), range(40))]
    tokenizer.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)


def make_model(folder, name: str, **options):
    """A model with every weight random, its norms' weights too."""
    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(("q_norm.weight", "k_norm.weight")):
                weight.fill_(1.3)
            elif "norm" in key:
                weight.normal_(1.0, 0.3)
            else:
                weight.normal_(0.0, 0.15)
    model.save_pretrained(folder, **options)


@pytest.mark.parametrize("words", ["gpt2", "digits", "split"])
def test_every_kind_of_tokenizer_comes_along(tmp_path, words):
    make_model(tmp_path / "model", "llama")
    make_tokenizer(tmp_path / "model", words, 520)
    text = imports.import_run(str(tmp_path / "model"), tmp_path / "run")
    assert "130 of 130 texts of equal ids" in text


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_comes_in(tmp_path, name):
    make_model(tmp_path / "model", name)
    make_tokenizer(tmp_path / "model", "digits", 500)
    text = imports.import_run(str(tmp_path / "model"), tmp_path / "run")
    difference = float(text.split("logit difference ")[1].split()[0])
    assert difference < 1e-4
    model = load_model(tmp_path / "run")
    assert model.config.vocab_size == 499 + 9


def test_shards_come_in(tmp_path):
    make_model(tmp_path / "model", "llama", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    make_tokenizer(tmp_path / "model", "gpt2", 520)
    assert "130 of 130" in imports.import_run(str(tmp_path / "model"), tmp_path / "run")


def test_what_differs_is_not_imported(tmp_path, monkeypatch):
    make_model(tmp_path / "model", "llama")
    make_tokenizer(tmp_path / "model", "gpt2", 520)
    monkeypatch.setattr("lib.interop.llama.swap_halves", lambda w: w)
    with pytest.raises(UserError, match="was not imported: its logits are up to"):
        imports.import_run(str(tmp_path / "model"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_brings_one_in_and_it_leaves_again(tmp_path):
    make_model(tmp_path / "model", "smollm")
    make_tokenizer(tmp_path / "model", "digits", 520)

    def command(*words):
        words = [sys.executable, "-m", "lib.interop", *words, "--runs-dir", str(tmp_path / "runs")]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    came = command("import", "--source", str(tmp_path / "model"), "--run", "small")
    assert "130 of 130 texts" in came and "kept as" in came
    left = command("export", "--run", "small")
    assert "LlamaForCausalLM" in left and "200 of 200" in left and "130 of 130" in left
