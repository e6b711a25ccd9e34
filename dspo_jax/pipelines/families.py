"""Families of text-to-image models: how the components of a diffusers pipeline class work together."""

import dataclasses
from collections.abc import Mapping

from dspo_jax.json_files import JsonObject
from dspo_jax.schedules.process import Process
from dspo_jax.schedules.variance_preserving import Schedule


@dataclasses.dataclass(frozen=True)
class Family:
    """A class of diffusers pipelines.

    The scale and the shift of the latents are the VAE's, in the config.json of each model.

    Attributes:
      denoiser: component that predicts noise.
      classes: component -> names of the model classes that may take its part; the denoiser, the VAE and the
        text encoders in order.
      process: forward process, read from scheduler_config.json.
      sample_size: side of the latents that diffusers assumes where the denoiser's config names none.
      micro_conditioning: whether the denoiser reads the penultimate states of all text encoders side by side,
        the last one's pooled state, and the image's original size, crop and target size (SDXL, section 2.2);
        else it reads the last states of one text encoder.
      shifts_latents: whether the class in diffusers reads the VAE's `shift_factor`.
    """

    denoiser: str
    classes: Mapping[str, tuple[str, ...]]
    process: type[Process]
    sample_size: int
    micro_conditioning: bool
    shifts_latents: bool = False

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The components that encode captions."""
        return tuple(name for name in self.classes if name not in (self.denoiser, "vae"))

    def zero_empty_captions(self, index: JsonObject) -> bool:
        """Returns whether zeros stand for a missing caption: as model_index.json or diffusers says."""
        return self.micro_conditioning and bool(index.get("force_zeros_for_empty_prompt", True))


_STABLE_DIFFUSION = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
}
FAMILIES = {
    "StableDiffusionPipeline": Family("unet", _STABLE_DIFFUSION, Schedule, 64, micro_conditioning=False),
    "StableDiffusionXLPipeline": Family(
        "unet",
        {**_STABLE_DIFFUSION, "text_encoder_2": ("CLIPTextModelWithProjection",)},
        Schedule,
        128,
        micro_conditioning=True,
    ),
}
NETWORKS = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.classes))
"""The components of any family; others of a folder (a safety checker) are carried along."""
