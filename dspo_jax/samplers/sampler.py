"""What every sampler is: a table of coefficients, one row a call of the network, and the scan over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dspo_jax.errors import UserError

Array = jax.Array | np.ndarray
Predict = Callable[[jax.Array, jax.Array], jax.Array]
Noise = Callable[[jax.Array], jax.Array]


class Table(NamedTuple):
    """The rows of a sampler for all of a schedule's N steps, in float64; see `Sampler` for the names.

    Attributes:
      image_scale, noise_scale: [n], of an image that is noised to be what call i starts from.
    """

    timesteps: np.ndarray
    image_scale: np.ndarray
    noise_scale: np.ndarray
    step_x: np.ndarray
    step_outputs: np.ndarray
    step_noise: np.ndarray | None = None
    input_scale: np.ndarray | float = 1.0
    output_x: np.ndarray | float = 0.0
    output_prediction: np.ndarray | float = 1.0
    pure_noise_scale: float = 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Sampler:
    """n calls of the network, from noise or from a noised image to clean latents; made by `make_sampler`.

    Call i, at x_i, makes m_i = output_x[i] x_i + output_prediction[i] predict(input_scale[i] x_i,
    timesteps[i]) and then, with the K - 1 outputs before it and standard normal z_i,

        x_{i+1} = step_x[i] x_i + sum_k step_outputs[i, k] m_{i-k} + step_noise[i] z_i.

    A pytree of arrays: samplers of the same sizes that are arguments of a jitted function share its program.

    Attributes:
      timesteps: [n], in the order of the calls; int32, or float32 where diffusers passes floats (Euler).
      pure_noise_scale: What standard normal noise is multiplied by where there is no image; diffusers'
        `init_noise_sigma`.
      image_scale, noise_scale: x_0 = image_scale image + noise_scale noise where there is one.
      input_scale: [n] float32; diffusers' `scale_model_input`.
      output_x, output_prediction: [n] float32.
      step_x: [n] float32.
      step_outputs: [n, K] float32, the newest output first.
      step_noise: [n] float32, or None where the sampler is deterministic.
      strength: The part of the way that is gone; below 1 there must be an image to start from.
    """

    timesteps: np.ndarray
    pure_noise_scale: float
    image_scale: float
    noise_scale: float
    input_scale: np.ndarray
    output_x: np.ndarray
    output_prediction: np.ndarray
    step_x: np.ndarray
    step_outputs: np.ndarray
    step_noise: np.ndarray | None
    strength: float = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_table(cls, table: Table, first: int, strength: float) -> Sampler:
        """The rows of a table from row `first` on, in float32."""

        def rows(values: np.ndarray | float) -> np.ndarray:
            whole = np.broadcast_to(values, (len(table.timesteps), *np.shape(values)[1:]))
            return whole[first:].astype(np.float32)

        return cls(
            timesteps=table.timesteps[first:],
            pure_noise_scale=float(table.pure_noise_scale),
            image_scale=float(table.image_scale[first]),
            noise_scale=float(table.noise_scale[first]),
            input_scale=rows(table.input_scale),
            output_x=rows(table.output_x),
            output_prediction=rows(table.output_prediction),
            step_x=rows(table.step_x),
            step_outputs=rows(table.step_outputs),
            step_noise=None if table.step_noise is None else rows(table.step_noise),
            strength=strength,
        )

    def start(self, noise: Array, image_latents: Array | None = None) -> jax.Array:
        """The latents at the first timestep.

        Args:
          noise: [B, h, w, C], standard normal.
          image_latents: The image to start from, in UNet units, of the same shape; None starts from noise.

        Returns:
          [B, h, w, C] float32; with an image what StableDiffusionImg2ImgPipeline's `prepare_latents` gives,
          which keeps a trace of the image even at strength 1.

        Raises:
          ValueError: There is no image and the strength is below 1.
        """
        noise = jnp.asarray(noise, jnp.float32)
        if image_latents is not None:
            return self.image_scale * jnp.asarray(image_latents, jnp.float32) + self.noise_scale * noise
        if self.strength < 1:
            raise UserError(f"strength = {self.strength}: needs an image to start from; without one it is 1")
        return self.pure_noise_scale * noise

    def run(self, predict: Predict, x: jax.Array, noise: Noise | None = None) -> jax.Array:
        """Takes every step. `predict` is traced once.

        Args:
          predict: `(x_scaled, t) -> prediction` of the schedule's type and of the shape of x, with x_scaled
            float32 and t a scalar of the dtype of `timesteps`; guidance, if any, is applied inside.
          x: [B, h, w, C] float32, from `start`.
          noise: `i -> z_i` [B, h, w, C], standard normal, for call i (int32 scalar, from 0). Only a sampler
            with `step_noise` calls it, and only that one needs it.

        Returns:
          [B, h, w, C] float32 clean latents, in UNet units.

        Raises:
          ValueError: The sampler adds noise and there is none.
        """
        stochastic = self.step_noise is not None
        if stochastic and noise is None:
            raise UserError("noise = None: this sampler adds noise at every step; pass noise(i)")
        rows = dict(
            i=np.arange(self.timesteps.shape[0], dtype=np.int32),
            t=self.timesteps,
            input_scale=self.input_scale,
            output_x=self.output_x,
            output_prediction=self.output_prediction,
            step_x=self.step_x,
            step_outputs=self.step_outputs,
            step_noise=self.step_noise,
        )

        def step(carry: Any, row: Any) -> tuple[Any, None]:
            x, earlier = carry
            prediction = predict(row["input_scale"] * x, row["t"]).astype(jnp.float32)
            outputs = (row["output_x"] * x + row["output_prediction"] * prediction, *earlier)
            x = row["step_x"] * x
            for k, output in enumerate(outputs):
                x += row["step_outputs"][k] * output
            if noise is not None and stochastic:
                x += row["step_noise"] * noise(row["i"]).astype(jnp.float32)
            return (x, outputs[:-1]), None

        x = jnp.asarray(x, jnp.float32)
        earlier = (jnp.zeros_like(x),) * (self.step_outputs.shape[1] - 1)
        (x, _), _ = jax.lax.scan(step, (x, earlier), rows)
        return x
