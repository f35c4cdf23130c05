"""Any cell may be run again at any time: each cell twice in a real kernel, some out of order."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from lib.train.metrics import read_jsonl
from tests.helpers import ROOT
from tests.helpers.notebooks import SMOKE, check_products, save_tokenizer

pytestmark = pytest.mark.slow


def code_cells(stem: str) -> list[str]:
    """The code of a notebook's cells, with its smoke settings behind the forms."""
    notebook = nbformat.read(ROOT / f"{stem}.ipynb", as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    first = next(i for i, source in enumerate(cells) if source.startswith("globals().update"))
    settings = "\n".join(f"{name} = {value!r}" for name, value in SMOKE[stem].items())
    return [*cells[:first], settings, *cells[first:]]


def run_cells(sources: list[str], workdir) -> str:
    """What the cells printed, run one after the other in one kernel."""
    where = f"import os, sys\nos.chdir({str(workdir)!r})\nsys.path.insert(0, {str(ROOT)!r})"
    cells = [nbformat.v4.new_code_cell(source) for source in [where, *sources]]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    texts = [out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", [])]
    return "".join(texts)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("cells")
    save_tokenizer(workdir / "runs" / "smoke")
    return workdir


def cell_with(cells: list[str], words: str) -> str:
    [cell] = [cell for cell in cells if words in cell]
    return cell


def test_each_cell_of_02_twice_and_the_plan_and_loop_once_more(workdir):
    cells = code_cells("02_train")
    again = [cell_with(cells, words) for words in ("find_past", "open_run", "measurements =")]
    again.append(cell_with(cells, "training.steps("))
    said = run_cells([cell for cell in cells for _ in range(2)] + again, workdir)
    assert "FAIL" not in said and len(re.findall("ok   the saved checkpoint", said)) == 2

    # trained once, and each step stands in the record once
    run = workdir / "runs" / "smoke"
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3, 4]
    check_products("02_train", run)


def test_each_cell_of_04_twice(workdir):
    cells = code_cells("04_eval_chat")
    said = run_cells([cell for cell in cells for _ in range(2)], workdir)
    assert said.count("finished before") == 2  # mid and sft, the second time
    run = workdir / "runs" / "smoke"
    for stage in ("mid", "sft"):
        steps = [row["step"] for row in read_jsonl(run / stage / "metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1))
    check_products("04_eval_chat", run)
