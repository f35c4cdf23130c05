"""What to train here: the preset for a device, the text for a preset, the horizon for a text.

A person presses *Run all* without a setting, so the defaults must make sense together: a model that
this device finishes in the time it has, and as much text as that model can read.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from lib.config import Config
from lib.data.corpus import corpus_of, is_records, tokenizer_in
from lib.data.packing import MOST_EPOCHS
from lib.data.tokenizer import FILE, Tokenizer, load_tokenizer
from lib.data.vocabulary import Vocabulary, make_tokenizer, save_with_text

# the text of a preset, where the network reaches the Hub
TEXTS = {
    "cpu_demo": "stdlib",
    "colab_free_v5e": "tinystories",
    "colab_free_t4": "tinystories",
}
TEXT_OF_THE_REST = "climbmix"

# characters in one training shard of a source on the Hub, roughly, and of a source that has few
SHARD_CHARS = {"climbmix": 250e6, "fineweb_edu": 250e6, "tinystories": 480e6}
CHARS_PER_TOKEN = 4


class Choice(NamedTuple):
    """A default, and in words why it is this one."""

    name: str
    why: str


def pick_preset(device: dict) -> Choice:
    """The preset for a device, from `notebook.device_report`."""
    kind = device["kind"].lower()
    if device["platform"] == "cpu":
        return Choice("cpu_demo", "no accelerator here: two cores finish it in minutes")
    if device["platform"] == "tpu":
        if "v6" in kind:
            why = "head width 256 fills this TPU's 256 x 256 matrix unit"
            return Choice("colab_v6e", why)
        if device["count"] == 1 and "v5 lite" in kind:
            why = "within an hour on one v5e, as free accounts have; colab_v5e takes hours"
            return Choice("colab_free_v5e", why)
        return Choice("colab_v5e", "sized for TPUs with 16 GB and 128 x 128 matrix units")
    if "t4" in kind:
        return Choice("colab_free_t4", "an hour on one T4, computed in float32: it has no bfloat16")
    return Choice("gpu", "one GPU with 16 GB or more")


def suited_to(device: dict) -> dict[str, Any]:
    """Config fields that change no result, as this kind of device computes fastest (LOG.md).

    On a GPU the copies that a scan over layers makes cost a quarter of a step, and unrolled layers
    compile as fast; larger chunks of logits are larger products. On a CPU fine-tuning leaves out
    the logits of ignored tokens: pretraining, which has none, goes by the same program, so that it
    is compiled once.
    """
    if device["platform"] == "gpu":
        return {"scan_layers": False, "loss_chunk": 8192}
    return {"skip_ignored": True} if device["platform"] == "cpu" else {}


class TokenizerText(NamedTuple):
    """What a tokenizer is trained on where its user left that open."""

    source: str
    vocab_size: int
    why: str


def for_tokenizer(
    preset: str, source: str, vocab_size: int, device: dict, hosted: bool
) -> TokenizerText:
    """Text and size of the vocabulary for the model that a preset of 02 will train.

    source "" and vocab_size 0 are left open; preset "auto" takes the device's. hosted: in Colab or
    Kaggle, where this notebook asks for a CPU and 02, in a tab of its own, for a TPU.
    """
    why = "asked for"
    if preset == "auto" and hosted and device["platform"] == "cpu":
        preset, why = "colab_free_v5e", "what 02 will train on the TPU that it asks for"
    elif preset == "auto":
        preset, why = pick_preset(device)
    vocab_size = vocab_size or Config.preset(preset).vocab_size
    sentence = f"for preset {preset} ({why}): {vocab_size:,} ids"
    if source:
        return TokenizerText(source, vocab_size, f"{sentence}, from {source}")
    needs_hub = TEXTS.get(preset, TEXT_OF_THE_REST) != "stdlib"
    source, why = pick_text(preset, online=needs_hub and hub_is_reachable())
    return TokenizerText(source, vocab_size, f"{sentence}, from {source} ({why})")


def pick_text(preset: str, online: bool) -> Choice:
    """The source of text for a preset; the embedded one where the Hub is out of reach."""
    source = TEXTS.get(preset, TEXT_OF_THE_REST)
    if source == "stdlib":
        return Choice(source, "on every machine, enough for this preset")
    if online:
        return Choice(source, "as much as this preset can read, from the Hugging Face Hub")
    return Choice("stdlib", f"the Hub, where {source} is, can't be reached from here")


def hub_is_reachable(seconds: float = 5) -> bool:
    """Whether the Hugging Face Hub (or the mirror in HF_ENDPOINT) answers at all."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError:
        return True  # a refusal is an answer
    except (OSError, ValueError):
        return False
    return True


def pick_shards(source: str, planned: int) -> int:
    """How many shards of a source on the Hub hold `planned` tokens, so that none is read twice."""
    shard = SHARD_CHARS.get(source)
    return max(1, math.ceil(planned * CHARS_PER_TOKEN / shard)) if shard else 1


def fit_horizon(config: Config, available: int) -> tuple[Config, str]:
    """The config with no more steps than `available` tokens can carry, and a sentence or "".

    A model that reads a small text a hundred times learns it by heart, and nothing else.
    """
    most = MOST_EPOCHS * available // config.total_batch_size
    if config.num_steps <= most:
        return config, ""
    steps = max(1, most)
    return config.replace(num_steps=steps), (
        f"{steps:,} steps instead of {config.num_steps:,}: this text has {available:,} tokens, and "
        f"beyond {MOST_EPOCHS} times over it a model learns it by heart (num_steps overrides)"
    )


def tokenizer_of(run: Path, preset: str, source: str, device: dict, hosted: bool) -> Tokenizer:
    """The tokenizer of a run folder; where there is none it is made, by 01's own function."""
    if (run / FILE).exists():
        return load_tokenizer(run)
    if is_records(source):
        print(f"{run} has no tokenizer yet: it takes that of {source}")
        tokenizer = tokenizer_in(corpus_of(source))
        save_with_text(tokenizer, run / FILE, source)
        return tokenizer
    text = for_tokenizer(preset, source, 0, device, hosted)
    print(f"{run} has no tokenizer yet: making one as 01 does, {text.why}")
    tokenizer, _ = make_tokenizer(run, Vocabulary(text.source, text.vocab_size))
    return tokenizer
