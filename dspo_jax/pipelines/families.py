"""Families of text-to-image models: how the components of a diffusers pipeline class work together."""

import dataclasses
from collections.abc import Mapping

from dspo_jax.json_files import JsonObject
from dspo_jax.pipelines.conditioning import Conditioner
from dspo_jax.pipelines.stable_diffusion import StableDiffusion, StableDiffusionXL
from dspo_jax.pipelines.stable_diffusion_3 import T5, StableDiffusion3
from dspo_jax.schedules.process import Process
from dspo_jax.schedules.rectified_flow import RectifiedFlow
from dspo_jax.schedules.variance_preserving import Schedule


@dataclasses.dataclass(frozen=True)
class Family:
    """A class of diffusers pipelines.

    The scale and the shift of the latents are the VAE's, in the config.json of each model.

    Attributes:
      denoiser: component that predicts the noise, or the velocity.
      classes: component -> names of the model classes that may take its part; the denoiser, the VAE and the
        text encoders in order.
      process: forward process, read from scheduler_config.json.
      sample_size: side of the latents that diffusers assumes where the denoiser's config names none.
      conditioner: what the denoiser reads of a caption, and an image's size.
      zeros_without_caption: whether zeros may stand for a missing caption, as model_index.json says.
      shifts_latents: whether the class in diffusers reads the VAE's `shift_factor`.
      optional: components that a model may be without.
    """

    denoiser: str
    classes: Mapping[str, tuple[str, ...]]
    process: type[Process]
    sample_size: int
    conditioner: Conditioner
    zeros_without_caption: bool = False
    shifts_latents: bool = False
    optional: tuple[str, ...] = ()

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The components that encode captions."""
        return tuple(name for name in self.classes if name not in (self.denoiser, "vae"))

    def zero_empty_captions(self, index: JsonObject) -> bool:
        """Returns whether zeros stand for a missing caption: as model_index.json or diffusers says."""
        return self.zeros_without_caption and bool(index.get("force_zeros_for_empty_prompt", True))


_STABLE_DIFFUSION = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
}
FAMILIES = {
    "StableDiffusionPipeline": Family("unet", _STABLE_DIFFUSION, Schedule, 64, StableDiffusion()),
    "StableDiffusionXLPipeline": Family(
        "unet",
        {**_STABLE_DIFFUSION, "text_encoder_2": ("CLIPTextModelWithProjection",)},
        Schedule,
        128,
        StableDiffusionXL(),
        zeros_without_caption=True,
    ),
    "StableDiffusion3Pipeline": Family(
        "transformer",
        {
            "transformer": ("SD3Transformer2DModel",),
            "vae": _STABLE_DIFFUSION["vae"],
            "text_encoder": ("CLIPTextModelWithProjection",),
            "text_encoder_2": ("CLIPTextModelWithProjection",),
            T5: ("T5EncoderModel",),
        },
        RectifiedFlow,
        128,
        StableDiffusion3(),
        shifts_latents=True,
        optional=(T5,),
    ),
}
NETWORKS = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.classes))
"""The components of any family; others of a folder (a safety checker) are carried along."""
