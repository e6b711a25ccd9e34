"""One compiled program from prompts and noise to latents: text encoders, guidance and a sampler."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float16, Float32, Integer, PyTree, UInt32

from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.models.model import Params
from dspo_jax.parallel.mesh import batch_sharding, replicated
from dspo_jax.pipelines.conditioning_inputs import find_states
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.sampling.guidance import NEGATIVE, GuidedDenoiser
from dspo_jax.sampling.rendering import Drawing


@dataclasses.dataclass(frozen=True)
class ImageRequest:
    """One image to draw.

    Attributes:
      prompt: the text.
      prompt_index: number of the prompt, from 0, which with the seed decides the noise.
      seed: from 0 to 2**32 - 1.
    """

    prompt: str
    prompt_index: int
    seed: int


class ImageSampler:
    """Draws with one model; compiled once for a shape of latents."""

    def __init__(
        self,
        pipe: Pipeline,
        drawing: Drawing,
        *,
        compute_dtype: str = "float32",
        mesh: Mesh | None = None,
        negative: Pipeline | None = None,
    ):
        """Prepares the program.

        Args:
          pipe: the model.
          drawing: how it draws.
          compute_dtype: of the networks; what stands between the denoiser's passes is float32.
          mesh: splits the batch over these devices, over all processes, which must then all call alike; None
            is one device.
          negative: a model of the same kind, whose denoiser predicts without the prompt; None is the model
            itself. Parameters that are given to `sample_latents` then have its under `NEGATIVE`.

        Raises:
          UserError: a sampler that is unknown, or does not do what the model's scheduler config asks for.
        """
        self._pipe, self._mesh, self._dtype, self._negative = pipe, mesh, compute_dtype, negative
        sampler = drawing.make_sampler(pipe)
        denoiser = GuidedDenoiser(pipe, drawing, compute_dtype)

        def draw(
            params: Mapping[str, Params],
            tokens: Integer[jax.Array, "B E S"],
            noise: Float[jax.Array, "B h w C"],
            seeds: UInt32[jax.Array, " B"],
            prompt_indices: UInt32[jax.Array, " B"],
            image_latents: Float[jax.Array, "B h w C"] | None,
            states: Float16[jax.Array, "B L F"] | None = None,
        ) -> Float32[jax.Array, "B h w C"]:
            size = noise.shape[1:]
            conditioning = denoiser.encode(params, tokens, (size[0], size[1]), states)

            def predict(x: jax.Array, t: jax.Array) -> jax.Array:
                return denoiser.predict(params, x, t, conditioning)

            def step_noise(i: jax.Array) -> jax.Array:
                return jax.vmap(lambda seed, number: _draw_normal(seed, number, size, i + 1))(
                    seeds, prompt_indices
                )

            return sampler.run(predict, sampler.start(noise, image_latents), step_noise)

        self._draw = jax.jit(on_mesh(draw, mesh), out_shardings=replicated(mesh)) if mesh else jax.jit(draw)

    @property
    def program(self) -> jax.stages.Wrapped:
        """The jitted program: parameters, tokens, noise, seeds, prompt numbers, image latents -> latents."""
        return self._draw

    @functools.cached_property
    def _stored_params(self) -> Params:
        params = {name: self._pipe.read_params(name, self._dtype) for name in self._pipe.components}
        if self._negative is not None:
            name = self._pipe.denoiser
            params[NEGATIVE] = {name: self._negative.read_params(name, self._dtype)}
        return jax.device_put(params, replicated(self._mesh) if self._mesh else None)

    def sample_latents(
        self,
        requests: Sequence[ImageRequest],
        noise: Float[jax.Array | np.ndarray, "B h w C"],
        image_latents: Float[np.ndarray, "B h w C"] | None = None,
        params: Params | None = None,
    ) -> Float32[jax.Array, "B h w C"]:
        """Draws final latents [B, h, w, C] (UNet units, float32), which with a mesh every device holds whole.

        Args:
          requests: B of them; with a mesh a multiple of the ways it splits a batch.
          noise: standard normal [B, h, w, C], with a mesh the same in every process.
          image_latents: [B, h, w, C] of the images to start from, in UNet units; None starts from noise.
          params: UNet and text encoders by component in the compute dtype; None is the model's own weights.
        """
        prompts = [request.prompt for request in requests]
        inputs: tuple[PyTree, ...] = (
            self._pipe.tokenize(prompts),
            noise,
            np.asarray([request.seed for request in requests], np.uint32),
            np.asarray([request.prompt_index for request in requests], np.uint32),
            image_latents,
            find_states(self._pipe, prompts),
        )
        if self._mesh is not None:
            sharding = batch_sharding(self._mesh)
            inputs = jax.tree.map(
                lambda array: jax.make_array_from_callback(array.shape, sharding, array.__getitem__),
                jax.tree.map(np.asarray, inputs),
            )
        return self._draw(self._stored_params if params is None else params, *inputs)


def initial_noise(
    requests: Sequence[ImageRequest], size: tuple[int, int, int]
) -> Float32[jax.Array, "B h w C"]:
    """Returns standard normal noise [B, h, w, C] that depends on a request's seed and prompt number only."""
    return jax.vmap(lambda seed, number: _draw_normal(seed, number, size, None))(
        jnp.asarray([request.seed for request in requests], jnp.uint32),
        jnp.asarray([request.prompt_index for request in requests], jnp.uint32),
    )


def _draw_normal(
    seed: UInt32[jax.Array, ""],
    prompt_index: UInt32[jax.Array, ""],
    size: tuple[int, ...],
    step: Integer[jax.Array, ""] | None,
) -> Float32[jax.Array, "..."]:
    key = jax.random.fold_in(jax.random.key(seed), prompt_index)
    return jax.random.normal(key if step is None else jax.random.fold_in(key, step), size)
