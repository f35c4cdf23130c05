"""launch/corpus.py: what datatrove's tasks write is a corpus of ours."""

import json
import subprocess
import sys

import pytest

from lib.data import corpus, streams
from lib.data.tokenizer import Tokenizer
from tests.helpers import ROOT
from tests.helpers.programs import environment

pytest.importorskip("datatrove", reason="no datatrove: pip install 'datatrove[io]'")
pytest.importorskip("array_record", reason="no array_record: pip install -e '.[grain]'")
pytestmark = pytest.mark.slow


def test_tasks_of_datatrove_write_a_corpus(tmp_path):
    """Three tasks: two shards to train on and one to validate, of all texts but those too short."""
    tokenizer = Tokenizer.train(["the cat sat on the mat. " * 20], 270)
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "raw").mkdir()
    texts = [f"{i}: the cat sat. " * 20 for i in range(9)] + ["short"] * 3
    for i in range(3):
        lines = [json.dumps({"text": text, "id": text[:2]}) for text in texts[i::3]]
        (tmp_path / "raw" / f"{i}.jsonl").write_text("\n".join(lines))

    script = [sys.executable, ROOT / "launch" / "corpus.py", "--source", "raw", "--to", "corpus"]
    script += ["--tokenizer", ".", "--tasks", "3", "--workers", "1", "--logs", "logs"]
    subprocess.run(script, cwd=tmp_path, env=environment(), check=True, capture_output=True)

    entries = corpus.read_corpus(str(tmp_path / "corpus")).entries
    assert [(entry.split, entry.documents) for entry in entries] == [
        ("train", 3),
        ("train", 3),
        ("val", 3),
    ]
    source = f"records:{tmp_path / 'corpus'}"
    assert [*streams.texts_of(source, "train")] == [*texts[0:9:3], *texts[1:9:3]]
    assert [*streams.texts_of(source, "val")] == texts[2:9:3]
