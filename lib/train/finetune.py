"""Fine-tuning on conversations: mixtures by name, whole conversations packed into rows, phases
between checkpoints.

A mixture is a list of sources, each a task of lib.tasks or a JSONL file of chats. Its conversations
are rendered as they enter the packing buffer, and a row teaches the assistant's words alone. Plain
text may be among them, against forgetting; all of it is taught. The training step is
lib.train.step's, the very one of pretraining.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lib import model
from lib.config import Config
from lib.data import Chats, Tokenizer, chat_batches, prefetch, read_chats, render
from lib.files import UserError, choose
from lib.tasks import items_of, tasks
from lib.train.optim import make_optimizer
from lib.train.run import Measurement, Saving, TrainingRun, find_past, saved_every
from lib.train.step import TrainState, for_training, with_rates

# of a source's conversations, one in so many validates, chosen by hash, and at most so many
VAL_EVERY, VAL_MOST = 50, 200
# Phase -> what it teaches, in order. Each starts from the furthest stage before it and leaves its
# own (lib.runs.STAGES).
PHASES = {
    "mid": "the broad mixture: conversations, tools, many kinds of questions",
    "sft": "the smaller, cleaner mixture: how answers should be",
}
# Name -> {source: epochs}. Epochs are the weights: 0.5 takes half of a source's conversations, 3
# takes them three times a pass.
MIXTURES: dict[str, dict[str, float]] = {
    "embedded_mid": dict(
        arithmetic=1.0,
        spelling=1.0,
        counting=1.0,
        strings=1.0,
        pyfacts=1.0,
        identity=1.0,
        source_text=1.0,
    ),
    "embedded_sft": dict(
        dialogues=1.0, spelling=0.2, counting=0.2, strings=0.2, pyfacts=0.4, source_text=0.3
    ),
    "nanochat_mid": dict(
        smoltalk=1.0, mmlu=1.0, gsm8k=1.0, identity_conversations=2.0, spelling=1.0, counting=1.0
    ),
    "nanochat_sft": dict(
        arc_easy=1.0,
        arc_challenge=1.0,
        gsm8k=1.0,
        smoltalk=0.02,
        identity_conversations=1.0,
        spelling=0.01,
        counting=0.01,
    ),
}


# ---- conversations -------------------------------------------------------------------------------


def parse_mixture(text: str) -> dict[str, float]:
    """{source: epochs} of words such as "arithmetic:0.5 spelling my_chats.jsonl:3" or "embedded_sft
    my_chats.jsonl:3".

    A word is a source, or a name in MIXTURES for all of its sources; behind a colon the epochs, or
    what a mixture's are multiplied by.
    """
    mixture = {}
    for word in text.split():
        name, colon, epochs = word.rpartition(":")
        try:
            times = float(epochs) if colon else 1.0
        except ValueError:
            raise UserError(
                f"mixture {word!r}: behind the colon comes a number of epochs, as in {name}:2"
            ) from None
        mixture |= {
            source: times * share
            for source, share in MIXTURES.get(name or word, {name or word: 1.0}).items()
        }
    if not mixture or not all(0 < epochs < 1e6 for epochs in mixture.values()):
        raise UserError(
            f"mixture {text!r} is empty: choose one of {', '.join(MIXTURES)}, or sources with "
            "epochs above 0"
        )
    for name in mixture:
        if not name.endswith((".jsonl", ".jsonl.gz")) and name not in tasks():
            known = ", ".join([*MIXTURES, *tasks()])
            raise UserError(
                f"unknown source {name!r} in the mixture: it is neither a .jsonl file nor one of "
                f"{known}"
            )
    return mixture


def _source(name: str, bad_lines: str) -> Sequence[list[dict] | str]:
    if name.endswith((".jsonl", ".jsonl.gz")):
        return read_chats(name, skip_bad=bad_lines == "skip")
    chats: list = [item.get("messages") or item.get("text") for item in items_of(name, "train")]
    if not all(
        chat and (isinstance(chat, str) or chat[-1]["role"] == "assistant") for chat in chats
    ):
        raise UserError(
            f"task {name} holds neither conversations nor text to learn from: leave it out of the "
            "mixture"
        )
    return chats


def open_mixture(mixture: dict[str, float], split: str, bad_lines: str = "refuse") -> Chats:
    """The conversations of one side of a mixture, "train" or "val".

    They are the sources' training conversations, divided by the hash of their content; val has each
    once, whatever the epochs. bad_lines: of files of chats, "refuse" or "skip" (and count).
    """
    choose("split", split, ("train", "val"))
    choose("bad_lines", bad_lines, ("refuse", "skip"))
    messages, source, digest = [], [], hashlib.sha256()
    for name, epochs in mixture.items():
        # by their content, so that what occurs twice counts once
        chats = {}
        for chat in _source(name, bad_lines):
            mark = hashlib.sha256(json.dumps(chat, sort_keys=True).encode()).digest()
            chats[mark] = chat

        # one in VAL_EVERY is held out: at least one, and not too many
        held_out = [mark for mark in chats if int.from_bytes(mark[:4], "big") % VAL_EVERY == 0]
        held_out = set(sorted(held_out or [min(chats)])[:VAL_MOST])
        kept = [mark for mark in chats if (mark in held_out) == (split == "val")]
        if not kept:
            raise UserError(
                f"{name} holds a single conversation: it takes two, one of them for validation"
            )
        if split == "train":
            kept = kept * int(epochs) + kept[: round(epochs % 1 * len(kept))]
        messages += [chats[mark] for mark in kept]
        source += [name] * len(kept)
        digest.update(json.dumps([split, name, len(kept)]).encode() + b"".join(kept))
    return Chats(messages, source, digest.hexdigest())


def plan(
    chats: Chats, tokenizer: Tokenizer, config: Config, epochs: float, sample: int = 2000
) -> dict:
    """{"conversations": {source: how many}, "tokens": of one pass, "steps": of `epochs` passes},
    from the lengths of a sample.
    """
    some = chats.messages[:: max(1, len(chats) // sample)]
    mean = np.mean([len(render(tokenizer, chat, config.sequence_len + 1)[0]) for chat in some])
    rows = epochs * len(chats) * mean / (config.sequence_len + 1)
    steps = max(1, round(rows * config.sequence_len / config.total_batch_size))
    return dict(
        conversations=dict(collections.Counter(chats.source)),
        tokens=round(len(chats) * mean),
        steps=steps,
    )


# ---- phases --------------------------------------------------------------------------------------

RATES = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "adamw_lr")

# validations and checkpoints of a phase, in all
VALIDATIONS, SAVES = 6, 3


class Base(NamedTuple):
    """What a phase begins with: a trained model, and where it comes from."""

    params: dict
    config: Config
    tokenizer: Tokenizer
    source: str  # of the text that it was pretrained on
    opt_state: Any = None  # to go on with its moments; None begins with fresh ones


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of fine-tuning: what is taught, how often, at which share of the rates.

    mixture: as from `parse_mixture`. bad_lines: of files of chats, "refuse" or "skip".
    """

    stage: str
    mixture: dict[str, float]
    epochs: float = 1.0
    lr: float = 1.0
    bad_lines: str = "refuse"

    @functools.cached_property
    def chats(self) -> Chats:
        """The conversations that it learns."""
        return open_mixture(self.mixture, "train", self.bad_lines)

    @functools.cached_property
    def held_out(self) -> Chats:
        """The conversations that it is validated on."""
        return open_mixture(self.mixture, "val", self.bad_lines)


def open_phase(
    phase: Phase, base: Base, store, if_exists: str, start_afresh: Callable[[], object]
) -> TrainingRun:
    """The training run of a phase in the folder `store`, begun or gone on with.

    if_exists, start_afresh: as in lib.train.run.find_past. A finished phase is a run with nothing
    left to do.
    """
    warm = base.opt_state is not None
    planned = plan(phase.chats, base.tokenizer, base.config, phase.epochs)
    config = phase_config(base.config, planned["steps"], phase.lr, warm)
    identity = dict(
        tokenizer=base.tokenizer.fingerprint,
        mixture=phase.mixture,
        conversations=phase.chats.identity,
        source=base.source,
        optimizer_state="warm" if warm else "fresh",
        start=fingerprint(base.params),
    )
    past = find_past(store, if_exists, config, identity, store, start_afresh)
    rows = config.total_batch_size // config.sequence_len

    def feed(cursor):
        batches = chat_batches(
            phase.chats,
            base.tokenizer,
            rows,
            config.sequence_len,
            cursor=cursor,
            seed=config.seed,
        )
        return prefetch(batches, jax.device_put)

    print(f"{phase.stage}: {PHASES[phase.stage]}")
    print("  " + "  ".join(f"{name} {n:,}" for name, n in planned["conversations"].items()))
    print(
        f"  {planned['tokens']:,} tokens x {phase.epochs:g} epochs = {config.num_steps} steps of "
        f"{rows} x {config.sequence_len}, {phase.lr:g} x rates"
    )
    if past:
        step = past.meta["step"]
        finished = step == config.num_steps
        print(f"  finished before: {past.path}" if finished else f"  continuing at step {step}")
    return TrainingRun(
        config,
        feed,
        folder=Path(store),
        store=store,
        identity=identity,
        past=past,
        begin=lambda: start(base.params, config, base.opt_state),
    )


def validation(phase: Phase, run: TrainingRun, tokenizer: Tokenizer) -> Measurement:
    """The loss on a phase's held-out conversations, at most VALIDATIONS times in its run, computed
    as steps are.
    """
    config = for_training(run.config)
    rows = list(
        chat_batches(phase.held_out, tokenizer, config.microbatch, config.sequence_len, loop=False)
    )
    return Measurement(
        lambda params: {"val_loss": validation_loss(params, config, rows)},
        every=_validated_every(config),
        gives="val_loss",
    )


def saving(
    run: TrainingRun,
    then: Callable = lambda step, path: None,
    sent_at: Callable[[], float] = lambda: math.inf,
) -> Saving:
    """When a phase is saved: three times, the last one kept; `then`, `sent_at` as in Saving."""
    config = run.config
    every = saved_every(SAVES, _validated_every(config), config.num_steps)
    return Saving(every, keep=1, metric="val_loss", then=then, sent_at=sent_at)


def _validated_every(config: Config) -> int:
    return math.ceil(config.num_steps / VALIDATIONS)


def packing_line(cursor: dict) -> str:
    """How a phase's conversations filled its rows, in words."""
    return (
        f"  {cursor['conversations']:,} conversations, {cursor['truncated']} cut to the length of "
        f"a row, {cursor['empty']} left out, having nothing to learn; "
        f"{cursor['targets'] / cursor['cells']:.0%} of the tokens learnt, "
        f"{cursor['padding'] / cursor['cells']:.1%} padding"
    )


def phase_config(config: Config, num_steps: int, lr: float, warm: bool = False) -> Config:
    """The config of a phase: the model and batch of `config`, with its own horizon and `lr` times
    its rates.

    A warm optimizer state needs no warm-up of the rates, a fresh one has a tenth of the phase at
    most.
    """
    if num_steps < 1 or lr <= 0:
        raise UserError(
            f"a phase needs at least 1 step and rates above 0, got {num_steps} steps and {lr} "
            "times the rates"
        )
    rates = {name: lr * getattr(config, name) for name in RATES}
    return config.replace(
        num_steps=num_steps,
        warmup_steps=0 if warm else min(config.warmup_steps, num_steps // 10),
        # behind a pretraining without it too; elsewhere another program takes minutes to compile
        skip_ignored=config.skip_ignored or jax.default_backend() == "cpu",
        **rates,
    )


def start(params, config: Config, opt_state=None) -> TrainState:
    """The state that a phase begins with: a copy of trained parameters and a fresh optimizer state,
    or a warm one.

    config: the phase's. opt_state: the optimizer's at the end of the stage before, to go on with
    its moments (give `phase_config` warm=True too). Its count of updates goes on as well, as Adam's
    bias correction needs it; so the schedule is moved up by it.
    """
    # copies: the step is given its state to overwrite
    params, opt_state = jax.tree.map(jnp.copy, (params, opt_state))
    step = jnp.zeros((), jnp.int32)
    if opt_state is None:
        opt_state = make_optimizer(config, config.num_steps).init(params)
        return TrainState(params, opt_state, step)
    return with_rates(TrainState(params, opt_state, step), config)


_token_losses = jax.jit(model.token_losses, static_argnames="config")


def validation_loss(params, config: Config, batches) -> float:
    """Nats per target over (inputs_BT, targets_BT, ...) batches; NaN where there is no target at
    all.
    """
    total = count = 0
    for inputs_BT, targets_BT, *_ in batches:
        losses_BT = _token_losses(params, config, inputs_BT, targets_BT)
        total += float(np.asarray(losses_BT, np.float64).sum())
        count += int((targets_BT >= 0).sum())
    return total / count if count else float("nan")


def fingerprint(params) -> str:
    """A name for trained parameters, from the first numbers of each: a phase remembers by it what
    it started from.
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(jnp.ravel(leaf)[:256]).tobytes())
    return digest.hexdigest()[:16]
