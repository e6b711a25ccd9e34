"""Decodes image files to RGB, and names the fault of an image that cannot be used."""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dspo_jax.images.image_files import BadRow, read_image_file

MAX_PIXELS = 64 * 1024 * 1024
"""Larger images are refused before they are decoded: a decompression bomb is a bad row, not a dead run."""


# Only raster formats whose decoders run no other program (PIL would hand EPS to Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


# Errors of PIL's decoders on damaged files (SyntaxError: a broken PNG chunk; EOFError: a truncated GIF).
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError)


ImageLike = Image.Image | bytes | Path


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
    except (struct.error, TypeError, AttributeError) as error:  # errors of PIL on EXIF with wrong types
        raise BadRow("undecodable image", f"damaged EXIF ({error})") from error
