"""Diffusion-KTO: single images with a thumb up or down, no pairs (Li et al. 2024)."""

import dataclasses

import jax
import jax.numpy as jnp

from dspo_jax.objectives.hyperparameters import ABOVE_ZERO, number
from dspo_jax.objectives.implicit_reward import describe_scale, error_drift
from dspo_jax.objectives.objective import LossAndMetrics, Objective, Predictions
from dspo_jax.objectives.worth import collect_any_metrics, liked
from dspo_jax.schedules.process import Process


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTO(Objective):
    """1 - sigmoid(s beta (g - z0)), g = SE(r) - SE(e), s = +1 for a liked image and -1 for a disliked one.

    z0 = max(0, mean of g over the batch), without a gradient: what the policy has gained on any image, which
    a liked one must exceed. The released code's form (utility: sigmoid), whose beta comes without 1/2. With
    e = r the loss is exactly 1/2.

    Of a pair the winner is liked and the loser disliked with probability p, the preference; a single image is
    liked with that probability. The losses of a pair's images are averaged. Where a batch is worked through
    in parts, z0 is the part's.

    Besides the metrics of a pair, `baseline`: z0. For single images `error`, `drift`, `deviation`,
    `baseline`, `liked`, and `implicit_accuracy`: whether g - z0 has the sign of the label.

    Attributes:
      beta: 1000 is the released value, for reduction "mean".
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for w(t) inside g.
    """

    name = "kto"
    needs_reference = True
    needs_loser = False
    needs_labels = True
    images = "one"

    beta: float = number(1000.0, ABOVE_ZERO)

    @property
    def needs_whole_batch(self) -> bool:
        return True

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        predictions = dataclasses.replace(predictions, scores=None)  # labels count
        gain = -error_drift(predictions, self.reduction)
        gain *= self._reward_weight(predictions.levels, schedule)
        baseline = jax.lax.stop_gradient(jnp.maximum(gain.mean(), 0.0))
        logit = self.beta * (gain - baseline)
        likes = liked(predictions)
        loss = (likes * jax.nn.sigmoid(-logit) + (1 - likes) * jax.nn.sigmoid(logit)).mean(1)
        metrics = collect_any_metrics(predictions, reduction=self.reduction, rewards=self.beta * gain)
        metrics["baseline"] = jnp.full_like(loss, baseline)
        if gain.shape[1] == 1:
            metrics["liked"] = likes[:, 0]
            metrics["implicit_accuracy"] = 0.5 * (1 + jnp.sign((likes - 0.5) * logit)[:, 0])
        return loss, metrics

    def notes(self, values_per_image: int) -> list[str]:
        return [describe_scale(self.name, "beta", self.beta, self.reduction, values_per_image, half=False)]
