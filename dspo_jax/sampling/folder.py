"""The folder that `sample` writes: settings, images, a manifest, contact sheets."""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image

from dspo_jax.errors import UserError
from dspo_jax.files import sha256, whole, write_json
from dspo_jax.images.contact_sheet import contact_sheet, enlargement
from dspo_jax.json_files import read_object
from dspo_jax.locks import is_empty
from dspo_jax.pipelines.loading import Adapted
from dspo_jax.sampling.image_sampler import ImageRequest
from dspo_jax.sampling.prompts import Prompt
from dspo_jax.sampling.rendering import Rendering

MANIFEST = "manifest.jsonl"
SETTINGS = "settings.json"
_INIT_IMAGES = "init_images"  # copies of the pictures that were edited
# On a contact sheet.
_ROWS, _SHEETS, _SIDE = 20, 10, 256

Files = Mapping[str, Mapping[ImageRequest, Path]]
"""By heading of a model and by request, the file of the image."""


def claim_output(out: Path, settings: Mapping[str, object], *, overwrite: bool) -> None:
    """Notes in `out` how its images are drawn, or refuses images that were drawn otherwise.

    Raises:
      UserError: `out` holds images of other settings and may not be overwritten, or other files.
    """
    path = out / SETTINGS
    ours = json.loads(json.dumps(settings))
    if path.is_file():
        fix = f"delete {out}, or choose another folder: how its images were drawn is lost"
        # Folders of earlier versions were all drawn so.
        earlier = {"eta": 0.0, "guidance_rescale": 0.0, "optimize_noise": "", "optimize_steps": 0}
        earlier |= {"negative_model": None, "negative_sha256": None, "skip_layer_guidance": None}
        theirs = {**earlier, **read_object(path, fix)}
        differing = [key for key in ours if theirs.get(key) != ours[key]]
        if not differing:
            return
        if not overwrite and any(out.glob("[0-9]*-*/[0-9]*")):
            key = differing[0]
            if key.endswith("_sha256"):
                what = f"of other {key.removesuffix('_sha256')}"
            else:
                what = f"with {key} = {theirs.get(key)!r}, here it is {ours[key]!r}"
            raise UserError(f"--out={out}: holds images {what}; choose another folder, or --overwrite them")
        for old in (*out.glob("[0-9]*-*"), out / MANIFEST, *out.glob("contact_sheet*.png")):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        shutil.rmtree(out / _INIT_IMAGES, ignore_errors=True)
    elif not is_empty(out):
        raise UserError(f"--out={out}: not empty, and not made by this command; choose another folder")
    write_json(path, ours)


def place_images(
    out: Path, labels: Sequence[str], requests: Sequence[ImageRequest], image_format: str
) -> Files:
    """Returns where each requested image goes: a folder for each model, files named by prompt and seed."""
    return {
        label: {
            request: out
            / f"{i}-{Path(label).name}"
            / f"{request.prompt_index:05d}_{request.seed}.{image_format}"
            for request in requests
        }
        for i, label in enumerate(labels)
    }


def save_image(image: UInt8[np.ndarray, "H W 3"], file: Path) -> None:
    """Writes an image [H, W, 3] uint8; the file appears when it is whole."""
    with whole(file) as partial:
        Image.fromarray(image).save(partial, format=file.suffix[1:], lossless=True)


def note_rewards(file: Path, before: float, after: float) -> None:
    """Writes beside an image what optimising its noise did to the reward, for the manifest."""
    write_json(file.with_suffix(".json"), {"reward_before": before, "reward_after": after})


def write_manifest(
    out: Path,
    models: Mapping[str, str | Path | Adapted],
    prompts: Sequence[Prompt],
    files: Files,
    rendering: Rendering,
) -> None:
    """Writes manifest.jsonl: one line for each image, of how it was drawn.

    Of an edit it names the picture that was edited, of which the folder gets a copy.
    """
    keys = ("sampler", "steps", "eta", "guidance_scale", "guidance_rescale", "strength")
    how = {key: getattr(rendering.drawing, key) for key in keys}
    how["negative_model"] = rendering.negative_model
    if rendering.drawing.skip_layer_guidance is not None:
        how["skip_layer_guidance"] = dataclasses.asdict(rendering.drawing.skip_layer_guidance)
    init_images = [prompt.image and _copy_init_image(prompt.image, out) for prompt in prompts]
    with whole(out / MANIFEST) as partial, partial.open("w", encoding="utf-8") as manifest:
        for label, path in models.items():
            for request, file in files[label].items():
                record = {
                    "model": str(path),
                    "prompt": request.prompt,
                    "prompt_index": request.prompt_index,
                    "seed": request.seed,
                    "file": str(file.relative_to(out)),
                    **how,
                }
                if init_image := init_images[request.prompt_index]:
                    record["init_image"] = init_image
                if (noted := file.with_suffix(".json")).is_file():
                    record |= read_object(noted, f"delete {file.parent}, and draw its images again")
                manifest.write(json.dumps(record, ensure_ascii=False) + "\n")


def _copy_init_image(image: Path, out: Path) -> str:
    """Copies a picture that was edited into the folder; returns its path there."""
    name = f"{_INIT_IMAGES}/{sha256(image)[:16]}{image.suffix}"
    if not (out / name).exists():
        with whole(out / name) as partial:
            shutil.copyfile(image, partial)
    return name


def _sheet_name(page: int, pages: int) -> str:
    return "contact_sheet.png" if pages == 1 else f"contact_sheet-{page:03d}.png"


def write_sheets(out: Path, prompts: Sequence[Prompt], seeds: Sequence[int], files: Files) -> Path:
    """Draws contact_sheet.png, or several for many prompts, of which the first are shown.

    Prompts are rows, the seeds of each model columns. Returns the first sheet's path.
    """
    pages = math.ceil(len(prompts) / _ROWS)
    if pages > _SHEETS:
        logging.info("contact sheets of the first %d of %d prompts", _ROWS * _SHEETS, len(prompts))
    for page in range(min(pages, _SHEETS)):
        rows = []
        for i in range(page * _ROWS, min((page + 1) * _ROWS, len(prompts))):
            text = prompts[i].text
            rows.append(
                (
                    text,
                    [
                        _thumbnail(of_model[ImageRequest(text, i, s)])
                        for of_model in files.values()
                        for s in seeds
                    ],
                )
            )
        sheet = contact_sheet(
            rows,
            [(label, len(seeds)) for label in files],
            enlargement(*rows[0][1][0].shape[:2]),
            [f"seed {seed}" for _ in files for seed in seeds],
        )
        with whole(out / _sheet_name(page, pages)) as partial:
            sheet.save(partial, format="PNG")
    return out / _sheet_name(0, pages)


def _thumbnail(file: Path) -> UInt8[np.ndarray, "H W 3"]:
    with Image.open(file) as image:
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        return np.asarray(image)
