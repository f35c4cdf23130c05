"""The policy gradient: which rollouts count for how much, and the one loss that all methods share.

A model that writes is a policy; each token that it chose is an action. The gradient of the expected
reward is the mean of advantage x gradient of the log-probability (REINFORCE; Williams 1992), and
what has been published since differs in four choices, which are the fields of `Policy`: how the
advantage is scaled, how a ratio of new to old probabilities is bounded, how tokens are averaged,
what keeps the model near a reference. `PRESETS` holds the choices of well-known papers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lib.files import UserError, choose

# ---- settings ------------------------------------------------------------------------------------

RATIOS = ("none", "token", "sequence", "stopped_weight")
SAMPLERS = ("none", "truncate", "mask")


@dataclass(frozen=True)
class Policy:
    """The choices of a policy-gradient method; the defaults are REINFORCE with a group's mean as
    baseline.

    ratio: what multiplies the advantage A, with r = exp(logp - old_logp):
      none      -A logp (Williams 1992)
      token     max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) (PPO, arXiv 1707.06347);
                with dual_clip c > 0 at most -A c where A < 0 (arXiv 1912.09729)
      sequence  the same with one r for a row, exp(mean of logp - old_logp) (arXiv 2507.18071)
      stopped_weight  -clip(r, weight_min, weight_max) A logp, with no gradient through r
                (arXiv 2506.13585)
    sampler: what corrects for w = exp(old_logp - sampler_logp), where learner and sampler disagree:
    nothing, "truncate" (times min(w, sampler_max)) or "mask" (times w within sampler_min and
    sampler_max, 0 outside).
    kl: weight of k3 = exp(d) - d - 1, d = ref_logp - logp (Schulman's estimate of the divergence).
    advantage, ddof, eps: see ADVANTAGES. reduce, norm: see REDUCTIONS. drop_uniform: rows of groups
    with equal rewards teach nothing and leave the mean (DAPO's dynamic sampling without drawing
    again). drop_truncated: so do rows that were cut (DAPO's overlong filtering).
    """

    ratio: str = "none"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    weight_min: float = 0.0
    weight_max: float = 5.0
    sampler: str = "none"
    sampler_min: float = 0.5
    sampler_max: float = 2.0
    kl: float = 0.0
    advantage: str = "group_mean"
    ddof: int = 1
    eps: float = 0.0
    reduce: str = "token"
    norm: int = 0
    drop_uniform: bool = True
    drop_truncated: bool = False

    def __post_init__(self):
        choose("ratio", self.ratio, RATIOS)
        choose("sampler", self.sampler, SAMPLERS)
        choose("advantage", self.advantage, ADVANTAGES)
        choose("reduce", self.reduce, REDUCTIONS)
        if min(self.clip_low, self.clip_high, self.kl, self.eps) < 0 or self.clip_low >= 1:
            raise UserError(
                "clip_low, clip_high, kl and eps must not be negative, and clip_low below 1, got "
                f"{self.clip_low}, {self.clip_high}, {self.kl} and {self.eps}"
            )
        if self.dual_clip and self.dual_clip <= 1:
            raise UserError(f"dual_clip must be above 1, or 0 for none, got {self.dual_clip}")
        if not 0 <= self.sampler_min <= self.sampler_max:
            raise UserError(
                f"sampler_min {self.sampler_min} must lie between 0 and sampler_max "
                f"{self.sampler_max}"
            )


# ---- advantages: how much better an answer was than the others to the same question --------------

# name -> function(rewards of one group, rewards of the whole step, ddof, eps)
ADVANTAGES: dict[str, Callable] = {
    # r - mean: no division (Dr. GRPO, arXiv 2503.20783)
    "group_mean": lambda group, step, ddof, eps: group - group.mean(),
    # divided by the group's own deviation (GRPO, arXiv 2402.03300)
    "group_std": lambda group, step, ddof, eps: (
        (group - group.mean()) / (group.std(ddof=ddof) + eps)
    ),
    # r - mean of the others (RLOO, arXiv 2402.14740)
    "leave_one_out": lambda group, step, ddof, eps: (
        (group - group.mean()) * (len(group) / (len(group) - 1))
    ),
    # divided by the deviation of all rewards of the step (REINFORCE++, arXiv 2501.03262)
    "batch_std": lambda group, step, ddof, eps: (
        (group - group.mean()) / (step.std(ddof=ddof) + eps)
    ),
}


def has_signal(rewards) -> bool:
    """Whether a group can teach anything: its rewards differ."""
    return len(rewards) > 1 and min(rewards) < max(rewards)


def advantages(rewards_B, group_B, policy: Policy) -> np.ndarray:
    """The advantage of each row (B,), among the rows with the same number in group_B.

    Exactly 0, never NaN, in groups whose rewards are equal and in groups of one.
    """
    rewards_B = np.asarray(rewards_B, np.float64)
    group_B = np.asarray(group_B)
    advantage_B = np.zeros(len(rewards_B))
    for group in np.unique(group_B):
        rows = group_B == group
        rewards = rewards_B[rows]
        if has_signal(rewards):
            formula = ADVANTAGES[policy.advantage]
            advantage_B[rows] = formula(rewards, rewards_B, policy.ddof, policy.eps)
    return advantage_B


def kept(rewards_B, group_B, truncated_B, policy: Policy) -> np.ndarray:
    """Whether each row (B,) counts at all."""
    rewards_B, group_B = np.asarray(rewards_B), np.asarray(group_B)
    kept_B = np.ones(len(rewards_B), bool)
    if policy.drop_uniform:
        for group in np.unique(group_B):
            rows = group_B == group
            kept_B[rows] = has_signal(rewards_B[rows])
    if policy.drop_truncated:
        kept_B &= ~np.asarray(truncated_B, bool)
    return kept_B


# ---- reductions: what each token of a row weighs in the step's loss ------------------------------

# name -> function(learnt tokens of each row, norm) -> weight of each of the row's tokens
REDUCTIONS: dict[str, Callable] = {
    # the mean over all tokens (DAPO, arXiv 2503.14476)
    "token": lambda count_B, norm: np.full(len(count_B), 1 / max(count_B.sum(), 1)),
    # the mean over rows of each row's mean (GRPO): long answers are punished less for each token
    "sequence": lambda count_B, norm: 1 / (len(count_B) * np.maximum(count_B, 1)),
    # the mean over rows of each row's sum
    "sequence_sum": lambda count_B, norm: np.full(len(count_B), 1 / len(count_B)),
    # the same over a constant, such as the most tokens of a row (Dr. GRPO)
    "constant": lambda count_B, norm: np.full(len(count_B), 1 / (len(count_B) * norm)),
}


def row_weights(count_B, policy: Policy) -> np.ndarray:
    """What each token of a row weighs (B,), by how many tokens of each row are learnt.

    Of the whole step: a loss that is added up over parts of it then doesn't depend on how the rows
    were dealt out. Rows with nothing to learn stay in the number of rows.
    """
    if policy.reduce == "constant" and policy.norm < 1:
        raise UserError("reduce=constant divides by norm: set it to the most tokens of an answer")
    return REDUCTIONS[policy.reduce](np.asarray(count_B), policy.norm)


# ---- the loss ------------------------------------------------------------------------------------


def policy_loss(  # noqa: PLR0913  (four models' opinions of the same tokens)
    logp_BT,
    old_logp_BT,
    ref_logp_BT,
    sampler_logp_BT,
    mask_BT,
    advantage_B,
    settings: Policy,
    weight_B=None,
) -> tuple[Any, dict]:
    """The loss of a policy gradient, and {name: sum over the mask} of what is worth watching.

    Log-probabilities of the tokens written, in nats: of the model that learns, of the model before
    this step, of a frozen reference, and as the sampler reported them. mask_BT: 1 where the model
    chose the token itself; what is outside has no meaning and no effect. weight_B: from
    `row_weights` of the whole step; None if these rows are the whole step.
    """
    mask_BT = mask_BT > 0
    if weight_B is None:
        weight_B = row_weights(np.asarray(mask_BT).sum(axis=1), settings)
    advantage_B1 = jnp.asarray(advantage_B)[:, None]

    # 0 outside of the mask, so that no exponential there can overflow
    def difference(a, b):
        return jnp.where(mask_BT, a - b, 0.0)

    ratio = _ratio(difference(logp_BT, old_logp_BT), mask_BT, settings)
    loss_BT = objective(logp_BT, ratio, advantage_B1, settings)
    drift_BT = difference(old_logp_BT, sampler_logp_BT)
    loss_BT = loss_BT * _sampler_weight(drift_BT, settings)
    k3_BT = _k3(difference(ref_logp_BT, logp_BT))
    if settings.kl:
        loss_BT = loss_BT + settings.kl * k3_BT

    weight_BT = mask_BT * jnp.asarray(weight_B)[:, None]
    loss = jnp.sum(jnp.where(mask_BT, loss_BT, 0.0) * weight_BT)
    clipped_BT = mask_BT & _is_clipped(ratio, advantage_B1, settings)
    sums = dict(
        tokens=mask_BT.sum(),
        kl=k3_BT.sum(),
        clipped=clipped_BT.sum(),
        drift=jnp.abs(drift_BT).sum(),
    )
    return loss, jax.lax.stop_gradient(sums)


def _k3(d):
    """Schulman's estimate of a divergence from d = log(reference / policy): positive, unbiased."""
    return jnp.exp(d) - d - 1


def _ratio(difference_BT, mask_BT, settings: Policy):
    """New over old probability, of each token (B, T) or of each row (B, 1)."""
    if settings.ratio != "sequence":
        return jnp.exp(difference_BT)
    count_B1 = jnp.maximum(mask_BT.sum(axis=1, keepdims=True), 1)
    return jnp.exp(difference_BT.sum(axis=1, keepdims=True) / count_B1)


def objective(logp_BT, ratio, advantage_B1, settings: Policy):
    """What is minimised for each token, before weights and KL."""
    if settings.ratio == "none":
        return -advantage_B1 * logp_BT
    if settings.ratio == "stopped_weight":
        weight = jnp.clip(ratio, settings.weight_min, settings.weight_max)
        return -jax.lax.stop_gradient(weight) * advantage_B1 * logp_BT

    clipped = jnp.clip(ratio, 1 - settings.clip_low, 1 + settings.clip_high)
    loss = jnp.maximum(-advantage_B1 * ratio, -advantage_B1 * clipped)
    if settings.dual_clip:
        bounded = jnp.minimum(loss, -advantage_B1 * settings.dual_clip)
        loss = jnp.where(advantage_B1 < 0, bounded, loss)
    return jnp.broadcast_to(loss, logp_BT.shape)


def _sampler_weight(drift_BT, settings: Policy):
    """Importance of a token that the sampler drew with another probability than the learner's."""
    if settings.sampler == "none":
        return 1.0
    weight_BT = jax.lax.stop_gradient(jnp.exp(drift_BT))
    if settings.sampler == "truncate":
        return jnp.minimum(weight_BT, settings.sampler_max)
    inside_BT = (settings.sampler_min <= weight_BT) & (weight_BT <= settings.sampler_max)
    return jnp.where(inside_BT, weight_BT, 0.0)


def _is_clipped(ratio, advantage_B1, settings: Policy):
    """Where the clip takes a token's gradient away."""
    if settings.ratio not in ("token", "sequence"):
        return jnp.zeros(ratio.shape, bool)
    too_high = (ratio > 1 + settings.clip_high) & (advantage_B1 > 0)
    too_low = (ratio < 1 - settings.clip_low) & (advantage_B1 < 0)
    return too_high | too_low


# ---- by name -------------------------------------------------------------------------------------

PRESETS: dict[str, Policy] = {
    # Williams 1992, with the group's mean as baseline
    "reinforce": Policy(),
    # arXiv 2402.03300
    "grpo": Policy(
        ratio="token",
        advantage="group_std",
        eps=1e-4,
        reduce="sequence",
        kl=0.04,
        drop_uniform=False,
    ),
    # arXiv 2503.20783; norm is the most tokens of an answer, which the run fills in
    "dr_grpo": Policy(ratio="token", reduce="constant", drop_uniform=False),
    # arXiv 2503.14476
    "dapo": Policy(ratio="token", clip_high=0.28, advantage="group_std", eps=1e-6),
    # arXiv 2507.18071
    "gspo": Policy(
        ratio="sequence",
        clip_low=0.0003,
        clip_high=0.0004,
        advantage="group_std",
        eps=1e-4,
        reduce="sequence",
        drop_uniform=False,
    ),
    # arXiv 2506.13585, with the bound of ScaleRL (arXiv 2510.13786)
    "cispo": Policy(ratio="stopped_weight", advantage="group_std", eps=1e-4),
}


def soft_overlong(length: int, max_length: int, cache: int) -> float:
    """DAPO's penalty of long answers, added to the reward: 0 up to max_length - cache tokens, then
    down to -1 at max_length and beyond.
    """
    if not 0 < cache <= max_length:
        raise UserError(f"cache {cache} must be from 1 to max_length {max_length}")
    return -min(max(length - (max_length - cache), 0) / cache, 1.0)
