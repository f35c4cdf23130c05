#!/usr/bin/env bash
# Regenerates every 0*.ipynb from its 0*.py, the same bytes every time. `--check` changes nothing and fails where a
# notebook is out of date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=.venv/bin/python
[ -x $python ] || python=python3
exec $python - "$@" <<'END'
import sys
from pathlib import Path

try:
    import jupytext
    import nbformat
except ImportError:
    sys.exit("jupytext and nbformat are missing: run bash run_tests.sh --setup-only first")
if sys.argv[1:] not in ([], ["--check"]):
    sys.exit("usage: bash update_notebooks.sh [--check]")
# What makes Colab offer the right machine: a TPU v5e-1, which free accounts have too, where models are trained; else the
# one that is there. Kaggle reads a part of its own: eight v5e there, and the internet, from where the code comes. Every front
# end gets a Python kernel.
TPU = {"accelerator": "TPU", "colab": {"gpuType": "V5E1"}}
MACHINES = {"02_train": TPU, "03_worker": TPU, "05_rl": TPU, "06_speed": TPU}
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def metadata(stem):
    machine = MACHINES.get(stem, {})
    colab = machine.get("colab", {}) | {"provenance": [], "toc_visible": True}
    chips = "tpuV5e8" if machine else "none"
    kaggle = {"accelerator": chips, "isInternetEnabled": True, "language": "python", "sourceType": "notebook"}
    return machine | KERNEL | {"colab": colab, "kaggle": kaggle}


stale = []
for source in sorted(Path().glob("0*.py")):
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata, notebook.nbformat, notebook.nbformat_minor = metadata(source.stem), 4, 5
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i:02d}"  # jupytext makes random ones
    nbformat.validate(notebook)
    text, target = nbformat.writes(notebook) + "\n", source.with_suffix(".ipynb")
    if not target.exists() or target.read_text() != text:
        stale.append(target.name)
        if not sys.argv[1:]:
            target.write_text(text)
if sys.argv[1:] and stale:
    sys.exit(f"{', '.join(stale)} out of date: run bash update_notebooks.sh and commit the result")
print("rewritten: " + ", ".join(stale) if stale else "all notebooks are up to date")
END
