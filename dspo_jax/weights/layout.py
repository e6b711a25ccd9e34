"""safetensors <-> parameter tree: one table of names and axes that drives both directions.

A parameter's path is its state-dict name except for the last part (`kernel`, `scale` and `embedding` are
torch's `weight`), and kernels are transposed. These are the only differences.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

from dspo_jax.errors import UserError
from dspo_jax.models.model import Model, Params
from dspo_jax.weights.tensors import Tensor

# How torch stores each kind of leaf: (last part of its path, axes) -> (torch's name, order of the axes).
_LAYOUT: dict[tuple[str, int], tuple[str, tuple[int, ...]]] = {
    ("kernel", 4): ("weight", (3, 2, 0, 1)),  # convolution: HWIO -> OIHW
    ("kernel", 2): ("weight", (1, 0)),  # linear: IO -> OI
    ("scale", 1): ("weight", (0,)),  # norm
    ("embedding", 2): ("weight", (0, 1)),
    ("bias", 1): ("bias", (0,)),
    ("lora_magnitude_vector", 1): ("lora_magnitude_vector", (0,)),  # DoRA
    # BLIP's image encoder.
    ("cls_token", 3): ("cls_token", (0, 1, 2)),
    ("pos_embed", 3): ("pos_embed", (0, 1, 2)),
    # CLIP, which keeps these outside any layer.
    ("class_embedding", 1): ("class_embedding", (0,)),
    ("logit_scale", 0): ("logit_scale", ()),
}


DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": jax.numpy.dtype("bfloat16"),
}


def flatten(params: Params) -> dict[str, PyTree]:
    """Returns a nested tree as {"a.b.c": leaf}."""
    return traverse_util.flatten_dict(params, sep=".")


def unflatten(leaves: Mapping[str, PyTree]) -> Params:
    """Returns the inverse of `flatten`."""
    return traverse_util.unflatten_dict(leaves, sep=".")


def leaf_tensors(params: Params) -> dict[str, Tensor]:
    """Returns the leaves of a tree in memory, by path."""

    def tensor(leaf: np.ndarray | jax.Array) -> Tensor:
        return Tensor(tuple(leaf.shape), np.dtype(leaf.dtype), lambda: np.asarray(leaf))

    return {path: tensor(leaf) for path, leaf in flatten(params).items()}


def torch_layout(path: str, ndim: int) -> tuple[str, tuple[int, ...]]:
    """Returns torch's name of the leaf at `path`, which has `ndim` axes, and their order there."""
    parent, dot, leaf = path.rpartition(".")
    name, axes = _LAYOUT[leaf, ndim]
    return f"{parent}{dot}{name}", axes


def torch_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Lists name and shape of each of a model's tensors, as torch has them, buffers included."""
    shapes = {}
    for path, leaf in flatten(model.abstract_params()).items():
        name, axes = torch_layout(path, len(leaf.shape))
        shapes[name] = tuple(leaf.shape[axis] for axis in axes)
    return shapes | model.buffer_shapes()


def to_torch(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts leaves of a parameter tree, by path, to torch's names and layout."""

    def transposed(leaf: Tensor, axes: tuple[int, ...]) -> Tensor:
        shape = tuple(leaf.shape[axis] for axis in axes)
        return Tensor(shape, leaf.dtype, lambda: leaf.read().transpose(axes))

    layouts = {path: torch_layout(path, len(leaf.shape)) for path, leaf in leaves.items()}
    return {name: transposed(leaves[path], axes) for path, (name, axes) in layouts.items()}


def cast(name: str, tensor: Tensor, dtype: np.dtype, file: Path) -> Tensor:
    """Casts a tensor when it is read; a value that does not fit is refused with the name `file`."""

    def read() -> np.ndarray:
        value = tensor.read()
        with np.errstate(over="ignore"):
            stored = value.astype(dtype, copy=False)
        if not np.isfinite(stored.astype(np.float32, copy=False)).all():
            overflows = np.isfinite(value.astype(np.float32, copy=False)).all()
            fault = f"overflows {dtype}; use float32 or bfloat16" if overflows else "is not finite"
            raise UserError(f"{file}: tensor {name} {fault}")
        return stored

    return Tensor(tensor.shape, dtype, read)
