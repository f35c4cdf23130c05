"""Queries and keys turned by kernels for a GPU: emulated here, and what happens where they fail."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.model import rotary_gpu, transformer
from lib.model.transformer import normed_rotation, rms_norm, rope_tables, rotate
from tests.model.test_model import TINY, relative

SCALE, EPS = 1.2, 1e-6


@pytest.fixture
def fresh():
    rotary_gpu.fault.cache_clear()
    yield
    rotary_gpu.fault.cache_clear()


def drawn(*shape, dtype="float32"):
    """Heads, a gradient of what they become, and the angles of their positions."""
    keys = jax.random.split(jax.random.key(0))
    x, dy = (jax.random.normal(key, shape).astype(dtype) for key in keys)
    config = TINY.replace(head_dim=shape[-1], compute_dtype=dtype)
    return x, dy, *rope_tables(jnp.arange(shape[1]), config)


def by_kernels(x, dy, cos, sin):
    y, factor = rotary_gpu.forward(x, cos, sin, SCALE, EPS, interpret=True)
    return y, rotary_gpu.backward(y, dy, factor, cos, sin, SCALE, interpret=True)


def by_formulas(x, dy, cos, sin):
    y, pull = jax.vjp(lambda x: SCALE * rms_norm(rotate(x, cos, sin), EPS), x)
    return y, *pull(dy)


@pytest.mark.parametrize("shape", [(2, 48, 3, 32), (1, 32, 1, 128), (3, 96, 5, 64)])
def test_they_are_the_formulas_and_their_gradient(shape):
    for got, want in zip(by_kernels(*drawn(*shape)), by_formulas(*drawn(*shape))):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_members_of_a_population_are_turned_alike():
    """As lib.sweeps.population has them: a leading axis over heads, one table for all."""
    x, dy, cos, sin = drawn(6, 32, 3, 32)
    members = [a.reshape(3, 2, *a.shape[1:]) for a in (x, dy)]
    together = jax.vmap(lambda x, dy: by_kernels(x, dy, cos, sin))(*members)
    for got, want in zip(together, by_kernels(x, dy, cos, sin)):
        np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-6)


def test_bfloat16_is_rounded_once():
    """Every result is within half a unit of the last place of what float32 gives."""
    x, dy, cos, sin = drawn(2, 64, 2, 64, dtype="bfloat16")
    y, dx = by_kernels(x, dy, cos, sin)
    wide, wide_dy, *tables = (a.astype(jnp.float32) for a in (x, dy, cos, sin))
    want, pull = jax.vjp(lambda x: normed_rotation(x, *tables, SCALE, EPS, "q"), wide)
    assert y.dtype == dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=2**-8)
    # of a gradient what it begins with, y, is rounded already
    assert relative(dx, pull(wide_dy)[0]) < 4e-3


def test_what_fits(monkeypatch):
    monkeypatch.setattr(rotary_gpu, "is_ampere", lambda: True)
    monkeypatch.setattr(rotary_gpu, "fault", lambda H: "")
    _, _, cos, _ = drawn(2, 16, 1, 64)
    assert rotary_gpu.fits(jnp.zeros((2, 16, 1, 64)), cos)
    # half a program, a half that is no power of two, one that is too narrow, rows by themselves
    assert not rotary_gpu.fits(jnp.zeros((1, 16, 1, 64)), cos)
    assert not rotary_gpu.fits(jnp.zeros((2, 16, 1, 96)), cos)
    assert not rotary_gpu.fits(jnp.zeros((2, 16, 1, 16)), cos)
    assert not rotary_gpu.fits(jnp.zeros((2, 16, 1, 64)), cos[None])
    monkeypatch.setattr(rotary_gpu, "fault", lambda H: "no")
    assert not rotary_gpu.fits(jnp.zeros((2, 16, 1, 64)), cos)


def test_the_model_takes_them_where_they_fit(monkeypatch):
    x, dy, cos, sin = drawn(2, 32, 2, 64)
    turn = partial(normed_rotation, cos=cos, sin=sin, scale=SCALE, eps=EPS, name="q")
    want, pull_want = jax.vjp(turn, x)

    monkeypatch.setattr(rotary_gpu, "fits", lambda x, cos: True)
    call = partial(rotary_gpu._call, interpret=True)
    monkeypatch.setattr(rotary_gpu, "_call", lambda *args: call(*args[:4]))
    got, pull = jax.vjp(turn, x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(pull(dy)[0], pull_want(dy)[0], atol=1e-5)
    # and not by chance
    assert "pallas_call" in str(jax.make_jaxpr(turn)(x))


def test_a_card_that_cannot_compile_them_says_so_once_and_goes_on(monkeypatch, fresh):
    """As this CPU: while a program is traced, too."""
    monkeypatch.setattr(rotary_gpu, "is_ampere", lambda: True)
    x, _, cos, sin = drawn(2, 32, 2, 64)

    @jax.jit
    def turn(x):
        first = transformer.normed_rotation(x, cos, sin, SCALE, EPS, "q")
        return first + transformer.normed_rotation(x, cos, sin, SCALE, EPS, "k")

    with pytest.warns(UserWarning, match="by XLA, not by our kernels: .*interpret") as told:
        got = turn(x)
    assert len(told) == 1
    np.testing.assert_allclose(got, 2 * by_formulas(x, x, cos, sin)[0], atol=1e-5)


def test_a_card_on_which_they_are_wrong_does_without(monkeypatch, fresh):
    call = partial(rotary_gpu._call, interpret=True)
    monkeypatch.setattr(rotary_gpu, "_call", lambda *args: call(*args[:4]))
    # tried while a program is traced, as it will be
    told = []
    jax.jit(lambda x: told.extend(map(rotary_gpu.fault, (32, 128))))(1.0)
    assert told == ["", ""]

    rotary_gpu.fault.cache_clear()
    right = rotary_gpu.backward
    monkeypatch.setattr(rotary_gpu, "backward", lambda *args: 1.01 * right(*args))
    with pytest.warns(UserWarning, match="other numbers than XLA"):
        assert rotary_gpu.fault(64)
