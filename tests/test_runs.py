"""lib/runs.py: the run folder, its stages and results."""

import json
import re

import pytest

from lib import runs
from lib.files import UserError


def test_open_run(tmp_path):
    run = runs.open_run("a.b-1", runs_dir=tmp_path)
    assert run == tmp_path / "a.b-1" and run.is_dir()
    for bad in ("", "../x", "a/b", ".hidden", "a b"):
        with pytest.raises(UserError, match="cannot name a folder"):
            runs.open_run(bad, runs_dir=tmp_path)
    with pytest.raises(UserError, match="no tokenizer.json: run 01_tokenizer.py --run a.b-1 first"):
        runs.open_run("a.b-1", needs="tokenizer.json", runs_dir=tmp_path)
    with pytest.raises(UserError, match="no run with tokenizer.json"):
        runs.open_run("", needs="tokenizer.json", runs_dir=tmp_path)
    (run / "tokenizer.json").write_text("{}")
    assert runs.open_run("", needs="tokenizer.json", runs_dir=tmp_path) == run
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        runs.open_run("file", runs_dir=tmp_path)


def test_set_aside_loses_nothing(tmp_path):
    for n in (1, 2):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "config.json").write_text(str(n))
        old = runs.set_aside(tmp_path, "checkpoints", "config.json", "never-there")
        assert old == tmp_path / f"old-{n}"
        assert (old / "config.json").read_text() == str(n) and (old / "checkpoints").is_dir()
    assert {p.name for p in tmp_path.iterdir()} == {"old-1", "old-2"}


def test_results_table(tmp_path):
    with pytest.raises(UserError, match="no .*results.json: run 01_tokenizer.py"):
        runs.results_table(tmp_path)
    (tmp_path / "results.json").write_text(
        json.dumps(
            dict(
                params=1234567,
                val_bpb=1.23456,
                gzip_bpb=2.5,
                train_tokens_per_s=None,
                more=7,
                nested={"a": 1},
                samples=["def f"],
            )
        )
    )
    table = runs.results_table(tmp_path)
    for line in (
        r"parameters +1,234,567\n",
        r"validation bits per byte +1.2346\n",
        r"gzip -9 .* 2.5000\n",
        r"more +7\n",
        "def f",
    ):
        assert re.search(line, table), line
    assert "nested" not in table and "None" not in table
