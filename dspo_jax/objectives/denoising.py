"""Denoising without a preference: pretraining on every image, or fine-tuning on the winners."""

import jax
import jax.numpy as jnp

from dspo_jax.objectives.implicit_reward import collect_metrics, reduce_image, squared_error
from dspo_jax.objectives.registry import LossAndMetrics, Predictions, register
from dspo_jax.schedules.variance_preserving import Schedule


@register(needs_reference=False, needs_loser=False)
def ddpm(
    predictions: Predictions,
    schedule: Schedule,
    *,
    min_snr_gamma: float | None = None,
    reduction: str = "mean",
    time_weight: str = "none",
) -> LossAndMetrics:
    """SE(e), averaged over the images of an example (DDPM Eq. 14; DSPO Eq. 3 with lambda(t) = 1).

    Args:
      predictions: P = 1 or 2; the reference is read for metrics only.
      schedule: read by the time weights only.
      min_snr_gamma: the gamma of `Schedule.min_snr_weight`; None is no such weight. Not with "paper".
      reduction: "mean" or "sum" over an image.
      time_weight: "none", or "paper" for lambda(t) = A(t) B(t)^2, DSPO's own weight at gamma = 0.
    """
    losses = squared_error(predictions, reduction)
    losses = _weigh(losses, predictions.timesteps, schedule, min_snr_gamma, time_weight)
    return losses.mean(1), collect_metrics(predictions, reduction=reduction)


@register(needs_reference=False, needs_loser=False, images="winner")
def sft(
    predictions: Predictions,
    schedule: Schedule,
    *,
    min_snr_gamma: float | None = None,
    reduction: str = "mean",
    time_weight: str = "none",
) -> LossAndMetrics:
    """SE(e_w): supervised fine-tuning on the winners, the papers' baseline.

    Takes the arguments of `ddpm`; a loser, which the training step does not run, is read for metrics only.
    """
    # Reduced over the shape that `dspo` reduces over, so that the two agree to the last bit where e = r.
    residual = predictions.policy[:, 0] - predictions.target[:, 0]
    loss = reduce_image(jnp.square(residual), reduction)
    loss = _weigh(loss, predictions.timesteps[:, 0], schedule, min_snr_gamma, time_weight)
    return loss, collect_metrics(predictions, reduction=reduction)


def _weigh(
    losses: jax.Array,
    timesteps: jax.Array,
    schedule: Schedule,
    min_snr_gamma: float | None,
    time_weight: str,
) -> jax.Array:
    if min_snr_gamma is not None:
        return losses * schedule.min_snr_weight(timesteps, min_snr_gamma)
    return losses * schedule.denoising_weight(timesteps) if time_weight == "paper" else losses
