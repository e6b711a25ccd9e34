"""The images of pairs, each as an example of its own."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

from dspo_jax.data.sources.pairs import PreferencePair
from dspo_jax.data.sources.registry import Source
from dspo_jax.errors import UserError


def divide_pairs(source: Source) -> Source:
    """Returns a source of the images of another's pairs.

    Raises:
      UserError: the other has single images.
    """
    if source.images_per_example != 2:
        what = "single images already" if source.images_per_example == 1 else "lists, which are not divided"
        raise UserError(f"config.select.images = 'single': these are {what}; leave it 'pairs'")
    return SingleImages(source)


@dataclasses.dataclass(frozen=True)
class SingleImages:
    """A source of single images: winner and loser of each pair of another, in this order.

    Their keys are "{key of the pair}/winner" and "{key of the pair}/loser"; the preference is 1. What the
    other source leaves out is counted in pairs.

    Attributes:
      of: a source of pairs.
    """

    of: Source

    @property
    def splits(self) -> Sequence[str]:
        """Returns the splits of the source of pairs."""
        return self.of.splits

    @property
    def images_per_example(self) -> int:
        """One."""
        return 1

    def num_examples(self, split: str) -> int:
        """Counts two for each pair."""
        return 2 * self.of.num_examples(split)

    def left_out(self, split: str) -> Mapping[str, int]:
        """Counts what the source of pairs leaves out."""
        return self.of.left_out(split)

    def digest(self, split: str) -> str:
        """Returns that of the pairs."""
        return self.of.digest(split)

    def pairs(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
        """Yields images `start` to `stop`."""
        last = None if stop is None else -(-stop // 2)
        images = itertools.chain.from_iterable(map(_divide, self.of.pairs(split, start // 2, last)))
        first = start // 2 * 2
        return itertools.islice(images, start - first, None if stop is None else stop - first)


def _divide(pair: PreferencePair) -> Iterator[PreferencePair]:
    assert pair.loser is not None
    for place, image in (("winner", pair.winner), ("loser", pair.loser)):
        yield PreferencePair(pair.caption, image, key=f"{pair.key}/{place}", meta=pair.meta)
