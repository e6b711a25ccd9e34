"""The kind of device a program is traced for, and kernels on each device of its mesh."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
from jax.sharding import Mesh, PartitionSpec

from dspo_jax.parallel.mesh import BATCH_SPEC, MESH_AXES

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class DeviceKind(NamedTuple):
    """The kind of device that a program is compiled for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: JAX's `device_kind`, such as "TPU v5" or "NVIDIA H100 80GB HBM3".
      capability: CUDA's compute capability, (9, 0) of an H100; (0, 0) of anything else.
    """

    platform: str
    kind: str
    capability: tuple[int, int] = (0, 0)


def on_mesh(f: Callable[Arguments, Result], mesh: Mesh) -> Callable[Arguments, Result]:
    """Wraps `f` so that it is traced for the devices of a mesh, which need not be there.

    `current_device_kind` and `split_over_heads` see that mesh. The result is the same; outside of `jax.jit`
    nothing changes.
    """

    @functools.wraps(f)
    def traced(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*args, **kwargs)

    return traced


def current_device_kind(batch: int) -> DeviceKind | None:
    """Returns the kind of device that the program being traced is for: of the mesh, else the only device.

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
    return device_kind_of(device)


def device_kind_of(device: Any) -> DeviceKind:
    """Returns the kind of a device, or of a mesh's `abstract_device`."""
    capability = (0, 0)
    if device.platform == "gpu":
        # A mesh in use does not tell it, and GPUs that are not there are not compiled for.
        found = re.fullmatch(r"(\d+)\.(\d+)", jax.local_devices(backend="gpu")[0].compute_capability)
        capability = (int(found[1]), int(found[2])) if found else capability
    return DeviceKind(device.platform, device.device_kind, capability)


def split_over_heads(f: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Computes `f(*arrays)`, each device of the mesh on its part; for kernels, which XLA does not partition.

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
