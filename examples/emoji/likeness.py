"""A reward of one's own: how near a picture is to an emoji that its prompt names.

    python -m dspo_jax.evaluate --rewards examples/emoji/likeness.py:likeness ...

It reads the prompt, which rewards of pixels alone do not: where a model is trained by one of these and this
falls, the model no longer draws what it is asked for.
"""

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dspo_jax.data.sources.emoji import EmojiImages
from dspo_jax.images.decode import decode_image

_SIDE = 16  # pixels at which pictures are compared


def likeness(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """Minus the root mean square difference, in grey levels, to the nearest emoji of the prompt's name [N].

    Args:
      images: [H, W, 3] uint8.
      prompts: captions of `EmojiImages`: a name, a category, or both.

    Raises:
      KeyError: a prompt that is none of these.
    """
    known, scores = _known_emoji(), []
    for image, prompt in zip(images, prompts, strict=True):
        difference = known[prompt] - _shrink(Image.fromarray(image))
        scores.append(-np.sqrt(np.square(difference).mean(1)).min())
    return np.array(scores, np.float32)


def _shrink(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32).ravel()


@functools.cache
def _known_emoji() -> dict[str, np.ndarray]:
    """Pictures [K, pixels] by caption, of the emoji that the shipped model was trained on."""
    found: dict[str, list[np.ndarray]] = {}
    for pair in EmojiImages(min_occurrences=20).pairs("train"):
        found.setdefault(pair.caption, []).append(_shrink(decode_image(pair.winner)))
    return {caption: np.stack(pictures) for caption, pictures in found.items()}
