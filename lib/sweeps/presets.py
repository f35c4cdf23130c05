"""Sweeps to start from: search, miniseries, isoflop and ablate, each at a budget that names the
hardware it is meant for.

A budget holds constants of every trial (model family, rates, data) and each preset's ranges.
"smoke" is for tests; "small" is for two CPU cores and minutes; "chip" for one accelerator and about
a day a preset. All of them are plain wandb sweeps.
"""

from pathlib import Path

from lib.config import PRESETS as CONFIG_PRESETS
from lib.config import Config
from lib.files import UserError, choose
from lib.sweeps.space import PARTS, check, load, varied, with_constants

# rates ten times nanochat's, as in the cpu_demo preset of lib.config: batches and horizons are a
# hundred times smaller
_CPU = dict(
    sequence_len=256,
    scan_layers=False,
    loss_chunk=1024,
    matrix_lr=0.2,
    embedding_lr=3.0,
    unembedding_lr=0.08,
    adamw_lr=0.02,
    warmup_steps=10,
    aspect_ratio=12,
    head_dim=12,
    total_batch_size=1024,
    microbatch=4,
)
# for models that are not to come in many sizes
_WIDE = dict(aspect_ratio=24, head_dim=24)
# what a test can wait for
_TINY = dict(
    sequence_len=64,
    total_batch_size=128,
    microbatch=2,
    warmup_steps=1,
    eval_bytes=3000,
    evals=2,
)

# constants of all presets; per preset its ranges, and constants of its own under fixed
BUDGETS = {
    # seconds, to see that everything works
    "smoke": dict(
        constants=_CPU | _TINY,
        search=dict(depth=2, num_steps=6, run_cap=4, min_iter=1),
        miniseries=dict(depths=[1, 2, 3, 4], tokens_per_param=0.02, seeds=1, fixed=_WIDE),
        isoflop=dict(depths=[1, 2, 3, 4], flops=[4e8, 8e8, 1.6e9], fixed=_WIDE),
        ablate=dict(depth=2, target_flops=1e9, seeds=2),
    ),
    # minutes on two CPU cores
    "small": dict(
        constants=_CPU | dict(eval_bytes=100_000, evals=2),
        search=dict(
            depth=3,
            num_steps=240,
            run_cap=24,
            min_iter=1,
            fixed=_WIDE | dict(evals=8),
        ),
        miniseries=dict(depths=[2, 3, 4, 5, 6], tokens_per_param=5.0, seeds=1),
        isoflop=dict(depths=[2, 3, 4, 5, 6], flops=[3e11, 6e11, 1.2e12, 2e12]),
        # both optimizers' rates are the best by factors of two, so that Muon is not compared with a
        # bad guess
        ablate=dict(
            depth=3,
            target_flops=1.2e12,
            seeds=3,
            fixed=_WIDE | dict(matrix_lr=0.4, adamw_lr=0.04),
        ),
    ),
    # about a day on one accelerator, each
    "chip": dict(
        constants=dict(microbatch=4, eval_bytes=4_000_000, evals=10),
        search=dict(depth=8, run_cap=48, min_iter=1),
        miniseries=dict(depths=[4, 6, 8, 10, 12, 14], tokens_per_param=12.0, seeds=1),
        isoflop=dict(depths=[4, 6, 8, 10, 12, 14], flops=[1e17, 3e17, 1e18, 3e18]),
        ablate=dict(depth=8, target_flops=3e17, seeds=3),
    ),
}


def _around(rate: float, factor: float = 8.0) -> dict:
    """The entry of a parameter that is drawn from eight times less to eight times more."""
    return dict(distribution="log_uniform_values", min=rate / factor, max=rate * factor)


def _search(b: dict, constants: dict) -> dict:
    """The rates and the schedule, around the budget's own, weeded out by hyperband."""

    def around_default(name: str) -> dict:
        return _around(constants.get(name, getattr(Config, name)))

    parameters = dict(
        matrix_lr=around_default("matrix_lr"),
        embedding_lr=around_default("embedding_lr"),
        unembedding_lr=around_default("unembedding_lr"),
        warmdown_ratio=dict(min=0.2, max=1.0),
        weight_decay=around_default("weight_decay"),
        depth=dict(value=b["depth"]),
    )
    # else the depth decides
    if "num_steps" in b:
        parameters["num_steps"] = dict(value=b["num_steps"])
    return dict(
        method="bayes",
        run_cap=b["run_cap"],
        early_terminate=dict(type="hyperband", min_iter=b["min_iter"], eta=2),
        parameters=parameters,
    )


def _seeds(count: int) -> dict:
    """The entry of the seed: one, or so many in a row."""
    if count == 1:
        return dict(value=42)
    return dict(values=list(range(42, 42 + count)))


def _miniseries(b: dict, constants: dict) -> dict:
    """Models of growing depth, each trained on as many tokens per parameter."""
    return dict(
        method="grid",
        parameters=dict(
            depth=dict(values=b["depths"]),
            tokens_per_param=dict(value=b["tokens_per_param"]),
            seed=_seeds(b["seeds"]),
        ),
    )


def _isoflop(b: dict, constants: dict) -> dict:
    """Every depth at every compute budget (Chinchilla's second approach, arXiv:2203.15556)."""
    return dict(
        method="grid",
        parameters=dict(
            target_flops=dict(values=b["flops"]),
            depth=dict(values=b["depths"]),
        ),
    )


def _ablate(b: dict, constants: dict) -> dict:
    """The whole model, and without one part at a time, at equal FLOPs, each with the same seeds."""
    return dict(
        method="grid",
        parameters=dict(
            without=dict(values=list(PARTS)),
            seed=_seeds(b["seeds"]),
            depth=dict(value=b["depth"]),
            target_flops=dict(value=b["target_flops"]),
        ),
    )


PRESETS = {"search": _search, "miniseries": _miniseries, "isoflop": _isoflop, "ablate": _ablate}


def preset(name: str, budget: str = "small", **constants) -> dict:
    """The checked sweep of a preset at a budget; `constants` (Config fields, space.SETTINGS) win
    over the budget's.
    """
    make = choose("sweep preset", name, PRESETS)
    entry = choose("budget", budget, BUDGETS)
    ranges = entry[name]
    defaults = entry["constants"] | ranges.get("fixed", {})

    # the ranges lie around what the trials would have without a sweep
    spec = make(ranges, defaults | constants)
    return _complete(check(dict(name=name) | spec), defaults, constants)


def from_file(path, budget: str = "small", **constants) -> dict:
    """The checked sweep of a YAML or JSON file, named after it. What it leaves open comes from
    `budget`: one of BUDGETS, or a preset of lib.config, so that its trials are runs of 02_train
    with that preset.
    """
    spec = load(path)
    choices = {name: entry["constants"] for name, entry in BUDGETS.items()}
    defaults = choose("budget", budget, choices | CONFIG_PRESETS)
    return _complete(dict(name=Path(path).stem) | spec, defaults, constants)


def _complete(spec: dict, defaults: dict, constants: dict) -> dict:
    """The checked sweep with `constants` in place of its own, and `defaults` where it has none."""
    clash = [name for name in constants if name in varied(spec)]
    if clash:
        raise UserError(
            f"{', '.join(clash)} is what the sweep {spec['name']} varies: "
            "leave it out of the overrides"
        )
    overrides = {name: {"value": value} for name, value in constants.items()}
    spec = spec | {"parameters": spec["parameters"] | overrides}
    return check(with_constants(spec, defaults))
