"""The first notebook, run as a script on a small corpus:

what it leaves behind, and what running it again does.
"""

import json
import random
import runpy
import sys
from pathlib import Path

import pytest
import tiktoken

from lib.data.tokenizer import Tokenizer
from lib.files import UserError

pytestmark = pytest.mark.slow
SCRIPT = str(Path(__file__).parents[2] / "01_tokenizer.py")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script in a folder of its own, with no network; the corpus is 30 small files."""
    stems = "walk talk look jump open close turn read".split()
    words = [stem + ending for stem in stems for ending in ("", "s", "ed", "ing")]
    rng = random.Random(0)
    (tmp_path / "corpus").mkdir()
    for i in range(30):
        (tmp_path / "corpus" / f"{i}.txt").write_text(
            " ".join(rng.choices(words, k=400)) + " Grüße 東京 $5\n"
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: 1 / 0)

    def run(*args):
        monkeypatch.setattr(
            sys,
            "argv",
            [SCRIPT, "--run", "small", "--source", "corpus", "--vocab-size", "300", *args],
        )
        return runpy.run_path(SCRIPT, run_name="__main__")

    return run


def test_what_it_leaves_and_running_again(run, tmp_path, capsys):
    folder = tmp_path / "runs" / "small"
    run()
    said = capsys.readouterr().out
    assert "GPT-2 is left out" in said and "GPT-4 is left out" in said
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.vocab_size == 300 and tokenizer.meta["settings"]["vocab_size"] == 300
    assert tokenizer.meta["documents"] > 0 and tokenizer.meta["characters"] > 0
    results = json.loads((folder / "results.json").read_text())
    assert results["bytes_per_token"] == results["compression"]["corpus (validation)"]["ours"] > 1
    for name in ("compression", "lengths", "sample"):
        assert (folder / "plots" / f"tokenizer_{name}.png").read_bytes().startswith(b"\x89PNG")

    before = (folder / "tokenizer.json").read_bytes()
    run()
    assert "nothing to train" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"other settings \(vocab_size, doc_cap\).*--if-exists fresh"
    ):
        run("--vocab-size", "310", "--doc-cap", "1000")
    with pytest.raises(UserError, match="exists: choose another run"):
        run("--if-exists", "stop")
    with pytest.raises(UserError, match="needs more text"):
        run("--if-exists", "fresh", "--vocab-size", "30000")
    assert (folder / "tokenizer.json").read_bytes() == before
    run("--if-exists", "fresh", "--vocab-size", "310")
    assert Tokenizer.load(folder).vocab_size == 310


def test_a_published_encoding_instead_and_beside(run, tmp_path, monkeypatch):
    ranks = {bytes([b]): b for b in range(256)} | {b" walk": 256}
    published = tiktoken.Encoding(
        "any", pat_str=r"\s?\S+|\s+", mergeable_ranks=ranks, special_tokens={}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: published)
    seen = run("--pretrained", "tiktoken:gpt2")
    assert list(seen["compression"]["prose"]) == ["ours", "GPT-2", "GPT-4"]
    # here all three are one and the same
    assert len(set(seen["compression"]["prose"].values())) == 1
    assert Tokenizer.load(tmp_path / "runs" / "small").vocab_size == 257 + 9
