"""Prompts to images, from one model or several side by side: a folder for each, a manifest, a contact sheet.

    python -m dspo_jax.sample --model examples/emoji/model --model runs/emoji --prompts "red heart" --out out

Every model starts from the same noise, which depends on the seed and the number of the prompt alone. A folder
that was left unfinished is gone on with.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from dspo_jax import cli
from dspo_jax.errors import UserError
from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import use_cpu_cores
from dspo_jax.sampling.drawing import sample
from dspo_jax.sampling.drawing_flags import define_drawing_flags, read_drawing_flags
from dspo_jax.sampling.init_latents import map_latents
from dspo_jax.sampling.prompts import Prompt, read_prompts
from dspo_jax.sampling.rendering import Rendering


class Options(NamedTuple):
    """Parsed options of the command."""

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
    rendering = dataclasses.replace(rendering, preview_vae=settings.preview_vae)
    return Options(prompts, rendering, seeds, latents)


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    use_cpu_cores()
    processes.initialize_from_flags()
    settings = flags.FLAGS
    out = Path(settings.out)
    with processes.claim(out):
        options = read_options(settings)
        sheet = sample(
            {path: path for path in settings.model},
            options.prompts,
            out,
            options.rendering,
            seeds=options.seeds,
            init_latents=options.init_latents,
            overwrite=settings.overwrite,
        )
    if sheet is not None:
        print(sheet)


def _parse_seeds(texts: Sequence[str]) -> list[int]:
    try:
        seeds = [int(text) for text in texts]
    except ValueError as error:
        raise UserError(f"--seeds={','.join(texts)}: must be whole numbers, separated by commas") from error
    if not seeds or not all(0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds={','.join(texts)}: must be different numbers from 0 to {2**32 - 1}")
    return seeds


if __name__ == "__main__":
    flags.DEFINE_multi_string(
        "model", None, "A diffusers folder or a training workdir; may be repeated.", required=True
    )
    flags.DEFINE_string(
        "prompts", None, "A prompt, or a .txt, .jsonl, .json, .tsv, .csv or .parquet file.", required=True
    )
    flags.DEFINE_string(
        "out", None, "Folder to write to; what is there already is not drawn again.", required=True
    )
    flags.DEFINE_list("seeds", ["0"], "Seeds, separated by commas; one image each.")
    flags.DEFINE_string("init_latents", None, "A .npy file of standard normal noise [prompts, h, w, C].")
    flags.DEFINE_string(
        "preview_vae", None, "Folder of an AutoencoderTiny (TAESD) that decodes instead, faster."
    )
    define_drawing_flags()
    processes.define_flags()
    cli.run(main)
