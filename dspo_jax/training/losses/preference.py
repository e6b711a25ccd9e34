"""The preference loss: encoded pairs are noised, policy and reference denoise them, an objective compares."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Key, Num, PyTree

from dspo_jax.models.model import Params
from dspo_jax.objectives import Objective, Predictions
from dspo_jax.parallel.rules import gather
from dspo_jax.pipelines.conditioning_inputs import drop_captions
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.schedules.process import LevelDraw
from dspo_jax.training.task import (
    Batch,
    Dropout,
    Metrics,
    Passes,
    Task,
    cast,
    of_components,
    policy_params,
    predict,
)


@dataclasses.dataclass(frozen=True)
class Draws:
    """Distribution of everything random about a batch of pairs.

    Attributes:
      levels: distribution of the noise levels.
      caption_dropout: probability of dropping the caption of a pair.
      encoder_dropout: probability with which each text encoder by itself is without the caption of a pair.
      drops_to_zeros: whether zeros stand for what is dropped, and not the empty caption.
      share_timesteps: whether the images of a pair share their noise level.
      share_noise: whether the images of a pair share their noise.
      noise_offset: deviation of what is added to all of an image's noise, a number for each channel.
      positive_ratio: probability that the image drawn of a pair is the winner, for an objective of one image.
      adapter_dropout: probability of dropping an element of an adapter's input in the policy.
    """

    levels: LevelDraw
    caption_dropout: float
    share_timesteps: bool
    share_noise: bool
    noise_offset: float
    positive_ratio: float
    adapter_dropout: float = 0.0
    encoder_dropout: float = 0.0
    drops_to_zeros: bool = False


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """Mean of an objective over a batch of encoded pairs; a `LossFn`.

    A batch has `moments` [B, P, h, w, 2C] (mean and deviation, UNet units), `preference` and `loser_won` [B],
    `index` [B] uint32 (unique over the run, or of an example's draw) and what the pipeline is conditioned on.
    It may have `scores` [B, P], what the images are worth; for an objective that needs it, it has `weight`
    [B, P] float32. Where it has `reference_error` [B, P] float32, the frozen denoiser is not run. The step
    adds `beta` [B] float32 where it follows the margins.

    Attributes:
      objective: from `get_objective`.
      draws: of noise levels, noise and dropped captions.
      stored_reference: whether batches have `reference_error`.
    """

    objective: Objective
    draws: Draws
    stored_reference: bool = False

    @property
    def needs_reference(self) -> bool:
        """Whether the objective compares with the frozen denoiser."""
        return self.objective.needs_reference

    def __call__(
        self, params: Params, task: Task, reference: Params, batch: Batch, key: Key[jax.Array, ""]
    ) -> tuple[Float32[jax.Array, ""], Metrics]:
        """Returns means of the loss and of the objective's metrics, float32 scalars.

        Args:
          params: trained parameters by component.
          task: pipeline and precision.
          reference: the frozen parameters.
          batch: see the class.
          key: of the run; an example's randomness follows from (key, index).
        """
        schedule = task.pipe.schedule
        latents, noise, levels, drop = draw_noise(self.draws, batch, key)
        per_image = {name: batch[name] for name in task.pipe.image_inputs}
        (latents, noise, levels, per_image, scores), preference = self.choose_images(
            batch, key, (latents, noise, levels, per_image, batch.get("scores"))
        )
        captions = None
        if self.objective.needs_captions:
            frozen_params = gather(cast(task, of_components(task, reference)))
            captions = task.pipe.embed_captions(frozen_params, batch)
        batch = self._drop_captions(task, {**batch, **per_image}, key, drop)
        noisy = schedule.add_noise(latents, noise, levels)
        policy, frozen = self.forward(
            task, params, reference, noisy, levels, batch, self._draw_dropout(batch, key)
        )
        predictions = Predictions(
            policy=policy,
            reference=frozen,
            target=schedule.target(latents, noise, levels),
            levels=levels,
            preference=preference,
            scores=scores,
            weight=batch["weight"] if self.objective.needs_weight else None,
            beta=batch.get("beta"),
            captions=captions,
            reference_error=batch.get("reference_error"),
        )
        losses, metrics = self.objective(predictions, schedule)
        return losses.mean(), {name: values.mean() for name, values in metrics.items()}

    def _drop_captions(
        self, task: Task, batch: Batch, key: Key[jax.Array, ""], drop: Bool[jax.Array, " B"]
    ) -> Batch:
        """Drops captions where `drop` is true, and where they are drawn to be, of each text encoder."""
        each = drop[:, None] | self._draw_encoders(batch, key, len(task.pipe.empty_tokens))
        return drop_captions(task.pipe, batch, each, zeros=self.draws.drops_to_zeros)

    def _draw_encoders(self, batch: Batch, key: Key[jax.Array, ""], count: int) -> Bool[jax.Array, "B E"]:
        """Draws which of `count` text encoders are without the caption, from (key, index) like the noise."""
        if not self.draws.encoder_dropout:
            return jnp.zeros((len(batch["index"]), count), bool)

        def draw(index: jax.Array) -> jax.Array:  # numbers 0 to 6 are of other draws
            of_example = jax.random.fold_in(jax.random.fold_in(key, index), 7)
            return jax.random.bernoulli(of_example, self.draws.encoder_dropout, (count,))

        return jax.vmap(draw)(batch["index"])

    def reference_error(
        self, task: Task, reference: Params, batch: Batch, key: Key[jax.Array, ""]
    ) -> Float32[jax.Array, "B P"]:
        """Returns the mean squared error of the frozen denoiser for the draws of (key, index).

        Arguments as in a call.
        """
        schedule = task.pipe.schedule
        latents, noise, levels, drop = draw_noise(self.draws, batch, key)
        noisy = schedule.add_noise(latents, noise, levels)
        params = cast(task, of_components(task, reference))
        output = predict(task, params, noisy, levels, self._drop_captions(task, batch, key, drop))
        difference = output.astype(jnp.float32) - schedule.target(latents, noise, levels)
        return jnp.square(difference).mean((2, 3, 4))

    def _draw_dropout(self, batch: Batch, key: Key[jax.Array, ""]) -> Dropout | None:
        """Draws dropout from (key, index) like the noise; numbers 0 to 5 of its keys are of other draws."""
        if not self.draws.adapter_dropout:
            return None
        keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.fold_in(key, index), 6))(batch["index"])
        return Dropout(self.draws.adapter_dropout, keys)

    def choose_images(
        self, batch: Batch, key: Key[jax.Array, ""], arrays: PyTree
    ) -> tuple[PyTree, Float32[jax.Array, " B"]]:
        """Takes the images that the objective is trained on: all of an example, the winner, or one drawn.

        The other images are then never run. The draw follows from (key, index), like the noise.

        Args:
          batch: `preference`, `loser_won` and `index` are read.
          key: of the run.
          arrays: pytree of arrays [B, P, ...].

        Returns:
          The arrays [B, P', ...] and the preference [B]: of drawn images, the probability that the image is
          a liked one. A loser that won another pair is liked, as in the released code of Diffusion-KTO.
        """
        images, preference = batch["moments"].shape[1], batch["preference"]
        if self.objective.images == "all" or images == 1:
            return arrays, preference
        if self.objective.images == "winner":
            return jax.tree.map(lambda array: array[:, :1], arrays), preference

        def draw(index: jax.Array) -> jax.Array:
            # The keys of `draw_noise` are numbers 0 to 3, and 5.
            of_example = jax.random.fold_in(jax.random.fold_in(key, index), 4)
            return jax.random.bernoulli(of_example, 1 - self.draws.positive_ratio)

        drawn = jax.vmap(draw)(batch["index"]).astype(jnp.int32)

        def take(array: jax.Array) -> jax.Array:
            return jnp.take_along_axis(array, drawn.reshape(-1, *(1,) * (array.ndim - 1)), axis=1)

        liked_loser = jnp.where(batch["loser_won"], 1.0, 1 - preference)
        return jax.tree.map(take, arrays), jnp.where(drawn == 0, preference, liked_loser)

    def forward(
        self,
        task: Task,
        params: Params,
        reference: Params,
        noisy: Float[jax.Array, "B P h w C"],
        levels: Num[jax.Array, "B P"],
        batch: Batch,
        dropout: Dropout | None = None,
    ) -> tuple[Float[jax.Array, "B P h w C"], Float[jax.Array, "B P h w C"] | None]:
        """Runs the policy and, where its outputs are needed, the reference: outputs [B, P, h, w, C].

        `dropout` is of the policy.
        """

        def run(params: Params, dropout: Dropout | None = None) -> jax.Array:
            if not self.objective.detaches_loser:
                return predict(task, params, noisy, levels, batch, dropout)
            # The loser apart and from constants, so that nothing is kept for its backward pass.
            outputs = []
            for i, of_image in enumerate((params, jax.lax.stop_gradient(params))):
                image = slice(i, i + 1)
                part = {**batch, **{name: batch[name][:, image] for name in task.pipe.image_inputs}}
                outputs.append(predict(task, of_image, noisy[:, image], levels[:, image], part, dropout))
            return jnp.concatenate(outputs, axis=1)

        policy = run(policy_params(task, params, reference), dropout)
        if not self.needs_reference or "reference_error" in batch:
            return policy, None
        return policy, run(cast(task, of_components(task, reference)))

    def _reads_scores(self, images: int) -> bool:
        """Whether examples of `images` images have scores: lists always, as a pair's labels say enough."""
        return images > 2 or self.objective.needs_scores

    def inputs(self, pipe: Pipeline) -> tuple[str, ...]:
        """Names of the arrays of a batch that the loss reads."""
        weight = ("weight",) if self.objective.needs_weight else ()
        scores = ("scores",) if self.objective.needs_scores else ()
        stored = ("reference_error",) if self.stored_reference else ()
        more = (*weight, *scores, *stored)
        return ("moments", *pipe.conditioning_inputs, "preference", "loser_won", *more, "index")

    def input_shapes(
        self, pipe: Pipeline, images: int, size: tuple[int, int]
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of an example as the shards hold it, without the batch axis."""
        height, width = (side // pipe.vae_scale_factor for side in size)
        shape = jax.ShapeDtypeStruct
        weight = {"weight": shape((images,), jnp.float32)} if self.objective.needs_weight else {}
        return {
            "moments": shape((images, height, width, 2 * pipe.latent_channels), jnp.float16),
            **pipe.conditioning_shapes(images),
            "preference": shape((), jnp.float32),
            "loser_won": shape((), jnp.bool_),
            **weight,
            **({"scores": shape((images,), jnp.float32)} if self._reads_scores(images) else {}),
            **({"reference_error": shape((images,), jnp.float32)} if self.stored_reference else {}),
            "index": shape((), jnp.uint32),
        }

    @property
    def beside_components(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    @property
    def rows(self) -> int:
        """One: an example is a row of a batch."""
        return 1

    def frozen_params(self, pipe: Pipeline, *, abstract: bool = False) -> Params:
        """Returns nothing: only the pipeline's components are run."""
        del pipe, abstract
        return {}

    def passes(self, images: int) -> Passes:
        """Passes through the networks for an example of `images` images, as `forward` makes them."""
        run = images if self.objective.images == "all" else 1
        encoded = 2 if self.objective.detaches_loser else 1  # by each network that runs the two images apart
        runs_reference = self.needs_reference and not self.stored_reference
        return Passes(
            policy=run,
            backward=1 if self.objective.detaches_loser else run,
            reference=run if runs_reference else 0,
            encoded=encoded * (2 if runs_reference else 1) + self.objective.needs_captions,
            encoded_backward=1,
        )

    def notes(self, values_per_image: int) -> list[str]:
        """Returns lines of the noise levels and of the objective for the user before a run."""
        return [*self.draws.levels.notes(), *self.objective.notes(values_per_image)]


def draw_noise(
    draws: Draws, batch: Batch, key: Key[jax.Array, ""]
) -> tuple[
    Float32[jax.Array, "B P h w C"],
    Float32[jax.Array, "B P h w C"],
    Num[jax.Array, "B P"],
    Bool[jax.Array, " B"],
]:
    """Draws latents, noise, noise levels and dropped captions from (key, index of the example) alone.

    So the draws depend neither on the devices nor on how a batch is split. Returns latents [B, P, h, w, C]
    (UNet units), noise of the same shape, levels [B, P] of the process, and whether to drop each caption [B]
    bool.

    With `noise_offset` o the noise is eps + o delta, eps [P, h, w, C] and delta [P, 1, 1, C] standard normal;
    it is what the latents are noised with and what the target is made of, as in the text-to-image trainer of
    diffusers (examples/text_to_image, --noise_offset).
    """
    mean, deviation = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
    images = mean.shape[1]
    of_noise, of_levels = (1 if shared else images for shared in (draws.share_noise, draws.share_timesteps))

    def draw(index: jax.Array) -> tuple[jax.Array, ...]:
        of_example = jax.random.fold_in(key, index)
        keys = jax.random.split(of_example, 4)
        posterior = jax.random.normal(keys[0], mean.shape[1:])
        noise = jax.random.normal(keys[1], (of_noise, *mean.shape[2:]))
        if draws.noise_offset:  # 4 is the number of the key that draws an image of a pair
            shape = (of_noise, 1, 1, mean.shape[-1])
            noise = noise + draws.noise_offset * jax.random.normal(jax.random.fold_in(of_example, 5), shape)
        levels = draws.levels(keys[2], (of_levels,))
        return posterior, noise, levels, jax.random.bernoulli(keys[3], draws.caption_dropout)

    posterior, noise, levels, drop = jax.vmap(draw)(batch["index"])
    latents = mean + deviation * posterior
    return latents, jnp.broadcast_to(noise, mean.shape), jnp.broadcast_to(levels, mean.shape[:2]), drop
