"""Scales and norms folded into plain matrices say the same; each config finds its family."""

import jax.numpy as jnp
import numpy as np
import pytest

from lib import model
from lib.files import UserError
from lib.interop.families import FAMILIES, fitting, has_short_windows, misfits, refusal
from lib.interop.folding import fold, interleave_halves, normed_rows, swap_halves
from lib.interop.proof import Proof, agreeing, apart
from tests.helpers.models import KINDS, config_of, random_params

TOKENS = np.random.default_rng(3).integers(700, size=(2, 48))


def logits_of(params, config):
    return np.asarray(model.forward(params, config, jnp.asarray(TOKENS))[0])


def refilled(plain, config):
    """Folded weights as parameters of `config`."""
    blocks = {name: np.stack([layer[name] for layer in plain.layers]) for name in plain.layers[0]}
    return {"embed": plain.embed, "head": plain.head, "blocks": blocks}


@pytest.mark.parametrize("kind", ["llama, scaled", "arcee", "qwen3", "nanochat", "gpt2"])
def test_folded_weights_say_the_same(kind):
    config = config_of(kind)
    params = random_params(config)
    # what the folded ones need no more; a query's norm keeps its scale
    plain_config = config.replace(
        resid_scales=False,
        qk_scale=config.qk_scale if config.qk_norm else 1.0,
        tied_head=False,
        vocab_size=704,
    )
    plain = fold(params, config)
    assert plain.embed.shape == (700, 64)
    padded = plain._replace(
        embed=np.pad(plain.embed, ((0, 4), (0, 0))), head=np.pad(plain.head, ((0, 0), (0, 4)))
    )
    theirs = logits_of(refilled(padded, config), plain_config)[..., :700]
    ours = logits_of(params, config)
    difference, bound = apart(ours, theirs)
    assert difference < bound


def test_a_normed_table_needs_no_norm():
    config = config_of("llama")
    params = random_params(config)
    table = normed_rows(np.asarray(params["embed"]), config.norm_eps)
    bare = logits_of(params | {"embed": jnp.asarray(table)}, config.replace(embed_norm=False))
    np.testing.assert_allclose(bare, logits_of(params, config), atol=1e-4)
    assert np.abs(bare - logits_of(params, config.replace(embed_norm=False))).max() > 0.1


def test_eps_is_the_configs():
    config = config_of("llama", embed_norm=False)
    params = random_params(config)
    other = logits_of(params, config.replace(norm_eps=0.1))
    assert np.abs(other - logits_of(params, config)).max() > 0.1


def test_halves():
    w = np.arange(6.0).reshape(1, 1, 6)
    np.testing.assert_array_equal(swap_halves(w)[0, 0], [3, 4, 5, 0, 1, 2])
    np.testing.assert_array_equal(interleave_halves(w)[0, 0], [0, 3, 1, 4, 2, 5])


FAMILY = {
    "llama": "llama",
    "llama, scaled": "llama",
    "gpt2": "arcee",
    "arcee": "arcee",
    "qwen3": "qwen3",
    "nanochat": "nanochat",
    "whole": "",
    "whole, swiglu": "",
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_family(kind):
    assert fitting(config_of(kind)) == FAMILY[kind]


def test_a_misfit_names_the_fields():
    against = misfits(config_of("whole"), FAMILIES["nanochat"])
    assert "smear=True" in against and "qk_scale=1.2" in against
    assert "window_pattern=SSSL" in against
    assert "window_pattern=SSSL" not in misfits(config_of("whole"), FAMILIES["qwen3"])
    with pytest.raises(UserError, match="against qwen3, the nearest, stand .*softcap=15.0"):
        raise refusal(config_of("llama", qk_norm=True, softcap=15.0), FAMILIES, "It")
    # a program may hold less than transformers
    narrow = {"qwen3": FAMILIES["qwen3"]._replace(short_windows=False)}
    assert fitting(config_of("qwen3")) == "qwen3" and fitting(config_of("qwen3"), narrow) == ""
    with pytest.raises(UserError, match="against qwen3, the nearest, stand window_pattern=SSSL;"):
        raise refusal(config_of("qwen3"), narrow, "It")


def test_windows_as_long_as_the_context_are_none():
    short = config_of("qwen3", sequence_len=128, total_batch_size=128)
    assert not has_short_windows(short) and has_short_windows(config_of("qwen3"))


def test_a_proof_that_does_not_hold_is_refused():
    good = Proof("x", "here", 1, 1.0, 1e-5, 1e-4, (3, 3), (5, 5))
    assert good.check() is good
    table = good.table()
    assert "3 of 3" in table and "5 of 5" in table
    for change in (dict(difference=1e-3), dict(greedy=(2, 3)), dict(texts=(4, 5))):
        with pytest.raises(UserError, match="was not kept"):
            Proof(**{**good.__dict__, **change}).check()


def test_agreement_counts_from_the_first_token():
    assert agreeing([1, 2, 3], [1, 2, 3]) == (3, 3)
    assert agreeing([1, 2, 3], [1, 9, 3]) == (1, 3)
    assert agreeing([1, 2], [1, 2, 3]) == (2, 3)
    assert apart(np.zeros(2), np.array([0, np.nan]))[0] == float("inf")
