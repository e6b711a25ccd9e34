"""Layers in the forms that XLA compiles well for an NVIDIA GPU: the same sums, but for rounding.

Programs of other devices are untouched. docs/measurements.md has what each form saves.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from dspo_jax.kernels.device_kind import current_device_kind


def is_for_gpu(batch: int) -> bool:
    """Returns whether the program that is being traced, over so many examples, is for a GPU."""
    device = current_device_kind(batch)
    return device is not None and device.platform == "gpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*B C"], scale: Float32[Array, " C"], bias: Float32[Array, " C"], epsilon: float
) -> Float[Array, "*B C"]:
    """Normalises the last axis, and reads it once.

    With the mean of squares beside the mean, XLA would read it for the sums and then once more. Means that
    follow one another along a row it computes in one kernel, as it does a softmax, if nothing else needs
    them: so the backward pass, which reads the row in any case, computes its own.
    """
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + epsilon) * _row(scale, x) + _row(bias, x)).astype(x.dtype)


def _row(vector: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return layer_norm(x, scale, bias, epsilon), (x, scale)


def _backward(
    epsilon: float, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale = kept
    wide, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
    scaled = gradient * _row(scale, x)
    # Four sums along a row in one pass. What the variance cancels in float32 is below what rounding x did.
    mean, square, slope, product = (
        part.mean(-1, keepdims=True) for part in (wide, jnp.square(wide), scaled, scaled * wide)
    )
    inverse = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + epsilon)
    normed = (wide - mean) * inverse
    along = inverse * (product - mean * slope)
    rows = tuple(range(x.ndim - 1))
    of_x = inverse * (scaled - slope - normed * along)
    return of_x.astype(x.dtype), (gradient * normed).sum(rows), gradient.sum(rows)


layer_norm.defvjp(_forward, _backward)
