"""lib/data/vocabulary.py: a run's tokenizer is made once, never anew in silence."""

import pytest

from lib.data import vocabulary as rules
from lib.data.tokenizer import FILE, PATTERN, Tokenizer
from lib.data.vocabulary import Vocabulary, make_tokenizer, read_by, trained_on
from lib.files import UserError


@pytest.fixture
def vocabulary(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.txt").write_text(f"the cat {i} sat on the mat and said {i * 37}\n" * 30)
    return Vocabulary(source=str(text), vocab_size=300)


def test_it_is_made_once_and_then_the_same(tmp_path, vocabulary):
    run = tmp_path / "run"
    tokenizer, made = make_tokenizer(run, vocabulary)
    assert made and tokenizer.vocab_size == 300 and (run / FILE).exists()
    assert read_by(tokenizer) == vocabulary.source

    again, made = make_tokenizer(run, vocabulary)
    assert not made and again.fingerprint == tokenizer.fingerprint


def test_other_settings_are_refused_and_named(tmp_path, vocabulary):
    make_tokenizer(tmp_path / "run", vocabulary)
    other = vocabulary._replace(vocab_size=310)
    with pytest.raises(UserError, match="other settings .vocab_size."):
        make_tokenizer(tmp_path / "run", other)
    with pytest.raises(UserError, match="exists: choose another run"):
        make_tokenizer(tmp_path / "run", vocabulary, "stop")
    assert make_tokenizer(tmp_path / "run", other, "fresh")[0].vocab_size == 310


def test_a_tokenizer_of_elsewhere_is_taken_as_it_is(tmp_path, vocabulary):
    first, _ = make_tokenizer(tmp_path / "run", vocabulary)
    taken = Vocabulary(pretrained=str(tmp_path / "run" / FILE))
    tokenizer, made = make_tokenizer(tmp_path / "other", taken)
    assert made and tokenizer.fingerprint == first.fingerprint
    assert tokenizer.meta["settings"] == {"pretrained": taken.pretrained}


def test_a_run_reads_the_text_that_its_tokenizer_was_taken_for(tmp_path, vocabulary):
    """Not the one it was trained on, and not the embedded one."""
    make_tokenizer(tmp_path / "first", vocabulary)
    mine = Vocabulary(source="mine/*.md", pretrained=str(tmp_path / "first" / FILE))
    run = tmp_path / "run"
    assert read_by(make_tokenizer(run, mine)[0]) == "mine/*.md"
    assert trained_on(Tokenizer.load(run / FILE)) == ""
    # looked at on another text, which is then the run's
    make_tokenizer(run, mine._replace(source="other/*.md"))
    assert read_by(Tokenizer.load(run / FILE)) == "other/*.md"
    # as older files have it
    assert read_by(Tokenizer(PATTERN, tuple(bytes([b]) for b in range(256)))) == "stdlib"


# ---- looking at one


@pytest.fixture(scope="module")
def abab():
    """Bytes, then ab, then abab."""
    letters = [bytes([b]) for b in range(256)]
    return Tokenizer(PATTERN, (*letters, b"ab", b"abab"))


def test_the_most_frequent_pair_counts_words_and_of_equals_sorts_last():
    once, thrice = (b"a", b"b", b"a"), (b"b", b"c")
    assert rules.most_frequent_pair({once: 1, thrice: 3}) == ((b"b", b"c"), 3)
    for words in ({once: 1, thrice: 1}, {thrice: 1, once: 1}):
        assert rules.most_frequent_pair(words) == ((b"b", b"c"), 1)


def test_merges_by_hand(abab):
    assert rules.merged((b"a", b"a", b"a"), (b"a", b"a")) == (b"aa", b"a")
    assert rules.words_of(["ab 123", "ab"])[b"a", b"b"] == 2
    # ab stands twice in each of the two words, abab once
    assert rules.first_merges(abab, ["abab abab"]) == [(b"ab", 4), (b"abab", 2)]
    assert rules.merge_steps(abab, "abab")[1:] == [(b"ab", b"ab"), (b"abab",)]


def test_bytes_per_token_are_those_of_all_texts_together(abab):
    # 4 bytes in 1 token, 2 bytes in 2
    assert rules.bytes_per_token(abab, ["abab", "\u00e9"]) == 2
    assert rules.bytes_per_token(abab, "abab") == 4


def test_a_round_trip_that_loses_something_is_seen(abab):
    rules.check_round_trip(abab, ["abab \u00e9"])
    with pytest.raises(AssertionError, match="does not come back"):
        rules.check_round_trip(abab, ["half a character \ud800"])
