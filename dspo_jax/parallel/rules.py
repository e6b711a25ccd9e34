"""Sharding of parameters and optimizer states: ordered rules over the paths of arrays."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath
from jax.typing import ArrayLike
from jaxtyping import PyTree

from dspo_jax.parallel.host_memory import is_on_host

Rule = tuple[str, PartitionSpec]


# First match decides; an axis that does not divide is left whole. What enters a block of attention or
# feed-forward is split over its heads or hidden units, and what leaves it along the same axis, so that one
# sum over `tensor` is all the communication of a block (Shoeybi et al. 2019, "Megatron-LM", section 3). What
# no rule names is split over `fsdp` alone.
RULES: tuple[Rule, ...] = (
    # Attention and feed-forward of the UNet and the MMDiT; CLIP's, and the text's projections in the MMDiT.
    (r"(to_[qkv]|ff(_context)?\.net\.0\.proj)\.kernel$", PartitionSpec("fsdp", "tensor")),
    (r"(to_out\.0|to_add_out|ff(_context)?\.net\.2)\.kernel$", PartitionSpec("tensor", "fsdp")),
    (r"([qkv]_proj|fc1)\.kernel$", PartitionSpec("fsdp", "tensor")),
    (r"(out_proj|fc2)\.kernel$", PartitionSpec("tensor", "fsdp")),
    (r"(to_[qkv]|ff(_context)?\.net\.0\.proj|[qkv]_proj|fc1)\.bias$", PartitionSpec("tensor")),
    # What shifts, scales and gates the MMDiT's blocks: a third of its parameters.
    (r"norm1(_context)?\.linear\.kernel$", PartitionSpec("fsdp", "tensor")),
    # T5's attention and feed-forward, and its bias by distance, of which each head has its own.
    (r"(SelfAttention\.[qkv]|DenseReluDense\.wi_[01])\.kernel$", PartitionSpec("fsdp", "tensor")),
    (r"(SelfAttention\.o|DenseReluDense\.wo)\.kernel$", PartitionSpec("tensor", "fsdp")),
    (r"relative_attention_bias\.embedding$", PartitionSpec(None, "tensor")),
    (r"shared\.embedding$", PartitionSpec("tensor", "fsdp")),
    # Gathering what is so small costs more than holding it.
    (r"\.(bias|scale)$", PartitionSpec()),
)


def make_shardings(tree: PyTree, mesh: Mesh, rules: Sequence[Rule] = RULES) -> PyTree:
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
    path: KeyPath, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Sequence[Rule]
) -> PartitionSpec:
    # A quantized kernel (models/quantized.py) is split as the kernel is, and its scales as biases are.
    name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".qvalue")
    for pattern, spec in rules:
        if re.search(pattern, name) and len(spec) <= len(shape):
            return _keep_even_splits(shape, spec, mesh)
    return _split_largest_axis(shape, mesh)


def gather(params: PyTree) -> PyTree:
    """Gathers parameters along `fsdp` for the layers, in the program that is being traced for a mesh.

    Left to itself, XLA rather gathers the images of all devices before a convolution whose kernel is split.
    The gradients are split again, as `RULES` say.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1:
        return params

    def use(path: KeyPath, array: jax.Array) -> jax.Array:
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


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Puts host arrays on the devices as global arrays; each device is given its part, and never holds more.

    With several processes each has the same whole arrays on the host.
    """

    def put(array: ArrayLike, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def bytes_per_device(tree: PyTree) -> int:
    """Counts the bytes that one device holds of a tree of arrays or sharded `jax.ShapeDtypeStruct`."""
    return _bytes_of_parts([leaf for leaf in jax.tree.leaves(tree) if not is_on_host(leaf)])


def host_bytes_per_device(tree: PyTree) -> int:
    """Counts the bytes of a tree that lie in the host's memory for one device."""
    return _bytes_of_parts([leaf for leaf in jax.tree.leaves(tree) if is_on_host(leaf)])


def _bytes_of_parts(leaves: Sequence[Any]) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def replicated_bytes(tree: PyTree) -> tuple[int, str]:
    """Counts the bytes of arrays that every device holds whole, with the path of the largest such array."""
    whole = [
        (leaf.size * leaf.dtype.itemsize, jax.tree_util.keystr(path, simple=True, separator="."))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if leaf.sharding.is_fully_replicated and not is_on_host(leaf)
    ]
    return sum(size for size, _ in whole), max(whole, default=(0, ""))[1]


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
