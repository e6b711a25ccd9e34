"""A diffusers folder as one value: its networks, tokenizers, noise schedule and rules of conditioning."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dspo_jax import convert, file_kinds, saved_params, schema
from dspo_jax.component_files import find_weights
from dspo_jax.json_files import shown
from dspo_jax.model_dir import find_model
from dspo_jax.models import Model, Params, lora
from dspo_jax.samplers.spacing import check_sampler_config
from dspo_jax.schedule import Schedule
from dspo_jax.schema import flag
from dspo_jax.tokenizers import CaptionTokenizer, read_tokenizer

# Class of a pipeline -> its text encoders.
_PIPELINES = {
    "StableDiffusionPipeline": ("text_encoder",),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2"),
}
# Component -> the classes that may take its part.
_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}
# Number of text encoders -> the UNet's sample_size that a pipeline of diffusers takes where there is none.
_DEFAULT_SAMPLE_SIZE = {1: 64, 2: 128}
_INDEX_KEYS = {"force_zeros_for_empty_prompt": flag(True, null=True)}


class Text(NamedTuple):
    """What the UNet is told by captions.

    Attributes:
      states: [B, S, F], S tokens, 77 but in rare models; read by cross-attention.
      pooled: [B, D], part of SDXL's time embedding; None for Stable Diffusion 1 and 2.
    """

    states: jax.Array
    pooled: jax.Array | None


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A model directory that has been read, except for its weights, which `read_params` reads by component.

    Attributes:
      path: the diffusers folder.
      unet, vae: architectures.
      text_encoders: architectures by component: "text_encoder", and SDXL's "text_encoder_2".
      tokenizers: one for each text encoder, all of one length.
      schedule: the forward process and the prediction type.
      scheduler_config: the parsed scheduler_config.json, which samplers read.
      zero_empty_captions: `force_zeros_for_empty_prompt` of SDXL's model_index.json: zeros stand for a
        dropped caption in training, and in sampling for a negative prompt that is not given.
      trained: components whose weights a training run has replaced, e.g. {"unet": params}; of a run with LoRA
        the adapters.
      step: of that run; None for a plain folder.
    """

    path: Path
    unet: Model
    vae: Model
    text_encoders: Mapping[str, Model]
    tokenizers: tuple[CaptionTokenizer, ...]
    schedule: Schedule
    scheduler_config: Mapping[str, Any]
    zero_empty_captions: bool
    trained: Mapping[str, Params]
    step: int | None = None

    @property
    def networks(self) -> dict[str, Model]:
        """All architectures by component."""
        return {"unet": self.unet, "vae": self.vae, **self.text_encoders}

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latents."""
        return self.vae.settings["latent_channels"]

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent position along a side."""
        return self.vae.settings["vae_scale_factor"]

    @functools.cached_property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents of the images that the model was made for.

        Where the UNet's config does not say, those of the pipeline's class in diffusers, with a warning.
        """
        size = self.unet.settings["sample_size"]
        if size is None:
            size = _DEFAULT_SAMPLE_SIZE[len(self.text_encoders)]
            pixels = size * self.vae_scale_factor
            logging.warning(
                "%s: no sample_size; images of %d x %d pixels are taken, as diffusers' pipelines do",
                self.path / "unet" / "config.json",
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
          ValueError: they are not square.
        """
        height, width = self.image_size
        if height != width:
            raise ValueError(
                f"{self.path / 'unet' / 'config.json'}: sample_size = {list(self.latent_size)}: images of "
                f"{height} x {width} pixels are not square; name the resolution, e.g. "
                f"--config.resolution={max(height, width)}"
            )
        return height

    @property
    def scaling_factor(self) -> float:
        """UNet units per VAE unit of a latent."""
        return self.vae.settings["scaling_factor"]

    def read_params(self, component: str, dtype: str | None = None) -> Params:
        """The weights of "unet", "vae" or a text encoder as arrays; `dtype` None keeps the stored one."""
        trained = self.trained.get(component, {})
        if trained and not lora.find_ranks(trained):
            return jax.tree.map(lambda leaf: leaf.astype(dtype), trained) if dtype else trained
        return convert.read_params(self.path / component, self.networks[component], dtype, adapters=trained)

    @property
    def caption_length(self) -> int:
        """Tokens of a caption with its start, end and padding: 77 but in rare models."""
        return self.tokenizers[0].length

    def tokenize(self, captions: Sequence[str]) -> np.ndarray:
        """Token ids [N, E, S] int32 of N captions; longer ones are cut at S tokens, with a warning."""
        too_long = self.tokenizers[0].find_long(captions)  # the others differ in what they pad with
        if too_long:
            logging.warning(
                "%d caption(s) longer than %d tokens were cut, first %r",
                len(too_long),
                self.caption_length,
                too_long[0],
            )
        return np.stack([tokenizer(captions) for tokenizer in self.tokenizers], axis=1)

    @functools.cached_property
    def empty_tokens(self) -> np.ndarray:
        """Token ids [E, S] int32 of the empty caption."""
        return self.tokenize([""])[0]

    def encode_text(
        self,
        params: Mapping[str, Params],
        tokens: jax.Array,
        *,
        remat: str = "none",
        zero_empty: bool = True,
    ) -> Text:
        """Encodes captions for the UNet. Pure.

        Stable Diffusion 1 and 2 read the last states. SDXL reads the penultimate ones of both encoders side
        by side and the second one's pooled state.

        Args:
          params: the text encoders by component.
          tokens: ids [B, E, S].
          remat: a policy of models/remat.py for the backward pass; an unknown one is a ValueError.
          zero_empty: gives zeros for an empty caption if SDXL's model_index.json says
            `force_zeros_for_empty_prompt`. So SDXL was trained without captions, and so dropped captions are
            trained here; the released Diffusion-DPO trainer encodes those that it drops. diffusers' pipelines
            encode an empty prompt and have zeros only where there is no negative prompt.
        """
        states = [
            model.apply(params[name], tokens[:, i], remat=remat)
            for i, (name, model) in enumerate(self.text_encoders.items())
        ]
        if len(states) == 1:
            return Text(states[0].last, None)
        text = Text(jnp.concatenate([each.penultimate for each in states], axis=-1), states[-1].pooled)
        if not (zero_empty and self.zero_empty_captions):
            return text
        empty = (tokens == self.empty_tokens[None]).all((1, 2))
        return jax.tree.map(lambda x: jnp.where(jnp.expand_dims(empty, range(1, x.ndim)), 0, x), text)

    def predict(
        self,
        params: Mapping[str, Params],
        latents: jax.Array,
        timesteps: jax.Array,
        text: Text,
        micro_conditioning: jax.Array,
        *,
        remat: str = "none",
    ) -> jax.Array:
        """The UNet's output for noisy latents. Pure; `params` holds "unet".

        Args:
          params: by component.
          latents: [B, h, w, C] in UNet units.
          timesteps: [B], integers, or floats between them (Euler's).
          text: of B captions; or of fewer, each for as many images in a row.
          micro_conditioning: [B, 6] pixels: original height and width, top and left of the crop, target
            height and width (SDXL, section 2.2). Only SDXL reads it.
          remat: a policy of models/remat.py for the backward pass.

        Returns:
          [B, h, w, C] in the dtype of `latents`: eps or v, as `schedule.prediction_type` says.

        Raises:
          ValueError: an unknown policy.
        """
        if text.pooled is None:
            return self.unet.apply(params["unet"], latents, timesteps, text.states, remat=remat)
        return self.unet.apply(
            params["unet"],
            latents,
            timesteps,
            text.states,
            text_embeds=jnp.repeat(text.pooled, len(latents) // len(text.pooled), axis=0),
            time_ids=micro_conditioning,
            remat=remat,
        )

    def predict_pairs(
        self,
        params: Mapping[str, Params],
        noisy: jax.Array,
        timesteps: jax.Array,
        tokens: jax.Array,
        micro_conditioning: jax.Array,
        *,
        remat: str = "none",
    ) -> jax.Array:
        """The UNet's output for noisy latents [B, P, h, w, C] under a caption for each pair. Pure.

        Args:
          params: "unet" and the text encoders.
          noisy: [B, P, h, w, C] in UNet units.
          timesteps: [B, P].
          tokens: [B, E, S].
          micro_conditioning: [B, P, 6], see `predict`.
          remat: a policy of models/remat.py for the backward pass.

        Returns:
          [B, P, h, w, C] in the dtype of `noisy`. A pair is folded into the batch as (winner 0, loser 0,
          winner 1, ...); its text is encoded, and made keys and values of, once.
        """

        def fold(x: jax.Array) -> jax.Array:
            return x.reshape(-1, *x.shape[2:])

        text = self.encode_text(params, tokens, remat=remat)
        output = self.predict(
            params, fold(noisy), fold(timesteps), text, fold(micro_conditioning), remat=remat
        )
        return output.reshape(noisy.shape)

    def encode_moments(self, params: Mapping[str, Params], images: jax.Array) -> jax.Array:
        """Images [N, H, W, 3] in [-1, 1] -> mean ‖ deviation [N, h, w, 2C] in UNet units, float32.

        Pure; `params` holds "vae". Computed in the dtype of the images and parameters.
        """
        mean, deviation = self.vae.apply(params["vae"], images, method="encode")
        return self.scaling_factor * jnp.concatenate([mean, deviation], axis=-1).astype(jnp.float32)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [N, h, w, C] in UNet units -> images [N, H, W, 3], about [-1, 1], float32."""
        return self._images(self._vae_params, latents)

    def decode_pixels(self, latents: jax.Array) -> np.ndarray:
        """Latents [N, h, w, C] in UNet units -> images [N, H, W, 3] uint8; black where not finite.

        Warns where finite latents give pixels that are not.
        """
        images = np.asarray(self.decode(latents))
        if not np.isfinite(images).all() and np.isfinite(latents).all():
            logging.warning(
                "%s: the VAE's pixels are not finite (NaN or infinite), thus black; are its weights damaged?",
                self.path,
            )
        images = np.nan_to_num(images, nan=-1.0)
        return (np.clip(images * 127.5 + 127.5, 0, 255)).round().astype(np.uint8)

    @functools.cached_property
    def _vae_params(self) -> Params:
        return jax.device_put(self.read_params("vae", "float32"))

    @functools.cached_property
    def _images(self) -> Any:
        def images(params: Params, latents: jax.Array) -> jax.Array:
            return self.vae.apply(params, latents / self.scaling_factor, method="decode")

        return jax.jit(images)

    def fingerprint(self) -> dict[str, Any]:
        """What shards must have been encoded with to fit this model; goes into their manifest."""
        return {
            "model": self.path.name,
            "vae_sha256": _sha256(*find_weights(self.path / "vae", self.vae.class_name)),
            "scaling_factor": self.scaling_factor,
            "vae_scale_factor": self.vae_scale_factor,
            "latent_channels": self.latent_channels,
            "caption_length": self.caption_length,
            "tokens_sha256": [tokenizer.digest() for tokenizer in self.tokenizers],
            # All that earlier versions wrote of the tokens, so that their shards can be matched.
            "tokenizer_sha256": [tokenizer.digest_files() for tokenizer in self.tokenizers],
            # Stable Diffusion 2 and SDXL's second encoder pad with another token.
            "pad_token_id": [tokenizer.tokenizer.pad_token_id for tokenizer in self.tokenizers],
        }

    def weights_digest(self) -> str:
        """Changes when any network's weights do: of the start of each trained array, and of each file's size
        and 4 KiB at 256 places, for files of gigabytes are not to be read for it.
        """
        digest = hashlib.sha256()
        for component, model in self.networks.items():
            for file in find_weights(self.path / component, model.class_name):
                size = file.stat().st_size
                digest.update(f"{component} {size}".encode())
                with file.open("rb") as content:
                    for place in range(256):
                        content.seek(size * place // 256)
                        digest.update(content.read(4096))
        for leaf in jax.tree.leaves(self.trained):
            digest.update(np.asarray(leaf.reshape(-1)[:1024]).tobytes())
        return digest.hexdigest()


def load_pipeline(path: str | Path, step: int | None = None) -> Pipeline:
    """Read a model directory: a diffusers folder, or a training workdir (its base with trained weights).

    Args:
      path: the folder, or the hub id of one.
      step: which checkpoint of a workdir; None means the newest.

    Raises:
      FileNotFoundError: no such folder, or a file of it is missing.
      ValueError: a pipeline, component or config value that is not supported.
    """
    path = find_model(path)
    trained: Mapping[str, Params] = {}
    if (path / "checkpoints").is_dir():
        base = find_model(convert.read_base(path))
        trained, step = saved_params.restore_params(path / "checkpoints", step)
        logging.info("%s: %s from step %d over %s", path, " and ".join(trained), step, base)
        path = base
    index_file = path / "model_index.json"
    if not index_file.is_file():
        raise FileNotFoundError(
            f"{path}: neither a diffusers folder (no model_index.json) nor a training workdir "
            f"(no checkpoints){file_kinds.explain(path)}"
        )
    index = convert.read_json(index_file)
    schema.check(str(index_file), index, _INDEX_KEYS)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str) or class_name not in _PIPELINES:
        raise ValueError(
            f"{index_file}: _class_name = {shown(class_name)} is not supported; allowed: "
            f"{', '.join(_PIPELINES)}"
        )
    encoders = _PIPELINES[class_name]
    models = convert.read_models(path)
    for name in ("unet", "vae", *encoders):
        if name not in models or models[name].class_name not in _CLASSES[name]:
            found = models[name].class_name if name in models else "absent"
            raise ValueError(
                f"{index_file}: {name} is {found}, but a {class_name} needs {' or '.join(_CLASSES[name])}"
            )
    scheduler_file = path / "scheduler" / "scheduler_config.json"
    scheduler_config = convert.read_json(scheduler_file)
    try:
        schedule = Schedule.from_config(scheduler_config)
        check_sampler_config(scheduler_config)
    except ValueError as error:
        raise ValueError(f"{scheduler_file}: {error}") from error
    pipe = Pipeline(
        path=path,
        unet=models["unet"],
        vae=models["vae"],
        text_encoders={name: models[name] for name in encoders},
        tokenizers=tuple(
            read_tokenizer(path / name.replace("text_encoder", "tokenizer"), models[name].settings)
            for name in encoders
        ),
        schedule=schedule,
        scheduler_config=scheduler_config,
        # diffusers' pipeline class has True as its default.
        zero_empty_captions=len(encoders) > 1 and bool(index.get("force_zeros_for_empty_prompt", True)),
        trained=trained,
        step=step if trained else None,
    )
    _check_sizes(pipe)
    _check_lengths(*pipe.tokenizers)
    return pipe


def _check_sizes(pipe: Pipeline) -> None:
    """Refuses a folder whose UNet takes something else than its VAE and text encoders give."""
    unet, encoders = pipe.unet.settings, [model.settings for model in pipe.text_encoders.values()]
    given = {
        "in_channels": pipe.latent_channels,
        "out_channels": pipe.latent_channels,
        "cross_attention_dim": sum(encoder["hidden_size"] for encoder in encoders),
        "addition_embed_type": "text_time" if len(encoders) > 1 else None,
    }
    if unet["addition_embed_type"] and len(encoders) > 1:
        pooled, numbers = encoders[1]["projection_dim"], 6 * unet["addition_time_embed_dim"]
        given["projection_class_embeddings_input_dim"] = pooled + numbers
    for key, value in given.items():
        if unet[key] != value:
            raise ValueError(
                f"{pipe.path / 'unet' / 'config.json'}: {key} = {unet[key]!r}, but text to image with the "
                f"VAE and text encoders of this folder needs {value!r}; use a UNet that was made for them"
            )


def _check_lengths(first: CaptionTokenizer, *others: CaptionTokenizer) -> None:
    """Refuses text encoders whose states cannot lie side by side."""
    for other in others:
        if other.length != first.length:
            raise ValueError(
                f"{other.folder}: captions of {other.length} tokens, but of {first.length} in "
                f"{first.folder}; give both tokenizer_config.json the same model_max_length"
            )


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
