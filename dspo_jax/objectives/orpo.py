"""ORPO for diffusion: fine-tuning on the winners and a comparison, without a reference."""

import dataclasses

import jax

from dspo_jax.objectives.hyperparameters import number
from dspo_jax.objectives.implicit_reward import collect_metrics, soft_label, squared_error
from dspo_jax.objectives.objective import LossAndMetrics, Objective, Predictions
from dspo_jax.schedules.process import Process


@dataclasses.dataclass(frozen=True, kw_only=True)
class ORPO(Objective):
    """SE(e_w) - beta log sigmoid(z), z = SE(e_l) - SE(e_w).

    The form of diffusers' ORPO trainer, with its sign corrected: the released code has
    log sigmoid(SE(e_w) - SE(e_l)), which rewards an error of the winner above the loser's. The odds ratio of
    ORPO (Hong et al. 2024) needs likelihoods, which a diffusion model does not give; a difference of errors
    stands in their place. A preference p < 1 softens the second term. A reference that is given is read for
    metrics only.

    Attributes:
      beta: weight of the comparison; 0.1 is the released value.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for DSPO's weights: of `sft` on the first term and w(t) on
        the errors in z. ORPO itself has none.
    """

    name = "orpo"
    needs_reference = False
    needs_loser = True

    beta: float = number(0.1)

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        error = squared_error(predictions, self.reduction)
        denoising = error[:, 0] * self._denoising_weight(predictions.levels[:, 0], schedule)
        compared = error * self._reward_weight(predictions.levels, schedule)
        margin = compared[:, 1] - compared[:, 0]
        preference = soft_label(lambda z: jax.nn.softplus(-z), margin, predictions)
        metrics = collect_metrics(predictions, reduction=self.reduction, margin=margin)
        return denoising + self.beta * preference, metrics

    def notes(self, values_per_image: int) -> list[str]:
        del values_per_image
        if self.beta == 0:
            return ["warning: orpo: beta = 0 leaves only SE(e_w): this run is SFT"]
        return []
