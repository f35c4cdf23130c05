"""nanochat's weights in and out, and whole optimizer steps on its recorded model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lib import model
from lib.files import UserError
from lib.interop.nanochat import config_from_nanochat, from_nanochat, to_nanochat
from lib.train import optim
from tests.helpers.golden import load, parity_model


@pytest.fixture
def model_a():
    """(config with the recorded run's constant schedules, state dict)."""
    config, _ = parity_model("A")
    return (
        config.replace(
            attention="einsum",
            compute_dtype="float32",
            weight_decay=0.1,
            warmup_steps=0,
            warmdown_ratio=0.0,
        ),
        load("model_A_state.safetensors"),
    )


@pytest.mark.parametrize("name", ["A", "T"])
def test_round_trip_is_exact(name):
    recorded = load(f"model_{name}_config.json")
    state_dict = load(f"model_{name}_state.safetensors")
    config = config_from_nanochat(recorded["GPTConfig"])
    assert config.padded_vocab == recorded["padded_vocab_size"]
    back = to_nanochat(from_nanochat(state_dict, config), config)
    assert set(back) == set(state_dict)
    for key, array in state_dict.items():
        np.testing.assert_array_equal(back[key], array, strict=True, err_msg=key)
        assert back[key].flags.c_contiguous  # safetensors writes the buffer as it lies


def test_parameters_have_the_shapes_of_the_specs(model_a):
    config, state_dict = model_a
    params = from_nanochat(state_dict, config)
    expected = jax.eval_shape(lambda: model.init_params(jax.random.key(0), config))
    assert jax.tree.map(lambda p: (p.shape, p.dtype), params) == jax.tree.map(
        lambda p: (p.shape, p.dtype), expected
    )


class Torch:
    """What the conversion uses of a torch tensor; torch itself is no dependency."""

    def __init__(self, array):
        self.array = array

    detach = cpu = float = lambda self: self

    def numpy(self):
        return np.asarray(self.array, np.float32)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("kind", [lambda a: a, Torch])
def test_bfloat16_arrays_of_any_library_become_float32(model_a, kind, prefix):
    config, state_dict = model_a
    params = from_nanochat(
        {prefix + name: kind(jnp.asarray(a, jnp.bfloat16)) for name, a in state_dict.items()},
        config,
    )
    assert params["embed"].dtype == jnp.float32
    np.testing.assert_array_equal(
        params["embed"], state_dict["transformer.wte.weight"].astype(jnp.bfloat16)
    )


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda d: d.pop("lm_head.weight"), "lacks lm_head.weight"),
        (
            lambda d: d.update({"transformer.h.4.mlp.c_fc.weight": np.zeros((4, 4))}),
            "unexpected transformer.h.4.mlp.c_fc",
        ),
        (
            lambda d: d.update({"smear_gate.weight": np.zeros((1, 12))}),
            r"smear_gate.weight .* \(1, 12\) .* \(1, 24\)",
        ),
        (lambda d: d.update({"lm_head.weight": d["lm_head.weight"].T}), "lm_head.weight"),
    ],
)
def test_a_foreign_state_dict_is_refused(model_a, spoil, message):
    config, state_dict = model_a
    state_dict = dict(state_dict)
    spoil(state_dict)
    with pytest.raises(UserError, match=message):
        from_nanochat(state_dict, config)


@pytest.mark.parametrize(
    "change",
    [
        dict(mlp="swiglu"),
        dict(tied_head=True),
        dict(smear=False),
        dict(softcap=0.0),
        dict(mlp_dim=128),
        dict(value_embeds=False),
        dict(head_dim=32),
    ],
)
def test_a_model_that_nanochat_lacks_is_refused(model_a, change):
    config = model_a[0].replace(**change)
    with pytest.raises(UserError, match=f"only {next(iter(change))}="):
        to_nanochat({}, config)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(n_layer=None), "lacks n_layer"),
        (dict(dropout=0.1), "unknown nanochat config field 'dropout': choose one of n_embd"),
        (dict(n_head=5), "n_embd=64 .* n_head=5"),
    ],
)
def test_a_foreign_config_is_refused(change, message):
    gpt = load("model_A_config.json")["GPTConfig"] | change
    with pytest.raises(UserError, match=message):
        config_from_nanochat({k: v for k, v in gpt.items() if v is not None})


def test_the_batch_is_about_the_references_in_whole_microbatches():
    gpt = load("model_A_config.json")["GPTConfig"]
    # 174 rows have 2^19 tokens; of a context of twice as many not one does
    for length, rows in ((3000, 172), (2**20, 4)):
        config = config_from_nanochat(gpt | dict(sequence_len=length))
        assert config.total_batch_size == rows * length


# ---- whole steps ---------------------------------------------------------------------------------


@pytest.fixture
def recorded_schedules(monkeypatch):
    """Momentum and decay stood still in the recorded steps."""
    monkeypatch.setattr(optim, "muon_momentum", lambda *_: 0.95)
    monkeypatch.setattr(optim, "muon_weight_decay", lambda *_: 0.1)


def test_step_1_from_the_recorded_gradients(model_a, recorded_schedules):
    config, state_dict = model_a
    params = from_nanochat(state_dict, config)
    grads = from_nanochat(load("model_A_grads.safetensors"), config)
    optimizer = optim.make_optimizer(config, 3)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    found = to_nanochat(optax.apply_updates(params, updates), config)
    for name, expected in load("model_A_params_step1.safetensors").items():
        off = abs(found[name] - expected) > 3e-6
        assert off.sum() <= 3, (name, off.sum())


def test_three_steps_from_own_gradients(model_a, recorded_schedules):
    config, state_dict = model_a
    params = from_nanochat(state_dict, config)
    io = load("model_A_io.safetensors")
    optimizer = optim.make_optimizer(config, 3)

    @jax.jit
    def step(params, state):
        (loss, _), grads = jax.value_and_grad(model.loss_fn, has_aux=True)(
            params, config, io["idx"], io["targets"]
        )
        updates, state = optimizer.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), state

    state, losses, after = optimizer.init(params), [], [params]
    for _ in range(4):
        loss, params, state = step(params, state)
        losses.append(loss)
        after.append(params)
    np.testing.assert_allclose(losses, io["train_losses"], rtol=0, atol=5e-4)
    for n, relative, near, share in ((1, 3e-3, 1e-5, 0.998), (3, 5e-3, 2e-3, 0.99)):
        found = to_nanochat(after[n], config)
        for name, expected in load(f"model_A_params_step{n}.safetensors").items():
            error = found[name] - expected
            assert np.linalg.norm(error) <= relative * np.linalg.norm(expected), (n, name)
            assert (abs(error) <= near).mean() >= share, (n, name)
