"""Contact sheets of encoded examples: captions, and images decoded from the stored latents."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dspo_jax.data import shards
from dspo_jax.data.records import Example
from dspo_jax.data.summary import Examples
from dspo_jax.errors import UserError
from dspo_jax.images.contact_sheet import wrap
from dspo_jax.monitoring.progress import Progress
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.pipelines.stored import count_chunks, read_crops
from dspo_jax.sampling.decoding import Decoder, warn_of_non_finite

WINNER_COLOUR = (44, 160, 44)
FRAME = 5
MARGIN = 12
TEXT_WIDTH = 250
HEADING_HEIGHT = 24
# Pictures are fitted into a square of this side, so that twelve rows can be looked through at a glance.
PICTURE_SIDE = 256
# DejaVu Sans: Pillow's own font has no letter beyond English.
_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
_FONT_SIZE, _LINE_HEIGHT = 12, 17
_DECODED_AT_ONCE = 4


def decode_examples(pipe: Pipeline, examples: Sequence[Example]) -> list[np.ndarray]:
    """Decodes examples, whose shapes may differ, as the means of their posteriors.

    Args:
      pipe: the model they were encoded with.
      examples: each with `caption` and `moments` [P, h, w, 2C].

    Returns:
      Of each example its images [P, H, W, 3] uint8; with a warning, black where they are not finite.
    """
    of_shape = defaultdict(list)
    for number, example in enumerate(examples):
        for mean in np.split(example["moments"].astype(np.float32), 2, axis=-1)[0]:
            of_shape[mean.shape].append((number, mean))
    images: list[list[np.ndarray]] = [[] for _ in examples]
    decoder, done = Decoder(pipe), 0
    with Progress("decode", sum(map(len, of_shape.values()))) as progress:
        for latents in of_shape.values():
            for start in range(0, len(latents), _DECODED_AT_ONCE):
                part = latents[start : start + _DECODED_AT_ONCE]
                # The last batch is filled up: one compiled program for each shape.
                full = part + part[-1:] * (_DECODED_AT_ONCE - len(part))
                decoded, finite = decoder(np.stack([mean for _, mean in full]))
                captions = [examples[number]["caption"] for number, _ in part]
                warn_of_non_finite(str(pipe.path), captions, finite[: len(part)])
                for (number, _), image in zip(part, decoded, strict=False):
                    images[number].append(image)
                done += len(part)
                progress.update(done)
    return [np.stack(each) for each in images]


def draw_sheet(rows: Sequence[tuple[str, Sequence[str], np.ndarray]]) -> Image.Image:
    """Draws a row for each example: the caption, the winner in a green frame, the loser.

    Args:
      rows: caption, lines in small grey print under it, and images [P, H, W, 3] uint8 of any size; with P = 1
        or a list there is no frame.
    """
    per_example = len(rows[0][2])
    fitted = [[_fit(image) for image in images] for _, _, images in rows]
    heights = [max(image.height for image in images) + 2 * FRAME for images in fitted]
    cell = PICTURE_SIDE + 2 * FRAME + MARGIN
    left = MARGIN + TEXT_WIDTH + MARGIN
    size = (left + per_example * cell, HEADING_HEIGHT + sum(heights) + MARGIN * len(rows))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(_FONT, _FONT_SIZE)
    headings = ["image", *(f"image {place}" for place in range(2, per_example + 1))]
    for column, heading in enumerate(("winner", "loser") if per_example == 2 else headings):
        draw.text((left + column * cell + FRAME, 4), heading, "black", font)
    top = HEADING_HEIGHT
    for (caption, notes, _), images, height in zip(rows, fitted, heights, strict=True):
        lines = [(line, "dimgray") for note in notes for line in wrap(note, TEXT_WIDTH, font)]
        room = max(1, height // _LINE_HEIGHT - len(lines))
        wrapped = wrap(caption, TEXT_WIDTH, font)
        if len(wrapped) > room:
            wrapped[room - 1 :] = ["..."]
        lines = [(line, "black") for line in wrapped] + lines
        for number, (line, colour) in enumerate(lines):
            draw.text((MARGIN, top + number * _LINE_HEIGHT), line, colour, font)
        for column, image in enumerate(images):
            is_winner = per_example == 2 and column == 0
            # The others' edges need a line too: their background may be as white as the sheet.
            width = FRAME if is_winner else 1
            framed = ImageOps.expand(image, width, WINNER_COLOUR if is_winner else "lightgray")
            sheet.paste(framed, (left + column * cell + FRAME - width, top + FRAME - width))
        top += height + MARGIN
    return sheet


def _fit(pixels: np.ndarray) -> Image.Image:
    """Fits an image into the square, a small one by a whole factor so that its pixels stay visible."""
    image = Image.fromarray(pixels)
    factor = PICTURE_SIDE // max(image.size)
    if factor:
        return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    return image


def choose_examples(
    directory: Path, splits: Sequence[str], count: int, seed: int
) -> list[tuple[str, Example]]:
    """Draws random examples of the splits, each as likely, in order, with the names of their splits.

    Raises:
      UserError: there is none, or a split does not fit the manifest.
      OSError: a shard cannot be read.
    """
    manifest = shards.read_manifest(directory)
    opened = {split: Examples(directory, split, manifest) for split in splits}
    total = sum(map(len, opened.values()))
    if not total:
        raise UserError(f"{directory}: no example to draw in {', '.join(splits)}")
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    found, first = [], 0
    for split, examples in opened.items():
        numbers = chosen[(first <= chosen) & (chosen < first + len(examples))] - first
        found += [(split, example) for example in examples.read(numbers.tolist(), moments=True)]
        first += len(examples)
    return found


def draw_examples(model: str, directory: Path, chosen: Sequence[tuple[str, Example]]) -> Image.Image:
    """Draws what `choose_examples` has chosen.

    Args:
      model: the model directory that decodes.
      directory: the dataset.
      chosen: names of splits, and examples with `moments`.

    Raises:
      UserError: the dataset was encoded with another model, or the model is damaged.
      FileNotFoundError: no such model.
    """
    manifest = shards.read_manifest(directory)
    made_with = manifest["model"]
    pipe = load_pipeline(
        model, max_chunks=count_chunks(made_with), max_sequence_length=made_with.get("t5_length")
    )
    shards.check_manifest(manifest, pipe.fingerprint(), path=directory / shards.MANIFEST)
    images = decode_examples(pipe, [example for _, example in chosen])
    return draw_sheet(
        [
            (example["caption"], _notes(split, example), pixels)
            for (split, example), pixels in zip(chosen, images, strict=True)
        ]
    )


def _notes(split: str, example: Example) -> list[str]:
    sizes = " and ".join(f"{crop.width} x {crop.height}" for crop in read_crops(example))
    notes = [f"{split} {example['key']}", f"from {sizes} pixels"]
    if example["preference"] < 1:
        kind = "preference" if len(example["moments"]) > 1 else "liked"
        notes.append(f"{kind} {example['preference']:.2f}")
    if shards.SCORES in example:
        notes.append("score " + " and ".join(f"{score:.4g}" for score in example[shards.SCORES]))
    return notes
