"""The notebooks as users meet them: run in a Colab-like kernel, run as scripts, and in step with their .py."""

import json
import os
import re
import shutil
import subprocess
import tomllib

import nbformat
import pytest
from nbclient import NotebookClient

from lib.config import PRESETS
from lib.data import SOURCES
from lib.notebook import flags, parameters
from tests.helpers import ROOT
from tests.helpers.notebooks import NOTEBOOKS, PRODUCTS, SMOKE, check_products, script, words_of

IN_COLAB = """import sys, unittest.mock
colab = sys.modules["google.colab"] = unittest.mock.MagicMock()
colab.userdata.get.side_effect = TimeoutError  # as without a browser"""
each_notebook = pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda p: p.stem)


def repository():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def test_every_notebook_has_smoke_settings():
    assert [p.stem for p in NOTEBOOKS] == list(SMOKE)


def test_notebooks_match_their_sources():
    done = subprocess.run(
        ["bash", ROOT / "update_notebooks.sh", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_addresses_agree():
    """The Colab badges and the clone commands name the repository that pyproject.toml names."""
    ours = repository().removeprefix("https://github.com/")
    for path in [*NOTEBOOKS, ROOT / "README.md"]:
        found = re.findall(rf"github(?:\.com)?/([\w-]+/{ours.split('/')[1]})\b", path.read_text())
        assert set(found) == {ours}, path.name


@each_notebook
def test_choices_are_the_real_ones(source):
    for p in parameters(source.read_text()):
        if p.name == "preset":
            assert p.hint.__args__ == ("auto", *PRESETS)
        if p.name == "source" and p.value:
            assert all(name in p.help for name in SOURCES)


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """(working folder, environment) of a Colab runtime in which the repository's address leads to this tree."""
    origin, content = tmp_path_factory.mktemp("origin"), tmp_path_factory.mktemp("content")
    shutil.copytree(ROOT / "lib", origin / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", origin)
    git = ["git", "-C", origin, "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "copy"]):
        subprocess.run([*git, *command], check=True)
    return content, os.environ | {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{origin.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": repository(),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


@each_notebook
def test_runs_in_colab(source, colab):
    content, env = colab
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    place = next(
        i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", ())
    )
    chosen = "\n".join(f"{name} = {value!r}" for name, value in SMOKE[source.stem].items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(chosen))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(IN_COLAB))
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(content)}})
    client.execute(env=env)
    check_products(source.stem, content / "rawchat" / "runs" / "smoke")
    shown = [
        o
        for c in notebook.cells
        if c.cell_type == "code"
        for o in c.outputs
        if "image/png" in o.get("data", {})
    ]
    assert len(shown) >= sum(p.endswith(".png") for p in PRODUCTS[source.stem])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("scripts")


@each_notebook
def test_runs_as_script(source, workdir):
    args = words_of(SMOKE[source.stem])
    first = script(source, *args, cwd=workdir)
    assert first.returncode == 0, first.stdout + first.stderr
    run = workdir / "runs" / "smoke"
    check_products(source.stem, run)
    results = json.loads((run / "results.json").read_text())

    # continues a finished run: same figures, nothing lost
    again = script(source, *args, cwd=workdir)
    assert again.returncode == 0, again.stdout + again.stderr
    after = json.loads((run / "results.json").read_text())
    assert {k: after[k] for k in ("vocab_size", "val_bpb", "params") if k in results} == {
        k: results[k] for k in ("vocab_size", "val_bpb", "params") if k in results
    }


@each_notebook
def test_help_lists_every_flag_and_a_wrong_one_ends_it(source, tmp_path, capsys):
    done = script(source, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for p in parameters(source.read_text()):
        assert re.search(rf"--(no-)?{p.name.replace('_', '-')}\b", done.stdout)
        assert p.help and p.help.split(" ")[0] in done.stdout
    assert not list(tmp_path.iterdir())  # asking for help makes nothing

    name = parameters(source.read_text())[0].name
    with pytest.raises(SystemExit) as stop:
        flags({"__file__": str(source)}, [f"--{name}x", "1"])
    assert stop.value.code == 2
    assert f"--{name}" in capsys.readouterr().err.split("Perhaps you meant")[1]
