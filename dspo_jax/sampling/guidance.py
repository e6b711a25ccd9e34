"""A denoiser under prompts, with classifier-free guidance: what a sampler calls at each step."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float16, Float32, Integer, Num, PyTree

from dspo_jax.models.model import Params
from dspo_jax.pipelines.conditioning import Conditioning
from dspo_jax.pipelines.conditioning_inputs import find_states, prompt_batch
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.sampling.rendering import Drawing

NEGATIVE = "negative"
"""Name among parameters by component of another model's, whose denoiser runs without the prompt."""


@dataclasses.dataclass(frozen=True, eq=False)
class GuidedDenoiser:
    """A model's prediction under prompts, guidance applied in float32. Pure: parameters are arguments.

    Attributes:
      pipe: the model's architectures.
      drawing: guidance scale, its interval, the rescaling, skipped layers and the negative prompt are read,
        and at which times the sampler calls.
      compute_dtype: of the networks.
      remat: which activations a backward pass computes again, see models/remat.py.
    """

    pipe: Pipeline
    drawing: Drawing
    compute_dtype: str = "float32"
    remat: str = "none"

    @property
    def is_guided(self) -> bool:
        """Whether a prediction runs the denoiser without the prompt, too."""
        return self.drawing.guidance_scale > 1

    def encode(
        self,
        params: Mapping[str, Params],
        tokens: Integer[jax.Array, "B E S"],
        size: tuple[int, int],
        states: Float16[jax.Array, "B L F"] | None = None,
    ) -> Conditioning:
        """Encodes prompts for `predict`, and with guidance the negative prompt beside each.

        Args:
          params: the text encoders by component, in the compute dtype.
          tokens: ids [B, E, S].
          size: (height, width) of the latents.
          states: from `find_states`.

        Returns:
          Conditioning of B images; with guidance of 2 B, without and with the prompt of each image in turn,
          so that both are on the device that holds the latents.
        """
        pipe, count = self.pipe, len(tokens)
        zeros = self.drawing.negative_prompt is None and pipe.zero_empty_captions
        if self.is_guided and not zeros:
            tokens = self._beside(self._negative_tokens(), tokens)
            negative = find_states(pipe, [self.drawing.negative_prompt or ""])
            if states is not None and negative is not None:
                states = self._beside(negative, states)
        height, width = (side * pipe.vae_scale_factor for side in size)
        prompts = prompt_batch(pipe, tokens, (height, width), states)
        conditioning = pipe.encode_conditioning(params, prompts, zero_empty=False)
        if self.is_guided and zeros:
            nothing = conditioning.without_captions(jnp.ones(count, bool))
            conditioning = jax.tree.map(self._beside, nothing, conditioning)
        return conditioning

    def predict(
        self,
        params: Mapping[str, Params],
        x: Float[jax.Array, "B h w C"],
        t: Num[jax.Array, "*B"],
        conditioning: Conditioning,
    ) -> Float32[jax.Array, "B h w C"]:
        """Predicts eps or v: uncond + s (cond - uncond) in float32, or the prediction under the prompt.

        With `skip_layer_guidance` a multiple of cond - (cond without the layers) is added, as diffusers'
        pipeline of Stable Diffusion 3 does. With `guidance_rescale` the sum is then rescaled, as diffusers'
        `rescale_noise_cfg` does.

        Args:
          params: the denoiser by component, in the compute dtype; under `NEGATIVE`, if it is there, the one
            that predicts uncond (Diffusion-NPO, arXiv 2505.11245).
          x: latents [B, h, w, C].
          t: timesteps, a scalar or, without `skip_layer_guidance`, [B].
          conditioning: from `encode`.
        """
        passes = 2 if self.is_guided else 1
        noisy = jnp.repeat(x, passes, axis=0).astype(self.compute_dtype)
        timesteps = jnp.repeat(jnp.broadcast_to(t, len(x)), passes)
        if self.is_guided and NEGATIVE in params:
            without, prompted = (self._half(i, (noisy, timesteps, conditioning)) for i in (0, 1))
            uncond = self.pipe.predict(params[NEGATIVE], *without, remat=self.remat).astype(jnp.float32)
            cond = self.pipe.predict(params, *prompted, remat=self.remat).astype(jnp.float32)
        else:
            output = self.pipe.predict(params, noisy, timesteps, conditioning, remat=self.remat)
            output = output.astype(jnp.float32)
            if not self.is_guided:
                return output
            uncond, cond = jnp.moveaxis(output.reshape(-1, 2, *x.shape[1:]), 1, 0)
        first, last = self.drawing.guidance_interval
        scale = jnp.where((first <= t) & (t <= last), self.drawing.guidance_scale, 1.0)
        guided = uncond + scale.reshape(-1, 1, 1, 1) * (cond - uncond)
        if self._skipping is not None:
            layers, factor, lowest, highest = self._skipping
            prompted = self._half(1, (noisy, timesteps, conditioning))

            def add(guided: jax.Array) -> jax.Array:
                output = self.pipe.predict(params, *prompted, remat=self.remat, skip_layers=layers)
                return guided + factor * (cond - output.astype(jnp.float32))

            guided = jax.lax.cond((lowest <= t) & (t <= highest), add, lambda guided: guided, guided)
        rescale = self.drawing.guidance_rescale
        if rescale == 0:
            return guided
        deviation = functools.partial(jnp.std, axis=(1, 2, 3), ddof=1, keepdims=True)
        return rescale * guided * (deviation(cond) / deviation(guided)) + (1 - rescale) * guided

    @functools.cached_property
    def _skipping(self) -> tuple[tuple[int, ...], float, float, float] | None:
        """Layers that are skipped, the scale, and the lowest and highest time at which they are; or None."""
        skip = self.drawing.skip_layer_guidance
        if skip is None:
            return None
        times = np.asarray(self.drawing.make_sampler(self.pipe).timesteps)
        at = times[skip.calls(len(times))]
        return skip.layers, skip.scale, at.min(), at.max()

    def _negative_tokens(self) -> np.ndarray:
        if self.drawing.negative_prompt:
            return self.pipe.tokenize([self.drawing.negative_prompt])
        return self.pipe.empty_tokens[None]  # a published architecture has no tokenizers

    @staticmethod
    def _half(first: int, arrays: PyTree) -> PyTree:
        return jax.tree.map(lambda array: array[first::2], arrays)

    @staticmethod
    def _beside(without: jax.Array | np.ndarray, prompted: jax.Array) -> jax.Array:
        both = jnp.stack([jnp.broadcast_to(without, prompted.shape), prompted], axis=1)
        return both.reshape(2 * len(prompted), *prompted.shape[1:])
