"""Pretraining, apart from the story that 02_train tells: its model, text, devices, measurements.

Each function is one cell's work. What they hand on is a Config, a Text and a TrainingRun.
"""

import dataclasses
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from lib import data, evals, parallel, report, train
from lib.config import Config
from lib.data.sources import MANIFEST
from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.data.vocabulary import read_by, trained_on
from lib.evals import core
from lib.files import UserError, is_remote, read_json, update_json
from lib.generate import Sampling, generate
from lib.home import Mirror
from lib.notebook import parse_overrides, secret
from lib.parallel.layout import Layout
from lib.params import count_params
from lib.preflight.memory import choose_layout, parse_mesh, peak_bytes
from lib.preflight.plan import Plan, compare, count_tokens
from lib.preflight.search import with_microbatch
from lib.recipes import (
    SHARD_CHARS,
    fit_horizon,
    pick_preset,
    pick_shards,
    suited_to,
    tokenizer_of,
)
from lib.runs import start_afresh
from lib.runtime import host, seconds_left
from lib.train import checkpoint
from lib.train.due import SAMPLED_STEPS
from lib.train.metrics import column, read_jsonl

# the text that needs no network, and is small
EMBEDDED = ("stdlib", "stdlib_with_tests")

# what a model is asked to go on with while it trains: of code, and of prose
CODE = ("def ", "import ", "# The ", "class ")
PROSE = ("The ", "Once upon a time", "In the year", "I think")

# ---- what is to be trained -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the forms ask of the model and of the devices; see 02's forms for each."""

    preset: str = "auto"
    depth: int = 0
    num_steps: int = 0
    overrides: str = ""
    microbatch: str = "preset"
    strategy: str = "auto"
    mesh: str = ""

    @property
    def fields(self) -> dict:
        """The Config fields that were set by name."""
        chosen = {"depth": self.depth, "num_steps": self.num_steps}
        given = {name: value for name, value in chosen.items() if value}
        return given | parse_overrides(self.overrides, Config)


def open_tokenizer(folder: Path, wishes: Wishes, source: str, device: dict) -> Tokenizer:
    """The run's tokenizer; where there is none, the first process makes it as 01 does."""
    parallel.from_first(
        "tokenizer",
        lambda: tokenizer_of(folder, wishes.preset, source, device, bool(host())).fingerprint,
    )
    tokenizer = load_tokenizer(folder)
    was_read = trained_on(tokenizer)
    if source and was_read and source not in (was_read, read_by(tokenizer)):
        print(f"note: the tokenizer read {was_read}, and training will read {source}")
    return tokenizer


def choose_model(wishes: Wishes, device: dict, tokenizer: Tokenizer) -> Config:
    """The config of a preset, the device's own where none is named, with what was wished for."""
    chosen, why = wishes.preset, "asked for"
    if chosen == "auto":
        chosen, why = pick_preset(device)
    print(f"preset      {chosen}: {why}")
    fields = dict(vocab_size=tokenizer.vocab_size) | suited_to(device) | wishes.fields
    if fields["vocab_size"] != tokenizer.vocab_size:
        raise UserError(
            f"vocab_size={fields['vocab_size']}, but the run's tokenizer has "
            f"{tokenizer.vocab_size}: make one of that size with 01 --vocab-size"
        )
    return Config.preset(chosen, **fields)


# ---- the text ------------------------------------------------------------------------------------


class TrainingText(NamedTuple):
    """What a model reads: opened token shards, and a held-out part that it is validated on."""

    source: str
    shards: int
    packing: str
    tokenizer: Tokenizer
    train: data.Tokens
    held_out: data.Tokens

    def feed(self, config: Config, layout: Layout | None) -> Callable:
        """feed(cursor) of a training run: batches on the devices, made ahead of time.

        Every process packs the same rows and keeps those of its devices: packing is fast, and the
        curve is the same on any number of them.
        """
        rows = config.total_batch_size // config.sequence_len

        def batches(cursor=None):
            packed = data.batches(
                self.train,
                rows,
                config.sequence_len,
                packing=self.packing,
                cursor=cursor,
                seed=config.seed,
            )
            return data.prefetch(
                packed, lambda batch: parallel.put_batch(layout, batch, whole=True)
            )

        return batches

    def held_out_rows(self, config: Config):
        """The held-out part as batches, once."""
        return data.batches(
            self.held_out, config.microbatch, config.sequence_len, packing=self.packing, loop=False
        )

    def first_rows(self, config: Config):
        """(inputs, how the rows were filled) of the very first batch, on the host."""
        rows = config.total_batch_size // config.sequence_len
        inputs_BT, _, cursor = next(
            data.batches(
                self.train, rows, config.sequence_len, packing=self.packing, seed=config.seed
            )
        )
        return inputs_BT, data.waste(cursor)


def open_text(
    source: str,
    tokenizer: Tokenizer,
    shards: int,
    packing: str,
    eval_bytes: int,
    mirror: Mirror | None = None,
) -> TrainingText:
    """The text of a training, of so many shards; its tokens are kept at the mirror's home too."""
    shelf = mirror.shelf(sends=jax.process_index() == 0) if mirror else None
    tokens = data.open_tokens(source, "train", tokenizer, shards=shards, shelf=shelf)
    texts = data.head(data.documents(source, "val", shards=shards), eval_bytes)
    return TrainingText(
        source, shards, packing, tokenizer, tokens, data.tokens_of(texts, tokenizer)
    )


def shards_for(folder: Path, source: str, config: Config, if_exists: str) -> int:
    """How many shards of a source on the Hub a plan needs; a run that goes on keeps its number, so
    that it may be trained longer.
    """
    path = folder / MANIFEST
    if if_exists == "continue" and source in SHARD_CHARS and path.exists():
        before = read_json(path)
        if before.get("source") == source:
            return len(before["files"])
    return pick_shards(source, config.num_steps * config.total_batch_size)


def fit_text(config: Config, text: TrainingText, wishes: Wishes) -> Config:
    """The config, with a shorter horizon where the embedded text would be learnt by heart."""
    asked = {"num_steps", "tokens_per_param"} & wishes.fields.keys()
    if text.source not in EMBEDDED or asked:
        return config
    config, why = fit_horizon(config, count_tokens(text.train))
    if why:
        print(why)
    return config


# ---- where it was left, and on which devices it goes on ------------------------------------------


def identity_of(text: TrainingText) -> dict:
    """What a checkpoint remembers of its training besides the config."""
    return dict(
        tokenizer=text.tokenizer.fingerprint,
        source=text.source,
        packing=text.packing,
        shards=text.shards,
    )


def find_past(
    folder: Path, store, if_exists: str, config: Config, text: TrainingText
) -> train.Past | None:
    """What was trained and goes on; refused where settings or text have changed."""
    identity = identity_of(text)
    places = dict(run=str(folder), checkpoints=str(store))
    parallel.check_same("settings", config.to_dict() | identity | places)

    own = folder / "checkpoints"
    elsewhere = is_remote(store) or Path(store).resolve() != own.resolve()

    def aside():
        if elsewhere:
            raise UserError(
                f"{store} holds another training's checkpoints: name an empty folder to start "
                "afresh"
            )
        start_afresh(folder)

    past = train.find_past(store, if_exists, config, identity, folder, aside)
    if past is None and elsewhere and own.exists():
        # its curves and config would stand beside the old checkpoints in the run's folder
        if if_exists != "fresh":
            raise UserError(
                f"{folder} was trained before with its checkpoints in {own}, and {store} has none: "
                "leave checkpoints empty to go on, pass if_exists=fresh, or take another run"
            )
        parallel.from_first("fresh start", lambda: start_afresh(folder) and None)
    if past or jax.process_index() == 0:
        data.check_text(folder, text.source, text.shards, resumed=bool(past))
    return past


def share_out(
    config: Config, wishes: Wishes, device: dict, past: train.Past | None
) -> tuple[Config, Layout | None]:
    """The config with the microbatch for these devices, and how they share the work."""
    named = parse_overrides(wishes.overrides, Config)
    before = past.meta["config"] if past else None
    config = with_microbatch(config, wishes.microbatch, device, keep=named, before=before)
    # a microbatch that nobody named is for one device: each of several gets as much
    grow = wishes.microbatch in ("preset", "auto") and "microbatch" not in named
    config, layout, why = choose_layout(
        config, wishes.strategy, parse_mesh(wishes.mesh), memory=device["memory"], grow=grow
    )
    print(f"devices     {why}")
    return config, layout


def open_run(
    config: Config,
    layout: Layout | None,
    text: TrainingText,
    folder: Path,
    store,
    past: train.Past | None,
    device: dict,
) -> train.TrainingRun:
    """The training run, compiled; its config is written into the run's folder."""
    run = train.TrainingRun(
        config,
        text.feed(config, layout),
        folder,
        store,
        identity_of(text),
        past,
        layout,
        peak_flops=device["flops"] and device["flops"] * device["count"],
    )
    compiled = run.compile()
    # a finished run that is only looked at keeps what it took
    run.notes.setdefault("compile_seconds", run.compile_seconds)
    if run.done < config.num_steps:
        run.notes["computed_in"] = train.computed_in(config)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    each = " a device" if layout else ""
    print(
        f"compiled in {run.compile_seconds:.1f} s; the step needs "
        f"{peak_bytes(compiled) / 2**30:.2f} GiB{each} ({temporary / 2**30:.2f} of it temporary)"
    )
    if past:
        print(f"continuing {past.path} at step {run.done} of {config.num_steps}")
    if jax.process_index() == 0:
        train.portable(config, layout).save(folder / "config.json")
    return run


# ---- what is measured on the way -----------------------------------------------------------------


def validation(run: train.TrainingRun, text: TrainingText, every: int) -> train.Measurement:
    """Bits per byte and loss of the held-out text, every so many steps and by the clock, computed
    as steps are.
    """
    losses_of = train.token_losses_on(run.layout) if run.layout else evals.token_losses
    config = train.for_training(run.config)

    def measure(params) -> dict:
        score = evals.bits_per_byte(
            params,
            config,
            text.held_out_rows(config),
            text.tokenizer.token_bytes,
            losses_of=losses_of,
        )
        return dict(val_bpb=score.bpb, val_loss=score.loss)

    return train.Measurement(measure, every, by_clock=True, gives="val_bpb")


def write_samples(params, config: Config, text: TrainingText) -> list[str]:
    """What the model goes on with after four beginnings; `params` whole, on this device."""
    beginnings = CODE if text.source in EMBEDDED else PROSE
    prompts = [text.tokenizer.encode(words, bos=True) for words in beginnings]
    stop = (text.tokenizer.bos,)
    settings = Sampling(48, temperature=0.8, top_k=50, seed=config.seed, stop=stop)
    written = generate(params, config, prompts, settings)
    return [words + text.tokenizer.decode(ids) for words, ids in zip(beginnings, written)]


def sampling(run: train.TrainingRun, text: TrainingText, every: int) -> train.Measurement:
    """Samples as one text, every so many steps, and often while the model is young."""

    def measure(params) -> dict:
        params = parallel.whole(run.layout, params, run.config.dtype)
        return {"samples": "\n\n".join(write_samples(params, run.config, text))}

    return train.Measurement(measure, every, at=SAMPLED_STEPS)


def core_measurement(
    config: Config, layout: Layout | None, tokenizer: Tokenizer, every: int, bundle: str, limit: int
) -> list[train.Measurement]:
    """CORE every so many steps; nothing for 0. A missing bundle is said before any compute."""
    if not every:
        return []
    measure = core.during_training(config, tokenizer, bundle or None, limit=limit)
    return [
        train.Measurement(
            lambda params: measure(parallel.whole(layout, params, config.dtype)), every
        )
    ]


def check_leaving(keep: int, session_hours: float):
    """UserError for what a training would else say only when it first saves, or looks whether its
    session ends: after minutes of compiling.
    """
    if keep < 1:
        raise UserError(f"keep={keep} checkpoints would keep none: use 1 or more")
    seconds_left(session_hours)


# ---- where checkpoints go ------------------------------------------------------------------------


class HomeSender:
    """Sends what is saved to the run's home and to a Hub repository; checked before any compute."""

    def __init__(self, mirror: Mirror, push_to: str, store, tokenizer: Tokenizer):
        self.mirror, self.push_to, self.upload = mirror, push_to, None
        self.first = jax.process_index() == 0
        if not push_to:
            return
        if is_remote(store):
            raise UserError(
                f"push_to uploads local checkpoints, and these go to {store}: leave one of the two "
                "empty"
            )
        self.token = secret("HF_TOKEN")
        if self.first:
            checkpoint.check_hub(push_to, self.token)
            tokenizer.push_to_hub(push_to, self.token)

    def __call__(self, step: int, path):
        """Send what has just been written, the checkpoint of a step."""
        if not self.first:
            return
        if self.push_to:
            self.upload = checkpoint.upload_to_hub(path, self.push_to, self.token)
        self.mirror.send()

    def sent_at(self) -> float:
        """When the newest of what is at home was sent, by the monotonic clock."""
        return self.mirror.sent_at

    def wait(self):
        """Return when all is where it belongs."""
        address = self.upload and self.upload.result()
        if address:
            print(f"last checkpoint uploaded: {address}")
        self.mirror.wait()


# ---- at the end ----------------------------------------------------------------------------------


def checks(run: train.TrainingRun, params, losses: Sequence[float], same: bool) -> dict[str, bool]:
    """What must be true of any training that went well, in words."""
    config = run.config
    expected = math.log(config.vocab_size)
    # inputs of the second half are changed: no prediction of the first half may move
    B = 1 if run.layout else config.microbatch
    T, V = config.sequence_len, config.vocab_size
    rows = np.random.default_rng(0).integers(0, V, (B, T + 1), dtype=np.int32)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    changed = np.where(np.arange(T) < T // 2, inputs, (inputs + 1) % V)

    def losses_of(inputs):
        # on one device the program of validations, which is compiled already
        losses_BT = evals.token_losses(params, train.for_training(config), inputs, targets)
        return np.asarray(losses_BT)[:, : T // 2]

    return {
        f"first loss {losses[0]:.2f} is near ln(vocabulary) = {expected:.2f}": abs(
            losses[0] - expected
        )
        < 0.5,
        f"loss went down to {losses[-1]:.2f}": losses[-1] < losses[0],
        "the saved checkpoint equals the state bit for bit": same,
        "later tokens do not change earlier predictions": np.array_equal(
            losses_of(inputs), losses_of(changed)
        ),
    }


def write_results(
    run: train.TrainingRun,
    text: TrainingText,
    wishes: Wishes,
    device: dict,
    plan: Plan,
    samples: list[str],
):
    """Add what came out to the run's results.json, and print how it compares with the plan."""
    config = run.config
    rows = read_jsonl(run.folder / "metrics.jsonl")
    _, losses = column(rows, "loss")
    _, speeds = column(rows, "tokens_per_s")
    preset = wishes.preset if wishes.preset != "auto" else pick_preset(device).name
    update_json(
        run.folder / "results.json",
        preset=preset,
        source=text.source,
        params=count_params(config)["total"],
        steps=config.num_steps,
        train_tokens=config.num_steps * config.total_batch_size,
        # the first step of a process waits for more than itself
        train_tokens_per_s=round(float(np.median(speeds[1:] or speeds))),
        train_loss=losses[-1],
        train_seconds=round(run.seconds, 1),
        compile_seconds=round(run.notes.get("compile_seconds", run.compile_seconds), 1),
        step_memory_bytes=peak_bytes(run.step_fn),
        val_bpb=run.measured.get("val_bpb"),
        val_source=text.source,
        packing_waste=data.waste(run.cursor) if run.cursor else None,
        samples=samples,
        device=device["kind"],
        devices=device["count"],
        sharding=run.layout.strategy if run.layout else "none",
        computed_in=run.notes.get("computed_in"),
        plan=plan.to_dict(),
        began=rows[0]["time"],
        jax=jax.__version__,
        python=platform.python_version(),
        commit=report.commit_id(),
    )
    tokens = config.num_steps * config.total_batch_size
    print(compare(plan, run.seconds, tokens, config.flops_per_token, run.peak_flops))
