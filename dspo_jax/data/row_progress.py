"""A bar over the rows of a source that all processes work on, shard by shard."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Self

from dspo_jax.data.encoder import PairEncoder
from dspo_jax.data.source_shards import Shard, SourceShards
from dspo_jax.data.sources import PreferencePair
from dspo_jax.monitoring.progress import Progress
from dspo_jax.parallel import processes

SECONDS_BETWEEN_LOOKS = 3.0
"""Seconds between two looks at the shards that all processes have finished."""


class RowProgress:
    """A bar with images/s and, of an encoder, the share of time spent waiting for images."""

    def __init__(
        self,
        label: str,
        rows: SourceShards,
        finished: Callable[[], set[Shard]],
        encoder: PairEncoder | None = None,
    ):
        """Takes what is going on, the rows of every shard, and what lists the finished ones."""
        self._rows, self._finished, self._encoder = rows, finished, encoder
        self._started = self._looked = time.perf_counter()
        self._before = self._finished_rows()
        first = "" if encoder is None else "compiling"
        self._bar = Progress(
            label, sum(rows.rows.values()), self._before, first=first, active=processes.is_first()
        )

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.look()
        self._bar.__exit__(*error)

    def track(self, rows: Iterable[PreferencePair]) -> Iterator[PreferencePair]:
        """The rows of a shard, showing now and then how many are taken."""
        for taken, row in enumerate(rows, start=1):
            yield row
            if time.perf_counter() - self._looked > SECONDS_BETWEEN_LOOKS:
                self.look(taken)

    def look(self, taken: int = 0) -> None:
        """Counts the finished shards of all processes and the rows taken of the one in work."""
        self._looked = time.perf_counter()
        done = self._finished_rows() + taken
        seconds = self._looked - self._started
        waiting = {}
        if self._encoder is not None:
            seconds -= self._encoder.seconds_compiling
            waiting["waiting for images"] = self._encoder.seconds_waiting / seconds
        speed = (done - self._before) * self._rows.source.images_per_example / seconds
        self._bar.update(done, {"images/s": speed, **waiting})

    def _finished_rows(self) -> int:
        return sum(self._rows.rows[shard] for shard in self._finished())
