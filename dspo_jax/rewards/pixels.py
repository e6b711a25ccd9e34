"""Rewards computed from the pixels: no weights, exact everywhere."""

import io
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32
from PIL import Image


def compressibility(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """Measures compressibility: minus the size in kB (1,000 bytes) of each image as a JPEG of quality 95.

    Source: the reward of DDPO (Black et al. 2023, arXiv:2305.13301, section 5.1), which is minus the size
    too; the quality is its released code's.
    """
    del prompts
    return np.array([-_jpeg_bytes(image) / 1000 for image in images], np.float32)


def _jpeg_bytes(image: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95)
    return buffer.tell()


def colourfulness(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """Measures colourfulness: about 0 for greys, 109 for images that people called extremely colourful.

    Source: Hasler and Süsstrunk, "Measuring colourfulness in natural images", 2003: M3 = sqrt(var(rg) +
    var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2) with rg = R - G and yb = (R + G) / 2 - B.
    """
    del prompts
    scores = []
    for image in images:
        red, green, blue = np.moveaxis(image.astype(np.float64), -1, 0)
        opponents = np.stack([red - green, (red + green) / 2 - blue])
        deviation = np.sqrt(opponents.var(axis=(1, 2)).sum())
        scores.append(deviation + 0.3 * np.sqrt((opponents.mean(axis=(1, 2)) ** 2).sum()))
    return np.array(scores, np.float32)


def differentiable_colourfulness(images: Float32[Array, "B H W 3"]) -> Float32[Array, " B"]:
    """Measures `colourfulness` of images in [0, 1]. Pure; its gradient is finite everywhere.

    A square root has no finite slope at zero, so here it is never below 0.001: an image of one colour scores
    0.001 too much, and a grey one has a gradient of zero.
    """
    red, green, blue = jnp.moveaxis(255 * images, -1, 0)
    opponents = jnp.stack([red - green, (red + green) / 2 - blue])
    deviation = _root(opponents.var(axis=(2, 3)).sum(0))
    return deviation + 0.3 * _root((opponents.mean(axis=(2, 3)) ** 2).sum(0))


def _root(squares: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.maximum(squares, 1e-6))
