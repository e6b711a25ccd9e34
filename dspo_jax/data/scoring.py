"""The pass before the encoding: a reward scores every image of a source, into files beside the shards."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8, UInt64

from dspo_jax.array_files import open_array
from dspo_jax.data import shards
from dspo_jax.data.encoder import BadRowLog
from dspo_jax.data.prepare import map_rows
from dspo_jax.data.row_progress import RowProgress
from dspo_jax.data.source_shards import Shard, SourceShards
from dspo_jax.data.sources import PreferencePair, decode_pair
from dspo_jax.errors import UserError
from dspo_jax.files import whole, write_json
from dspo_jax.images.image_files import BadRow
from dspo_jax.json_files import JsonObject, read_object
from dspo_jax.rewards import Reward

_IMAGE = np.dtype([("score", "<f4"), ("picture", "<u8")])


class SplitScores(NamedTuple):
    """Scores of N rows of P images, and numbers by which equal pictures are told.

    Attributes:
      scores: a reward's; NaN where an image cannot be scored.
      pictures: one number for the same pixels under the same caption: 64 bits of a SHA-256 sum.
    """

    scores: Float32[np.ndarray, "N P"]
    pictures: UInt64[np.ndarray, "N P"]


class ScoreFiles:
    """The folder of a dataset's scores: a file for the rows of each shard, by any number of processes.

    A file appears when it is whole, and follows from the rows and the reward alone. The files stay when the
    dataset is finished: another selection of the same rows need not score them again.
    """

    def __init__(self, out: Path, made_of: JsonObject, rows: SourceShards, name: str = ""):
        """Makes the folder, or takes up one of the same reward and rows.

        Args:
          out: the dataset's folder.
          made_of: what the scores follow from: reward, its version, source.
          rows: what is scored.
          name: of a folder within that of the scores, for those of a further reward.

        Raises:
          UserError: scores of something else are there.
        """
        self._folder, self._rows = out / shards.SCORES_FOLDER / name, rows
        self._unusable: dict[Shard, int] = {}
        path = self._folder / shards.SCORES_MADE_OF
        if path.exists():
            there = read_object(path, f"delete {self._folder}, and the images are scored again")
            difference = shards.first_difference(there, made_of)
            if difference is not None:
                key, theirs, ours = difference
                raise UserError(
                    f"{self._folder}: holds other scores ({key} = {theirs!r} there, {ours!r} here); choose "
                    "another --out, or delete this folder to score again"
                )
        else:
            write_json(path, made_of, shared=True)

    def finished(self) -> set[Shard]:
        """Lists the shards whose rows any process has scored."""
        there = {file.name for file in self._folder.iterdir()}
        return {shard for shard in self._rows.rows if self._file(shard).name in there}

    def are_complete(self) -> bool:
        """Returns whether all shards are scored."""
        return len(self.finished()) == len(self._rows.rows)

    def write(self, shard: Shard, found: SplitScores) -> None:
        """Writes the scores of a shard's rows."""
        images = np.empty(found.scores.shape, _IMAGE)
        images["score"], images["picture"] = found
        with whole(self._file(shard), shared=True) as partial_file, partial_file.open("wb") as file:
            np.save(file, images)

    def read(self, split: str) -> SplitScores:
        """Reads a split, or of it the shards that are scored, in their order.

        Raises:
          UserError: a file is damaged, by name.
        """
        parts = [np.empty((0, self._rows.source.images_per_example), _IMAGE)]
        parts += [self._read_shard(shard) for shard in sorted(self.finished()) if shard[0] == split]
        found = np.concatenate(parts)
        return SplitScores(found["score"], found["picture"])

    def count_unusable(self, split: str) -> int:
        """Counts the rows without a score in the shards of a split that are scored; reads each file once.

        Raises:
          UserError: a file is damaged, by name.
        """
        finished = [shard for shard in self.finished() if shard[0] == split]
        for shard in finished:
            if shard not in self._unusable:
                scores = self._read_shard(shard)["score"]
                self._unusable[shard] = int((~np.isfinite(scores)).any(axis=1).sum())
        return sum(self._unusable[shard] for shard in finished)

    def _read_shard(self, shard: Shard) -> np.ndarray:
        path, expected = self._file(shard), (self._rows.rows[shard], self._rows.source.images_per_example)
        fix = "delete it, and it is made again"
        images = open_array(path, fix)
        if (images.dtype, images.shape) != (_IMAGE, expected):
            raise UserError(f"{path}: damaged (not of this shard); {fix}")
        return np.array(images)

    def _file(self, shard: Shard) -> Path:
        return self._folder / f"{shard[0]}-{shard[1]:05d}.npy"


class RowScorer:
    """Scores the images of rows as the source has them, before they are resized and cropped."""

    def __init__(self, reward: Reward, *, batch_size: int, pool: Executor | None = None, ahead: int = 0):
        """Takes the reward, the rows of one call of it, and what decodes (as of `map_rows`)."""
        self._reward, self._batch_size, self._pool, self._ahead = reward, batch_size, pool, ahead

    def score(
        self,
        rows: Iterable[PreferencePair],
        count: int,
        images: int,
        on_bad_row: Callable[[PreferencePair, BadRow], None],
    ) -> SplitScores:
        """Scores `count` rows of `images` images, and hands those that cannot be used to `on_bad_row`.

        Raises:
          UserError: the reward gave something else than a number for each image.
        """
        found = SplitScores(
            np.full((count, images), np.nan, np.float32), np.zeros((count, images), np.uint64)
        )
        decode = partial(_decode, keep_alpha=self._reward.reads_alpha)
        decoded = enumerate(map_rows(rows, decode, self._pool, self._ahead))
        while batch := list(itertools.islice(decoded, self._batch_size)):
            good = []
            for place, (row, pictures) in batch:
                if isinstance(pictures, BadRow):
                    on_bad_row(row, pictures)
                else:
                    good.append((place, row, pictures))
            if not good:
                continue
            pixels = [picture.pixels for _, _, pictures in good for picture in pictures]
            captions = [row.caption for _, row, _ in good for _ in range(images)]
            with np.errstate(over="ignore"):
                scores = self._reward.score_or_nan(pixels, captions).astype(np.float32)
            for (place, row, pictures), of_row in zip(good, scores.reshape(-1, images), strict=True):
                found.scores[place] = of_row
                found.pictures[place] = [picture.number for picture in pictures]
                if not np.isfinite(of_row).all():
                    on_bad_row(row, BadRow("score not finite", str(of_row.tolist())))
        return found


class ColumnScorer:
    """Takes the scores that rows bring along, and decodes nothing."""

    def score(
        self,
        rows: Iterable[PreferencePair],
        count: int,
        images: int,
        on_bad_row: Callable[[PreferencePair, BadRow], None],
    ) -> SplitScores:
        """Returns the scores of `count` rows of `images` images, and hands those without to `on_bad_row`."""
        found = SplitScores(np.empty((count, images), np.float32), np.zeros((count, images), np.uint64))
        for place, row in enumerate(rows):
            with np.errstate(over="ignore"):
                found.scores[place] = row.scores
            if not np.isfinite(found.scores[place]).all():
                on_bad_row(row, BadRow("score not finite", str(row.scores)))
        return found


def score_shards(
    rows: SourceShards,
    mine: Sequence[Shard],
    scorer: RowScorer | ColumnScorer,
    files: ScoreFiles,
    max_skipped: float,
) -> None:
    """Scores the rows of the shards `mine` that no process has scored before.

    Raises:
      UserError: more than `max_skipped` of a split's rows are unusable, or the reward gives no scores.
      OSError: a file cannot be written, or a process that decodes was ended.
    """
    images = rows.source.images_per_example
    with RowProgress("score", rows, files.finished) as progress:
        for shard in mine:
            if shard in files.finished():
                continue
            split = shard[0]
            before = {"without a score": files.count_unusable(split)}
            log = BadRowLog(split, rows.of_split[split], max_skipped, before)
            found = scorer.score(progress.track(rows.pairs(shard)), rows.rows[shard], images, log)
            files.write(shard, found)


class _Picture(NamedTuple):
    pixels: UInt8[np.ndarray, "H W C"]
    number: int


def _decode(row: PreferencePair, keep_alpha: bool) -> list[_Picture]:
    decoded = []
    for image in decode_pair(row, keep_alpha=keep_alpha):
        pixels = np.asarray(image)
        digest = hashlib.sha256(f"{row.caption}\0{pixels.shape}".encode())
        digest.update(pixels.tobytes())
        decoded.append(_Picture(pixels, int.from_bytes(digest.digest()[:8], "little")))
    return decoded
