"""Samplers: from noise to latents, each as one `lax.scan` over the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspo_jax import spelling
from dspo_jax.schedule import Schedule

TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")


def ddim_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `ddim` that a diffusers `scheduler_config.json` fixes.

    Args:
      config: The parsed file, of any scheduler class. Keys it lacks take the defaults of `ddim`.

    Raises:
      ValueError: The config asks for something that is not supported; the message names the key and value.
    """
    for key, why in (
        ("clip_sample", "latents are not bounded by 1, so clipping x_0 would distort them"),
        ("thresholding", "dynamic thresholding is for pixels, not latents"),
    ):
        if config.get(key):
            raise ValueError(
                f"scheduler config: {key} = {config[key]!r}: not supported ({why}); set it to false"
            )
    keys = ("timestep_spacing", "steps_offset", "set_alpha_to_one")
    settings = {key: config[key] for key in keys if key in config}
    _check_spacing(settings.get("timestep_spacing", "leading"))
    return settings


def spaced_timesteps(
    num_train_timesteps: int,
    num_inference_steps: int,
    *,
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
) -> np.ndarray:
    """The timesteps at which a sampler calls the network, in the order of the calls.

    Args:
      num_train_timesteps: T of the schedule.
      num_inference_steps: N, at most T.
      timestep_spacing: "leading", "trailing" or "linspace" (Lin et al. 2023, Table 2).
      steps_offset: Added to every timestep of "leading"; the other spacings ignore it, as in diffusers.

    Returns:
      [N] int32, decreasing.

    Raises:
      ValueError: Unknown spacing, N out of range, or an offset that leaves the schedule.
    """
    _check_spacing(timestep_spacing)
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps = {num_inference_steps}: "
            f"must be between 1 and the schedule's {num_train_timesteps}"
        )
    timesteps: np.ndarray
    if timestep_spacing == "leading":
        timesteps = (
            num_train_timesteps // num_inference_steps * np.arange(num_inference_steps)[::-1] + steps_offset
        )
    elif timestep_spacing == "trailing":
        stride = num_train_timesteps / num_inference_steps
        # N indices rather than a float range: the range can yield an N + 1st element by rounding.
        timesteps = np.round(num_train_timesteps - stride * np.arange(num_inference_steps)) - 1
    else:
        timesteps = np.linspace(0, num_train_timesteps - 1, num_inference_steps).round()[::-1]
    if timesteps[-1] < 0 or timesteps[0] >= num_train_timesteps:
        raise ValueError(
            f"steps_offset = {steps_offset}: with num_inference_steps = {num_inference_steps} "
            f"it moves timesteps outside 0..{num_train_timesteps - 1}; lower one of the two"
        )
    return timesteps.astype(np.int32)


def ddim(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    latents: jax.Array,
    schedule: Schedule,
    *,
    num_inference_steps: int,
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
) -> jax.Array:
    """Deterministic DDIM (Song et al. 2021, Eq. 12, eta = 0), step for step as diffusers' `DDIMScheduler`.

    Args:
      predict: `(x_t, t) -> prediction` of the schedule's type and of the shape of x_t, with t an int32
        scalar; guidance, if any, is applied inside.
      latents: [B, h, w, C], standard normal noise.
      schedule: The forward process that the network was trained under.
      num_inference_steps: N, the number of calls of `predict`.
      timestep_spacing: See `spaced_timesteps`.
      steps_offset: See `spaced_timesteps`.
      set_alpha_to_one: Whether the last step goes all the way to x_0, or only to the noise level of timestep
        0 (Stable Diffusion's choice).

    Returns:
      [B, h, w, C] float32.

    Raises:
      ValueError: As `spaced_timesteps`.
    """
    timesteps = spaced_timesteps(
        schedule.num_train_timesteps,
        num_inference_steps,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
    )
    # As diffusers: a fixed stride down, which where N does not divide T is not quite the next timestep.
    previous = timesteps - schedule.num_train_timesteps // num_inference_steps
    alphas_cumprod = jnp.asarray(schedule.alphas_cumprod)
    final = 1.0 if set_alpha_to_one else alphas_cumprod[0]
    alphas_previous = jnp.where(previous >= 0, alphas_cumprod[np.maximum(previous, 0)], final)

    def step(x: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
        t, alpha_previous = inputs
        prediction = predict(x, t).astype(jnp.float32)
        x0, epsilon = schedule.to_x0(prediction, x, t), schedule.to_epsilon(prediction, x, t)
        return jnp.sqrt(alpha_previous) * x0 + jnp.sqrt(1 - alpha_previous) * epsilon, None

    x, _ = jax.lax.scan(step, latents.astype(jnp.float32), (timesteps, alphas_previous))
    return x


def _check_spacing(timestep_spacing: str) -> None:
    if timestep_spacing not in TIMESTEP_SPACINGS:
        raise ValueError(spelling.unknown("timestep_spacing", str(timestep_spacing), TIMESTEP_SPACINGS))
