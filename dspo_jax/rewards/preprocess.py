"""Pictures to the pixels that image towers take, as the published rewards do it."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from dspo_jax.errors import UserError

# Mean and deviation of CLIP's training images (Radford et al. 2021, released code).
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class Frame(NamedTuple):
    """Size of a resized image, and its place on a square of pixels.

    Attributes:
      width, height: of the resized image.
      left, top: the square's place in the image where it is cropped, the image's in the square where padded.
    """

    width: int
    height: int
    left: int
    top: int


def clip_frame(width: int, height: int, size: int) -> Frame:
    """Returns the frame of `clip_pixels`: the middle is rounded down."""
    short = min(width, height)
    width, height = (int(size * edge / short) for edge in (width, height))
    return Frame(width, height, (width - size) // 2, (height - size) // 2)


def image_reward_frame(width: int, height: int, size: int) -> Frame:
    """Returns the frame of `image_reward_pixels`: the middle is rounded half to even."""
    width, height, _, _ = clip_frame(width, height, size)
    return Frame(width, height, round((width - size) / 2), round((height - size) / 2))


def hps_frame(width: int, height: int, size: int) -> Frame:
    """Returns the frame of `hps_pixels`, where the image lies in the square.

    Raises:
      UserError: the picture is so narrow that nothing of it is left.
    """
    scale = size / max(width, height)
    columns, rows = round(width * scale), round(height * scale)
    if not columns or not rows:
        raise UserError(f"an image of {width}x{height} pixels vanishes when its longer edge becomes {size}")
    return Frame(columns, rows, (size - columns) // 2, (size - rows) // 2)


def clip_pixels(image: Image.Image, size: int) -> np.ndarray:
    """Resizes the shorter edge to `size` (bicubic, 8 bits a channel) and takes the middle square.

    Source: transformers' CLIP image processor, which the released code of PickScore, and Diffusion-DPO's
    for the aesthetic score, calls. OpenAI's own transform differs where an odd number of pixels is cropped:
    the square then lies a pixel further right or lower in half of the cases. Transparency is dropped first,
    as by the processor of their time (transformers 4); that of transformers 5 lays it over white.

    Args:
      image: RGB or RGBA, of any size.
      size: S, the tower's, 224 for every published reward.

    Returns:
      [S, S, 3] float32, normalised by the mean and deviation of CLIP's training images.
    """
    image = image.convert("RGB")
    width, height, left, top = clip_frame(*image.size, size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return _normalise(np.asarray(resized.crop((left, top, left + size, top + size))) / 255)


def image_reward_pixels(image: Image.Image, size: int) -> np.ndarray:
    """Does as `clip_pixels`, but rounds the middle differently where an odd number of pixels is cropped.

    Source: the package image-reward 1.5, which calls torchvision's Resize, CenterCrop and Normalize;
    torchvision rounds half to even. Transparency is dropped after the resize, for which PIL multiplies the
    colours by it: what is fully transparent becomes black.
    """
    width, height, left, top = image_reward_frame(*image.size, size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    middle = resized.crop((left, top, left + size, top + size)).convert("RGB")
    return _normalise(np.asarray(middle, np.float32) / 255)


def stretched_pixels(image: Image.Image, size: int) -> np.ndarray:
    """Resizes both edges to `size` (bicubic, 8 bits a channel), whatever the picture's shape.

    Source: the transform of BLIP's released VQA code, torchvision's Resize to (S, S) of an RGB picture.
    """
    image = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return _normalise(np.asarray(image, np.float32) / 255)


def hps_pixels(image: Image.Image, size: int) -> np.ndarray:
    """Resizes the longer edge to `size` (bicubic, in floating point) and pads with black to a square.

    Source: the package hpsv2 1.2.0, which brings open_clip 2.16.0 with a transform of its own and turns the
    picture into a float tensor before it resizes. Three things follow that "resize the longest side and pad"
    does not say. Sharp edges overshoot [0, 1] and are not clipped. Whether a picture is smoothed as it
    shrinks depends on torchvision: since 0.17 (January 2024) tensors are, and here, too; before, they were
    not, and the same code gave other scores. The padding is black before the normalisation, not zero after
    it. A picture with a longer edge of exactly `size` is not padded there, which only a square survives;
    here it is. Transparency is dropped, as in the code that trained it; the package leaves a PNG of mode RGBA
    its fourth channel, which the network refuses.

    Args:
      image: RGB or RGBA, of any size.
      size: S, the tower's, 224.

    Returns:
      [S, S, 3] float32, normalised by the mean and deviation of CLIP's training images.

    Raises:
      UserError: the picture is so narrow that nothing of it is left.
    """
    image = image.convert("RGB")
    width, height, left, top = hps_frame(*image.size, size)
    square = np.zeros((size, size, 3), np.float32)
    for channel, values in enumerate(np.moveaxis(np.asarray(image, np.float32) / 255, -1, 0)):
        resized = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
        square[top : top + height, left : left + width, channel] = np.asarray(resized)
    return _normalise(square)


def _normalise(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(np.float32) - MEAN) / DEVIATION
