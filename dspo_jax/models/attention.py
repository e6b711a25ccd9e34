"""The one attention call of the project. Every backend stands behind it; the plain one is the oracle."""

import jax
import jax.numpy as jnp


def attention(query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool = False) -> jax.Array:
    """Scaled dot-product attention with a float32 softmax.

    Args:
      query: [B, T, H, D].
      key: [B, S, H, D].
      value: [B, S, H, D].
      causal: position t attends to positions s <= t only (needs T == S).

    Returns:
      [B, T, H, D] in the dtype of `value`.
    """
    scale = query.shape[-1] ** -0.5
    logits_BHTS = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32) * scale
    if causal:
        visible_TS = jnp.tril(jnp.ones(logits_BHTS.shape[-2:], bool))
        logits_BHTS = jnp.where(visible_TS[None, None], logits_BHTS, jnp.finfo(jnp.float32).min)
    weights_BHTS = jax.nn.softmax(logits_BHTS, axis=-1).astype(value.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights_BHTS, value)
