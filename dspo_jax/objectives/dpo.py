"""Diffusion-DPO and the losses built like it: functions of one margin, the winner's reward minus the loser's.

All of them take a preference p < 1 as p l(z) + (1 - p) l(-z), the loss that is expected when the label is
right with probability p.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dspo_jax.objectives.implicit_reward import (
    collect_metrics,
    describe_scale,
    reduce_image,
    reward_margin,
    soft_label,
)
from dspo_jax.objectives.registry import LossAndMetrics, Predictions, register
from dspo_jax.schedules.variance_preserving import Schedule


def _negative_log_sigmoid(margin: jax.Array) -> jax.Array:
    return jax.nn.softplus(-margin)


def _dpo_notes(values_per_image: int, *, beta: float, reduction: str, **_: Any) -> list[str]:
    return [describe_scale("diffusion_dpo", "beta", beta, reduction, values_per_image)]


@register(needs_reference=True, needs_loser=True, notes=_dpo_notes)
def diffusion_dpo(
    predictions: Predictions,
    schedule: Schedule,
    *,
    beta: float = 5000.0,
    reduction: str = "mean",
    time_weight: str = "none",
) -> LossAndMetrics:
    """-log sigmoid(z), z = -(beta / 2) {[SE(e_w) - SE(r_w)] - [SE(e_l) - SE(r_l)]}.

    The loss of the released code and of Eq. 46 in the supplement of Wallace et al. (2024), up to `reduction`.
    With e = r it is exactly ln 2.

    Args:
      predictions: pairs with a reference.
      schedule: read by `time_weight` only.
      beta: strength of the pull to the reference; 5000 is the released value, for reduction "mean".
      reduction: "mean" or "sum" over an image.
      time_weight: "none", or "paper" for w(t) inside the reward (`Schedule.reward_weight`).
    """
    margin = reward_margin(predictions, schedule, scale=beta, reduction=reduction, time_weight=time_weight)
    loss = soft_label(_negative_log_sigmoid, margin, predictions)
    return loss, collect_metrics(predictions, reduction=reduction, margin=margin)


def _l2_notes(values_per_image: int, *, beta: float, reduction: str, **_: Any) -> list[str]:
    return [
        describe_scale("diffusion_dpo_l2", "beta", beta, reduction, values_per_image),
        "warning: diffusion_dpo_l2: its gradient is exactly zero where the policy equals the reference, "
        "which is where a run starts: only weight decay and rounding move it away; use diffusion_dpo, or "
        "start from other weights than the reference's",
    ]


@register(needs_reference=True, needs_loser=True, notes=_l2_notes)
def diffusion_dpo_l2(
    predictions: Predictions,
    schedule: Schedule,
    *,
    beta: float = 5000.0,
    reduction: str = "mean",
    time_weight: str = "none",
) -> LossAndMetrics:
    """-log sigmoid(z), z = +(beta / 2) (||e_w - r_w||^2 - ||e_l - r_l||^2).

    Diffusion-DPO with x_{t-1} drawn from the policy rather than from q(x_{t-1} | x_t, x_0) (supplement S2,
    "an alternative approximation"): the expected log-ratio is then a divergence of two Gaussians of one
    variance. The sign is that of the line with the divergences; the last printed line has it reversed.

    The reward is quadratic in e - r, so the gradient at e = r is zero.

    Takes the arguments of `diffusion_dpo`; no target enters.
    """
    assert predictions.reference is not None
    rewards = 0.5 * beta * reduce_image(jnp.square(predictions.policy - predictions.reference), reduction)
    if time_weight == "paper":
        rewards *= schedule.reward_weight(predictions.timesteps)
    margin = rewards[:, 0] - rewards[:, 1]
    loss = soft_label(_negative_log_sigmoid, margin, predictions)
    return loss, collect_metrics(predictions, reduction=reduction, margin=margin)


def _ipo_notes(values_per_image: int, *, beta: float, reduction: str, **_: Any) -> list[str]:
    del values_per_image
    return [
        f"ipo: the margin -D ({reduction}, without 1/2) is pulled to 1 / (2 beta) = {1 / (2 * beta):g}; "
        f"the loss starts at {1 / (2 * beta) ** 2:g} and its gradient at {1 / beta:g} times that of D, to be "
        "seen against optimizer.eps"
    ]


@register(needs_reference=True, needs_loser=True, notes=_ipo_notes)
def ipo(
    predictions: Predictions,
    schedule: Schedule,
    *,
    beta: float = 2500.0,
    reduction: str = "mean",
    time_weight: str = "none",
) -> LossAndMetrics:
    """(z - 1 / (2 beta))^2, z = -D = -{[SE(e_w) - SE(r_w)] - [SE(e_l) - SE(r_l)]}.

    IPO (Azar et al. 2024, Eq. 17) in the form of diffusers' trainer, where the margin is D without 1/2 and
    without beta. A margin beyond the target is penalised too, unlike in Diffusion-DPO.

    Args:
      predictions: pairs with a reference.
      schedule: read by `time_weight` only.
      beta: the target margin is 1 / (2 beta). In units of D, so that "sum" over N values wants beta / N.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", or "paper" for w(t) inside D.
    """
    margin = reward_margin(predictions, schedule, scale=2.0, reduction=reduction, time_weight=time_weight)
    loss = soft_label(lambda z: jnp.square(z - 1 / (2 * beta)), margin, predictions)
    return loss, collect_metrics(predictions, reduction=reduction, margin=margin)


def _dmpo_notes(values_per_image: int, *, beta: float, alpha: float, reduction: str, **_: Any) -> list[str]:
    notes = [describe_scale("dmpo", "beta", beta, reduction, values_per_image)]
    if alpha >= 0.5:
        effect = "zero" if alpha == 0.5 else "reversed: it trains towards the loser"
        notes.append(
            f"warning: dmpo: alpha = {alpha:g}, the probability given to the loser: the gradient at the "
            f"start is {effect}; choose it well below 0.5 (released: 0.01)"
        )
    return notes


@register(needs_reference=True, needs_loser=True, notes=_dmpo_notes)
def dmpo(
    predictions: Predictions,
    schedule: Schedule,
    *,
    beta: float = 2000.0,
    alpha: float = 0.01,
    reduction: str = "mean",
    time_weight: str = "none",
) -> LossAndMetrics:
    """KL(Bernoulli(sigmoid z) || Bernoulli(1 - alpha)), z the margin of `diffusion_dpo`.

    The reverse of the divergence that Diffusion-DPO minimises (DMPO, Li et al. 2025; this form is that of the
    Diffusion-SDPO code). The minimum is at sigmoid(z) = 1 - alpha, so that the margin does not grow for ever.

    Args:
      predictions: pairs with a reference.
      schedule: read by `time_weight` only.
      beta: as in `diffusion_dpo`; 2000 is the released value for SD1.5.
      alpha: probability of the loser in the target distribution.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", or "paper" for w(t) inside the reward.
    """
    margin = reward_margin(predictions, schedule, scale=beta, reduction=reduction, time_weight=time_weight)

    def divergence(z: jax.Array) -> jax.Array:
        wins = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - math.log1p(-alpha))
        loses = jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - math.log(alpha))
        return wins + loses

    loss = soft_label(divergence, margin, predictions)
    return loss, collect_metrics(predictions, reduction=reduction, margin=margin)


def _sdpo_notes(values_per_image: int, *, beta: float, reduction: str, **_: Any) -> list[str]:
    return [describe_scale("sdpo", "beta", beta, reduction, values_per_image)]


@register(needs_reference=True, needs_loser=True, notes=_sdpo_notes)
def sdpo(
    predictions: Predictions,
    schedule: Schedule,
    *,
    beta: float = 5000.0,
    mu: float = 0.9,
    reduction: str = "mean",
    time_weight: str = "none",
) -> LossAndMetrics:
    """`diffusion_dpo` with the loser's gradient scaled down where it would raise the winner's error.

    Diffusion-SDPO (Fu et al. 2025): with g the gradient of an image's error with respect to the prediction,
    the loser's part of the gradient is multiplied by

        lambda = clip((1 - mu) ||g_w||^2 / <g_l, g_w>, 0, 1) where <g_l, g_w> > 0, else 1,

    so that, to first order and in the space of predictions, a step leaves at least mu of the winner's own
    decrease of error. The value of the loss is that of `diffusion_dpo`. Here lambda is the pair's own; the
    released code takes one for all pairs of a device's batch, which makes it depend on the batch size.

    Args:
      predictions: pairs with a reference.
      schedule: read by `time_weight` only.
      beta: as in `diffusion_dpo`.
      mu: share of the winner's decrease that is kept; 0.9 is the released value.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", or "paper" for w(t) inside the reward, and so in g.

    Adds the metric `loser_scale`: lambda.
    """
    policy = predictions.policy
    gradients = policy - predictions.target  # up to a factor common to both images
    if time_weight == "paper":
        gradients *= schedule.reward_weight(predictions.timesteps)[..., None, None, None]
    winner, loser = gradients[:, 0], gradients[:, 1]
    agreement = reduce_image(winner * loser, reduction)
    bound = (1 - mu) * reduce_image(jnp.square(winner), reduction)
    agrees = agreement > 0
    scale = jnp.where(agrees, jnp.clip(bound / jnp.where(agrees, agreement, 1.0), 0.0, 1.0), 1.0)
    scale = jax.lax.stop_gradient(scale)

    # Leaves the value, and multiplies the gradient.
    factor = jnp.stack([jnp.ones_like(scale), scale], 1)[..., None, None, None]
    held = jax.lax.stop_gradient(policy)
    scaled = Predictions(
        held + factor * (policy - held),
        predictions.reference,
        predictions.target,
        predictions.timesteps,
        predictions.preference,
    )
    margin = reward_margin(scaled, schedule, scale=beta, reduction=reduction, time_weight=time_weight)
    loss = soft_label(_negative_log_sigmoid, margin, predictions)
    metrics = collect_metrics(predictions, reduction=reduction, margin=margin)
    return loss, metrics | {"loser_scale": scale}
