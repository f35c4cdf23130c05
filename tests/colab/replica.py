"""Colab's and Kaggle's TPU machines, rebuilt from the package lists that they publish (pins.toml).

A replica has the very versions of the list and nothing else: no editable install, no `lib` on the
path, no TPU. `open_runtime` makes a fresh one, as a user gets it, and `run_all` does what the user
does in it. By hand:

    .venv/bin/python tests/colab/replica.py --list           what there is, and its Python
    .venv/bin/python tests/colab/replica.py colab-2026.08    make one, and say where it is
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import NamedTuple

import nbformat
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Compiled programs, and the replicas that were made by hand; uv and pip cache where they always do.
CACHE = ROOT / ".cache" / "colab"
# Environment variables that a replica inherits: how this machine reaches its package index.
INHERITED = re.compile(r"PIP_|SSL_|REQUESTS_|https?_proxy$|no_proxy$|LANG$|LC_", re.IGNORECASE)
IGNORED = ("ls-files", "-z", "--cached", "--others", "--exclude-standard")


class Image(NamedTuple):
    """One [[image]] of pins.toml."""

    name: str
    kind: str  # colab, kaggle, or another for a machine of one's own
    date: str  # of the list
    python: str
    source: str  # where the list was published
    about: str
    packages: tuple[str, ...]  # name==version


class Runtime(NamedTuple):
    """A machine as a user gets it."""

    image: Image
    python: Path
    version: str  # of the Python that could be had
    content: Path  # the folder in which notebooks start
    env: dict[str, str]


def images() -> dict[str, Image]:
    """The images of pins.toml by name, the newest Colab first."""
    known = {}
    for table in tomllib.loads((HERE / "pins.toml").read_text())["image"]:
        table |= {"date": str(table["date"]), "packages": tuple(table["packages"].split())}
        known[table["name"]] = Image(**table)
    return known


# ---- the Python and the packages -----------------------------------------------------------------


def uv() -> str:
    """The path of uv, which makes an environment of cached wheels in a second."""
    beside = Path(sysconfig.get_path("scripts")) / "uv"
    path = str(beside) if beside.exists() else shutil.which("uv")
    if path is None:
        raise SystemExit("uv is missing: run bash run_tests.sh --setup-only first")
    return path


@functools.cache
def find_python(wanted: str) -> tuple[str, str]:
    """(path, version) of a Python of the minor version `wanted`, or else of an older one.

    Looked for on the PATH, among pyenv's versions, and by uv, which fetches one where it can.
    """
    minor = ".".join(wanted.split(".")[:2])
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for name in dict.fromkeys((minor, "3.12", "3.11")):
        candidates = [shutil.which(f"python{name}"), *pyenv.glob(f"{name}.*/bin/python")]
        asked = subprocess.run([uv(), "python", "find", name], capture_output=True, text=True)
        candidates.append(asked.stdout.strip())
        for candidate in filter(None, candidates):
            version = _version(candidate)
            if version.startswith(f"{name}."):
                return str(candidate), version
    raise SystemExit(f"no Python {wanted}, 3.12 or 3.11 on the PATH, in pyenv or from uv")


def _version(python) -> str:
    """The full version of an interpreter, empty where it does not start, as pyenv's shims may."""
    code = "import platform; print(platform.python_version())"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def open_runtime(image: Image, folder: Path) -> Runtime:
    """A fresh machine in `folder`: its packages, a home, an empty folder to work in, no more."""
    base, version = find_python(image.python)
    venv, content, home = folder / "python", folder / "content", folder / "home"
    python = venv / "bin" / "python"

    _call([uv(), "venv", "--quiet", "--clear", "--python", base, venv])
    runtime = Runtime(image, python, version, content, {})
    install(runtime, *image.packages)

    _stand_in(image, next(venv.glob("lib/python*/site-packages")), home)
    content.mkdir(parents=True, exist_ok=True)
    env = _environment(image, venv, home) | _repository(folder / "origin")
    return runtime._replace(env=env)


def _call(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[:5]))} ...: {done.stdout}{done.stderr}")


def _stand_in(image, packages: Path, home: Path):
    """Put the stand-in modules into site-packages; Colab's kernel starts with its own loaded."""
    startup = home / ".ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    if image.kind == "colab":
        shutil.copytree(HERE / "stand_in" / "google", packages / "google", dirs_exist_ok=True)
        (startup / "00-colab.py").write_text("import google.colab\n")
    if image.kind == "kaggle":
        shutil.copy(HERE / "stand_in" / "kaggle_secrets.py", packages)


def _environment(image, venv: Path, home: Path) -> dict[str, str]:
    """The environment variables of the machine's processes: nothing in them helps us."""
    named = {"colab": "COLAB_RELEASE_TAG", "kaggle": "KAGGLE_KERNEL_RUN_TYPE"}
    place = {named[image.kind]: image.name} if image.kind in named else {}
    inherited = {name: value for name, value in os.environ.items() if INHERITED.match(name)}
    own = {
        "PATH": f"{venv}/bin:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(home),
        "IPYTHONDIR": str(home / ".ipython"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else debugpy warns of our Python at every start
        # Compiled programs and wheels are kept between tests, though a user starts without any.
        "PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache" / "pip")),
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return inherited | place | own


def _repository(origin: Path) -> dict[str, str]:
    """Make a repository of this tree as it is; return the git settings that lead there.

    With them, the address that the notebooks fetch from stands for that repository.
    """
    listed = subprocess.run(
        ["git", "-C", ROOT, *IGNORED], capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        # a file may be listed and deleted
        if (ROOT / name).is_file():
            (origin / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, origin / name)
    git = [
        "git",
        "-C",
        str(origin),
        "-c",
        "user.name=replica",
        "-c",
        "user.email=replica@localhost",
    ]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "as it is"]):
        _call([*git, *command])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{origin.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": project["urls"]["Repository"],
    }


def installed(runtime: Runtime) -> dict[str, str]:
    """Versions by name of the packages that are installed in it now."""
    code = (
        "import importlib.metadata, json; "
        "print(json.dumps({d.name: d.version for d in importlib.metadata.distributions()}))"
    )
    done = subprocess.run([runtime.python, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def install(runtime: Runtime, *requirements: str):
    """Install in a replica exactly these, without what they depend on.

    uv links the files from its cache, so that this takes a second from the second time on.
    """
    command = [uv(), "pip", "install", "--quiet", "--no-deps", "--python", runtime.python]
    _call([*command, *requirements])


# ---- what a user does ----------------------------------------------------------------------------


def run_all(
    runtime: Runtime,
    notebook: Path,
    settings: dict | None = None,
    before: str = "",
    cells: int = 0,
    timeout: int = 600,
):
    """Open the .ipynb, fill in the form, press Run all; return the notebook with its outputs.

    settings: values of the form's fields. before: code that the kernel runs first. cells: stop
    after so many code cells (0: run all). A cell that fails raises nbclient's CellExecutionError.
    """
    opened = nbformat.read(notebook, as_version=4)
    if cells:
        opened.cells = [cell for cell in opened.cells if cell.cell_type == "code"][:cells]
    elif settings:
        tags = [cell.metadata.get("tags", ()) for cell in opened.cells]
        form = max(i for i, names in enumerate(tags) if "parameters" in names)
        filled = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
        opened.cells.insert(form + 1, nbformat.v4.new_code_cell(filled))
    if before:
        opened.cells.insert(0, nbformat.v4.new_code_cell(before))

    argv = [str(runtime.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager = KernelManager()
    manager._kernel_spec = KernelSpec(argv=argv, display_name="Python 3", language="python")
    resources = {"metadata": {"path": str(runtime.content)}}
    client = NotebookClient(opened, km=manager, timeout=timeout, resources=resources)
    client.execute(env=runtime.env)
    return opened


def printed(notebook) -> str:
    """Everything that the cells wrote to both streams, as the user saw it."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def run(runtime: Runtime, *args, timeout: int = 600, **env):
    """Run the runtime's Python in the folder that the notebooks fetched; return how it ended."""
    return subprocess.run(
        [runtime.python, *args],
        cwd=runtime.content / "rawchat",
        env=runtime.env | env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


if __name__ == "__main__":
    if sys.argv[1:] in ([], ["--list"]):
        for image in images().values():
            here = find_python(image.python)[1]
            print(
                f"{image.name:16} {image.date}  Python {image.python:8} here {here:8} {image.about}"
            )
            print(f"{'':16} {image.source}")
    else:
        image = images()[sys.argv[1]]
        place = CACHE / "by-hand" / image.name
        shutil.rmtree(place, ignore_errors=True)
        runtime = open_runtime(image, place)
        print(f"{runtime.python}: Python {runtime.version}, where {image.kind} has {image.python}")
        print(f"start it in {runtime.content}")
