"""What the UNets of Stable Diffusion 1, 2 and XL read of a caption."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dspo_jax.models.clip import TextStates
from dspo_jax.models.config import NetworkConfig
from dspo_jax.models.model import Model, Params
from dspo_jax.pipelines.conditioning import Array, Conditioner, Conditioning, Reading


def _run_encoders(
    networks: Mapping[str, Model],
    params: Mapping[str, Params],
    batch: Mapping[str, Array],
    reading: Reading,
    remat: str,
) -> list[TextStates]:
    """Returns the states of each text encoder, of [B * max_chunks] chunks."""
    tokens = batch["tokens"]
    encoders = [(name, model) for name, model in networks.items() if name != "unet"]
    return [
        model.apply(
            params[name],
            tokens[:, i].reshape(len(tokens) * reading.max_chunks, -1),
            clip_skip=reading.clip_skip,
            remat=remat,
        )
        for i, (name, model) in enumerate(encoders)
    ]


class StableDiffusion(Conditioner):
    """Cross-attention to the last states of one text encoder."""

    name = "Stable Diffusion 1 and 2"

    def encode(
        self,
        networks: Mapping[str, Model],
        params: Mapping[str, Params],
        batch: Mapping[str, Array],
        reading: Reading,
        *,
        remat: str,
    ) -> Conditioning:
        """Encodes captions, whose chunks lie side by side; the pooled state is that of the first."""
        encoded = _run_encoders(networks, params, batch, reading, remat)[0]
        states = encoded.last.reshape(len(batch["tokens"]), -1, encoded.last.shape[-1])
        return Conditioning(states, encoded.pooled[:: reading.max_chunks], None)

    def make_inputs(
        self,
        conditioning: Conditioning,
        shape: tuple[int, ...],
        denoiser: Model,
        buffers: Mapping[str, np.ndarray],
    ) -> dict[str, PyTree]:
        """Returns nothing."""
        del conditioning, shape, denoiser, buffers
        return {}

    def needed_settings(
        self, denoiser: NetworkConfig, encoders: Mapping[str, NetworkConfig], channels: int
    ) -> dict[str, object]:
        """Returns channels and the width of the text."""
        del denoiser
        return {
            "in_channels": channels,
            "out_channels": channels,
            "cross_attention_dim": sum(encoder["hidden_size"] for encoder in encoders.values()),
            "addition_embed_type": None,
        }


class StableDiffusionXL(StableDiffusion):
    """Cross-attention to the penultimate states of all text encoders; pooled text and sizes with the time."""

    name = "SDXL"
    fixed_layer = "the layer before the last"

    def encode(
        self,
        networks: Mapping[str, Model],
        params: Mapping[str, Params],
        batch: Mapping[str, Array],
        reading: Reading,
        *,
        remat: str,
    ) -> Conditioning:
        """Encodes captions, whose chunks lie side by side; the pooled state is that of the first.

        So do the released code of AUTOMATIC1111, ComfyUI and kohya-ss.
        """
        encoded = _run_encoders(networks, params, batch, reading, remat)
        states = jnp.concatenate([each.penultimate for each in encoded], axis=-1)
        states = states.reshape(len(batch["tokens"]), -1, states.shape[-1])
        sizes = batch["micro_conditioning"]
        pooled = encoded[-1].pooled[:: reading.max_chunks]
        return Conditioning(states, pooled, sizes.reshape(-1, sizes.shape[-1]))

    def make_inputs(
        self,
        conditioning: Conditioning,
        shape: tuple[int, ...],
        denoiser: Model,
        buffers: Mapping[str, np.ndarray],
    ) -> dict[str, PyTree]:
        """Returns pooled text and sizes of each image."""
        del denoiser, buffers
        pooled = jnp.asarray(conditioning.pooled)
        repeated = jnp.repeat(pooled, shape[0] // len(pooled), axis=0)
        return {"text_embeds": repeated, "time_ids": conditioning.sizes}

    def needed_settings(
        self, denoiser: NetworkConfig, encoders: Mapping[str, NetworkConfig], channels: int
    ) -> dict[str, object]:
        """Returns channels, the width of the text, and that of what is added to the time."""
        needed = super().needed_settings(denoiser, encoders, channels) | {"addition_embed_type": "text_time"}
        if denoiser["addition_embed_type"]:
            pooled = [*encoders.values()][-1]["projection_dim"]
            numbers = 6 * denoiser["addition_time_embed_dim"]
            needed["projection_class_embeddings_input_dim"] = pooled + numbers
        return needed
