"""The devices of a run as one mesh, and batches on it. Model code names no mesh axis.

The axes: `data` splits the batch only, `fsdp` splits the batch and the parameters, `tensor` splits single
layers where a rule says so.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from dspo_jax import spelling
from dspo_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")


BATCH_SPEC = PartitionSpec(("data", "fsdp"))


def cpu_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cpu_cores(batch_size: int = 0) -> None:
    """Makes a device of each CPU core, up to 8 and a power of two; call it before anything asks for a device.

    XLA keeps little more than one core busy with one device; each of several works on its part of a batch.
    What the user has set (`XLA_FLAGS`, `JAX_NUM_CPU_DEVICES`) stays. Accelerators are not affected.

    Args:
      batch_size: which the devices must be able to split evenly; 0 where any number of them can be used.
    """
    set_by_user = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not set_by_user and "JAX_NUM_CPU_DEVICES" not in os.environ:
        devices = 2 ** int(math.log2(min(cpu_cores(), 8)))
        jax.config.update("jax_num_cpu_devices", math.gcd(devices, batch_size))


def make_mesh(
    sizes: Mapping[str, int],
    devices: Sequence[jax.Device] | None = None,
    dcn_sizes: Mapping[str, int] | None = None,
) -> Mesh:
    """Arranges the devices as a mesh with the axes `data`, `fsdp`, `tensor`.

    Args:
      sizes: size by axis name; an absent axis has size 1, one of them may be -1: all devices the others
        leave. Within a slice where there are several.
      devices: the devices to use; all of `jax.devices()` by default, over all processes.
      dcn_sizes: by axis name, how many slices lie along it, which the slower network connects: the axis gets
        the product of both sizes. A slice is one of several of TPUs, or else what one process holds. All 1,
        or None: the devices are taken as one slice.

    Raises:
      UserError: an unknown axis, a size that is no positive integer, or sizes whose product is not the
        number of devices or of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    if set((dcn_sizes or {}).values()) <= {1}:
        shape = _fill(sizes, len(devices), "config.mesh", "devices of this run")
        return jax.make_mesh(shape, MESH_AXES, axis_types=axis_types, devices=devices)
    return Mesh(arrange(sizes, devices, dcn_sizes or {}), MESH_AXES, axis_types=axis_types)


def arrange(
    sizes: Mapping[str, int], devices: Sequence[jax.Device], dcn_sizes: Mapping[str, int]
) -> np.ndarray:
    """Returns the devices of several slices as an array with the axes of `MESH_AXES`; see `make_mesh`."""
    slices = {getattr(device, "slice_index", None) for device in devices}
    by_process = len(slices) == 1
    count = len({device.process_index for device in devices} if by_process else slices)
    dcn_shape = _fill(dcn_sizes, count, "config.mesh.dcn", "processes" if by_process else "slices")
    shape = _fill(sizes, len(devices) // count, "config.mesh", "devices of each slice")
    return mesh_utils.create_hybrid_device_mesh(
        shape, dcn_shape, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )


def _fill(sizes: Mapping[str, int], available: int, key: str, of_what: str) -> list[int]:
    """Returns the sizes in the order of `MESH_AXES`, with -1 replaced, which must multiply to `available`."""
    for axis, size in sizes.items():
        if axis not in MESH_AXES:
            raise UserError(spelling.unknown(key, axis, MESH_AXES))
        if size != -1 and size < 1:
            raise UserError(f"{key}.{axis} = {size}: must be positive, or -1 for all devices that are left")
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    product = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, shape, strict=True))
    if shape.count(-1) > 1:
        raise UserError(f"{key} = {product}: only one axis can be -1")
    taken = math.prod(size for size in shape if size != -1)
    if -1 in shape and available % taken == 0:
        shape[shape.index(-1)] = available // taken
    if -1 in shape or math.prod(shape) != available:
        raise UserError(
            f"{key} = {product}: does not fit the {available} {of_what}; "
            "set one axis to -1 and the product of the others to a divisor of that"
        )
    return shape


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def on_own_devices(arrays: PyTree) -> tuple[Mesh, PyTree]:
    """Returns arrays of a run's mesh as whole arrays on those of its devices that are this process's.

    What is whole on every device is not copied; what the mesh splits is, by one program. Every process must
    call it alike.

    Args:
      arrays: on one mesh.

    Returns:
      (a mesh of the devices, with the axis "data" alone; the arrays on it).
    """
    mesh = jax.tree.leaves(arrays)[0].sharding.mesh
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    own = make_mesh({"data": len(devices)}, devices)

    leaves, structure = jax.tree.flatten(arrays)
    split = [number for number, leaf in enumerate(leaves) if not leaf.sharding.is_fully_replicated]
    if split:
        gather = jax.jit(lambda parts: parts, out_shardings=replicated(mesh))
        for number, whole in zip(split, gather([leaves[number] for number in split]), strict=True):
            leaves[number] = whole

    def view(array: jax.Array) -> jax.Array:
        parts = {shard.device: shard.data for shard in array.addressable_shards}
        return jax.make_array_from_single_device_arrays(
            array.shape, replicated(own), [parts[device] for device in devices]
        )

    return own, jax.tree.unflatten(structure, [view(leaf) for leaf in leaves])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array with the global batch as leading axis: over (`data`, `fsdp`)."""
    return NamedSharding(mesh, BATCH_SPEC)


def check_batch_size(batch_size: int, mesh: Mesh, key: str = "config.batch_size") -> None:
    """Refuses a global batch that the mesh cannot split evenly.

    Raises:
      UserError: names `key`, its value and the nearest values that fit.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % ways:
        below, above = batch_size // ways * ways, (batch_size // ways + 1) * ways
        nearest = f"{below} or {above}" if below > 0 else str(above)
        raise UserError(
            f"{key} = {batch_size}: not a multiple of {ways}, the ways the mesh splits a batch "
            f"(data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}); nearest: {nearest}"
        )


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Returns the part of every batch that this process reads: (its number, of how many).

    Processes whose devices differ along `tensor` alone read the same part.

    Raises:
      UserError: the devices of a process do not lie together along the batch.
    """
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])  # one for each part of the batch
    parts: dict[int, list[int]] = {}
    for row, devices in enumerate(rows):
        for process in {device.process_index for device in devices}:
            parts.setdefault(process, []).append(row)
    mine = parts[jax.process_index()]
    size = len(mine)
    if any(len(part) != size or part[0] % size or part[-1] - part[0] != size - 1 for part in parts.values()):
        raise UserError(
            f"config.mesh = {dict(mesh.shape)}: the devices of a process do not lie together along the "
            "batch; make `tensor` a divisor or a multiple of the devices of a process"
        )
    return mine[0] // size, len(rows) // size


def shard_batch(batch: Mapping[str, PyTree], mesh: Mesh) -> dict[str, Any]:
    """Puts this process's part of a batch on its devices as global arrays, split over (`data`, `fsdp`).

    Args:
      batch: arrays, or trees of them, with the part that `batch_share` names as leading axis (the whole batch
        when there is one process).
      mesh: from `make_mesh`.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), dict(batch))


def read_share(array: jax.Array) -> np.ndarray:
    """Returns this process's part of an array that is split over (`data`, `fsdp`) as `shard_batch` does."""
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate(jax.device_get([parts[start] for start in sorted(parts)]))
