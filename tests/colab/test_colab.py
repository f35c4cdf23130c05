"""What a user of Colab or Kaggle does, done in replicas of their machines.

`bash run_tests.sh --colab` does it in all that pins.toml describes, `--colab -k newest` in one.
"""

import pytest
from nbclient.exceptions import CellExecutionError

from tests.colab.replica import images, installed, open_runtime, printed, run_all
from tests.helpers import ROOT
from tests.helpers.notebooks import PRODUCTS, SMOKE, check_products

pytestmark = pytest.mark.colab
NAMES = list(images())
IDS = [f"newest-{NAMES[0]}", *NAMES[1:]]
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


def test_a_machine_without_network_is_one_sentence(fresh, tmp_path):
    """Before the code could be fetched, and before the packages could."""
    content = tmp_path / "content"
    content.mkdir()
    lost = fresh._replace(content=content, env=fresh.env | {"GIT_CONFIG_COUNT": "0"})
    lost.env["https_proxy"] = "http://127.0.0.1:9"
    with pytest.raises(CellExecutionError, match="could not be fetched: see that git") as error:
        run_all(lost, NOTEBOOKS[0], cells=1)
    assert error.value.ename == "SystemExit"
