"""Denoising errors, the implicit reward built from them, and the metrics that every objective reports.

Notation: e, r, y are the policy's prediction, the reference's and the target; SE(e) is (e - y)^2 reduced over
an image. The implicit reward of an image is r_i = -(scale / 2) w(t) [SE(e) - SE(r)] (DSPO Eq. 23,
Diffusion-DPO Eq. 46); `scale` is called beta in Diffusion-DPO and lambda in DSPO, and w(t) = 1 in the
released code of both.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float32

from dspo_jax.objectives.objective import Predictions, level_weight
from dspo_jax.schedules.process import Process


def reduce_image(values: Float32[Array, "*images h w c"], reduction: str) -> Float32[Array, "*images"]:
    """Reduces [..., h, w, C] to [...]: "mean" as in every released code base, "sum" as in the papers."""
    return values.mean((-3, -2, -1)) if reduction == "mean" else values.sum((-3, -2, -1))


def squared_error(predictions: Predictions, reduction: str) -> Float32[Array, "b p"]:
    """Computes SE of the policy, [B, P]."""
    return reduce_image(jnp.square(predictions.policy - predictions.target), reduction)


def error_drift(predictions: Predictions, reduction: str) -> Float32[Array, "b p"]:
    """Computes SE of the policy minus SE of the reference, [B, P].

    Computed as (e - r)(e + r - 2y): exactly zero where e = r however the compiler orders the two sums, and
    free of the cancellation that at beta = 5000 would put rounding errors of SE into the logit. A stored
    error is subtracted from each square before these are added up, which leaves of those errors the last bit
    of the stored number, about 1e-4 in that logit.
    """
    policy, reference, target = predictions.policy, predictions.reference, predictions.target
    if reference is None:
        assert predictions.reference_error is not None
        stored = predictions.reference_error[..., None, None, None]
        return reduce_image(jnp.square(policy - target) - stored, reduction)
    return reduce_image((policy - reference) * ((policy - target) + (reference - target)), reduction)


def reward_margin(
    predictions: Predictions, schedule: Process, *, scale: float, reduction: str, time_weight: str
) -> Float32[Array, " b"]:
    """Returns the implicit reward of the winner minus that of the loser, [B]."""
    rewards = -0.5 * scale * error_drift(predictions, reduction)
    rewards *= level_weight(time_weight, predictions.levels, schedule)
    return rewards[:, 0] - rewards[:, 1]


def label_doubt(predictions: Predictions) -> Float32[Array, " b"]:
    """Returns 1 - p, the probability that the label is wrong, [B]; zero for hard labels."""
    if predictions.preference is None:
        return jnp.zeros(predictions.policy.shape[0])
    return 1 - predictions.preference


def soft_label(
    loss: Callable[[Array], Array], margin: Float32[Array, " b"], predictions: Predictions
) -> Float32[Array, " b"]:
    """p l(z) + (1 - p) l(-z) for a loss l of the margin z, [B]; l(z) to the last bit where p = 1 or z = 0."""
    certain = loss(margin)
    return certain + label_doubt(predictions) * (loss(-margin) - certain)


def collect_metrics(
    predictions: Predictions, *, reduction: str, margin: Float32[Array, " b"] | None = None
) -> dict[str, Float32[Array, " b"]]:
    """Returns the metrics that the data at hand allow, each [B]; a single image counts as a winner.

    Args:
      predictions: as `Objective` prepares them.
      reduction: of the errors and drifts; `deviation` is always a mean.
      margin: reward of the winner minus the loser's, [B], of an objective that has a reward. Without it the
        reward is the decrease of the error, -(SE(e) - SE(r)).

    Returns:
      `winner_error`, and `loser_error` for pairs; with a reference `winner_drift` and, but where its error is
      stored, `deviation`, the mean of (e - r)^2 over the example's images; with both `loser_drift`; for pairs
      with a reference or a given margin `margin` and `implicit_accuracy`: 1, 0, or 1/2 for a tie.
    """
    pairs = predictions.policy.shape[1] == 2
    error = squared_error(predictions, reduction)
    metrics = {"winner_error": error[:, 0]}
    if pairs:
        metrics["loser_error"] = error[:, 1]
    if predictions.reference is not None or predictions.reference_error is not None:
        drift = error_drift(predictions, reduction)
        metrics["winner_drift"] = drift[:, 0]
        if predictions.reference is not None:
            deviation = jnp.square(predictions.policy - predictions.reference)
            metrics["deviation"] = deviation.mean((1, 2, 3, 4))
        if pairs:
            metrics["loser_drift"] = drift[:, 1]
            margin = drift[:, 1] - drift[:, 0] if margin is None else margin
    if margin is not None:
        metrics |= {"margin": margin, "implicit_accuracy": 0.5 * (1 + jnp.sign(margin))}
    return metrics


def describe_scale(
    name: str, argument: str, value: float, reduction: str, values_per_image: int, *, half: bool = True
) -> str:
    """Returns a reward scale in the four conventions in use, mean or sum with or without 1/2, as one line.

    Args:
      name: of the objective.
      argument: what it calls the scale.
      value: the scale: the reward is -(scale / 2) w(t) [SE(e) - SE(r)], or without the 1/2.
      reduction: "mean" or "sum", the convention that `value` is in.
      values_per_image: h * w * C.
      half: whether `value` is in the convention with 1/2.
    """
    mean = (value if reduction == "mean" else value * values_per_image) * (1 if half else 2)
    total = mean / values_per_image
    return (
        f"{name}: {argument} = {value:g} ({reduction}, {'with' if half else 'without'} 1/2) over "
        f"{values_per_image} values an image is "
        f"{mean:g} (mean, with 1/2) = {mean / 2:g} (mean, without 1/2) = "
        f"{total:g} (sum, with 1/2) = {total / 2:g} (sum, without 1/2)"
    )
