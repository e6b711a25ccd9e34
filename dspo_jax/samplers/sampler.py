"""The form of every sampler: a table of coefficients, one row a call of the network, and the scan over it.

Axes in shapes: n calls, K outputs that a step uses, B images, h, w and C of the latents.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Float64, Int, Num

from dspo_jax.errors import UserError

Predict = Callable[[jax.Array, jax.Array], jax.Array]
"""`(x_scaled, t) -> prediction` of the schedule's type and of the shape of x_scaled, which is float32; t has
the dtype of `Sampler.timesteps` and is a scalar or, where `transition` is given one call per image, [B]."""

Noise = Callable[[jax.Array], jax.Array]
"""`i -> z_i` [B, h, w, C], standard normal, for call i (int32 scalar, from 0)."""


class CoefficientTable(NamedTuple):
    """The rows of a sampler for all of a schedule's N steps, in float64; see `Sampler` for the names.

    Attributes:
      image_scale, noise_scale: [n], of an image that is noised to be what call i starts from.
    """

    timesteps: Num[np.ndarray, " n"]
    image_scale: Float64[np.ndarray, " n"]
    noise_scale: Float64[np.ndarray, " n"]
    step_x: Float64[np.ndarray, " n"]
    step_outputs: Float64[np.ndarray, "n K"]
    step_noise: Float64[np.ndarray, " n"] | None = None
    input_scale: Float64[np.ndarray, " n"] | float = 1.0
    output_x: Float64[np.ndarray, " n"] | float = 0.0
    output_prediction: Float64[np.ndarray, " n"] | float = 1.0
    pure_noise_scale: float = 1.0


class State(NamedTuple):
    """State of a sampler between two calls of the network: all that the next step depends on; a pytree.

    Attributes:
      latents: x_i, [B, h, w, C] float32.
      outputs: The outputs m_{i-1}, m_{i-2}, ... that a multistep sampler goes on using: K - 1 arrays like the
        latents, zeros for calls before the first. Empty for the samplers whose latents are the whole state.
    """

    latents: Float32[Array, "*n B h w C"]
    outputs: tuple[Float32[Array, "*n B h w C"], ...] = ()


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

    timesteps: Num[Array | np.ndarray, " n"]
    pure_noise_scale: Float[ArrayLike, ""]
    image_scale: Float[ArrayLike, ""]
    noise_scale: Float[ArrayLike, ""]
    input_scale: Float32[Array | np.ndarray, " n"]
    output_x: Float32[Array | np.ndarray, " n"]
    output_prediction: Float32[Array | np.ndarray, " n"]
    step_x: Float32[Array | np.ndarray, " n"]
    step_outputs: Float32[Array | np.ndarray, "n K"]
    step_noise: Float32[Array | np.ndarray, " n"] | None
    strength: float = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_table(cls, table: CoefficientTable, first: int, strength: float) -> "Sampler":
        """Returns the rows of a table from row `first` on, in float32."""

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

    def start(
        self,
        noise: Float[Array | np.ndarray, "B h w C"],
        image_latents: Float[Array | np.ndarray, "B h w C"] | None = None,
    ) -> State:
        """Returns the state before the first call.

        Args:
          noise: [B, h, w, C], standard normal.
          image_latents: The image to start from, in UNet units, of the same shape; None starts from noise.

        Returns:
          Latents at the first timestep; with an image what StableDiffusionImg2ImgPipeline's `prepare_latents`
          gives, which keeps a trace of the image even at strength 1.

        Raises:
          UserError: There is no image and the strength is below 1.
        """
        noise = jnp.asarray(noise, jnp.float32)
        if image_latents is not None:
            image = jnp.asarray(image_latents, jnp.float32)
            x = jnp.asarray(self.image_scale * image + self.noise_scale * noise)
        elif self.strength < 1:
            raise UserError(f"strength = {self.strength}: needs an image to start from; without one it is 1")
        else:
            x = jnp.asarray(self.pure_noise_scale * noise)
        return State(x, (jnp.zeros_like(x),) * (self.step_outputs.shape[1] - 1))

    def transition(
        self, predict: Predict, state: State, i: Int[ArrayLike, "*calls"]
    ) -> tuple[State, Float32[Array, "*calls"]]:
        """Returns mean and standard deviation of the state after call i, given the state before it.

        The latents after the call are Gaussian, x_{i+1} = mean.latents + deviation z_i; the outputs kept
        after it are `mean.outputs`, whatever z_i is. `run`, `rollout`, log-probabilities and gradients are
        all built on this function. To differentiate by parameters, let `predict` close over them.

        Args:
          predict: The network, called once; guidance, if any, is applied inside.
          state: From `start`, `rollout`, or this function with noise added to the mean's latents.
          i: From 0 to n - 1; a scalar, or one for each image, as in training on steps drawn at random.

        Returns:
          The mean, a state like the one given; and the deviation, of the shape of i, which is 0 for steps
          without noise: all of a deterministic sampler's, and a last step that ends at the clean image.
        """
        i = jnp.asarray(i)

        def row(column: ArrayLike, like: jax.Array | None = None) -> jax.Array:
            values = jnp.take(column, i, axis=0, mode="clip")
            return values if like is None else values.reshape(i.shape + (1,) * (like.ndim - i.ndim))

        x = state.latents
        prediction = predict(row(self.input_scale, x) * x, row(self.timesteps)).astype(jnp.float32)
        output = row(self.output_x, x) * x + row(self.output_prediction, x) * prediction
        outputs = (output, *state.outputs)
        x = row(self.step_x, x) * x
        for k, output in enumerate(outputs):
            x += row(self.step_outputs[:, k], x) * output
        deviation = jnp.zeros(i.shape, jnp.float32) if self.step_noise is None else row(self.step_noise)
        return State(x, outputs[:-1]), deviation

    def run(self, predict: Predict, state: State, noise: Noise | None = None) -> Float32[Array, "B h w C"]:
        """Takes every step. `predict` is traced once.

        Args:
          predict: The network; see `transition`.
          state: From `start`.
          noise: Only a sampler with `step_noise` calls it, and only that one needs it.

        Returns:
          Clean latents, in UNet units; bit for bit the last ones of `rollout`.

        Raises:
          ValueError: The sampler adds noise and there is none.
        """
        step = self._step(predict, noise)
        state, _ = jax.lax.scan(lambda state, i: (step(state, i), None), state, self._calls)
        return state.latents

    def rollout(self, predict: Predict, state: State, noise: Noise | None = None) -> State:
        """Takes every step as `run` does, and keeps all states.

        Returns:
          The states with a leading axis of n + 1: latents [n + 1, B, h, w, C] from `state`'s to the clean
          ones. `jax.tree.map(lambda leaf: leaf[i], states)` is the state before call i.

        Raises:
          ValueError: The sampler adds noise and there is none.
        """
        step = self._step(predict, noise)

        def keep(state: State, i: jax.Array) -> tuple[State, State]:
            state = step(state, i)
            return state, state

        _, states = jax.lax.scan(keep, state, self._calls)
        return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), state, states)

    @property
    def kept(self) -> Float32[Array, " n"]:
        """[n], d x_{i+1} / d x_i where the prediction is a constant; of samplers without earlier outputs."""
        return jnp.asarray(self.step_x) + jnp.asarray(self.step_outputs)[:, 0] * jnp.asarray(self.output_x)

    @property
    def _calls(self) -> jax.Array:
        return jnp.arange(self.timesteps.shape[0], dtype=jnp.int32)

    def _step(self, predict: Predict, noise: Noise | None) -> Callable[[State, jax.Array], State]:
        """Makes one step as a function of the state and of the call's number."""
        if self.step_noise is not None and noise is None:
            raise ValueError("noise = None: this sampler adds noise at every step; pass noise(i)")

        def step(state: State, i: jax.Array) -> State:
            state, deviation = self.transition(predict, state, i)
            if noise is not None and self.step_noise is not None:
                state = state._replace(latents=state.latents + deviation * noise(i).astype(jnp.float32))
            return state

        return step
