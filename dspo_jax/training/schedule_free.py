"""Schedule-free AdamW: gradients are taken between a fast iterate and its average, and the average leaves."""

import jax
import optax
from jaxtyping import PyTree

from dspo_jax.models.model import Params


def schedule_free_adamw(
    learning_rate: optax.Schedule, *, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """Builds schedule-free AdamW (Defazio et al. 2024, "The road less scheduled", arXiv 2405.15682).

    With z the iterate of AdamW without momentum and x its mean over the updates, weighted by the square of
    the highest rate so far, the trained parameters are y = (1 - b1) z + b1 x. The result of a run is x, see
    `average`. As in optax, the second moment is corrected for its start at 0 before the root is taken.

    Args:
      learning_rate: number of updates done -> learning rate of the next one; it must not fall.
      b1: weight of the average in y, above 0.
      b2, eps: of the second moment.
      weight_decay: decoupled, of y.
    """
    base = optax.chain(
        optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    # optax counts the updates of the average from 1, those of `base` from 0.
    return optax.contrib.schedule_free(base, lambda count: learning_rate(count - 1), b1=b1)


def average(opt_state: PyTree, params: Params) -> Params:
    """Returns the average x, which a schedule-free run is judged by and which leaves it.

    Args:
      opt_state: of `schedule_free_adamw`, alone or in a chain.
      params: the trained parameters y after the same update, float32.
    """
    b1 = optax.tree.get(opt_state, "b1")
    return jax.tree.map(lambda y, z: (y - (1 - b1) * z) / b1, params, optax.tree.get(opt_state, "z"))
