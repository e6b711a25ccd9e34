"""Parsed flags of the evaluation to the models that it compares and to how they draw."""

from pathlib import Path

from absl import flags

from dspo_jax.errors import UserError
from dspo_jax.evaluation.image_folders import ImageFolder
from dspo_jax.evaluation.people import read_votes
from dspo_jax.evaluation.prompt_sets import PromptSet, read_prompt_set
from dspo_jax.evaluation.run import PROMPT_IMAGES, Comparison, ModelOrImages, check_out
from dspo_jax.files import parse_named
from dspo_jax.pipelines.loading import Adapted
from dspo_jax.sampling.options import read_drawing_flags
from dspo_jax.sampling.rendering import Rendering


def read_options(settings: flags.FlagValues) -> tuple[Comparison, Rendering]:
    """Reads the models that the flags compare, and how they draw.

    Raises:
      UserError: a flag that is refused.
      OSError: a file that is missing.
    """
    if bool(settings.base) == bool(settings.base_images):
        raise UserError("--base or --base_images: give one of them")
    loras = tuple(settings.lora)
    if loras and not settings.model:
        raise UserError(f"--lora={loras[0]}: added to each --model, and there is none; name one")
    models: dict[str, ModelOrImages] = {}
    for flag, texts in (("model", settings.model), ("images", settings.images)):
        for text in texts:
            label, path = parse_named(text)
            if label in models:
                raise UserError(f"--{flag}={text}: two are called {label!r}; name it: --{flag}=NAME=DIR")
            if flag == "images":
                models[label] = ImageFolder(Path(path), settings.allow_outside)
            else:
                models[label] = Adapted(path, loras) if loras else path
    people, min_checks = settings.people, settings.min_checks
    if min_checks and people is None:
        raise UserError(f"--min_checks={min_checks:g}: is of people's votes; name these with --people")
    votes = {} if people is None else read_votes(Path(people), min_checks=min_checks)
    out = Path(settings.out)
    check_out(out)  # before the pictures of a set of edits are unpacked into it
    found = read_prompt_set(settings.prompts, out / PROMPT_IMAGES, allow_outside=settings.allow_outside)
    prompts, rendering = read_drawing_flags(settings, found.prompts)
    comparison = Comparison(
        base=settings.base or ImageFolder(Path(settings.base_images), settings.allow_outside),
        models=models,
        prompts=PromptSet(found.name, tuple(prompts)),
        seeds=settings.num_seeds,
        base_seeds=settings.num_base_seeds,
        votes=votes,
    )
    return comparison, rendering
