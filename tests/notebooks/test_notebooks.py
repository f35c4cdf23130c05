"""The notebooks as users meet them:

run in a Colab-like kernel, run as scripts, and in step with their .py.
"""

import json
import re
import subprocess
import tomllib

import pytest

from lib.config import PRESETS
from lib.data import SOURCES
from lib.data.packing import PACKING
from lib.interop.exports import FORMATS
from lib.notebook import flags, parameters
from lib.sweeps import presets as sweep_presets
from lib.train.finetune import MIXTURES
from lib.train.policy import PRESETS as rl_presets
from tests.helpers import ROOT, programs
from tests.helpers.notebooks import NOTEBOOKS, SMOKE, check_products, script, words_of

each_notebook = pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda p: p.stem)


def repository():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def test_every_notebook_has_smoke_settings():
    assert [p.stem for p in NOTEBOOKS] == list(SMOKE)


@pytest.mark.slow
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
def test_buttons_open_the_notebook_that_they_stand_in(source):
    """In Colab and in Kaggle, here and in the README."""
    address = f"github.com/rawchat/rawchat/blob/main/{source.stem}.ipynb"
    in_colab = f"https://colab.research.google.com/{address.replace('.com', '', 1)}"
    in_kaggle = f"https://kaggle.com/kernels/welcome?src=https://{address}"
    for path in (source, ROOT / "README.md"):
        assert in_colab in path.read_text() and in_kaggle in path.read_text(), path.name


def test_each_notebook_asks_for_the_machine_that_it_needs():
    """Training for a TPU that free accounts have; the others for nothing."""
    asked = {}
    for source in NOTEBOOKS:
        metadata = json.loads(source.with_suffix(".ipynb").read_text())["metadata"]
        asked[source.stem[:2]] = metadata.get("accelerator"), metadata["colab"].get("gpuType")
        # Kaggle has eight of them, and no code without the internet
        kaggle = metadata["kaggle"]
        assert kaggle["accelerator"] == ("tpuV5e8" if metadata.get("accelerator") else "none")
        assert kaggle["isInternetEnabled"]
    tpu = ("TPU", "V5E1")
    expected = {number: tpu for number in ("02", "03", "05", "06")}
    expected |= {number: (None, None) for number in ("01", "04")}
    assert asked == {number: expected[number] for number in asked}


def test_all_notebooks_begin_alike():
    """The cell that gets the code is one cell; only what it installs may differ."""
    first = set()
    for source in NOTEBOOKS:
        cell = source.read_text().split("# @title Get the code")[1].split("# %%")[0]
        first.add(re.sub(r"setup\(.*\)", "setup()", cell))
    assert len(first) == 1


# what each form offers, apart from an empty entry, and where the code has it
CHOICES = {
    "01_tokenizer": {"source": SOURCES, "preset": ["auto", *PRESETS]},
    "02_train": {"source": SOURCES, "preset": ["auto", *PRESETS], "packing": PACKING},
    "03_worker": {
        "source": SOURCES,
        "sweep": sweep_presets.PRESETS,
        "budget": ["auto", *sweep_presets.BUDGETS],
        "driver": ["local", "wandb"],
    },
    "04_eval_chat": {
        "mid": ["auto", "none", *(name for name in MIXTURES if name.endswith("_mid"))],
        "sft_mixture": ["auto", "none", *(name for name in MIXTURES if name.endswith("_sft"))],
        "if_exists": ["continue", "fresh", "stop"],
        "export_to": ["none", *FORMATS],
    },
    "05_rl": {
        "preset": rl_presets,
        "optimizer": ["adamw", "muon"],
        "if_exists": ["continue", "fresh", "stop"],
    },
    "06_speed": {"preset": ["auto", *PRESETS]},
}


@each_notebook
def test_choices_are_the_real_ones(source):
    """As the form itself writes them: a name that is missing there, or too much, is noticed."""
    text = source.read_text()
    for name, real in CHOICES[source.stem].items():
        offered = re.search(rf"^{name} = .*# @param (\[[^]]*\])", text, flags=re.M)
        assert offered, f"{name} has no list of choices"
        assert sorted(filter(None, json.loads(offered[1]))) == sorted(real), name


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("scripts")


def figures(run) -> dict:
    """What a run has come to, as far as it is the same each time."""
    results = json.loads((run / "results.json").read_text())
    kept = "vocab_size", "val_bpb", "params", "computed_in"
    return {name: results[name] for name in kept if name in results}


@each_notebook
@pytest.mark.slow
def test_runs_as_script(source, workdir):
    done = script(source, *words_of(SMOKE[source.stem]), cwd=workdir)
    assert done.returncode == 0, done.stdout + done.stderr
    check_products(source.stem, workdir / "runs" / "smoke")


@pytest.mark.slow
def test_each_run_again_as_script_continues_what_is_finished(workdir):
    """Same figures, nothing lost: all of them in one process, which is none that ran them first."""
    run = workdir / "runs" / "smoke"
    before = figures(run)
    assert set(before) == {"vocab_size", "val_bpb", "params", "computed_in"}
    again = [(source, *words_of(SMOKE[source.stem])) for source in NOTEBOOKS]
    for source, done in zip(NOTEBOOKS, programs.run_scripts(*again, cwd=workdir, timeout=900)):
        assert done.returncode == 0, source.stem + done.stdout + done.stderr
        check_products(source.stem, run)
    assert figures(run) == before


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """{notebook: how it ends when it is asked for help}."""
    folder = tmp_path_factory.mktemp("help")
    done = programs.run_scripts(*([source, "--help"] for source in NOTEBOOKS), cwd=folder)
    assert not list(folder.iterdir())  # asking for help makes nothing
    return dict(zip(NOTEBOOKS, done))


@each_notebook
@pytest.mark.slow
def test_help_lists_every_flag_and_a_wrong_one_ends_it(source, helps, capsys):
    done = helps[source]
    assert done.returncode == 0, done.stderr
    for p in parameters(source.read_text()):
        assert re.search(rf"--(no-)?{p.name.replace('_', '-')}\b", done.stdout)
        assert p.help and p.help.split(" ")[0] in done.stdout

    name = parameters(source.read_text())[0].name
    with pytest.raises(SystemExit) as stop:
        flags({"__file__": str(source)}, [f"--{name}x", "1"])
    assert stop.value.code == 2
    assert f"--{name}" in capsys.readouterr().err.split("Perhaps you meant")[1]
