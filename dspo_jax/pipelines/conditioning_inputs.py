"""Arrays of a batch that condition the denoiser: those of prompts, and those of dropped captions."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float16, Integer

from dspo_jax.pipelines.conditioning import DROPPED, Array
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.pipelines.stored import T5_STATES


def prompt_batch(
    pipe: Pipeline,
    tokens: Integer[Array, "B E S"],
    size: tuple[int, int],
    states: Float16[Array, "B L F"] | None = None,
) -> dict[str, jax.Array]:
    """Returns the `Pipeline.conditioning_inputs` of one image for each prompt.

    Args:
      pipe: the model.
      tokens: ids [B, E, S].
      size: (height, width) of the images in pixels.
      states: from `find_states`.
    """
    if (states is None) != (pipe.stored_states is None):
        raise ValueError("states: must be those of `find_states`, of a model that runs without its T5")
    whole = jnp.asarray([[[*size, 0, 0, *size]]] * len(tokens))
    batch = {"tokens": jnp.asarray(tokens), "micro_conditioning": whole}
    return batch if states is None else {**batch, T5_STATES: jnp.asarray(states)}


def find_states(pipe: Pipeline, captions: Sequence[str]) -> Float16[np.ndarray, "N L F"] | None:
    """Returns T5's `Pipeline.stored_states` of captions, if they are stored."""
    if pipe.stored_states is None:
        return None
    return np.stack([pipe.stored_states[caption] for caption in captions])


def drop_captions(
    pipe: Pipeline, batch: Mapping[str, jax.Array], drop: Bool[Array, " B *E"], *, zeros: bool = False
) -> dict[str, jax.Array]:
    """Returns the batch without the captions where `drop` is true.

    Args:
      pipe: the model.
      batch: has `Pipeline.conditioning_inputs`.
      drop: [B], or [B, E] for each text encoder by itself.
      zeros: whether zeros are read in place of what those text encoders say (`DROPPED`); else they read the
        empty caption.
    """
    each = jnp.broadcast_to(drop.reshape(len(drop), -1), (len(drop), len(pipe.empty_tokens)))
    if zeros:
        return {**batch, DROPPED: each}
    tokens = jnp.where(each[..., None], pipe.empty_tokens[None], batch["tokens"])
    if pipe.stored_states is None:
        return {**batch, "tokens": tokens}
    states = jnp.where(each[:, -1, None, None], pipe.stored_states[""][None], batch[T5_STATES])
    return {**batch, "tokens": tokens, T5_STATES: states}
