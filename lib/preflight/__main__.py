"""`python -m lib.preflight`: will it fit, how fast can it be, what will it cost.

python -m lib.preflight --depth 20 --chip v6e-1
python -m lib.preflight --preset nanochat_d24 --chip v6e-8 --strategy fsdp
python -m lib.preflight --run mine --chip v5e-1 --search
python -m lib.preflight --table
python -m lib.preflight --dashboard
python -m lib.preflight --depth 20 --chip v6e-8 --strategy zero --pay spot --launch
python -m lib.preflight --depth 20 --chip v6e-1 --rl --samples 16
"""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

ABOUT = """Will it fit, how fast can it be, what will it cost: for a TPU that isn't there.

The real training step is compiled by libtpu, on any Linux x86-64 machine (pip install libtpu);
without it an estimate from shapes answers and says so. Answers are kept in .cache/preflight."""

# published: 163.6M parameters on a Colab v6e-1 made 477k tokens/s (vorushin/tpuchat,
# 08_tpu_ablations revision 39, whose shape this is; its parameters, moments, gradients and logits
# are bfloat16, ours float32)
PUBLISHED_TOKENS_PER_S = 477e3
PUBLISHED_CHIP = "v6e-1"
PUBLISHED: dict[str, Any] = dict(
    n_layer=8,
    n_embd=1024,
    n_head=4,
    n_kv_head=1,
    head_dim=256,
    mlp="swiglu",
    mlp_dim=3072,
    vocab_size=32768,
    sequence_len=2048,
    microbatch=4,
    total_batch_size=2**17,
    window_pattern="L",
    qk_scale=1.0,
    softcap=15.0,
    resid_scales=False,
    x0_scales=False,
    value_embeds=False,
    smear=False,
    backout=False,
    optimizer="adamw",
    attention="splash",
    compute_dtype="bfloat16",
)

# ---- the options ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class WhichShape:
    """Which model: one of these three, then anything by name."""

    depth: int = 0
    """Layers; everything else follows from it"""
    preset: str = ""
    """A preset of lib.config"""
    run: str = ""
    """The configuration of a run folder"""
    overrides: str = ""
    """Config fields by name, like "microbatch=32 remat=layer" """


@dataclasses.dataclass(frozen=True)
class Where:
    """On what."""

    chip: str = "v6e-1"
    """What you would rent: v6e-1, v6e-8, v5p-8, tpu7x-8, ... (v4, v5p and tpu7x count cores, two
    a chip), a topology like v6e:2x4, or GPUs of one machine like h100-8, l4-1"""
    strategy: str = "dp"
    """On several chips: dp, zero, fsdp or tp"""
    mesh: str = ""
    """Devices per mesh axis, like "data=2 fsdp=4"; empty: all on the strategy's axis"""


@dataclasses.dataclass(frozen=True)
class Ask:
    """What to ask."""

    estimate: bool = False
    """From shapes alone, compiling nothing"""
    decode: int = 0
    """Also compile a decode step of this many rows"""
    int8: bool = False
    """With weights in int8, that decode step"""
    search: bool = False
    """Search microbatch, attention, its block, loss chunk and rematerialisation for the fastest
    that fits"""
    map: str = ""
    """Where to draw the search's heat map, like map.png"""
    table: bool = False
    """Print which depths fit on which chips instead: compiled where that was asked before, else
    from shapes"""
    dashboard: bool = False
    """Write a page of sliders and menus that estimates in a browser: dashboard.html, or --to"""
    launch: bool = False
    """Also write a file by which SkyPilot rents this and trains there: launch/RUN-CHIP.yaml, or
    --to"""
    to: str = ""
    """Where to write it"""
    calibrate: str = ""
    """A file that 06_speed wrote on such a chip: its measured ceilings instead of the data
    sheet's"""
    published: bool = False
    """Compare the bound with the published v6e-1 measurement instead"""
    rl: bool = False
    """A step of reinforcement instead: rollout, reference and learner; with --table, which depth
    and group size fit"""
    questions: int = 8
    """Of a step of reinforcement"""
    samples: int = 16
    """Answers to each of them"""
    max_tokens: int = 256
    """Of an answer"""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Time and money."""

    mfu: float = 0.4
    """Share of the chip's FLOPs assumed for the plan"""
    pay: Literal["on-demand", "flex-start", "spot", "colab"] = "on-demand"
    """How it is paid for"""
    price: float = 0.0
    """Dollars per chip and hour, instead of the table's"""
    units: float = 0.0
    """Colab compute units per hour, as its Resources panel shows"""


@dataclasses.dataclass(frozen=True)
class Args:
    which: WhichShape = WhichShape()
    where: Where = Where()
    ask: Ask = Ask()
    cost: Cost = Cost()
    json: bool = False
    """Print JSON"""


def parse(arguments: list[str] | None = None) -> Args:
    """The options of a command line."""
    flat = Annotated[Args, tyro.conf.OmitArgPrefixes]
    return tyro.cli(flat, args=arguments, prog="python -m lib.preflight", description=ABOUT)


def choose_config(which: WhichShape):
    """The config that is asked about; UserError unless it is named in exactly one way."""
    from lib.config import Config
    from lib.files import UserError
    from lib.notebook import parse_overrides

    if sum(map(bool, (which.depth, which.preset, which.run))) != 1:
        raise UserError("say which model: one of --depth N, --preset NAME and --run NAME")
    changes = parse_overrides(which.overrides, Config)
    if which.run:
        return Config.load(Path("runs") / which.run / "config.json").replace(**changes)
    if which.preset:
        return Config.preset(which.preset, **changes)
    return Config.from_depth(which.depth, **changes)


# ---- the answers ---------------------------------------------------------------------------------


def main(args: Args):
    """Answer what is asked, on standard output."""
    from lib.files import UserError
    from lib.preflight.dashboard import write_dashboard
    from lib.preflight.table import fits_table

    if args.ask.dashboard and args != Args(ask=Ask(dashboard=True, to=args.ask.to)):
        raise UserError("the dashboard shows every model and chip: ask for it alone, with --to")
    check_ask(args)
    if args.ask.dashboard:
        print(f"written: {write_dashboard(args.ask.to or 'dashboard.html')}, open it in a browser")
    elif args.ask.rl:
        reinforce(args)
    elif args.ask.table:
        print(fits_table())
    elif args.ask.published:
        compare_with_published(args)
    else:
        answer(args)


def check_ask(args: Args):
    """UserError for options that would change nothing beside the others."""
    from lib.files import UserError

    ask = args.ask
    check_instead(ask)
    # a table of reinforcement is of one chip, any other of chips of its own
    names_others = args.which != WhichShape() or (not ask.rl and args.where != Where())
    sentences = {
        "--table prints Markdown: leave --json out": ask.table and args.json,
        "--table shows models and chips of its own: leave out what names others": (
            ask.table and names_others
        ),
        "--map draws what a search finds: add --search": ask.map and not ask.search,
        "--to says where --launch or --dashboard writes: add one of them": (
            ask.to and not (ask.launch or ask.dashboard)
        ),
        "--int8 is of a decode step: add --decode ROWS": ask.int8 and not ask.decode,
        f"--decode {ask.decode}: how many rows, 1 or more": ask.decode < 0,
        "--decode is compiled, and --estimate compiles nothing: leave one out": (
            ask.decode and ask.estimate
        ),
    }
    for sentence, holds in sentences.items():
        if holds:
            raise UserError(sentence)


def check_instead(ask: Ask):
    """UserError for options of a training's step where something else is answered."""
    from lib.files import UserError

    if not (ask.rl or ask.table or ask.published):
        return
    for name in ("launch", "search", "decode", "calibrate"):
        if getattr(ask, name):
            raise UserError(f"--{name} is of a training: leave --rl, --table and --published out")


def check_decode(where):
    """UserError where no decode step can be compiled."""
    from lib.files import UserError
    from lib.preflight.cache import has_libtpu

    if not where.chip.is_tpu or where.chips > 1:
        raise UserError(f"--decode is compiled for one TPU chip, and {where.name} is not: v6e-1 is")
    if not has_libtpu():
        raise UserError("--decode needs TPU's compiler: pip install libtpu (Linux x86-64)")


def answer(args: Args):
    """Print the report of a step and the plan of a run, after a search where one is asked for."""
    from lib.chips import rented
    from lib.files import UserError
    from lib.preflight.calibrate import calibrated, recalibrate
    from lib.preflight.compile import as_compiled, for_chip, inspect
    from lib.preflight.estimate import estimate, report_text
    from lib.preflight.launch import check_launch
    from lib.preflight.memory import parse_mesh
    from lib.preflight.plan import Payment, plan, plan_text

    wanted = config = choose_config(args.which)
    where, mesh, strategy = (
        rented(args.where.chip),
        parse_mesh(args.where.mesh),
        args.where.strategy,
    )
    # what cannot be rented, and a file that cannot be used, are told before anything is compiled
    if args.ask.launch:
        check_launch(where, args.cost.pay)
    if args.ask.decode:
        check_decode(where)
    measured = calibrated(where.chip, args.ask.calibrate) if args.ask.calibrate else None
    if args.ask.estimate or not where.chip.is_tpu:
        config = for_chip(config, where.chip)
    else:
        config = as_compiled(config)
    found = {}
    if args.ask.search:
        before = config.to_dict()
        config, found = search_first(args, config, where, mesh)
        best = {name: value for name, value in config.to_dict().items() if value != before[name]}
        wanted = wanted.replace(**best)

    if args.ask.estimate:
        report = estimate(config, where, strategy, mesh)
    else:
        ask = args.ask
        report = inspect(config, where.name, strategy, mesh, ask.decode, int8=ask.int8)
    if measured is not None:
        report = recalibrate(report, config, where.chip, measured)
    cost = args.cost
    pay = Payment(cost.pay, cost.price, cost.units)
    planned = plan(config, where.chip, where.chips, cost.mfu, pay, report.peak)

    if args.json:
        print(json.dumps(found | report.to_dict() | dict(plan=planned.to_dict())))
    else:
        print(report_text(report))
        print(plan_text(planned))
    if args.ask.launch and not report.fits:
        raise UserError(
            f"nothing is written for --launch, as this does not fit on {where.name}: "
            "--search finds what does, and so do more chips"
        )
    if args.ask.launch:
        launch(args, wanted, where, planned)


def launch(args: Args, config, where, planned):
    """Write a file for SkyPilot and say where it is, beside the answer."""
    from lib.preflight.launch import Launch, default_run, write_launch

    typed = shlex.join(["python", "-m", "lib.preflight", *sys.argv[1:]])
    asked = Launch(
        config,
        where,
        args.where.strategy,
        args.where.mesh,
        args.cost.pay,
        default_run(args.which),
        not args.which.run,
        typed,
    )
    path = write_launch(asked, planned, args.ask.to)
    print(f"launch      {path}: its first lines say how", file=sys.stderr if args.json else None)


def reinforce(args: Args):
    """Print what a step of reinforcement needs on one chip, or which depths and groups fit."""
    from lib.files import UserError
    from lib.preflight.reinforce import Rounds, group_table, needs, needs_text
    from lib.preflight.table import DEPTHS

    ask = args.ask
    if min(ask.questions, ask.samples, ask.max_tokens) < 1:
        raise UserError("questions, samples and max_tokens must be at least 1")
    rounds = Rounds(ask.questions, ask.samples, max_tokens=ask.max_tokens)
    if ask.table:
        print(group_table(args.where.chip, DEPTHS, rounds))
        return
    step = needs(choose_config(args.which), args.where.chip, rounds, not ask.estimate)
    print(json.dumps(step.to_dict()) if args.json else needs_text(step, rounds))


def search_first(args: Args, config, where, mesh):
    """(the fastest config that a search finds, the search as JSON); UserError where none fits.

    Prints it, unless JSON is wanted.
    """
    from lib.files import UserError, local_path
    from lib.pictures import check_format, show
    from lib.preflight.cache import has_libtpu
    from lib.preflight.compile import inspect
    from lib.preflight.estimate import available_bytes
    from lib.preflight.search import search, search_text, undecided, undecided_text
    from lib.preflight.table import heat_map

    # told before minutes are spent
    if args.ask.map:
        check_format(args.ask.map)

    def verify(candidate):
        return inspect(candidate, where.name, args.where.strategy, mesh)

    compiling = has_libtpu() and where.chip.is_tpu and not args.ask.estimate
    result = search(config, where, args.where.strategy, mesh, verify if compiling else None)
    if not args.json:
        print(search_text(result))
    available = available_bytes(where.chip)
    if where.chip.is_tpu and not args.json:
        for row in undecided(result, available):
            print(undecided_text(row, available, compile_command(args, row.fields)))
    if args.ask.map:
        # standard output is the answer's alone where a program reads it
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            show(heat_map(result), local_path(args.ask.map))
    if result.best is None:
        raise UserError(
            f"nothing that was searched fits on {where.name}: take fewer parameters, or more chips"
        )
    return config.replace(**result.best), dict(search=result.to_dict())


def compile_command(args: Args, fields: dict) -> str:
    """The command that compiles what was asked about, with other values of some fields."""
    which, where = args.which, args.where
    kept = [word for word in which.overrides.split() if word.partition("=")[0] not in fields]
    overrides = [*kept, *(f"{name}={value}" for name, value in fields.items())]
    options = dict(
        depth=which.depth,
        preset=which.preset,
        run=which.run,
        overrides=" ".join(overrides),
        chip=where.chip,
        strategy=where.strategy if where.strategy != Where.strategy else "",
        mesh=where.mesh,
    )
    words = [("--" + name, str(value)) for name, value in options.items() if value]
    return shlex.join(["python", "-m", "lib.preflight", *(w for pair in words for w in pair)])


def compare_with_published(args: Args):
    """Print how far a published measurement is from its bound."""
    from lib.chips import tpu_slice
    from lib.config import Config
    from lib.files import UserError
    from lib.notebook import parse_overrides
    from lib.preflight import roofline
    from lib.preflight.compile import inspect
    from lib.preflight.estimate import estimate, report_text

    which = args.which
    if which.depth or which.preset or which.run or args.where != Where():
        raise UserError(
            "--published is of one shape on one chip: leave out what names others "
            "(--overrides may change the shape's settings)"
        )
    changes = parse_overrides(which.overrides, Config)
    config, where = Config(**PUBLISHED | changes), tpu_slice(PUBLISHED_CHIP)
    if args.ask.estimate:
        report = estimate(config, where)
    else:
        report = inspect(config, where.name)
    if args.json:
        print(json.dumps(report.to_dict()))
        return

    seconds = config.total_batch_size / PUBLISHED_TOKENS_PER_S
    share = PUBLISHED_TOKENS_PER_S / report.tokens_per_s
    print(report_text(report))
    print(
        f"published   {PUBLISHED_TOKENS_PER_S:,.0f} tokens/s measured: {share:.1%} of this bound "
        f"({roofline.mfu(config, seconds, where.chip):.1%} MFU as counted here)"
    )


# ---- the command ---------------------------------------------------------------------------------


@contextlib.contextmanager
def ending_at_ctrl_c():
    """Within it Ctrl-C ends the process at once, with one line and code 130.

    Python would wait until libtpu has compiled, for minutes. So a thread waits for the signal,
    which arrives through a pipe. What was being compiled leaves nothing: temporary files are in a
    folder that goes too, and a kept answer is written whole or not at all.
    """
    folder = tempfile.mkdtemp(prefix="preflight-")
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wait():
        if os.read(reader, 1) == b"\0":
            return
        print("\nstopped: nothing of this answer is kept", file=sys.stderr, flush=True)
        # whoever compiles may complain that its files are gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(130)

    # a handler of Python's own, so that the signal is written to the pipe and does nothing else
    handler = signal.signal(signal.SIGINT, lambda number, frame: None)
    before, tempfile.tempdir = tempfile.tempdir, folder
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, handler)
        tempfile.tempdir = before
        os.write(writer, b"\0")
        waiting.join()
        os.close(reader)
        os.close(writer)
        shutil.rmtree(folder, ignore_errors=True)


def command():
    """Run the command: a UserError is one sentence and code 2."""
    args = parse()
    with ending_at_ctrl_c():
        # jax reads its platform when it is imported
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from lib.files import UserError

        # what jax's cache on disk holds for a TPU can only be loaded where there is one
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        try:
            main(args)
        except UserError as e:
            print(f"Error: {e}", file=sys.stderr)
            raise SystemExit(2) from None


if __name__ == "__main__":
    command()
