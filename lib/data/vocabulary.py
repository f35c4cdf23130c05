"""A run's tokenizer: made once from the run's text, then the same in every notebook."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import regex

from lib.data.sources import documents
from lib.data.tokenizer import FILE, PATTERN, Tokenizer, load_tokenizer
from lib.files import UserError, choose
from lib.runtime import progress

# the yardsticks, by the names that tiktoken knows them by
PUBLISHED_NAMES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}


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
        # a pretrained one may be looked at on another text than before
        if read_by(tokenizer) != vocabulary.source:
            save_with_text(tokenizer, path, vocabulary.source)
        return tokenizer, False

    tokenizer = _make(vocabulary)
    tokenizer.meta["settings"] = vocabulary.settings()
    save_with_text(tokenizer, path, vocabulary.source)
    if (Path(run) / "checkpoints").exists():
        print(f"note: the checkpoints in {run} belong to the tokenizer that was there before")
    return tokenizer, True


def save_with_text(tokenizer: Tokenizer, path: Path, source: str):
    """Save a run's tokenizer with the text that the run is about, whatever it was trained on."""
    tokenizer.meta["text"] = source
    tokenizer.save(path)


def read_by(tokenizer: Tokenizer) -> str:
    """The text of a tokenizer's run: what it was trained on, or was made for; the embedded one
    where it does not say.
    """
    return tokenizer.meta.get("text") or trained_on(tokenizer) or "stdlib"


def trained_on(tokenizer: Tokenizer) -> str:
    """The source that a tokenizer was trained on, empty where it came from elsewhere."""
    return tokenizer.meta.get("settings", {}).get("source", "")


def _check_settings(path: Path, before: dict, now: dict):
    changed = [name for name in now | before if before.get(name) != now.get(name)]
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


# ---- looking at one -----------------------------------------------------------------------------


def most_frequent_pair(words: dict[tuple[bytes, ...], int]) -> tuple[tuple[bytes, bytes], int]:
    """The pair of neighbours that occurs most often in words (tuples of pieces), and how often.

    Of equals the one that sorts last, so that the answer is always the same.
    """
    pairs: Counter = Counter()
    for word, count in words.items():
        for pair in zip(word, word[1:]):
            pairs[pair] += count
    return max(pairs.items(), key=lambda item: (item[1], item[0]))


def merged(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    """The word with each occurrence of the pair joined, from the left."""
    pieces: list[bytes] = []
    i = 0
    while i < len(word):
        width = 2 if word[i : i + 2] == pair else 1
        pieces.append(b"".join(word[i : i + width]))
        i += width
    return tuple(pieces)


def words_of(texts: list[str]) -> dict[tuple[bytes, ...], int]:
    """How often each word occurs, as the tuple of its bytes: what merging begins with.

    No merge crosses the border of a word: letters, up to two digits, punctuation or blanks.
    """
    words = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    return {tuple(bytes([b]) for b in word.encode()): n for word, n in words.items()}


def first_merges(tokenizer: Tokenizer, texts: list[str], most: int = 20) -> list[tuple[bytes, int]]:
    """(the new token, how often its pair occurred) of a tokenizer's first merges, counted in texts.

    A new token is two older ones joined: of the ways to cut it in two, the one that occurs.
    """
    pieces = words_of(texts)
    known = {bytes([b]) for b in range(256)}
    merges = []
    for token in tokenizer.tokens[256 : 256 + most]:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        cuts = [cut for cut in cuts if known.issuperset(cut)]
        if not cuts:  # a vocabulary that was not made by merging pairs
            continue
        counts = Counter()
        for word, n in pieces.items():
            for pair in zip(word, word[1:]):
                if pair in cuts:
                    counts[pair] += n
        pair = max(cuts, key=lambda cut: counts[cut])
        merges.append((token, counts[pair]))
        joined: Counter = Counter()
        for word, n in pieces.items():
            joined[merged(word, pair)] += n
        pieces, known = joined, known | {token}
    return merges


def merge_steps(tokenizer: Tokenizer, word: str) -> list[tuple[bytes, ...]]:
    """How a word becomes tokens: its bytes, then the pieces after each merge, lowest id first."""
    ids = {token: i for i, token in enumerate(tokenizer.tokens)}
    pieces = tuple(bytes([b]) for b in word.encode())
    steps = [pieces]
    while True:
        pairs = [pair for pair in zip(pieces, pieces[1:]) if b"".join(pair) in ids]
        if not pairs:
            return steps
        pieces = merged(pieces, min(pairs, key=lambda pair: ids[b"".join(pair)]))
        steps.append(pieces)


def bytes_per_token(tokenizer: Tokenizer, texts: str | list[str]) -> float:
    """UTF-8 bytes of a text, or of a list of them, over the number of ids that they become."""
    texts = [texts] if isinstance(texts, str) else texts
    size = sum(len(text.encode()) for text in texts)
    return size / sum(map(len, tokenizer.encode_batch(texts)))


def compare(tokenizer: Tokenizer, kinds: dict) -> dict[str, dict[str, float]]:
    """Bytes per token of each kind of text: {kind: {"ours": …, "GPT-2": …, "GPT-4": …}}.

    A published tokenizer that can't be fetched is left out, and a line says why.
    """
    tokenizers = {"ours": tokenizer}
    for name, encoding in PUBLISHED_NAMES.items():
        try:
            tokenizers[name] = Tokenizer.from_tiktoken(encoding, timeout=20)
        except UserError as e:
            print(f"{name} is left out of the comparison: {e}")
    return {
        kind: {name: bytes_per_token(its, texts) for name, its in tokenizers.items()}
        for kind, texts in kinds.items()
    }


def check_round_trip(tokenizer: Tokenizer, texts: list[str]):
    """AssertionError unless every text comes back as it went in, byte for byte."""
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, f"{text[:40]!r} does not come back"
        assert tokenizer.token_bytes[ids].sum() == len(text.encode()), f"bytes of {text[:40]!r}"
        assert max(ids, default=0) < tokenizer.bos, f"a special token in {text[:40]!r}"
