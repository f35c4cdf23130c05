"""Architectures that other programs know, and which of our configs each of them can hold.

A family says by field which values it holds. What it has no word for can often be folded into the
weights instead (`lib.interop.folding`): scales, the norm of the embedding, the sign of a rotation.
"""

from typing import Any, NamedTuple

from lib.config import Config
from lib.files import UserError

# parts that add something to the computation which no other architecture computes
OURS_ALONE = ("x0_scales", "value_embeds", "smear", "backout")


class Family(NamedTuple):
    """An architecture by the name that transformers has for it.

    holds: per field of Config the values that it may have; fields not named may have any.
    short_windows: whether layers may see less than the whole sequence.
    """

    model_type: str
    class_name: str
    holds: dict[str, tuple]
    short_windows: bool = False


FAMILIES = {
    "llama": Family(
        "llama",
        "LlamaForCausalLM",
        holds=dict(mlp=("swiglu",), qk_norm=(False,), softcap=(0.0,)),
    ),
    "qwen3": Family(
        "qwen3",
        "Qwen3ForCausalLM",
        holds=dict(mlp=("swiglu",), qk_norm=(True,), softcap=(0.0,)),
        short_windows=True,
    ),
    "arcee": Family(
        "arcee",
        "ArceeForCausalLM",
        holds=dict(mlp=("relu2", "gelu"), qk_norm=(False,), softcap=(0.0,)),
    ),
    "nanochat": Family(
        "nanochat",
        "NanoChatForCausalLM",
        holds=dict(mlp=("relu2", "gelu"), qk_norm=(True,), qk_scale=(1.0,), embed_norm=(True,)),
    ),
}


def has_short_windows(config: Config) -> bool:
    """Whether some layer sees less than a whole sequence."""
    return min(config.windows) < config.sequence_len - 1


def misfits(config: Config, family: Family) -> list[str]:
    """What of a config a family cannot hold, as "field=value"; empty where the config fits."""
    # fields whose values it has no word for
    holds: dict[str, Any] = {field: (False,) for field in OURS_ALONE} | family.holds
    against = [
        f"{field}={getattr(config, field)}"
        for field, values in holds.items()
        if getattr(config, field) not in values
    ]
    if has_short_windows(config) and not family.short_windows:
        against.append(f"window_pattern={config.window_pattern}")
    # their configs refuse widths that are no multiple of the number of heads
    if config.n_embd % config.n_head:
        against.append(f"n_head={config.n_head}")
    return against


def fitting(config: Config, families: dict[str, Family] = FAMILIES) -> str:
    """The name of the first family that holds a config, "" where none does."""
    fits = (name for name, family in families.items() if not misfits(config, family))
    return next(fits, "")


def refusal(config: Config, families: dict[str, Family], program: str) -> UserError:
    """The sentence for a config that none of a program's families holds.

    It names the fields that stand against the family which comes nearest.
    """
    nearest = min(families, key=lambda name: len(misfits(config, families[name])))
    against = ", ".join(misfits(config, families[nearest]))
    return UserError(
        f"{program} has no architecture for this model: against {nearest}, the nearest, "
        f"stand {against}; a model of the preset llama_like fits"
    )
