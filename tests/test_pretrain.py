"""What 02 checks at its end."""

import math
import types

import numpy as np

from lib import evals, pretrain
from lib.config import Config
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
