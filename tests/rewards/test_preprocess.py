"""Pixels against transformers' processor, exactly, and against the definition of HPS's transform in torch."""

import re

import numpy as np
import pytest
from PIL import Image
from tables import each_row

from dspo_jax.rewards.preprocess import clip_pixels, hps_pixels, image_reward_pixels, stretched_pixels

MEAN, DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# (width, height): larger and smaller than 224, upright, sizes whose halves and products do not come out even,
# a side that is 224 already, a single pixel.
SIZES = [
    (512, 512),
    (224, 224),
    (640, 480),
    (333, 517),
    (100, 37),
    (231, 224),
    (224, 227),
    (17, 224),
    (223, 223),
    (301, 299),
    (3, 5),
    (1, 1),
    (900, 70),
]


def noise(width, height):
    return Image.fromarray(
        np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    )


@each_row("size", SIZES)
def test_clip_is_what_transformers_does_to_the_last_bit(size):
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    image = noise(*size)
    theirs = module.CLIPImageProcessorPil()(images=image, return_tensors="np")["pixel_values"][0]
    ours = clip_pixels(image, 224)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs.transpose(1, 2, 0))


@each_row("size", SIZES)
def test_hps_is_its_definition_in_torch(size):
    """torchvision's resize of a tensor is torch's interpolate; it computes the weights in float32."""
    torch = pytest.importorskip("torch")
    image = noise(*size)
    pixels = torch.from_numpy(np.array(image).transpose(2, 0, 1)).float() / 255
    longer = max(size)
    height, width = (round(edge * (224 / float(longer))) for edge in pixels.shape[1:])
    resized = torch.nn.functional.interpolate(
        pixels[None], (height, width), mode="bicubic", align_corners=False, antialias=True
    )[0]
    square = torch.zeros(3, 224, 224)
    top, left = (224 - height) // 2, (224 - width) // 2
    square[:, top : top + height, left : left + width] = resized
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    theirs = ((square - mean) / deviation).numpy().transpose(1, 2, 0)
    ours = hps_pixels(image, 224)
    assert ours.dtype == np.float32
    # Seen: 6e-5; a level of 8 bits is 1.5e-2.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)


def test_hps_pads_with_black_and_does_not_clip():
    black, white = ((np.array([value] * 3) - MEAN) / DEVIATION for value in (0, 1))
    pixels = np.zeros((10, 40, 3), np.uint8)
    pixels[:, 20:] = 255
    ours = hps_pixels(Image.fromarray(pixels), 80)  # twice as large: 20 rows in the middle
    np.testing.assert_allclose(ours[:30], np.broadcast_to(black, (30, 80, 3)), atol=1e-6)
    np.testing.assert_allclose(ours[50:], np.broadcast_to(black, (30, 80, 3)), atol=1e-6)
    np.testing.assert_allclose(ours[30:50, -1], np.broadcast_to(white, (20, 3)), atol=1e-5)
    assert (ours[40].min(0) < black - 0.1).all()
    assert (ours[40].max(0) > white + 0.1).all()


@each_row(("edge", "clip", "image_reward"), [(11, 1, 2), (13, 2, 2), (12, 2, 2), (15, 3, 4)])
def test_the_middle_of_an_odd_rest_is_rounded_down_or_half_to_even(edge, clip, image_reward):
    """CLIP's processor rounds half a pixel down; torchvision's CenterCrop, ImageReward's, to even."""
    columns = np.broadcast_to(np.arange(edge, dtype=np.uint8)[None, :, None], (8, edge, 3))
    for image in (columns, columns.transpose(1, 0, 2)):  # wide, and upright
        for transform, first in ((clip_pixels, clip), (image_reward_pixels, image_reward)):
            corner = transform(Image.fromarray(np.ascontiguousarray(image)), 8)[0, 0]
            assert np.round((corner * DEVIATION + MEAN) * 255).tolist() == [first] * 3


def test_a_picture_of_which_nothing_is_left():
    with pytest.raises(ValueError, match=re.escape("an image of 1000x2 pixels vanishes")):
        hps_pixels(noise(1000, 2), 224)


def test_transparency_is_dropped_as_each_reward_drops_it():
    """Red that is not seen stays red, but for ImageReward: PIL multiplies colours by alpha as it resizes."""
    red, black = ((np.array(colour) - MEAN) / DEVIATION for colour in ((1, 0, 0), (0, 0, 0)))
    for alpha, image_reward in ((0, black), (128, red)):
        image = Image.new("RGBA", (40, 40), (255, 0, 0, alpha))
        dropping = ((clip_pixels, red), (hps_pixels, red), (stretched_pixels, red))
        for transform, colour in (*dropping, (image_reward_pixels, image_reward)):
            np.testing.assert_allclose(transform(image, 20), np.broadcast_to(colour, (20, 20, 3)), atol=1e-5)
    opaque = noise(50, 40)
    for transform in (clip_pixels, hps_pixels, image_reward_pixels, stretched_pixels):
        np.testing.assert_array_equal(transform(opaque.convert("RGBA"), 20), transform(opaque, 20))
