"""A reward: scores of images under their prompts."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from dspo_jax.errors import UserError

Score = Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]
"""(images [H, W, 3] uint8, which may differ in size, the prompt of each) -> scores [N]; higher is better."""


def describe_error(error: Exception) -> str:
    """Returns type and first line of an exception that a reward of the user's raised."""
    first_line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first_line}".rstrip(".;: ")


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward model that is ready to score.

    Attributes:
      name: what tables call it.
      version: which weights or code these are, as tables print it.
      function: scores images.
      reads_alpha: whether `function` takes a picture with transparency as [H, W, 4] and treats it as the
        reward's released code does; otherwise it gets all of them over white.
    """

    name: str
    version: str
    function: Score
    reads_alpha: bool = False

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """Scores [N] float32 of N images [H, W, 3] uint8 under their prompts; or [H, W, 4] if `reads_alpha`.

        Raises:
          UserError: the function gave another number of scores, or one that is not finite.
        """
        with np.errstate(over="ignore"):
            scores = self.score_or_nan(images, prompts).astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            raise UserError(
                f"reward {self.name}: gave {scores[bad[0]]} for an image of {prompts[bad[0]]!r}; "
                "every score must be finite"
            )
        return scores

    def score_or_nan(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """Scores [N] float64 of N images, as `score` does, of which some may be NaN or infinite.

        Raises:
          UserError: the function gave no numbers, or another number of them.
        """
        given = self.function(images, prompts)
        try:
            scores = np.asarray(given, np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"reward {self.name}: gave {given!r:.60}; it must give a number for each image"
            ) from error
        if scores.shape != (len(images),):
            raise UserError(
                f"reward {self.name}: gave scores of shape {list(scores.shape)} for {len(images)} images; "
                f"it must give [{len(images)}]"
            )
        return scores
