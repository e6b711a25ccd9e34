"""A reward of one's own: the affect of the emoji that a picture looks most like.

    python -m dspo_jax.evaluate --rewards examples/emoji/sentiment.py:sentiment ...

The affect is that of tweets that use the emoji (`dspo_jax.data.sources.emoji.EmojiPairs` says where it comes
from), not a judgement of its picture.
"""

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dspo_jax.data.sources.emoji import EmojiImages, load_emoji, load_sentiment
from dspo_jax.images.decode import decode_image

_SIDE = 16  # pixels at which pictures are compared


def sentiment(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """The sentiment score in (-1, 1) of the emoji with the least squared difference to each picture [N].

    Args:
      images: [H, W, 3] uint8.
      prompts: not read.
    """
    del prompts
    known, scores = _known_emoji()
    nearest = [np.square(known - _shrink(Image.fromarray(image))).sum(1).argmin() for image in images]
    return scores[nearest]


def _shrink(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32).ravel()


@functools.cache
def _known_emoji() -> tuple[np.ndarray, np.ndarray]:
    """Pictures [N, pixels] and scores [N] of the emoji that the shipped model was trained on."""
    names = {pair.key.split("/")[0] for pair in EmojiImages(min_occurrences=20).pairs("train")}
    emoji = [each for each in load_emoji() if each.codepoints in names]
    pictures = np.stack([_shrink(decode_image(each.path)) for each in emoji])
    return pictures, np.array([load_sentiment()[each.codepoints].score for each in emoji], np.float32)
