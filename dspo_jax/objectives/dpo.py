"""Diffusion-DPO and the losses built like it: functions of one margin, the winner's reward minus the loser's.

All of them take a preference p < 1 as p l(z) + (1 - p) l(-z), the loss that is expected when the label is
right with probability p. All have the hyperparameters of `OfMargin` and `Comparison` besides their own,
and of `OfScaledMargin` all but `ipo`, whose beta is a target, and `linear_dpo`, whose loss it scales.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from dspo_jax.objectives.comparison import OfMargin, OfScaledMargin
from dspo_jax.objectives.hyperparameters import ABOVE_ZERO, BETWEEN_0_AND_1, INSIDE_0_AND_1, number
from dspo_jax.objectives.implicit_reward import collect_metrics, describe_scale, reduce_image, soft_label
from dspo_jax.objectives.objective import LossAndMetrics, Predictions
from dspo_jax.schedules.process import Process


def _negative_log_sigmoid(margin: Float32[Array, " b"]) -> Float32[Array, " b"]:
    return jax.nn.softplus(-margin)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionDPO(OfScaledMargin):
    """-log sigmoid(z), z = -(beta / 2) {[SE(e_w) - SE(r_w)] - [SE(e_l) - SE(r_l)]}.

    The loss of the released code and of Eq. 46 in the supplement of Wallace et al. (2024), up to `reduction`.
    With e = r it is exactly ln 2.

    Attributes:
      beta: strength of the pull to the reference; 5000 is the released value, for reduction "mean".
      smpo_weight: z is multiplied by so much times 2 q - 1, q = sigmoid(s_w - s_l) of the images' scores, on
        whose scale a difference of 1 is odds of e; 10 in SmPO (arXiv 2506.02698, not its code), whose
        inversion is not done here. Scores that contradict the label turn z round. 0 is no such factor.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for w(t) inside the reward (`Process.reward_weight`).
    """

    name = "diffusion_dpo"

    smpo_weight: float = number(0.0)

    @property
    def needs_scores(self) -> bool:
        return self.smpo_weight > 0

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        margin = self._margin(predictions, schedule)
        if self.smpo_weight:
            assert predictions.scores is not None
            # 2 sigmoid(x) - 1 without its cancellation.
            margin *= self.smpo_weight * jnp.tanh((predictions.scores[:, 0] - predictions.scores[:, 1]) / 2)
        loss = soft_label(_negative_log_sigmoid, margin, predictions)
        return loss, collect_metrics(predictions, reduction=self.reduction, margin=margin)

    def notes(self, values_per_image: int) -> list[str]:
        notes = super().notes(values_per_image)
        if self.smpo_weight:
            notes.append(
                f"diffusion_dpo: smpo_weight = {self.smpo_weight:g} takes a difference of scores of 1 for "
                "odds of e: of own pairs, write a reward in another unit with a weight, as in "
                "config.rewards.train = '1*hpsv2.1', which also divides it by its unit, 0.01"
            )
        return notes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionDPOL2(OfScaledMargin):
    """-log sigmoid(z), z = +(beta / 2) (||e_w - r_w||^2 - ||e_l - r_l||^2).

    Diffusion-DPO with x_{t-1} drawn from the policy rather than from q(x_{t-1} | x_t, x_0) (supplement S2,
    "an alternative approximation"): the expected log-ratio is then a divergence of two Gaussians of one
    variance. The sign is that of the line with the divergences; the last printed line has it reversed.

    The reward is quadratic in e - r, so the gradient at e = r is zero.

    Has the hyperparameters of `diffusion_dpo`; no target enters.
    """

    name = "diffusion_dpo_l2"
    compares_errors = False

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        assert predictions.reference is not None
        step = predictions.policy - predictions.reference
        rewards = 0.5 * self.beta * reduce_image(jnp.square(step), self.reduction)
        margin = self._difference(rewards, predictions, schedule)
        loss = soft_label(_negative_log_sigmoid, margin, predictions)
        return loss, collect_metrics(predictions, reduction=self.reduction, margin=margin)

    def notes(self, values_per_image: int) -> list[str]:
        return [
            *super().notes(values_per_image),
            "warning: diffusion_dpo_l2: its gradient is exactly zero where the policy equals the reference, "
            "which is where a run starts without config.reference.model: only weight decay and rounding move "
            "it away; use diffusion_dpo, or name another reference",
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IPO(OfMargin):
    """(z - 1 / (2 beta))^2, z = -D = -{[SE(e_w) - SE(r_w)] - [SE(e_l) - SE(r_l)]}.

    IPO (Azar et al. 2024, Eq. 17) in the form of diffusers' trainer, where the margin is D without 1/2 and
    without beta. A margin beyond the target is penalised too, unlike in Diffusion-DPO.

    Attributes:
      beta: the target margin is 1 / (2 beta). In units of D, so that "sum" over N values wants beta / N.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for w(t) inside D.
    """

    name = "ipo"

    beta: float = number(2500.0, ABOVE_ZERO)

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        margin = self._margin(predictions, schedule, scale=2.0)
        loss = soft_label(lambda z: jnp.square(z - 1 / (2 * self.beta)), margin, predictions)
        return loss, collect_metrics(predictions, reduction=self.reduction, margin=margin)

    def notes(self, values_per_image: int) -> list[str]:
        del values_per_image
        target = 1 / (2 * self.beta)
        return [
            f"ipo: the margin -D ({self.reduction}, without 1/2) is pulled to 1 / (2 beta) = {target:g}; "
            f"the loss starts at {target**2:g} and its gradient at {1 / self.beta:g} times that of D, to be "
            "seen against optimizer.eps"
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMPO(OfScaledMargin):
    """KL(Bernoulli(sigmoid z) || Bernoulli(1 - alpha)), z the margin of `diffusion_dpo`.

    The reverse of the divergence that Diffusion-DPO minimises (DMPO, Li et al. 2025; this form is that of the
    Diffusion-SDPO code). The minimum is at sigmoid(z) = 1 - alpha, so that the margin does not grow for ever.

    Attributes:
      beta: as in `diffusion_dpo`; 2000 is the released value for SD1.5.
      alpha: probability of the loser in the target distribution.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for w(t) inside the reward.
    """

    name = "dmpo"

    beta: float = number(2000.0, ABOVE_ZERO)
    alpha: float = number(0.01, INSIDE_0_AND_1)

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        margin = self._margin(predictions, schedule)

        def divergence(z: Float32[Array, " b"]) -> Float32[Array, " b"]:
            wins = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - math.log1p(-self.alpha))
            loses = jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - math.log(self.alpha))
            return wins + loses

        loss = soft_label(divergence, margin, predictions)
        return loss, collect_metrics(predictions, reduction=self.reduction, margin=margin)

    def notes(self, values_per_image: int) -> list[str]:
        notes = super().notes(values_per_image)
        if self.alpha >= 0.5:
            effect = "zero" if self.alpha == 0.5 else "reversed: it trains towards the loser"
            notes.append(
                f"warning: dmpo: alpha = {self.alpha:g}, the probability given to the loser: the gradient at "
                f"the start is {effect}; choose it well below 0.5 (released: 0.01)"
            )
        return notes


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDPO(OfScaledMargin):
    """`diffusion_dpo` with the loser's gradient scaled down where it would raise the winner's error.

    Diffusion-SDPO (Fu et al. 2025): with g the gradient of an image's error with respect to the prediction,
    the loser's part of the gradient is multiplied by

        lambda = clip((1 - mu) ||g_w||^2 / <g_l, g_w>, 0, 1) where <g_l, g_w> > 0, else 1,

    so that, to first order and in the space of predictions, a step leaves at least mu of the winner's own
    decrease of error. The value of the loss is that of `diffusion_dpo`. Here lambda is the pair's own; the
    released code takes one for all pairs of a device's batch, which makes it depend on the batch size.

    Adds the metric `loser_scale`: lambda.

    Attributes:
      beta: as in `diffusion_dpo`.
      mu: share of the winner's decrease that is kept; 0.9 is the released value.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for w(t) inside the reward, and so in g.
    """

    name = "sdpo"

    mu: float = number(0.9, BETWEEN_0_AND_1)

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        policy = predictions.policy
        weights = jnp.broadcast_to(self._reward_weight(predictions.levels, schedule), policy.shape[:2])
        # Up to a factor common to both images.
        gradients = (policy - predictions.target) * weights[..., None, None, None]
        winner, loser = gradients[:, 0], gradients[:, 1]
        agreement = reduce_image(winner * loser, self.reduction)
        bound = (1 - self.mu) * reduce_image(jnp.square(winner), self.reduction)
        agrees = agreement > 0
        scale = jnp.where(agrees, jnp.clip(bound / jnp.where(agrees, agreement, 1.0), 0.0, 1.0), 1.0)
        scale = jax.lax.stop_gradient(scale)

        # Leaves the value, and multiplies the gradient.
        factor = jnp.stack([jnp.ones_like(scale), scale], 1)[..., None, None, None]
        held = jax.lax.stop_gradient(policy)
        scaled = dataclasses.replace(predictions, policy=held + factor * (policy - held))
        margin = self._margin(scaled, schedule)
        loss = soft_label(_negative_log_sigmoid, margin, predictions)
        metrics = collect_metrics(predictions, reduction=self.reduction, margin=margin)
        return loss, metrics | {"loser_scale": scale}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlphaDPO(OfScaledMargin):
    """(p^a - (1 - a) - a p) / (a (a - 1)), p = sigmoid(z), z the margin of `diffusion_dpo`.

    alpha-DPO (ICLR 2026, the released code), an alpha divergence in the place of Diffusion-DPO's: a = alpha
    times the mean of p over the whole batch, without a gradient. The less the policy ranks rightly, the less
    the gradient of a pair that it ranks quite wrongly, which labels with mistakes ask for. As a goes to 1 the
    loss goes to 1 - p + p log p, as a goes to 0 to p - 1 - log p.

    The mean is over all devices, and with `accumulation` over a part of the batch.

    Adds the metric `order`: a.

    Attributes:
      beta: as in `diffusion_dpo`; 4000 is the released value, for SDXL.
      alpha: 0.9999 is the released value.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for w(t) inside the reward.
    """

    name = "alpha_dpo"

    beta: float = number(4000.0, ABOVE_ZERO)
    alpha: float = number(0.9999, INSIDE_0_AND_1)

    @property
    def needs_whole_batch(self) -> bool:
        return True

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        margin = self._margin(predictions, schedule)
        order = self.alpha * jax.lax.stop_gradient(jax.nn.sigmoid(margin).mean())
        order = jnp.maximum(order, jnp.finfo(jnp.float32).tiny)
        loss = soft_label(lambda z: _alpha_divergence(z, order), margin, predictions)
        metrics = collect_metrics(predictions, reduction=self.reduction, margin=margin)
        return loss, metrics | {"order": jnp.full_like(margin, order)}


def _alpha_divergence(margin: Float32[Array, " b"], order: Float32[Array, ""]) -> Float32[Array, " b"]:
    """(p^a - (1 - a) - a p) / (a (a - 1)) of p = sigmoid(margin), rewritten so that no end cancels."""
    log_p, rest = jax.nn.log_sigmoid(margin), 1 - order
    low = (jnp.expm1(log_p) - jnp.expm1(order * log_p) / order) / rest
    # p (p^(a - 1) - 1) is 0 long before the exponent reaches its bound.
    growth = jnp.expm1(jnp.minimum(-rest * log_p, 80.0)) / rest
    high = -(jnp.expm1(log_p) + jnp.exp(log_p) * growth) / order
    return jnp.where(order < 0.5, low, high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hinge(OfScaledMargin):
    """max(0, 1 - z), z = -beta {[SE(e_w) - SE(r_w)] - [SE(e_l) - SE(r_l)]}.

    The hinge loss of diffusers' and align-anything's trainers (released code), whose beta comes without 1/2.
    A pair has no gradient once its margin is 1. With e = r the loss is exactly 1.

    Attributes:
      beta: 2500 is diffusers' value, for reduction "mean".
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for w(t) inside the reward.
    """

    name = "hinge"

    beta: float = number(2500.0, ABOVE_ZERO)

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        margin = self._margin(predictions, schedule, scale=2 * self.beta)
        loss = soft_label(lambda z: jax.nn.relu(1 - z), margin, predictions)
        return loss, collect_metrics(predictions, reduction=self.reduction, margin=margin)

    def notes(self, values_per_image: int) -> list[str]:
        return [describe_scale(self.name, "beta", self.beta, self.reduction, values_per_image, half=False)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearDPO(OfMargin):
    """-z, z the margin of `diffusion_dpo`: no pair's gradient fades, however well it is ranked.

    Linear-DPO (arXiv 2605.21123), of which summaries were read, neither the paper's equations nor code. There
    the reference is a moving average of the policy: set `reference.every` and `reference.decay`, whose values
    there are not known here. With a fixed reference the loss has no lower bound. With e = r it is 0, and its
    gradient twice that of `diffusion_dpo`.

    Attributes:
      beta: scale of the loss; 5000 is Diffusion-DPO's. AdamW divides it out of its steps, except against
        `max_grad_norm` and `optimizer.eps`.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for w(t) inside the reward.
    """

    name = "linear_dpo"

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        margin = self._margin(predictions, schedule)
        loss = soft_label(jnp.negative, margin, predictions)
        return loss, collect_metrics(predictions, reduction=self.reduction, margin=margin)

    def notes(self, values_per_image: int) -> list[str]:
        return [
            *super().notes(values_per_image),
            "linear_dpo: the loss has no lower bound, and the paper's reference follows the policy: set "
            "config.reference.every and config.reference.decay, and watch winner_drift",
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NPO(OfScaledMargin):
    """`diffusion_dpo` with the labels swapped, -log sigmoid(-z): a model of what people dislike.

    Diffusion-NPO (arXiv 2505.11245; the released code is diffusers' trainer on such labels). The result is no
    model to draw with: it takes the place of the unconditional half of guidance, beside a model that was
    trained on the preference or not at all. The margin and its accuracy are those of the labels as they are,
    and fall.

    Attributes:
      beta: as in `diffusion_dpo`; 1000 is the released value for SD1.5, which is written there as 500.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for w(t) inside the reward.
    """

    name = "npo"
    score_rises = False

    beta: float = number(1000.0, ABOVE_ZERO)

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        margin = self._margin(predictions, schedule)
        loss = soft_label(jax.nn.softplus, margin, predictions)
        return loss, collect_metrics(predictions, reduction=self.reduction, margin=margin)

    def notes(self, values_per_image: int) -> list[str]:
        return [
            *super().notes(values_per_image),
            "warning: npo: it learns what people dislike, so implicit_accuracy falls",
        ]
