"""Pick-a-Pic: pairs of generated images that people chose between, from parquet files with its columns."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dspo_jax.data.sources.pairs import PreferencePair
from dspo_jax.data.sources.parquet_columns import Column
from dspo_jax.data.sources.parquet_files import files_of, find_files, image_paths, read_index, read_rows
from dspo_jax.data.sources.selection import Candidates, Selection, require
from dspo_jax.errors import UserError

_UIDS, _MODELS = ("image_0_uid", "image_1_uid"), ("model_0", "model_1")
_FIX = "the files of Pick-a-Pic that hold its images are needed"
_COLUMNS = {
    column.name: column
    for column in (
        Column("caption", "text", _FIX),
        Column("jpg_0", "image", _FIX),
        Column("jpg_1", "image", _FIX),
        Column("label_0", "number", _FIX),
        Column("has_label", "flag"),
        *(Column(name, "name") for name in (*_UIDS, *_MODELS, "ranking_id")),
    )
}


@dataclasses.dataclass(frozen=True)
class PickAPic(Selection):
    """Pick-a-Pic v1 or v2: a folder of its parquet files, or the id of a repository on the hub that has them.

    Columns that are read: `caption`; `jpg_0`, `jpg_1` (the two images as bytes); `label_0`, the probability
    that the first is preferred: 1 or 0, 0.5 for a tie, or a soft label; and where they are there `has_label`,
    `image_0_uid`, `image_1_uid`, `model_0`, `model_1`, `ranking_id`.

    Where `label_0` is below 0.5 the second image is the winner; the preference is max(label_0, 1 - label_0).
    Rows without a label and ties are left out. `loser_won` is known from the uids. The key is
    "{file name}/{row number}"; meta holds uids, models (winner first) and `ranking_id`.

    v2 has the splits train (959,040 rows), validation (20,596), test (20,716), validation_unique and
    test_unique (500 each) in about 335 GB; source: Kirstain et al., "Pick-a-Pic", arXiv:2305.01569, and the
    card of the data set. The original repository of v2's images is no longer public; copies under other names
    are of unknown completeness, so compare the numbers of examples with these.

    Attributes:
      path: the folder, file or hub id.
      models: names of generating models, as they stand in the files; both images must be of these. () is any.
      allow_outside: see `Parquet`, of images that are given as paths.
      min_margin (of `Selection`): smallest |label_0 - label_1|, from 0 to 1.
    """

    path: str = ""
    models: tuple[str, ...] = ()
    allow_outside: bool = False

    images_per_example: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.models, tuple):
            raise UserError(
                f"config.source.models = {self.models!r}: must be a tuple of names, as ('A', 'B')"
            )

    def file_splits(self) -> tuple[str, ...]:
        return tuple(find_files(require("path", self.path)))

    def candidates(self, split: str) -> Candidates:
        rows = read_index(files_of(self.path, split), _COLUMNS)
        label = rows["label_0"].to_numpy()
        unlabelled = np.isnan(label)
        if "has_label" in rows.column_names:
            unlabelled |= pc.equal(rows["has_label"], False).fill_null(False).to_numpy()
        left_out = {"no label": unlabelled, "tie": label == 0.5}
        if self.models:
            left_out["models"] = ~np.logical_and(*(self._is_wanted(rows, name) for name in _MODELS))
        rows = rows.append_column("margin", pa.array(np.abs(2 * label - 1)))
        if not set(_UIDS) <= set(rows.column_names):
            return Candidates(rows, ("file", "row"), left_out, ("file", "row"))
        if rows[_UIDS[0]].type != rows[_UIDS[1]].type:
            for name in _UIDS:
                uids = rows[name].cast(pa.large_string())
                rows = rows.set_column(rows.column_names.index(name), name, uids)
        first_won = pa.array(label > 0.5)
        for name, first, second in (("winner", *_UIDS), ("loser", *reversed(_UIDS))):
            rows = rows.append_column(name, pc.if_else(first_won, rows[first], rows[second]))
        identity = [*_UIDS, *(["ranking_id"] if "ranking_id" in rows.column_names else [])]
        return Candidates(rows, ("file", "row"), left_out, tuple(identity), ("winner", "loser"))

    def _is_wanted(self, rows: pa.Table, column: str) -> np.ndarray:
        if column not in rows.column_names:
            raise UserError(
                f"config.source.models = {self.models}: the files of {self.path} have no column {column!r}"
            )
        names = rows[column].cast(pa.large_string())
        return pc.is_in(names, value_set=pa.array(self.models, pa.large_string())).to_numpy()

    def pairs(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
        index = self.selected(split).rows[start:stop]
        paths = image_paths(self.path, self.allow_outside)
        rows = read_rows(files_of(self.path, split), index, _COLUMNS, paths)
        for loser_won, (key, row) in zip(index["loser_won"].to_numpy(), rows, strict=True):
            label = float(row["label_0"])
            first, second = (0, 1) if label > 0.5 else (1, 0)
            yield PreferencePair(
                caption=row["caption"] or "",
                winner=row[f"jpg_{first}"],
                loser=row[f"jpg_{second}"],
                preference=max(label, 1 - label),
                key=key,
                loser_won=bool(loser_won),
                meta={
                    "winner_uid": row.get(f"image_{first}_uid"),
                    "loser_uid": row.get(f"image_{second}_uid"),
                    "winner_model": row.get(f"model_{first}"),
                    "loser_model": row.get(f"model_{second}"),
                    "ranking_id": row.get("ranking_id"),
                },
            )
