"""Our model is the reference's model; and what must hold of any model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib import model
from lib.config import Config
from lib.interop.nanochat import from_nanochat
from lib.model import transformer
from lib.model.transformer import group_size
from lib.params import init_params
from tests.helpers.golden import load, parity_model

forward = jax.jit(model.forward, static_argnums=1)
loss_and_grad = jax.jit(jax.value_and_grad(model.loss_fn, has_aux=True), static_argnums=1)
token_losses = jax.jit(model.token_losses, static_argnums=1)
TINY = Config(
    vocab_size=100,
    sequence_len=256,
    n_layer=5,
    n_embd=32,
    n_head=2,
    n_kv_head=1,
    head_dim=16,
    mlp_dim=64,
    window_pattern="SL",
    microbatch=1,
    total_batch_size=256,
    loss_chunk=100,
)


@functools.cache
def tiny_params(config=TINY):
    """Perturbed, so that the output projections and scales that start at zero matter."""
    leaves, tree = jax.tree.flatten(init_params(0, config))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree, [a + 0.1 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves)]
    )


def tokens(rows, length, seed=0, vocab=100):
    return np.random.default_rng(seed).integers(0, vocab, (rows, length)).astype(np.int32)


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))


# ---- the golden model ----------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "small chunks, recomputing products": dict(loss_chunk=300, remat="dots"),
    "recomputing layers": dict(remat="layer"),
    "jax attention": dict(attention="jax"),
}


def test_logits_and_token_losses_match_the_reference():
    config, params = parity_model("A")
    io = load("model_A_io.safetensors")
    logits, _ = forward(params, config, io["idx"])
    assert logits.dtype == jnp.float32 and np.abs(logits - io["logits"]).max() < 3e-5
    losses = token_losses(params, config, io["idx"], io["targets"])
    assert np.abs(losses - io["loss_per_token"]).max() < 5e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_every_gradient_match_the_reference(variant):
    config, params = parity_model("A")
    config = config.replace(**VARIANTS[variant])
    io = load("model_A_io.safetensors")
    (loss, aux), grads = loss_and_grad(params, config, io["idx"], io["targets"])
    assert abs(float(loss) - io["loss_mean"][0]) < 1e-5
    assert (
        abs(float(aux["loss_sum"]) - io["loss_sum"][0]) < 1e-2
        and int(aux["count"]) == (io["targets"] >= 0).sum()
    )
    want = from_nanochat(load("model_A_grads.safetensors"), config)
    for (path, got), expected in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want)
    ):
        limit = 1e-4 if got.ndim > 1 else 5e-4
        assert relative(got, np.asarray(expected)) < limit, jax.tree_util.keystr(path)


# ---- properties ----------------------------------------------------------------------------------


def test_no_position_sees_a_later_one_or_another_row():
    x = tokens(2, 200)
    base, _ = forward(tiny_params(), TINY, x)
    changed = x.copy()
    changed[0, 120:] = (changed[0, 120:] + 1) % 100
    other, _ = forward(tiny_params(), TINY, changed)
    np.testing.assert_array_equal(base[0, :120], other[0, :120])
    np.testing.assert_array_equal(base[1], other[1])
    assert np.abs(base[0, 120:] - other[0, 120:]).max() > 1e-3


def test_short_windows_end_where_the_reference_says():
    """With one short layer and no other way back, position 200 sees 72 = 200 - 128 and not 71 (the
    smear gate reads one more).
    """
    c = TINY.replace(
        n_layer=1,
        window_pattern="S",
        sequence_len=512,
        total_batch_size=512,
        smear=False,
        value_embeds=False,
    )
    params = tiny_params(c)
    run = jax.jit(
        lambda p, x: transformer.block(
            x,
            x,
            jax.tree.map(lambda a: a[0], p["blocks"]),
            None,
            c,
            transformer.rope_tables(jnp.arange(x.shape[1]), c),
            transformer.full_attention(c, 128),
        )[0]
    )
    x = jax.random.normal(jax.random.key(0), (1, 300, 32))
    seen = lambda j: np.abs(run(params, x.at[0, j].add(1.0)) - run(params, x))[0, 200].max() > 0
    assert seen(72) and not seen(71) and not seen(201)


# three groups of two layers, and a last layer of its own
SEVEN = TINY.replace(n_layer=7)


@pytest.fixture(scope="module")
def unrolled():
    """Loss and gradients of seven layers that are not scanned."""
    x = tokens(2, 64)
    return loss_and_grad(tiny_params(SEVEN), SEVEN.replace(scan_layers=False), x, x)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "layer"])
def test_scanned_layers_equal_unrolled_ones(unrolled, remat):
    x = tokens(2, 64)
    assert group_size(SEVEN) == (2, 3)
    assert group_size(SEVEN.replace(scan_layers=False)) == (2, 0)
    (loss, _), grads = loss_and_grad(tiny_params(SEVEN), SEVEN.replace(remat=remat), x, x)
    (want, _), expected = unrolled
    assert float(loss) == pytest.approx(float(want), rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_recomputing_products_turns_no_heads_again(qk_norm):
    """A rotation joins two halves: of queries and keys, on the way there and on the way back."""
    x = tokens(1, 64)
    c = TINY.replace(n_layer=1, remat="dots", smear=False, qk_norm=qk_norm, value_embeds=False)

    def loss(params):
        return model.loss_fn(params, c, x, x)[0]

    jaxpr = jax.make_jaxpr(jax.grad(loss))(tiny_params(c))
    shape = f"f32[1,64,{{}},{c.head_dim}] = concatenate"
    joined = [str(jaxpr).count(shape.format(heads)) for heads in (c.n_head, c.n_kv_head)]
    assert joined == [2, 2]


@pytest.mark.parametrize(
    "pattern,layers,groups",
    [
        ("SSSL", 16, (4, 4)),
        ("SSSL", 26, (4, 6)),
        ("L", 6, (2, 3)),
        ("S", 6, (2, 2)),
        ("SSSL", 6, (4, 0)),
    ],
)
def test_groups_cover_equal_layers_only(pattern, layers, groups):
    c = TINY.replace(
        window_pattern=pattern, n_layer=layers, sequence_len=1024, total_batch_size=1024
    )
    assert group_size(c) == groups
    period, n = groups
    kinds = [(w, i in c.value_layers) for i, w in enumerate(c.windows)]
    assert kinds[: n * period] == kinds[:period] * n


@pytest.mark.parametrize(
    "parts",
    [
        dict(mlp="swiglu"),
        dict(mlp="gelu"),
        dict(tied_head=True),
        dict(softcap=0.0),
        dict(qk_norm=False),
        dict(value_embeds=False, smear=False, backout=False, x0_scales=False, resid_scales=False),
    ],
    ids=lambda p: next(iter(p)),
)
def test_each_part_can_be_switched_and_matters(parts):
    x = tokens(1, 48)
    c = TINY.replace(n_layer=2, **parts)
    params = tiny_params(c)
    (loss, _), grads = loss_and_grad(params, c, x, x)
    assert np.isfinite(loss) and all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    plain = jax.jit(dense_loss, static_argnums=1)(params, c, x, x)
    assert float(loss) == pytest.approx(float(plain), rel=1e-6)


# ---- the loss ------------------------------------------------------------------------------------


def dense_loss(params, config, x, y):
    logits, _ = model.forward(params, config, x)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(y, 0)[..., None], -1)[
        ..., 0
    ]
    return -jnp.sum(jnp.where(y >= 0, picked, 0)) / jnp.maximum((y >= 0).sum(), 1)


def test_activations_by_hand():
    one_11 = jnp.ones((1, 1))
    weights = dict(w_in=2 * one_11, w_gate=3 * one_11, w_out=one_11)
    # relu(2)^2, 2 times the share of a normal distribution below 2, silu(3) times 2
    for mlp, value in dict(relu2=4.0, gelu=1.9546, swiglu=5.7155).items():
        given = transformer.mlp(jnp.ones((1, 1, 1)), weights, TINY.replace(mlp=mlp))
        assert float(given[0, 0, 0]) == pytest.approx(value, abs=1e-3)


@pytest.fixture(scope="module")
def whole():
    """(config, inputs, targets, loss, gradients), the loss taken of all logits at once."""
    c = TINY.replace(n_layer=2, window_pattern="L")
    x, y = tokens(2, 48), tokens(2, 48, seed=1)
    y[0, 5:20] = -1
    dense = jax.jit(jax.value_and_grad(dense_loss), static_argnums=1)
    return c, x, y, *dense(tiny_params(c), c, x, y)


@pytest.mark.parametrize("chunk", [7, 48, 64, 10_000])
def test_chunked_loss_equals_autodiff_of_the_whole(whole, chunk):
    c, x, y, want, expected = whole
    (loss, _), grads = loss_and_grad(tiny_params(c), c.replace(loss_chunk=chunk), x, y)
    assert float(loss) == pytest.approx(float(want), rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_logits_of_all_tokens_are_never_held():
    c = TINY.replace(vocab_size=4096, n_layer=2, loss_chunk=32)
    x = jax.ShapeDtypeStruct((4, 256), np.int32)
    shapes = jax.eval_shape(lambda: init_params(0, c))
    text = str(
        jax.make_jaxpr(lambda p, x: jax.grad(lambda p: model.loss_fn(p, c, x, x)[0])(p))(shapes, x)
    )
    assert "f32[32,4096]" in text and "f32[1024,4096]" not in text and "f32[4,256,4096]" not in text


def test_no_targets_give_zero_and_not_nan():
    x = tokens(1, 48)
    (loss, aux), grads = loss_and_grad(tiny_params(), TINY, x, np.full_like(x, -1))
    assert float(loss) == 0 and int(aux["count"]) == 0
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_bfloat16_stays_close():
    x = tokens(2, 64)
    exact, _ = forward(tiny_params(), TINY, x)
    rough, _ = forward(tiny_params(), TINY.replace(compute_dtype="bfloat16"), x)
    assert rough.dtype == jnp.float32 and relative(rough, np.asarray(exact)) < 0.05


# ---- the cache -----------------------------------------------------------------------------------


def test_cached_logits_equal_full_ones_across_window_and_context_ends():
    """Prefill of ragged rows, then single tokens, beyond sequence_len: short windows are 128, long
    ones 256.
    """
    x = tokens(2, 290)
    params = tiny_params()
    full, _ = forward(
        params,
        TINY.replace(sequence_len=512, window_pattern="SL", total_batch_size=512),
        x[:, :256],
    )
    cache = model.init_cache(TINY, 2, 300)
    first, cache = forward(params, TINY, x[:, :120], cache)
    np.testing.assert_allclose(first, full[:, :120], atol=2e-5)
    cache = cache._replace(length=jnp.array([120, 100]), last=jnp.array([x[0, 119], x[1, 99]]))
    for t in range(120, 140):  # row 1 repeats what the cut took away
        step = np.stack([x[0, t], x[1, t - 20]])[:, None]
        logits, cache = forward(params, TINY, step, cache)
        np.testing.assert_allclose(logits[0, 0], full[0, t], atol=3e-5)
        np.testing.assert_allclose(logits[1, 0], full[1, t - 20], atol=3e-5)
    rest, cache = forward(params, TINY, np.stack([x[0, 140:256], x[1, 120:236]]), cache)
    np.testing.assert_allclose(rest[0], full[0, 140:], atol=3e-5)
    np.testing.assert_allclose(rest[1], full[1, 120:236], atol=3e-5)


def test_cached_bfloat16_is_as_close_as_the_full_forward():
    config, x = TINY.replace(compute_dtype="bfloat16"), tokens(2, 40)
    exact, full = (forward(tiny_params(), c, x)[0][:, 30:] for c in (TINY, config))
    _, cache = forward(tiny_params(), config, x[:, :30], model.init_cache(config, 2, 64))
    steps = []
    for t in range(30, 40):
        logits, cache = forward(tiny_params(), config, x[:, t : t + 1], cache)
        steps.append(logits[:, 0])
    assert cache.k[0].dtype == jnp.bfloat16
    assert relative(np.stack(steps, 1), exact) < 1.5 * relative(full, exact)


def test_padding_of_a_single_row_spoils_nothing_that_is_seen():
    x, params = tokens(1, 9), tiny_params()
    full, _ = forward(params, TINY, x)
    _, cache = forward(params, TINY, x[:, :8], model.init_cache(TINY, 1, 8 + 1))
    before = [np.asarray(a) for a in (*cache.k, *cache.v)]
    _, cache = forward(params, TINY, np.array([[-1]]), cache)
    for old, new in zip(before, (*cache.k, *cache.v)):
        np.testing.assert_array_equal(new[:, :8], old[:, :8])
    logits, _ = forward(params, TINY, x[:, 8:], cache)
    np.testing.assert_allclose(logits[0, 0], full[0, 8], atol=2e-5)


def test_embeddings_are_normed_where_the_config_says_so():
    params, config, ids = tiny_params(), TINY.replace(smear=False), tokens(2, 5)
    normed = transformer.embed(params, config, ids)
    np.testing.assert_allclose(np.mean(normed * normed, axis=-1), 1, rtol=1e-2)
    bare = transformer.embed(params, config.replace(embed_norm=False), ids)
    np.testing.assert_array_equal(bare, params["embed"][ids])
