"""LoRA: low-rank matrices beside the kernels of chosen layers (Hu et al. 2021, arXiv 2106.09685).

An adapter is part of a parameter tree. Where `lora_A.kernel` and `lora_B.kernel` lie beside the `kernel` of a
linear layer or a convolution, the layer gives y + lora_B(lora_A(x)); these are PEFT's names. PEFT's factor
of what is added, alpha / rank, is no part of the layer: a run trains and keeps PEFT's A and B, and `scaled`
multiplies B before the networks see it. A tree without adapters is the base model, and one whose `lora_B` is
zero computes the same.

Where `lora_magnitude_vector` lies beside them, too, the adapter is DoRA's (Liu et al. 2024, arXiv 2402.09353,
Eq. 5): the layer's kernel is W + A B with each output's column brought to the length m of that output,
m (W + A B) / ||W + A B||. No gradient flows through the length (section 4.3), as in PEFT.

Where `lora_dropout` lies beside them, too, elements of the adapter's input are dropped (PEFT's lora_dropout):
y + lora_B(lora_A(dropped(x))). It is there in the policy's forward pass in training alone (`with_dropout`).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import KeyPath
from jaxtyping import Key, PyTree

from dspo_jax.errors import UserError
from dspo_jax.models import quantized

Params = dict[str, Any]

_A, _B = ".lora_A.kernel", ".lora_B.kernel"
_MAGNITUDE = ".lora_magnitude_vector"
_KEYS, _RATE = ".lora_dropout.keys", ".lora_dropout.rate"


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


class Adapter(NamedTuple):
    """Form of a layer's adapter.

    Attributes:
      rank: r.
      dropout: whether elements of its input are dropped.
      magnitude: whether it is DoRA's.
    """

    rank: int
    dropout: bool = False
    magnitude: bool = False


class _Dropout(nnx.Module):
    """Drops elements at random with a probability p and multiplies the others by 1 / (1 - p).

    What is dropped follows from the keys of the examples, whatever devices or parts a batch is split over.
    """

    def __init__(self) -> None:
        self.keys = nnx.Param(jax.random.split(jax.random.key(0), 1))
        self.rate = nnx.Param(jnp.zeros(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B n, ...], n rows of each of the B examples whose keys these are -> the same shape."""
        keys, rate = self.keys[...], self.rate[...]
        rows = len(x) // len(keys)
        of_rows = jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows)))(keys)
        keep = partial(jax.random.bernoulli, p=1 - rate, shape=x.shape[1:])
        kept = jax.vmap(keep)(of_rows.reshape(-1))
        return jnp.where(kept, x * (1 / (1 - rate)).astype(x.dtype), jnp.zeros((), x.dtype))


def _lengths(kernel: jax.Array, lora_A: jax.Array, lora_B: jax.Array) -> jax.Array:
    """Returns the Euclidean length of each output's column of W + A B, [out] float32."""
    kernel, a, b = (matrix.astype(jnp.float32) for matrix in (kernel, lora_A, lora_B))
    columns = kernel.reshape(-1, kernel.shape[-1]) + a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[-2:])
    return jnp.sqrt(jnp.square(columns).sum(0))


def _adapt(
    layer: "_LoRALinear | LoRAConv", out: jax.Array, x: jax.Array, run: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Returns the output of a layer with its adapter; `out` is that of `run`, the layer without, for `x`."""
    kept = layer.lora_dropout(x) if layer.lora_dropout else x
    added = layer.lora_B(layer.lora_A(kept))
    if layer.lora_magnitude_vector is None:
        return out + added
    kernels = (quantized.dequantize(each.kernel[...]) for each in (layer, layer.lora_A, layer.lora_B))
    lengths = jax.lax.stop_gradient(_lengths(*kernels))
    lengths = jnp.where(lengths == 0, 1.0, lengths)  # a column of zeros stays one
    factor = jnp.expand_dims(layer.lora_magnitude_vector[...] / lengths, range(out.ndim - 1))
    base = run(kept) if layer.lora_dropout else out
    if layer.bias is not None:
        base = base - jnp.expand_dims(layer.bias[...], range(out.ndim - 1))
    # As in PEFT dropout is of all that the adapter changes, and `out` is whole.
    return out + (factor - 1).astype(out.dtype) * base + factor.astype(out.dtype) * added


def _magnitude(form: Adapter, outputs: int) -> nnx.Param | None:
    return nnx.Param(jnp.ones(outputs)) if form.magnitude else None


class _LoRALinear(nnx.Linear):
    def __init__(self, base: nnx.Linear, form: Adapter, rngs: nnx.Rngs):
        inputs, outputs = base.in_features, base.out_features
        dot = base.dot_general
        super().__init__(inputs, outputs, use_bias=base.use_bias, dot_general=dot, rngs=rngs)
        self.lora_A = nnx.Linear(inputs, form.rank, use_bias=False, dot_general=dot, rngs=rngs)
        self.lora_B = nnx.Linear(form.rank, outputs, use_bias=False, dot_general=dot, rngs=rngs)
        self.lora_dropout = _Dropout() if form.dropout else None
        self.lora_magnitude_vector = _magnitude(form, outputs)

    def __call__(
        self, inputs: jax.Array, out_sharding: NamedSharding | PartitionSpec | None = None
    ) -> jax.Array:
        return _adapt(self, super().__call__(inputs, out_sharding), inputs, super().__call__)


class LoRAConv(nnx.Conv):
    """A convolution with an adapter."""

    def __init__(self, base: nnx.Conv, form: Adapter, rngs: nnx.Rngs):
        window: Any = {"kernel_size": base.kernel_size, "strides": base.strides, "padding": base.padding}
        how: Any = {"conv_general_dilated": base.conv_general_dilated}
        inputs, outputs = base.in_features, base.out_features
        super().__init__(inputs, outputs, use_bias=base.use_bias, rngs=rngs, **window, **how)
        self.lora_A = nnx.Conv(inputs, form.rank, use_bias=False, rngs=rngs, **window, **how)
        self.lora_B = nnx.Conv(form.rank, outputs, (1, 1), use_bias=False, rngs=rngs, **how)
        self.lora_dropout = _Dropout() if form.dropout else None
        self.lora_magnitude_vector = _magnitude(form, outputs)

    def adapt(self, out: jax.Array, inputs: jax.Array) -> jax.Array:
        """Returns the output with the adapter; `out` is that of the convolution without it."""
        return _adapt(self, out, inputs, super().__call__)

    def __call__(
        self, inputs: jax.Array, out_sharding: NamedSharding | PartitionSpec | None = None
    ) -> jax.Array:
        return self.adapt(super().__call__(inputs, out_sharding), inputs)


def attach(module: nnx.Module, adapters: Mapping[str, Adapter], rngs: nnx.Rngs) -> None:
    """Puts layers with adapters in the place of those at the dotted paths `adapters`."""
    for path, form in adapters.items():
        *parents, last = path.split(".")
        parent: PyTree = module
        for name in parents:
            parent = parent[int(name)] if name.isdigit() else getattr(parent, name)
        layer = parent[int(last)] if last.isdigit() else getattr(parent, last)
        adapted = (LoRAConv if isinstance(layer, nnx.Conv) else _LoRALinear)(layer, form, rngs)
        if last.isdigit():
            parent[int(last)] = adapted
        else:
            setattr(parent, last, adapted)


def find_ranks(params: Params) -> dict[str, int]:
    """Returns path of each layer that has an adapter in `params` -> its rank."""
    leaves = flatten_dict(params, sep=".")
    return {path.removesuffix(_A): leaf.shape[-1] for path, leaf in leaves.items() if path.endswith(_A)}


def find_adapters(params: Params) -> dict[str, Adapter]:
    """Returns path of each layer that has an adapter in `params` -> its form."""
    leaves = flatten_dict(params, sep=".")
    return {
        path: Adapter(rank, dropout=path + _KEYS in leaves, magnitude=path + _MAGNITUDE in leaves)
        for path, rank in find_ranks(params).items()
    }


def with_dropout(params: Params, rate: float, keys: Key[jax.Array, " B"]) -> Params:
    """Adds dropout to each adapter, with keys of its own.

    Args:
      params: as the networks take them.
      rate: probability that an element of an adapter's input is dropped.
      keys: one for each example; the networks' inputs must have a multiple of B rows, those of an example
        following each other.
    """
    added: dict[str, jax.Array] = {}
    for number, path in enumerate(sorted(find_ranks(params))):
        added[path + _KEYS] = jax.vmap(lambda key, number=number: jax.random.fold_in(key, number))(keys)
        added[path + _RATE] = jnp.asarray(rate, jnp.float32)
    return combine(params, unflatten_dict(added, sep="."))


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


def is_magnitude(path: KeyPath) -> bool:
    """Tells whether a leaf is DoRA's magnitudes, which are float32 whatever the other parameters are."""
    return "." + jax.tree_util.keystr(path[-1:], simple=True) == _MAGNITUDE


def find_magnitudes(params: Params, scale: Scale) -> Params:
    """Computes the lengths of the columns of adapted kernels, which DoRA's magnitudes begin as.

    Args:
      params: kernels and adapters.
      scale: of the adapters.

    Returns:
      A tree of `lora_magnitude_vector` alone.
    """
    leaves = flatten_dict(scaled(params, scale), sep=".")
    return unflatten_dict(
        {
            path + _MAGNITUDE: _lengths(
                quantized.dequantize(leaves[f"{path}.kernel"]), leaves[path + _A], leaves[path + _B]
            )
            for path in find_ranks(params)
        },
        sep=".",
    )


def combine(base: Params, other: Params) -> Params:
    """Merges two trees; where both have a leaf, that of `other` is taken."""
    return unflatten_dict(flatten_dict(base) | flatten_dict(other))


def fold(weight: np.ndarray, added: np.ndarray, magnitude: np.ndarray | None) -> np.ndarray:
    """Returns weight + added, of DoRA with the weights of each output brought to the length of its magnitude.

    Args:
      weight, added: [out, ...] float32, as torch has them.
      magnitude: [out], or None.
    """
    folded = weight + added
    if magnitude is None:
        return folded
    lengths = np.sqrt(np.square(folded, dtype=np.float64).reshape(len(folded), -1).sum(1))
    lengths[lengths == 0] = 1  # a column of zeros stays one
    factor = (np.float64(magnitude) / lengths).astype(np.float32)
    return folded * factor.reshape(-1, *(1 for _ in folded.shape[1:]))


def product(lora_A: np.ndarray, lora_B: np.ndarray) -> np.ndarray:
    """Computes the matrix that an adapter adds to its layer's kernel, float32, in the kernel's shape."""
    a, b = (np.asarray(matrix, np.float32) for matrix in (lora_A, lora_B))
    return (a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[-2:])).reshape(*a.shape[:-1], b.shape[-1])
