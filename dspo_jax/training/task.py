"""Static configuration of a training step, and the networks as the step runs them."""

import dataclasses
from collections.abc import Callable

import jax
import optax

from dspo_jax.models import lora
from dspo_jax.models.model import Params
from dspo_jax.objectives import Objective
from dspo_jax.parallel.rules import gather
from dspo_jax.pipelines.pipeline import Pipeline

Batch = dict[str, jax.Array]


Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What a run computes: everything about the step that is fixed before it starts.

    Attributes:
      pipe: the model's architectures and schedule.
      objective: from `get_objective`.
      optimizer: the gradient transformation.
      learning_rate: number of updates done -> learning rate of the next one.
      param_dtype: of the trained parameters.
      compute_dtype: of the networks; losses, accumulated gradients and the optimizer are float32.
      reference_dtype: what the frozen parameters are stored in.
      remat: which activations the backward pass computes again, see models/remat.py.
      timesteps: (first, last) that are drawn, both included.
      caption_dropout: probability of dropping the caption of a pair.
      share_timesteps: whether the images of a pair share their timestep.
      share_noise: whether the images of a pair share their noise.
      positive_ratio: probability that the image drawn of a pair is the winner, for an objective that takes
        one.
      accumulation: parts a batch is worked through in.
      train_text_encoder: whether the text encoder is among the trained parameters.
      adapters: whether adapters alone are trained (models/lora.py).
      ema_decay: of the moving average of the trained parameters; 0 keeps none.
      loss_spike: see `stability.judge`.
    """

    pipe: Pipeline
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[jax.Array], jax.Array]
    param_dtype: str
    compute_dtype: str
    reference_dtype: str
    remat: str
    timesteps: tuple[int, int]
    caption_dropout: float
    share_timesteps: bool
    share_noise: bool
    positive_ratio: float
    accumulation: int
    train_text_encoder: bool
    adapters: bool
    ema_decay: float
    loss_spike: float


def predict(
    task: Task,
    params: Params,
    noisy: jax.Array,
    timesteps: jax.Array,
    tokens: jax.Array,
    micro_conditioning: jax.Array,
) -> jax.Array:
    """`Pipeline.predict_pairs` in the task's compute dtype."""
    params, noisy = gather(params), noisy.astype(task.compute_dtype)
    return task.pipe.predict_pairs(params, noisy, timesteps, tokens, micro_conditioning, remat=task.remat)


def policy_params(task: Task, params: Params, reference: Params) -> Params:
    """The policy as `predict` takes it: trained parameters in the compute dtype, the rest of the reference.

    Until the first update it is the same numbers as the reference (`start.make_task` sees to the dtypes).
    """
    return lora.combine(cast(task, reference), cast(task, params))


def cast(task: Task, params: Params) -> Params:
    """Parameters in the compute dtype, which `predict` takes."""
    return jax.tree.map(lambda leaf: leaf.astype(task.compute_dtype), params)
