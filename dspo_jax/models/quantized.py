"""Frozen kernels in int8: one byte a number, and a float32 scale for each output.

A column of a kernel, the weights of one output, is kept as round(w / s) with s = max |w| / 127.5, as
`qwix.quantize` does it (symmetric, channelwise). A layer turns its kernel back into numbers of the dtype that
it computes in each time it runs, forward or backward, so that few kernels are whole at a time.
"""

import functools
import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.tree_util import KeyPath

from dspo_jax.errors import UserError

KINDS = ("int8",)
"""Names of the ways to store a kernel, by `config.reference_dtype`."""

# The ends of a network (its first and last layers, the embedding of the time) are small, and what is rounded
# there is felt most: it would be a quarter of the error of the emoji model's prediction.
_IN_A_BLOCK = re.compile(
    r"(^|\.)(down_blocks|mid_block|up_blocks|transformer_blocks|layers|block)\..*\.kernel$"
)


def import_qwix(kind: str) -> Any:
    """Returns the package qwix, which the config asks for by a kind of `KINDS`.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module("qwix")
    except ImportError as error:
        raise UserError(
            f"config.reference_dtype = {kind!r}: needs the package qwix: pip install 'dspo_jax[quant]'"
        ) from error


def is_quantized(leaf: object) -> bool:
    """Tells whether a leaf of a parameter tree is a `qwix.QArray`: `qvalue`, and `scale` of each output."""
    return hasattr(leaf, "qvalue")


def is_stored_so(path: KeyPath) -> bool:
    """Tells whether a parameter is a kernel inside one of a network's blocks; others are not quantized."""
    return _IN_A_BLOCK.search(jax.tree_util.keystr(path, simple=True, separator=".")) is not None


@functools.partial(jax.jit, static_argnames="kind")
def quantize(kernel: Any, kind: str) -> Any:
    """Returns a `qwix.QArray` of a kernel [..., in, out], with a float32 scale [1, ..., 1, out].

    Args:
      kernel: an array.
      kind: one of `KINDS`.
    """
    qwix = import_qwix(kind)
    outputs = (kernel.ndim - 1,)
    return qwix.quantize(kernel.astype(jnp.float32), jnp.dtype(kind), channelwise_axes=outputs)


def dequantize(leaf: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Returns a kernel in a dtype, rounded once; what is not quantized is cast alone."""
    if not is_quantized(leaf):
        return leaf.astype(dtype)
    return (leaf.qvalue.astype(jnp.float32) * leaf.scale).astype(dtype)


def run(op: Callable[[jax.Array, Any], jax.Array], x: jax.Array, kernel: Any) -> jax.Array:
    """Returns `op(x, kernel)`, whose kernel may be quantized, which is a constant then.

    Nothing is kept for the backward pass but the quantized kernel.

    Args:
      op: linear in x.
      x: input of the layer.
      kernel: an array or a `qwix.QArray`.
    """
    if not is_quantized(kernel):
        return op(x, kernel)
    dtype = x.dtype
    shape = jax.ShapeDtypeStruct(x.shape, dtype)

    @jax.custom_vjp
    def layer(x: jax.Array, kernel: Any) -> jax.Array:
        return op(x, _dequantize_after(x, kernel, dtype))

    def forward(x: jax.Array, kernel: Any) -> tuple[jax.Array, Any]:
        return layer(x, kernel), kernel

    def backward(kernel: Any, gradient: jax.Array) -> tuple[jax.Array, None]:
        weights = _dequantize_after(gradient, kernel, dtype)
        (of_x,) = jax.linear_transpose(lambda x: op(x, weights), shape)(gradient)
        return of_x, None

    layer.defvjp(forward, backward)
    return layer(x, kernel)


def _dequantize_after(value: jax.Array, kernel: Any, dtype: Any) -> jax.Array:
    """Dequantizes behind a barrier, when `value` is there.

    Without it XLA makes one array for policy, backward pass and reference, and on a GPU or CPU keeps it.
    """
    _, kernel = jax.lax.optimization_barrier((value, kernel))
    return dequantize(kernel, dtype)


def find_quantized(params: dict[str, Any]) -> tuple[str, ...]:
    """Lists the dotted paths of the layers whose kernels are quantized."""
    leaves = flatten_dict(params, sep=".")
    return tuple(sorted(path.removesuffix(".kernel") for path, leaf in leaves.items() if is_quantized(leaf)))


def attach(module: nnx.Module, paths: Iterable[str]) -> None:
    """Lets the linear layers and convolutions at dotted paths take quantized kernels."""
    for path in paths:
        layer: Any = module
        for name in path.split("."):
            layer = layer[int(name)] if name.isdigit() else getattr(layer, name)
        layer.promote_dtype = functools.partial(_promote, layer.promote_dtype)
        if isinstance(layer, nnx.Conv):
            layer.conv_general_dilated = functools.partial(_run_layer, layer.conv_general_dilated)
        else:
            layer.dot_general = functools.partial(_run_layer, layer.dot_general)


def _promote(promote: Callable[..., Any], arrays: tuple[Any, Any, Any], dtype: Any = None) -> tuple[Any, ...]:
    x, kernel, bias = arrays
    x, bias = promote((x, bias), dtype=dtype)
    return x, kernel, bias


def _run_layer(op: Callable[..., jax.Array], x: jax.Array, kernel: Any, *how: Any, **more: Any) -> jax.Array:
    return run(lambda x, kernel: op(x, kernel, *how, **more), x, kernel)
