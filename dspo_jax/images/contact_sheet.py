"""Contact sheets: images in a grid under headings."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 256
"""The least side of an image on a sheet, in pixels: smaller ones are enlarged by a whole number."""
_LINE = 14
_MARGIN = 4


def enlargement(height: int, width: int) -> int:
    """Returns the whole number by which images are enlarged to reach `CELL`."""
    return max(1, -(-CELL // max(height, width)))


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    columns: Sequence[tuple[str, int]],
    scale: int = 1,
    labels: Sequence[str] = (),
) -> Image.Image:
    """Draws images in a grid, each row under its prompt, which is written out, below headings.

    Args:
      rows: (prompt, images [H, W, 3] uint8) with the same number of images in each.
      columns: (heading, how many of the columns it stands over), from the left.
      scale: whole number that the images are enlarged by.
      labels: of each column, such as its seed; none leaves the line out.
    """
    height, width = (scale * size for size in rows[0][1][0].shape[:2])
    count = len(rows[0][1])
    font = ImageFont.load_default(11)
    sheet_width = count * width + _MARGIN * (count + 1) + _MARGIN * (len(columns) - 1)
    prompts = [_wrap(prompt, sheet_width - 2 * _MARGIN, font) for prompt, _ in rows]
    head = _LINE * (2 if labels else 1)
    row_heights = [_LINE * len(lines) + height + _MARGIN for lines in prompts]
    sheet = Image.new("RGB", (sheet_width, head + sum(row_heights) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    lefts, x = [], _MARGIN
    for heading, span in columns:
        draw.text((x, 0), heading, "black", font)
        for _ in range(span):
            lefts.append(x)
            x += width + _MARGIN
        x += _MARGIN
    for left, label in zip(lefts, labels, strict=False):
        draw.text((left, _LINE), label, "dimgray", font)
    top = head
    for lines, row_height, (_, images) in zip(prompts, row_heights, rows, strict=True):
        for number, line in enumerate(lines):
            draw.text((_MARGIN, top + number * _LINE), line, "dimgray", font)
        for left, image in zip(lefts, images, strict=True):
            picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top + len(lines) * _LINE))
        top += row_height
    return sheet


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Breaks a text into lines of at most `width` pixels."""
    characters = max(len(text), 1)
    while characters > 1:
        lines = textwrap.wrap(text, characters) or [""]
        widest = max(font.getlength(line) for line in lines)
        if widest <= width:
            return lines
        characters = max(1, min(characters - 1, int(characters * width / widest)))
    return textwrap.wrap(text, 1) or [""]
