"""Diffusion-DPO: direct preference optimization on differences of denoising errors (Wallace et al. 2024)."""

import jax

from dspo_jax.objectives.implicit_reward import collect_metrics, describe_scale, label_doubt, reward_margin
from dspo_jax.objectives.registry import LossAndMetrics, Predictions, register
from dspo_jax.schedule import Schedule


def _notes(values_per_image: int, *, beta: float, reduction: str, time_weight: str) -> list[str]:
    del time_weight  # common to all the conventions
    return [describe_scale("diffusion_dpo", "beta", beta, reduction, values_per_image)]


@register(needs_reference=True, needs_loser=True, notes=_notes)
def diffusion_dpo(
    predictions: Predictions,
    schedule: Schedule,
    *,
    beta: float = 5000.0,
    reduction: str = "mean",
    time_weight: str = "none",
) -> LossAndMetrics:
    """-log sigmoid(z), z = -(beta / 2) {[SE(e_w) - SE(r_w)] - [SE(e_l) - SE(r_l)]}.

    The loss of the released code and of Eq. 46 in the paper's supplement, up to `reduction`.
    A preference p < 1 gives the conservative form p l(z) + (1 - p) l(-z), with l = -log sigmoid.
    With e = r the loss is exactly ln 2.

    Args:
      predictions: pairs with a reference.
      schedule: read by `time_weight` only.
      beta: strength of the pull to the reference; 5000 is the released value, for reduction "mean".
      reduction: "mean" or "sum" over an image.
      time_weight: "none", or "paper" for w(t) inside the reward (`Schedule.reward_weight`).
    """
    margin = reward_margin(predictions, schedule, scale=beta, reduction=reduction, time_weight=time_weight)
    # l(-z) = l(z) + z, which leaves l(0) = ln 2 unrounded whatever the preference.
    loss = jax.nn.softplus(-margin) + label_doubt(predictions) * margin
    return loss, collect_metrics(predictions, reduction=reduction, margin=margin)
