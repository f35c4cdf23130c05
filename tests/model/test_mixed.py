"""The mixed mode: products of bfloat16 operands with float32 results, all else in float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib import train
from lib.config import Config
from lib.files import UserError
from lib.model.attention import ATTENTION
from lib.model.linear import linear
from lib.model.transformer import forward, loss_fn
from lib.preflight.overview import shape_lines
from lib.train import step
from tests.model.test_model import TINY, relative, tiny_params, tokens

MIXED = TINY.replace(compute_dtype="mixed")
PLAIN = TINY.replace(compute_dtype="float32")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def rounded(a):
    """What bfloat16 makes of it, in float64."""
    return np.asarray(a.astype(jnp.bfloat16).astype(jnp.float32), np.float64)


@pytest.mark.parametrize("outputs", [24, 200])  # the gradient in front, and the input
def test_a_linear_layer_rounds_its_operands_and_nothing_else(outputs):
    x_BTD, w_DO = normal(0, 2, 8, 96), normal(1, 96, outputs)
    g_BTO = normal(2, 2, 8, outputs)
    y, pull = jax.vjp(lambda x, w: linear("BTD,DO->BTO", x, w), x_BTD, w_DO.astype(jnp.bfloat16))
    x_grad, w_grad = pull(g_BTO)
    assert y.dtype == x_grad.dtype == jnp.float32

    x, w, g = rounded(x_BTD), rounded(w_DO), rounded(g_BTO)
    assert relative(y, x @ w) < 1e-6
    assert relative(x_grad, g @ w.T) < 1e-6
    # held in the weight's dtype, as the weights are
    assert relative(w_grad, np.einsum("BTD,BTO->DO", x, g)) < 4e-3


@pytest.mark.parametrize("window", [None, 40])
def test_attention_rounds_its_operands(window):
    attend = ATTENTION["einsum"]
    qkv = normal(0, 1, 96, 4, 16), normal(1, 1, 96, 2, 16), normal(2, 1, 96, 2, 16)

    def run(*qkv, **options):
        return attend(*qkv, window, block=32, **options)

    want, pull = jax.vjp(run, *qkv)
    o, pull_mixed = jax.vjp(lambda *qkv: run(*qkv, operands=jnp.bfloat16), *qkv)
    assert o.dtype == jnp.float32 and 0 < relative(o, want) < 1e-2
    for gradient, wanted in zip(pull_mixed(o), pull(o)):
        assert gradient.dtype == jnp.float32 and 0 < relative(gradient, wanted) < 1e-2


def products_of(config):
    """How many products of a loss and its gradient multiply each dtype."""
    x = tokens(2, 32)
    grad = jax.value_and_grad(lambda p: loss_fn(p, config, x, x)[0])
    text = jax.jit(grad).lower(tiny_params()).as_text()
    types = re.findall(r"dot_general .*: \(tensor<[\dx]*(\w+)>.*-> tensor<[\dx]*(\w+)>", text)
    return {pair: types.count(pair) for pair in set(types)}


def test_all_but_the_gates_multiply_bfloat16():
    config = MIXED.replace(scan_layers=False)
    products = products_of(config)
    plain = products_of(config.replace(compute_dtype="float32"))
    assert set(plain) == {("f32", "f32")} and set(products) == {("f32", "f32"), ("bf16", "f32")}
    # smear's gate, one a value layer, and attention's own sum of each layer
    gates = 3 * (1 + len(config.value_layers)) + config.n_layer
    assert products["f32", "f32"] <= gates and products["bf16", "f32"] >= 3 * 6 * config.n_layer
    assert sum(products.values()) == sum(plain.values())


@pytest.mark.parametrize("loss_chunk", [64, 2048])
def test_a_tied_head_is_multiplied_in_one_chunk_or_several(loss_chunk):
    """In a whole step that is computed: what XLA:CPU lacks shows only then."""
    sizes = dict(n_embd=64, n_head=2, vocab_size=512, sequence_len=64, loss_chunk=loss_chunk)
    batch = dict(microbatch=4, total_batch_size=256, num_steps=2)
    config = Config.preset("gpt2_like", n_layer=1, **sizes, **batch)
    x = tokens(4, 64)
    losses = []
    for dtype in ("mixed", "float32"):
        form = config.replace(compute_dtype=dtype)
        _, metrics = train.make_train_step(form)(train.init_state(form), x, x)
        losses.append(float(metrics["loss"]))
    assert config.tied_head and losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.slow
def test_a_model_says_the_same_but_for_rounding():
    params, x = tiny_params(), tokens(2, 40)
    want, _ = forward(params, PLAIN, x)
    logits, _ = forward(params, MIXED, x)
    assert logits.dtype == jnp.float32 and 1e-5 < relative(logits, want) < 2e-2


@pytest.mark.slow
def test_training_goes_on_bit_for_bit():
    config = MIXED.replace(sequence_len=32, total_batch_size=64, microbatch=2, num_steps=4)
    jitted = jax.jit(lambda state, x: train.train_step(state, x, x, config))
    x = tokens(2, 32)
    state, _ = jitted(train.init_state(config), x)
    # as a checkpoint holds it
    kept = jax.tree.map(np.asarray, state)
    straight, _ = jitted(state, x)
    resumed, _ = jitted(jax.tree.map(jnp.asarray, kept), x)
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed)):
        np.testing.assert_array_equal(a, b)


def test_it_is_asked_for_and_told():
    plain = Config.preset("cpu_demo")
    assert plain.dtype == plain.operand_dtype == jnp.float32
    mixed = plain.replace(compute_dtype="mixed")
    assert (mixed.dtype, mixed.operand_dtype) == (jnp.float32, jnp.bfloat16)
    assert "float32 with products of bfloat16" in "\n".join(shape_lines(mixed, None))
    assert "with products" not in "\n".join(shape_lines(plain, None))


def test_a_jax_without_such_products_is_told_before_anything_is_compiled(monkeypatch):
    def refuse(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: BF16 x BF16 = F32")

    monkeypatch.setattr(step.jnp, "einsum", refuse)
    with pytest.raises(UserError, match="compute_dtype=mixed.*take float32, or a newer jax"):
        step.make_train_step(MIXED)
    step.make_train_step(PLAIN)
