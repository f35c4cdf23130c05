"""Products with weights stored otherwise: the plain product, whatever the number of rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from lib.model import linear


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_widened_weights_give_the_plain_product(rows):
    stored = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    scale = np.array([1.0, 0.5, 0.25], np.float32)
    x = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    weight = {"int8": jnp.asarray(stored), "scale": jnp.asarray(scale)}
    product = linear.linear("BD,DF->BF", jnp.asarray(x), weight)
    assert product.dtype == jnp.float32
    np.testing.assert_array_equal(product, (x @ stored.T) * scale)


@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (3, 1)])
def test_products_keep_the_axes_of_their_rows(shape):
    x = jnp.arange(4 * shape[0] * shape[1], dtype=jnp.float32).reshape(*shape, 4)
    weight = jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4)
    spec = "BTD,DNH->BTNH"
    want = jnp.einsum("BTD,NHD->BTNH", x, weight)
    by_output = linear._in_shape(x.reshape(-1, 4) @ weight.reshape(6, 4).T, spec, x, [2, 3])
    np.testing.assert_array_equal(by_output, want)
    whole = {"int8": weight.astype(jnp.int8), "scale": jnp.ones(6)}
    np.testing.assert_array_equal(linear.linear(spec, x, whole), want)
