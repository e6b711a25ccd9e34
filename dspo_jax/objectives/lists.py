"""Comparisons of two or more images of a prompt, best first or with scores."""

import dataclasses

import jax
import jax.numpy as jnp

from dspo_jax.objectives.hyperparameters import ABOVE_ZERO, INSIDE_0_AND_1, number
from dspo_jax.objectives.implicit_reward import (
    describe_scale,
    error_drift,
    label_doubt,
    squared_error,
)
from dspo_jax.objectives.objective import LossAndMetrics, Objective, Predictions
from dspo_jax.objectives.worth import ADVANTAGE_LIMIT, advantages, collect_any_metrics, order
from dspo_jax.schedules.process import Process


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfList(Objective):
    """An objective of at least two images with a reference."""

    needs_reference = True
    needs_loser = True
    takes_lists = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LPOList(_OfList):
    """-log P(the ranking), P of Plackett-Luce over the implicit rewards: sum_k of -log softmax(R_k .. R_K)_k.

    R = -(beta / 2) [SE(e) - SE(r)]. Diffusion-LPO (arXiv 2510.01540), known second-hand and without code. The
    images are ranked by their scores, equal ones in the order given, or best first. For a pair it is
    `diffusion_dpo`, soft labels included. With e = r it is exactly log K!, up to rounding.

    Attributes:
      beta: as in `diffusion_dpo`.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for w(t) inside the reward.
    """

    name = "lpo_list"

    beta: float = number(5000.0, ABOVE_ZERO)

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        rewards = -0.5 * self.beta * error_drift(predictions, self.reduction)
        rewards *= self._reward_weight(predictions.levels, schedule)
        ranking = jnp.argsort(-order(predictions), axis=1, stable=True)
        ranked = jnp.take_along_axis(rewards, ranking, axis=1)
        loss = _plackett_luce(ranked)
        if ranked.shape[1] == 2 and predictions.scores is None:
            loss += label_doubt(predictions) * (_plackett_luce(ranked[:, ::-1]) - loss)
        return loss, collect_any_metrics(predictions, reduction=self.reduction, rewards=rewards)

    def notes(self, values_per_image: int) -> list[str]:
        return [describe_scale(self.name, "beta", self.beta, self.reduction, values_per_image)]


def _plackett_luce(ranked: jax.Array) -> jax.Array:
    """-log of the probability of the order of rewards [B, K], best first."""
    return (jax.lax.cumlogsumexp(ranked, axis=1, reverse=True) - ranked).sum(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DGPO(_OfList):
    """mean_k of S A_k SE(e_k), S = sigmoid(sum_k of A_k beta [SE(e_k) - SE(r_k)] / K) without a gradient.

    DGPO (arXiv 2510.08425), the loss of its released code as Flow-Factory repeats it, without its KL term: a
    policy gradient on the denoising error, which fades once the group is ranked rightly. An image stops
    training where rho = exp(SE(r) - SE(e)) has left 1 +- clip on the side that its advantage asks for.
    r is there a moving average of the policy: set `reference.every` and `reference.decay`.

    A are the advantages of the scores within the list (`worth.advantages`), or 2 q - 1 of a pair's labels.

    Adds the metrics `group_weight`: S, and `clipped`: the share of images without a gradient.

    Attributes:
      beta: scale of the rewards, without 1/2; 100 is the released value, for the mean of a flow's errors.
      clip: of rho; 0.01 is the released value.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for w(t) on the errors.
    """

    name = "dgpo"

    beta: float = number(100.0, ABOVE_ZERO)
    clip: float = number(0.01, INSIDE_0_AND_1)

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        weight = self._reward_weight(predictions.levels, schedule)
        error = weight * squared_error(predictions, self.reduction)
        drift = weight * error_drift(predictions, self.reduction)
        advantage, held = advantages(predictions), jax.lax.stop_gradient(drift)
        group = jax.nn.sigmoid(self.beta * (advantage * held).mean(1))
        ratio = jnp.exp(-held)
        clipped = jnp.where(advantage > 0, ratio > 1 + self.clip, ratio < 1 - self.clip)
        error = jnp.where(clipped, jax.lax.stop_gradient(error), error)
        metrics = collect_any_metrics(predictions, reduction=self.reduction)
        metrics |= {"group_weight": group, "clipped": clipped.mean(1, dtype=jnp.float32)}
        return group * (advantage * error).mean(1), metrics

    def notes(self, values_per_image: int) -> list[str]:
        return [
            describe_scale(self.name, "beta", self.beta, self.reduction, values_per_image, half=False),
            "dgpo: its reference follows the policy: set config.reference.every and config.reference.decay; "
            "with a fixed one an image stops training at its clip",
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CRD(_OfList):
    """mean_k of (beta (R_k - mean R) - (a_k - mean a))^2, R = SE(r) - SE(e), a the reward in [0, 1].

    Centred reward distillation (arXiv 2603.14128), the "mse" loss of Flow-Factory's trainer with uniform
    weights and without `adaptive_logp`, its KL term and its constant factor. It centres over the whole batch
    there, here over the images of a prompt, as the paper's title says. A squared error, so that rewards are
    matched and not pushed for ever.

    a = 1/2 + A / 10, A the advantage of a score within its list (`worth.advantages`), or of a pair's label.

    Attributes:
      beta: scale of the implicit reward; 1000 is this project's choice. The released 1 is for errors that
        are divided by their size. The differences of a that are to be matched are tenths, those of R with
        the mean of the order of 1e-4.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for w(t) on the errors.
    """

    name = "crd"

    beta: float = number(1000.0, ABOVE_ZERO)

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        rewards = -self.beta * error_drift(predictions, self.reduction)
        rewards *= self._reward_weight(predictions.levels, schedule)
        distance = rewards - advantages(predictions) / (2 * ADVANTAGE_LIMIT)
        distance -= distance.mean(1, keepdims=True)
        metrics = collect_any_metrics(predictions, reduction=self.reduction, rewards=rewards)
        return jnp.square(distance).mean(1), metrics

    def notes(self, values_per_image: int) -> list[str]:
        return [describe_scale(self.name, "beta", self.beta, self.reduction, values_per_image, half=False)]
