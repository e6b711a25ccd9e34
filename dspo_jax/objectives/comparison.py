"""Comparisons of a winner with a loser under a reference: weights of the reward, terms beside the loss."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float32

from dspo_jax.objectives.hyperparameters import ABOVE_ZERO, INSIDE_0_AND_1, number
from dspo_jax.objectives.implicit_reward import (
    describe_scale,
    error_drift,
    reduce_image,
    squared_error,
)
from dspo_jax.objectives.objective import LossAndMetrics, MinSNRWeighted, Objective, Predictions
from dspo_jax.schedules.process import Process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Objective):
    """An objective of pairs with a reference, to which two terms may be added.

    They are sft_weight SE(e_w), as RPO of language models has it, and anchor_weight / 2 (||e_w - r_w||^2 +
    ||e_l - r_l||^2). SimpleTuner trains with both. With time_weight "paper" and reduction "sum" the second is
    the KL divergence from the reference of the one reverse step that is drawn, of each image; with "mean" a
    fraction of it.

    Attributes:
      sft_weight: weight of the winner's denoising error.
      anchor_weight: weight of the distance to the reference.
    """

    needs_reference = True
    needs_loser = True

    sft_weight: float = number(0.0)
    anchor_weight: float = number(0.0)

    def __call__(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        predictions = self._prepare(predictions)
        loss, metrics = self.loss_and_metrics(predictions, schedule)
        if self.sft_weight:
            error = squared_error(predictions, self.reduction)[:, 0]
            loss += self.sft_weight * error * self._denoising_weight(predictions.levels[:, 0], schedule)
        if self.anchor_weight:
            assert predictions.reference is not None
            step = jnp.square(predictions.policy - predictions.reference)
            distance = reduce_image(step, self.reduction) * self._reward_weight(predictions.levels, schedule)
            loss += self.anchor_weight / 2 * distance.sum(1)
        return loss, metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfMargin(MinSNRWeighted, Comparison):
    """A comparison that is a function of one margin of rewards, whose scale is `beta`.

    Attributes:
      beta: scale of the reward.
      min_snr_gamma: see `MinSNRWeighted`; inside the reward it makes beta depend on the timestep.
    """

    beta: float = number(5000.0, ABOVE_ZERO)

    @property
    def compares_errors(self) -> bool:
        return not self.anchor_weight

    def _margin(
        self, predictions: Predictions, schedule: Process, scale: float | None = None
    ) -> Float32[Array, " b"]:
        """Returns the winner's reward less the loser's, [B], at the scale `beta` or a given one."""
        rewards = -0.5 * (self.beta if scale is None else scale) * error_drift(predictions, self.reduction)
        return self._difference(rewards, predictions, schedule)

    def _difference(
        self, rewards: Float32[Array, "b p"], predictions: Predictions, schedule: Process
    ) -> Float32[Array, " b"]:
        """Returns the difference of two rewards with their time weights, [B]."""
        rewards = rewards * self._reward_weight(predictions.levels, schedule)
        return rewards[:, 0] - rewards[:, 1]

    def notes(self, values_per_image: int) -> list[str]:
        return [describe_scale(self.name, "beta", self.beta, self.reduction, values_per_image)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfScaledMargin(OfMargin):
    """A comparison whose `beta` is a mere factor of the margin, so that it may follow the margins themselves.

    `Predictions.beta` takes the place of `beta`. With `auto_beta` there are the metrics `beta`, and
    `margin_size`: the margin's absolute value at a beta of 1, whose moving mean the step keeps
    (training/auto_beta.py).

    Attributes:
      auto_beta: decay of the moving mean that beta follows, below `beta`; None keeps beta fixed.
    """

    auto_beta: float | None = number(None, INSIDE_0_AND_1)

    def __call__(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        loss, metrics = super().__call__(predictions, schedule)
        if self.auto_beta is None:
            return loss, metrics
        beta = jnp.full_like(loss, self.beta) if predictions.beta is None else predictions.beta
        return loss, metrics | {"beta": beta, "margin_size": jnp.abs(metrics["margin"]) / beta}

    def _difference(
        self, rewards: Float32[Array, "b p"], predictions: Predictions, schedule: Process
    ) -> Float32[Array, " b"]:
        margin = super()._difference(rewards, predictions, schedule)
        return margin if predictions.beta is None else margin * (predictions.beta / self.beta)
