"""Parquet files of any origin that hold captions, images and perhaps preferences."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dspo_jax.data.sources.pairs import PreferencePair
from dspo_jax.data.sources.parquet_columns import Column
from dspo_jax.data.sources.parquet_files import files_of, find_files, image_paths, read_index, read_rows
from dspo_jax.data.sources.selection import Candidates, Selection, check_ids, require
from dspo_jax.errors import UserError

_IDS = ("winner_id", "loser_id")
_KINDS = {
    **{"caption": "text", "winner": "image", "loser": "image", "preference": "number", "key": "name"},
    **dict.fromkeys(_IDS, "name"),
}


@dataclasses.dataclass(frozen=True)
class Parquet(Selection):
    """Parquet files: one, a folder of them, or the id of a dataset repository on the hub.

    Every row is a caption, the winner and the loser, as bytes of image files, as their paths relative to the
    parquet file, or as the hub's struct of bytes and path, of which the path is taken where there are no
    bytes. `preference`, in [0.5, 1], is 1 where there is no such column; the key is
    "{file name}/{row number}" where there is none. `loser_won` is known where the images have ids. Of single
    images `preference` is the label, in [0, 1] or true and false; rows whose label is null are left out.

    Attributes:
      path: the file, folder or hub id.
      caption, winner, loser, preference, key: names of the columns. Files without `preference` or `key` are
        fine as long as these have not been given other names. An empty `loser` is for single images.
      scores: names of the columns with the scores of winner and loser, or of single images, which
        `config.score="column"` takes.
      winner_id, loser_id: names of the columns that tell images apart, both or neither.
      allow_outside: whether paths of images may lead out of `path`, by `..`, absolute or by a symbolic link.
      min_margin (of `Selection`): smallest 2 * preference - 1, from 0 to 1; of labels, its size.
    """

    path: str = ""
    caption: str = "caption"
    winner: str = "winner"
    loser: str = "loser"
    preference: str = "preference"
    key: str = "key"
    scores: tuple[str, ...] = ()
    winner_id: str = ""
    loser_id: str = ""
    allow_outside: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ids(self.winner_id, self.loser_id, self.loser)
        if not isinstance(self.scores, tuple) or len(self.scores) not in (0, self.images_per_example):
            raise UserError(
                f"config.source.scores = {self.scores!r}: must be a tuple of {self.images_per_example} "
                "name(s) of columns, one for each image"
            )

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
            if name or argument not in ("loser", *_IDS):
                columns[argument] = Column(name, kind, None if optional else fix)
        fix = "name it in config.source.scores"
        return columns | {f"score {i}": Column(name, "number", fix) for i, name in enumerate(self.scores)}

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
        margin, left_out = np.ones(rows.num_rows), {}
        if "preference" in rows.column_names:
            margin = 2 * rows["preference"].fill_null(1.0).to_numpy() - 1
            if not self.loser:
                margin, left_out = np.abs(margin), {"no label": rows["preference"].is_null().to_numpy()}
        rows = rows.append_column("margin", pa.array(margin))
        kept = ("file", "row", *(f"score {i}" for i in range(len(self.scores))))
        if not self.winner_id:
            return Candidates(rows, kept, left_out, identity)
        for name in _IDS:  # which may be of two types
            rows = rows.set_column(rows.column_names.index(name), name, rows[name].cast(pa.large_string()))
        return Candidates(rows, kept, left_out, identity, _IDS)

    def pairs(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
        index = self.selected(split).rows[start:stop]
        paths = image_paths(self.path, self.allow_outside)
        rows = read_rows(files_of(self.path, split), index, self._columns(), paths)
        for loser_won, (position, row) in zip(index["loser_won"].to_numpy(), rows, strict=True):
            preference, key = row.get("preference"), row.get("key")
            scores = [row[f"score {i}"] for i in range(len(self.scores))]
            yield PreferencePair(
                caption=row["caption"] or "",
                winner=row["winner"],
                loser=row["loser"] if self.loser else None,
                preference=1.0 if preference is None else float(preference),
                key=position if key is None else str(key),
                loser_won=bool(loser_won),
                scores=tuple(math.nan if each is None else float(each) for each in scores) or None,
            )
