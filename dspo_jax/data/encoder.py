"""Prepared rows to examples: the VAE over full batches on every device, conditioning, bad rows counted."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dspo_jax.data import shards
from dspo_jax.data.prepare import Framing, Prepared, map_rows, prepare_row
from dspo_jax.data.records import Example
from dspo_jax.data.sources import PreferencePair
from dspo_jax.errors import UserError
from dspo_jax.images.image_files import BadRow
from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.models.model import Params
from dspo_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from dspo_jax.pipelines.pipeline import Pipeline

_Batch = list[tuple[PreferencePair, Prepared]]
_Prepared = tuple[PreferencePair, list[Prepared] | BadRow]
_OnBadRow = Callable[[PreferencePair, BadRow], None]


class BadRowLog:
    """Counts unusable rows by reason and stops the run when a split has too many.

    Attributes:
      reasons: count by reason of the bad rows that this log has met.
    """

    def __init__(self, split: str, num_rows: int, max_skipped: float, before: Mapping[str, int]):
        """Takes the split, its number of rows, the share that may be skipped, and bad rows known already."""
        self.reasons: Counter[str] = Counter()
        self._split, self._num_rows, self._max_skipped = split, num_rows, max_skipped
        self._before = Counter(before)

    def __call__(self, row: PreferencePair, problem: BadRow) -> None:
        """Records a row.

        Raises:
          UserError: more than `max_skipped` of the split's rows are unusable.
        """
        self.reasons[problem.reason] += 1
        message = f"split {self._split!r}, row {row.key!r}: {problem}"
        self.check(f"; last: {message}")
        logging.warning("skipped %s", message)

    def check(self, detail: str = "") -> None:
        """Raises if too many rows have been counted as bad."""
        known = self._before + self.reasons
        if known.total() > self._max_skipped * self._num_rows:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in known.most_common())
            raise UserError(
                f"config.source.max_skipped = {self._max_skipped:g}: exceeded by {known.total()} of "
                f"{self._num_rows} rows of split {self._split!r} ({reasons}){detail}; mend the source or "
                "raise the limit"
            )


class PairEncoder:
    """Turns rows into shard examples with one model, on all devices of this process.

    Attributes:
      seconds_waiting: for images to be decoded.
      seconds_compiling: in calls with the first batch of an image size.
    """

    def __init__(
        self,
        pipe: Pipeline,
        framing: Framing,
        *,
        batch_size: int,
        vae_dtype: str = "float32",
        pool: Executor | None = None,
        ahead: int = 0,
    ):
        """Reads the VAE's weights.

        Args:
          pipe: gives VAE and tokenizers.
          framing: of the images.
          batch_size: examples in one call of the VAE.
          vae_dtype: what the VAE computes in, one of `settings.VAE_DTYPES`.
          pool: from `prepare.worker_pool`.
          ahead: rows that the pool works on at a time.
        """
        self.seconds_waiting = self.seconds_compiling = 0.0
        self._compiled: set[tuple[int, ...]] = set()  # shapes of batches
        self._pipe, self._framing, self._batch_size = pipe, framing, batch_size
        self._pool, self._ahead = pool, ahead
        self._devices = jax.local_devices()
        mesh = make_mesh({"data": len(self._devices)}, self._devices)
        whole, self._split = replicated(mesh), batch_sharding(mesh)
        self._params = jax.device_put({"vae": pipe.read_params("vae", vae_dtype)}, whole)

        def moments(params: Mapping[str, Params], images: jax.Array) -> jax.Array:
            return pipe.encode_moments(params, (images.astype(jnp.float32) / 127.5 - 1.0).astype(vae_dtype))

        # Without the mesh, the program would depend on the number of processes.
        self._moments = jax.jit(
            on_mesh(moments, mesh), in_shardings=(whole, self._split), out_shardings=self._split
        )

    def examples(self, rows: Iterable[PreferencePair], on_bad_row: _OnBadRow) -> Iterator[Example]:
        """Yields examples of good rows, in order within an image size, and hands bad rows to `on_bad_row`.

        The VAE works on a batch while the images of the next are awaited.
        """
        before: tuple[_Batch, jax.Array] | None = None
        for batch in self._batches(rows, on_bad_row):
            encoding = self._encode([prepared.pixels for _, prepared in batch])
            if before is not None:
                yield from self._finish(*before, on_bad_row)
            before = batch, encoding
        if before is not None:
            yield from self._finish(*before, on_bad_row)

    def _batches(self, rows: Iterable[PreferencePair], on_bad_row: _OnBadRow) -> Iterator[_Batch]:
        """Full batches of images of one size; at the end one of each size with what is left."""
        waiting: dict[tuple[int, ...], _Batch] = {}
        prepare = partial(prepare_row, framing=self._framing)
        for row, prepared in self._timed(map_rows(rows, prepare, self._pool, self._ahead)):
            if isinstance(prepared, BadRow):
                on_bad_row(row, prepared)
                continue
            for example in prepared:
                batch = waiting.setdefault(example.pixels.shape, [])
                batch.append((row, example))
                if len(batch) == self._batch_size:
                    yield waiting.pop(example.pixels.shape)
        yield from waiting.values()

    def _timed(self, prepared: Iterator[_Prepared]) -> Iterator[_Prepared]:
        while True:
            started = time.perf_counter()
            following = next(prepared, None)
            self.seconds_waiting += time.perf_counter() - started
            if following is None:
                return
            yield following

    def _encode(self, pixels: Sequence[np.ndarray]) -> jax.Array:
        """Starts to encode pixels [P, H, W, 3] uint8 of up to a batch of examples: moments [N, h, w, 2C]."""
        images = np.concatenate(pixels)
        # The VAE always sees a full batch, so that it is compiled once for each size.
        full = self._batch_size * len(pixels[0])
        full += -full % len(self._devices)
        padded = np.zeros((full, *images.shape[1:]), np.uint8)
        padded[: len(images)] = images
        started = time.perf_counter()
        moments = self._moments(self._params, jax.device_put(padded, self._split))
        if padded.shape not in self._compiled:
            self._compiled.add(padded.shape)
            self.seconds_compiling += time.perf_counter() - started
        return moments

    def _finish(self, batch: _Batch, encoding: jax.Array, on_bad_row: _OnBadRow) -> Iterator[Example]:
        conditioning = self._pipe.make_conditioning(
            [row.caption for row, _ in batch], [prepared.crops for _, prepared in batch]
        )
        per_example = len(batch[0][1].pixels)
        moments = np.asarray(encoding)[: len(batch) * per_example]
        moments = moments.reshape(len(batch), per_example, *moments.shape[1:])
        for i, (row, prepared) in enumerate(batch):
            try:
                rounded = shards.to_float16(moments[i])
            except BadRow as problem:
                on_bad_row(row, problem)
                continue
            scores = row.scores
            if scores is None and per_example > 2:
                scores = tuple(-float(place) for place in range(per_example))
            yield {
                "moments": rounded,
                **({} if scores is None else {shards.SCORES: np.asarray(scores, np.float32)}),
                **{name: array[i] for name, array in conditioning.items()},
                "preference": np.float32(row.preference),
                "loser_won": np.bool_(row.loser_won),
                "caption": row.caption,
                "key": prepared.key,
            }
