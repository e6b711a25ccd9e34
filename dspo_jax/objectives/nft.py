"""DiffusionNFT: liked and disliked images pull on mixtures of the policy and the old policy."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from dspo_jax.objectives.hyperparameters import ABOVE_ZERO, number
from dspo_jax.objectives.implicit_reward import reduce_image
from dspo_jax.objectives.objective import LossAndMetrics, Objective, Predictions
from dspo_jax.objectives.worth import collect_any_metrics, liked
from dspo_jax.schedules.process import Process

# The least mean absolute error of x_0 that a loss is divided by, as in the released code.
LEAST_ERROR = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFT(Objective):
    """{q L(v+) + (1 - q) L(v-)} / beta, v+ = (1 - beta) r + beta e, v- = (1 + beta) r - beta e.

    L(v) = reduce[x0(v) - x0]^2 / mean |x0(v) - x0|, the divisor without a gradient and at least 1e-5;
    q in [0, 1] says how much an image is liked. DiffusionNFT (arXiv 2509.16117), its released code's loss
    without the KL term and a constant factor. It is written for the velocity of a flow. Here x0(v) - x0 is
    `Process.kappa` times the error of the prediction: 1 / sqrt(SNR) of eps, 1 / sqrt(SNR + 1) of v, and sigma
    of the velocity, with which it is the released loss.

    r is the policy that drew the images: let the reference follow with `reference.every`. With e = r there is
    a gradient except at q = 1/2.

    Takes single images with labels, pairs, where q is the preference of the winner and what is left to 1 of
    the loser, and lists with scores (`worth.liked`).

    Attributes:
      beta: how far v+ and v- lie from r; released are 1 and, for some rewards, 0.1.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for the weight of `sft`; NFT itself has only its divisor.
    """

    name = "nft"
    needs_reference = True
    needs_loser = False
    needs_labels = True
    takes_lists = True

    beta: float = number(1.0, ABOVE_ZERO)

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        old = predictions.reference
        assert old is not None
        step = self.beta * (predictions.policy - old)
        likes = liked(predictions)
        towards = self._error(old + step, predictions, schedule)
        away = self._error(old - step, predictions, schedule)
        loss = (likes * towards + (1 - likes) * away) / self.beta
        loss *= self._denoising_weight(predictions.levels, schedule)
        metrics = collect_any_metrics(predictions, reduction=self.reduction)
        return loss.mean(1), metrics | {"liked": likes.mean(1)}

    def _error(
        self, mixture: Float32[Array, "b p h w c"], predictions: Predictions, schedule: Process
    ) -> Float32[Array, "b p"]:
        """Returns L of a mixture, [B, P]."""
        to_x0 = schedule.kappa(predictions.levels)
        error = to_x0[..., None, None, None] * (mixture - predictions.target)
        size = jnp.maximum(jnp.abs(error).mean((2, 3, 4)), LEAST_ERROR)
        return reduce_image(jnp.square(error), self.reduction) / jax.lax.stop_gradient(size)

    def notes(self, values_per_image: int) -> list[str]:
        del values_per_image
        return [
            "nft: the reference stands for the policy that drew the images: set config.reference.every for "
            "images of the model's own; released for flow models; of a model like SDXL, drawn "
            "without guidance, a user reports grey images after 1,200 steps (NVlabs/DiffusionNFT, issue 12)"
        ]
