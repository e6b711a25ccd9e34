"""Images to the pixels that image towers take, as JAX functions through which gradients flow.

The functions of preprocess.py of the same names say where each comes from. These do not round to 8 bits, as
rounding has no gradient. Images are float32 in [0, 1]. A VAE decodes values outside of that, too: the caller
clamps them, and a value that is clamped has no gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from dspo_jax.rewards import preprocess
from dspo_jax.rewards.network import Preprocess
from dspo_jax.rewards.preprocess import DEVIATION, MEAN, Frame

Images = Float32[Array, "B H W 3"]
Pixels = Float32[Array, "B S S 3"]

# PIL stores every pass of a resize in 8 bits: it clips what lies more than half a level outside [0, 1], and
# rounds what lies nearer. Clipping where it does leaves flat black and white their gradient.
_LOWEST, _HIGHEST = -0.5 / 255, 255.5 / 255


def clip_pixels(images: Images, size: int) -> Pixels:
    """Resizes the shorter edge to `size`, takes the middle square and normalises. Pure.

    Args:
      images: [B, H, W, 3] float32 in [0, 1].
      size: S, the tower's.

    Returns:
      [B, S, S, 3] float32, within 1.5/255 of `preprocess.clip_pixels` before the normalisation.
    """
    return _crop(images, preprocess.clip_frame(images.shape[2], images.shape[1], size), size)


def image_reward_pixels(images: Images, size: int) -> Pixels:
    """Does as `clip_pixels`, with the middle square of `preprocess.image_reward_pixels`. Pure."""
    return _crop(images, preprocess.image_reward_frame(images.shape[2], images.shape[1], size), size)


def stretched_pixels(images: Images, size: int) -> Pixels:
    """Resizes both edges to `size` and normalises. Pure; as Pillow 13, a larger height first."""
    height, width = images.shape[1:3]
    for axis in (1, 2) if height > max(width, size) else (2, 1):
        images = jnp.clip(_resize(images, axis, size), _LOWEST, _HIGHEST)
    return _normalise(images)


def hps_pixels(images: Images, size: int) -> Pixels:
    """Resizes the longer edge to `size`, pads with black to a square and normalises. Pure.

    Nothing is clipped or rounded in `preprocess.hps_pixels`: the two agree as float32 does.

    Raises:
      UserError: the images are so narrow that nothing of them is left.
    """
    frame = preprocess.hps_frame(images.shape[2], images.shape[1], size)
    resized = _resize(_resize(images, 2, frame.width), 1, frame.height)
    rows, columns = (
        (before, size - before - edge)
        for before, edge in ((frame.top, frame.height), (frame.left, frame.width))
    )
    return _normalise(jnp.pad(resized, ((0, 0), rows, columns, (0, 0))))


def _crop(images: Images, frame: Frame, size: int) -> Pixels:
    columns = jnp.clip(_resize(images, 2, frame.width), _LOWEST, _HIGHEST)
    resized = jnp.clip(_resize(columns, 1, frame.height), _LOWEST, _HIGHEST)
    return _normalise(resized[:, frame.top : frame.top + size, frame.left : frame.left + size])


def _resize(images: Images, axis: int, edge: int) -> Float32[Array, "B h w 3"]:
    """Resizes one axis with PIL's bicubic kernel (a = -0.5), widened where the axis shrinks."""
    shape = (*images.shape[:axis], edge, *images.shape[axis + 1 :])
    return jax.image.resize(images, shape, "cubic", antialias=True)


def _normalise(images: Pixels) -> Pixels:
    return (images - MEAN[None, None, None]) / DEVIATION[None, None, None]


CLIP = Preprocess(preprocess.clip_pixels, clip_pixels)
IMAGE_REWARD = Preprocess(preprocess.image_reward_pixels, image_reward_pixels)
STRETCHED = Preprocess(preprocess.stretched_pixels, stretched_pixels)
HPS = Preprocess(preprocess.hps_pixels, hps_pixels)
