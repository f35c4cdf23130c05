"""A file by which SkyPilot rents what was asked about and trains there: `--launch`.

SkyPilot takes any name for a TPU (`tpu-v6e-9` too), and finds out minutes later; here names come
from `lib.chips`, and what SkyPilot calls them, from a table.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from lib import chips
from lib.chips import Slice
from lib.config import Config
from lib.files import UserError, local_path, write_atomic
from lib.notebook import parse_overrides
from lib.preflight.plan import Plan

FOLDER = Path("launch")

# the version whose parser these files were read by
VERSION = "0.14"

# SkyPilot's names for Google's TPUs, and the image that their machines start from
# (https://cloud.google.com/tpu/docs/runtimes)
TPUS = {
    "v6e": ("tpu-v6e", "v2-alpha-tpuv6e"),
    "v5e": ("tpu-v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": ("tpu-v5p", "v2-alpha-tpuv5"),
    "v4": ("tpu-v4", "tpu-ubuntu2204-base"),
}

# its names for GPUs, and how many of them Google puts into one machine
GPUS = {
    "b200": ("B200", (8,)),
    "h200": ("H200", (8,)),
    "h100": ("H100", (1, 2, 4, 8)),
    "a100": ("A100-80GB", (1, 2, 4, 8)),
    "a100-40gb": ("A100", (1, 2, 4, 8)),
    "rtx-pro-6000": ("RTXPRO6000", (1, 2, 4, 8)),
    "l4": ("L4", (1, 2, 4, 8)),
    "t4": ("T4", (1, 2, 4)),
}

# The first host makes the tokenizer for all, or finds it at home; the others wait for it in 02.
TOKENIZER = """\
  if [ "$SKYPILOT_NODE_RANK" = 0 ]; then
    python 01_tokenizer.py --run "$RUN" --home "$RAWCHAT_HOME" {flags}
  fi
"""

# the preset that sets least: all else that a config has is written out
PLAIN = "nanochat_d12"

FILE = """\
# {title}
# {price}
# Written by: {command}
#
#   pip install "skypilot[gcp]>={version}"
#   sky jobs launch {path} --env RAWCHAT_HOME=gs://BUCKET/rawchat
#
# A managed job: where the machine is taken away, another is rented, and training goes on from the
# last save in the bucket. Make the bucket in the region that you rent in.
name: {name}

resources:
{resources}

# the code: this folder
workdir: .

envs:
  # where runs live; give it with --env
  RAWCHAT_HOME: null
  RUN: {run}

setup: |
  set -e
  # the images' Python is too old
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh
  [ -e .venv ] || uv venv --seed --python 3.12 .venv
  . ./setup.sh
  setup cloud

run: |
  set -e
  . .venv/bin/activate
  hosts=()
  if [ "$SKYPILOT_NUM_NODES" -gt 1 ]; then
    # each host runs this; they meet at the first one
    first=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
    hosts=(--coordinator "$first:8476" --host-count "$SKYPILOT_NUM_NODES")
    hosts+=(--host-index "$SKYPILOT_NODE_RANK" --join-timeout 3600)
    hosts+=(--checkpoints "$RAWCHAT_HOME/checkpoints/$RUN")
  fi
{tokenizer}  python 02_train.py --run "$RUN" --home "$RAWCHAT_HOME" \\
    {training} "${{hosts[@]}}"
"""


class Launch(NamedTuple):
    """What a file is written of: a model, on what, as the user asked for it."""

    config: Config
    where: Slice
    strategy: str
    mesh: str
    pay: str
    run: str  # the name of the run
    begins: bool  # whether that is a new one, which needs a tokenizer
    command: str  # the question, as it was typed


def check_launch(where: Slice, pay: str):
    """UserError for what SkyPilot cannot rent, before anything is compiled."""
    _resources(where, _is_spot(pay))


def write_launch(asked: Launch, plan: Plan, path: str | Path = "") -> Path:
    """Write the file; UserError for what `check_launch` refuses.

    path: empty for one in launch/ with a name that says what it is.
    """
    path = local_path(path or FOLDER / f"{asked.run}-{asked.where.name.replace(':', '-')}.yaml")
    write_atomic(path, launch_text(asked, plan, path))
    return path


def launch_text(asked: Launch, plan: Plan, path: Path) -> str:
    """The file as text."""
    config, where = asked.config, asked.where
    spot = _is_spot(asked.pay)
    resources = _resources(where, spot)

    # the model as flags, which make the same config again
    vocabulary = shlex.join(["--preset", PLAIN, "--vocab-size", str(config.vocab_size)])
    tokenizer = TOKENIZER.format(flags=vocabulary) if asked.begins else ""
    training = ["--preset", PLAIN, "--depth", str(config.n_layer), "--strategy", asked.strategy]
    if asked.mesh:
        training += ["--mesh", asked.mesh]
    training += ["--overrides", overrides(config)]
    kind = "spot" if spot else "on-demand"
    return FILE.format(
        title=f"{config.n_layer} layers x {config.n_embd} on {where.name}, {kind}",
        price=_price(plan),
        command=asked.command,
        version=VERSION,
        path=path.as_posix(),
        name=re.sub(r"[^a-z0-9]+", "-", f"rawchat-{asked.run}".lower()).strip("-"),
        resources=resources,
        # a name like 12 or null is a word all the same
        run=json.dumps(asked.run),
        tokenizer=tokenizer,
        training=shlex.join(training),
    )


def overrides(config: Config) -> str:
    """What 02's --overrides says, so that PLAIN at this depth becomes `config`."""
    # one that is not named would grow with the devices
    changed: dict[str, Any] = dict(microbatch=config.microbatch)
    wanted = config.to_dict()
    while True:
        # what is changed may change what the scaling rules say of the rest
        made = trained_by(config.n_layer, config.vocab_size, _words(changed)).to_dict()
        more = {name: value for name, value in wanted.items() if made[name] != value}
        if not more:
            return _words(changed)
        changed |= more


def trained_by(depth: int, vocab_size: int, changes: str) -> Config:
    """The config that 02 makes of these flags and a tokenizer."""
    fields = dict(vocab_size=vocab_size, depth=depth) | parse_overrides(changes, Config)
    return Config.preset(PLAIN, **fields)


def _words(fields: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())


def _is_spot(pay: str) -> bool:
    """Whether machines are rented that may be taken away; UserError for other ways to pay."""
    if pay not in ("spot", "on-demand"):
        raise UserError(f"a launch file rents spot or on-demand, not {pay}: pass --pay spot")
    return pay == "spot"


def _resources(where: Slice, spot: bool) -> str:
    """What is rented, as YAML."""
    name, image = _accelerator(where)
    lines = ["infra: gcp", f"accelerators: {name}"]
    if image:
        lines += ["accelerator_args:", f"  runtime_version: {image}"]
    lines += [
        f"use_spot: {str(spot).lower()}",
        "job_recovery:",
        "  # where a machine was lost, there are none at the moment",
        "  strategy: EAGER_NEXT_REGION",
        "  # a program that fails by itself is not tried for ever",
        "  max_restarts_on_errors: 3",
        "disk_size: 200",
    ]
    return "\n".join(f"  {line}" for line in lines)


def _accelerator(where: Slice) -> tuple[str, str]:
    """(what SkyPilot calls a slice, the image of its machines); "" for a GPU's own."""
    kind = re.split("[-:]", where.name)[0]
    if where.chip.is_tpu:
        if kind not in TPUS:
            raise UserError(
                f"SkyPilot {VERSION} rents no {kind}: choose one of {', '.join(TPUS)}, or see "
                "launch/README.md for gcloud"
            )
        name, image = TPUS[kind]
        return f"{name}-{_count(where, kind)}", image

    kind, _, count = where.name.rpartition("-")
    if kind not in GPUS:
        raise UserError(f"Google rents no {kind}: choose one of {', '.join(GPUS)}")
    name, counts = GPUS[kind]
    if int(count) not in counts:
        sizes = ", ".join(f"{kind}-{n}" for n in counts)
        raise UserError(f"Google rents no {where.name} in one machine: choose one of {sizes}")
    return f"{name}:{count}", ""


def _count(where: Slice, kind: str) -> int:
    """The number in a slice's name, of a topology like v6e:2x4 too."""
    _, sizes = chips.SLICES[kind]
    shape = where.topology.partition(":")[2]
    for count, known in sizes.items():
        if known == shape:
            return count
    shapes = ", ".join(sizes.values())
    raise UserError(f"no {kind} of the shape {shape} is rented: choose one of {shapes}")


def _price(plan: Plan) -> str:
    """What it takes, in a line."""
    parts = [f"{plan.tokens:,} tokens"]
    if plan.hours is not None:
        parts.append(f"{plan.hours:.1f} h at {plan.mfu:.0%} MFU (assumed)")
    if plan.cost is not None and plan.price_per_hour is not None:
        of = f"${plan.price_per_hour:.2f} an hour, lib/chips.py of {plan.prices_of}"
        parts.append(f"${plan.cost:.2f} ({of}: check it)")
    else:
        parts.append(f"price not known, lib/chips.py has no {plan.pay} price of this chip")
    return "; ".join(parts)


def default_run(which: Any) -> str:
    """The name of a run after what was asked for: d20, a preset's, or the run's own."""
    if which.depth:
        return f"d{which.depth}"
    return which.preset or which.run
