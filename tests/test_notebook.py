"""lib/notebook.py: flags, the run folder, errors, results, plots, secrets, devices."""

import subprocess
import sys

import pytest

from lib import notebook, runtime
from lib.config import Config
from lib.files import UserError
from tests.helpers import ROOT, programs

SOURCE = """# %% [markdown]
# # A title
# %% tags=["parameters"]
# @title Parameters
# @markdown Layers; all else
# @markdown follows
depth = 4  # @param {type:"integer"}
rate = 1  # @param {type:"number"}
minutes = None  # @param {type:"number"}
name = "it's # fine"  # @param {type:"string"}
mode = "a"  # @param ["a", "b"]
data = ""  # @param ["", "x"] {allow-input: true}
size = 2  # @param [1, 2] {type:"raw"}
log = False  # @param {type:"boolean"}
# %%
other = 3
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "09_test.py"
    path.write_text(SOURCE)
    return {"__file__": str(path)}


def test_flags_default_to_the_cell(script):
    assert notebook.flags(script, []) == dict(
        depth=4, rate=1, minutes=None, name="it's # fine", mode="a", data="", size=2, log=False
    )


@pytest.mark.parametrize(
    "args, expected",
    [
        ("--depth 6 --log", dict(depth=6, log=True)),
        ("--depth=6 --no-log", dict(depth=6, log=False)),
        ("--rate 0.5 --minutes 2", dict(rate=0.5, minutes=2.0)),
        ("--mode b --data my/*.txt --size 1", dict(mode="b", data="my/*.txt", size=1)),
    ],
)
def test_flags_are_parsed_by_type(script, args, expected):
    got = notebook.flags(script, args.split())
    assert {k: got[k] for k in expected} == expected
    assert all(type(got[k]) is type(v) for k, v in expected.items())


@pytest.mark.parametrize(
    "args, says",
    [
        ("--dpeth 6", "--depth"),
        ("--mode c", "('a', 'b')"),
        ("--depth six", "six"),
        ("--size 3", "'3'"),
        ("6", "6"),
    ],
)
def test_wrong_flags_say_what_is_wrong(script, args, says, capsys):
    with pytest.raises(SystemExit) as stop:
        notebook.flags(script, args.split())
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_a_notebook_parses_nothing():
    assert notebook.flags({}, ["--depth", "6"]) == {}


@pytest.mark.parametrize(
    "source, says",
    [
        (SOURCE.replace('tags=["parameters"]', ""), "has none"),
        (SOURCE + SOURCE, "stands twice"),
        (SOURCE.replace("log = False  # @param", "log = False  #"), "log = False"),
    ],
)
def test_a_broken_parameters_cell_is_refused(source, says):
    with pytest.raises(ValueError, match=says):
        notebook.parameters(source)


def test_overrides():
    assert notebook.parse_overrides(
        "n_layer=3 tied_head=true, matrix_lr=1e-2 mlp=gelu", Config
    ) == dict(n_layer=3, tied_head=True, matrix_lr=0.01, mlp="gelu")
    with pytest.raises(UserError, match="unknown config field 'n_layers'.*n_layer"):
        notebook.parse_overrides("n_layers=3", Config)
    with pytest.raises(UserError, match="n_layer=x: n_layer is of type int"):
        notebook.parse_overrides("n_layer=x", Config)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v6 lite", "TPU v6e"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v4", "TPU v4"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Tesla T4", "T4"),
    ],
)
def test_chips_are_found_by_jax_names(kind, name):
    assert notebook.chip(kind).name == name


def test_device_report(capsys, monkeypatch):
    monkeypatch.setattr(runtime, "in_huge_pages", lambda: False)
    device = notebook.device_report()
    assert device["platform"] == "cpu" and device["flops"] is None and device["memory"] > 2**28
    said = capsys.readouterr().out
    assert "no MFU" in said and "huge pages" not in said
    monkeypatch.setattr(runtime, "in_huge_pages", lambda: True)
    notebook.device_report()
    assert " GiB in huge pages, " in capsys.readouterr().out


def test_secret(monkeypatch, capsys):
    monkeypatch.setenv("RAWCHAT_TEST", "value")
    assert notebook.secret("RAWCHAT_TEST") == "value"
    monkeypatch.delenv("RAWCHAT_TEST")
    assert notebook.secret("RAWCHAT_TEST") is None
    assert (
        capsys.readouterr().out
        == "RAWCHAT_TEST: from the environment\nRAWCHAT_TEST: not set, going on without\n"
    )


@pytest.mark.parametrize("place", ["colab", "kaggle"])
def test_secrets_of_a_host_come_first(monkeypatch, capsys, place):
    """Then the environment; a token is never printed."""
    secrets = {"HF_TOKEN": "from the host"}
    monkeypatch.setattr(notebook.runtime, "host", lambda: place)
    monkeypatch.setitem(notebook.SECRETS, place, secrets.__getitem__)
    monkeypatch.setenv("WANDB_API_KEY", "from outside")
    assert notebook.secret("HF_TOKEN") == "from the host"
    assert notebook.secret("WANDB_API_KEY") == "from outside"
    assert capsys.readouterr().out.splitlines() == [
        f"HF_TOKEN: from {place.title()}'s secrets",
        f"WANDB_API_KEY: not in {place.title()}'s secrets (KeyError)",
        "WANDB_API_KEY: from the environment",
    ]


@pytest.mark.slow
def test_user_errors_print_one_sentence():
    script = programs.PROGRAMS / "raise_error.py"
    mended, bug, stopped = programs.run_scripts(
        *((script, error) for error in ("bad input", "a bug", "Ctrl-C"))
    )
    assert (mended.returncode, mended.stderr) == (2, "Error: do this\n")
    assert bug.returncode == 1 and bug.stderr.startswith("Traceback")
    sentence = "stopped: run it again to go on from what was saved"
    assert (stopped.returncode, stopped.stderr.strip()) == (130, sentence)


@pytest.mark.slow
def test_user_errors_show_one_sentence_in_a_kernel():
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    imports = "from lib.notebook import setup\nfrom lib.files import UserError\n"
    cell = imports + "setup()\nraise UserError('do this')"
    cells = [nbformat.v4.new_code_cell(cell), nbformat.v4.new_code_cell("print('still going')")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with pytest.raises(CellExecutionError):  # so that "Run all" stops here
        NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(ROOT)}}).execute()
    (error,) = (o for o in cells[0].outputs if o.output_type == "error")
    assert error.traceback == ["Error: do this"] and cells[1].outputs == []


def test_a_cell_that_was_run_too_early_says_what_to_run():
    def error_of(code):
        with pytest.raises(NameError) as caught:
            exec(code, {})
        return notebook._sentence(caught.value)

    for name in ("samples", "jnp", "small_model", "folder"):
        assert error_of(f"print({name})").startswith(f"{name} is made in a cell further up")
    assert error_of("print(prnit)") == "", "a misspelt name keeps its traceback"
    assert notebook._sentence(UserError("do this")) == "do this"


def test_ranges_of_steps():
    assert notebook.parse_steps("") == (1, 0) and notebook.parse_steps("10:12") == (10, 12)
    for bad in ("abc", "12:10", "0:3", "5", "-1:2"):
        with pytest.raises(UserError, match="first:last"):
            notebook.parse_steps(bad)


@pytest.mark.parametrize("command", [["02_train.py", "--help"], ["-m", "lib.chat"]])
def test_a_python_without_packages_is_told_where_they_are(command):
    """-S leaves out what is installed, as a terminal does where nobody activated .venv."""
    done = subprocess.run(
        [sys.executable, "-S", *command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"Error: {sys.executable} has no jax")
    assert "source .venv/bin/activate" in done.stderr and done.stderr.count("\n") == 1
