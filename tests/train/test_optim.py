"""Optimizers against the reference's recorded steps, schedules against every recorded value."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lib.config import OPTIMIZER_NAMES, Config
from lib.params import init_params
from lib.train import optim
from tests.helpers.golden import load

SMALL = Config(
    vocab_size=64,
    sequence_len=32,
    n_layer=3,
    n_embd=32,
    n_head=2,
    n_kv_head=1,
    head_dim=16,
    mlp_dim=128,
    microbatch=1,
    total_batch_size=2**19,
    num_steps=100,
    attention="einsum",
)


# ---- against the reference -----------------------------------------------------------------------


@pytest.mark.parametrize("group", range(9))
def test_updates_match_the_reference_at_each_of_six_steps(group):
    recorded = load("optimizer_cases.json")
    data = load("optimizer_cases.safetensors")
    group = recorded["groups"][group]
    muon = group["kind"] == "muon"

    # theirs are outputs by inputs, one weight each; ours inputs by outputs, stacked
    def stack(what):
        arrays = [data[f"{what}.{name}"] for name in group["params"]]
        return (
            np.stack([a.T for a in arrays]) if muon else np.concatenate([a.ravel() for a in arrays])
        )

    if muon:
        update = jax.jit(optim.muon_update)
        given = lambda i, at: dict(
            momentum=at["muon_momentum"], weight_decay=at["muon_weight_decay"]
        )
    else:
        b1, b2 = group["betas"]
        update = jax.jit(
            partial(optim.adamw_update, b1=b1, b2=b2, weight_decay=group["weight_decay"])
        )
        given = lambda i, at: dict(step=i)
    p = stack("init")
    m, v = (
        np.zeros(p.shape, p.dtype),
        np.zeros(optim.muon_second_moment(p.shape) if muon else p.shape, p.dtype),
    )
    for i, at in enumerate(recorded["steps"], 1):
        u, m, v = update(
            stack(f"grad{i}"), m, v, p, lr=group["base_lr"] * at["lr_multiplier"], **given(i, at)
        )
        p = p + np.asarray(u)
        np.testing.assert_allclose(p, stack(f"param{i}"), rtol=0, atol=3e-6, err_msg=f"step {i}")
    first, second = ("momentum_buffer6", "second_moment6") if muon else ("exp_avg6", "exp_avg_sq6")
    np.testing.assert_allclose(m, stack(first), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(v, stack(second), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("run", ["n1000", "n50", "n5000_sampled"])
def test_schedules_match_the_reference_at_every_step(run):
    r = load("schedules.json")[run]
    n, ratio, decay = r["num_iterations"], r["warmdown_ratio"], r["weight_decay_scaled"]
    steps = r["iterations"] if isinstance(r["iterations"], list) else range(n + 1)
    schedules = {
        "lr_multiplier": lambda i, n, ratio, decay: optim.lr_multiplier(
            i, n, r["warmup_steps"], ratio, r["final_lr_frac"]
        ),
        "muon_momentum": lambda i, n, ratio, decay: optim.muon_momentum(i, n, ratio),
        "muon_weight_decay": lambda i, n, ratio, decay: optim.muon_weight_decay(i, n, decay),
    }
    for name, schedule in schedules.items():
        np.testing.assert_allclose(
            [schedule(i, n, ratio, decay) for i in steps],
            r[name],
            rtol=1e-9,
            atol=1e-16,
            err_msg=name,
        )
        traced = jax.jit(jax.vmap(schedule, (0, None, None, None)))(
            jnp.asarray(steps), float(n), ratio, decay
        )
        np.testing.assert_allclose(traced, r[name], rtol=2e-6, atol=2e-8, err_msg=f"{name}, traced")


GROUP_OF = {
    "lm_head.weight": "head",
    "transformer.wte.weight": "embed",
    "resid_lambdas": "resid",
    "x0_lambdas": "x0",
    "smear_gate.weight": "smear",
}


def test_rates_betas_and_decays_match_the_reference_at_every_size():
    recorded = load("scaling.json")
    recorded.pop("base_train_defaults")
    assert len(recorded) == 11
    for name, r in recorded.items():
        config = SMALL.replace(n_embd=r["n_embd"], total_batch_size=r["total_batch_size"])
        lrs = optim.group_lrs(config)
        for theirs in r["optimizer_groups"]:
            first = theirs["first_param"]
            ours = (
                "value_embed" if first.startswith("value_embeds") else GROUP_OF.get(first, "matrix")
            )
            assert lrs[ours] == pytest.approx(theirs["lr"], rel=1e-9), (name, ours)
            if ours != "matrix":
                assert optim.ADAMW_GROUPS[ours] == (*theirs["betas"], theirs["weight_decay"])


# ---- properties ----------------------------------------------------------------------------------


def test_config_knows_the_names():
    assert set(optim.OPTIMIZERS) == set(OPTIMIZER_NAMES)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda p: p + noise(p, 0.05), jax.jit(lambda: init_params(0, SMALL))())


def noise(p, size):
    return size * np.random.default_rng(p.size).normal(size=p.shape).astype(np.float32)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_weight_goes_towards_its_target(name, params):
    config = SMALL.replace(
        optimizer=name,
        warmup_steps=0,
        weight_decay=0.0,
        adamw_lr=0.001,
        matrix_lr=0.002,
        embedding_lr=0.001,
        unembedding_lr=0.001,
        scalar_lr=0.02,
    )
    optimizer = optim.make_optimizer(config, 60)
    target = jax.tree.map(lambda p: p + noise(p, 0.02), params)

    @jax.jit
    def step(p, state):
        updates, state = optimizer.update(jax.tree.map(jnp.subtract, p, target), state, p)
        return optax.apply_updates(p, updates), state

    p, state = params, optimizer.init(params)
    for _ in range(60):
        p, state = step(p, state)
    assert int(state.step) == 60
    distances = lambda p: jax.tree.map(
        lambda p, q: float(jnp.linalg.norm((p - q).ravel())), p, target
    )
    shrunk = jax.tree.map(lambda after, before: after / before, distances(p), distances(params))
    assert max(jax.tree.leaves(shrunk)) < 0.9, shrunk


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_without_gradients_weights_only_decay(name, params):
    optimizer = optim.make_optimizer(SMALL.replace(optimizer=name, warmup_steps=0), 10)
    state = optimizer.init(params)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), state, params)
    rate = state.hyper["lr"]["matrix"] * SMALL.scaled_weight_decay
    wide = 2.0 if name == "muon" else 1.0  # Muon's rate grows with the root of outputs / inputs
    np.testing.assert_allclose(updates["blocks"]["wq"], -rate * params["blocks"]["wq"], rtol=1e-5)
    np.testing.assert_allclose(
        updates["blocks"]["w_in"], -rate * wide * params["blocks"]["w_in"], rtol=1e-5
    )
    np.testing.assert_allclose(
        updates["embed"], -state.hyper["lr"]["embed"] * 0.001 * params["embed"], rtol=1e-5
    )


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_rates_and_schedules_are_data_not_code(name, params):
    """Trials with other rates and another horizon run the same program, and still differ."""
    one = SMALL.replace(optimizer=name)
    two = one.replace(
        matrix_lr=0.05,
        adamw_lr=0.5,
        embedding_lr=0.9,
        unembedding_lr=0.1,
        scalar_lr=0.1,
        warmup_steps=3,
        weight_decay=0.9,
        warmdown_ratio=0.1,
        final_lr_frac=0.5,
        num_steps=7,
        reference_tokens=1e9,
        seed=7,
    )
    grads = jax.tree.map(lambda p: noise(p, 1.0), params)
    programs, results = [], []
    for config in (one, two):
        optimizer = optim.make_optimizer(config, config.num_steps)
        state = optimizer.init(params)
        programs.append(jax.jit(optimizer.update).lower(grads, state, params).as_text())
        results.append(state.hyper)
    assert programs[0] == programs[1]
    # smear's rate is fixed
    assert all(a != b for a, b in zip(*map(jax.tree.leaves, results)) if a != 0.2)
    assert optim.compile_key(one) == optim.compile_key(two)
    assert optim.compile_key(one) != optim.compile_key(one.replace(n_layer=4))


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
@pytest.mark.parametrize("at", [0, 3, 30, 99])
def test_a_step_uses_what_the_schedules_say_there(name, at, params):
    """In warm-up, at full rate and on the way down; the schedules' own values are the
    reference's.
    """
    config = SMALL.replace(optimizer=name, warmup_steps=8)
    optimizer = optim.make_optimizer(config, 100)
    state = optimizer.init(params)._replace(step=jnp.int32(at))
    # moments as they are in the middle of a run
    state = state._replace(
        m=jax.tree.map(lambda p: noise(p, 0.1), state.m),
        v=jax.tree.map(lambda p: np.square(noise(p, 0.1)) + 0.01, state.v),
    )
    grads = jax.tree.map(lambda p: noise(p, 1.0), params)
    updates, after = jax.jit(optimizer.update)(grads, state, params)
    assert int(after.step) == at + 1

    rate = optim.lr_multiplier(at, 100, 8, config.warmdown_ratio, config.final_lr_frac)
    assert rate == pytest.approx({0: 1 / 8, 3: 0.5, 30: 1, 99: 1 / 65 + 64 / 65 * 0.05}[at])
    decay = optim.muon_weight_decay(at, 100, config.scaled_weight_decay)
    lrs = optim.group_lrs(config)

    # a matrix of each kind of shape
    for weight in ("w_in", "w_out"):
        arrays = [tree["blocks"][weight] for tree in (grads, state.m, state.v, params)]
        lr = rate * lrs["matrix"]
        if name == "muon":
            momentum = optim.muon_momentum(at, 100, config.warmdown_ratio)
            wanted = optim.muon_update(*arrays, lr=lr, momentum=momentum, weight_decay=decay)
        else:
            betas = dict(b1=0.9, b2=0.95)
            wanted = optim.adamw_update(*arrays, step=at + 1, lr=lr, weight_decay=decay, **betas)
        actual = [tree["blocks"][weight] for tree in (updates, after.m, after.v)]
        for ours, theirs in zip(actual, wanted):
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-7)

    # the others' decay stays what it is
    b1, b2, decay = optim.ADAMW_GROUPS["embed"]
    arrays = [tree["embed"] for tree in (grads, state.m, state.v, params)]
    lr = rate * lrs["embed"]
    wanted, *_ = optim.adamw_update(*arrays, step=at + 1, lr=lr, b1=b1, b2=b2, weight_decay=decay)
    np.testing.assert_allclose(updates["embed"], wanted, rtol=2e-4, atol=1e-7)


def test_stacked_matrices_do_not_mix():
    g, p = np.random.default_rng(0).normal(size=(2, 3, 24, 40)).astype(np.float32)
    m, v = 0.1 * p, np.ones(optim.muon_second_moment(p.shape), np.float32)
    update = jax.jit(partial(optim.muon_update, lr=0.1, momentum=0.9, weight_decay=0.2))
    together = update(g, m, v, p)
    for i in range(3):
        alone = update(*(a[i : i + 1] for a in (g, m, v, p)))
        for a, b in zip(alone, together):
            np.testing.assert_allclose(a[0], b[i], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 0.02), (jnp.bfloat16, 0.6)])
@pytest.mark.parametrize("shape", [(48, 48), (32, 128), (128, 32)])
def test_polar_express_keeps_to_its_polynomial(shape, dtype, tolerance):
    """Singular values from 1 to 1e-4 against the same five steps on them alone, in float64."""
    rng = np.random.default_rng(0)
    n = min(shape)
    left, right = (np.linalg.qr(rng.normal(size=(k, n)))[0] for k in shape)
    values = np.logspace(0, -4, n)
    values /= 1.01 * np.linalg.norm(values)
    x = optim.polar_express(jnp.asarray((left * values) @ right.T, dtype)[None])[0]
    for a, b, c in optim.POLAR_EXPRESS:
        values = a * values + b * values**3 + c * values**5
    found = left.T @ np.asarray(x, np.float64) @ right
    assert abs(found - np.diag(values)).max() < tolerance
    big = values > 0.7  # what it is for: everything above a thousandth of the norm comes out near 1
    assert big.sum() > n / 3 and abs(np.diag(found)[big] - 1).max() < 0.4
