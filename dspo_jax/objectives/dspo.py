"""DSPO: the denoiser learns the score of the human-preferred images (Zhu et al., ICLR 2025)."""

import jax
import jax.numpy as jnp

from dspo_jax.objectives.implicit_reward import (
    collect_metrics,
    describe_scale,
    label_doubt,
    reduce_image,
    reward_margin,
)
from dspo_jax.objectives.registry import LossAndMetrics, Predictions, register
from dspo_jax.schedule import Schedule

# With s * G below this, the gradient is that of SFT to within about half of it (G is 1/2 at the start).
NEGLIGIBLE_SCORE_WEIGHT = 0.01


def _resolve_scales(
    lam: float, gamma: float, reward_scale: float | None, score_weight: float | None
) -> tuple[float, float]:
    """The lambda inside G, and s."""
    return (
        lam if reward_scale is None else reward_scale,
        lam * gamma if score_weight is None else score_weight,
    )


def _notes(
    values_per_image: int,
    *,
    lam: float,
    gamma: float,
    reward_scale: float | None,
    score_weight: float | None,
    detach: bool,
    reduction: str,
    time_weight: str,
) -> list[str]:
    del time_weight  # common to all the conventions
    scale, weight = _resolve_scales(lam, gamma, reward_scale, score_weight)
    notes = [describe_scale("dspo", "reward_scale", scale, reduction, values_per_image)]
    # Undetached, a second gradient flows through G: relative to the first it is about s * scale / 8 times the
    # (small) correlation of (e - y) with (e - r), with the scale in the mean convention.
    mean_scale = scale if reduction == "mean" else scale * values_per_image
    if weight <= NEGLIGIBLE_SCORE_WEIGHT and (detach or weight * mean_scale <= 1):
        notes.append(
            f"warning: dspo: the preference term's coefficient s * G is at most score_weight = {weight:g}, "
            "which makes this run numerically SFT on the winners; to make the preference matter, raise "
            "score_weight (s) and, independently, reward_scale (the lambda inside G)"
        )
    return notes


@register(needs_reference=True, needs_loser=True, notes=_notes)
def dspo(
    predictions: Predictions,
    schedule: Schedule,
    *,
    lam: float = 0.001,
    gamma: float = 1.0,
    reward_scale: float | None = None,
    score_weight: float | None = None,
    detach: bool = False,
    reduction: str = "mean",
    time_weight: str = "none",
) -> LossAndMetrics:
    """reduce[(e_w - y_w) - s G (e_w - r_w)]^2, with G = 1 - sigmoid(z) and z the reward margin (Eq. 13-14).

    With e = r the loss is exactly that of `sft`. A preference p < 1 makes the matched score that of
    p log sigmoid(z) + (1 - p) log sigmoid(-z), whose derivative is G = p - sigmoid(z).

    time_weight "paper" is Eq. 12, A(t) reduce[B(t) (e_w - y_w) - s G (e_w - r_w)]^2 with w(t) inside z. The
    omega(t) that A(t) leaves free is Theorem 1's, 2 sigma^2 / lambda, less the constant 2 / lambda: it makes
    A(t) = w(t).

    Args:
      predictions: pairs with a reference.
      schedule: read by `time_weight` only.
      lam: the paper's lambda, weight of the KL divergence to the reference; it sets the next two.
      gamma: the paper's gamma, weight of the preference in the target score.
      reward_scale: the lambda inside G; None is lam.
      score_weight: s; None is lam * gamma.
      detach: stop the gradient through G. The released code does not.
      reduction: "mean" (released code) or "sum" (paper) over an image.
      time_weight: "none" (released code) or "paper".
    """
    scale, weight = _resolve_scales(lam, gamma, reward_scale, score_weight)
    margin = reward_margin(predictions, schedule, scale=scale, reduction=reduction, time_weight=time_weight)
    # 1 - sigmoid(z), without its cancellation at large z, less 1 - p.
    gate = jax.nn.sigmoid(-margin) - label_doubt(predictions)
    if detach:
        gate = jax.lax.stop_gradient(gate)

    assert predictions.reference is not None
    policy, reference = predictions.policy[:, 0], predictions.reference[:, 0]
    target, timesteps = predictions.target[:, 0], predictions.timesteps[:, 0]
    coefficient = weight * gate
    if time_weight == "paper":
        # B(t) is taken out of the square, so that here too e = r gives the loss of `sft` exactly.
        coefficient /= schedule.score_ratio(timesteps)
    residual = (policy - target) - coefficient[:, None, None, None] * (policy - reference)
    loss = reduce_image(jnp.square(residual), reduction)
    if time_weight == "paper":
        loss *= schedule.denoising_weight(timesteps)
    return loss, collect_metrics(predictions, reduction=reduction, margin=margin)
