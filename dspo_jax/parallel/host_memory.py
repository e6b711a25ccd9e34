"""Arrays that lie in the host's memory between the moments at which a device reads them."""

from typing import Any

import jax
from jaxtyping import PyTree

from dspo_jax.errors import UserError

_KIND = "pinned_host"  # JAX's name of host memory that a device copies from by itself


def check_host_memory(device: Any) -> None:
    """Refuses a device beside which JAX knows no host memory, such as a GPU that is not here.

    Raises:
      UserError: JAX would leave the arrays on the device without a word.
    """
    if _KIND not in [memory.kind for memory in device.addressable_memories()]:
        raise UserError(
            f"config.offload: JAX knows no host memory beside {device.device_kind} here; leave it empty, "
            "also to plan for GPUs that are not here"
        )


def on_host(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Returns shardings of arrays with the host's memory in place of the device's.

    They lie there in JAX's order of axes. XLA would bring results into another (kernels/layouts.py) on the
    host, which is slow.

    Args:
      shapes: arrays or `jax.ShapeDtypeStruct`; a scalar stays on the device.
      shardings: of each.
    """
    return jax.tree.map(
        lambda array, sharding: sharding.with_memory_kind(_KIND) if array.shape else sharding,
        shapes,
        shardings,
    )


def is_on_host(array: Any) -> bool:
    """Tells whether a `jax.Array` or a `jax.ShapeDtypeStruct` with its sharding is of the host's memory."""
    return bool(array.sharding.memory_kind == _KIND)


def to_device(tree: PyTree) -> PyTree:
    """Copies arrays of the host's memory to the device's, in a program that is being traced or at once."""

    def copy(leaf: Any) -> Any:
        there = isinstance(leaf, jax.Array) and jax.typeof(leaf).memory_space == jax.memory.Space.Host
        return jax.device_put(leaf, jax.memory.Space.Device) if there else leaf

    return jax.tree.map(copy, tree)
