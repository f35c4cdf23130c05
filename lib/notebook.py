"""What a notebook needs around its story: flags, set-up, the device report, secrets."""

import ast
import dataclasses
import os
import platform
import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Optional

from lib import interrupts, runtime
from lib.chips import CHIPS, Chip, chip  # noqa: F401  (part of this module's public surface)
from lib.files import UserError, choose

ROOT = Path(__file__).resolve().parents[1]

# ---- where we are --------------------------------------------------------------------------------


def in_notebook() -> bool:
    """True in a Jupyter or Colab kernel (one driven by nbclient too), False in a script."""
    return runtime.shell() is not None


def in_colab() -> bool:
    """True in a Colab kernel; a script that it starts with `!python` is just a script."""
    return runtime.host() == "colab"


def setup(*extras: str):
    """Make this kernel, or this script, ready. Once, first of all, before anything imports jax.

    In a notebook: install what is missing (extras: with these optional dependencies) and the libtpu
    that the installed jax names. Everywhere: keep memory where a CPU computes, and compiled
    programs in .cache/jax, where the next run finds them, and show of a UserError only its sentence
    (a script then exits with code 2), of Ctrl-C in a script one line (code 130).
    What is ready already takes no time.
    """
    _show_sentences()
    if in_notebook():
        runtime.install_missing(ROOT / "pyproject.toml", extras)
        if runtime.host() or runtime.tpu_attached():
            runtime.mend_pair()
    runtime.quiet()
    runtime.keep_memory()
    _keep_scratch_apart()
    _keep_compiled()


def _keep_compiled():
    """Let jax find compiled programs of earlier runs, unless the environment says where to look."""
    import jax

    # jax makes the names of its options at run time
    options: Any = jax.config
    if options.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def kept_programs() -> Path | None:
    """A folder for programs beside those that jax keeps; None where it keeps none on this disk."""
    import jax

    options: Any = jax.config
    folder = options.jax_compilation_cache_dir
    return Path(folder) / "traced" if folder and "://" not in folder else None


def _keep_scratch_apart():
    """On Kaggle let .cache lead out of /kaggle/working, which is kept as the notebook's output."""
    cache = ROOT / ".cache"
    if runtime.host() == "kaggle" and not cache.exists():
        scratch = Path(tempfile.gettempdir()) / "rawchat-cache"
        scratch.mkdir(exist_ok=True)
        cache.symlink_to(scratch)


def _show_sentences():
    """Show of a UserError only its sentence, in a kernel and in a script."""
    shell = runtime.shell()
    if shell is None:
        interrupts.starting()
        sys.excepthook = _excepthook
        return

    def show_sentence(shell, kind, error, trace, tb_offset=None):
        sentence = _sentence(error)
        shown = [f"Error: {sentence}"]
        if not sentence:
            # as IPython does
            shown = shell.InteractiveTB.structured_traceback(
                kind, error, trace, tb_offset=tb_offset
            )
        shell._showtraceback(kind, error, shown)

    shell.set_custom_exc((UserError, NameError), show_sentence)


def _sentence(error: Exception) -> str:
    """What a person can do about an error in a kernel, "" where only its traceback helps."""
    if isinstance(error, UserError):
        return str(error)
    # a cell that was run before those that it builds on
    name = getattr(error, "name", None)
    if name in _made_by_cells():
        return (
            f"{name} is made in a cell further up that has not run yet: run the cells above this "
            "one first (Colab: Runtime > Run before)"
        )
    return ""


def _made_by_cells() -> set[str]:
    """The names that the notebooks' cells define."""
    names = set()
    for path in ROOT.glob("0*.py"):
        # somebody may be changing one
        try:
            cells = ast.parse(path.read_text("utf-8")).body
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in cells:
            # functions, what is imported, and what is assigned
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names |= {alias.asname or alias.name for alias in node.names}
            else:
                stored = (part for part in ast.walk(node) if isinstance(part, ast.Name))
                names |= {part.id for part in stored if isinstance(part.ctx, ast.Store)}
    return names


def _excepthook(kind, error, trace):
    """Show a script's last error: bad input and Ctrl-C in a sentence, all else with its
    traceback.
    """
    # from here on there is nothing that another Ctrl-C could spoil
    interrupts.starting()
    code = None
    if issubclass(kind, UserError):
        print(f"Error: {error}", file=sys.stderr)
        code = getattr(error, "code", 2)
    elif interrupts.caused(error):
        print(f"\n{interrupts.STOPPED}", file=sys.stderr)
        code = interrupts.INTERRUPTED
    elif interrupts.left_unread(error):
        code = interrupts.UNREAD
    else:
        sys.__excepthook__(kind, error, trace)
    # a program that has not got as far as importing it has nobody to take along
    if parallel := sys.modules.get("lib.parallel"):
        parallel.end_all(error)
    if code in (interrupts.INTERRUPTED, interrupts.UNREAD):
        interrupts.stopped(code)
    if code is not None:
        raise SystemExit(code)


def join_hosts(coordinator: str, count: int, index: int, timeout: float) -> bool:
    """Join the processes of a job as `lib.sharding.start_hosts` does ("auto": the cluster says who
    is who; empty: this is the only one).

    Returns whether this is the first, which alone writes and prints; the others say nothing but
    errors from now on.
    """
    import jax

    from lib import parallel

    if coordinator:
        parallel.start_hosts("" if coordinator == "auto" else coordinator, count, index, timeout)
    elif count > 1 or index > 0:
        raise UserError(
            f"process {index} of {count} does not know the others: give coordinator=host:port of "
            "process 0, or auto"
        )
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")
    return jax.process_index() == 0


# ---- flags ---------------------------------------------------------------------------------------


# a line of a form: its name, its value, its choices and the rest of Colab's annotation
PARAM = re.compile(r"(\w+) = (.+?) *# ?@param *(\[.*?\])? *(\{.*\})?")


class Param(NamedTuple):
    name: str
    value: object
    hint: object  # the type that the command line parses
    help: str


def parameters(source: str) -> list[Param]:
    """The variables of the cells tagged `parameters` in a notebook's percent-format source.

    Each is `name = literal  # @param …` on one line, the annotation being Colab's: a list of
    choices (open-ended with allow-input), a {type:"…"}, or both. Comment lines right above it (`#
    @markdown …` shows in Colab too) are its help. A second cell may hold what few people change.
    """
    cells = re.split(r"(?m)^(?=# %%)", source)
    forms = [cell for cell in cells if re.match(r'# %%.*tags=\[.*"parameters".*\]', cell)]
    if not forms:
        raise ValueError("a notebook has a cell tagged parameters, this one has none")

    params, comments = [], []
    for line in "".join(forms).splitlines():
        if comment := re.match(r"# (?:@markdown )?(?![@%])(.+)", line):
            comments.append(comment[1].strip())
            continue
        if match := PARAM.match(line):
            name, literal, choices, form = match.groups(default="")
            params.append(_param(name, literal, choices, form, comments))
        elif line.strip() and not line.startswith("#"):
            raise ValueError(
                f"a parameters cell holds only `name = value  # @param …` lines, not {line!r}"
            )
        comments = []
    names = [param.name for param in params]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the parameter {name} stands twice in the forms of this notebook")
    return params


def _param(name: str, literal: str, choices: str, form: str, comments: list[str]) -> Param:
    """A parameter from the parts of its line and the comments above it."""
    value = ast.literal_eval(literal)
    options = tuple(ast.literal_eval(choices or "[]"))
    named = [str(option) for option in options if option != ""]
    kind = re.search(r"type: *[\"'](\w+)", form)
    types = {"integer": int, "number": float, "boolean": bool}

    if options and "allow-input" not in form:
        hint = Literal[options]
    elif kind and kind[1] in types:
        hint = types[kind[1]]
    else:
        hint = str if value is None else type(value)
    if options and "allow-input" in form:
        comments = [*comments, f"({', '.join(named)}, or your own)"]
    if value is None:
        hint = Optional[hint]  # noqa: UP045  (the hint is made here, not written)
    return Param(name, value, hint, " ".join(comments))


def flags(namespace: dict, args: list[str] | None = None) -> dict:
    """The parameters cell's variables as set by command-line flags; {} in a notebook: there the
    cell itself is the form.

    Right after the parameters cell: `globals().update(flags(globals()))`. The cell's values are the
    defaults, `--help` lists every flag, and a wrong one ends the script with code 2 and the names
    nearest to it.
    """
    if in_notebook() or "__file__" not in namespace:
        return {}
    import tyro

    path = Path(namespace["__file__"])
    source = path.read_text()
    # what a script imports is there now
    interrupts.started()
    fields = [
        (p.name, Annotated[p.hint, tyro.conf.arg(help=p.help)], p.value) for p in parameters(source)
    ]
    title = re.search(r"(?m)^# # (.+)", source)
    return vars(
        tyro.cli(
            dataclasses.make_dataclass("Flags", fields),
            prog=path.name,
            args=args,
            description=title[1] if title else None,
        )
    )


def options(kind, prog: str, args: list[str] | None = None) -> Any:
    """Settings from the command line: those of each base of the dataclass `kind` are a group of
    `--help`, headed by the base's docstring.
    """
    import tyro

    bases = {base.__name__.lower(): base for base in kind.__bases__}
    groups = [(name, base, dataclasses.field(default=base())) for name, base in bases.items()]
    command: Any = dataclasses.make_dataclass("Options", groups)
    flat: Any = Annotated[command, tyro.conf.OmitArgPrefixes]
    about = " ".join(kind.__doc__.split())
    interrupts.started()
    chosen = tyro.cli(flat, prog=prog, args=args, description=about)
    values = {}
    for group in vars(chosen).values():
        values |= vars(group)
    return kind(**values)


def parse_overrides(text: str, cls) -> dict:
    """Fields of the dataclass `cls` from "name=value name=value", each value parsed as its field's
    type.
    """
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    pairs = [pair.partition("=") for pair in text.replace(",", " ").split()]
    words = {name: word for name, _, word in pairs}
    values = {}
    for name, word in words.items():
        kind = choose("config field", name, types)
        try:
            values[name] = (
                {"true": True, "false": False}[word.lower()] if kind is bool else kind(word)
            )
        except (ValueError, KeyError):
            raise UserError(f"override {name}={word}: {name} is of type {kind.__name__}") from None
    return values


def parse_steps(text: str) -> tuple[int, int]:
    """(first, last) of a range of steps like "10:12"; an empty text is an empty range."""
    if not text:
        return 1, 0
    if not (match := re.fullmatch(r"(\d+):(\d+)", text)) or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"trace={text!r} is not a range of steps: write first:last, like 10:12")
    return int(match[1]), int(match[2])


# ---- what a chapter shows ------------------------------------------------------------------------


def show_source(*functions):
    """Show the source of functions below a notebook's cell, coloured; a script prints nothing."""
    if not in_notebook():
        return
    import inspect

    from IPython.display import Markdown, display

    for function in functions:
        display(Markdown(f"```python\n{inspect.getsource(function)}```"))


def show_page(path):
    """Show a page that needs nothing else below a notebook's cell, with a link to keep it; a script
    prints where it is.
    """
    print(f"page: {path}")
    if not in_notebook():
        return
    import html

    from IPython.display import HTML, FileLink, display

    content = html.escape(Path(path).read_text(), quote=True)
    frame = f'<iframe srcdoc="{content}" style="width:100%;height:700px;border:0"></iframe>'
    # within a div, or IPython warns that frames have a class of their own
    display(HTML(f"<div>{frame}</div>"))
    display(FileLink(str(path), result_html_prefix="to keep it: "))


# ---- secrets -------------------------------------------------------------------------------------


def secret(name: str) -> str | None:
    """A token from Colab's or Kaggle's secrets, else from the environment, else None.

    One printed line says which; the token itself is never printed.
    """
    place = runtime.host()
    if place:
        # not granted, not there, or no browser behind this kernel: each has a class of its own
        try:
            value = SECRETS[place](name)
            print(f"{name}: from {place.title()}'s secrets")
            return value
        except Exception as e:
            print(f"{name}: not in {place.title()}'s secrets ({type(e).__name__})")
    value = os.environ.get(name) or None
    print(f"{name}: {'from the environment' if value else 'not set, going on without'}")
    return value


def _colab_secret(name: str) -> str:
    from google.colab import userdata  # pyright: ignore[reportMissingImports]

    return userdata.get(name)


def _kaggle_secret(name: str) -> str:
    from kaggle_secrets import UserSecretsClient  # pyright: ignore[reportMissingImports]

    return UserSecretsClient().get_secret(name)


SECRETS = {"colab": _colab_secret, "kaggle": _kaggle_secret}


# ---- the device ----------------------------------------------------------------------------------


def device_report() -> dict:
    """Print what this runs on and return it.

    platform, kind, count, memory (bytes per device, or of the machine), and flops (peak FLOP/s per
    device in the chip's dtype, None when unknown).
    """
    import jax

    # only one's own devices tell their memory
    device = jax.local_devices()[0]
    known = chip(device.device_kind)
    memory = (device.memory_stats() or {}).get("bytes_limit") or (
        known.memory if known else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    flops, peak = None, "peak FLOP/s not known, so no MFU"
    if known:
        flops, peak = known.flops, f"{known.flops / 1e12:.0f} {known.dtype} TFLOP/s each"
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    is_huge = device.platform == "cpu" and runtime.in_huge_pages()
    pages = " in huge pages" if is_huge else ""
    print(
        f"{jax.device_count()} x {device.device_kind} ({device.platform}{cores}), "
        f"{memory / 2**30:.1f} GiB{pages}, {peak}\n"
        f"python {platform.python_version()}, jax {jax.__version__}, {jax.process_count()} "
        "process(es)"
    )
    if device.platform == "tpu" and runtime.kernel_fault():
        print(runtime.fallback(runtime.kernel_fault()))
    elif device.platform == "cpu" and runtime.host() and runtime.version("libtpu"):
        print("note: no TPU is attached to this machine, so everything runs on its CPU")
    return dict(
        platform=device.platform,
        kind=device.device_kind,
        count=jax.device_count(),
        memory=memory,
        flops=flops,
    )
