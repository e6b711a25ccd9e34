"""Advantage-weighted matching: a clipped policy gradient whose likelihood is the denoising error."""

import dataclasses
import math

import jax.numpy as jnp

from dspo_jax.objectives.hyperparameters import ABOVE_0_UP_TO_1, number
from dspo_jax.objectives.implicit_reward import error_drift
from dspo_jax.objectives.objective import LossAndMetrics, Objective, Predictions
from dspo_jax.objectives.worth import advantages, collect_any_metrics
from dspo_jax.schedules.process import Process

# Where exp of the decrease of an error stops: far beyond any clip, far below float32's overflow. A disliked
# image, which no clip stops on that side, has no gradient from there on.
_LARGEST_EXPONENT = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWM(Objective):
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = exp(SE(r) - SE(e)), A the image's advantage.

    Advantage-weighted matching (arXiv 2509.25050), the loss of Flow-Factory's trainer as its recipe for SD3.5
    sets it (examples/awm/lora/sd3_5.yaml, commit 1df5d2a): the weighting "Uniform" and clip 1. That recipe
    differs in three things: it cuts advantages at 1, here it is 5; it adds the mean of (e - m)^2, m the
    moving average of the policy, with weight 1, and 1e-4 times the same to the model at the start.

    r is the policy that drew the images: let the reference follow with `reference.every`. With e = r the loss
    is -A and its gradient A times that of SE(e).

    Takes single images with labels q and pairs, where A = 2 q - 1, and lists with scores
    (`worth.advantages`).

    Adds the metric `clipped`: the share of images that the clip leaves without a gradient.

    Attributes:
      clip: of the ratio rho; 1 is the released value, which stops a liked image at rho = 2 and a disliked
        one never. For errors reduced by the mean.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for w(t) on the errors.
    """

    name = "awm"
    needs_reference = True
    needs_loser = False
    needs_labels = True
    takes_lists = True

    clip: float = number(1.0, ABOVE_0_UP_TO_1)

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        gain = -error_drift(predictions, self.reduction)
        gain *= self._reward_weight(predictions.levels, schedule)
        ratio = jnp.exp(jnp.minimum(gain, _LARGEST_EXPONENT))
        advantage = advantages(predictions)
        clipped = -advantage * jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
        unclipped = -advantage * ratio
        metrics = collect_any_metrics(predictions, reduction=self.reduction)
        share = (clipped > unclipped).mean(1, dtype=jnp.float32)
        return jnp.maximum(unclipped, clipped).mean(1), metrics | {"clipped": share}

    def notes(self, values_per_image: int) -> list[str]:
        notes = [
            "awm: the reference stands for the policy that drew the images: set config.reference.every for "
            "images of the model's own, and watch drift: at the released clip of 1 no clip stops a disliked "
            "image, and the release's pull to the policy's moving average is not here"
        ]
        if self.reduction == "sum":
            liked, disliked = (end / values_per_image for end in (math.log1p(self.clip), _LARGEST_EXPONENT))
            notes.append(
                f"warning: awm: with reduction 'sum' rho is exp of {values_per_image} times the decrease of "
                f"the mean error: a liked image has no gradient where that is above {liked:.2g}, a disliked "
                f"one above {disliked:.2g}; use 'mean', as released"
            )
        return notes
