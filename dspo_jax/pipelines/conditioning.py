"""Conditioning of a denoiser: captions, and sizes of images, turned into what the network reads."""

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer, PyTree

from dspo_jax.models.config import NetworkConfig
from dspo_jax.models.model import Model, Params

Array = jax.Array | np.ndarray

NO_TOKEN = -1
"""Fills the rows of token ids of text encoders that read fewer tokens than another one of their model."""


DROPPED = "dropped"
"""Name in a batch of [B, E] bool: text encoders in place of whose states and pooled text zeros are read."""


class Conditioning(NamedTuple):
    """Inputs of a denoiser besides latents and timesteps, for captions of B examples and N images.

    N is a multiple of B; image n belongs to example n // (N / B).

    Attributes:
      states: [B, S, F], S tokens, 77 for each chunk but in rare models, and in Stable Diffusion 3 those of T5
        behind them; read by attention.
      pooled: [B, D], the text as one vector; SDXL and Stable Diffusion 3 read it with the time.
      sizes: [N, 6] pixels: original height and width, top and left of the crop, target height and width
        (SDXL, section 2.2); else None.
    """

    states: Float[Array, "B S F"]
    pooled: Float[Array, "B D"]
    sizes: Integer[Array, "N 6"] | None

    def without_captions(self, where: Bool[Array, " B"]) -> "Conditioning":
        """Returns zeros in place of the text of the examples where `where` [B] is true."""
        states, pooled = jax.tree.map(
            lambda x: jnp.where(jnp.expand_dims(where, range(1, x.ndim)), 0, x), (self.states, self.pooled)
        )
        return self._replace(states=states, pooled=pooled)


class Reading(NamedTuple):
    """Settings of reading captions.

    Attributes:
      lengths: tokens that each text encoder reads of a caption, of all chunks together.
      max_chunks: chunks that captions are tokenized in, each of which the text encoders read by itself.
      clip_skip: whose state Stable Diffusion 1 and 2 read, counted from the last layer, which is 1.
      max_sequence_length: see `Pipeline`.
    """

    lengths: tuple[int, ...]
    max_chunks: int
    clip_skip: int
    max_sequence_length: int | None


class Conditioner(abc.ABC):
    """Interface of a family of models: from token ids through its text encoders to its denoiser.

    Attributes:
      name: of the models, for messages.
      longer: how captions beyond a chunk are read in one chunk, where they cannot be in several; else "".
      fixed_layer: the layer of the text encoders that is read, where it cannot be chosen; else "".
      default_length: tokens that are read of a caption by default, where their number can be chosen
        (`Pipeline.max_sequence_length`); else None.
      drops_by_encoder: whether `encode` takes `DROPPED`.
      stored_encoder: text encoder that need not run where a batch has its states (`stored.T5_STATES`); or
        None.
    """

    name: ClassVar[str]
    longer: ClassVar[str] = ""
    fixed_layer: ClassVar[str] = ""
    default_length: ClassVar[int | None] = None
    drops_by_encoder: ClassVar[bool] = False
    stored_encoder: ClassVar[str | None] = None

    @abc.abstractmethod
    def encode(
        self,
        networks: Mapping[str, Model],
        params: Mapping[str, Params],
        batch: Mapping[str, Array],
        reading: Reading,
        *,
        remat: str,
    ) -> Conditioning:
        """Encodes the captions of a batch. Pure.

        Args:
          networks: the denoiser and the text encoders, in order, by component.
          params: the text encoders by component.
          batch: `tokens` [B, E, S] and `micro_conditioning` [B, P, 6].
          reading: of captions.
          remat: a policy of models/remat.py for the backward pass.
        """

    @abc.abstractmethod
    def make_inputs(
        self,
        conditioning: Conditioning,
        shape: tuple[int, ...],
        denoiser: Model,
        buffers: Mapping[str, np.ndarray],
    ) -> dict[str, PyTree]:
        """Returns what the denoiser takes by keyword beside latents, times and states.

        Args:
          conditioning: of B captions.
          shape: of the latents [N, h, w, C].
          denoiser: its architecture.
          buffers: what its files hold beside parameters (`Model.buffer_shapes`).
        """

    @abc.abstractmethod
    def needed_settings(
        self, denoiser: NetworkConfig, encoders: Mapping[str, NetworkConfig], channels: int
    ) -> dict[str, object]:
        """Returns the settings that a denoiser must have to fit text encoders and a VAE.

        Args:
          denoiser: its own settings.
          encoders: the settings of the text encoders by component, in order.
          channels: of the VAE's latents.
        """


def stack_tokens(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks token ids [N, S_e] of E text encoders to [N, E, S], shorter ones with `NO_TOKEN` behind."""
    longest = max(part.shape[1] for part in parts)
    filled = [
        np.pad(part, ((0, 0), (0, longest - part.shape[1])), constant_values=NO_TOKEN) for part in parts
    ]
    return np.stack(filled, axis=1)
