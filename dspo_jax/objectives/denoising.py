"""Denoising without a preference: pretraining on every image, or fine-tuning on the winners."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float32, Integer

from dspo_jax.objectives.hyperparameters import ABOVE_ZERO, check_one_time_weight, number
from dspo_jax.objectives.implicit_reward import collect_metrics, reduce_image, squared_error
from dspo_jax.objectives.objective import LossAndMetrics, Objective, Predictions
from dspo_jax.schedules.variance_preserving import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Denoising(Objective):
    """Hyperparameters of `ddpm` and `sft`.

    Attributes:
      min_snr_gamma: the gamma of `Schedule.min_snr_weight`; None is no such weight. Not with "paper".
      reduction: "mean" or "sum" over an image.
      time_weight: "none", or "paper" for lambda(t) = A(t) B(t)^2, DSPO's own weight at gamma = 0.
    """

    needs_reference = False
    needs_loser = False

    min_snr_gamma: float | None = number(None, ABOVE_ZERO)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_time_weight(self.min_snr_gamma, self.time_weight)

    def _weigh(
        self, losses: Float32[Array, "*t"], timesteps: Integer[Array, "*t"], schedule: Schedule
    ) -> Float32[Array, "*t"]:
        if self.min_snr_gamma is not None:
            return losses * schedule.min_snr_weight(timesteps, self.min_snr_gamma)
        return losses * schedule.denoising_weight(timesteps) if self.time_weight == "paper" else losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM(_Denoising):
    """SE(e), averaged over the images of an example (DDPM Eq. 14; DSPO Eq. 3 with lambda(t) = 1).

    P = 1 or 2; the reference is read for metrics only.
    """

    name = "ddpm"

    def loss_and_metrics(self, predictions: Predictions, schedule: Schedule) -> LossAndMetrics:
        losses = squared_error(predictions, self.reduction)
        losses = self._weigh(losses, predictions.timesteps, schedule)
        return losses.mean(1), collect_metrics(predictions, reduction=self.reduction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT(_Denoising):
    """SE(e_w): supervised fine-tuning on the winners, the papers' baseline.

    A loser, which the training step does not run, is read for metrics only.
    """

    name = "sft"
    images = "winner"

    def loss_and_metrics(self, predictions: Predictions, schedule: Schedule) -> LossAndMetrics:
        # Reduced over the shape that `dspo` reduces over, so that the two agree to the last bit where e = r.
        residual = predictions.policy[:, 0] - predictions.target[:, 0]
        loss = reduce_image(jnp.square(residual), self.reduction)
        loss = self._weigh(loss, predictions.timesteps[:, 0], schedule)
        return loss, collect_metrics(predictions, reduction=self.reduction)
