"""What may change when a training goes on: how it is computed, its rates, its length; no more."""

from typing import NamedTuple

from lib.files import UserError

# How something is computed: the same numbers up to rounding, so nobody is asked. And a source,
# which is known by its content (lib.data.check_text), however its path is spelt.
HOW = frozenset(
    "microbatch remat attention attention_block loss_chunk skip_ignored scan_layers compute_dtype "
    "source".split()
)

# Rates, schedule and horizon: they may change, and the run's record says so.
RATES = frozenset(
    "matrix_lr embedding_lr unembedding_lr scalar_lr adamw_lr weight_decay reference_tokens "
    "num_steps tokens_per_param warmup_steps warmdown_ratio final_lr_frac".split()
)


class Changes(NamedTuple):
    """What differs between a run's settings and those asked for now, in words."""

    how: list[str]
    rates: list[str]


def allowed_changes(before: dict, now: dict, where, step: int) -> Changes:
    """The changes with which the training in `where` may go on after `step`.

    UserError for any other: data, shape, tokenizer or seed would mix two experiments; and for a
    horizon that is already passed.
    """
    how, rates, refused = [], [], []
    for name, value in now.items():
        if before.get(name) == value:
            continue
        change = f"{name} was {before.get(name)!r} and is {value!r}"
        if name in HOW:
            how.append(change)
        elif name in RATES:
            rates.append(change)
        else:
            refused.append(change)

    if refused:
        raise UserError(
            f"{where} was trained with other settings ({'; '.join(refused[:3])}): set them back to "
            "continue, pass if_exists=fresh to start anew, or take another run name"
        )
    if now.get("num_steps", step) < step:
        raise UserError(
            f"{where} is at step {step} already, beyond num_steps={now['num_steps']}: "
            "ask for more steps, or pass if_exists=fresh to start anew"
        )
    return Changes(how, rates)
