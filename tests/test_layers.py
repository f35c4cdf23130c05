"""The plan of the house:

lower layers of lib never import higher ones, and none reads flags or the environment.
"""

import ast
import collections
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def house() -> list[set[str]]:
    """The lines of README's picture of the house: names, two blanks or more, what they are for."""
    picture = (ROOT / "README.md").read_text().split("## The house")[1].split("```")[1]
    return [set(re.split("  +", line)[0].split()) for line in picture.strip().splitlines()]


LAYERS = house()  # each imports only from the lines above its own
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
LIB = ROOT / "lib"
MODULES = sorted(p for p in LIB.rglob("*.py") if p.parent != LIB or p.stem != "__init__")
COMMANDS = {"__main__"}  # what `python -m lib.ROOM` runs: flags and the environment belong here
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(LIB)))


def module(path):
    """The name in LAYERS of a file: a package counts as one module."""
    return path.relative_to(LIB).parts[0].removesuffix(".py")


def walk(node, in_function=False):
    """(node, whether it runs only when called) for all code of a module except under `if __name__
    == "__main__"`.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "__name__" in ast.dump(child.test):
            continue
        inner = in_function or isinstance(
            child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        )
        yield child, in_function
        yield from walk(child, inner)


def imports(path):
    """(module, whether it is imported only when a function is called) of every import outside
    main.
    """
    for node, in_function in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: import from lib by its full name"
            names = [f"lib.{a.name}" for a in node.names] if node.module == "lib" else [node.module]
            yield from ((name, in_function) for name in names)


def test_the_picture_of_the_house_is_the_house():
    rooms = {module(path) for path in MODULES}
    drawn = [name for names in LAYERS for name in names]
    assert sorted(drawn) == sorted(rooms)


@each_module
def test_imports_only_lower_layers(path):
    own = module(path)
    assert own in LAYER, f"give {own} its place in README's picture of the house"
    for name, _ in imports(path):
        if name.startswith("lib.") and name.split(".")[1] != own:
            assert LAYER[name.split(".")[1]] < LAYER[own], f"{path.name} imports {name}"


@each_module
def test_heavy_imports_wait_until_used(path):
    if path.stem in COMMANDS:
        return
    heavy = {
        "wandb",
        "tensorboard",
        "matplotlib",
        "huggingface_hub",
        "pyarrow",
        "fsspec",
        "opentelemetry",
        "tyro",
        "fastapi",
        "uvicorn",
        "lm_eval",
        "yaml",
        "optuna",
        "scipy",
    }
    assert (
        heavy & {name.split(".")[0] for name, in_function in imports(path) if not in_function}
        == set()
    )


@each_module
def test_no_flags_and_no_environment(path):
    # the places where they belong; libtpu can only be told through it
    if path.stem in COMMANDS or module(path) in ("notebook", "preflight", "runtime"):
        return
    assert {"argparse", "tyro"} & {name.split(".")[0] for name, _ in imports(path)} == set()
    for node, _ in walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', '')}"
        assert not (
            isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "argv")
        ), where


def test_a_class_has_a_name_of_its_own():
    places = collections.defaultdict(list)
    for path in MODULES:
        # the model in torch bears the names that transformers' users know
        if path.name == "modeling_rawchat.py":
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path.name)
    shared = {name: files for name, files in places.items() if len(files) > 1}
    assert shared == {}
