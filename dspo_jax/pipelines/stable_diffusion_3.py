"""What Stable Diffusion 3's transformer reads of a caption, from the states of its three text encoders."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PyTree

from dspo_jax.models.clip import TextStates
from dspo_jax.models.config import NetworkConfig
from dspo_jax.models.mmdit import POSITIONS, crop_positions
from dspo_jax.models.model import Model, Params
from dspo_jax.pipelines.conditioning import DROPPED, Array, Conditioner, Conditioning, Reading
from dspo_jax.pipelines.stored import T5_STATES

T5 = "text_encoder_3"
"""The component that a model may be without."""
T5_LENGTH = 256
"""Tokens that T5 reads of a caption unless another number is chosen, as in diffusers' pipeline."""


def join_text(
    clips: Sequence[TextStates], t5_states: Float[jax.Array, "B L F"]
) -> tuple[Float[jax.Array, "B S F"], Float[jax.Array, "B P"]]:
    """Joins the states of the text encoders as diffusers' `StableDiffusion3Pipeline` does.

    Args:
      clips: of both CLIPs, for [B, 77] tokens.
      t5_states: [B, L, F] of T5's L tokens, padding among them; L rows of zeros for a model without T5.

    Returns:
      The states [B, 77 + L, F]: those of both CLIPs before their last layers side by side, filled up with
      zeros to T5's width, and below them T5's. And the pooled text [B, P], projections side by side.
    """
    states = jnp.concatenate([clip.penultimate for clip in clips], axis=-1)
    missing = t5_states.shape[-1] - states.shape[-1]
    states = jnp.pad(states, ((0, 0), (0, 0), (0, missing)))
    pooled = jnp.concatenate([clip.pooled for clip in clips], axis=-1)
    return jnp.concatenate([states, t5_states.astype(states.dtype)], axis=1), pooled


def _zero_where(dropped: Bool[Array, " B"], states: PyTree) -> PyTree:
    """Returns arrays [B, ...] with zeros in the examples where `dropped` is true."""
    return jax.tree.map(lambda x: jnp.where(jnp.expand_dims(dropped, range(1, x.ndim)), 0, x), states)


class StableDiffusion3(Conditioner):
    """Attention of image and text to each other; the pooled text of both CLIPs with the time.

    T5 runs in the step, like the CLIPs, unless the batch has its states.
    """

    name = "Stable Diffusion 3"
    longer = "T5 reads longer captions"
    fixed_layer = "the layer before the last"
    default_length = T5_LENGTH
    drops_by_encoder = True
    stored_encoder = T5

    def encode(
        self,
        networks: Mapping[str, Model],
        params: Mapping[str, Params],
        batch: Mapping[str, Array],
        reading: Reading,
        *,
        remat: str,
    ) -> Conditioning:
        """Encodes captions with both CLIPs and T5; what `DROPPED` names is zeros, as in kohya-ss."""
        denoiser, *encoders = networks
        ids = {
            name: batch["tokens"][:, i, :length]
            for i, (name, length) in enumerate(zip(encoders, reading.lengths, strict=False))
        }
        clips = [
            networks[name].apply(params[name], ids[name], remat=remat) for name in encoders if name != T5
        ]
        if T5_STATES in batch:
            long_states = jnp.asarray(batch[T5_STATES])
        elif T5 in networks:
            long_states = networks[T5].apply(params[T5], ids[T5], remat=remat)
        else:
            width = networks[denoiser].settings["joint_attention_dim"]
            long_states = jnp.zeros((len(batch["tokens"]), reading.max_sequence_length or 0, width))
        if DROPPED in batch:
            # Without T5 there are zeros anyway.
            *clips, long_states = (
                states if i >= batch[DROPPED].shape[1] else _zero_where(batch[DROPPED][:, i], states)
                for i, states in enumerate((*clips, long_states))
            )
        return Conditioning(*join_text(clips, long_states), None)

    def make_inputs(
        self,
        conditioning: Conditioning,
        shape: tuple[int, ...],
        denoiser: Model,
        buffers: Mapping[str, np.ndarray],
    ) -> dict[str, PyTree]:
        """Returns the pooled text, and the positions of the patches of an image of this size."""
        patch = denoiser.settings["patch_size"]
        positions = crop_positions(buffers[POSITIONS], shape[1] // patch, shape[2] // patch)
        return {"pooled_projections": conditioning.pooled, "positions": positions}

    def needed_settings(
        self, denoiser: NetworkConfig, encoders: Mapping[str, NetworkConfig], channels: int
    ) -> dict[str, object]:
        """Returns channels and the widths of the text."""
        clips = [encoder for name, encoder in encoders.items() if name != T5]
        states = sum(clip["hidden_size"] for clip in clips)
        width = encoders[T5]["d_model"] if T5 in encoders else denoiser["joint_attention_dim"]
        return {
            "in_channels": channels,
            "out_channels": channels,
            "joint_attention_dim": max(width, states),
            "pooled_projection_dim": sum(clip["projection_dim"] for clip in clips),
        }
