"""The one attention call of the project. Every backend stands behind it; the plain one is the oracle.

Which one computes a call is decided when a program is traced, by `choose`. The environment variable
DSPO_ATTENTION overrules it.
"""

import functools
import os

import jax
import jax.numpy as jnp

from dspo_jax import sharding, spelling
from dspo_jax.models import flash

# Each kernel's platform, and what it is there.
PLATFORMS = {"cudnn": "gpu", "flash": "tpu"}
BACKENDS = ("plain", *PLATFORMS)
VARIABLE = "DSPO_ATTENTION"

# Fewer keys than these are left to the plain backend: their products are smaller than what a kernel's
# padding to 128 adds.
_FEWEST_KEYS = 64

# Products of queries and keys, for each head, that are in memory at a time: 16 MiB in float32.
_AT_A_TIME = 2**22


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool = False,
    visible: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with a float32 softmax.

    Long sequences are worked through in parts, whose weights are computed again in the backward pass: for
    Stable Diffusion 1.5 at 512 pixels the weights of one layer and one image are half a gigabyte.

    Args:
      query: [B, T, H, D].
      key: [B, S, H, D].
      value: [B, S, H, D].
      causal: position t attends to positions s <= t only (needs T == S).
      visible: [B, S] bool, the positions that are attended to, at least one of each row; None for all.

    Returns:
      [B, T, H, D] in the dtype of `value`.

    Raises:
      ValueError: DSPO_ATTENTION names no backend, or one that the program's device does not have.
    """
    backend = choose(
        sharding.target(query.shape[0]),
        query.shape,
        key.shape[1],
        query.dtype,
        causal=causal,
        masked=visible is not None,
        wanted=os.environ.get(VARIABLE),
    )
    if backend == "cudnn":
        return sharding.split_over_heads(flash.cudnn_attention, query, key, value)
    if backend == "flash":
        return sharding.split_over_heads(flash.splash_attention, query, key, value)
    return plain_attention(query, key, value, causal=causal, visible=visible)


def choose(
    target: sharding.Target | None,
    query: tuple[int, ...],
    keys: int,
    dtype: jax.typing.DTypeLike,
    *,
    causal: bool = False,
    masked: bool = False,
    wanted: str | None = None,
) -> str:
    """Which of `BACKENDS` computes a call.

    Args:
      target: what the program is for, or None where no kernel can be called.
      query: shape of the queries, [B, T, H, D].
      keys: their number S.
      dtype: of all three.
      causal, masked: as the call asks.
      wanted: a backend that takes every call it can compute; None leaves the choice to the rule.

    Raises:
      ValueError: `wanted` is unknown, or the kernel of another platform.
    """
    if wanted is not None and wanted not in BACKENDS:
        raise ValueError(spelling.unknown(VARIABLE, wanted, BACKENDS))
    if target is None:
        return "plain"
    if wanted in PLATFORMS and PLATFORMS[wanted] != target.platform:
        raise ValueError(
            f"{VARIABLE}={wanted}: is a kernel for {PLATFORMS[wanted]}, and this program is for "
            f"{target.platform} ({target.kind}); unset it, or set it to plain"
        )
    # Masks are for text, whose 77 tokens the plain backend computes at no cost worth a kernel. In float32 are
    # the rewards and the VAE, whose figures must not depend on the device.
    possible = not (causal or masked) and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if target.platform == "gpu":
        return "cudnn" if possible and _cudnn_takes(target, query) and wanted != "plain" else "plain"
    if target.platform == "tpu":
        return "flash" if possible and wanted != "plain" else "plain"
    return "plain"


def _cudnn_takes(target: sharding.Target, query: tuple[int, ...]) -> bool:
    """What JAX requires of GPU and head: Ampere, and for more than 128 Hopper."""
    largest = 256 if target.capability >= (9, 0) else 128
    return target.capability >= (8, 0) and query[-1] <= largest


def plain_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool = False,
    visible: jax.Array | None = None,
) -> jax.Array:
    """`attention` written out; the oracle of the other backends."""
    parts = -(-query.shape[1] * key.shape[1] // _AT_A_TIME)
    if causal or parts == 1:
        return _attend(query, key, value, visible, causal=causal)
    attend = jax.checkpoint(functools.partial(_attend, causal=False))
    return jnp.concatenate(
        [attend(part, key, value, visible) for part in jnp.array_split(query, parts, axis=1)], axis=1
    )


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array | None, *, causal: bool
) -> jax.Array:
    scale = query.shape[-1] ** -0.5
    logits_BHTS = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32) * scale
    if causal:
        visible_TS = jnp.tril(jnp.ones(logits_BHTS.shape[-2:], bool))
        logits_BHTS = jnp.where(visible_TS[None, None], logits_BHTS, jnp.finfo(jnp.float32).min)
    if visible is not None:
        logits_BHTS = jnp.where(visible[:, None, None, :], logits_BHTS, jnp.finfo(jnp.float32).min)
    weights_BHTS = jax.nn.softmax(logits_BHTS, axis=-1).astype(value.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights_BHTS, value)
