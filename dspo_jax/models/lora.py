"""LoRA: low-rank matrices beside the kernels of chosen layers (Hu et al. 2021, arXiv 2106.09685).

An adapter is part of a parameter tree. Where `lora_A.kernel` and `lora_B.kernel` lie beside the `kernel` of a
linear layer or a convolution, the layer gives y + lora_B(lora_A(x)); these are PEFT's names. PEFT's factor
of what is added, alpha / rank, is no part of the layer: a run trains and keeps PEFT's A and B, and `scaled`
multiplies B before the networks see it. A tree without adapters is the base model, and one whose `lora_B` is
zero computes the same.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from dspo_jax.errors import UserError

Params = dict[str, Any]

_A, _B = ".lora_A.kernel", ".lora_B.kernel"


@dataclasses.dataclass(frozen=True)
class Scale:
    """Factor of what adapters add: alpha / rank, or alpha / sqrt(rank) where it is rank-stabilised.

    The second is Kalajdzievski's (2023, arXiv 2312.03732), with which a higher rank learns no slower.

    Attributes:
      alpha: of every adapter; None is the rank of each.
      rank_stabilised: which of the two it is.
    """

    alpha: float | None = None
    rank_stabilised: bool = False

    def alpha_of(self, rank: int) -> float:
        """Returns alpha of an adapter of a rank."""
        return rank if self.alpha is None else self.alpha

    def of(self, rank: int) -> float:
        """Returns the factor of an adapter of a rank."""
        return self.alpha_of(rank) / (math.sqrt(rank) if self.rank_stabilised else rank)


class _LoRALinear(nnx.Linear):
    def __init__(self, base: nnx.Linear, rank: int, rngs: nnx.Rngs):
        inputs, outputs = base.in_features, base.out_features
        dot = base.dot_general
        super().__init__(inputs, outputs, use_bias=base.use_bias, dot_general=dot, rngs=rngs)
        self.lora_A = nnx.Linear(inputs, rank, use_bias=False, dot_general=dot, rngs=rngs)
        self.lora_B = nnx.Linear(rank, outputs, use_bias=False, dot_general=dot, rngs=rngs)

    def __call__(
        self, inputs: jax.Array, out_sharding: NamedSharding | PartitionSpec | None = None
    ) -> jax.Array:
        return super().__call__(inputs, out_sharding) + self.lora_B(self.lora_A(inputs))


class LoRAConv(nnx.Conv):
    """A convolution with an adapter."""

    def __init__(self, base: nnx.Conv, rank: int, rngs: nnx.Rngs):
        window: Any = {"kernel_size": base.kernel_size, "strides": base.strides, "padding": base.padding}
        form: Any = {"conv_general_dilated": base.conv_general_dilated}
        inputs, outputs = base.in_features, base.out_features
        super().__init__(inputs, outputs, use_bias=base.use_bias, rngs=rngs, **window, **form)
        self.lora_A = nnx.Conv(inputs, rank, use_bias=False, rngs=rngs, **window, **form)
        self.lora_B = nnx.Conv(rank, outputs, (1, 1), use_bias=False, rngs=rngs, **form)

    def adapt(self, inputs: jax.Array) -> jax.Array:
        """Computes the output of the adapter, which is added to the layer's."""
        return self.lora_B(self.lora_A(inputs))

    def __call__(
        self, inputs: jax.Array, out_sharding: NamedSharding | PartitionSpec | None = None
    ) -> jax.Array:
        return super().__call__(inputs, out_sharding) + self.adapt(inputs)


def attach(module: nnx.Module, ranks: Mapping[str, int], rngs: nnx.Rngs) -> None:
    """Puts layers with adapters in the place of those at the dotted paths `ranks`."""
    for path, rank in ranks.items():
        *parents, last = path.split(".")
        parent: PyTree = module
        for name in parents:
            parent = parent[int(name)] if name.isdigit() else getattr(parent, name)
        layer = parent[int(last)] if last.isdigit() else getattr(parent, last)
        adapted = (LoRAConv if isinstance(layer, nnx.Conv) else _LoRALinear)(layer, rank, rngs)
        if last.isdigit():
            parent[int(last)] = adapted
        else:
            setattr(parent, last, adapted)


def find_ranks(params: Params) -> dict[str, int]:
    """Returns path of each layer that has an adapter in `params` -> its rank."""
    leaves = flatten_dict(params, sep=".")
    return {path.removesuffix(_A): leaf.shape[-1] for path, leaf in leaves.items() if path.endswith(_A)}


def init_adapters(params: Params, targets: Sequence[str], rank: int, key: jax.Array) -> Params:
    """Draws fresh float32 adapters: A normal with deviation 1 / rank (PEFT's "gaussian"), B zero.

    Args:
      params: the base model's tree; only shapes are read.
      targets: regular expressions; a layer is adapted if one matches its path, or the end of it after a dot.
      rank: r of every adapter: A is [in, r], B [r, out]; of a k x k kernel [k, k, in, r], [1, 1, r, out].
      key: of the draw.

    Returns:
      A tree of adapters only.

    Raises:
      UserError: no layer matches.
    """
    pattern = re.compile(rf"(?:.*\.)?(?:{'|'.join(targets)})")
    layers = {
        path.removesuffix(".kernel"): leaf.shape
        for path, leaf in sorted(flatten_dict(params, sep=".").items())
        if path.endswith(".kernel")
    }
    chosen = {path: shape for path, shape in layers.items() if pattern.fullmatch(path)}
    if not chosen:
        raise UserError(
            f"{', '.join(targets)}: no layer matches; there are, for example, {_examples(layers)}"
        )
    adapters = {}
    for number, (path, (*window, inputs, outputs)) in enumerate(chosen.items()):
        draw = jax.random.normal(jax.random.fold_in(key, number), (*window, inputs, rank))
        adapters[path + _A] = draw / rank
        adapters[path + _B] = jnp.zeros((*(1 for _ in window), rank, outputs))
    return unflatten_dict(adapters, sep=".")


def _examples(layers: Mapping[str, object]) -> str:
    ends = dict.fromkeys(re.sub(r".*\.(?=[^.]*[a-z])", "", path) for path in layers)
    return ", ".join(list(ends)[:12])


def scaled(params: Params, scale: Scale) -> Params:
    """Multiplies the B of each adapter by its factor, in the dtype of B; a factor of 1 adds no operation."""

    def multiply(path: tuple[str, ...], leaf: Any) -> Any:
        if not ".".join(path).endswith(_B):
            return leaf
        factor = scale.of(leaf.shape[-2])
        return leaf if factor == 1 else leaf * np.asarray(factor, leaf.dtype)

    return unflatten_dict({path: multiply(path, leaf) for path, leaf in flatten_dict(params).items()})


def combine(base: Params, other: Params) -> Params:
    """Merges two trees; where both have a leaf, that of `other` is taken."""
    return unflatten_dict(flatten_dict(base) | flatten_dict(other))


def product(lora_A: np.ndarray, lora_B: np.ndarray) -> np.ndarray:
    """Computes the matrix that an adapter adds to its layer's kernel, float32, in the kernel's shape."""
    a, b = (np.asarray(matrix, np.float32) for matrix in (lora_A, lora_B))
    return (a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[-2:])).reshape(*a.shape[:-1], b.shape[-1])
