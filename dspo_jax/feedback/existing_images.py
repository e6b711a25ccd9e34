"""Images that exist already, by prompt: what `sample` left, or a folder with a file of prompts and images."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dspo_jax.evaluation.image_folders import ImageFolder
from dspo_jax.files import link_or_copy, sha256, whole
from dspo_jax.sampling.folder import MANIFEST
from dspo_jax.sampling.prompts import read_prompts

# Files that name a prompt and an image in each row, the first that is there, and how they call the image.
_COLUMNS = {
    MANIFEST: ("file",),
    "metadata.jsonl": ("file_name", "file", "image"),
    "metadata.csv": ("file_name", "file", "image"),
    "pairs.jsonl": ("winner", "loser"),
    "pairs.csv": ("winner", "loser"),
}


class ImagesOfPrompt(NamedTuple):
    """A prompt and the files of its images."""

    text: str
    files: Sequence[Path]


def read_images(folder: ImageFolder) -> list[ImagesOfPrompt]:
    """Reads which images a folder has of each prompt, in the order of its file; of pairs, winners first.

    The file is manifest.jsonl, which `sample` writes, of all models or, in the folder of one, of that one;
    metadata.jsonl or .csv, as the hub's image folders have; or pairs.jsonl or .csv, as `encode` reads them.

    Raises:
      FileNotFoundError: no such folder, no such file in it, or an image is missing.
      UserError: a row that cannot be understood, or an image outside the folder.
    """
    path = folder.path
    if not path.is_dir():
        raise FileNotFoundError(f"--images_from={path}: no such folder")
    named = [path / name for name in _COLUMNS]
    if re.match(r"\d+-", path.resolve().name):  # of one model, beside which the manifest of all lies
        named.append(path.resolve().parent / MANIFEST)
    file = next((each for each in named if each.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"--images_from={path}: holds none of {', '.join(_COLUMNS)}, which name prompts and images; "
            'write a metadata.jsonl of lines {"file_name": ..., "prompt": ...}'
        )
    columns = _COLUMNS[file.name]
    # Of a pair both images are wanted, of others the one that is called by any of these names.
    groups = [[column] for column in columns] if file.stem == "pairs" else [columns]
    by_prompt: dict[str, dict[Path, None]] = {}
    for group in groups:
        rows = read_prompts(str(file), allow_outside=folder.allow_outside, image_columns=group, option=None)
        for prompt in rows:
            image = prompt.image
            if image is not None and (file.parent == path or image.parent.name == path.resolve().name):
                by_prompt.setdefault(prompt.text, {})[image] = None
    return [ImagesOfPrompt(text, list(images)) for text, images in by_prompt.items()]


def place_gathered(images: Sequence[ImagesOfPrompt], out: Path) -> list[ImagesOfPrompt]:
    """Returns where `gather_images` puts the images: 00012_3f0c….png is of prompt 12, counted from 0.

    The rest of a name is of the content, as scores that were kept are found by the file's name.
    """
    return [
        ImagesOfPrompt(text, [out / f"{number:05d}_{sha256(file)[:16]}{file.suffix}" for file in files])
        for number, (text, files) in enumerate(images)
    ]


def gather_images(images: Sequence[ImagesOfPrompt], out: Path) -> None:
    """Brings images into a folder: as hard links on the same disk, or else as copies."""
    for before, after in zip(images, place_gathered(images, out), strict=True):
        for file, target in zip(before.files, after.files, strict=True):
            with whole(target) as partial:
                partial.unlink(missing_ok=True)  # what a killed run left may be a link to another image
                link_or_copy(file, partial)
