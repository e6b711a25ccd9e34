"""Parquet files of any origin that hold captions, images and perhaps preferences."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dspo_jax.data.sources.pairs import PreferencePair
from dspo_jax.data.sources.parquet_columns import Column
from dspo_jax.data.sources.parquet_files import files_of, find_files, image_paths, read_index, read_rows
from dspo_jax.data.sources.selection import Candidates, Selection, require
from dspo_jax.errors import UserError

_KINDS = {"caption": "text", "winner": "image", "loser": "image", "preference": "number", "key": "name"}


@dataclasses.dataclass(frozen=True)
class Parquet(Selection):
    """Parquet files: one, a folder of them, or the id of a dataset repository on the hub.

    Every row is a caption, the winner and the loser, as bytes of image files, as their paths relative to the
    parquet file, or as the hub's struct of bytes and path, of which the path is taken where there are no
    bytes. `preference`, in [0.5, 1], is 1 where there is no such column; the key is
    "{file name}/{row number}" where there is none. `loser_won` is not known.

    Attributes:
      path: the file, folder or hub id.
      caption, winner, loser, preference, key: names of the columns. Files without `preference` or `key` are
        fine as long as these have not been given other names. An empty `loser` is for single images.
      allow_outside: whether paths of images may lead out of `path`, by `..`, absolute or by a symbolic link.
      min_margin (of `Selection`): smallest 2 * preference - 1, from 0 to 1.
    """

    path: str = ""
    caption: str = "caption"
    winner: str = "winner"
    loser: str = "loser"
    preference: str = "preference"
    key: str = "key"
    allow_outside: bool = False

    @property
    def images_per_example(self) -> int:
        return 2 if self.loser else 1

    def file_splits(self) -> tuple[str, ...]:
        return tuple(find_files(require("path", self.path)))

    def _columns(self) -> dict[str, Column]:
        """Returns the columns by argument."""
        columns = {}
        for argument, kind in _KINDS.items():
            name = getattr(self, argument)
            fix = f"name it with --config.source.{argument}=COLUMN"
            if argument == "loser":
                fix += ", or --config.source.loser='' if these are single images"
            optional = argument in ("preference", "key") and name == argument
            if name or argument != "loser":
                columns[argument] = Column(name, kind, None if optional else fix)
        return columns

    def candidates(self, split: str) -> Candidates:
        rows = read_index(files_of(self.path, split), self._columns())
        identity: tuple[str, ...] = ("file", "row")
        if "key" in rows.column_names:
            identity = ("key", *identity)
            given = rows["key"].drop_null()
            if pc.count_distinct(given).as_py() < len(given):
                raise UserError(
                    f"config.source.key = {self.key!r}: this column of {self.path} names several rows of "
                    f"split {split!r} alike; name another with --config.source.key=COLUMN"
                )
        preference = np.ones(rows.num_rows)
        if "preference" in rows.column_names:
            preference = rows["preference"].fill_null(1.0).to_numpy()
        rows = rows.append_column("margin", pa.array(2 * preference - 1))
        return Candidates(rows, ("file", "row"), {}, identity)

    def pairs(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
        index = self.selected(split).rows[start:stop]
        paths = image_paths(self.path, self.allow_outside)
        for position, row in read_rows(files_of(self.path, split), index, self._columns(), paths):
            preference, key = row.get("preference"), row.get("key")
            yield PreferencePair(
                caption=row["caption"] or "",
                winner=row["winner"],
                loser=row["loser"] if self.loser else None,
                preference=1.0 if preference is None else float(preference),
                key=position if key is None else str(key),
            )
