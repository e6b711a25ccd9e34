"""Layers in the forms that XLA compiles well for a CPU: the same sums as the plain ones, but for rounding.

Programs of other devices are untouched. docs/cpu.md has what each form saves.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dspo_jax.kernels.device_kind import current_device_kind


def is_for_cpu(batch: int) -> bool:
    """Returns whether the program that is being traced, over so many examples, is for a CPU."""
    device = current_device_kind(batch)
    return device is not None and device.platform == "cpu"


def dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, **settings: Any) -> jax.Array:
    """Computes `jax.lax.dot_general` of a linear layer in two dimensions.

    With more, the kernel's gradient contracts several at once, for which whole arrays are transposed slowly.
    """
    if x.ndim == 2 or not is_for_cpu(x.shape[0]):
        return jax.lax.dot_general(x, kernel, dimensions, **settings)
    flat = x.reshape(-1, x.shape[-1])
    out = jax.lax.dot_general(flat, kernel, (((1,), (0,)), ((), ())), **settings)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def convolve(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **settings: Any) -> jax.Array:
    """Computes `jax.lax.conv_general_dilated`; of a kernel of one position as a product of matrices.

    As a convolution, the kernel's gradient has the whole image for its window.
    """
    if kernel.shape[:2] == (1, 1) and tuple(strides) == (1, 1) and is_for_cpu(x.shape[0]):
        out = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel[0, 0], (((1,), (0,)), ((), ())))
        return out.reshape(*x.shape[:-1], -1)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **settings)


def group_mean(x: jax.Array, groups: int) -> jax.Array:
    """Averages [B, C] over each channel's group, as a product of matrices.

    Written as a mean and a broadcast it ends up in the loops over the image that read it, where each element
    divides to find its group, and none of them is vectorised.
    """
    size = x.shape[-1] // groups
    members = jnp.repeat(jnp.eye(groups, dtype=x.dtype), size, axis=0)
    return (x @ members / size) @ members.T
