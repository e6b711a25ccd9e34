"""Flags of how images are drawn, shared by several commands."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dspo_jax import samplers
from dspo_jax.errors import UserError
from dspo_jax.sampling.prompts import Prompt, check_text
from dspo_jax.sampling.rendering import DTYPES, FORMATS, Drawing, Rendering


def define_drawing_flags() -> None:
    """Defines the drawing flags; a command calls this once."""
    flags.DEFINE_enum("sampler", "ddim", [*samplers.SAMPLERS], "How noise becomes an image.")
    flags.DEFINE_integer("steps", 50, "Steps of the sampler.")
    flags.DEFINE_float("eta", 0.0, "Of ddim: from 0, no noise in its steps, to 1, as much as ddpm adds.")
    flags.DEFINE_float("guidance_scale", 7.5, "s in uncond + s (cond - uncond); at 1 or less, no guidance.")
    flags.DEFINE_list("guidance_interval", ["0", "1000"], "The smallest and largest timestep that is guided.")
    flags.DEFINE_integer("batch_size", 16, "Images drawn at a time.")
    flags.DEFINE_string("negative_prompt", None, "What to steer away from.")
    flags.DEFINE_string("init_image", None, "A picture to start from; a .jsonl of prompts may name one each.")
    flags.DEFINE_bool(
        "allow_outside", False, "Read images that lie outside the folder of the file that names them."
    )
    flags.DEFINE_float("strength", None, "How much of it is drawn anew, in (0, 1] (default: 0.75).")
    flags.DEFINE_integer("height", None, "In pixels (default: what the model was made for).")
    flags.DEFINE_integer("width", None, "In pixels.")
    flags.DEFINE_enum("format", "png", FORMATS, "Of the images; webp without loss.")
    flags.DEFINE_enum(
        "compute_dtype",
        None,
        DTYPES,
        "Of UNet and text encoders; the VAE is float32 (default: bfloat16 on an accelerator).",
    )
    flags.DEFINE_integer("vae_tile", 1024, "Larger images are decoded in tiles of this side; 0: never.")
    flags.DEFINE_bool("overwrite", False, "Delete images of other settings that are in the folder.")


def read_drawing_flags(
    settings: flags.FlagValues, prompts: Sequence[Prompt]
) -> tuple[list[Prompt], Rendering]:
    """Reads the prompts, now with the image to start from, and how they are rendered.

    Raises:
      UserError: a flag that is refused.
      FileNotFoundError: the image is missing.
    """
    if (settings.height is None) != (settings.width is None):
        raise UserError("--height and --width: give both or none")
    negative = settings.negative_prompt
    if negative is not None:
        check_text(negative, "--negative_prompt")
    strength = settings.strength
    if strength is None:
        edited = settings.init_image or any(prompt.image for prompt in prompts)
        strength = 0.75 if edited else 1.0
    prompts = _with_images(prompts, settings.init_image, strength)
    drawing = Drawing(
        sampler=settings.sampler,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        guidance_interval=_parse_interval(settings.guidance_interval),
        negative_prompt=negative,
        strength=strength,
        eta=settings.eta,
    )
    rendering = Rendering(
        drawing=drawing,
        size=None if settings.height is None else (settings.height, settings.width),
        batch_size=settings.batch_size,
        compute_dtype=settings.compute_dtype,
        image_format=settings.format,
        vae_tile=settings.vae_tile,
    )
    return prompts, rendering


def _with_images(prompts: Sequence[Prompt], init_image: str | None, strength: float) -> list[Prompt]:
    """Gives all prompts the one image; refuses a mixture, and a strength without an image."""
    if init_image is not None:
        if not Path(init_image).is_file():
            raise FileNotFoundError(f"--init_image={init_image}: no such file")
        prompts = [Prompt(p.text, p.image or Path(init_image), p.category) for p in prompts]
    with_image = sum(prompt.image is not None for prompt in prompts)
    if 0 < with_image < len(prompts):
        raise UserError(
            f"--prompts: {with_image} of {len(prompts)} have an image; give all of them one, or --init_image"
        )
    if not with_image and strength != 1:
        raise UserError(f"--strength={strength:g}: is of editing an image; give --init_image")
    return list(prompts)


def _parse_interval(texts: Sequence[str]) -> tuple[int, int]:
    try:
        first, last = map(int, texts)
    except ValueError as error:
        raise UserError(
            f"--guidance_interval={','.join(texts)}: must be two timesteps, as 200,900"
        ) from error
    return first, last
