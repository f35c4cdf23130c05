"""Initial values: right distributions, and stable when the model grows."""

import jax
import numpy as np
import pytest

from lib.config import Config
from lib.model.transformer import loss_fn
from lib.params import count_params, init_params, named_specs, templates

SMALL = dict(
    vocab_size=300,
    sequence_len=32,
    n_layer=4,
    n_embd=96,
    n_head=2,
    n_kv_head=2,
    head_dim=48,
    mlp_dim=384,
    microbatch=1,
    total_batch_size=32,
)


def test_distributions_are_the_references():
    c = Config(**SMALL)
    p = init_params(0, c)
    s = (3 / c.n_embd) ** 0.5
    for name in ("wq", "wk", "wv", "w_in"):
        w, bound = np.asarray(p["blocks"][name]), 0.4 * s if name == "w_in" else s
        assert np.abs(w).max() <= bound and np.std(w) == pytest.approx(bound / 3**0.5, rel=0.03)
    assert not p["blocks"]["wo"].any() and not p["blocks"]["w_out"].any()
    assert np.std(p["embed"]) == pytest.approx(0.8, rel=0.03) and np.std(
        p["head"]
    ) == pytest.approx(0.001, rel=0.03)
    assert 0 <= p["blocks"]["value_gate"].min() and p["blocks"]["value_gate"].max() <= 0.02
    np.testing.assert_allclose(p["blocks"]["resid_scale"], np.linspace(1.15, 1.05, 4), rtol=1e-6)
    np.testing.assert_allclose(p["blocks"]["x0_scale"], np.linspace(0.2, 0.05, 4), rtol=1e-6)
    assert float(p["smear"]["scale"]) == 0 and float(p["backout"]) == np.float32(0.2)


def test_growing_deeper_or_dropping_parts_keeps_the_rest():
    small, deep = init_params(0, Config(**SMALL)), init_params(0, Config(**SMALL | {"n_layer": 6}))
    for name in ("wq", "w_in"):
        np.testing.assert_array_equal(small["blocks"][name], deep["blocks"][name][:4])
    bare = init_params(
        0,
        Config(
            **SMALL, smear=False, backout=False, value_embeds=False, x0_scales=False, tied_head=True
        ),
    )
    assert set(bare) == {"embed", "blocks"} and "x0_scale" not in bare["blocks"]
    # one key, a tied table's scale
    scale = 2.5 / bare["embed"].shape[1]
    np.testing.assert_allclose(bare["embed"] / scale, small["embed"] / 0.8, rtol=1e-6)
    other = init_params(1, Config(**SMALL))
    assert not np.array_equal(other["embed"], small["embed"])
    assert not np.array_equal(small["blocks"]["wq"][0], small["blocks"]["wq"][1])
    # nor do two weights of one shape begin alike, however long their names
    assert not np.array_equal(small["blocks"]["wq"], small["blocks"]["wk"])


@pytest.mark.parametrize(
    "parts", [{}, {"mlp": "swiglu"}, {"tied_head": True, "value_embeds": False}, {"n_kv_head": 1}]
)
def test_counts_and_templates_say_what_init_makes(parts):
    c = Config(**SMALL | parts)
    made = init_params(0, c)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(
        lambda a: (a.shape, a.dtype), templates(c)
    )
    counts = count_params(c)
    assert counts["total"] == sum(a.size for a in jax.tree.leaves(made))
    assert c.scaling_params == counts["blocks"] + counts["head"]
    assert [name for name, _ in named_specs(c)] == [
        jax.tree_util.keystr(p, simple=True, separator=".")
        for p, _ in jax.tree_util.tree_leaves_with_path(made)
    ]


@pytest.mark.parametrize("width", [128, 768])
def test_a_new_model_foresees_nothing_with_a_tied_head_either(width):
    config = Config.preset(
        "gpt2_like",
        n_layer=1,
        n_embd=width,
        n_head=2,
        vocab_size=512,
        sequence_len=32,
        compute_dtype="float32",
        attention="einsum",
    )
    x = jax.random.randint(jax.random.key(1), (2, 32), 0, 512)
    loss, _ = loss_fn(init_params(jax.random.key(0), config), config, x, x[:, ::-1])
    assert config.tied_head and abs(float(loss) - np.log(512)) < 0.1
