"""Text to token ids and back: byte-level BPE, trained by rustbpe and served by tiktoken; chats with
their loss mask.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import string
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex
import tiktoken

from lib.data import merges
from lib.files import UserError, choose, local_path, parse_json, read_bytes, write_atomic

# The GPT-4 split pattern, but digits in groups of at most two: a small vocabulary has better uses
# than 1000 numbers.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
# Their ids follow the last rank, in this order. "<|bos|>" starts every document and every chat.
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
# tiktoken encodings whose ids have no hole before their own special tokens, which ours replace.
PUBLISHED = ("gpt2", "cl100k_base", "o200k_base")
FILE = "tokenizer.json"
PART_TYPES = ("text", "python", "python_output")
# characters of white space in a row: from about 500,000 on, tiktoken's regex engine panics
LONGEST_BLANK = 400_000


class Turn(NamedTuple):
    """What one side says: a user's text, or an assistant's (type, text) parts."""

    role: str
    content: str | list[tuple[str, str]]
    # whether an assistant is to learn to say it
    learn: bool = True


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-level BPE vocabulary followed by `SPECIAL_TOKENS`; picklable, and cheap to send to
    another process.

    `tokens[i]` are the bytes of id i; `meta` says how it was made and does not influence encoding.
    """

    pattern: str
    tokens: tuple[bytes, ...]
    meta: dict = field(default_factory=dict)

    # ---- making one

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        max_chars: int | None = None,
        doc_cap: int | None = None,
        meta: dict | None = None,
    ) -> "Tokenizer":
        """Learn a vocabulary of exactly `vocab_size` ids, special tokens included, from a stream of
        texts.

        Reads at most `doc_cap` characters of each text and stops after `max_chars` in all.
        Deterministic. UserError if there is no text, or too little of it for that many tokens.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise UserError(
                f"vocab_size {vocab_size} is too small: 256 bytes and the special tokens need"
                f" {smallest}"
            )
        for name, value in {"max_chars": max_chars, "doc_cap": doc_cap}.items():
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        read = 0

        def stream() -> Iterator[str]:
            nonlocal read
            for text in texts:
                text = text[:doc_cap][: max_chars and max_chars - read]
                read += len(text)
                # A lone surrogate (JSON can hold one) has no UTF-8 form and would stop the
                # training.
                text = text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
                yield from _cut_blanks(text)
                if read == max_chars:
                    return

        tokens = merges.learn(stream(), vocab_size - len(SPECIAL_TOKENS), PATTERN)
        if not read:
            raise UserError(
                "cannot train a tokenizer on an empty corpus: no text was found, so choose another"
                " source"
            )
        supported = len(tokens) + len(SPECIAL_TOKENS)
        if supported < vocab_size:
            raise UserError(
                f"a vocabulary of {vocab_size} needs more text: these {read:,} characters support"
                " at most "
                f"{supported} tokens, so lower vocab_size or add text"
            )
        return cls(PATTERN, tokens, meta or {})

    @classmethod
    def from_tiktoken(cls, name: str, timeout: float = 60) -> "Tokenizer":
        """A published encoding with our special tokens after its ranks; fetched once (`timeout`
        seconds), cached.
        """
        choose("tiktoken encoding", name, PUBLISHED)
        result = []

        def fetch():
            try:
                result.append(tiktoken.get_encoding(name))
            except Exception as e:
                result.append(e)

        # tiktoken downloads without a timeout: in a thread that can be left behind, a silent
        # network cannot hang us.
        thread = threading.Thread(target=fetch, daemon=True)
        thread.start()
        thread.join(timeout)
        if not result or isinstance(result[0], Exception):
            why = type(result[0]).__name__ if result else f"no answer in {timeout:g} s"
            raise UserError(
                f"cannot fetch the tiktoken encoding {name!r} ({why}): it is downloaded once, "
                "so connect to a network and run again"
            )
        ranks = result[0]._mergeable_ranks
        return cls(
            result[0]._pat_str, tuple(sorted(ranks, key=ranks.get)), {"source": f"tiktoken:{name}"}
        )

    # ---- keeping one

    def to_json(self) -> str:
        """Everything as one JSON object: plain data, so loading a stranger's tokenizer runs no
        code.
        """
        data = {
            "kind": "bpe",
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
            "meta": self.meta,
            "pattern": self.pattern,
            "special_tokens": self.special,
            "mergeable_ranks": [
                [base64.b64encode(t).decode(), i] for i, t in enumerate(self.tokens)
            ],
        }
        return json.dumps(data, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: object = "this text") -> "Tokenizer":
        """The inverse of `to_json`; UserError naming `where` if the text is anything else or was
        damaged.
        """
        try:
            data = parse_json(text, where)
            ranked = [
                (base64.b64decode(token, validate=True), i) for token, i in data["mergeable_ranks"]
            ]
            tokenizer = cls(
                data["pattern"], tuple(t for t, _ in ranked), dict(data.get("meta", {}))
            )
            sound = (
                [rank for _, rank in ranked] == list(range(len(ranked)))
                and len(set(tokenizer.tokens)) == len(ranked)
                and set(tokenizer.tokens) >= {bytes([b]) for b in range(256)}
                and data["special_tokens"] == tokenizer.special
                and data.get("fingerprint", tokenizer.fingerprint) == tokenizer.fingerprint
                and _reads_back(tokenizer)
            )
        except (UserError, ValueError, KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise UserError(
                f"{where} is not a rawchat tokenizer or is damaged: make a new one with"
                " 01_tokenizer.py"
            )
        return tokenizer

    def save(self, path):
        """Write `to_json` to a file, whole or not at all."""
        write_atomic(path, self.to_json())

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Read a saved tokenizer: a file, or a folder (such as a run's) that holds
        `tokenizer.json`.
        """
        path = local_path(path)
        path = path / FILE if path.is_dir() else path
        if not path.exists():
            raise UserError(f"no tokenizer to read at {path}: make one with 01_tokenizer.py")
        return cls.from_json(read_bytes(path), path)

    def push_to_hub(self, repo: str, token: str | None = None, private: bool = True) -> str:
        """Upload `tokenizer.json` to a Hub model repository, made if missing; returns the
        repository's address.
        """
        from huggingface_hub import HfApi

        with _hub_errors(f"cannot push the tokenizer to {repo!r}"):
            api = HfApi(token=token)
            address = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_file(
                path_or_fileobj=self.to_json().encode(), path_in_repo=FILE, repo_id=repo
            )
        return str(address)

    @classmethod
    def from_hub(cls, repo: str, token: str | None = None) -> "Tokenizer":
        """Download what `push_to_hub` uploaded. repo: USER/NAME, or USER/NAME@REVISION."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        repo, _, revision = repo.partition("@")
        pinned: dict[str, Any] = {"revision": revision} if revision else {}
        with _hub_errors(f"cannot pull a tokenizer from {repo!r}"):
            # fails at once; the next line tries 20 s
            get_hf_file_metadata(hf_hub_url(repo, FILE, **pinned), token=token)
            path = hf_hub_download(repo, FILE, token=token, **pinned)
        return cls.from_json(Path(path).read_bytes(), f"{FILE} of {repo}")

    # ---- facts

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.tokens) + len(SPECIAL_TOKENS)

    @cached_property
    def special(self) -> dict[str, int]:
        """Name of each special token -> its id."""
        return {name: len(self.tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}

    @property
    def bos(self) -> int:
        """Id of the token that starts every document."""
        return len(self.tokens)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 (vocab_size,): raw bytes each id stands for, 0 for special tokens; the denominator
        of bits per byte.
        """
        return np.array([len(t) for t in self.tokens] + [0] * len(SPECIAL_TOKENS), np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what decides the ids of a text: two tokenizers with one fingerprint encode
        alike.
        """
        digest = hashlib.sha256(json.dumps([self.pattern, SPECIAL_TOKENS]).encode())
        for token in self.tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    # ---- text <-> ids

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The tiktoken object that does the work."""
        ranks = {token: i for i, token in enumerate(self.tokens)}
        return tiktoken.Encoding(
            "rawchat", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.special
        )

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of a text. Names of special tokens in it are plain text: only `bos` and chats make
        special ids.
        """
        ids = [self.bos] if bos else []
        try:
            for part in _cut_blanks(text):
                ids += self.encoding.encode_ordinary(part)
        except BaseException as e:
            # Where a pattern goes back without end tiktoken panics, which is no Exception.
            if type(e).__name__ != "PanicException":
                raise
            raise UserError(
                "the tokenizer's pattern goes back without end on a text such as this: take a "
                "tokenizer that 01_tokenizer.py has made"
            ) from None
        return ids

    def encode_bytes(self, raw: bytes) -> list[int]:
        """Ids of bytes that may begin or end within a character."""
        try:
            return self.encode(raw.decode())
        except UnicodeDecodeError:
            # every vocabulary has the single bytes
            return [self.encoding.encode_single_token(bytes([byte])) for byte in raw]

    def encode_batch(
        self, texts: Iterable[str], bos: bool = False, threads: int | None = None
    ) -> list[list[int]]:
        """`encode` of every text, on `threads` threads (one per core by default)."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            return list(pool.map(lambda text: self.encode(text, bos), texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.encoding.decode(np.asarray(ids, np.int32).tolist())

    # ---- chats

    def render_conversation(
        self, messages: list[dict], max_tokens: int = 2048
    ) -> tuple[list[int], list[int]]:
        """Ids of a chat, and a mask that is 1 on the ids an assistant is to learn; both cut to
        `max_tokens`.

        A message is {"role", "content"}: maybe one by the system, which joins the text of the first
        user message, then user and assistant in turn. Content is text; the assistant's may be a
        list of {"type", "text"} with types text, python and python_output (what the tool answered:
        not learnt). An assistant's message with "weight" 0 is not learnt. UserError says which
        message is wrong, and how.
        """
        ids, mask = self._render(turns(messages))
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, messages: list[dict]) -> list[int]:
        """Ids that ask for the assistant's next message; if the last message is the assistant's, it
        is left out.

        Never cut: only the caller knows the model's context, and the newest words are the ones that
        matter.
        """
        asked = list(turns(messages))
        if asked[-1].role == "assistant":
            asked.pop()
        ids, _ = self._render(asked)
        return [*ids, self.special["<|assistant_start|>"]]

    def _render(self, chat: Iterable[Turn]) -> tuple[list[int], list[int]]:
        ids, mask = [self.bos], [0]

        def add(new: list[int], learn: bool):
            ids.extend(new)
            mask.extend([int(learn)] * len(new))

        for role, content, learn in chat:
            if isinstance(content, str):
                add(self._fenced(role, content), False)
                continue
            add([self.special["<|assistant_start|>"]], False)
            for kind, text in content:
                if kind == "text":
                    add(self.encode(text), learn)
                elif kind == "python":
                    add(self._fenced("python", text), learn)
                else:
                    # What a tool answers is read, never said.
                    add(self._fenced("output", text), False)
            add([self.special["<|assistant_end|>"]], learn)
        return ids, mask

    def _fenced(self, name: str, text: str) -> list[int]:
        start, end = self.special[f"<|{name}_start|>"], self.special[f"<|{name}_end|>"]
        return [start, *self.encode(text), end]


# Texts that a sound tokenizer gives back, and gives back fast.
PROBES = (
    "It's 12345 naïve\t 東京🙂!\r\n  \n x",
    "a" * 300 + "!",
    " " * 300 + "1" * 300,
    "aA1_-" * 60,
    # a run of each common character
    "".join(character * 60 for character in string.printable + "é日я🙂"),
)
PROBE_SECONDS = 3


def _reads_back(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer gives texts back within seconds, which a stranger's pattern may not."""
    answers = []

    def probe():
        # A pattern that tiktoken cannot bear makes it panic, which is no Exception.
        with contextlib.suppress(BaseException):
            # One that matches nothing at all would make it panic too, and loudly.
            if regex.match(tokenizer.pattern, "", timeout=1):
                return
            answers.append([tokenizer.decode(tokenizer.encode(text)) for text in PROBES])

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers == [list(PROBES)]


def load_tokenizer(spec) -> Tokenizer:
    """The tokenizer named by `spec`: a file or run folder, "tiktoken:gpt2", or "hf:user/repo"."""
    kind, _, name = str(spec).partition(":")
    if kind == "tiktoken":
        return Tokenizer.from_tiktoken(name)
    return Tokenizer.from_hub(name) if kind == "hf" else Tokenizer.load(spec)


def turns(messages) -> Iterator[Turn]:
    """Check a chat and yield its turns: user and assistant one after the other.

    A system's message joins the text of the first user message.
    """

    def refusal(problem: str) -> UserError:
        return UserError(f"this chat cannot be rendered: {problem}")

    if not messages:
        raise refusal("it has no messages")
    system, first = "", 0
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise refusal(f"message {i} is not an object with role and content")
        role, content = message["role"], message["content"]

        # Whose turn it is: the system's may come before all others.
        due = "assistant" if (i - first) % 2 else "user"
        if role == "system" and i == 0:
            due, first = "system", 1
        if role != due:
            raise refusal(f"message {i} has role {role!r} where {due!r} is due (they alternate)")

        if role == "assistant":
            parts = _parts(content)
            if parts is None:
                raise refusal(
                    f"assistant message {i} holds neither text nor a list of {{type, text}} with"
                    f" types {PART_TYPES}"
                )
            yield Turn(role, parts, message.get("weight", 1) != 0)
        elif not isinstance(content, str):
            raise refusal(f"the content of {role} message {i} is not text")
        elif role == "system":
            system = content + "\n\n"
        else:
            yield Turn(role, system + content)
            system = ""
    if len(messages) == first:
        raise refusal("the system message has no user message after it")


def _parts(content) -> list[tuple[str, str]] | None:
    """An assistant's content as (type, text) parts; None where it is of another form."""
    if isinstance(content, str):
        return [("text", content)]
    if not isinstance(content, list):
        return None
    for part in content:
        known = isinstance(part, dict) and part.get("type") in PART_TYPES
        if not known or not isinstance(part.get("text"), str):
            return None
    return [(part["type"], part["text"]) for part in content]


def _cut_blanks(text: str) -> list[str]:
    """The text, cut inside runs of white space longer than `LONGEST_BLANK` and nowhere else."""
    if len(text) <= LONGEST_BLANK:
        return [text]
    runs = [m.span() for m in re.finditer(r"\s+", text)]
    cuts = [
        0,
        *(c for start, end in runs for c in range(start + LONGEST_BLANK, end, LONGEST_BLANK)),
        len(text),
    ]
    return [text[a:b] for a, b in zip(cuts, cuts[1:])]


@contextlib.contextmanager
def _hub_errors(failure: str):
    """Turn whatever the Hub or the way to it answers into a UserError that starts with
    `failure`.
    """
    try:
        yield
    except Exception as e:
        status = getattr(getattr(e, "response", None), "status_code", None)
        hints = {
            401: "the token is missing or wrong, or there is no such repository",
            403: "the token may not do that",
            404: f"no such repository, or no {FILE} in it",
        }
        hint, why = "check the repository's name and the network", type(e).__name__
        if isinstance(status, int):
            hint, why = hints.get(status, hint), f"HTTP {status}"
        raise UserError(f"{failure} on the Hugging Face Hub ({why}): {hint}") from e
