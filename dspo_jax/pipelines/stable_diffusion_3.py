"""What Stable Diffusion 3's transformer reads of a caption, from the states of its three text encoders."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dspo_jax.models.clip import TextStates


def join_text(
    clips: Sequence[TextStates], t5_states: Float[jax.Array, "B L F"]
) -> tuple[Float[jax.Array, "B S F"], Float[jax.Array, "B P"]]:
    """Joins the states of the text encoders as diffusers' `StableDiffusion3Pipeline` does.

    Args:
      clips: of both CLIPs, for [B, 77] tokens.
      t5_states: [B, L, F] of T5's L tokens, padding among them; zeros for a model without T5, for which
        diffusers' pipeline takes 256 rows.

    Returns:
      The states [B, 77 + L, F]: those of both CLIPs before their last layers side by side, filled up with
      zeros to T5's width, and below them T5's. And the pooled text [B, P], projections side by side.
    """
    states = jnp.concatenate([clip.penultimate for clip in clips], axis=-1)
    missing = t5_states.shape[-1] - states.shape[-1]
    states = jnp.pad(states, ((0, 0), (0, 0), (0, missing)))
    pooled = jnp.concatenate([clip.pooled for clip in clips], axis=-1)
    return jnp.concatenate([states, t5_states.astype(states.dtype)], axis=1), pooled
