"""MaPO: margin-aware preference optimization, without a reference (Hong et al. 2024)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from dspo_jax.objectives.hyperparameters import ABOVE_ZERO, number
from dspo_jax.objectives.implicit_reward import collect_metrics, soft_label, squared_error
from dspo_jax.objectives.objective import LossAndMetrics, Objective, Predictions
from dspo_jax.schedules.process import Process


def _score(error: Float32[Array, "b p"], kappa: float) -> Float32[Array, "b p"]:
    """f(u) = kappa u / (exp(kappa u) - 1): from 1 at u = 0 down to 0, without overflow at large u."""
    x = kappa * error
    small = x < 1e-3
    safe = jnp.where(small, 1.0, x)
    return jnp.where(small, 1 - x / 2 + x * x / 12, safe * jnp.exp(-safe) / -jnp.expm1(-safe))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaPO(Objective):
    """SE(e_w) - m log sigmoid(z), z = K [f(SE(e_w)) - f(SE(e_l))], f(u) = k u / (exp(k u) - 1).

    The released code's loss. f takes the place of a likelihood ratio to a reference, so that none is held or
    run; one that is given is read for metrics only. K is the number of timesteps there. A preference p < 1
    softens the second term.

    Attributes:
      margin_weight: m (`beta_mapo` in the released code).
      kappa: k (`snr_value` in the released code).
      scale: K.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for DSPO's weights: of `sft` on the first term and w(t) on
        the errors inside f. MaPO itself has none.
    """

    name = "mapo"
    needs_reference = False
    needs_loser = True

    margin_weight: float = number(0.1)
    kappa: float = number(0.5, ABOVE_ZERO)
    scale: float = number(1000.0)

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        error = squared_error(predictions, self.reduction)
        denoising = error[:, 0] * self._denoising_weight(predictions.levels[:, 0], schedule)
        inside = error * self._reward_weight(predictions.levels, schedule)
        scores = _score(inside, self.kappa)
        margin = self.scale * (scores[:, 0] - scores[:, 1])
        preference = soft_label(lambda z: jax.nn.softplus(-z), margin, predictions)
        metrics = collect_metrics(predictions, reduction=self.reduction, margin=margin)
        return denoising + self.margin_weight * preference, metrics

    def notes(self, values_per_image: int) -> list[str]:
        del values_per_image
        notes = []
        if self.margin_weight * self.scale == 0:
            notes.append("warning: mapo: margin_weight * scale = 0 leaves only SE(e_w): this run is SFT")
        if self.reduction == "sum":
            notes.append(
                "warning: mapo: its kappa is made for reduction 'mean'; with 'sum' f is zero at any usual "
                "error and the preference term has no gradient"
            )
        return notes
