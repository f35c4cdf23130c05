"""Sums that are float32 in a bfloat16 run: against float64, from the very same rounded inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.model import decoding, head, linear
from lib.model.attention import ATTENTION
from lib.model.cache import attend_held
from lib.model.transformer import loss_fn, rms_norm, rope_tables, rotate, turned
from tests.model.test_model import TINY, relative, tiny_params, tokens

CONFIG = TINY.replace(compute_dtype="bfloat16", loss_chunk=64, softcap=0.0)
# a sum of thousands in bfloat16 is off by a hundredth; one in float32 by a millionth
EXACT = 1e-5


def rounded(seed, *shape, scale=1.0):
    """Random numbers that bfloat16 holds exactly."""
    numbers = scale * jax.random.normal(jax.random.key(seed), shape)
    return numbers.astype(jnp.bfloat16)


def float64(a):
    return np.asarray(a.astype(jnp.float32), np.float64)


def exact_loss(x, w, targets, written="float32"):
    """(sum of losses, its gradient by the logits) in float64, of logits that were written down."""
    logits = float64(x).reshape(-1, x.shape[-1]) @ float64(w)
    logits = float64(jnp.asarray(logits[:, : CONFIG.vocab_size], written))
    logits -= logits.max(-1, keepdims=True)
    p = np.exp(logits)
    p /= p.sum(-1, keepdims=True)
    hits = np.arange(len(p)), targets.reshape(-1)
    loss = -np.log(p[hits]).sum()
    p[hits] -= 1
    return loss, p


def test_the_loss_is_summed_in_float32():
    x, targets = rounded(0, 8, 256, 32), tokens(8, 256)
    w = rounded(1, 32, CONFIG.padded_vocab)
    total, pull = jax.vjp(lambda x, w: head.summed_loss(x, w, targets, CONFIG), x, w)
    # a step writes its logits in the compute dtype
    loss, d = exact_loss(x, w, targets, written="bfloat16")
    assert total.dtype == jnp.float32 and abs(float(total) / loss - 1) < EXACT

    # 2,048 tokens in 32 chunks add up to the head's gradient; only each token's part is rounded
    x_grad, w_grad = pull(jnp.float32(1))
    d = float64(jnp.asarray(d, jnp.float32).astype(jnp.bfloat16))
    want = float64(x).reshape(-1, 32).T @ d
    assert w_grad.dtype == jnp.float32 and x_grad.dtype == jnp.bfloat16
    assert relative(w_grad[:, : CONFIG.vocab_size], want) < 2e-3

    # evaluation in float32
    loss, _ = exact_loss(x, w, targets)
    by_token = head.losses_by_token(x, w, targets, CONFIG)
    assert by_token.dtype == jnp.float32 and abs(float64(by_token).sum() / loss - 1) < EXACT


def test_a_chunked_gradient_does_not_lose_the_small_parts():
    """One token repeated 4,096 times: a bfloat16 sum would stand still after 256 equal parts."""
    x = jnp.ones((16, 256, 32), jnp.bfloat16)
    w = jnp.zeros((32, CONFIG.padded_vocab))
    targets = np.zeros((16, 256), np.int32)
    w_grad = jax.grad(lambda w: head.summed_loss(x, w, targets, CONFIG))(w)
    part = float(jnp.bfloat16(1 / CONFIG.vocab_size))
    np.testing.assert_allclose(w_grad[:, 1 : CONFIG.vocab_size], 4096 * part, rtol=1e-5)

    # nor within one chunk: of 257 equal parts a bfloat16 holds 256
    once = CONFIG.replace(loss_chunk=512)
    x, targets = (a.reshape(1, 4096, *a.shape[2:])[:, :257] for a in (x, targets))
    w_grad = jax.grad(lambda w: head.summed_loss(x, w, targets, once))(w)
    np.testing.assert_allclose(w_grad[:, 1 : CONFIG.vocab_size], 257 * part, rtol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_a_step_writes_its_logits_in_the_compute_dtype(softcap):
    """As nanochat does; all that is computed from them is float32."""
    targets = tokens(2, 64)
    w = rounded(1, 32, CONFIG.padded_vocab)

    def run(dtype):
        x = rounded(0, 2, 64, 32).astype(dtype)
        config = CONFIG.replace(softcap=softcap, compute_dtype=dtype)
        summed = jax.value_and_grad(lambda x, w: head.summed_loss(x, w, targets, config), (0, 1))
        name = {"bfloat16": "bf16", "float32": "f32"}[dtype]
        logits = f"{name}[64,{CONFIG.padded_vocab}] = dot_general"
        assert logits in str(jax.make_jaxpr(summed)(x, w))
        return summed(x, w)

    (total, grads), (exact, exact_grads) = run("bfloat16"), run("float32")
    assert total.dtype == jnp.float32 and 0 < abs(float(total / exact) - 1) < 1e-3
    for a, b in zip(grads, exact_grads):
        assert relative(a.astype(jnp.float32), b.astype(jnp.float32)) < 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("is_tpu", [False, True])
def test_a_loss_and_its_gradients_are_of_the_very_logits_that_were_written(is_tpu, softcap, dtype):
    """With a padded vocabulary, ignored targets and a short last chunk."""
    config = CONFIG.replace(softcap=softcap, compute_dtype=dtype)
    V = config.vocab_size
    assert config.padded_vocab > V
    # from small logits to those that the cap bends
    x = (rounded(0, 2, 50, 32) * jnp.linspace(0.1, 4, 50)[:, None]).astype(dtype)
    w = rounded(1, 32, config.padded_vocab)
    targets = tokens(2, 50)
    targets[0, ::3] = -1
    loss, (x_grad, w_grad) = head._loss_and_gradients(x, w, targets, config, is_tpu)

    scores = float64(x).reshape(-1, 32) @ float64(w)[:, :V]
    scores = float64(jnp.asarray(scores, dtype))
    logits = softcap * np.tanh(scores / softcap) if softcap else scores
    lse = np.log(np.exp(logits).sum(-1))
    learnt, hits = targets.reshape(-1) >= 0, (np.arange(100), targets.reshape(-1))
    np.testing.assert_allclose(loss, (lse - logits[hits])[learnt].sum(), rtol=EXACT)

    d = np.exp(logits - lse[:, None])
    d[hits] -= 1
    d *= (1 - np.square(logits / softcap) if softcap else 1) * learnt[:, None]
    within = EXACT if dtype == "float32" else 3e-3
    assert relative(float64(x_grad).reshape(-1, 32), d @ float64(w)[:, :V].T) < within
    assert relative(w_grad[:, :V], float64(x).reshape(-1, 32).T @ d) < within
    np.testing.assert_array_equal(x_grad[0, ::3], 0)
    np.testing.assert_array_equal(w_grad[:, V:], 0)


def test_logits_are_float32_before_they_are_capped():
    x, w = rounded(0, 4, 512), rounded(1, 512, 128)
    logits = head._logits(x, w, CONFIG.replace(vocab_size=128))
    assert logits.dtype == jnp.float32
    assert relative(logits, float64(x) @ float64(w)) < EXACT


def test_norms_are_taken_in_float32():
    """4,096 channels of which one is large: in bfloat16 the small ones would not count."""
    x = rounded(0, 2, 4096).at[:, 0].set(64.0)
    mean = (float64(x) ** 2).mean(-1, keepdims=True)
    want = float64(x) / np.sqrt(mean + np.finfo(np.float32).eps)
    got = rms_norm(x)
    assert got.dtype == jnp.bfloat16
    # half a unit in the last of bfloat16's 8 bits
    np.testing.assert_allclose(float64(got), want, rtol=2**-8)
    # and of nothing there is a norm
    assert not rms_norm(jnp.zeros((2, 8))).any()


@pytest.mark.parametrize("dtype, most", [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_the_written_gradient_of_turned_heads_is_that_of_the_formula(dtype, most):
    """Against autodiff in float32; in bfloat16 no worse than rounding."""
    config = TINY.replace(compute_dtype=dtype)
    keys = jax.random.split(jax.random.key(0), 2)
    x, dy = (jax.random.normal(key, (2, 8, 3, TINY.head_dim)).astype(dtype) for key in keys)
    # heads of very different lengths, as the norm is for
    x = x * jnp.asarray([1e-2, 1.0, 1e2], dtype)[:, None]
    exact_rope = rope_tables(jnp.arange(8), TINY.replace(compute_dtype="float32"))

    def formula(x):
        return rotate(rms_norm(x), *exact_rope) * config.qk_scale

    _, exact = jax.vjp(formula, x.astype(jnp.float32))
    rope = rope_tables(jnp.arange(8), config)
    _, written = jax.vjp(lambda x: turned(x, rope, config, "q"), x)
    (expected,) = exact(dy.astype(jnp.float32))
    (gradient,) = written(dy)
    assert gradient.dtype == dtype
    for n in range(3):
        assert relative(gradient[:, :, n], expected[:, :, n]) < most


def test_softmax_is_in_float32_in_training_and_in_decoding():
    """2,048 keys of equal score: the output is the mean of the values, whose sum is float32's."""
    T = 2048
    q = jnp.zeros((1, T, 1, 8), jnp.bfloat16)
    v = jnp.ones_like(q)
    for name in ("einsum", "jax"):
        o = ATTENTION[name](q, q, v)
        np.testing.assert_allclose(float64(o), 1, rtol=2**-8, err_msg=name)
    ring = jnp.zeros((1, T, 8), jnp.bfloat16), jnp.ones((1, T, 8), jnp.bfloat16)
    positions = np.array([[T - 1]]), np.arange(T)[None]
    o = attend_held(q[:, :1], [ring[0]], [ring[1]], *positions, T)
    np.testing.assert_allclose(float64(o), 1, rtol=2**-7)


def test_int8_weights_are_the_nearest_ones():
    small = decoding._int8(jnp.array([[1.27, -2.54], [0.026, -0.026], [0.0, 0.032]]), 1)
    np.testing.assert_allclose(small["scale"], [0.01, 0.02], rtol=1e-6)
    assert small["int8"].tolist() == [[127, 3, 0], [-127, -1, 2]]


def test_no_sum_of_exponentials_overflows_whatever_the_soft_cap():
    """exp(200) is beyond float32, so a wide soft-cap needs the maximum taken off first."""
    logits = jnp.array([[200.0, 200.0], [-200.0, -200.0]])
    for softcap in (0.0, 300.0):
        found = head._log_sum_exp(logits, CONFIG.replace(softcap=softcap))
        np.testing.assert_allclose(found, np.array([200, -200]) + np.log(2), rtol=1e-6)
    narrow = CONFIG.replace(softcap=15.0)
    found = head._log_sum_exp(jnp.array([[15.0, 15.0], [-15.0, -15.0]]), narrow)
    np.testing.assert_allclose(found, np.array([15, -15]) + np.log(2), rtol=1e-6)


def test_an_int8_row_is_summed_in_float32():
    x = jnp.ones((1, 4096), jnp.bfloat16)
    w = {"int8": jnp.ones((3, 4096), jnp.int8), "scale": jnp.ones(3)}
    y = linear.linear("CD,DV->CV", x, w)
    np.testing.assert_allclose(float64(y), 4096)


@pytest.mark.parametrize("rows", [1, 3])
def test_an_int8_head_writes_float32_logits(rows):
    """As one in floats does: near a soft-cap of 15 bfloat16 has steps of a sixteenth."""
    x = rounded(0, 1, rows, 32)
    stored = decoding._int8(rounded(1, 32, CONFIG.vocab_size).astype(jnp.float32), 1)
    logits = head.logits({"head": stored}, CONFIG, x)
    want = float64(x) @ (float64(stored["int8"]) * float64(stored["scale"])[:, None]).T
    assert logits.dtype == jnp.float32
    assert relative(logits, want) < EXACT


@pytest.mark.slow
def test_the_mean_loss_and_its_gradients_are_float32():
    x = tokens(2, 64)
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(tiny_params(), CONFIG, x, x)
    assert loss.dtype == aux["loss_sum"].dtype == jnp.float32
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert grad.dtype == jnp.float32, jax.tree_util.keystr(path)
