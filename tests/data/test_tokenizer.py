"""The tokenizer against the reference data, its properties, and what it says to bad input."""

import base64
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from lib.data import merges
from lib.data.tokenizer import (
    LONGEST_BLANK,
    PATTERN,
    PUBLISHED,
    SPECIAL_TOKENS,
    Tokenizer,
    load_tokenizer,
)
from lib.files import UserError

PARITY = Path(__file__).parents[1] / "golden"
TEXTS = [
    "",
    "plain words, don't you think?",
    "digits 1 22 333 4444 3.14159",
    "  indented\n\n\t\ttabs \r\n  end  ",
    "naïve 東京 🙂🚀 Δx مرحبا 한국어",
    "names of special tokens: <|bos|><|user_start|> <|output_end|>",
    "\x00\x01 control, \u2028 separators \u3000",
    "x" * 3000,
]


@pytest.fixture(scope="module")
def golden():
    return json.loads((PARITY / "tokenizer.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(golden):
    return Tokenizer.train(
        golden["training"]["documents"], golden["vocab_size"], meta={"source": "parity"}
    )


def file_of(tokenizer, **changes):
    """A saved tokenizer with some entries replaced, and no fingerprint to give that away."""
    data = json.loads(tokenizer.to_json()) | changes
    del data["fingerprint"]
    return json.dumps(data)


def ranks_of(*tokens):
    return [[base64.b64encode(token).decode(), i] for i, token in enumerate(tokens)]


# ---- the reference


def test_training_gives_the_reference_ranks(tokenizer, golden):
    assert tokenizer.pattern == golden["pattern"]
    assert list(tokenizer.tokens) == [
        base64.b64decode(token) for token, _ in golden["mergeable_ranks"]
    ]
    assert tokenizer.special == golden["special_tokens"]
    assert tokenizer.vocab_size == golden["vocab_size"]
    assert tokenizer.bos == golden["special_tokens"][golden["bos_token"]]
    assert tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.token_bytes.tolist() == golden["token_bytes"]


def test_encoding_matches_the_reference(tokenizer, golden):
    samples = golden["encode_samples"]
    for sample in samples:
        assert tokenizer.encode(sample["text"]) == sample["ids"]
        assert tokenizer.encode(sample["text"], bos=True) == sample["ids_with_bos"]
    texts = [sample["text"] for sample in samples]
    assert tokenizer.encode_batch(texts, bos=True, threads=2) == [
        sample["ids_with_bos"] for sample in samples
    ]
    assert tokenizer.encode_batch(iter(texts)) == [sample["ids"] for sample in samples]


def test_chats_match_the_reference(tokenizer):
    cases = json.loads((PARITY / "chat.json").read_text())
    assert len(cases) == 6
    for case in cases:
        messages = case["conversation"]["messages"]
        before = json.dumps(messages)
        ids, mask = tokenizer.render_conversation(messages, case["max_tokens"])
        assert (ids, mask) == (case["ids"], case["mask"])
        if "ids_for_completion" in case:
            assert tokenizer.render_for_completion(messages) == case["ids_for_completion"]
            assert tokenizer.render_for_completion(messages[:-1]) == case["ids_for_completion"]
        assert json.dumps(messages) == before  # rendering leaves the caller's messages alone


def test_the_reference_file_loads(tokenizer):
    assert Tokenizer.load(PARITY / "tokenizer.json").fingerprint == tokenizer.fingerprint


# ---- properties


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < tokenizer.bos  # a special token's name in a text is plain text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_decode_takes_arrays_special_ids_and_half_characters(tokenizer):
    assert tokenizer.decode(np.array(tokenizer.encode("hello"), np.int32)) == "hello"
    assert tokenizer.decode([tokenizer.bos]) == "<|bos|>"
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_an_immense_blank_is_encoded_not_a_crash(tokenizer):
    text = "a" + " " * (2 * LONGEST_BLANK + 7) + "b" + "\n" * 10 + "c" * LONGEST_BLANK
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # a long text with short blanks must not be cut at all
    long = "some words\n  more, " * (LONGEST_BLANK // 10)
    assert tokenizer.encode(long) == tokenizer.encoding.encode_ordinary(long)


def test_training_reads_a_stream_up_to_its_caps(golden):
    documents = golden["training"]["documents"]
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield documents[taken % len(documents)]

    capped = Tokenizer.train(endless(), 300, max_chars=5000, doc_cap=100)
    assert 50 <= taken <= 200
    same = [documents[i % len(documents)][:100] for i in range(1, taken + 1)]
    same[-1] = same[-1][: 5000 - sum(map(len, same[:-1]))]
    assert sum(map(len, same)) == 5000
    assert capped.tokens == Tokenizer.train(same, 300).tokens


def test_lone_surrogates_and_blanks_do_not_stop_training(golden):
    odd = ["\ud83d half an emoji", " " * (2 * LONGEST_BLANK) + "x"]
    assert Tokenizer.train(golden["training"]["documents"] + odd, 300).vocab_size == 300


def test_save_load_pickle_and_fingerprint(tokenizer, golden, tmp_path):
    run = tmp_path / "runs" / "a"
    tokenizer.save(run / "tokenizer.json")
    loaded = [
        load_tokenizer(run),
        load_tokenizer(str(run / "tokenizer.json")),
        pickle.loads(pickle.dumps(tokenizer)),
    ]
    for other in loaded:
        assert other.tokens == tokenizer.tokens and other.meta == tokenizer.meta
        assert other.fingerprint == tokenizer.fingerprint
        assert other.encode(TEXTS[4]) == tokenizer.encode(TEXTS[4])
    smaller = Tokenizer.train(golden["training"]["documents"], 499)
    digits = Tokenizer(tokenizer.pattern.replace("{1,2}", "{1,3}"), tokenizer.tokens)
    assert len({t.fingerprint for t in (tokenizer, smaller, digits)}) == 3


def test_a_published_encoding_gets_our_special_tokens(tokenizer, monkeypatch):
    published = tiktoken.Encoding(
        "gpt2",
        pat_str=r"\w+|\W",
        mergeable_ranks={t: i for i, t in enumerate(tokenizer.tokens)},
        special_tokens={"<|endoftext|>": 491},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: published)
    ours = load_tokenizer("tiktoken:gpt2")
    text = "Hello <|endoftext|> 12345"
    assert ours.encode(text) == published.encode_ordinary(text)
    assert list(ours.special) == list(SPECIAL_TOKENS) and ours.bos == 491 and ours.vocab_size == 500
    assert ours.pattern == published._pat_str and ours.meta == {"source": "tiktoken:gpt2"}


class Hub:
    """The part of huggingface_hub that the tokenizer uses, over a dict; a wrong token answers"
    " like the real one."""

    def __init__(self, folder, status=None):
        self.folder, self.files, self.status = folder, {}, status

    def check(self, *_, token=None, **__):
        if self.status or token != "hf_good":
            error = Exception("a page of explanations\nwith several lines")
            error.response = type("Response", (), {"status_code": self.status or 401})
            raise error

    def HfApi(self, token=None):
        def create_repo(repo, private, exist_ok):
            self.check(token=token)
            return f"https://huggingface.co/{repo}"

        def upload_file(path_or_fileobj, path_in_repo, repo_id):
            self.files[repo_id, path_in_repo] = path_or_fileobj

        return type(
            "Api",
            (),
            {"create_repo": staticmethod(create_repo), "upload_file": staticmethod(upload_file)},
        )

    def hf_hub_download(self, repo, name, token=None):
        path = self.folder / "download"
        path.write_bytes(self.files[repo, name])
        return path

    def install(self, monkeypatch):
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "HfApi", self.HfApi)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", self.check)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.hf_hub_download)


def test_push_and_pull(tokenizer, tmp_path, monkeypatch):
    Hub(tmp_path).install(monkeypatch)
    assert tokenizer.push_to_hub("me/tok", token="hf_good") == "https://huggingface.co/me/tok"
    assert Tokenizer.from_hub("me/tok", token="hf_good").fingerprint == tokenizer.fingerprint


# ---- bad input: one sentence each


def refused(match):
    return pytest.raises(UserError, match=match)


@pytest.mark.parametrize("texts", [[], [""], iter(())])
def test_empty_corpus(texts):
    with refused("empty corpus"):
        Tokenizer.train(texts, 300)


def test_vocabulary_too_small_is_refused_before_reading():
    with refused("vocab_size 264 is too small.*265"):
        Tokenizer.train(iter(lambda: pytest.fail("the corpus was read"), None), 264)


@pytest.mark.parametrize("cap", ["max_chars", "doc_cap"])
def test_caps_below_one(cap):
    with refused(f"{cap} must be at least 1, not 0"):
        Tokenizer.train(["text"], 265, **{cap: 0})


def test_vocabulary_larger_than_the_data_supports():
    with refused("vocabulary of 400 needs more text.*at most 268") as e:
        Tokenizer.train(["abcab"], 400)  # ab, abc, abcab: three merges and no more
    assert "\n" not in str(e.value)
    assert len(Tokenizer.train(["abcab"], 268).encode("abcab")) == 1


DAMAGE = {
    "not json": lambda t: "once upon a time",
    "cut short": lambda t: t.to_json()[:-200],
    "empty": lambda t: "",
    "not utf-8": lambda t: b"\xff\xfe\x00",
    "another format": lambda t: json.dumps(
        {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}}}
    ),
    "a list": lambda t: "[1, 2]",
    "a hole in the ranks": lambda t: file_of(
        t, mergeable_ranks=ranks_of(*t.tokens[:-1]) + [["enp6enp6", 499]]
    ),
    "a repeated token": lambda t: file_of(t, mergeable_ranks=ranks_of(*t.tokens[:-1], b"a")),
    "a byte is missing": lambda t: file_of(t, mergeable_ranks=ranks_of(b"zzzz", *t.tokens[1:])),
    "ranks are not pairs": lambda t: file_of(t, mergeable_ranks=[1, 2]),
    "a changed token": lambda t: t.to_json().replace(
        base64.b64encode(t.tokens[300]).decode(), "enp6enp6", 1
    ),
    "other special tokens": lambda t: file_of(t, special_tokens={"<|endoftext|>": 491}),
    "a broken pattern": lambda t: file_of(t, pattern="("),
    "an empty pattern": lambda t: file_of(t, pattern=""),
    "a pattern that goes back for ever": lambda t: file_of(t, pattern=r"(?:(?:a+)+)+!!|."),
    "nested for ever": lambda t: "[" * 200_000,
    "a pattern that loses text": lambda t: file_of(t, pattern=r"\w+"),
    "a pattern that is no text": lambda t: file_of(t, pattern=5),
    "meta is no object": lambda t: file_of(t, meta=7),
}


def test_a_pattern_that_goes_back_for_ever_is_refused_for_what_it_does(tokenizer, tmp_path):
    """Whole files, with fingerprints of their own; the pattern alone is wrong."""
    path = tmp_path / "tokenizer.json"
    for runs in ("a", r"\s", r"\n", "é", "日", "-", "z"):
        pattern = rf"(?:({runs}+)\1*)+!!|[\s\S]"
        Tokenizer(pattern, tokenizer.tokens).save(path)
        with refused("tokenizer.json is not a rawchat tokenizer or is damaged"):
            Tokenizer.load(path)
    # one that no probe finds is told where it is met, and one that is only slow to write is taken
    rare = Tokenizer(r"(?:((?:qz)+)\1*)+!!|[\s\S]", tokenizer.tokens)
    rare.save(path)
    with refused("goes back without end"):
        Tokenizer.load(path).encode("qz" * 60)
    Tokenizer(r"(?:(?:a+)+)+!!|[\s\S]", tokenizer.tokens).save(path)
    assert Tokenizer.load(path).decode(Tokenizer.load(path).encode("a" * 99)) == "a" * 99


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_foreign_or_damaged_file_is_one_sentence(tokenizer, tmp_path, damage):
    data = DAMAGE[damage](tokenizer)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with refused("tokenizer.json is not a rawchat tokenizer or is damaged") as e:
        Tokenizer.load(path)
    assert "\n" not in str(e.value)


def test_a_pipe_in_place_of_a_tokenizer_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with refused("no ordinary file"):
        Tokenizer.load(tmp_path)


def test_missing_file_and_folder_without_tokenizer(tmp_path):
    with refused("no tokenizer to read at .*nothing.json"):
        Tokenizer.load(tmp_path / "nothing.json")
    with refused("no tokenizer to read at .*tokenizer.json"):
        load_tokenizer(tmp_path)


def test_saving_where_a_file_stands_in_the_way(tokenizer, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with refused("cannot write"):
        tokenizer.save(tmp_path / "runs" / "a" / "tokenizer.json")


def test_unknown_published_encoding_lists_the_valid_ones():
    with refused(", ".join(sorted(PUBLISHED))):
        load_tokenizer("tiktoken:gpt5")


def unreachable(name):
    raise ConnectionError("a page\nof explanations")


def silent(name):
    threading.Event().wait(30)


@pytest.mark.parametrize(
    "network, why", [(unreachable, "ConnectionError"), (silent, "no answer in 0.2 s")]
)
def test_no_network_for_a_published_encoding(monkeypatch, network, why):
    monkeypatch.setattr(tiktoken, "get_encoding", network)
    start = time.monotonic()
    with refused(why) as e:
        Tokenizer.from_tiktoken("gpt2", timeout=0.2)
    assert time.monotonic() - start < 5 and "\n" not in str(e.value)


HUB_ANSWERS = [
    (None, "token is missing or wrong"),
    (403, "may not"),
    (404, "no such"),
    (503, "network"),
]


@pytest.mark.parametrize("status, why", HUB_ANSWERS)
def test_hub_refusals(tokenizer, tmp_path, monkeypatch, status, why):
    Hub(tmp_path, status).install(monkeypatch)
    for attempt in (
        lambda: tokenizer.push_to_hub("me/tok", token="hf_bad"),
        lambda: load_tokenizer("hf:me/tok"),
    ):
        with refused(f"me/tok.*HTTP.*{why}") as e:
            attempt()
        assert "\n" not in str(e.value)


USER, ASSISTANT, SYSTEM = (
    {"role": role, "content": "hi"} for role in ("user", "assistant", "system")
)
BAD_CHATS = {
    "no messages": [],
    "message 0 has role 'assistant'": [ASSISTANT],
    "message 1 has role 'user'": [USER, USER],
    "message 2 has role 'assistant'": [USER, ASSISTANT, ASSISTANT],
    "message 1 has role 'system'": [USER, SYSTEM],
    "message 0 has role 'tool'": [{"role": "tool", "content": "hi"}],
    "message 1 has role 'assistant' where 'user'": [SYSTEM, ASSISTANT],
    "no user message after": [SYSTEM],
    "message 0 is not an object": ["hi"],
    "message 1 is not an object with role and content": [USER, {"role": "assistant"}],
    "user message 0 is not text": [{"role": "user", "content": None}],
    "system message 0 is not text": [{"role": "system", "content": 3}, USER],
    "assistant message 1 holds neither": [
        USER,
        {"role": "assistant", "content": [{"type": "image", "text": "x"}]},
    ],
    "with types": [USER, {"role": "assistant", "content": [{"type": "python"}]}],
    "nor a list": [USER, {"role": "assistant", "content": 5}],
}


@pytest.mark.parametrize("problem", BAD_CHATS)
def test_bad_chats(tokenizer, problem):
    for render in (tokenizer.render_conversation, tokenizer.render_for_completion):
        with refused(problem):
            render(BAD_CHATS[problem])


# ---- the benchmark


@pytest.mark.slow
def test_the_benchmark_runs_as_a_file_too(tmp_path):
    script = PARITY.parents[1] / "benchmarks" / "tokenizing.py"
    args = [
        "--vocab-sizes",
        "300",
        "--workers",
        "1",
        "--max-chars",
        "20000",
        "--json",
        tmp_path / "out.json",
    ]
    subprocess.run([sys.executable, script, *args], check=True, capture_output=True, cwd=tmp_path)
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["vocab_size"] == 300 and min(row.values()) > 0
    place = f"sys.path.insert(0, {str(script.parent)!r})"
    code = f"import sys; {place}; import tokenize; tokenize.TokenError"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_much_text_is_learnt_in_another_process_and_gives_the_same(monkeypatch):
    texts = ["the cat sat on the mat, naïve 東京", "", "the dog sat on the log\n" * 40]
    here = merges.learn(texts, 270, PATTERN)
    monkeypatch.setattr(merges, "APART_CHARS", 20)
    assert merges.learn(texts, 270, PATTERN) == here and len(here) == 270

    def broken():
        yield "x" * 30
        raise UserError("line 7 is no text")

    with pytest.raises(UserError, match="line 7"):
        merges.learn(broken(), 270, PATTERN)
