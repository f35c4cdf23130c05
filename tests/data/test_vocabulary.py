"""lib/data/vocabulary.py: a run's tokenizer is made once, never anew in silence."""

import pytest

from lib.data.tokenizer import FILE
from lib.data.vocabulary import Vocabulary, make_tokenizer, read_by
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
