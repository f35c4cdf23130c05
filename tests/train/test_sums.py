"""What is added up in float32 though the run computes in bfloat16: gradients, losses and norms.

A bfloat16 has eight bits: added to 256, a 1 vanishes. Sums over devices are in tests/parallel.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib import model, parallel, train
from lib.config import Config
from lib.model import head, tables
from lib.model.linear import scaled
from lib.model.tables import Lines, add_gradients
from lib.params import named_specs
from lib.train import step as steps
from lib.train.optim import ADAMW_GROUPS

CONFIG = Config(
    vocab_size=128,
    sequence_len=64,
    n_layer=1,
    n_embd=32,
    n_head=2,
    n_kv_head=1,
    head_dim=16,
    mlp_dim=64,
    microbatch=2,
    total_batch_size=256,
    num_steps=20,
    warmup_steps=4,
    loss_chunk=64,
    compute_dtype="bfloat16",
    attention="einsum",
)


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(0).integers(0, 128, (4, 65)).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def test_accumulated_gradients_and_losses(monkeypatch):
    """One microbatch of 256 and 255 of 1: in bfloat16 they would add up to 256."""

    def loss_sums(params, config, inputs_BT, targets_BT):
        x = jnp.sum(inputs_BT).astype(jnp.bfloat16)
        return (params["w"] * x).sum().astype(jnp.float32), jnp.sum(targets_BT >= 0)

    monkeypatch.setattr(model, "loss_sums", loss_sums)
    inputs = np.ones((256, 1, 1), np.int32)
    inputs[0] = 256
    params = {"w": jnp.ones((), jnp.float32), "blocks": {}}
    config = CONFIG.replace(value_embeds=False)
    loss, count, grads = steps.summed_gradients(params, inputs, inputs, config)
    assert (float(loss), int(count), float(grads["w"])) == (511, 256, 511)
    assert loss.dtype == grads["w"].dtype == jnp.float32


def test_the_summed_loss_is_the_sum_of_the_tokens_losses(batch):
    params = jax.jit(lambda: model.init_params(jax.random.key(0), CONFIG))()
    inputs, targets = batch

    # float64 from the logits, which are float32
    logits, _ = jax.jit(model.forward, static_argnums=1)(params, CONFIG, inputs)
    assert logits.dtype == jnp.float32
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    wanted = log_sum - np.take_along_axis(logits, targets[..., None], -1)[..., 0]

    losses = jax.jit(model.token_losses, static_argnums=1)(params, CONFIG, inputs, targets)
    total, count = jax.jit(model.loss_sums, static_argnums=1)(params, CONFIG, inputs, targets)
    assert losses.dtype == total.dtype == jnp.float32 and count == targets.size
    np.testing.assert_allclose(losses, wanted, rtol=2e-6)
    np.testing.assert_allclose(total, wanted.sum(), rtol=2e-6)


@pytest.mark.parametrize("learnt", [0, 1, 64, 65, 128, 256])
def test_the_loss_without_the_logits_of_what_teaches_nothing(learnt):
    """The same sum and gradients, wherever the targets stand, and chunks without one not read."""
    rng = np.random.default_rng(learnt)
    x = rng.normal(size=(4, 64, 32)).astype(np.float32)
    w = rng.normal(size=(32, 128)).astype(np.float32)
    targets = np.full(256, -1, np.int32)
    places = rng.permutation(256)[:learnt]
    targets[places] = rng.integers(0, 128, learnt)
    targets = jnp.asarray(targets.reshape(4, 64))

    @partial(jax.jit, static_argnums=0)
    def sums(config, x):
        total, pull = jax.vjp(lambda x, w: head.summed_loss(x, w, targets, config), x, w)
        losses = head.losses_by_token(x, w, targets, config)
        return total, *pull(jnp.float32(2)), losses, head.summed_loss(x, w, targets, config)

    whole = CONFIG.replace(compute_dtype="float32")
    wanted = sums(whole, x)
    skipping = whole.replace(skip_ignored=True)
    for got, want in zip(sums(skipping, x), wanted):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    # ignored tokens behind the last chunk with a target are not read: they may be anything
    filled_up = -(-learnt // 64) * 64
    unread = np.argsort(np.ravel(targets) < 0, kind="stable")[filled_up:]
    broken = x.copy()
    broken.reshape(256, 32)[unread] = np.nan
    for got, want in zip(sums(skipping, broken), wanted):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.isnan(sums(whole, broken)[2]).any() == (unread.size > 0)


def test_a_step_that_could_skip_but_need_not_is_the_same_step(batch):
    """Bit by bit in all that it trains: pretraining on a CPU goes by fine-tuning's program."""
    config = CONFIG.replace(compute_dtype="float32")
    results = []
    for skip in (False, True):
        changed = config.replace(skip_ignored=skip)
        step, state = train.make_train_step(changed), train.init_state(changed)
        for _ in range(2):
            state, metrics = step(state, *batch)
        results.append((metrics["loss"], state))
    (loss, state), (skipped_loss, skipped_state) = results
    jax.tree.map(np.testing.assert_array_equal, skipped_state, state)
    np.testing.assert_allclose(skipped_loss, loss, rtol=1e-6)


def test_the_norm_of_the_gradient(batch):
    """From the moments after one step of AdamW, which are a share of the gradients."""
    config = CONFIG.replace(optimizer="adamw")
    step, state = train.make_train_step(config), train.init_state(config)
    written = step.lower(state, *batch).as_text()
    state, metrics = step(state, *batch)
    beta1 = {"matrix": 0.9} | {name: betas[0] for name, betas in ADAMW_GROUPS.items()}

    squares = []
    for (_, spec), m in zip(named_specs(config), jax.tree.leaves(state.opt_state.m)):
        assert m.dtype == jnp.float32
        gradient = np.asarray(m, np.float64) / (1 - beta1[spec.group])
        squares.append((gradient**2).sum())
    assert metrics["grad_norm"].dtype == metrics["loss"].dtype == jnp.float32
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(sum(squares)), rtol=1e-6)

    # as written too, for a CPU's compiler takes float32 where a norm says bfloat16
    operand = r"tensor<(?:\d+x)*([a-z]\w+)>"
    to_scalar = rf"dot_general[^\n]*: \({operand}, {operand}\) -> tensor<([a-z]\w+)>"
    assert set(re.findall(to_scalar, written)) == {("f32", "f32", "f32")}


@pytest.mark.parametrize("shape", [(), (16, 64, 1), (16, 1, 1)])
def test_the_gradient_of_a_learned_scale(shape):
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(16, 64, 96)) + 0.1, jnp.bfloat16) for _ in range(2))
    scale = jnp.full(shape, 1.25, jnp.float32)
    y, backward = jax.vjp(scaled, scale, x)
    assert (y == jnp.bfloat16(1.25) * x).all() and y.dtype == jnp.bfloat16

    scale_grad, x_grad = backward(g)
    products = np.asarray(x, np.float64) * np.asarray(g, np.float64)
    axes = tuple(i - len(shape) for i, n in enumerate(shape) if n == 1) or (0, 1, 2)
    wanted = products.sum(axes if shape else None, keepdims=bool(shape))
    np.testing.assert_allclose(scale_grad, wanted, rtol=1e-5, atol=1e-4)
    assert scale_grad.shape == shape and scale_grad.dtype == jnp.float32
    assert (x_grad == jnp.bfloat16(1.25) * g).all()


def test_a_line_that_is_read_twice_gets_both_gradients():
    lines_BTD = jnp.array([[[1.0, 2.0], [10.0, 20.0], [5.0, 6.0]]])
    sums = add_gradients(
        {"embed": jnp.ones((4, 2))}, {"embed": Lines(lines_BTD)}, jnp.array([[1, 1, 3]])
    )
    np.testing.assert_array_equal(sums["embed"], [[1, 1], [12, 23], [1, 1], [6, 7]])


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_that_is_the_head_too_is_not_only_looked_up(batch, tied):
    config = CONFIG.replace(tied_head=tied)
    params = model.init_params(0, config)
    turned = tables.by_token(params)
    with_lines = tables.looked_up(params, turned, batch[0], config)
    assert isinstance(with_lines["embed"], Lines) != tied


# ---- whose memory is given away ------------------------------------------------------------------


@pytest.mark.parametrize("devices", [None, 1])
def test_a_step_is_given_the_old_states_memory_and_nothing_else(batch, devices):
    """As the program is written: nothing is compiled."""
    layout = devices and parallel.make_layout("dp", CONFIG, jax.devices()[:devices])
    state = steps.state_template(CONFIG, layout)
    lowered = train.make_train_step(CONFIG, layout).lower(state, *batch)
    (old, *rows), _ = lowered.args_info
    assert all(
        leaf.donated for leaf in jax.tree.leaves(old, is_leaf=lambda x: hasattr(x, "donated"))
    )
    assert not any(one.donated for one in rows)
