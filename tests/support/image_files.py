"""Small image files for tests of the sources."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def image_bytes(color="red", size=(6, 4), mode="RGB", file_format="PNG", **arguments) -> bytes:
    """A one-coloured image file."""
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, file_format, **arguments)
    return buffer.getvalue()


def numbered_image(number: int) -> bytes:
    """An image that says which one it is: see `number_of`."""
    return image_bytes((number // 256, number % 256, 0), size=(2, 2))


def number_of(image: Image.Image) -> int:
    """The number of an image made by `numbered_image`."""
    red, green, _ = image.getpixel((0, 0))
    return red * 256 + green


def write_pairs_folder(folder: Path, captions: Sequence[str]) -> Path:
    """A folder of pairs of 16 pixels, one of each caption, for the source `folder`."""
    lines = []
    for i, caption in enumerate(captions):
        for kind, darker in (("winner", 1), ("loser", 2)):
            pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8) // darker
            Image.fromarray(pixels).save(folder / f"{kind}{i}.png")
        row = {"caption": caption, "winner": f"winner{i}.png", "loser": f"loser{i}.png"}
        lines.append(json.dumps(row) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder
