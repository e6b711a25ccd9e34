"""Advantage-weighted matching: a clipped policy gradient whose likelihood is the denoising error."""

import dataclasses

import jax.numpy as jnp

from dspo_jax.objectives.hyperparameters import INSIDE_0_AND_1, number
from dspo_jax.objectives.implicit_reward import error_drift
from dspo_jax.objectives.objective import LossAndMetrics, Objective, Predictions
from dspo_jax.objectives.worth import advantages, collect_any_metrics
from dspo_jax.schedules.variance_preserving import Schedule

# Where exp of the decrease of an error stops: far beyond any clip, far below float32's overflow.
_LARGEST_EXPONENT = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWM(Objective):
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = exp(SE(r) - SE(e)), A the image's advantage.

    Advantage-weighted matching (arXiv 2509.25050), the loss of Flow-Factory's trainer with the weighting
    "Uniform" and without its KL terms. r is the policy that drew the images: let the reference follow with
    `reference.every`. With e = r the loss is -A and its gradient A times that of SE(e).

    Takes single images with labels q and pairs, where A = 2 q - 1, and lists with scores
    (`worth.advantages`).

    Adds the metric `clipped`: the share of images that the clip leaves without a gradient.

    Attributes:
      clip: of the ratio rho. No released value was read; 0.01 is DGPO's, for errors reduced by the mean.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", or "paper" for w(t) on the errors.
    """

    name = "awm"
    needs_reference = True
    needs_loser = False
    needs_labels = True
    takes_lists = True

    clip: float = number(0.01, INSIDE_0_AND_1)

    def loss_and_metrics(self, predictions: Predictions, schedule: Schedule) -> LossAndMetrics:
        gain = -error_drift(predictions, self.reduction)
        if self.time_weight == "paper":
            gain *= schedule.reward_weight(predictions.timesteps)
        ratio = jnp.exp(jnp.minimum(gain, _LARGEST_EXPONENT))
        advantage = advantages(predictions)
        clipped = -advantage * jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
        unclipped = -advantage * ratio
        metrics = collect_any_metrics(predictions, reduction=self.reduction)
        share = (clipped > unclipped).mean(1, dtype=jnp.float32)
        return jnp.maximum(unclipped, clipped).mean(1), metrics | {"clipped": share}

    def notes(self, values_per_image: int) -> list[str]:
        del values_per_image
        return [
            "awm: the reference stands for the policy that drew the images: set config.reference.every for "
            "images of the model's own; with a fixed one an image stops training at its clip"
        ]
