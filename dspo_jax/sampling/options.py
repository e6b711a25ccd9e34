"""Parsed flags to prompts, seeds and a rendering, for the commands that draw."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from dspo_jax.errors import UserError
from dspo_jax.sampling.init_latents import map_latents
from dspo_jax.sampling.prompts import Prompt, check_text, read_prompts
from dspo_jax.sampling.rendering import Drawing, Rendering, SkipLayers


class Options(NamedTuple):
    """Parsed options of `sample`."""

    prompts: Sequence[Prompt]
    rendering: Rendering
    seeds: Sequence[int]
    init_latents: np.ndarray | None


def read_options(settings: flags.FlagValues) -> Options:
    """Reads prompts and noise, and checks the options.

    Raises:
      UserError: an option that is refused.
      FileNotFoundError: a file that is missing.
    """
    seeds = _parse_seeds(settings.seeds)
    latents = map_latents(settings.init_latents) if settings.init_latents else None
    found = read_prompts(settings.prompts, allow_outside=settings.allow_outside)
    prompts, rendering = read_drawing_flags(settings, found)
    rendering = dataclasses.replace(
        rendering,
        preview_vae=settings.preview_vae,
        optimize_noise=settings.optimize_noise or "",
        optimize_steps=settings.optimize_steps,
        rewards_folder=settings.reward_dir,
        negative_model=settings.negative_model,
    )
    return Options(prompts, rendering, seeds, latents)


def _parse_seeds(texts: Sequence[str]) -> list[int]:
    try:
        seeds = [int(text) for text in texts]
    except ValueError as error:
        raise UserError(f"--seeds={','.join(texts)}: must be whole numbers, separated by commas") from error
    if not seeds or not all(0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds={','.join(texts)}: must be different numbers from 0 to {2**32 - 1}")
    return seeds


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
        guidance_rescale=settings.guidance_rescale,
        skip_layer_guidance=_parse_skipping(settings),
        negative_prompt=negative,
        strength=strength,
        eta=settings.eta,
        max_chunks=settings.max_chunks,
        clip_skip=settings.clip_skip,
        max_sequence_length=settings.max_sequence_length,
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


def _parse_skipping(settings: flags.FlagValues) -> SkipLayers | None:
    given = {key: getattr(settings, f"skip_layer_{key}") for key in ("scale", "start", "stop")}
    given = {key: value for key, value in given.items() if value is not None}
    if not settings.skip_layers:
        for key, value in given.items():
            raise UserError(f"--skip_layer_{key}={value:g}: no layers are skipped; give --skip_layers=7,8,9")
        return None
    try:
        layers = tuple(map(int, settings.skip_layers))
    except ValueError as error:
        raise UserError(
            f"--skip_layers={','.join(settings.skip_layers)}: must be numbers of blocks, as 7,8,9"
        ) from error
    return SkipLayers(layers, **given)


def _parse_interval(texts: Sequence[str]) -> tuple[int, int]:
    try:
        first, last = map(int, texts)
    except ValueError as error:
        raise UserError(
            f"--guidance_interval={','.join(texts)}: must be two timesteps, as 200,900"
        ) from error
    return first, last
