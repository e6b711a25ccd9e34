"""Resizes images to the size that a model reads."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from dspo_jax.images.decode import MAX_PIXELS
from dspo_jax.images.image_files import BadRow


class Crop(NamedTuple):
    """Crop of an image, in pixels, with the values of SDXL's conditioning in their order (SDXL, section 2.2).

    Attributes:
      height, width: of the original image.
      top, left: where the crop lies in the resized image.
      target_height, target_width: of the crop.
    """

    height: int
    width: int
    top: int
    left: int
    target_height: int
    target_width: int


def prepare_image(image: Image.Image, size: tuple[int, int], flip: bool = False) -> tuple[np.ndarray, Crop]:
    """Resizes an image (bilinear) until it just covers `size`, and keeps the centre, as released code does.

    Args:
      image: RGB.
      size: height and width of what comes out.
      flip: whether to mirror it left to right.

    Returns:
      Pixels [height, width, 3] uint8, and what they are of the image.

    Raises:
      BadRow: "image too narrow": the resized image would be over the pixel limit.
    """
    (width, height), (target_height, target_width) = image.size, size
    if target_width * height >= target_height * width:
        resized_width, resized_height = target_width, target_width * height // width
    else:
        resized_width, resized_height = target_height * width // height, target_height
    if resized_width * resized_height > MAX_PIXELS:
        raise BadRow(
            "image too narrow",
            f"{width}x{height} would be {resized_width}x{resized_height} before it is cropped",
        )
    left, top = round((resized_width - target_width) / 2), round((resized_height - target_height) / 2)
    resized = image.resize((resized_width, resized_height), Image.Resampling.BILINEAR)
    if flip:
        resized = ImageOps.mirror(resized)
    cropped = resized.crop((left, top, left + target_width, top + target_height))
    return np.asarray(cropped), Crop(height, width, top, left, *size)
