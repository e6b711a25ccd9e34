"""Contact sheets: images in a grid under headings."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LABEL_HEIGHT = 14
_MARGIN = 4


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[tuple[str, int]], scale: int = 1
) -> Image.Image:
    """Draws images in a grid, each row under its prompt, below headings.

    Args:
      rows: (prompt, images [H, W, 3] uint8) with the same number of images in each.
      columns: (heading, how many of the columns it stands over), from the left.
      scale: whole number that the images are enlarged by.
    """
    height, width = (scale * size for size in rows[0][1][0].shape[:2])
    count = len(rows[0][1])
    row_height = _LABEL_HEIGHT + height + _MARGIN
    gaps = _MARGIN * (count + 1) + _MARGIN * (len(columns) - 1)
    size = (count * width + gaps, _LABEL_HEIGHT + len(rows) * row_height + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    lefts, x = [], _MARGIN
    for heading, span in columns:
        draw.text((x, 0), heading, "black", font)
        for _ in range(span):
            lefts.append(x)
            x += width + _MARGIN
        x += _MARGIN
    for number, (prompt, images) in enumerate(rows):
        top = _LABEL_HEIGHT + number * row_height
        draw.text((_MARGIN, top), prompt, "dimgray", font)
        for left, image in zip(lefts, images, strict=True):
            picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top + _LABEL_HEIGHT))
    return sheet
