"""Decoding programs that are kept on disk."""

import types

import jax
import numpy as np
import pytest

from lib import model
from lib.config import Config
from lib.generate import Engine, Sampling
from lib.generate import kept as kept_module
from lib.generate.kept import keep_programs
from lib.model import decoding

CONFIG = Config(
    vocab_size=50,
    sequence_len=64,
    n_layer=2,
    n_embd=32,
    n_head=2,
    n_kv_head=2,
    head_dim=16,
    mlp_dim=32,
    microbatch=1,
    total_batch_size=64,
    num_steps=1,
)


def written(folder) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities of one answer by a new engine that keeps its programs there."""
    engine = Engine(model.init_params(jax.random.key(0), CONFIG), CONFIG, 1, 64)
    keep_programs(engine, folder)
    slot = engine.add([1, 2, 3], Sampling(12, temperature=0.7, top_k=9, seed=3))
    tokens, end = [], None
    while not end:
        new, end = engine.step()[slot]
        tokens += new
    return [token.id for token in tokens], [token.logprob for token in tokens]


@pytest.mark.slow
@pytest.mark.parametrize("cached", [decoding.CACHED, 0], ids=["xla", "few_rows"])
def test_kept_programs_write_the_same_and_are_not_traced_again(tmp_path, monkeypatch, cached):
    monkeypatch.setattr(decoding, "CACHED", cached)
    plain = written(None)
    assert len(plain[0]) == 12 and len(set(plain[0])) > 3
    assert written(tmp_path) == plain
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2

    # another process traces nothing
    def no_more(*_):
        raise AssertionError("traced again")

    with monkeypatch.context() as m:
        m.setattr(kept_module.KeptProgram, "_flat", no_more)
        assert written(tmp_path) == plain

    # a damaged file is made again
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[: len(whole) // 2])
    assert written(tmp_path) == plain
    assert len(files[0].read_bytes()) > len(whole) // 2


def test_programs_are_kept_by_code_and_settings(monkeypatch):
    key = kept_module._key("decode", 1)
    assert key != kept_module._key("decode", 2)
    monkeypatch.setattr(kept_module, "_code", lambda: "other code")
    assert key != kept_module._key("decode", 1)


def test_configs_of_equal_shapes_have_programs_of_their_own(tmp_path, monkeypatch):
    made = []

    def exported(path, function, leaves):
        made.append(path.name)
        return types.SimpleNamespace(call=lambda *leaves: leaves)

    monkeypatch.setattr(kept_module, "_exported", exported)
    program = kept_module.KeptProgram(lambda params, config, x: x, tmp_path, given_back=1)
    ones = np.ones(3, np.float32)
    # the same twice, another constant in the code, another setting, another shape
    program({}, CONFIG, ones)
    program({}, CONFIG, ones)
    program({}, CONFIG.replace(softcap=CONFIG.softcap + 1), ones)
    program({}, CONFIG, ones, pause=1)
    program({}, CONFIG, ones[:2])
    assert len(made) == len(set(made)) == 4


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path):
    place = tmp_path / "file"
    place.write_text("")
    assert len(written(place)[0]) == 12
    assert place.read_text() == ""
