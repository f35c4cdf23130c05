"""What a user of Colab or Kaggle does, done in replicas of their machines.

`bash run_tests.sh --colab` does it in all that pins.toml describes, `--colab -k newest` in one.
"""

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from nbclient.exceptions import CellExecutionError

from lib.preflight.compile import ENVIRONMENT
from tests.colab.replica import images, install, installed, open_runtime, printed, run, run_all
from tests.helpers import ROOT
from tests.helpers.notebooks import PRODUCTS, SMOKE, check_products

pytestmark = pytest.mark.colab
NAMES = list(images())
IDS = [f"newest-{NAMES[0]}", *NAMES[1:]]
# What a Jupyter kernel needs, and no more.
KERNEL = """
    backcall debugpy decorator entrypoints ipykernel ipython jupyter_client jupyter_core
    matplotlib-inline nest-asyncio packaging pexpect pickleshare pip platformdirs prompt_toolkit
    psutil ptyprocess Pygments python-dateutil pyzmq setuptools six tornado traitlets wcwidth
""".split()
NOTEBOOKS = [ROOT / f"{stem}.ipynb" for stem in SMOKE]


@pytest.fixture(scope="module", params=NAMES, ids=IDS)
def fresh(request, tmp_path_factory):
    """A machine as it was given, before the first cell."""
    return open_runtime(images()[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def used(fresh):
    """(machine, packages before, what the first cell wrote): after the first cell was run."""
    before = installed(fresh)
    return fresh, before, printed(run_all(fresh, NOTEBOOKS[0], cells=1))


def test_the_first_cell_installs_what_is_missing_and_mends_the_pair(used):
    """jax and numpy stay, libtpu becomes what jax's metadata name, and little is printed."""
    machine, before, said = used
    after = installed(machine)
    assert {name: after[name] for name in before if name != "libtpu"} == {
        name: version for name, version in before.items() if name != "libtpu"
    }
    assert before["libtpu"] != "0.0.23" and after["libtpu"] == "0.0.23"
    assert {"rustbpe", "tiktoken", "tyro"} <= set(after) - set(before)
    assert [line.split()[0] for line in said.splitlines()] == ["installing", "installing"], said


def test_the_first_cell_is_done_in_seconds_the_second_time(used):
    machine = used[0]
    assert printed(run_all(machine, NOTEBOOKS[1], cells=1, timeout=60)) == ""


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_run_all(used, notebook):
    """Every cell runs; its pictures are shown; nothing is noise."""
    done = run_all(used[0], notebook, SMOKE[notebook.stem])
    check_products(notebook.stem, used[0].content / "rawchat" / "runs" / "smoke")
    outputs = [out for cell in done.cells if cell.cell_type == "code" for out in cell.outputs]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= sum(name.endswith(".png") for name in PRODUCTS[notebook.stem])

    # no value of a cell's last line, no box of stderr, no complaints of libtpu
    assert [out for out in outputs if out.output_type == "execute_result"] == []
    assert [out.text for out in outputs if out.get("name") == "stderr"] == []
    assert "INVALID_ARGUMENT" not in printed(done)


def test_a_notebook_that_is_told_to_end_saves_first(used):
    """Hosts send SIGTERM to the kernel: the loop finishes its step, saves and says so."""
    machine, folder = used[0], used[0].content / "rawchat" / "runs" / "ended"
    folder.mkdir()
    shutil.copy(folder.parent / "smoke" / "tokenizer.json", folder)
    settings = SMOKE["02_train"] | dict(run="ended", num_steps=5000)
    settings |= dict(eval_every=5000, sample_every=5000, save_every=5000)
    note = "import os, pathlib; pathlib.Path('kernel').write_text(str(os.getpid()))"
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(run_all, machine, ROOT / "02_train.ipynb", settings, note)
        metrics = folder / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 2:
            assert not done.done(), done.result()
            time.sleep(0.1)
        os.kill(int((machine.content / "kernel").read_text()), signal.SIGTERM)
        with pytest.raises(CellExecutionError, match="stopped at step [0-9]+ and saved"):
            done.result()
    assert list(folder.glob("checkpoints/step_*"))


def test_commands_start_without_complaints_of_libtpu(used):
    code = (
        "from lib import notebook; import jax; notebook.setup(); print(jax.devices()[0].platform)"
    )
    done = run(used[0], "-c", code, timeout=120)
    assert (done.stdout, done.stderr) == ("cpu\n", "")


def test_the_real_steps_compile_for_tpus_with_the_mended_pair(used):
    """Each notebook's own, with Pallas kernels where it has them.

    RAWCHAT_LAYERS cuts the number of layers (0: all of them), which past runtimes always do.
    """
    machine = used[0]
    layers = os.environ.get("RAWCHAT_LAYERS", "0") if machine.image.name == NAMES[0] else "1"
    environment = ENVIRONMENT | {"PYTHONPATH": "."}

    def compiled(chip):
        command = ["tests/colab/steps.py", chip, "--layers", layers]
        return run(machine, *command, timeout=3600, **environment)

    # two at a time: each holds about 3 GB and one core
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(compiled, ["v5e-1", "v6e-1", "v5e-8"]):
            assert done.returncode == 0, done.stderr[-3000:]
            programs = [json.loads(line) for line in done.stdout.splitlines()]
            assert {"train", "prefill", "decode"} <= {program["program"] for program in programs}
            for program in programs:
                assert program["attention"] == "splash" and program["peak"] > 0, program
                has_kernels = program["program"] in ("train", "measure")
                assert (program["kernels"] > 0) == has_kernels, program


def test_a_pair_that_is_not_mended_makes_auto_attention_einsum(used):
    """Asked of the compiler, with a sentence on what it costs and what would mend it."""
    machine, before, _ = used
    code = (
        "from lib.config import Config; from lib.preflight.compile import as_compiled; "
        "print(as_compiled(Config.preset('colab_v5e')).attention)"
    )
    assert run(machine, "-c", code, **ENVIRONMENT).stdout == "splash\n"
    install(machine, f"libtpu=={before['libtpu']}")
    done = run(machine, "-c", code, **ENVIRONMENT)
    assert done.stdout == "einsum\n"
    note = [line for line in done.stderr.splitlines() if line.startswith("note: libtpu")]
    assert len(note) == 1 and "attention=auto is einsum" in note[0]
    assert "python -m pip install 'libtpu==0.0.23' mends it" in note[0]

    # the first cell says so too where it cannot mend it, and goes on
    cut_off = machine._replace(env=machine.env | {"PIP_NO_INDEX": "1"})
    said = printed(run_all(cut_off, NOTEBOOKS[0], cells=1)).splitlines()
    assert said[0].startswith("installing libtpu==0.0.23")
    assert said[1].startswith("note: pip could not install libtpu==0.0.23: ")
    assert said[1].endswith(f"going on with libtpu {before['libtpu']}")


def test_a_kernel_that_has_jax_already_is_asked_to_restart(used):
    """The right libtpu is installed then, so that a restart is all that is needed."""
    machine, before, _ = used
    install(machine, f"libtpu=={before['libtpu']}")
    with pytest.raises(CellExecutionError, match="restart the session .* run all cells"):
        run_all(machine, NOTEBOOKS[0], cells=1, before="import jax")
    assert installed(machine)["libtpu"] == "0.0.23"
    assert printed(run_all(machine, NOTEBOOKS[0], cells=1)) == ""


def test_a_plain_jupyter_kernel_gets_everything(tmp_path):
    """Such as VS Code's: no google.colab, no jax, and this notebook was downloaded alone."""
    image = images()[NAMES[0]]
    kernel = [package for package in image.packages if package.split("==")[0] in KERNEL]
    machine = open_runtime(image._replace(kind="jupyter", packages=tuple(kernel)), tmp_path)
    said = printed(run_all(machine, NOTEBOOKS[0], cells=1, timeout=1200)).splitlines()
    assert len(said) == 1 and said[0].startswith("installing jax, ")
    assert "libtpu" not in installed(machine)
    run_all(machine, NOTEBOOKS[0], SMOKE["01_tokenizer"])
    check_products("01_tokenizer", machine.content / "rawchat" / "runs" / "smoke")


def test_a_machine_without_network_is_one_sentence(fresh, tmp_path):
    """Before the code could be fetched, and before the packages could."""
    content = tmp_path / "content"
    content.mkdir()
    lost = fresh._replace(content=content, env=fresh.env | {"GIT_CONFIG_COUNT": "0"})
    lost.env["https_proxy"] = "http://127.0.0.1:9"
    with pytest.raises(CellExecutionError, match="could not be fetched: see that git") as error:
        run_all(lost, NOTEBOOKS[0], cells=1)
    assert error.value.ename == "SystemExit"
