"""Families of text-to-image models: how the components of a diffusers pipeline class work together."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Family:
    """A class of diffusers pipelines.

    Attributes:
      denoiser: component that predicts noise.
      classes: component -> names of the model classes that may take its part; the denoiser, the VAE and the
        text encoders in order.
      sample_size: side of the latents that diffusers assumes where the denoiser's config names none.
      micro_conditioning: whether the denoiser reads the penultimate states of all text encoders side by side,
        the last one's pooled state, and the image's original size, crop and target size (SDXL, section 2.2);
        else it reads the last states of one text encoder.
    """

    denoiser: str
    classes: Mapping[str, tuple[str, ...]]
    sample_size: int
    micro_conditioning: bool

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The components that encode captions."""
        return tuple(name for name in self.classes if name not in (self.denoiser, "vae"))


_STABLE_DIFFUSION = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
}
FAMILIES = {
    "StableDiffusionPipeline": Family("unet", _STABLE_DIFFUSION, 64, micro_conditioning=False),
    "StableDiffusionXLPipeline": Family(
        "unet",
        {**_STABLE_DIFFUSION, "text_encoder_2": ("CLIPTextModelWithProjection",)},
        128,
        micro_conditioning=True,
    ),
}
