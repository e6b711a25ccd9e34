"""The loss of reward gradients: prompts become images, and a reward's gradient flows back to the network."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Key, PyTree

from dspo_jax.models.model import Params
from dspo_jax.objectives.reward_gradient import ReFL, RewardGradient
from dspo_jax.parallel.rules import gather
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.rewards.differentiable import DifferentiableReward
from dspo_jax.samplers.adjoint import checkpoint_images, run_with_gradients
from dspo_jax.sampling.guidance import GuidedDenoiser
from dspo_jax.sampling.rendering import Drawing
from dspo_jax.training.task import (
    USABLE,
    Batch,
    Metrics,
    Passes,
    Task,
    cast,
    of_components,
    policy_params,
)

REWARD, VAE = "reward", "vae"
"""Names of the frozen parameters beside those of the pipeline's components."""


@dataclasses.dataclass(frozen=True, eq=False)
class RewardGradientLoss:
    """Mean loss of images that are drawn of a batch of prompts; a `LossFn`.

    An image whose pixels or reward are not finite is left out: it has no gradient and counts in no mean.

    A batch has `tokens` [B, E, S], `reward_tokens` as the reward takes them, `index` [B] uint32 (unique over
    the run) and `update` [B] uint32, the number of the update.

    Attributes:
      method: which steps pass gradients.
      reward: a pure function of pixels.
      drawing: how images are drawn.
      size: (height, width) of the latents.
    """

    method: RewardGradient
    reward: DifferentiableReward
    drawing: Drawing
    size: tuple[int, int]

    @property
    def needs_reference(self) -> bool:
        """Whether the method is held near the frozen denoiser."""
        return self.method.needs_reference

    def __call__(
        self, params: Params, task: Task, reference: Params, batch: Batch, key: Key[jax.Array, ""]
    ) -> tuple[Float32[jax.Array, ""], Metrics]:
        """Returns means of the loss and of the metrics, float32 scalars, with unusable images as zeros.

        `USABLE`, among the metrics, is the share of the others.

        Args:
          params: trained parameters by component.
          task: pipeline and precision.
          reference: the frozen parameters, those of VAE and reward among them.
          batch: see the class.
          key: of the run; an image's noise follows from (key, index), the steps that pass gradients from
            (key, update).
        """
        pipe, frozen = task.pipe, of_components(task, reference)
        denoiser = GuidedDenoiser(pipe, self.drawing, task.precision.compute_dtype, task.precision.remat)
        sampler = self.drawing.make_sampler(pipe)
        shape = (*self.size, pipe.latent_channels)
        calls = sampler.timesteps.shape[0]

        def noise(i: jax.Array | int) -> Float[jax.Array, "B h w C"]:
            def draw(index: jax.Array) -> jax.Array:
                return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, index), i), shape)

            return jax.vmap(draw)(batch["index"])

        of_update = jax.random.fold_in(jax.random.fold_in(key, batch["update"][0]), 2**31)
        attached = self.method.attached(calls, of_update)
        conditioning = denoiser.encode(
            gather(policy_params(task, params, reference)), batch["tokens"], self.size
        )
        theta, fixed = (params, conditioning._replace(sizes=None)), jax.lax.stop_gradient(conditioning)

        def predict(theta: PyTree, x: jax.Array, t: jax.Array) -> jax.Array:
            params, floats = theta
            policy = gather(policy_params(task, params, reference))
            return denoiser.predict(policy, x, t, floats._replace(sizes=fixed.sizes))

        def take_step(
            theta: PyTree, constants: PyTree, x: jax.Array, i: jax.Array, penalised: bool
        ) -> tuple[jax.Array, jax.Array]:
            del constants
            called: list[tuple[jax.Array, jax.Array, jax.Array]] = []

            def predict_once(x: jax.Array, t: jax.Array) -> jax.Array:
                called.append((x, t, predict(theta, x, t)))
                return called[0][2]

            mean, deviation = sampler.transition(predict_once, sampler.start(x)._replace(latents=x), i)
            after = mean.latents
            if sampler.step_noise is not None:
                after += deviation * noise(i + 1)
            return after, drift(*called[0]) if penalised else jnp.zeros(len(x), jnp.float32)

        def drift(x: jax.Array, t: jax.Array, prediction: jax.Array) -> jax.Array:
            of_reference = denoiser.predict(gather(cast(task, frozen)), x, t, fixed)
            return jnp.square(prediction - of_reference).mean((1, 2, 3))

        step = partial(take_step, penalised=self.needs_reference)
        walk = partial(take_step, penalised=False) if self.needs_reference else None
        start = sampler.start(noise(0)).latents
        if isinstance(self.method, ReFL):
            # To the attached step without gradients; its prediction gives the image.
            held, i = jax.lax.stop_gradient(theta), jnp.argmax(attached)
            x = jax.lax.fori_loop(0, i, lambda i, x: (walk or step)(held, (), x, i)[0], start)
            t = jnp.take(jnp.asarray(sampler.timesteps), i)

            def expect(theta: PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
                prediction = predict(theta, x, t)
                penalty = drift(x, t, prediction) if self.needs_reference else jnp.zeros(len(x), jnp.float32)
                return pipe.schedule.to_x0(prediction, x, pipe.schedule.level_at(t)), penalty

            latents, penalty = checkpoint_images(expect, theta, jax.lax.stop_gradient(x))
        else:
            latents, penalty = run_with_gradients(step, theta, (), start, attached, sampler.kept, walk)
            penalty /= jnp.maximum(attached.sum(), 1)
        losses, usable, metrics = self._judge(pipe, reference, latents, batch["reward_tokens"])

        def take_last(theta: PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return step(theta, (), x, jnp.asarray(calls - 1, jnp.int32))

        for number in range(self.method.renoised):
            eps = noise(2**30 + number)
            level = pipe.schedule.level_at(sampler.timesteps[-1])
            noised = pipe.schedule.add_noise(jax.lax.stop_gradient(latents), eps, level)
            again, _ = checkpoint_images(take_last, theta, noised)
            more, usable_again, _ = self._judge(pipe, reference, again, batch["reward_tokens"])
            losses, usable = losses + more, usable & usable_again
        if self.needs_reference:
            losses += self.method.beta * penalty
            metrics["prediction_drift"] = penalty
        metrics["attached_steps"] = attached.sum().astype(jnp.float32)

        def mean(values: jax.Array) -> jax.Array:
            return jnp.where(usable, values, 0.0).mean()

        means = {name: mean(values) for name, values in metrics.items()}
        return mean(losses), means | {USABLE: usable.mean(dtype=jnp.float32)}

    def _judge(
        self, pipe: Pipeline, reference: Params, latents: Float[jax.Array, "B h w C"], tokens: PyTree
    ) -> tuple[Float32[jax.Array, " B"], Bool[jax.Array, " B"], Metrics]:
        """Returns losses of latents [B], which of them are usable, and metrics [B].

        Nothing of the decoder is kept for the backward pass.

        Pixels are clamped to [0, 1], as images are saved: outside nothing is gained, and no gradient flows.
        """

        def score(theta: PyTree, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
            del theta
            pixels = pipe.decode({VAE: reference[VAE]}, latents).astype(jnp.float32) / 2 + 0.5
            outside = ((pixels < 0) | (pixels > 1)).mean((1, 2, 3), dtype=jnp.float32)
            outside = jnp.where(jnp.isfinite(pixels).all((1, 2, 3)), outside, jnp.nan)
            images = jnp.clip(pixels, 0.0, 1.0)
            return self.reward.function(reference[REWARD], images, tokens), outside

        rewards, outside = checkpoint_images(score, (), latents)
        usable = jnp.isfinite(rewards) & jnp.isfinite(outside)
        metrics = {"reward": rewards, "saturated": outside}
        losses = self.method.loss(rewards / self.reward.divisor)
        return losses, usable, jax.lax.stop_gradient(metrics)

    @property
    def beside_components(self) -> tuple[str, ...]:
        """The VAE, which decodes, and the reward."""
        return VAE, REWARD

    @property
    def rows(self) -> int:
        """One: an example is a row of a batch."""
        return 1

    def frozen_params(self, pipe: Pipeline, *, abstract: bool = False) -> Params:
        """Returns the float32 parameters of VAE and reward."""
        vae = pipe.vae.abstract_params() if abstract else pipe.read_params(VAE, "float32")
        return {VAE: vae, REWARD: self.reward.params}

    def inputs(self, pipe: Pipeline) -> tuple[str, ...]:
        """Names of the arrays of a batch that the loss reads."""
        del pipe
        return ("tokens", "reward_tokens", "index", "update")

    def input_shapes(self, pipe: Pipeline, images: int, size: tuple[int, int]) -> dict[str, Any]:
        """Returns shapes and dtypes of a prompt, without the batch axis."""
        del images, size
        shape = jax.ShapeDtypeStruct
        tokens = self.reward.tokenize([""])
        return {
            "tokens": shape(pipe.empty_tokens.shape, jnp.int32),
            "reward_tokens": jax.tree.map(lambda leaf: shape(leaf.shape[1:], leaf.dtype), tokens),
            "index": shape((), jnp.uint32),
            "update": shape((), jnp.uint32),
        }

    def passes(self, images: int) -> Passes:
        """Passes of the denoiser for an image; decoding and rewarding are not among them."""
        del images
        calls, each = self.drawing.steps, 2 if self.drawing.guidance_scale > 1 else 1
        trained = self.method.mean_attached(calls) + self.method.renoised
        policy = each * (calls + trained + self.method.renoised)  # an attached step is computed again
        reference = each * 2 * trained if self.needs_reference else 0
        return Passes(
            policy=round(policy),
            backward=round(each * trained),
            reference=round(reference),
            encoded=each,
            encoded_backward=each,
            open_trips=round(self.method.mean_open_trips(calls)),
        )

    def notes(self, values_per_image: int) -> list[str]:
        """Returns lines for the user before a run."""
        del values_per_image
        lines = [
            f"reward {self.reward.name} ({self.reward.version}), in units of {self.reward.divisor:g}; what "
            "is trained always rises: look at held-out rewards, the drift and the pictures"
        ]
        if self.reward.name.startswith("clip"):
            lines.append(
                "warning: as the only reward CLIP's score failed in DRaFT's paper; PickScore and HPSv2 work"
            )
        return lines
