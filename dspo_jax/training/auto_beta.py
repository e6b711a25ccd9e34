"""The beta of a preference objective, as it follows the size of the margins of the run so far."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float32, Int32

from dspo_jax.objectives import Objective
from dspo_jax.objectives.comparison import OfScaledMargin

# logit(0.8): at the mean size of the margins the winner is preferred with probability 0.8.
_TARGET = math.log(4)


@dataclasses.dataclass(frozen=True)
class AutoBeta:
    """beta = min(beta of the config, logit(0.8) / mean of |z| at beta = 1), z the margin of the objective.

    Of Diffusion-DPO, whose z is -(beta / 2) D, that is -2 logit(0.2) / mean |D|, which SimpleTuner is known
    to train by; its code was not read. The mean is a moving one over the updates before, so that all parts
    and devices have the same beta. The bound, and the ordinary mean until the decay takes over, are this
    project's: margins are zero at the start, where beta would have none.

    Attributes:
      most: the bound, and the beta of the first update.
      decay: of the moving mean.
    """

    most: float
    decay: float

    def put_into(self, batch: Mapping[str, Any], mean: Float32[jax.Array, ""]) -> dict[str, Any]:
        """Adds `beta` [B] to a batch, from the mean so far."""
        beta = jnp.minimum(self.most, _TARGET / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny))
        return {**batch, "beta": jnp.full(batch["index"].shape, beta)}

    def follow(
        self, mean: Float32[jax.Array, ""], metrics: Mapping[str, jax.Array], updates: Int32[jax.Array, ""]
    ) -> Float32[jax.Array, ""]:
        """Returns the mean with the margins of one more update; `updates` were made before."""
        weight = jnp.maximum(1 - self.decay, 1 / (updates + 1).astype(jnp.float32))
        return mean + weight * (metrics["margin_size"] - mean)


def make_auto_beta(objective: Objective) -> AutoBeta | None:
    """Returns what moves the beta of an objective, or None where it stays."""
    if not isinstance(objective, OfScaledMargin) or objective.auto_beta is None:
        return None
    return AutoBeta(objective.beta, objective.auto_beta)
