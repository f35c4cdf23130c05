"""A run: the folder runs/NAME, the stages that a model goes through in it, and what came out.

Notebooks, chat, server, measurements and reports open a run and load its model here and nowhere
else.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from lib.config import Config
from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.files import UserError, choose, path_or_address, read_json, set_aside, write_json, writing
from lib.home import VARIABLE, Mirror, open_home, pull, remember, settled
from lib.params import templates
from lib.runtime import environment, host
from lib.train import checkpoint

__all__ = [
    "MAKERS",
    "Model",
    "RESULTS",
    "STAGES",
    "enter",
    "enter_trained",
    "load_model",
    "newest_run",
    "open_run",
    "read_results",
    "results_table",
    "stages",
    "start_afresh",
]

# stage of training: its folder of checkpoints in a run, in the order of training
STAGES = {"base": "checkpoints", "mid": "mid", "sft": "sft", "rl": "rl"}

# what stands in a run folder: the notebook that makes it
MAKERS = {"tokenizer.json": "01_tokenizer", "checkpoints": "02_train"}

# key of results.json: (label, format); a key that is not here is printed as it is
RESULTS = {
    "bytes_per_token": ("tokenizer compression, bytes/token", ".2f"),
    "vocab_size": ("vocabulary, tokens", ",d"),
    "tokenizer_s": ("tokenizer, seconds to train", ".1f"),
    "preset": ("preset", "s"),
    "source": ("trained on", "s"),
    "params": ("parameters", ",d"),
    "steps": ("steps", ",d"),
    "train_tokens": ("training tokens", ",d"),
    "train_tokens_per_s": ("training tokens/s", ",.0f"),
    "train_seconds": ("seconds of steps", ",.1f"),
    "compile_seconds": ("seconds to compile", ",.1f"),
    "step_memory_bytes": ("memory of a step, bytes", ",d"),
    "train_loss": ("training loss, nats/token", ".4f"),
    "val_bpb": ("validation bits per byte", ".4f"),
    "val_bpb_stderr": ("  its standard error", ".4f"),
    "gzip_bpb": ("  gzip -9 on the same bytes", ".4f"),
    "xz_bpb": ("  xz -9 on the same bytes", ".4f"),
    "val_bytes": ("  those bytes", ",d"),
    "val_source": ("  of", "s"),
    "stage": ("stage reached", "s"),
    "device": ("device", "s"),
    "devices": ("devices", ",d"),
    "sharding": ("shared by", "s"),
    "computed_in": ("steps computed in", "s"),
    "jax": ("jax", "s"),
    "python": ("python", "s"),
    "commit": ("commit of the code", "s"),
}

# what is no figure for people
HIDDEN = ("began",)


# ---- the folder ----------------------------------------------------------------------------------


def open_run(name: str, needs: str = "", runs_dir: str | Path = "runs") -> Path:
    """The folder runs/NAME, made if missing; with `needs` it must hold that file or folder already.

    An empty name stands for the run whose `needs` changed last.
    """
    if not name and needs:
        return newest_run(runs_dir, holding=needs)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"run name {name!r} cannot name a folder: use letters, digits, . _ and -")

    run = Path(runs_dir) / name
    if needs and not (run / needs).exists():
        raise UserError(f"{run} has no {needs}: run {MAKERS[needs]}.py --run {name} first")
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
    return run


def newest_run(runs_dir: str | Path = "runs", holding: str = "config.json") -> Path:
    """The run folder whose `holding` file or folder changed last; UserError where there is none."""
    candidates = [path.parent for path in Path(runs_dir).glob(f"*/{holding}")]
    if not candidates:
        raise UserError(
            f"no run with {holding} under {Path(runs_dir).resolve()}: "
            "train one first, or pass --run NAME"
        )
    # of two that changed in the same instant the last by name, so that the answer is always the
    # same
    return max(candidates, key=lambda run: ((run / holding).stat().st_mtime, run.name))


def stages(run, only: str | None = "params") -> list[str]:
    """Those of STAGES that have a usable checkpoint in the run folder, in the order of training.

    only: the part of a checkpoint that has to be sound, None for all of it. UserError where there
    are checkpoints and all of them are damaged.
    """
    return [stage for stage, _ in _usable(Path(run), STAGES, only)]


def _usable(run: Path, names: Iterable[str], only: str | None) -> Iterator[tuple[str, Path]]:
    """(stage, its newest sound checkpoint) of these stages, those left out that have none."""
    any_usable, error = False, None
    for stage in names:
        try:
            newest = checkpoint.latest(run / STAGES[stage], only)
        except UserError as e:
            # the other stages are of use all the same
            warnings.warn(f"stage {stage} is passed over: {e}", stacklevel=4)
            error = e
            continue
        if newest:
            any_usable = True
            yield stage, newest
    if error and not any_usable:
        raise error


def enter(
    home: str,
    name: str,
    needs: str = "",
    default: str = "",
    secret: Callable[[str], str | None] = lambda name: None,
) -> tuple[Path, Mirror]:
    """(the folder of a run, what sends it home), where `home` names where runs live: `lib.home`.

    secret: of Colab's or Kaggle's, by name. What another machine left at home is brought first.
    `needs` and an empty name: as in `open_run`, but with a `default` a run of that name is begun
    where there is none that has what it needs.
    """

    def token() -> str | None:
        return secret("HF_TOKEN")

    home = settled(home, environment(VARIABLE), secret if host() else None)
    place = open_home(home, token)
    remember(home)
    name = pull(place, name, token)
    if not name and default:
        held = any(Path(place.runs_dir).glob(f"*/{needs}"))
        name = "" if held else default
    folder = open_run(name, "" if default and name else needs, place.runs_dir)
    return folder, Mirror(place, folder, token)


# of results.json: what 01 and the machine say, and no training
LASTING = (
    "bytes_per_token",
    "vocab_size",
    "compression",
    "tokenizer_s",
    "device",
    "devices",
    "jax",
    "python",
    "commit",
)


def start_afresh(run, stage: str = "base") -> Path:
    """Move a stage's work, and what was measured of it and of later stages, into RUN/old-N.

    No figure of the old model then stands under the new one's name. The tokenizer stays.
    """
    names = list(STAGES)
    later = names[names.index(stage) :]
    moved = [STAGES[name] for name in later] + [f"evals/{name}.json" for name in later]
    moved += ["plots/tasks.png", "plots/fine_tuning.png", "plots/kinds.png", "report.html"]
    if stage == "base":
        moved += ["metrics.jsonl", "config.json", "trace", "plots/training.png"]
        moved += ["plots/surprise.png", "evals"]

    path = Path(run) / "results.json"
    results = read_json(path) if path.exists() else {}
    old = set_aside(run, *moved)
    if results:
        write_json(old / "results.json", results)
        prefixes = tuple(f"{name}_" for name in later)
        kept = {name: value for name, value in results.items() if not name.startswith(prefixes)}
        if stage == "base":
            kept = {name: results[name] for name in LASTING if name in results}
        write_json(path, kept)
    print(f"fresh start: what was there is now in {old}")
    return old


def enter_trained(
    home: str, name: str, ckpt: str, secret: Callable[[str], str | None] = lambda name: None
) -> tuple[Path, Mirror]:
    """`enter` for what begins with a trained model: `ckpt` as in `load_model`.

    Where there is none, the ways to get one are named.
    """
    if ckpt.startswith("hf://"):
        return enter(home, name or ckpt.rpartition("/")[2], secret=secret)
    needs = "checkpoints" if ckpt in ("", "best") else "tokenizer.json"
    try:
        return enter(home, name, needs, secret=secret)
    except UserError as e:
        raise UserError(
            f"{e}; a model comes from 02_train, from another tab or machine by the same home as "
            "there, or from the Hub with ckpt=hf://USER/NAME"
        ) from None


# ---- the model -----------------------------------------------------------------------------------


class Model(NamedTuple):
    """A trained model with all that is needed to use it."""

    params: dict
    config: Config
    tokenizer: Tokenizer
    meta: dict  # of the checkpoint: step, metric, settings, ...
    stage: str  # which of STAGES made it; "base" where the path does not say
    path: str


def load_model(run, ckpt: str = "", stage: str = "") -> Model:
    """The model of a run folder, its parameters on the device.

    ckpt: empty for the newest checkpoint of the stage, "best" for the one of lowest validation
    loss, or a checkpoint's own path or address (gs://..., hf://USER/NAME). stage: one of STAGES, or
    empty for the furthest that the run has. The tokenizer is the run's; for hf:// the repository's.
    """
    # a training that goes on meanwhile may prune the checkpoint that was newest
    return checkpoint.retried(lambda: _load(Path(run), ckpt, stage))


def _load(run: Path, ckpt: str, stage: str) -> Model:
    if ckpt in ("", "best"):
        stage, path = _choose_stage(run, stage)
        if ckpt == "best":
            path = _best(run / STAGES[stage])
    else:
        path = path_or_address(ckpt)
        stage = stage or _stage_of(str(path))

    repository = ckpt.removeprefix("hf://")
    tokenizer = load_tokenizer(f"hf:{repository}" if ckpt.startswith("hf://") else run)
    meta = checkpoint.read_meta(path)
    if not isinstance(meta.get("config"), dict) or "tokenizer" not in meta:
        raise UserError(
            f"{path}/meta.json tells no model's config and tokenizer: name a checkpoint that "
            "02_train.py or 04_eval_chat.py has written"
        )
    if meta["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"{path} was trained with another tokenizer than {run} has: name the run it belongs to"
        )
    config = _config(path, meta)
    params, _ = checkpoint.restore(path, templates(config), only="params")
    return Model(jax.device_put(params), config, tokenizer, meta, stage, str(path))


def _config(path, meta: dict) -> Config:
    """The config of a checkpoint; the UserError of a bad one names the file."""
    try:
        return Config.from_dict(meta["config"])
    except UserError as e:
        raise UserError(f"{path}/meta.json: {e}") from e


def _choose_stage(run: Path, stage: str) -> tuple[str, Path]:
    """(the stage asked for, or else the furthest, its newest checkpoint); UserError where the run
    does not have it.
    """
    names = [choose("stage", stage, tuple(STAGES))] if stage else reversed(STAGES)
    # the first one is taken, and no file of the others is read
    chosen = next(_usable(run, names, "params"), None)
    if chosen:
        return chosen

    trained = stages(run)
    if not trained:
        raise UserError(
            f"no checkpoint in {run}: train one with 02_train.py --run {run.name} first"
        )
    raise UserError(
        f"{run} has no {stage} checkpoint, only {', '.join(trained)}: run that stage first"
    )


def _best(store: Path):
    """The checkpoint of the lowest validation loss in a stage's folder."""
    path = checkpoint.best(store)
    if path is None:
        raise UserError(
            f"no checkpoint in {store} was validated, so none is best: leave ckpt empty for the "
            "newest"
        )
    return path


def _stage_of(path: str) -> str:
    """The stage that the folder above a checkpoint names, else "base"."""
    parent = str(path).rstrip("/").split("/")[-2:][0]
    return next((stage for stage, name in STAGES.items() if name == parent), "base")


# ---- results -------------------------------------------------------------------------------------


def read_results(run) -> dict:
    """What RUN/results.json holds, empty where there is none; UserError where it is damaged."""
    path = Path(run) / "results.json"
    if not path.exists():
        return {}
    cure = "delete it, and run again what writes it"
    results = read_json(path, cure=cure)
    for key, value in results.items():
        if value is not None and not _is_due(key, value):
            raise UserError(f"{path} is damaged, {key} is no such figure: {cure}")
    return results


def _is_due(key: str, value) -> bool:
    """Whether a value is of the kind that its key has in results.json."""
    if key == "samples":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if key == "plan":
        return isinstance(value, dict)
    if key not in RESULTS:
        return True
    kinds = {"s": str, "d": int, "f": int | float}
    return isinstance(value, kinds[RESULTS[key][1][-1]])


def results_table(run) -> str:
    """The figures and samples in RUN/results.json as text."""
    results = read_results(run)
    if not results:
        raise UserError(
            f"no figures in {Path(run) / 'results.json'}: run 01_tokenizer.py, 02_train.py and "
            f"04_eval_chat.py --run {Path(run).name} first"
        )

    by_task = _by_task(results)
    table = _figures(results, by_task)
    width = max((len(label) for label, _ in table), default=0)
    lines = [f"{label:<{width}}  {value:>14}" for label, value in table]
    lines += _stage_lines(by_task, width)
    lines += [f"\nsample: {sample}" for sample in results.get("samples") or ()]
    return "\n".join(lines)


def _figures(results: dict, by_task: dict) -> list[tuple[str, str]]:
    """(label, value) of what is one number or word, less what was measured by task and stage."""
    # the known figures first, in their own words
    figures = []
    for key, (label, spec) in RESULTS.items():
        if results.get(key) is not None:
            figures.append((label, format(results[key], spec)))

    shown = {f"{stage}_{task}" for task, stages in by_task.items() for stage in stages}
    for key, value in results.items():
        known = key in RESULTS or key in HIDDEN or key in shown
        if not known and isinstance(value, int | float | str):
            figures.append((key, f"{value:.6g}" if isinstance(value, float) else str(value)))
    return figures


def _by_task(results: dict) -> dict[str, dict[str, float]]:
    """What was measured after each stage (`sft_spelling`), as {task: {stage: figure}}."""
    by_task: dict[str, dict[str, float]] = {}
    for key, value in results.items():
        stage, _, task = key.partition("_")
        if stage in STAGES and isinstance(value, int | float):
            by_task.setdefault(task, {})[stage] = value
    return by_task


def _stage_lines(by_task: dict, width: int) -> list[str]:
    """A table of tasks by stages, under a heading; nothing where no stage was measured."""
    measured = {stage for figures in by_task.values() for stage in figures}
    columns = [stage for stage in STAGES if stage in measured]
    if not columns:
        return []
    lines = ["", f"{'after each stage':<{width}}" + "".join(f"{c:>9}" for c in columns)]
    for task, figures in by_task.items():
        cells = [f"{figures[c]:.4g}" if c in figures else "" for c in columns]
        label = task.replace("_", " ")
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>9}" for cell in cells))
    return lines
