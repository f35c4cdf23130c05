"""The policy loss against values recorded from the papers' formulas: every setting, its derivative
by each log-probability, advantages, and gradients by the parameters.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib import model
from lib.files import UserError
from lib.interop.nanochat import to_nanochat
from lib.train import policy
from lib.train.policy import PRESETS, Policy
from tests.helpers.golden import load, parity_model

GOLDEN = load("rl_objectives_T.json")
ARRAYS = load("rl_objectives_T.safetensors")
CASES = GOLDEN["cases"]


def policy_of(settings: dict) -> Policy:
    """A golden case's settings as ours; the kind of an advantage has its numbers in its name."""
    ours = {name: value for name, value in settings.items() if name not in ("mask", "advantage")}
    ours["drop_uniform"] = ours.pop("drop_uniform_groups", False)
    kind, ddof, eps = re.fullmatch(
        r"(\w+?)(?:_ddof(\d))?(?:_eps(\S+))?", settings["advantage"]
    ).groups()
    kind = {"group_mean_batch_std": "batch_std"}.get(kind, kind)
    return Policy(**ours, advantage=kind, ddof=int(ddof or 1), eps=float(eps or 0))


def case_of(name: str):
    """(settings, mask_BT, advantage_B) of a golden case."""
    settings = CASES[name]["settings"]
    ours = policy_of(settings)
    mask_BT = ARRAYS["mask_without_end" if settings.get("mask") else "mask"]
    groups = ARRAYS["rewards"], ARRAYS["group"]
    kept_B = policy.kept(*groups, ARRAYS["truncated"], ours)
    return ours, mask_BT * kept_B[:, None], policy.advantages(*groups, ours)


def loss_of(name: str, logp_BT):
    """(loss, sums) of a golden case by its recorded log-probabilities, but these."""
    ours, mask_BT, advantage_B = case_of(name)
    others = (ARRAYS[f"{kind}_logp"] for kind in ("old", "ref", "sampler"))
    return policy.policy_loss(logp_BT, *others, mask_BT, advantage_B, ours)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_its_derivative_are_the_papers(name):
    recorded = CASES[name]
    (loss, sums), dlogp_BT = jax.value_and_grad(
        lambda logp_BT: loss_of(name, logp_BT), has_aux=True
    )(jnp.asarray(ARRAYS["logp"]))
    np.testing.assert_allclose(loss, recorded["loss"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(dlogp_BT, ARRAYS[f"{name}.dlogp"], atol=1e-6)
    assert sums["tokens"] == recorded["tokens"]
    assert jnp.sum(jnp.abs(dlogp_BT) > 0) == recorded["tokens_with_gradient"]
    if "clip_fraction" in recorded:
        assert sums["clipped"] / sums["tokens"] == pytest.approx(recorded["clip_fraction"])


@pytest.mark.parametrize("name", [n for n in ARRAYS if n.startswith("advantages.")])
def test_advantages(name):
    ours = policy_of(dict(advantage=name.removeprefix("advantages.")))
    given = policy.advantages(ARRAYS["rewards"], ARRAYS["group"], ours)
    np.testing.assert_allclose(given, ARRAYS[name], atol=1e-6)


@pytest.mark.parametrize("kind", policy.ADVANTAGES)
def test_groups_without_signal_have_no_advantage(kind):
    given = policy.advantages([1, 1, 0, 0, 5.0], [0, 0, 1, 1, 2], Policy(advantage=kind))
    np.testing.assert_array_equal(given, 0.0)


def test_presets_are_those_of_their_papers():
    for name in ("grpo", "dapo", "gspo"):
        ours = dataclasses.replace(PRESETS[name], drop_uniform=False)
        assert ours == policy_of(CASES[name]["settings"]), name
    dr_grpo = dataclasses.replace(PRESETS["dr_grpo"], norm=24)
    assert dr_grpo == policy_of(CASES["dr_grpo"]["settings"])
    cispo = dataclasses.replace(PRESETS["cispo"], drop_uniform=False)
    assert cispo == policy_of(CASES["cispo_max5"]["settings"])
    # whose groups without a difference leave the mean
    drop = {name: preset.drop_uniform for name, preset in PRESETS.items()}
    assert drop == dict(
        reinforce=True, grpo=False, dr_grpo=False, dapo=True, gspo=False, cispo=True
    )


def test_on_policy_the_clipped_objective_is_reinforce():
    logp_BT, mask_BT = jnp.asarray(ARRAYS["logp"]), ARRAYS["mask"]
    advantage_B = ARRAYS["advantages.group_mean"]

    def derivative(ratio):
        settings = Policy(ratio=ratio)
        return jax.grad(
            lambda x: policy.policy_loss(
                x, logp_BT, logp_BT, logp_BT, mask_BT, advantage_B, settings
            )[0]
        )(logp_BT)

    reinforce = derivative("none")
    assert jnp.abs(reinforce).max() > 1e-3
    for ratio in ("token", "stopped_weight"):
        np.testing.assert_allclose(derivative(ratio), reinforce, atol=1e-8)


def test_parts_of_a_step_add_up_however_rows_are_dealt_out():
    ours, mask_BT, advantage_B = case_of("grpo")
    arrays = [ARRAYS[name] for name in ("logp", "old_logp", "ref_logp", "sampler_logp")]
    weight_B = policy.row_weights(mask_BT.sum(axis=1), ours)
    total = 0.0
    for rows in (slice(0, 5), slice(5, 20), slice(20, None)):
        part = [a[rows] for a in (*arrays, mask_BT, advantage_B)]
        total += policy.policy_loss(*part, ours, weight_B[rows])[0]
    np.testing.assert_allclose(total, CASES["grpo"]["loss"], rtol=1e-5)


def test_what_is_outside_the_mask_has_no_effect():
    logp_BT = np.where(ARRAYS["mask"] > 0, ARRAYS["logp"], 1e9)
    loss, dlogp_BT = jax.value_and_grad(lambda x: loss_of("dapo", x)[0])(jnp.asarray(logp_BT))
    np.testing.assert_allclose(loss, CASES["dapo"]["loss"], rtol=1e-5)
    assert np.isfinite(dlogp_BT).all()


def test_soft_overlong():
    for case in GOLDEN["soft_overlong"]:
        given = policy.soft_overlong(case["length"], case["max_length"], case["cache"])
        assert given == pytest.approx(case["penalty"], abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        dict(ratio="tokens"),
        dict(clip_low=1.5),
        dict(dual_clip=0.5),
        dict(sampler_min=3.0),
        dict(kl=-1.0),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes):
    with pytest.raises(UserError):
        Policy(**changes)


# ---- through the model ---------------------------------------------------------------------------


def fingerprint(array) -> np.ndarray:
    """L2 norm, sum, and product with a sine, as recorded."""
    flat = np.asarray(array, np.float64).ravel()
    sine = np.sin(1 + 0.37 * np.arange(flat.size))
    return np.array([np.linalg.norm(flat), flat.sum(), flat @ sine])


def check_fingerprints(grads, config, recorded):
    """The gradients by the reference's names, each against its fingerprint."""
    for name, array in to_nanochat(grads, config).items():
        # without effect in this model (its layer is the last, and a norm follows)
        if name != "backout_lambda":
            atol = max(5e-4 * recorded[name][0], 1e-6)
            np.testing.assert_allclose(fingerprint(array), recorded[name], atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def learner():
    """(config, params, inputs, targets) of the model that wrote the golden batch."""
    config, params = parity_model("T")
    ids, mask_BT = ARRAYS["ids"], ARRAYS["mask"]
    return config, params, ids[:, :-1], np.where(mask_BT > 0, ids[:, 1:], -1)


def test_log_probabilities_entropy_and_gradients(learner):
    config, params, inputs_BT, targets_BT = learner

    @jax.jit
    def gradients(params):
        def loss(params):
            logp_BT, entropy_BT = model.token_logprobs(params, config, inputs_BT, targets_BT)
            return loss_of("grpo", logp_BT)[0], (logp_BT, entropy_BT)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (logp_BT, entropy_BT)), grads = gradients(params)
    inside = ARRAYS["mask"] > 0
    np.testing.assert_allclose(logp_BT[inside], ARRAYS["logp"][inside], atol=5e-5)
    np.testing.assert_allclose(entropy_BT[inside], ARRAYS["entropy"][inside], atol=5e-5)
    np.testing.assert_allclose(loss, CASES["grpo"]["loss"], atol=2e-5)
    check_fingerprints(grads, config, CASES["grpo"]["grad_fingerprint"])


def test_the_samplers_drift_is_a_distance_whichever_way_it_went():
    zeros, mask_BT = np.zeros((1, 3)), np.array([[1, 1, 0]])
    sampler = np.array([[0.1, -0.3, 9.0]])
    _, sums = policy.policy_loss(zeros, zeros, zeros, sampler, mask_BT, [1.0], Policy())
    assert float(sums["drift"]) == pytest.approx(0.4)
