"""What 02 checks at its end."""

import math
import types

import numpy as np
import pytest

from lib import evals, pretrain
from lib.config import Config
from lib.files import UserError
from lib.params import init_params

TINY = Config.from_depth(1, n_embd=32, n_head=1, head_dim=32, vocab_size=64, sequence_len=16)


def test_checks_tell_a_good_training_from_a_bad_one(monkeypatch):
    params = init_params(0, TINY)
    run = types.SimpleNamespace(config=TINY, layout=None)
    nothing_known = math.log(TINY.vocab_size)
    good = pretrain.checks(run, params, [nothing_known, nothing_known - 1], True)
    assert list(good.values()) == [True] * 4

    # a model that looks ahead
    plain = evals.token_losses

    def ahead(params, config, inputs_BT, targets_BT):
        last_B = inputs_BT[:, -1]
        return np.asarray(plain(params, config, inputs_BT, targets_BT)) + last_B[:, None]

    monkeypatch.setattr(evals, "token_losses", ahead)
    bad = pretrain.checks(run, params, [nothing_known + 1, nothing_known + 2], False)
    assert list(bad) != list(good) and list(bad.values()) == [False] * 4


def test_the_vocabulary_is_the_tokenizer_s():
    tokenizer, device = types.SimpleNamespace(vocab_size=300), dict(platform="cpu", kind="cpu")

    def chosen(overrides):
        wishes = pretrain.Wishes(preset="cpu_demo", overrides=overrides)
        return pretrain.choose_model(wishes, device | dict(count=1), tokenizer)

    assert chosen("").vocab_size == chosen("vocab_size=300").vocab_size == 300
    with pytest.raises(UserError, match="vocab_size=128, but the run's tokenizer has 300"):
        chosen("vocab_size=128")


@pytest.mark.parametrize("keep, hours", [(0, 1.0), (1, -1.0), (1, math.nan)])
def test_what_would_only_be_told_after_compiling_is_told_before(keep, hours):
    pretrain.check_leaving(1, 0.0)
    with pytest.raises(UserError, match="must be 0|would keep none"):
        pretrain.check_leaving(keep, hours)
