"""Static configuration of a training step, and the networks as the step runs them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import optax
from jaxtyping import Float, Num, PyTree

from dspo_jax.models import lora, quantized
from dspo_jax.models.model import Params
from dspo_jax.parallel.host_memory import to_device
from dspo_jax.parallel.rules import gather
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.training.auto_beta import AutoBeta
from dspo_jax.training.reference import Reference

Batch = Mapping[str, Any]
"""Arrays, or trees of them, with a leading axis of examples, by name."""
Metrics = dict[str, jax.Array]
USABLE = "usable"
"""Metric of a loss that leaves examples out: the share of those that it counts, the others being zeros."""

POLICY = "policy"
"""Name among the frozen parameters of those that the policy has and the reference has not, by component."""


class Passes(NamedTuple):
    """Passes through the networks that a loss makes for one example.

    Attributes:
      policy: forward passes of the trained denoiser.
      backward: forward passes of the trained denoiser that gradients flow through.
      reference: forward passes of the frozen denoiser.
      encoded: forward passes of the text encoders, for the policy and the reference together.
      encoded_backward: passes of the text encoders that gradients flow through where these are trained.
      open_trips: how often, on average, the loop runs whose length the compiled program does not tell.
    """

    policy: int
    backward: int
    reference: int
    encoded: int
    encoded_backward: int
    open_trips: int = 1


class Dropout(NamedTuple):
    """Elements of the adapters' inputs that are dropped in a forward pass.

    Attributes:
      rate: probability of each.
      keys: [B], one for each example.
    """

    rate: float
    keys: jax.Array


@runtime_checkable
class LossFn(Protocol):
    """A loss of a batch, with the facts that start-up and cost estimates need."""

    @property
    def needs_reference(self) -> bool:
        """Whether the frozen denoiser is run."""

    def __call__(
        self, params: Params, task: "Task", reference: Params, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Returns scalar loss, and scalar metrics, in float32; the step uses up `USABLE` of these."""

    def inputs(self, pipe: Pipeline) -> tuple[str, ...]:
        """Names of the arrays of a batch that the loss reads."""

    def input_shapes(self, pipe: Pipeline, images: int, size: tuple[int, int]) -> dict[str, Any]:
        """Arrays of one example that the loss reads, by name: `images` images of (height, width) pixels."""

    @property
    def beside_components(self) -> tuple[str, ...]:
        """Names of frozen parameters that the loss runs beside the pipeline's components."""

    @property
    def rows(self) -> int:
        """Rows of a batch that an example makes: 1, or the denoising steps of an image."""

    def frozen_params(self, pipe: Pipeline, *, abstract: bool = False) -> Params:
        """Returns the float32 parameters of `beside_components`, or their shapes."""

    def passes(self, images: int) -> Passes:
        """Returns the passes of the loss for an example of `images` images."""

    def notes(self, values_per_image: int) -> list[str]:
        """Returns lines for the user before a run; `values_per_image` is h * w * C of a latent."""


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes and rematerialisation of a training step.

    Attributes:
      param_dtype: of the trained parameters.
      compute_dtype: of the networks; losses, accumulated gradients and the optimizer are float32.
      reference_dtype: of the stored frozen parameters.
      remat: which activations the backward pass computes again, see models/remat.py.
      frozen_kernels: how kernels of the frozen parameters are stored, one of `quantized.KINDS`; None as the
        others.
    """

    param_dtype: str
    compute_dtype: str
    reference_dtype: str
    remat: str
    frozen_kernels: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class UpdateRule:
    """Optimizer of the trained parameters, and which of its updates are made.

    Attributes:
      optimizer: the gradient transformation.
      learning_rate: number of updates done -> learning rate of the next one.
      accumulation: parts that a batch is worked through in, one after the other.
      ema_decay: of the moving average of the trained parameters; 0 keeps none.
      loss_spike: see `stability.judge`.
      average: from the optimizer's state and the float32 parameters after an update, those that the run is
        judged by, in place of a moving average; None for an optimizer that has none of its own.
      auto_beta: how the objective's beta follows its margins; None where it does not.
    """

    optimizer: optax.GradientTransformation
    learning_rate: Callable[[jax.Array], jax.Array]
    accumulation: int
    ema_decay: float
    loss_spike: float
    average: Callable[[PyTree, Params], Params] | None = None
    auto_beta: AutoBeta | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Static configuration of a training step.

    Attributes:
      pipe: the model's architectures and schedule.
      loss: a loss of training/losses/.
      update: how gradients change the parameters.
      precision: dtypes and rematerialisation.
      train_text_encoder: whether the text encoders are among the trained parameters.
      adapters: the scale of the adapters that alone are trained (models/lora.py); None where there are none.
      reference: the model that the policy is compared with; None for its own start.
      dora: whether the adapters have magnitudes.
      offload: what lies in the host's memory, see training/offload.py.
    """

    pipe: Pipeline
    loss: LossFn
    update: UpdateRule
    precision: Precision
    train_text_encoder: bool
    adapters: lora.Scale | None
    reference: Reference | None = None
    dora: bool = False
    offload: tuple[str, ...] = ()


def predict(
    task: Task,
    params: Params,
    noisy: Float[jax.Array, "B P h w C"],
    levels: Num[jax.Array, "B P"],
    batch: Batch,
    dropout: Dropout | None = None,
) -> Float[jax.Array, "B P h w C"]:
    """Returns the denoiser's output for noisy latents [B, P, h, w, C] in the task's compute dtype.

    Args:
      task: pipeline and precision are read.
      params: by component, in the compute dtype.
      noisy: [B, P, h, w, C] in UNet units.
      levels: [B, P], of the process.
      batch: has the pipeline's `conditioning_inputs`.
      dropout: of the adapters' inputs; None drops nothing.
    """
    params, noisy = gather(params), noisy.astype(task.precision.compute_dtype)
    if dropout is not None:
        params = lora.with_dropout(params, *dropout)
    return task.pipe.predict_pairs(params, noisy, levels, batch, remat=task.precision.remat)


def policy_params(task: Task, params: Params, reference: Params) -> Params:
    """Merges trained parameters with the frozen others of the policy, in the compute dtype, for `predict`.

    Until the first update its numbers are the reference's (`settings.parse` sees to the dtypes), but where
    that is another model.
    """
    frozen = of_components(task, reference) | reference.get(POLICY, {})
    return lora.combine(cast(task, frozen), cast(task, params))


def of_components(task: Task, reference: Params) -> Params:
    """Returns the reference's parameters, without others that a loss runs and without the policy's own."""
    beside = (*task.loss.beside_components, POLICY)
    return {name: part for name, part in reference.items() if name not in beside}


def cast(task: Task, params: Params) -> Params:
    """Returns parameters as `predict` takes them: in the compute dtype, adapters times their scale.

    Quantized kernels stay as they are; the layers know them. What lies in the host's memory is copied.
    """
    params = to_device(params)
    if task.adapters is not None:
        params = lora.scaled(params, task.adapters)

    def cast_leaf(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
        if lora.is_magnitude(path) or quantized.is_quantized(leaf):
            return leaf
        return leaf.astype(task.precision.compute_dtype)

    return jax.tree_util.tree_map_with_path(cast_leaf, params, is_leaf=quantized.is_quantized)
