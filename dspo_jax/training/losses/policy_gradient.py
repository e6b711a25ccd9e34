"""The loss of policy gradients: steps that were taken are judged anew, under policy and reference."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key

from dspo_jax.models.model import Params
from dspo_jax.objectives.steps import PolicyGradient, Steps, divergence
from dspo_jax.parallel.rules import gather
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.samplers.sampler import State
from dspo_jax.samplers.transitions import log_probability
from dspo_jax.sampling.guidance import GuidedDenoiser
from dspo_jax.sampling.rendering import Drawing
from dspo_jax.training.task import Batch, Metrics, Passes, Task, cast, of_components, policy_params


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyGradientLoss:
    """Weighted mean of a method over denoising steps; a `LossFn`.

    A row of a batch is step i of an image, or of the P images of one prompt that the method compares. A batch
    has `state` and `next_state` [R, P, h, w, C] float32 (x_i and x_{i+1}), `call` [R] int32 (i), `tokens`
    [R, E, S], `advantage` [R] (see `Steps`), `old_log_probability` [R, P] (sum over a latent's numbers, under
    the policy that drew), `first` [R] bool, where that policy is the present one: the ratio is then exactly 1
    and `old_log_probability` is not read; and `weight` [R], of mean 1 over the whole batch, so that the parts
    of an accumulated gradient add up to the same. A row of weight 0 counts nothing, whatever is in it. A step
    without noise has no density and must not be among the rows.

    Attributes:
      method: from `get_policy_gradient`.
      drawing: how the images were drawn; guidance is part of the policy.
      size: (height, width) of the latents.
    """

    method: PolicyGradient
    drawing: Drawing
    size: tuple[int, int]

    @property
    def needs_reference(self) -> bool:
        """Whether the frozen denoiser is run, by the loss or for a penalty in the rewards."""
        return self.method.needs_reference or self.method.penalises_reward

    def __call__(
        self, params: Params, task: Task, reference: Params, batch: Batch, key: Key[jax.Array, ""]
    ) -> tuple[Float32[jax.Array, ""], Metrics]:
        """Returns weighted means of the loss and of the method's metrics, float32 scalars.

        Args:
          params: trained parameters by component.
          task: pipeline and precision.
          reference: the frozen parameters.
          batch: see the class.
          key: not read, as nothing is drawn.
        """
        del key
        weight = batch["weight"]
        steps = self.make_steps(params, task, reference, batch, with_reference=self.method.needs_reference)
        old = jnp.where(weight[:, None] > 0, batch["old_log_probability"], 0.0)
        old = jnp.where(batch["first"][:, None], steps.log_probability, old)
        losses, metrics = self.method(dataclasses.replace(steps, old_log_probability=old))
        return (weight * losses).mean(), {name: (weight * value).mean() for name, value in metrics.items()}

    def make_steps(
        self, params: Params, task: Task, reference: Params, batch: Batch, *, with_reference: bool
    ) -> Steps:
        """Runs the networks at the states of a batch, and compares with the states that followed.

        Args:
          params, task, reference, batch: as in a call; `old_log_probability` and `first` are not read.
          with_reference: whether to run the frozen denoiser.

        Returns:
          The steps, their old log-probabilities equal to the new ones.
        """
        pipe, images = task.pipe, self.method.images
        frozen = of_components(task, reference)
        denoiser = GuidedDenoiser(pipe, self.drawing, task.precision.compute_dtype, task.precision.remat)
        sampler = self.drawing.make_sampler(pipe)
        # NaN times a weight of 0 would be NaN.
        usable = (batch["weight"] > 0)[:, None, None, None, None]
        x, following = (
            jnp.where(usable, batch[name], 0.0).reshape(-1, *batch[name].shape[2:])
            for name in ("state", "next_state")
        )
        call = jnp.repeat(batch["call"], images)
        tokens = jnp.repeat(batch["tokens"], images, axis=0)

        def make_step(params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
            predictions: list[jax.Array] = []
            conditioning = denoiser.encode(params, tokens, self.size)

            def predict(x: jax.Array, t: jax.Array) -> jax.Array:
                predictions.append(denoiser.predict(params, x, t, conditioning))
                return predictions[0]

            mean, deviation = sampler.transition(predict, State(x), call)
            return mean.latents, deviation, predictions[0]

        def of_rows(values: Float[Array, " n"]) -> Float[Array, "R P"]:
            return values.reshape(-1, images)

        mean, deviation, prediction = make_step(gather(policy_params(task, params, reference)))
        log_policy = of_rows(log_probability(following, mean, deviation))
        steps = Steps(
            log_probability=log_policy,
            old_log_probability=log_policy,
            advantage=batch["advantage"],
            size=x[0].size,
        )
        if not with_reference:
            return steps
        # The frozen text encoders read the prompts too: those of the policy may be trained.
        frozen_mean, _, frozen_prediction = jax.lax.stop_gradient(make_step(gather(cast(task, frozen))))
        return dataclasses.replace(
            steps,
            reference_log_probability=of_rows(log_probability(following, frozen_mean, deviation)),
            kl=of_rows(divergence(mean, frozen_mean, deviation)),
            prediction_error=of_rows(jnp.square(prediction - frozen_prediction).mean((1, 2, 3))),
        )

    @property
    def beside_components(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    @property
    def rows(self) -> int:
        """Denoising steps of an image, which those compared share."""
        return self.drawing.steps // self.method.images

    def frozen_params(self, pipe: Pipeline, *, abstract: bool = False) -> Params:
        """Runs no network but the pipeline's components."""
        del pipe, abstract
        return {}

    def inputs(self, pipe: Pipeline) -> tuple[str, ...]:
        """Names of the arrays of a batch that the loss reads."""
        return tuple(self.input_shapes(pipe, self.method.images, pipe.image_size))

    def input_shapes(
        self, pipe: Pipeline, images: int, size: tuple[int, int]
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of a row, without the batch axis; P and the size are the loss's own."""
        del images, size
        shape, count = jax.ShapeDtypeStruct, self.method.images
        latents = shape((count, *self.size, pipe.latent_channels), jnp.float32)
        return {
            "state": latents,
            "next_state": latents,
            "call": shape((), jnp.int32),
            "tokens": shape(pipe.empty_tokens.shape, jnp.int32),
            "advantage": shape((), jnp.float32),
            "weight": shape((), jnp.float32),
            "old_log_probability": shape((count,), jnp.float32),
            "first": shape((), jnp.bool_),
        }

    def passes(self, images: int) -> Passes:
        """Passes of a row, a denoising step of each of its images; drawing these is not among them."""
        del images
        each = self.method.images * (2 if self.drawing.guidance_scale > 1 else 1)
        reference = each if self.method.needs_reference else 0
        return Passes(
            policy=each, backward=each, reference=reference, encoded=each + reference, encoded_backward=each
        )

    def notes(self, values_per_image: int) -> list[str]:
        """Returns lines of the method for the user before a run."""
        return self.method.notes(values_per_image)
