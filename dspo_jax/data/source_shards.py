"""The rows of a source, divided into the shards of a dataset."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

from dspo_jax.data.sources import PreferencePair, Source

Shard = tuple[str, int]
"""A split, and the number of a shard in it."""


@dataclasses.dataclass(frozen=True)
class SourceShards:
    """Division of a source's rows into shards: ranges of the same length in each split.

    Attributes:
      source: of the rows.
      splits: of the source that are divided.
      rows_per_shard: rows in each shard but a split's last.
    """

    source: Source
    splits: Sequence[str]
    rows_per_shard: int

    @functools.cached_property
    def rows(self) -> dict[Shard, int]:
        """Number of rows of each shard, in order."""
        return {
            (split, number): min(self.rows_per_shard, count - first)
            for split, count in self.of_split.items()
            for number, first in enumerate(range(0, count, self.rows_per_shard))
        }

    @functools.cached_property
    def of_split(self) -> dict[str, int]:
        """Number of rows of each split."""
        return {split: self.source.num_examples(split) for split in self.splits}

    @functools.cached_property
    def count(self) -> dict[str, int]:
        """Number of shards of each split."""
        return {split: sum(each == split for each, _ in self.rows) for split in self.splits}

    def place(self, shard: Shard) -> slice:
        """Returns the places of a shard's rows in its split."""
        first = shard[1] * self.rows_per_shard
        return slice(first, first + self.rows[shard])

    def pairs(self, shard: Shard) -> Iterator[PreferencePair]:
        """Yields the rows of a shard."""
        place = self.place(shard)
        return self.source.pairs(shard[0], place.start, place.stop)
