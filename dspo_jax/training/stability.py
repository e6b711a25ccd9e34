"""Updates that are skipped: those with numbers that are not finite, and those at a spike of the loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_DECAY = 0.99  # decay of the running mean of the loss: about the last hundred updates
_WARMUP = 50  # updates before a spike can be told from noise


class Health(NamedTuple):
    """Counts and running statistics of a run by which its next update is judged; scalars.

    Attributes:
      skipped: updates that were not made, since the start.
      skipped_in_a_row: updates skipped since the last one that was made.
      updates: updates that were made.
      loss_mean, loss_variance: of the losses of the updates that were made, exponentially weighted.
    """

    skipped: jax.Array
    skipped_in_a_row: jax.Array
    updates: jax.Array
    loss_mean: jax.Array
    loss_variance: jax.Array


def start() -> Health:
    """Returns the health of a run that has not begun."""
    return Health(*(jnp.zeros((), jnp.int32) for _ in range(3)), *(jnp.zeros(()) for _ in range(2)))


def judge(
    health: Health, loss: jax.Array, grad_norm: jax.Array, loss_spike: float
) -> tuple[jax.Array, Health]:
    """Returns whether to make an update, and the health after it.

    Args:
      health: before it.
      loss: of the batch, scalar.
      grad_norm: of its gradients, scalar.
      loss_spike: a loss so many standard deviations above the running mean is a spike; 0 judges none.

    Returns:
      (scalar bool, the new health).
    """
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if loss_spike:
        threshold = health.loss_mean + loss_spike * jnp.sqrt(health.loss_variance)
        good &= (health.updates < _WARMUP) | (loss <= threshold)
    # An ordinary mean until the decay takes over, so that the first losses do not weigh more than others.
    weight = jnp.maximum(1 - _DECAY, 1 / (health.updates + 1))
    difference = loss - health.loss_mean
    made = Health(
        skipped=health.skipped,
        skipped_in_a_row=jnp.zeros_like(health.skipped_in_a_row),
        updates=health.updates + 1,
        loss_mean=health.loss_mean + weight * difference,
        loss_variance=(1 - weight) * (health.loss_variance + weight * difference**2),
    )
    not_made = health._replace(skipped=health.skipped + 1, skipped_in_a_row=health.skipped_in_a_row + 1)
    return good, jax.tree.map(lambda yes, no: jnp.where(good, yes, no), made, not_made)
