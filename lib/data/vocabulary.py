"""A run's tokenizer: made once from the run's text, then the same in every notebook."""

from pathlib import Path
from typing import NamedTuple

from lib.data.sources import documents
from lib.data.tokenizer import FILE, Tokenizer, load_tokenizer
from lib.files import UserError, choose
from lib.runtime import progress


class Vocabulary(NamedTuple):
    """What a tokenizer is made from: the settings that decide its ids."""

    source: str = "stdlib"
    vocab_size: int = 32768
    # training shards to read of a source on the Hub
    shards: int = 8
    # stop reading after so many characters in all, and after so many of one document
    max_chars: int = 2_000_000_000
    doc_cap: int = 50_000
    # instead of training: tiktoken:NAME, hf:USER/NAME or a file
    pretrained: str = ""

    def settings(self) -> dict:
        """The settings that matter: of a pretrained tokenizer only its name."""
        if self.pretrained:
            return {"pretrained": self.pretrained}
        settings = self._asdict()
        del settings["pretrained"]
        return settings


def make_tokenizer(
    run: Path, vocabulary: Vocabulary, if_exists: str = "continue"
) -> tuple[Tokenizer, bool]:
    """(the tokenizer of a run folder, whether it was made now).

    if_exists: "continue" takes the one that is there if its settings are these, "fresh" makes it
    anew, "stop" refuses. UserError where the settings differ, and names them.
    """
    path = Path(run) / FILE
    choose("if_exists", if_exists, ("continue", "fresh", "stop"))
    if path.exists() and if_exists == "stop":
        raise UserError(f"{path} exists: choose another run, or pass --if-exists continue or fresh")
    if path.exists() and if_exists == "continue":
        tokenizer = Tokenizer.load(path)
        _check_settings(path, tokenizer.meta.get("settings", {}), vocabulary.settings())
        return tokenizer, False

    tokenizer = _make(vocabulary)
    tokenizer.meta["settings"] = vocabulary.settings()
    tokenizer.save(path)
    if (Path(run) / "checkpoints").exists():
        print(f"note: the checkpoints in {run} belong to the tokenizer that was there before")
    return tokenizer, True


def read_by(tokenizer: Tokenizer) -> str:
    """The source that a tokenizer was trained on; the embedded one where it does not say."""
    return tokenizer.meta.get("settings", {}).get("source") or "stdlib"


def _check_settings(path: Path, before: dict, now: dict):
    changed = sorted(name for name in before | now if before.get(name) != now.get(name))
    if changed:
        raise UserError(
            f"{path} was made with other settings ({', '.join(changed)}): choose another run, "
            "or pass --if-exists fresh to replace it"
        )


def _make(vocabulary: Vocabulary) -> Tokenizer:
    if vocabulary.pretrained:
        return load_tokenizer(vocabulary.pretrained)

    seen = {"documents": 0, "characters": 0}

    def counted(bar):
        for text in documents(vocabulary.source, "train", shards=vocabulary.shards):
            used = min(len(text), vocabulary.doc_cap)
            seen["documents"] += 1
            seen["characters"] += used
            bar.update(used)
            yield text

    with progress(unit=" characters", unit_scale=True, desc="reading") as bar:
        tokenizer = Tokenizer.train(
            counted(bar),
            vocabulary.vocab_size,
            vocabulary.max_chars,
            vocabulary.doc_cap,
            meta=seen,
        )
    print(f"trained on {seen['documents']:,} documents, {seen['characters']:,} characters")
    return tokenizer
