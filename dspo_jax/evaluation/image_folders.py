"""Folders of images drawn earlier or elsewhere: the file of each prompt and seed."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

from dspo_jax.errors import UserError
from dspo_jax.images.image_files import ImagePaths
from dspo_jax.json_files import JsonObject, read_object
from dspo_jax.sampling.folder import MANIFEST, SETTINGS
from dspo_jax.sampling.prompts import COMMAND_ALLOWS_OUTSIDE, Prompt

_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
_FIX = "draw the images again, or move them to a folder of their own, where nothing is known of them"
_NAME = re.compile(r"(\d+)_(\d+)")


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A folder with one image for each prompt and seed, `00012_3.png` of prompt 12 (from 0) and seed 3.

    It may be the output of `sample` for one model, whose manifest says how the images were drawn.

    Attributes:
      path: the folder.
      allow_outside: whether its files may be symbolic links that lead out of it.
    """

    path: Path
    allow_outside: bool = False


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a base or a model.

    Attributes:
      source: the model or folder as the user named it.
      how: settings that the images were drawn with, as far as they are known.
      files: by prompt and seed.
    """

    source: str
    how: JsonObject
    files: Sequence[Sequence[Path]]


def find_images(folder: ImageFolder, prompts: Sequence[Prompt], seeds: int) -> Images:
    """Finds the files of every prompt with seeds 0, 1, ... in a folder that holds no other images.

    Raises:
      FileNotFoundError: no such folder, or an image is missing.
      UserError: an image too many, a link out of the folder, or images of other prompts.
    """
    path, settings = _locate(folder.path)
    paths = ImagePaths(path, COMMAND_ALLOWS_OUTSIDE, folder.allow_outside)
    files: dict[tuple[int, int], Path] = {}
    wanted = f"{len(prompts):,} prompts with seeds 0 to {seeds - 1}"
    for file in sorted(path.iterdir()):
        if file.suffix.lower() not in _SUFFIXES:
            continue
        match = _NAME.fullmatch(file.stem)
        if not match:
            raise UserError(
                f"{file}: images must be named PROMPT_SEED, as 00012_3.png; rename it or move it away"
            )
        prompt, seed = int(match[1]), int(match[2])
        if prompt >= len(prompts) or seed >= seeds or (prompt, seed) in files:
            raise UserError(f"{file}: an image too many; there are {wanted}; move it away")
        files[prompt, seed] = paths.find(file.name)
    for prompt in range(len(prompts)):
        for seed in range(seeds):
            if (prompt, seed) not in files:
                name = f"{prompt:05d}_{seed}.png"
                raise FileNotFoundError(f"{path / name}: no such image, but there are {wanted}")
    _check_prompts(path, prompts)
    by_prompt = [[files[prompt, seed] for seed in range(seeds)] for prompt in range(len(prompts))]
    return Images(str(folder.path), settings, by_prompt)


def _locate(path: Path) -> tuple[Path, JsonObject]:
    """Returns the folder with the images, and what `sample` noted of how they were drawn."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder of images")
    if (path / SETTINGS).is_file():
        folders = sorted(path.glob("[0-9]*-*"))
        if len(folders) != 1:
            found = ", ".join(folder.name for folder in folders) or "none"
            raise UserError(f"{path}: must hold the images of one model, holds: {found}; name one of them")
        path = folders[0]
    settings = path.parent / SETTINGS
    number = re.match(r"(\d+)-", path.name)
    if not settings.is_file() or not number:
        return path, {}
    how = read_object(settings, _FIX)
    try:
        return path, {**how, **how["models"][int(number[1])]}
    except (TypeError, KeyError, IndexError) as error:
        raise UserError(f"{settings}: not what sample writes, of image folder {path.name}; {_FIX}") from error


def _check_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Refuses images that `sample` drew of other prompts."""
    manifest = path.parent / MANIFEST
    if not manifest.is_file():
        return
    lines = manifest.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            file, text, index = record["file"], record["prompt"], record["prompt_index"]
            of_folder = file.startswith(f"{path.name}/") and 0 <= index < len(prompts)
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{manifest}, line {number}: not what sample writes; {_FIX}") from error
        if of_folder and text != prompts[index].text:
            raise UserError(
                f"{path.parent / file}: is of {text!r}, but that prompt is {prompts[index].text!r}; give the "
                "prompts that it was drawn with"
            )
