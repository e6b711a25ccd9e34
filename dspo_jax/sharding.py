"""Where every array lives: one mesh, and ordered rules over parameter paths that split the arrays over it.

Model code names no mesh axis. The axes: `data` splits the batch only, `fsdp` splits the batch and the
parameters, `tensor` splits single layers where a rule says so.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dspo_jax import spelling

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = PartitionSpec(("data", "fsdp"))

Rule = tuple[str, PartitionSpec]
Result = TypeVar("Result")

# First match decides; an axis that does not divide is left whole. What enters a block of attention or
# feed-forward is split over its heads or hidden units, and what leaves it along the same axis, so that one
# sum over `tensor` is all the communication of a block (Shoeybi et al. 2019, "Megatron-LM", section 3). What
# no rule names is split over `fsdp` alone.
RULES: tuple[Rule, ...] = (
    # The UNet's attention and feed-forward; CLIP's.
    (r"(to_[qkv]|ff\.net\.0\.proj)\.kernel$", PartitionSpec("fsdp", "tensor")),
    (r"(to_out\.0|ff\.net\.2)\.kernel$", PartitionSpec("tensor", "fsdp")),
    (r"([qkv]_proj|fc1)\.kernel$", PartitionSpec("fsdp", "tensor")),
    (r"(out_proj|fc2)\.kernel$", PartitionSpec("tensor", "fsdp")),
    (r"(ff\.net\.0\.proj|[qkv]_proj|fc1)\.bias$", PartitionSpec("tensor")),
    # Gathering what is so small costs more than holding it.
    (r"\.(bias|scale)$", PartitionSpec()),
)


def cpu_cores() -> int:
    """How many cores this process may use."""
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
      ValueError: an unknown axis, a size that is no positive integer, or sizes whose product is not the
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
    """The devices of several slices as an array with the axes of `MESH_AXES`; see `make_mesh`."""
    slices = {getattr(device, "slice_index", None) for device in devices}
    by_process = len(slices) == 1
    count = len({device.process_index for device in devices} if by_process else slices)
    dcn_shape = _fill(dcn_sizes, count, "config.mesh.dcn", "processes" if by_process else "slices")
    shape = _fill(sizes, len(devices) // count, "config.mesh", "devices of each slice")
    return mesh_utils.create_hybrid_device_mesh(
        shape, dcn_shape, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )


def _fill(sizes: Mapping[str, int], available: int, key: str, of_what: str) -> list[int]:
    """The sizes in the order of `MESH_AXES`, with -1 replaced, which must multiply to `available`."""
    for axis, size in sizes.items():
        if axis not in MESH_AXES:
            raise ValueError(spelling.unknown(key, axis, MESH_AXES))
        if size != -1 and size < 1:
            raise ValueError(f"{key}.{axis} = {size}: must be positive, or -1 for all devices that are left")
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    product = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, shape, strict=True))
    if shape.count(-1) > 1:
        raise ValueError(f"{key} = {product}: only one axis can be -1")
    taken = math.prod(size for size in shape if size != -1)
    if -1 in shape and available % taken == 0:
        shape[shape.index(-1)] = available // taken
    if -1 in shape or math.prod(shape) != available:
        raise ValueError(
            f"{key} = {product}: does not fit the {available} {of_what}; "
            "set one axis to -1 and the product of the others to a divisor of that"
        )
    return shape


def make_shardings(tree: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> Any:
    """Chooses a sharding for every array of a tree by its path; the first rule that matches decides.

    An axis that a rule would split unevenly stays whole. An array that no rule matches, or that has fewer
    axes than the rule, is split over `fsdp` along its largest axis that divides evenly, or else replicated.
    Optimizer moments have their parameter's path as the end of their own, so the same rules split them alike.

    Args:
      tree: pytree of arrays or `jax.ShapeDtypeStruct`.
      mesh: from `make_mesh`.
      rules: (regular expression searched in the "."-joined path, PartitionSpec of the array).

    Returns:
      The same tree with a `NamedSharding` for every array.
    """

    return jax.tree_util.tree_map_with_path(
        lambda path, array: NamedSharding(mesh, _choose(path, array.shape, mesh, rules)), tree
    )


def _choose(
    path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Sequence[Rule]
) -> PartitionSpec:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    for pattern, spec in rules:
        if re.search(pattern, name) and len(spec) <= len(shape):
            return _keep_even_splits(shape, spec, mesh)
    return _split_largest_axis(shape, mesh)


def gather(params: Any) -> Any:
    """Parameters as layers use them: whole along `fsdp`, in the program that is being traced for a mesh.

    Left to itself, XLA rather gathers the images of all devices before a convolution whose kernel is split.
    The gradients are split again, as `RULES` say.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1:
        return params

    def use(path: tuple[Any, ...], array: jax.Array) -> jax.Array:
        split = _choose(path, array.shape, mesh, RULES)
        if "fsdp" not in split:
            return array
        whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in split))
        constrain = jax.lax.with_sharding_constraint
        used = jax.custom_vjp(lambda array: constrain(array, NamedSharding(mesh, whole)))
        used.defvjp(
            lambda array: (used(array), None),
            lambda _, gradient: (constrain(gradient, NamedSharding(mesh, split)),),
        )
        return used(array)

    return jax.tree_util.tree_map_with_path(use, params)


class Target(NamedTuple):
    """The kind of device that a program is compiled for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: JAX's `device_kind`, such as "TPU v5" or "NVIDIA H100 80GB HBM3".
      capability: CUDA's compute capability, (9, 0) of an H100; (0, 0) of anything else.
    """

    platform: str
    kind: str
    capability: tuple[int, int] = (0, 0)


def on_mesh(f: Callable[..., Result], mesh: Mesh) -> Callable[..., Result]:
    """`f`, traced for the devices of a mesh, which need not be there: `target` and `split_over_heads` see it.

    What it computes is the same. Outside of `jax.jit` it makes no difference.
    """

    @functools.wraps(f)
    def traced(*args: Any, **kwargs: Any) -> Result:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*args, **kwargs)

    return traced


def target(batch: int) -> Target | None:
    """What the program that is being traced is for: a device of the mesh of `on_mesh`, else the only one.

    None where no kernel can be called for a batch of that size: the mesh does not split it evenly or is none
    of `make_mesh`, several devices are there and no mesh is in use, or `jax.default_device` says that the
    program is for another.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device: Any = mesh.abstract_device
    if not mesh.empty:
        ours = mesh.axis_names == MESH_AXES
        if device is None or not ours or batch % (mesh.shape["data"] * mesh.shape["fsdp"]):
            return None
    else:
        settings: Any = jax.config
        if settings.jax_default_device is not None or jax.device_count() > 1:
            return None
        device = jax.devices()[0]
    return target_of(device)


def target_of(device: Any) -> Target:
    """A device as a `Target`; a mesh's `abstract_device` too."""
    capability = (0, 0)
    if device.platform == "gpu":
        # A mesh in use does not tell it, and GPUs that are not there are not compiled for.
        found = re.fullmatch(r"(\d+)\.(\d+)", jax.local_devices(backend="gpu")[0].compute_capability)
        capability = (int(found[1]), int(found[2])) if found else capability
    return Target(device.platform, device.device_kind, capability)


def split_over_heads(f: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`f(*arrays)`, each device of the mesh in use on its part; for kernels, which XLA does not partition.

    Args:
      f: of arrays [B, T, H, D], treats each example and head on its own, and returns such an array.
      *arrays: [B, T, H, D]; the mesh splits B evenly, and H, or every device along `tensor`
        has all heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return f(*arrays)
    heads = "tensor" if arrays[0].shape[2] % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(*BATCH_SPEC, None, heads)
    # The kernels do not say which axes their results vary over.
    return jax.shard_map(f, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False)(*arrays)


def place(tree: Any, shardings: Any) -> Any:
    """Host arrays as global arrays: each device is given its part, and none ever holds more.

    With several processes each has the same whole arrays on the host.
    """

    def put(array: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def bytes_per_device(tree: Any) -> int:
    """What one device holds of a tree of arrays, or of `jax.ShapeDtypeStruct` with a sharding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def replicated_bytes(tree: Any) -> tuple[int, str]:
    """Of the same, what every device holds whole: its bytes, and the path of the largest such array."""
    whole = [
        (leaf.size * leaf.dtype.itemsize, jax.tree_util.keystr(path, simple=True, separator="."))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if leaf.sharding.is_fully_replicated
    ]
    return sum(size for size, _ in whole), max(whole, default=(0, ""))[1]


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


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads: (its number, of how many).

    Processes whose devices differ along `tensor` alone read the same part.

    Raises:
      ValueError: the devices of a process do not lie together along the batch.
    """
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])  # one for each part of the batch
    parts: dict[int, list[int]] = {}
    for row, devices in enumerate(rows):
        for process in {device.process_index for device in devices}:
            parts.setdefault(process, []).append(row)
    mine = parts[jax.process_index()]
    size = len(mine)
    if any(len(part) != size or part[0] % size or part[-1] - part[0] != size - 1 for part in parts.values()):
        raise ValueError(
            f"config.mesh = {dict(mesh.shape)}: the devices of a process do not lie together along the "
            "batch; make `tensor` a divisor or a multiple of the devices of a process"
        )
    return mine[0] // size, len(rows) // size


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on its devices as global arrays, split over (`data`, `fsdp`).

    Args:
      batch: arrays with the part that `batch_share` names as leading axis (the whole batch when there is one
        process).
      mesh: from `make_mesh`.
    """
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def _split_largest_axis(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    ways = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size and size % ways == 0]
    if ways == 1 or not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*(None,) * largest, "fsdp")


def _keep_even_splits(
    shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    return PartitionSpec(
        *(
            axis if axis is None or size % mesh.shape[axis] == 0 else None
            for size, axis in zip(shape, spec, strict=False)
        )
    )
