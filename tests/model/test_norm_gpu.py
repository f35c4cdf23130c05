"""Norms of the stream by kernels for a GPU: emulated here, and what happens where they fail."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.model import norm_gpu, transformer
from lib.model.transformer import rms_norm
from tests.model.test_model import TINY, relative, tiny_params, tokens

EPS = 1e-6
WIDE = TINY.replace(n_layer=3, n_embd=192, sequence_len=32, total_batch_size=32)


@pytest.fixture
def fresh():
    norm_gpu.fault.cache_clear()
    yield
    norm_gpu.fault.cache_clear()


@pytest.fixture
def emulated(monkeypatch):
    """The kernels as a GPU would have them, by the interpreter."""
    call = partial(norm_gpu._call, interpret=True)
    monkeypatch.setattr(norm_gpu, "_call", lambda *args: call(*args[:3]))


def drawn(*shape, readers=3, dtype="float32"):
    """What is added, the gradient of the sum and those of its norm."""
    keys = jax.random.split(jax.random.key(0), 3 + readers)
    x, added, d_stream, *dh = (jax.random.normal(key, shape).astype(dtype) for key in keys)
    return x, added, d_stream, dh


def by_kernels(x, added, d_stream, dh):
    stream, h, factor = norm_gpu.forward(x, added, EPS, interpret=True)
    return stream, h, norm_gpu.backward(h, factor, d_stream, dh, interpret=True)


def both(x, added):
    return x + added, rms_norm(x + added, EPS)


def by_formulas(x, added, d_stream, dh):
    (stream, h), pull = jax.vjp(both, x, added)
    dx, d_added = pull((d_stream, sum(dh)))
    np.testing.assert_array_equal(dx, d_added)
    return stream, h, dx


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("shape", [(2, 6, 192), (1, 4, 768), (3, 2, 1280), (1, 2, 1344)])
def test_they_are_the_formulas_and_their_gradient(shape, readers):
    given = drawn(*shape, readers=readers)
    for got, want in zip(by_kernels(*given), by_formulas(*given), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_small_tokens_are_normed_with_eps():
    x, added, d_stream, dh = drawn(1, 4, 192)
    given = 1e-3 * x, 1e-3 * added, d_stream, dh
    for got, want in zip(by_kernels(*given), by_formulas(*given), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_members_of_a_population_are_normed_alike():
    """As lib.sweeps.population has them: a leading axis over all."""
    given = drawn(6, 4, 192)
    members = jax.tree.map(lambda a: a.reshape(3, 2, *a.shape[1:]), given)
    together = jax.vmap(by_kernels)(*members)
    for got, want in zip(together, by_kernels(*given), strict=True):
        np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-6)


def test_bfloat16_is_rounded_once():
    """Every result is within half a unit of the last place of what float32 gives."""
    x, added, d_stream, dh = drawn(2, 8, 1280, dtype="bfloat16")
    stream, h, dx = by_kernels(x, added, d_stream, dh)
    assert stream.dtype == h.dtype == dx.dtype == jnp.bfloat16
    # the norm is that of the sum as it is kept
    np.testing.assert_array_equal(stream, x + added)
    wide = stream.astype(jnp.float32)
    np.testing.assert_allclose(h.astype(jnp.float32), rms_norm(wide, EPS), rtol=2**-8)
    # of a gradient what it begins with, the norm, is rounded already
    gradients = jax.tree.map(lambda a: a.astype(jnp.float32), (d_stream, dh))
    want = by_formulas(wide, jnp.zeros_like(wide), *gradients)[2]
    assert relative(dx.astype(jnp.float32), want) < 2e-3


def test_what_fits(monkeypatch):
    monkeypatch.setattr(norm_gpu, "is_ampere", lambda: True)
    monkeypatch.setattr(norm_gpu, "fault", lambda D: "")
    assert norm_gpu.fits(jnp.zeros((1, 2, 192)))
    # one token, as in decoding; half a program; a width of many parts
    assert not norm_gpu.fits(jnp.zeros((2, 1, 192)))
    assert not norm_gpu.fits(jnp.zeros((2, 3, 192)))
    assert not norm_gpu.fits(jnp.zeros((1, 2, 200)))
    monkeypatch.setattr(norm_gpu, "fault", lambda D: "no")
    assert not norm_gpu.fits(jnp.zeros((1, 2, 192)))


def gradients(config):
    """The loss of a row of tokens, made for these parameters, and its gradients."""
    ids = tokens(1, config.sequence_len + 1)

    def loss(params):
        return transformer.loss_fn(params, config, ids[:, :-1], ids[:, 1:])[0]

    return jax.value_and_grad(loss)


@pytest.mark.parametrize(
    "options", [{}, {"n_layer": 4}, {"remat": "dots"}, {"remat": "layer"}], ids=str
)
def test_the_model_takes_them_where_they_fit(monkeypatch, emulated, options):
    config = WIDE.replace(**options)
    want, want_grads = gradients(config)(tiny_params(config))
    monkeypatch.setattr(norm_gpu, "fits", lambda x: True)
    got, grads = gradients(config)(tiny_params(config))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert relative(g, w) < 1e-5


def test_one_kernel_for_the_norm_within_a_block_and_one_for_each_gradient(monkeypatch, emulated):
    """Which of them remat="dots" and "layer" make once more: the first."""
    monkeypatch.setattr(norm_gpu, "fits", lambda x: True)
    kernels = {}
    for remat in ("none", "dots", "layer"):
        program = jax.make_jaxpr(gradients(WIDE.replace(remat=remat)))(tiny_params(WIDE))
        kernels[remat] = str(program).count("pallas_call") / WIDE.n_layer
    assert kernels == {"none": 3, "dots": 4, "layer": 4}


def test_work_split_over_a_tensor_axis_does_without(monkeypatch):
    monkeypatch.setattr(norm_gpu, "fits", lambda x: True)
    monkeypatch.setattr(transformer, "is_split", lambda: True)
    x, added, *_ = drawn(1, 4, 192)
    normed = partial(transformer.summed_norm, config=WIDE, readers=3)
    assert "pallas_call" not in str(jax.make_jaxpr(normed)(x, added))


def test_a_card_that_cannot_compile_them_says_so_once_and_goes_on(monkeypatch, fresh):
    """As this CPU: while a program is traced, too."""
    monkeypatch.setattr(norm_gpu, "is_ampere", lambda: True)
    x, added, *_ = drawn(1, 4, 192)

    @jax.jit
    def twice(x, added):
        stream, (h,) = transformer.summed_norm(x, added, WIDE, readers=1)
        return transformer.summed_norm(stream, h, WIDE, readers=1)

    with pytest.warns(UserWarning, match="normed by XLA, not by our kernels: .*interpret") as told:
        stream, (h,) = twice(x, added)
    assert len(told) == 1
    want = both(*both(x, added))
    np.testing.assert_allclose(stream, want[0], atol=1e-5)
    np.testing.assert_allclose(h, want[1], atol=1e-5)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_card_on_which_they_are_wrong_does_without(monkeypatch, emulated, fresh, name):
    # tried while a program is traced, as it will be
    told = []
    jax.jit(lambda x: told.extend(map(norm_gpu.fault, (192, 768))))(1.0)
    assert told == ["", ""]

    norm_gpu.fault.cache_clear()
    right = getattr(norm_gpu, name)
    monkeypatch.setattr(
        norm_gpu, name, lambda *args: jax.tree.map(lambda a: 1.01 * a, right(*args))
    )
    with pytest.warns(UserWarning, match="other numbers than XLA"):
        assert norm_gpu.fault(192)
