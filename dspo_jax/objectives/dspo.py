"""DSPO and its variants: the denoiser learns the score of the human-preferred images (Zhu et al., ICLR 2025).

The score to be matched is the data's plus s G times the policy's own step away from the reference:
A(t) reduce[B(t) (e_w - y_w) - s G (e_w - r_w)]^2 (Eq. 12), with A = B = 1 in the released code and in the
paper's experiments. G = 1 - sigmoid(z) is the probability that the policy ranks the pair wrongly. A
preference p < 1 makes the matched score that of p log sigmoid(z) + (1 - p) log sigmoid(-z), whose derivative
is G = p - sigmoid(z).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from dspo_jax.errors import UserError
from dspo_jax.objectives.comparison import Comparison
from dspo_jax.objectives.hyperparameters import ABOVE_ZERO, number
from dspo_jax.objectives.implicit_reward import (
    collect_metrics,
    describe_scale,
    label_doubt,
    reduce_image,
    reward_margin,
)
from dspo_jax.objectives.objective import LossAndMetrics, Objective, Predictions
from dspo_jax.schedules.process import Process

# With s * G below this, the gradient is that of SFT to within about half of it (G is 1/2 at the start).
NEGLIGIBLE_SCORE_WEIGHT = 0.01
# Least B(t) that is divided by: B is 0 where the noised image is noise alone (zero terminal SNR).
_LEAST_RATIO = 1e-6
# Where the released SDXL code changes its loss: mean of (e_w - r_w)^2 over a device's batch.
RELEASED_SWITCH_AT = 0.1


def _gate(predictions: Predictions, margin: Float32[Array, " b"]) -> Float32[Array, " b"]:
    """G, [B]: 1 - sigmoid(z), without its cancellation at large z, less 1 - p."""
    return jax.nn.sigmoid(-margin) - label_doubt(predictions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ScoreMatching(Objective):
    """Hyperparameters that `dspo`, `dspo_ref` and `dspo_e` share.

    Attributes:
      lam: the paper's lambda, weight of the KL divergence to the reference.
      gamma: the paper's gamma, weight of the preference in the target score.
      score_weight: s; None is lam * gamma.
      reduction: "mean" (released code) or "sum" (paper) over an image.
      time_weight: "none" (released code), "epsilon", or "paper" for A(t) and B(t) of Eq. 12.
    """

    needs_reference = True

    lam: float = number(0.001)
    gamma: float = number(1.0)
    score_weight: float | None = number(None)

    @property
    def _weight(self) -> float:
        """s."""
        return self.lam * self.gamma if self.score_weight is None else self.score_weight

    def _match_score(
        self,
        predictions: Predictions,
        schedule: Process,
        data: Float32[Array, "b h w c"],
        coefficient: Float32[Array, " b"],
    ) -> Float32[Array, " b"]:
        """A(t) reduce[B(t) data - coefficient (e_w - r_w)]^2, [B], for `data` [B, h, w, C].

        The omega(t) that A(t) leaves free is Theorem 1's, 2 sigma^2 / lambda, less the constant 2 / lambda:
        it makes A(t) = w(t).
        """
        assert predictions.reference is not None
        levels = predictions.levels[:, 0]
        weight = self._reward_weight(levels, schedule)
        if self.time_weight == "paper":
            # B(t) is taken out of the square, so that here too e = r gives the loss of `sft` exactly.
            ratio = jnp.maximum(schedule.score_ratio(levels), _LEAST_RATIO)
            coefficient = coefficient / ratio
            weight *= jnp.square(ratio)
        step = predictions.policy[:, 0] - predictions.reference[:, 0]
        matched = jnp.square(data - coefficient[:, None, None, None] * step)
        return reduce_image(matched, self.reduction) * weight


def _warn_of_weight(name: str, weight: float, gate: float, is_sft: bool) -> list[str]:
    """Warns where the gradient at the start, (1 - s G) times that of SFT, is SFT's, zero or reversed."""
    coefficient = "s * G" if gate < 1 else "s"
    if weight * gate >= 1:
        effect = "zero" if weight * gate == 1 else "reversed: the winner's error rises"
        return [
            f"warning: {name}: score_weight = {weight:g}: where the policy equals the reference the gradient "
            f"is 1 - {coefficient} = {1 - weight * gate:g} times that of SFT, which is {effect}; choose "
            f"score_weight below {1 / gate:g}"
        ]
    if not is_sft:
        return []
    advice = "raise score_weight (s)"
    if gate < 1:
        advice += " and, independently, reward_scale (the lambda inside G)"
    return [
        f"warning: {name}: the preference term's coefficient {coefficient} is at most score_weight = "
        f"{weight:g}, which makes this run numerically SFT on the winners; to make the preference matter, "
        f"{advice}"
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSPO(_ScoreMatching, Comparison):
    """reduce[(e_w - y_w) - s G (e_w - r_w)]^2, G = 1 - sigmoid(z), z the margin of rewards (Eq. 13-14).

    With e = r the loss is exactly that of `sft`, and its gradient 1 - s G times SFT's: keep s below 2.

    Attributes:
      lam: the paper's lambda, weight of the KL divergence to the reference.
      gamma: the paper's gamma, weight of the preference in the target score.
      score_weight: s; None is lam * gamma.
      reward_scale: the lambda inside G; None is lam.
      detach: stop the gradient through G, and so all of the loser's. The released code does not.
      reduction: "mean" (released code) or "sum" (paper) over an image.
      time_weight: "none" (released code), "epsilon", or "paper" for Eq. 12 with w(t) inside z.
    """

    name = "dspo"

    reward_scale: float | None = number(None)
    detach: bool = False

    @property
    def _scale(self) -> float:
        """The lambda inside G."""
        return self.lam if self.reward_scale is None else self.reward_scale

    @property
    def detaches_loser(self) -> bool:
        """The loser enters through G alone, but for an anchor."""
        return self.detach and not self.anchor_weight

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        return self._match_gated_score(predictions, schedule, predictions.target)

    def _match_gated_score(
        self, predictions: Predictions, schedule: Process, data: Float32[Array, "b p h w c"]
    ) -> LossAndMetrics:
        """Computes loss and metrics with the coefficient s G; `data` [B, P, h, w, C] replaces the target."""
        margin = reward_margin(
            predictions,
            schedule,
            scale=self._scale,
            reduction=self.reduction,
            time_weight=self.time_weight,
        )
        gate = _gate(predictions, margin)
        if self.detach:
            gate = jax.lax.stop_gradient(gate)
        loss = self._match_score(
            predictions, schedule, predictions.policy[:, 0] - data[:, 0], self._weight * gate
        )
        return loss, collect_metrics(predictions, reduction=self.reduction, margin=margin)

    def notes(self, values_per_image: int) -> list[str]:
        # Undetached, a second gradient flows through G: relative to the first it is about s * scale / 8 times
        # the (small) correlation of (e - y) with (e - r), with the scale in the mean convention.
        mean_scale = self._scale if self.reduction == "mean" else self._scale * values_per_image
        is_sft = self._weight <= NEGLIGIBLE_SCORE_WEIGHT and (self.detach or self._weight * mean_scale <= 1)
        return [
            describe_scale(self.name, "reward_scale", self._scale, self.reduction, values_per_image),
            *_warn_of_weight(self.name, self._weight, 0.5, is_sft),
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSPORef(DSPO):
    """reduce[(1 - s G) (e_w - r_w)]^2: `dspo` with the reference's score in the place of the data's.

    Eq. 13 with eps replaced by r, the ablation of Table 6; Eq. 46 is the same up to constants. e = r is its
    global minimum: loss and gradient are exactly zero there, and a run that starts there stays.

    Has the hyperparameters of `dspo`; the target enters through G only.
    """

    name = "dspo_ref"

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        assert predictions.reference is not None
        return self._match_gated_score(predictions, schedule, predictions.reference)

    def notes(self, values_per_image: int) -> list[str]:
        return [
            describe_scale(self.name, "reward_scale", self._scale, self.reduction, values_per_image),
            "warning: dspo_ref: loss and gradient are exactly zero where the policy equals the reference, "
            "which is where a run starts without config.reference.model: only weight decay and rounding move "
            "it away; use dspo or dspo_sdxl, or name another reference",
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSPOEnergy(_ScoreMatching):
    """reduce[(e_w - y_w) - s (e_w - r_w)]^2: DSPO with an energy-based preference (Eq. 45).

    The preference is p(y | x) proportional to exp(r(x) / lambda): no sigmoid, no loser. Its log has 1/lambda
    times the gradient of r, which Eq. 43-45 leave out: with it s would be gamma, not lam * gamma.
    The loss is s SE(r_w) + (1 - s) SE(e_w) less s (1 - s) reduce(e_w - r_w)^2: SFT, pushed off the reference.
    A loser is read for metrics only.

    Attributes:
      lam: the paper's lambda (printed beta in Eq. 45).
      gamma: the paper's gamma.
      score_weight: s; None is lam * gamma.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for A(t) and B(t) as in `dspo`.
    """

    name = "dspo_e"
    needs_loser = False
    images = "winner"

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        data = predictions.policy[:, 0] - predictions.target[:, 0]
        coefficient = jnp.full(len(data), self._weight)
        loss = self._match_score(predictions, schedule, data, coefficient)
        return loss, collect_metrics(predictions, reduction=self.reduction)

    def notes(self, values_per_image: int) -> list[str]:
        del values_per_image
        return _warn_of_weight(self.name, self._weight, 1.0, self._weight <= NEGLIGIBLE_SCORE_WEIGHT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSPOSDXL(Comparison):
    """G^2, G = 1 - sigmoid(z), z the margin of `diffusion_dpo`: what the paper trained SDXL with (Eq. 47).

    With the reference's score as the target, (e_w - r_w) is a common factor (`dspo_ref`); the paper drops it,
    and with it the residual that was to be minimised: what is left is the probability of ranking the pair
    wrongly, squared, and all of its gradient flows through G. With e = r it is exactly 1/4.

    Attributes:
      beta: as in `diffusion_dpo`; the authors searched 1000 to 5000.
      released_switch: reproduce the released code, which changes over to reduce[G (e_w - r_w)]^2 while the
        mean of (e_w - r_w)^2 over the batch is 0.1 or more. Of the batch: this process's there, the whole one
        here, or the part of it that is worked through at once.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for w(t) inside the reward.
    """

    name = "dspo_sdxl"

    beta: float = number(5000.0, ABOVE_ZERO)
    released_switch: bool = False

    @property
    def needs_whole_batch(self) -> bool:
        return self.released_switch

    def check_process(self, process: Process) -> None:
        if self.released_switch and process.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"config.objective.released_switch = True: changes the loss at {RELEASED_SWITCH_AT} of the "
                "released code's errors of the noise, and this model predicts the velocity of a flow; leave "
                "it False"
            )

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        margin = reward_margin(
            predictions,
            schedule,
            scale=self.beta,
            reduction=self.reduction,
            time_weight=self.time_weight,
        )
        gate = _gate(predictions, margin)
        loss = jnp.square(gate)
        if self.released_switch:
            assert predictions.reference is not None
            step = predictions.policy[:, 0] - predictions.reference[:, 0]
            moved = reduce_image(jnp.square(gate[:, None, None, None] * step), self.reduction)
            loss = jnp.where(jnp.square(step).mean() >= RELEASED_SWITCH_AT, moved, loss)
        return loss, collect_metrics(predictions, reduction=self.reduction, margin=margin)

    def notes(self, values_per_image: int) -> list[str]:
        return [describe_scale(self.name, "beta", self.beta, self.reduction, values_per_image)]
