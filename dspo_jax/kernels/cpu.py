"""Layers in the forms that XLA compiles well for a CPU: the same sums as the plain ones, but for rounding.

Programs of other devices are untouched. docs/cpu.md has what each form saves.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dspo_jax.kernels.device_kind import current_device_kind

_IMAGES = ("NHWC", "HWIO", "NHWC")
_Two = tuple[int, int]


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
    """Computes `jax.lax.conv_general_dilated` of images, with no dilation and one group.

    A kernel of one position becomes a product of matrices: as a convolution, its gradient has the whole image
    for its window. Any other gets gradients of its own.

    Args:
      x: [B, H, W, C].
      kernel: [h, w, C, O].
      strides: of both axes.
      padding: (before, after) of both axes.
      **settings: of other devices' programs.

    Returns:
      [B, H', W', O].
    """
    if not is_for_cpu(x.shape[0]):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **settings)
    if kernel.shape[:2] == (1, 1) and tuple(strides) == (1, 1):
        out = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel[0, 0], (((1,), (0,)), ((), ())))
        return out.reshape(*x.shape[:-1], -1)
    return _convolve(x, kernel, tuple(strides), tuple(map(tuple, padding)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, strides: _Two, padding: tuple[_Two, _Two]) -> jax.Array:
    """A convolution whose gradients are convolutions in the order of axes that XLA is fast in.

    JAX writes them in other orders. XLA puts those right, but not inside loops (github.com/jax-ml/jax/issues/
    12868), such as that over the parts of a batch: there the kernel's gradient took 29 times as long.
    """
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_IMAGES)


def _forward(
    x: jax.Array, kernel: jax.Array, strides: _Two, padding: tuple[_Two, _Two]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, kernel, strides, padding), (x, kernel)


def _backward(
    strides: _Two, padding: tuple[_Two, _Two], arrays: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = arrays
    before, after, ends = [], [], []
    for axis, (stride, (low, _)) in enumerate(zip(strides, padding, strict=True)):
        size, window = x.shape[1 + axis], kernel.shape[axis]
        reach = (gradient.shape[1 + axis] - 1) * stride + 1  # of the windows' first positions
        before.append((window - 1 - low, size + low - reach))
        last = window - 1 + reach - size - low  # negative where no window reaches the end
        after.append((low, max(last, 0)))
        ends.append(size + min(last, 0))
    turned_hwOC = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    of_x = jax.lax.conv_general_dilated(
        gradient, turned_hwOC, (1, 1), before, lhs_dilation=strides, dimension_numbers=_IMAGES
    )
    x_CHWB = x[:, : ends[0], : ends[1]].transpose(3, 1, 2, 0)
    gradient_HWBO = gradient.transpose(1, 2, 0, 3)
    of_kernel_ChwO = jax.lax.conv_general_dilated(
        x_CHWB, gradient_HWBO, (1, 1), after, rhs_dilation=strides, dimension_numbers=_IMAGES
    )
    return of_x, of_kernel_ChwO.transpose(1, 2, 0, 3)


_convolve.defvjp(_forward, _backward)


def group_mean(x: jax.Array, groups: int) -> jax.Array:
    """Averages [B, C] over each channel's group, as a product of matrices.

    Written as a mean and a broadcast it ends up in the loops over the image that read it, where each element
    divides to find its group, and none of them is vectorised.
    """
    size = x.shape[-1] // groups
    members = jnp.repeat(jnp.eye(groups, dtype=x.dtype), size, axis=0)
    return (x @ members / size) @ members.T
