"""A row of preference data, and the one place that decodes its images and says what is wrong with it."""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from dspo_jax import spelling
from dspo_jax.images.decode import ImageLike, decode_image
from dspo_jax.images.image_files import BadRow

Row = dict[str, Any]
"""The values of a row of a table, by column."""


@dataclasses.dataclass(frozen=True)
class PreferencePair:
    """One caption with the image people preferred and the one they did not; or with one image, or a list.

    Attributes:
      caption: the prompt both images were made for.
      winner: the preferred image: decoded, as the bytes of an image file, or as such a file's path.
      loser: the other image; None for single-image data.
      preference: probability in [0.5, 1] that the winner is preferred; 1.0 is a hard label. Of a single image
        the probability in [0, 1] that it is liked.
      key: stable identifier of the row, unique within its split.
      loser_won: whether the loser is the winner of another pair of the split, which makes it a liked image
        where images are labelled one by one (KTO).
      scores: of each image, winner first, of which more is better; None where there are none. Of a list None
        means the order of its images.
      others: further images of a list, best first, behind winner and loser.
      meta: whatever else the source knows (JSON-able); it is not written to the shards.
    """

    caption: str
    winner: ImageLike
    loser: ImageLike | None = None
    preference: float = 1.0
    key: str = ""
    loser_won: bool = False
    scores: tuple[float, ...] | None = None
    others: tuple[ImageLike, ...] = ()
    meta: Row = dataclasses.field(default_factory=dict)

    @property
    def images(self) -> tuple[ImageLike, ...]:
        """All images: the winner, the loser if there is one, the others of a list."""
        return (self.winner, *(() if self.loser is None else (self.loser,)), *self.others)


def decode_pair(pair: PreferencePair, *, keep_alpha: bool = False) -> list[Image.Image]:
    """Checks a row and decodes its images: [winner, loser], [winner] for single-image data, or a list's.

    Args:
      pair: the row.
      keep_alpha: see `decode_image`.

    Raises:
      BadRow: "empty caption", "caption is no text", "preference outside [0.5, 1]" (of a single image "[0,
        1]"), "identical images", "score not finite", or any of `decode_image`'s.
    """
    if not pair.caption.strip():
        raise BadRow("empty caption")
    fault = spelling.fault_of_text(pair.caption)
    if fault:
        raise BadRow("caption is no text", f"{fault} in {pair.caption!r}")
    least = 0.0 if pair.loser is None else 0.5
    if not least <= pair.preference <= 1.0:  # also refuses NaN
        raise BadRow(f"preference outside [{least:g}, 1]", str(pair.preference))
    images = [decode_image(image, keep_alpha=keep_alpha) for image in pair.images]
    if len({(image.size, image.tobytes()) for image in images}) < len(images):
        raise BadRow("identical images")
    if not np.isfinite(pair.scores or ()).all():
        raise BadRow("score not finite", str(pair.scores))
    return images
