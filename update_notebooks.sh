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
METADATA = {  # what makes Colab offer a TPU, and every front end a Python kernel
    "accelerator": "TPU",
    "colab": {"gpuType": "V6E1", "machine_shape": "hm", "provenance": [], "toc_visible": True},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
stale = []
for source in sorted(Path().glob("0*.py")):
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata, notebook.nbformat, notebook.nbformat_minor = METADATA, 4, 5
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
