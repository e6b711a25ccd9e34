"""A row of preference data, and the one place that decodes its images and says what is wrong with it."""

import dataclasses
import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dspo_jax import spelling
from dspo_jax.data.sources.image_files import BadRow, read_image_file

MAX_PIXELS = 64 * 1024 * 1024
"""Larger images are refused before they are decoded: a decompression bomb is a bad row, not a dead run."""

# Only raster formats whose decoders run no other program (PIL would hand EPS to Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# What PIL's decoders raise on damaged files (SyntaxError: a broken PNG chunk; EOFError: a truncated GIF).
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError)


ImageLike = Image.Image | bytes | Path


@dataclasses.dataclass(frozen=True)
class PreferencePair:
    """One caption with the image people preferred and the one they did not.

    Attributes:
      caption: the prompt both images were made for.
      winner: the preferred image: decoded, as the bytes of an image file, or as such a file's path.
      loser: the other image; None for single-image data.
      preference: probability in [0.5, 1] that the winner is preferred; 1.0 is a hard label.
      key: stable identifier of the row, unique within its split.
      loser_won: whether the loser is the winner of another pair of the split, which makes it a liked image
        where images are labelled one by one (KTO).
      meta: whatever else the source knows (JSON-able); it is not written to the shards.
    """

    caption: str
    winner: ImageLike
    loser: ImageLike | None = None
    preference: float = 1.0
    key: str = ""
    loser_won: bool = False
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


def decode_image(data: ImageLike, *, keep_alpha: bool = False) -> Image.Image:
    """Decodes an image to RGB, upright, transparency composited over white.

    Args:
      data: the image.
      keep_alpha: gives RGBA for an image that has transparency.

    Raises:
      BadRow: "undecodable image", "zero-size image", "image over the pixel limit", or any of
        `read_image_file`'s.
    """
    if isinstance(data, Path):
        data = read_image_file(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_FORMATS) if isinstance(data, bytes) else data
        if image.width * image.height > MAX_PIXELS:
            raise BadRow(
                "image over the pixel limit", f"{image.width}x{image.height} is over {MAX_PIXELS} pixels"
            )
        if image.width * image.height == 0:
            raise BadRow("zero-size image", f"{image.width}x{image.height}")
        image = _upright(image)
        if image.mode.startswith("I;16"):  # which convert would cut off at 255
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise BadRow("undecodable image", f"of mode {image.mode}, whose range is not known")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            if keep_alpha:
                return image
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except BadRow:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRow("image over the pixel limit", str(error)) from error
    except UnidentifiedImageError as error:
        formats = ", ".join(_FORMATS)
        raise BadRow("undecodable image", f"not one of {formats}, or damaged") from error
    except _DECODE_ERRORS as error:
        raise BadRow("undecodable image", str(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (struct.error, TypeError, AttributeError) as error:  # what PIL raises of EXIF with wrong types
        raise BadRow("undecodable image", f"damaged EXIF ({error})") from error


def decode_pair(pair: PreferencePair) -> list[Image.Image]:
    """Checks a row and decodes its images: [winner, loser], or [winner] for single-image data.

    Raises:
      BadRow: "empty caption", "caption is no text", "preference outside [0.5, 1]", "identical images", or
        any of `decode_image`'s.
    """
    if not pair.caption.strip():
        raise BadRow("empty caption")
    fault = spelling.fault_of_text(pair.caption)
    if fault:
        raise BadRow("caption is no text", f"{fault} in {pair.caption!r}")
    if not 0.5 <= pair.preference <= 1.0:  # also refuses NaN
        raise BadRow("preference outside [0.5, 1]", str(pair.preference))
    images = [decode_image(image) for image in (pair.winner, pair.loser) if image is not None]
    if len(images) == 2 and images[0].size == images[1].size and images[0].tobytes() == images[1].tobytes():
        raise BadRow("identical images")
    return images
