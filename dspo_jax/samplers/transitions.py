"""The density of a sampler's step: what a policy gradient or a preference over trajectories needs of it."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def log_probability(
    latents: Float[Array, "B h w C"],
    mean: Float[Array, "B h w C"],
    deviation: Float[Array, "*calls"],
) -> Float32[Array, " B"]:
    """Computes the log-probability of reaching latents by a step of `Sampler.transition`.

    It is the density of the Gaussian, summed over the D = h w C numbers of an image's latents, as DDPO (Black
    et al. 2023) and DPOK (Fan et al. 2023) print it; their released code takes the mean, smaller by D.

        sum of -(x - mean)^2 / (2 deviation^2) - log deviation - log(2 pi) / 2

    Args:
      latents: x_{i+1}, which was reached. A policy gradient takes it as data: `jax.lax.stop_gradient` where
        it depends on the parameters.
      mean: `mean.latents` of the step.
      deviation: Of the step; a scalar, or one for each image. A step whose deviation is 0 has no density and
        gives NaN: leave it out.

    Returns:
      [B], in nats.
    """
    deviation = jnp.asarray(deviation, jnp.float32).reshape(-1, 1, 1, 1)
    z = (latents.astype(jnp.float32) - mean) / deviation
    return jnp.sum(-0.5 * jnp.square(z) - jnp.log(deviation) - 0.5 * math.log(2 * math.pi), axis=(1, 2, 3))
