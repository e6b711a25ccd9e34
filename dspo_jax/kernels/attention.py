"""The one attention call of the project. Every backend stands behind it; the plain one is the oracle.

`choose` decides which backend computes a call, when a program is traced. The environment variable
DSPO_ATTENTION overrules it.
"""

import functools
import os

import jax
import jax.numpy as jnp

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.kernels import flash
from dspo_jax.kernels.device_kind import DeviceKind, current_device_kind, split_over_heads

BACKENDS = ("plain", "cudnn", "flash")
VARIABLE = "DSPO_ATTENTION"

# Least number of queries and of keys for the TPU's kernel. It needs each head's numbers side by side, and to
# rearrange them costs more than to write few products. By
# `python -m benchmarks.attention --topology=v5p:2x2x1`, plain is better at 256 and the kernel at 1,024.
_FEWEST_ON_TPU = 512

# Products of queries and keys in memory at a time, for each head: 16 MiB in float32.
_AT_A_TIME = 2**22


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool = False,
    visible: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Computes scaled dot-product attention with a float32 softmax.

    Long sequences are worked through in parts, whose weights are computed again in the backward pass: for
    Stable Diffusion 1.5 at 512 pixels the weights of one layer and one image are half a gigabyte.

    Args:
      query: [B, T, H, D].
      key: [B, S, H, D].
      value: [B, S, H, D].
      causal: position t attends to positions s <= t only (needs T == S).
      visible: [B, S] bool, the positions that are attended to, at least one of each row; None for all.
      bias: [H, T, S] float32, added to the scaled products; None for none.

    Returns:
      [B, T, H, D] in the dtype of `value`.

    Raises:
      UserError: DSPO_ATTENTION names no backend, or one that the program's device does not have.
    """
    backend = choose(
        current_device_kind(query.shape[0]),
        query.shape,
        key.shape[1],
        jnp.result_type(query, key, value),
        causal=causal,
        masked=visible is not None or bias is not None,
        wanted=os.environ.get(VARIABLE),
    )
    if backend == "cudnn":
        return split_over_heads(flash.cudnn_attention, query, key, value)
    if backend == "flash":
        return split_over_heads(flash.splash_attention, query, key, value)
    return plain_attention(query, key, value, causal=causal, visible=visible, bias=bias)


def choose(
    kind: DeviceKind | None,
    query: tuple[int, ...],
    keys: int,
    dtype: jax.typing.DTypeLike,
    *,
    causal: bool = False,
    masked: bool = False,
    wanted: str | None = None,
) -> str:
    """Chooses which of `BACKENDS` computes a call.

    Args:
      kind: what the program is for, or None where no kernel can be called.
      query: shape of the queries, [B, T, H, D].
      keys: number S of keys.
      dtype: of all three.
      causal, masked: as the call asks; a bias is a mask too.
      wanted: the backend of every call that it can compute; None leaves the choice to the rule.

    Raises:
      UserError: `wanted` is unknown, or no kernel of the device.
    """
    if wanted is not None and wanted not in BACKENDS:
        raise UserError(spelling.unknown(VARIABLE, wanted, BACKENDS))
    if kind is None:
        return "plain"
    kernel = _kernel_of(kind)
    if wanted not in (None, "plain", kernel):
        instead = " or ".join(filter(None, ("plain", kernel)))
        raise UserError(
            f"{VARIABLE}={wanted}: is no kernel for {kind.kind} ({kind.platform}); set it to {instead}, "
            "or unset it"
        )
    # Masks are for text, whose 77 tokens are too little work for a kernel.
    if kernel is None or wanted == "plain" or causal or masked or not _takes(kernel, kind, query[3], dtype):
        return "plain"
    # Nothing of the kind was measured for cuDNN, which rearranges nothing.
    if wanted is None and kernel == "flash" and min(query[1], keys) < _FEWEST_ON_TPU:
        return "plain"
    return kernel


def _kernel_of(kind: DeviceKind) -> str | None:
    """Names the kernel of a device; cuDNN's needs Ampere or later, and AMD's GPUs have no such number."""
    if kind.platform == "tpu":
        return "flash"
    return "cudnn" if kind.capability >= (8, 0) else None


def _takes(kernel: str, kind: DeviceKind, head: int, dtype: jax.typing.DTypeLike) -> bool:
    """Returns whether a kernel computes such heads. Float32 (the rewards) must not depend on the device."""
    if kernel == "flash":
        return dtype == jnp.bfloat16 and head <= 256
    # By cuDNN's table of what its backward pass supports. JAX lets 256 pass after Hopper too.
    hopper = (9, 0) <= kind.capability < (10, 0)
    return dtype in (jnp.bfloat16, jnp.float16) and head <= (256 if hopper else 128)


def plain_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool = False,
    visible: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Computes `attention` written out; the oracle of the other backends."""
    parts = -(-query.shape[1] * key.shape[1] // _AT_A_TIME)
    if causal or parts == 1:
        return _attend(query, key, value, visible, bias, causal=causal)
    attend = jax.checkpoint(functools.partial(_attend, causal=False))
    queries = jnp.array_split(query, parts, axis=1)
    biases = [None] * parts if bias is None else jnp.array_split(bias, parts, axis=1)
    return jnp.concatenate(
        [attend(part, key, value, visible, of) for part, of in zip(queries, biases, strict=True)], axis=1
    )


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array | None,
    bias: jax.Array | None,
    *,
    causal: bool,
) -> jax.Array:
    scale = query.shape[-1] ** -0.5
    logits_BHTS = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits_BHTS += bias[None]
    if causal:
        visible_TS = jnp.tril(jnp.ones(logits_BHTS.shape[-2:], bool))
        logits_BHTS = jnp.where(visible_TS[None, None], logits_BHTS, jnp.finfo(jnp.float32).min)
    if visible is not None:
        logits_BHTS = jnp.where(visible[:, None, None, :], logits_BHTS, jnp.finfo(jnp.float32).min)
    weights_BHTS = jax.nn.softmax(logits_BHTS, axis=-1).astype(value.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights_BHTS, value)
