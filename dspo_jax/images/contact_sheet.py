"""Contact sheets: images in a grid under headings."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

CELL = 256
"""The least side of an image on a sheet, in pixels: smaller ones are enlarged by a whole number."""
LINE = 14
"""Height of a line of text on a sheet, in pixels."""
_MARGIN = 4


def enlargement(height: int, width: int) -> int:
    """Returns the whole number by which images are enlarged to reach `CELL`."""
    return max(1, -(-CELL // max(height, width)))


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    columns: Sequence[tuple[str, int]],
    scale: int = 1,
    labels: Sequence[str] = (),
    captions: Sequence[Sequence[Sequence[str]]] = (),
) -> Image.Image:
    """Draws images in a grid, each row under its prompt, which is written out, below headings.

    Args:
      rows: (prompt, images [H, W, 3] uint8) with the same number of images in each.
      columns: (heading, how many of the columns it stands over), from the left.
      scale: whole number that the images are enlarged by.
      labels: of each column, such as its seed; none leaves the line out.
      captions: of each row, for each of its images lines that stand below it, as many for all; none leaves
        them out.
    """
    height, width = (scale * size for size in rows[0][1][0].shape[:2])
    count = len(rows[0][1])
    font = ImageFont.load_default(11)
    sheet_width = count * width + _MARGIN * (count + 1) + _MARGIN * (len(columns) - 1)
    prompts = [wrap(prompt, sheet_width - 2 * _MARGIN, font) for prompt, _ in rows]
    head = LINE * (2 if labels else 1)
    below = LINE * len(captions[0][0]) if captions else 0
    row_heights = [LINE * len(lines) + height + below + _MARGIN for lines in prompts]
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
        draw.text((left, LINE), label, "dimgray", font)
    top = head
    for row, (lines, row_height, (_, images)) in enumerate(zip(prompts, row_heights, rows, strict=True)):
        for number, line in enumerate(lines):
            draw.text((_MARGIN, top + number * LINE), line, "dimgray", font)
        for column, (left, image) in enumerate(zip(lefts, images, strict=True)):
            picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top + len(lines) * LINE))
            for number, line in enumerate(captions[row][column] if captions else ()):
                draw.text((left, top + (len(lines) + number) * LINE + height), line, "black", font)
        top += row_height
    return sheet


def wrap(text: str, width: int, font: Font) -> list[str]:
    """Breaks a text into lines of at most `width` pixels; a word that is wider, as in Chinese, is broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
