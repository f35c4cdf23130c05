"""Programs that a second process need not trace: a warm start is then twice as quick.

jax keeps what XLA compiled on disk, but finds it only by the whole program, and to write that down
it runs our Python again: a second of a short answer's three (LOG.md). So what tracing made is kept
beside it as StableHLO (`jax.export`), by all that it depends on: shapes, settings, code, versions.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax import export

from lib.files import write_atomic
from lib.generate.decode import Chunk, decode, prefill
from lib.generate.engine import Engine
from lib.model import few_rows

LIBRARY = Path(__file__).resolve().parents[1]

# files and rooms of lib that a decoding program depends on
CODE = ("config.py", "params.py", "generate", "model", "parallel")
SOURCES = (".py", ".cc")


def keep_programs(engine: Engine, folder: Path | None):
    """Let an engine take its prefill and decoding from `folder`, and leave there what is new.

    Only on a CPU, where it was tried; None: there is no such folder, and nothing changes.
    """
    if folder is None or jax.default_backend() != "cpu":
        return
    engine.prefill = KeptProgram(prefill, folder, given_back=1)
    engine.decode = KeptProgram(decode, folder, given_back=2, chunk=True)


class KeptProgram:
    """A jitted function(params, config, *arguments, **settings) whose programs are kept on disk.

    given_back: how many of the first arguments are donated and come back changed, as `function`
    has it; with `chunk` a `Chunk` behind them.
    """

    def __init__(self, function: Callable, folder: Path, given_back: int, chunk: bool = False):
        self.function = function
        self.folder = folder
        self.given_back = given_back
        self.chunk = chunk
        # those of this process, by key
        self.programs: dict[str, Callable] = {}

    def __call__(self, params, config, *arguments, **settings):
        leaves, tree = jax.tree.flatten((params, arguments))
        kinds = [(np.shape(leaf), str(jax.dtypes.result_type(leaf))) for leaf in leaves]
        key = _key(self.function.__name__, str(tree), kinds, config.to_dict(), settings)
        if key not in self.programs:
            traced = functools.partial(self._flat, tree, config, settings)
            first = len(jax.tree.leaves(params))
            count = len(jax.tree.leaves(arguments[: self.given_back]))
            donated = tuple(range(first, first + count))
            program = _exported(self.folder / f"{key}.stablehlo", traced, leaves)
            self.programs[key] = jax.jit(program.call, donate_argnums=donated)

        # back from a list of arrays: the arguments as they were, changed
        changed = arguments[: self.given_back]
        if self.chunk:
            changed = *changed, Chunk(*Chunk._fields)
        elif self.given_back == 1:
            changed = changed[0]
        return jax.tree.unflatten(jax.tree.structure(changed), self.programs[key](*leaves))

    def _flat(self, tree, config, settings, *leaves):
        """The function from a list of arrays to one: layers by number are no names to export."""
        params, arguments = jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves(self.function(params, config, *arguments, **settings))


def _exported(path: Path, function: Callable, leaves: list) -> export.Exported:
    """What tracing `function` makes, from disk where it is there and sound."""
    with contextlib.suppress(Exception):
        return export.deserialize(bytearray(path.read_bytes()))
    # our own products: the code is part of the key
    ours = [export.DisabledSafetyCheck.custom_call(target) for target in few_rows.TARGETS]
    exported = export.export(jax.jit(function), disabled_checks=ours)(*leaves)
    # where nothing can be written, nothing is kept
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, bytes(exported.serialize()))
    return exported


def _key(*parts) -> str:
    """A name for a program: of what it is made for, of our code, and of jax."""
    text = repr([parts, jax.__version__, jax.default_backend(), _code()])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@functools.cache
def _code() -> str:
    """The checksum of all code that decoding programs come from."""
    digest = hashlib.sha256()
    for name in CODE:
        path = LIBRARY / name
        for file in [path] if path.is_file() else sorted(path.glob("*.*")):
            if file.suffix in SOURCES:
                digest.update(file.read_bytes())
    return digest.hexdigest()
