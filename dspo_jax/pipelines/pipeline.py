"""A diffusers folder as one value: its networks, tokenizers, noise schedule and rules of conditioning."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float, Float32, Num

from dspo_jax.errors import UserError
from dspo_jax.files import sha256
from dspo_jax.images.resize import Crop
from dspo_jax.models import lora
from dspo_jax.models.model import Model, Params
from dspo_jax.pipelines.conditioning import NO_TOKEN, Array, Conditioning, Reading, stack_tokens
from dspo_jax.pipelines.families import Family
from dspo_jax.pipelines.stored import T5_STATES
from dspo_jax.pipelines.t5_tokenizer import T5Tokenizer
from dspo_jax.pipelines.tokenizers import CaptionTokenizer
from dspo_jax.schedules.process import Process, SchedulerConfig
from dspo_jax.weights import components
from dspo_jax.weights.component_files import find_weights
from dspo_jax.weights.lora_files import LoRA


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A model directory that has been read, except for its weights, which `read_params` reads by component.

    Attributes:
      path: the diffusers folder.
      family: how the components work together.
      networks: architectures by component: the denoiser, "vae", and the text encoders in order.
      tokenizers: one for each CLIP text encoder, all of one length; none where only shapes are known.
      empty_tokens: token ids [E, S] int32 of the empty caption, see `conditioning.stack_tokens`.
      schedule: the forward process and what is predicted.
      scheduler_config: the parsed scheduler_config.json, which samplers read.
      zero_empty_captions: `force_zeros_for_empty_prompt` of SDXL's model_index.json: zeros stand for a
        dropped caption in training, and in sampling for a negative prompt that is not given.
      trained: components whose weights a training run has replaced, e.g. {"unet": params}; of a run with LoRA
        the adapters, `lora.scaled`.
      step: of the training run; None for a plain folder.
      max_chunks: chunks that captions are tokenized in, each of which the text encoders read by itself; S is
        their number times `caption_length`.
      clip_skip: whose state Stable Diffusion 1 and 2 read, counted from the last layer, which is 1; the final
        norm follows. (diffusers counts from 0.)
      loras: files that are added to the weights when they are read.
      max_sequence_length: tokens that Stable Diffusion 3's T5 reads of a caption; without T5, rows of zeros
        in place of its states. The denoiser attends to padding and zeros like all else, so that another
        number is another input. None of other models.
      t5_tokenizer: of Stable Diffusion 3's T5.
      stored_states: by caption, T5's states [L, F] float16 of the captions that are drawn, and of the empty
        one. Where there are some, T5 is none of the components that a prediction runs, and batches bring its
        states, as datasets store them.
      made_buffers: stand in for what the denoiser's files hold beside parameters, where there are no files.
    """

    path: Path
    family: Family
    networks: Mapping[str, Model]
    tokenizers: tuple[CaptionTokenizer, ...]
    empty_tokens: np.ndarray
    schedule: Process
    scheduler_config: SchedulerConfig
    zero_empty_captions: bool
    trained: Mapping[str, Params]
    step: int | None = None
    max_chunks: int = 1
    clip_skip: int = 1
    loras: tuple[LoRA, ...] = ()
    max_sequence_length: int | None = None
    t5_tokenizer: T5Tokenizer | None = None
    stored_states: Mapping[str, np.ndarray] | None = None
    made_buffers: Mapping[str, np.ndarray] | None = None

    @property
    def denoiser(self) -> str:
        """Name of the component that predicts noise."""
        return self.family.denoiser

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that a prediction runs: the denoiser, then the text encoders."""
        return (self.denoiser, *self.text_encoders)

    @property
    def vae(self) -> Model:
        """Architecture of the autoencoder."""
        return self.networks["vae"]

    @property
    def text_encoders(self) -> dict[str, Model]:
        """Architectures of the text encoders that run, by component."""
        absent = () if self.stored_states is None else (self.stored_encoder,)
        names = [name for name in self.family.text_encoders if name in self.networks]
        return {name: self.networks[name] for name in names if name not in absent}

    @property
    def stored_encoder(self) -> str | None:
        """Name of the text encoder whose states datasets store, as it is too large to run in every step."""
        name = self.family.conditioner.stored_encoder
        return name if name in self.networks else None

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latents."""
        return self.vae.settings["latent_channels"]

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent position along a side."""
        return self.vae.settings["vae_scale_factor"]

    @property
    def side_multiple(self) -> int:
        """Pixels that an image's sides must be multiples of: those of a latent position, or of a patch."""
        return self.vae_scale_factor * self.networks[self.denoiser].settings.get("patch_size", 1)

    @functools.cached_property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents of the images that the model was made for.

        Where the denoiser's config names no size, that of the pipeline's class in diffusers, with a warning.
        """
        size = self.networks[self.denoiser].settings["sample_size"]
        if size is None:
            size = self.family.sample_size
            pixels = size * self.vae_scale_factor
            logging.warning(
                "%s: no sample_size; images of %d x %d pixels are taken, as diffusers' pipelines do",
                self.path / self.denoiser / "config.json",
                pixels,
                pixels,
            )
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return height, width

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the model was made for."""
        height, width = self.latent_size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def image_side(self) -> int:
        """Pixels along a side of the square images that the model was made for.

        Raises:
          UserError: they are not square.
        """
        height, width = self.image_size
        if height != width:
            file = self.path / self.denoiser / "config.json"
            raise UserError(
                f"{file}: sample_size = {list(self.latent_size)}: images of {height} x {width} pixels are "
                f"not square; name the resolution, e.g. --config.resolution={max(height, width)}"
            )
        return height

    @property
    def scaling_factor(self) -> float:
        """UNet units per VAE unit of a latent."""
        return self.vae.settings["scaling_factor"]

    @property
    def shift_factor(self) -> float:
        """Mean of the latents in VAE units, subtracted before scaling: 0 but in Stable Diffusion 3."""
        return self.vae.settings["shift_factor"] or 0.0

    def read_params(self, component: str, dtype: str | None = None) -> Params:
        """Reads the weights of one of the `networks` as arrays, in `dtype` or as stored."""
        trained = self.trained.get(component, {})
        if trained and not self.loras and not lora.find_ranks(trained):
            return jax.tree.map(lambda leaf: leaf.astype(dtype), trained) if dtype else trained
        network = self.networks[component]
        return components.read_params(self.path / component, network, dtype, trained, self.loras)

    @property
    def text(self) -> dict[str, int | None]:
        """The settings of reading captions, by the names of `load_pipeline`'s arguments."""
        return {
            "max_chunks": self.max_chunks,
            "clip_skip": self.clip_skip,
            "max_sequence_length": self.max_sequence_length,
        }

    @property
    def caption_length(self) -> int:
        """Tokens of a chunk of a caption with its start, end and padding: 77 but in rare models."""
        return self.tokenizers[0].length

    def tokenize(self, captions: Sequence[str]) -> np.ndarray:
        """Tokenizes N captions to ids [N, E, S] int32; those that have no room are cut, with a warning."""
        # The other tokenizers differ in the padding token alone, but for T5's, which reads the most.
        longest = self.t5_tokenizer or self.tokenizers[0]
        too_long = longest.find_long(captions)
        if too_long:
            logging.warning(
                "%d caption(s) longer than %d tokens were cut, first %.200r",
                len(too_long),
                longest.max_tokens,
                too_long[0],
            )
        ids = [tokenizer(captions) for tokenizer in self.tokenizers]
        ids += [self.t5_tokenizer(captions)] if self.t5_tokenizer else []
        return stack_tokens(ids)

    @property
    def conditioning_inputs(self) -> tuple[str, ...]:
        """Names of the arrays of a batch that the denoiser is conditioned on."""
        return tuple(self.conditioning_shapes(1))

    @property
    def image_inputs(self) -> tuple[str, ...]:
        """Names of the `conditioning_inputs` that are [B, P, ...], with one entry for each image."""
        return ("micro_conditioning",)

    def conditioning_shapes(self, images: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of `conditioning_inputs` for an example of `images` images."""
        states = None if self.stored_states is None else self.stored_states[""]
        return {
            "tokens": jax.ShapeDtypeStruct(self.empty_tokens.shape, jnp.int32),
            "micro_conditioning": jax.ShapeDtypeStruct((images, len(Crop._fields)), jnp.int32),
            **({} if states is None else {T5_STATES: jax.ShapeDtypeStruct(states.shape, states.dtype)}),
        }

    def make_conditioning(
        self, captions: Sequence[str], crops: Sequence[Sequence[Crop]]
    ) -> dict[str, np.ndarray]:
        """Makes the `conditioning_inputs` of N examples from their captions and the crops of their P images.

        Returns:
          `tokens` [N, E, S] and `micro_conditioning` [N, P, 6], int32.
        """
        return {"tokens": self.tokenize(captions), "micro_conditioning": np.asarray(crops, np.int32)}

    def encode_conditioning(
        self,
        params: Mapping[str, Params],
        batch: Mapping[str, Array],
        *,
        remat: str = "none",
        zero_empty: bool = True,
    ) -> Conditioning:
        """Encodes captions for the denoiser. Pure.

        Args:
          params: the text encoders by component.
          batch: has `conditioning_inputs`: `tokens` [B, E, S], ids of each text encoder's tokenizer, and
            `micro_conditioning` [B, P, 6], see `Conditioning.sizes`.
          remat: a policy of models/remat.py for the backward pass.
          zero_empty: gives zeros for an empty caption if SDXL's model_index.json says
            `force_zeros_for_empty_prompt`. So SDXL was trained without captions, and so dropped captions are
            trained here; the released Diffusion-DPO trainer encodes those that it drops. diffusers' pipelines
            encode an empty prompt and have zeros only where there is no negative prompt.

        Raises:
          UserError: an unknown policy.
        """
        tokens = batch["tokens"]
        lengths = tuple(int(count) for count in (self.empty_tokens != NO_TOKEN).sum(axis=1))
        reading = Reading(lengths, self.max_chunks, self.clip_skip, self.max_sequence_length)
        networks = {name: self.networks[name] for name in self.components}
        conditioning = self.family.conditioner.encode(networks, params, batch, reading, remat=remat)
        if not (zero_empty and self.zero_empty_captions):
            return conditioning
        return conditioning.without_captions((tokens == self.empty_tokens[None]).all((1, 2)))

    def embed_captions(
        self, params: Mapping[str, Params], batch: Mapping[str, Array]
    ) -> Float[jax.Array, "B D"]:
        """Returns each caption as one vector, the pooled state of the CLIP text encoders. Pure.

        Of Stable Diffusion 1 and 2 the state at the end token behind the last norm, of SDXL the projection of
        its second encoder, of Stable Diffusion 3 those of both CLIPs side by side.

        Args:
          params: the text encoders by component.
          batch: has `conditioning_inputs`.
        """
        return jnp.asarray(self.encode_conditioning(params, batch, zero_empty=False).pooled)

    def predict(
        self,
        params: Mapping[str, Params],
        latents: Float[Array, "N h w C"],
        timesteps: Num[Array, " N"],
        conditioning: Conditioning,
        *,
        remat: str = "none",
        skip_layers: tuple[int, ...] = (),
    ) -> Float[jax.Array, "N h w C"]:
        """Returns the denoiser's output for noisy latents. Pure.

        Args:
          params: by component.
          latents: [N, h, w, C] in UNet units.
          timesteps: [N], what the network is told (`Process.network_time`): integers, or floats of Euler's
            levels between them and of rectified flow.
          conditioning: of N images.
          remat: a policy of models/remat.py for the backward pass.
          skip_layers: blocks of the denoiser that are left out, numbers below its `num_blocks`.

        Returns:
          [N, h, w, C] in the dtype of `latents`: eps, v or velocity, as `schedule.prediction_type` says.

        Raises:
          UserError: an unknown policy.
        """
        denoiser = self.networks[self.denoiser]
        more = self.family.conditioner.make_inputs(conditioning, latents.shape, denoiser, self._buffers)
        if skip_layers:
            more["skip_layers"] = skip_layers
        return denoiser.apply(
            params[self.denoiser], latents, timesteps, conditioning.states, **more, remat=remat
        )

    @functools.cached_property
    def _buffers(self) -> Mapping[str, np.ndarray]:
        """What the denoiser's files hold beside parameters; on the host, as it may take a gigabyte."""
        if self.made_buffers is not None:
            return self.made_buffers
        return components.read_buffers(self.path / self.denoiser, self.networks[self.denoiser])

    def predict_pairs(
        self,
        params: Mapping[str, Params],
        noisy: Float[Array, "B P h w C"],
        levels: Num[Array, "B P"],
        batch: Mapping[str, Array],
        *,
        remat: str = "none",
    ) -> Float[jax.Array, "B P h w C"]:
        """Runs the denoiser on noisy latents [B, P, h, w, C] under a caption for each pair. Pure.

        Args:
          params: by component.
          noisy: [B, P, h, w, C] in UNet units.
          levels: [B, P], of the process: integer timesteps, or float32 sigma of rectified flow.
          batch: has `conditioning_inputs`, see `encode_conditioning`.
          remat: a policy of models/remat.py for the backward pass.

        Returns:
          [B, P, h, w, C] in the dtype of `noisy`. A pair is folded into the batch as (winner 0, loser 0,
          winner 1, ...); its text is encoded, and made keys and values of, once.
        """

        def fold(x: Array) -> Array:
            return x.reshape(-1, *x.shape[2:])

        conditioning = self.encode_conditioning(params, batch, remat=remat)
        times = self.schedule.network_time(fold(levels))
        output = self.predict(params, fold(noisy), times, conditioning, remat=remat)
        return output.reshape(noisy.shape)

    def encode_moments(
        self, params: Mapping[str, Params], images: Float[Array, "N H W 3"]
    ) -> Float32[jax.Array, "N h w moments"]:
        """Returns images [N, H, W, 3] in [-1, 1] -> mean ‖ deviation [N, h, w, 2C] in UNet units, float32.

        Pure; `params` holds "vae". Computed in the dtype of the images and parameters.
        """
        encoded = self.vae.apply(params["vae"], images, method="encode")
        mean, deviation = (each.astype(jnp.float32) for each in encoded)
        return self.scaling_factor * jnp.concatenate([mean - self.shift_factor, deviation], axis=-1)

    def decode(
        self, params: Mapping[str, Params], latents: Float[Array, "N h w C"]
    ) -> Float[jax.Array, "N H W 3"]:
        """Returns latents [N, h, w, C] in UNet units -> images [N, H, W, 3], about [-1, 1].

        Pure; `params` holds "vae". `sampling.decoding.Decoder` compiles it and makes pixels of its images.
        """
        of_vae = latents / self.scaling_factor + self.shift_factor
        return self.vae.apply(params["vae"], of_vae, method="decode")

    def fingerprint(self) -> dict[str, object]:
        """Identifies VAE and tokenizers, as shards that fit this model have them in their manifest."""
        t5 = self.t5_tokenizer
        return {
            "model": self.path.name,
            "vae_sha256": sha256(*find_weights(self.path / "vae", self.vae.class_name)),
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "vae_scale_factor": self.vae_scale_factor,
            "latent_channels": self.latent_channels,
            "caption_length": self.caption_length,
            "max_chunks": self.max_chunks,
            "tokens_sha256": [tokenizer.digest() for tokenizer in self.tokenizers],
            # The only digest of tokens in shards of earlier versions; kept so that these can be matched.
            "tokenizer_sha256": [tokenizer.digest_files() for tokenizer in self.tokenizers],
            # Stable Diffusion 2 and SDXL's second encoder have another padding token.
            "pad_token_id": [tokenizer.tokenizer.pad_token_id for tokenizer in self.tokenizers],
            **({"t5_length": t5.length, "t5_tokens_sha256": t5.digest()} if t5 else {}),
        }
