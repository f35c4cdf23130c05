"""lib/train/changes.py: what people are told to change may change, what mixes experiments not."""

import pytest

from lib.config import Config
from lib.files import UserError
from lib.train.changes import HOW, RATES, allowed_changes

BEFORE = Config.from_depth(2, num_steps=100).to_dict() | {
    "source": "a",
    "packing": "bestfit",
    "tokenizer": "t",
}


def test_nothing_changed():
    assert allowed_changes(BEFORE, dict(BEFORE), "run", 10) == ([], [])


@pytest.mark.parametrize("name", ["microbatch", "remat", "attention", "loss_chunk", "source"])
def test_how_it_is_computed_stops_no_resume(name):
    how, rates = allowed_changes(BEFORE, BEFORE | {name: "other"}, "run", 10)
    assert len(how) == 1 and name in how[0] and rates == []


@pytest.mark.parametrize("name", ["matrix_lr", "warmup_steps", "num_steps"])
def test_rates_and_horizon_change_with_a_line(name):
    how, rates = allowed_changes(BEFORE, BEFORE | {name: 12345}, "run", 10)
    assert how == [] and f"{name} was {BEFORE[name]!r} and is 12345" == rates[0]


@pytest.mark.parametrize("name", ["n_layer", "seed", "packing", "tokenizer", "total_batch_size"])
def test_what_mixes_experiments_is_refused(name):
    with pytest.raises(UserError, match=f"other settings .{name} was .*if_exists=fresh"):
        allowed_changes(BEFORE, BEFORE | {name: "other"}, "run", 10)


def test_a_horizon_that_is_passed_is_refused():
    with pytest.raises(UserError, match="at step 50 already, beyond num_steps=40"):
        allowed_changes(BEFORE, BEFORE | {"num_steps": 40}, "run", 50)


def test_every_name_is_a_setting():
    assert HOW | RATES <= BEFORE.keys()
