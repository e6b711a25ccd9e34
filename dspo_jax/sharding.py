"""Where every array lives: one mesh, and ordered rules over parameter paths that split the arrays over it.

Model code names no mesh axis. The axes: `data` splits the batch only, `fsdp` splits the batch and the
parameters, `tensor` splits single layers where a rule says so.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dspo_jax import spelling

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = PartitionSpec(("data", "fsdp"))

Rule = tuple[str, PartitionSpec]


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices as a mesh with the axes `data`, `fsdp`, `tensor`.

    Args:
      sizes: size by axis name; an absent axis has size 1, one of them may be -1: all devices the others
        leave.
      devices: the devices to use; all of `jax.devices()` by default, over all processes.

    Raises:
      ValueError: an unknown axis, a size that is no positive integer, or sizes whose product is not the
        number of devices.
    """
    devices = jax.devices() if devices is None else devices
    for axis, size in sizes.items():
        if axis not in MESH_AXES:
            raise ValueError(spelling.unknown("config.mesh", axis, MESH_AXES))
        if size != -1 and size < 1:
            raise ValueError(
                f"config.mesh.{axis} = {size}: must be positive, or -1 for all devices that are left"
            )
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    product = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, shape, strict=True))
    if shape.count(-1) > 1:
        raise ValueError(f"config.mesh = {product}: only one axis can be -1")
    taken = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % taken == 0:
        shape[shape.index(-1)] = len(devices) // taken
    if -1 in shape or math.prod(shape) != len(devices):
        raise ValueError(
            f"config.mesh = {product}: does not fit the {len(devices)} devices of this run; "
            "set one axis to -1 and the product of the others to a divisor of that"
        )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def make_shardings(tree: Any, mesh: Mesh, rules: Sequence[Rule] = ()) -> Any:
    """Chooses a sharding for every array of a tree by its path; the first rule that matches decides.

    An array that no rule matches is split over `fsdp` along its largest axis that divides evenly, or else
    replicated. Optimizer moments have their parameter's path as the end of their own, so the same rules split
    them alike.

    Args:
      tree: pytree of arrays or `jax.ShapeDtypeStruct`.
      mesh: from `make_mesh`.
      rules: (regular expression searched in the "."-joined path, PartitionSpec of the array).

    Returns:
      The same tree with a `NamedSharding` for every array.

    Raises:
      ValueError: a rule asks for a split that the array's shape does not allow.
    """

    def choose(path: tuple[Any, ...], array: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        for pattern, spec in rules:
            if re.search(pattern, name):
                _refuse_uneven_split(name, array.shape, pattern, spec, mesh)
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, _split_largest_axis(array.shape, mesh))

    return jax.tree_util.tree_map_with_path(choose, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose leading axis is the global batch: split over (`data`, `fsdp`)."""
    return NamedSharding(mesh, BATCH_SPEC)


def check_batch_size(batch_size: int, mesh: Mesh, key: str = "config.batch_size") -> None:
    """Refuses a global batch that the mesh cannot split evenly.

    Raises:
      ValueError: names `key`, its value and the nearest values that fit.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % ways:
        below, above = batch_size // ways * ways, (batch_size // ways + 1) * ways
        nearest = f"{below} or {above}" if below > 0 else str(above)
        raise ValueError(
            f"{key} = {batch_size}: not a multiple of {ways}, the ways the mesh splits a batch "
            f"(data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}); nearest: {nearest}"
        )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on its devices as global arrays, split over (`data`, `fsdp`).

    Args:
      batch: arrays with the process-local part of the batch as leading axis (the whole batch when there is
        one process).
      mesh: from `make_mesh`.
    """
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def _split_largest_axis(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    ways = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size and size % ways == 0]
    if ways == 1 or not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*(None,) * largest, "fsdp")


def _refuse_uneven_split(
    name: str, shape: tuple[int, ...], pattern: str, spec: PartitionSpec, mesh: Mesh
) -> None:
    if len(spec) > len(shape):
        raise ValueError(
            f"sharding rule {pattern!r}: {spec} has {len(spec)} axes, but {name} has shape {list(shape)}"
        )
    for size, axes in zip(shape, spec, strict=False):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        ways = math.prod(mesh.shape[axis] for axis in names)
        if size % ways:
            raise ValueError(
                f"sharding rule {pattern!r}: {spec} splits {name} of shape {list(shape)} unevenly: "
                f"{size} is not a multiple of {' x '.join(names)} = {ways}"
            )
