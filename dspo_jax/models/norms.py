"""Normalisation layers: statistics in float32, the result in the dtype of the input."""

import jax
import jax.numpy as jnp
from flax import nnx

from dspo_jax.kernels import cpu, gpu


class GroupNorm(nnx.Module):
    """Group normalisation over positions and the channels of a group, in float32.

    In float32 two passes, as torch: the variance is taken about the mean. Of a bfloat16 input the mean of
    squares is taken beside the mean, which a TPU's program does while it writes the layer before: what that
    cancels in float32 is below what rounding the input did. Channels are combined by their means and
    variances (Chan et al. 1983), so that only a channel's own mean cancels.

    Positions are reduced first and channels grouped after, which leaves the large array in its own layout: on
    a CPU the other order is slower.

    What is added to all positions first is added here, where the array is read anyway: XLA's program for a
    GPU would write it out as large as the image, for cuDNN to add.
    """

    def __init__(self, channels: int, groups: int, epsilon: float):
        self.groups = groups
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array, shift_BC: jax.Array | None = None) -> jax.Array:
        """[B, h, w, C], plus `shift_BC` if it is given -> [B, h, w, C] in the dtype of `x`."""
        groups = self.groups

        def group_mean(means_BC: jax.Array) -> jax.Array:
            if cpu.is_for_cpu(means_BC.shape[0]):
                return cpu.group_mean(means_BC, groups)
            means_BGc = means_BC.reshape(means_BC.shape[0], groups, -1)
            return jnp.broadcast_to(means_BGc.mean(-1, keepdims=True), means_BGc.shape).reshape(
                means_BC.shape
            )

        x_BPC = x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.float32)
        if shift_BC is not None:
            x_BPC += shift_BC[:, None].astype(jnp.float32)
        channel_BC = x_BPC.mean(1)
        mean_BC = group_mean(channel_BC)
        centred_BPC = x_BPC - mean_BC[:, None]
        if x.dtype == jnp.float32:
            variance_BC = group_mean(jnp.square(centred_BPC).mean(1))
        else:
            within_BC = jnp.maximum(jnp.square(x_BPC).mean(1) - jnp.square(channel_BC), 0.0)
            variance_BC = group_mean(within_BC + jnp.square(channel_BC - mean_BC))
        inverse_B1C = jax.lax.rsqrt(variance_BC + self.epsilon)[:, None]
        scale_11C, bias_11C = (
            param[...][None, None].astype(jnp.float32) for param in (self.scale, self.bias)
        )
        return (centred_BPC * (inverse_B1C * scale_11C) + bias_11C).reshape(x.shape).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`layer_norm` with a trained scale and bias."""

    def __init__(self, features: int, epsilon: float = 1e-5):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., features] -> [..., features] in the dtype of `x`."""
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Normalises the last axis; the variance is computed as `GroupNorm`'s is.

    Args:
      x: [..., C].
      scale, bias: [C].
      epsilon: is added to the variance.

    Returns:
      [..., C] in the dtype of `x`.
    """
    scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
    if x.dtype != jnp.float32 and gpu.is_for_gpu(x.shape[0]):
        return gpu.layer_norm(x, scale, bias, epsilon)
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    centred = wide - mean
    if x.dtype == jnp.float32:
        variance = jnp.square(centred).mean(-1, keepdims=True)
    else:
        variance = jnp.maximum(jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
    leading = tuple(range(x.ndim - 1))
    scale, bias = (jnp.expand_dims(vector, leading) for vector in (scale, bias))
    return (centred * (jax.lax.rsqrt(variance + epsilon) * scale) + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Divides the last axis by its root mean square (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, features: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., features] -> [..., features] in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        scale = jnp.expand_dims(self.scale[...].astype(jnp.float32), tuple(range(x.ndim - 1)))
        return (wide * inverse * scale).astype(x.dtype)
