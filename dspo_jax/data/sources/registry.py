"""The protocol of a source of preference pairs, and the sources by name."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Protocol

from dspo_jax import spelling
from dspo_jax.data.sources.emoji import EmojiImages, EmojiPairs
from dspo_jax.data.sources.folder import Folder
from dspo_jax.data.sources.pairs import PreferencePair
from dspo_jax.data.sources.parquet import Parquet
from dspo_jax.data.sources.pick_a_pic import PickAPic
from dspo_jax.data.sources.ranked import HpdV2, HpdV3, ImageRewardRankings
from dspo_jax.data.sources.tfds import Tfds
from dspo_jax.errors import UserError


class Source(Protocol):
    """A frozen dataclass of the arguments that a config may set, which yields pairs.

    What a source raises about a file (OSError, UserError) is one line that names the file and the fix.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]

    @property
    def splits(self) -> Sequence[str]:
        """The splits there are."""
        ...

    @property
    def images_per_example(self) -> int:
        """The pair axis P: 2 for pairs, 1 for single images, more for lists of so many images."""
        ...

    def num_examples(self, split: str) -> int:
        """Counts the rows that `pairs(split)` yields, without reading an image."""
        ...

    def left_out(self, split: str) -> Mapping[str, int]:
        """Counts the rows of the files that are left out of the split, by reason: a tie, a filter, ..."""
        ...

    def digest(self, split: str) -> str:
        """Changes when the split's rows do, so that what was made of others is not taken for theirs."""
        ...

    def pairs(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
        """Yields rows `start` to `stop` of a split, always in the same order; reads no other row's images."""
        ...


SOURCES: dict[str, type[Source]] = {
    "emoji_images": EmojiImages,
    "emoji_pairs": EmojiPairs,
    "folder": Folder,
    "hpd_v2": HpdV2,
    "hpd_v3": HpdV3,
    "image_reward": ImageRewardRankings,
    "parquet": Parquet,
    "pick_a_pic": PickAPic,
    "tfds": Tfds,
}


def get_source(name: str, **arguments: object) -> Source:
    """Builds the source called `name`.

    Raises:
      UserError: unknown name or argument; the message gives the nearest valid one.
    """
    if name not in SOURCES:
        raise UserError(spelling.unknown("config.source.name", name, SOURCES))
    cls = SOURCES[name]
    fields = [field.name for field in dataclasses.fields(cls)]
    for argument in arguments:
        if argument not in fields:
            problem = spelling.unknown(f"argument of config.source.name = {name!r}", argument, fields)
            raise UserError(
                f"{problem}; a recipe has the arguments of its own source: take one of {name!r} in "
                "configs/encode/"
            )
    return cls(**arguments)
