"""MaPO: margin-aware preference optimization, without a reference (Hong et al. 2024)."""

from typing import Any

import jax
import jax.numpy as jnp

from dspo_jax.objectives.implicit_reward import collect_metrics, soft_label, squared_error
from dspo_jax.objectives.registry import LossAndMetrics, Predictions, register
from dspo_jax.schedules.variance_preserving import Schedule


def _score(error: jax.Array, kappa: float) -> jax.Array:
    """f(u) = kappa u / (exp(kappa u) - 1): from 1 at u = 0 down to 0, without overflow at large u."""
    x = kappa * error
    small = x < 1e-3
    safe = jnp.where(small, 1.0, x)
    return jnp.where(small, 1 - x / 2 + x * x / 12, safe * jnp.exp(-safe) / -jnp.expm1(-safe))


def _notes(
    values_per_image: int, *, margin_weight: float, scale: float, reduction: str, **_: Any
) -> list[str]:
    del values_per_image
    notes = []
    if margin_weight * scale == 0:
        notes.append("warning: mapo: margin_weight * scale = 0 leaves only SE(e_w): this run is SFT")
    if reduction == "sum":
        notes.append(
            "warning: mapo: its kappa is made for reduction 'mean'; with 'sum' f is zero at any usual error "
            "and the preference term has no gradient"
        )
    return notes


@register(needs_reference=False, needs_loser=True, notes=_notes)
def mapo(
    predictions: Predictions,
    schedule: Schedule,
    *,
    margin_weight: float = 0.1,
    kappa: float = 0.5,
    scale: float = 1000.0,
    reduction: str = "mean",
    time_weight: str = "none",
) -> LossAndMetrics:
    """SE(e_w) - m log sigmoid(z), z = K [f(SE(e_w)) - f(SE(e_l))], f(u) = k u / (exp(k u) - 1).

    The released code's loss. f takes the place of a likelihood ratio to a reference, so that none is held or
    run. K is the number of timesteps there. A preference p < 1 softens the second term.

    Args:
      predictions: pairs; a reference is read for metrics only.
      schedule: read by `time_weight` only.
      margin_weight: m (`beta_mapo` in the released code).
      kappa: k (`snr_value` in the released code).
      scale: K.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", or "paper" for DSPO's weights: of `sft` on the first term and w(t) on the errors
        inside f. MaPO itself has none.
    """
    error = squared_error(predictions, reduction)
    denoising, inside = error[:, 0], error
    if time_weight == "paper":
        denoising = denoising * schedule.denoising_weight(predictions.timesteps[:, 0])
        inside = inside * schedule.reward_weight(predictions.timesteps)
    scores = _score(inside, kappa)
    margin = scale * (scores[:, 0] - scores[:, 1])
    preference = soft_label(lambda z: jax.nn.softplus(-z), margin, predictions)
    metrics = collect_metrics(predictions, reduction=reduction, margin=margin)
    return denoising + margin_weight * preference, metrics
