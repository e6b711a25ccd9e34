"""The order in which arrays lie in a device's memory, where its libraries want another than JAX's."""

import re
from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh
from jaxtyping import PyTree

# Axes of a convolution's kernel [height, width, in, out] as cuDNN reads it: out, height, width, in, the last
# with its numbers side by side. Kernels that lie otherwise XLA rearranges in every step, gradients back, and
# it copies the updated parameters and moments into the donated ones.
_OF_CUDNN = Layout(major_to_minor=(3, 0, 1, 2))


def choose_formats(shapes: PyTree, shardings: PyTree, mesh: Mesh) -> PyTree:
    """Returns where arrays lie and in which order, as `jax.jit` and `jax.device_put` take it.

    Args:
      shapes: arrays or `jax.ShapeDtypeStruct`; those of four axes are kernels of convolutions or of their
        shape, as moments are.
      shardings: of each.
      mesh: the devices, which need not be there.

    Returns:
      A `Format` for each kernel where cuDNN convolves; for all other arrays and devices the sharding.
    """
    if not is_for_cudnn(mesh.devices.flat[0]):
        return shardings
    return jax.tree.map(
        lambda array, sharding: Format(_OF_CUDNN, sharding) if len(array.shape) == 4 else sharding,
        shapes,
        shardings,
    )


def is_for_cudnn(device: Any) -> bool:
    """Tells whether cuDNN convolves on a device: an NVIDIA GPU, whose capability is a number like 9.0."""
    capability = getattr(device, "compute_capability", "")
    return device.platform == "gpu" and re.fullmatch(r"\d+\.\d+", capability) is not None


def format_of(array: Any) -> Any:
    """Returns what `choose_formats` chose for a `jax.Array` or a `jax.ShapeDtypeStruct`."""
    layout = array.format.layout
    order = None if layout is None else layout.major_to_minor
    return (
        array.sharding if order in (None, tuple(range(len(array.shape)))) else Format(layout, array.sharding)
    )
