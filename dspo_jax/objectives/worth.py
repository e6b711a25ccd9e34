"""Worth of the images of an example: advantages from labels or scores, metrics of any number of images."""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from dspo_jax.objectives.implicit_reward import (
    collect_metrics,
    error_drift,
    label_doubt,
    squared_error,
)
from dspo_jax.objectives.objective import Predictions

ADVANTAGE_LIMIT = 5.0  # deviations; advantages are cut there in all released code


def advantages(predictions: Predictions) -> Float32[Array, "b p"]:
    """Returns the advantage of each image, [B, P].

    They are the scores less their mean over the example's images, divided by their deviation and cut at 5;
    zero where all scores are equal. The score of a single image is its advantage, cut. Without scores, those
    of a longer list are its places, best first; for a single image or a pair the advantage is 2 q - 1, q the
    probability that the image is liked.
    """
    if predictions.scores is None and predictions.policy.shape[1] <= 2:
        return 2 * liked(predictions) - 1
    scores = order(predictions)
    if scores.shape[1] > 1:
        # Equal scores become zeros: their mean in float32 is not always the score.
        scores = scores - scores.min(1, keepdims=True)
        centred = scores - scores.mean(1, keepdims=True)
        deviation = jnp.sqrt(jnp.square(centred).mean(1, keepdims=True))
        scores = jnp.where(deviation > 0, centred / jnp.where(deviation > 0, deviation, 1.0), 0.0)
    return jnp.clip(scores, -ADVANTAGE_LIMIT, ADVANTAGE_LIMIT)


def liked(predictions: Predictions) -> Float32[Array, "b p"]:
    """Returns the probability that each image is liked, [B, P].

    With scores, and for lists, they are 1/2 + advantage / 10. Otherwise it is the preference for a single
    image or a winner, and what is left to 1 for a loser; 1 where there is none.
    """
    if predictions.scores is not None or predictions.policy.shape[1] > 2:
        return 0.5 + advantages(predictions) / (2 * ADVANTAGE_LIMIT)
    doubt = label_doubt(predictions)
    return jnp.stack([1 - doubt, doubt][: predictions.policy.shape[1]], 1)


def order(predictions: Predictions) -> Float32[Array, "b p"]:
    """Returns numbers that rank the images, [B, P]: the scores, or the order as given, best first."""
    if predictions.scores is not None:
        return predictions.scores
    batch, images = predictions.policy.shape[:2]
    return jnp.broadcast_to(-jnp.arange(images, dtype=jnp.float32), (batch, images))


def collect_any_metrics(
    predictions: Predictions, *, reduction: str, rewards: Float32[Array, "b p"] | None = None
) -> dict[str, Float32[Array, " b"]]:
    """Returns the metrics of an objective that takes any number of images, each [B].

    Args:
      predictions: as `Objective` prepares them, with a reference.
      reduction: of the errors and drifts; `deviation` is always a mean.
      rewards: implicit ones, [B, P], for the margin; by default the decrease of the error.

    Returns:
      For a pair in its order, those of `collect_metrics`. Otherwise `error`, `drift` and `deviation`, means
      over the images; and for lists `margin`, the reward of the best image less that of the worst, and
      `implicit_accuracy`, the share of pairs of images that the rewards rank as the scores do (ties one
      half, of the scores not counted; 1/2 where all scores are equal).
    """
    drift = error_drift(predictions, reduction)
    rewards = -drift if rewards is None else rewards
    if predictions.policy.shape[1] == 2 and predictions.scores is None:
        margin = rewards[:, 0] - rewards[:, 1]
        return collect_metrics(predictions, reduction=reduction, margin=margin)
    assert predictions.reference is not None
    metrics = {
        "error": squared_error(predictions, reduction).mean(1),
        "drift": drift.mean(1),
        "deviation": jnp.square(predictions.policy - predictions.reference).mean((1, 2, 3, 4)),
    }
    if predictions.policy.shape[1] == 1:
        return metrics
    ranks = order(predictions)
    above = (ranks[:, :, None] > ranks[:, None, :]).astype(jnp.float32)
    right = 0.5 * (1 + jnp.sign(rewards[:, :, None] - rewards[:, None, :]))
    count = above.sum((1, 2))
    share = (above * right).sum((1, 2)) / jnp.maximum(count, 1.0)
    examples = jnp.arange(len(rewards))
    metrics["margin"] = rewards[examples, ranks.argmax(1)] - rewards[examples, ranks.argmin(1)]
    metrics["implicit_accuracy"] = jnp.where(count > 0, share, 0.5)
    return metrics
