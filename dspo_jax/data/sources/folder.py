"""Your own pairs: a JSON Lines or CSV file beside the images it names."""

import csv
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dspo_jax import spelling
from dspo_jax.data.sources.pairs import PreferencePair, Row
from dspo_jax.data.sources.selection import Candidates, Selection, require, sort_splits
from dspo_jax.errors import UserError
from dspo_jax.images.image_files import SOURCE_ALLOWS_OUTSIDE, ImagePaths

_NAMES = ("pairs.jsonl", "pairs.csv")
_TEXT = ("caption", "winner", "loser", "split")
_OTHERS = ("preference", "label", "key", "group")


@dataclasses.dataclass(frozen=True)
class Folder(Selection):
    """A folder with `pairs.jsonl` or `pairs.csv`: one pair a line, images named relative to that file.

        {"caption": "a red fox", "winner": "images/1a.png", "loser": "images/1b.png"}

    caption: the prompt; in JSON Lines also a list of different ones, each of which makes a row of its own
      with the same images, "{key}/{number of the caption}". They are held out together, and filtered by the
      first.
    winner, loser: image files. Without any `loser` these are single images; then `image` means `winner`.
    preference: probability in [0.5, 1] that the winner is preferred; 1 if not given.
    label: of single images, whether the image is liked: true or false, or the probability in [0, 1]. Rows
      without one are left out if another has one.
    key: name of the row, unique within its split; the number of its line if not given.
    split: `train` if not given. Where all rows are `train`, captions are held out as `validation`.

    Other columns are not read. A line that is no JSON object, a missing `caption` or `winner` column and a
    value of the wrong type are refused; an empty caption, a missing image and a preference out of range make
    a bad row, which the encoder counts. `loser_won` is known from the names of the images.

    Attributes:
      path: the folder, or the .jsonl or .csv file.
      allow_outside: whether images may lie outside the folder of that file, by `..`, an absolute path or a
        symbolic link.
      min_margin (of `Selection`): smallest 2 * preference - 1, from 0 to 1; of labels, its size.
    """

    path: str = ""
    allow_outside: bool = False

    @property
    def images_per_example(self) -> int:
        return 2 if "loser" in _read(require("path", self.path)).column_names else 1

    def file_splits(self) -> tuple[str, ...]:
        return sort_splits(_read(require("path", self.path))["split"].unique().to_pylist())

    def candidates(self, split: str) -> Candidates:
        rows = _read(self.path)
        rows = rows.filter(pc.equal(rows["split"], split))
        preference = rows["preference"].to_numpy()
        images = ("winner", "loser") if "loser" in rows.column_names else None
        margin = 2 * preference - 1 if images else np.abs(2 * preference - 1)
        rows = rows.append_column("margin", pa.array(margin))
        left_out = {"no label": rows["preference"].is_null().to_numpy()}
        identity = images or ("winner",)
        for name in identity:
            self._paths().check(rows[name].unique().to_pylist())
        return Candidates(
            rows, ("caption", *identity, "preference", "key"), left_out, (*identity, "key"), images
        )

    def pairs(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
        paths = self._paths()
        for batch in self.selected(split).rows[start:stop].to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                yield PreferencePair(
                    caption=row["caption"],
                    winner=paths.find(row["winner"]),
                    loser=paths.find(row["loser"]) if "loser" in row else None,
                    preference=row["preference"],
                    key=row["key"],
                    loser_won=row["loser_won"],
                )

    def _paths(self) -> ImagePaths:
        return ImagePaths(_find(self.path).parent, SOURCE_ALLOWS_OUTSIDE, self.allow_outside)


def _find(path: str) -> Path:
    """Returns the file of pairs that `path` is, or is the folder of."""
    given = Path(path)
    if given.is_dir():
        found = [given / name for name in _NAMES if (given / name).is_file()]
        if len(found) == 2:
            raise UserError(
                f"config.source.path = {path!r}: has both {' and '.join(_NAMES)}; name one of them"
            )
        if not found:
            raise FileNotFoundError(f"config.source.path = {path!r}: no {' or '.join(_NAMES)} in this folder")
        return found[0]
    if not given.is_file():
        raise FileNotFoundError(f"config.source.path = {path!r}: no such file or folder")
    if given.suffix not in (".jsonl", ".csv"):
        raise UserError(f"config.source.path = {path!r}: must be a folder, a .jsonl or a .csv file")
    return given


@functools.cache
def _read(path: str) -> pa.Table:
    """Returns all rows: caption, group, winner, loser (unless single images), preference, key and split."""
    file = _find(path)
    columns: dict[str, list[Any]] = {name: [] for name in (*_TEXT, *_OTHERS)}
    lines = []
    found: dict[str, None] = {}
    try:
        for line, row in (_json_rows if file.suffix == ".jsonl" else _csv_rows)(file):
            found.update(dict.fromkeys(row))
            where = f"{file}:{line}"
            for of_caption in _divide_captions(row, where, str(line)):
                for name, value in _parse(of_caption, where, str(line)).items():
                    columns[name].append(value)
                lines.append(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error}); save it as UTF-8") from error
    if not lines:
        raise UserError(f"{file}: has no rows")
    for name, names in (("caption", ("caption",)), ("winner", ("winner", "image"))):
        if not found.keys() & set(names):
            raise UserError(f"{file}: no column {name!r} (found: {', '.join(found)}); rename one or add it")

    with_loser = [bool(loser) for loser in columns["loser"]]
    if any(with_loser):
        if not all(with_loser):
            raise UserError(
                f"{file}:{lines[with_loser.index(False)]}: no loser, unlike other rows; give every row one, "
                "or none for single images"
            )
    else:
        del columns["loser"]
    labels = columns.pop("label")
    if any(label is not None for label in labels):
        columns["preference"] = labels
    seen: dict[tuple[str, str], int] = {}
    for line, split, key in zip(lines, columns["split"], columns["key"], strict=True):
        if (split, key) in seen:
            raise UserError(
                f"{file}:{line}: key {key!r} is that of line {seen[split, key]}, too; make it unique"
            )
        seen[split, key] = line
    types = {"preference": pa.float64()}
    return pa.table(
        {name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()}
    )


def _json_rows(file: Path) -> Iterator[tuple[int, Row]]:
    """The number of each line that is not empty, and its object."""
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON, or a number or a nesting without end
                raise UserError(f"{file}:{number}: not JSON ({error}); mend or delete the line") from error
            if not isinstance(row, dict):
                raise UserError(f'{file}:{number}: not an object; write {{"caption": ..., "winner": ...}}')
            yield number, row


def _csv_rows(file: Path) -> Iterator[tuple[int, Row]]:
    """The number of each row's last line, and its fields by the names in line 1; empty ones are None."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                if None in row:
                    raise UserError(
                        f"{file}:{reader.line_num}: more fields than the first line has names; quote the "
                        "fields that hold commas"
                    )
                fields = {name: value or None for name, value in row.items()}
                where = f"{file}:{reader.line_num}"
                numbers = {
                    name: _parse_number(text, f"{where}: {name}")
                    for name in ("preference", "label")
                    if (text := row.get(name))
                }
                yield reader.line_num, {**fields, **numbers}
        except csv.Error as error:
            raise UserError(f"{file}: not CSV after line {reader.line_num} ({error}); mend it") from error


def _parse_number(text: str, what: str) -> float:
    """Reads a number or, as 1 and 0, true or false; `what` is for the message."""
    try:
        return float({"true": "1", "false": "0"}.get(text.lower(), text))
    except ValueError as error:
        raise UserError(f"{what} = {text!r}: must be a number") from error


def _divide_captions(row: Row, where: str, line: str) -> Iterator[Row]:
    """Yields a row for each caption of a row, with the first as `group`; `where` is for the message."""
    captions = row.get("caption")
    if not isinstance(captions, list):
        yield {**row, "group": None}
        return
    texts = [caption for caption in captions if isinstance(caption, str)]
    if not texts or len(texts) < len(captions) or len(set(texts)) < len(texts):
        raise UserError(f"{where}: caption = {captions!r}: must be text, or a list of different texts")
    key = line if row.get("key") is None else row["key"]
    for number, text in enumerate(texts):
        yield {**row, "caption": text, "key": f"{key}/{number}", "group": texts[0]}


def _parse(row: Row, where: str, line: str) -> Row:
    """Returns a row's values under their own names, with the defaults; `where` is for the messages."""
    if "winner" in row and "image" in row:
        raise UserError(f"{where}: has both winner and image, which mean the same; keep one")
    values: Row = {name: row.get(name) for name in (*_TEXT, *_OTHERS)}
    if values["label"] is not None and (values["loser"] or values["preference"] is not None):
        raise UserError(
            f"{where}: has a label, which says whether a single image is liked, beside "
            f"{'a loser' if values['loser'] else 'a preference'}; keep one"
        )
    values["winner"] = row.get("winner", row.get("image"))
    for name in _TEXT:
        values[name] = "" if values[name] is None else values[name]
        if not isinstance(values[name], str):
            raise UserError(f"{where}: {name} = {values[name]!r}: must be text")
    values["split"] = values["split"] or "train"
    if not re.fullmatch(r"\w+", values["split"]):
        raise UserError(f"{where}: split = {values['split']!r}: must be a word of letters, digits and _")
    if values["preference"] is None:
        values["preference"] = 1.0
    if isinstance(values["label"], bool):
        values["label"] = float(values["label"])
    for name in ("preference", "label"):
        number = values[name]
        if isinstance(number, bool) or not isinstance(number, int | float | None):
            raise UserError(f"{where}: {name} = {number!r}: must be a number")
        if number is not None and not -1 <= number <= 2:  # more than a column holds, too; it makes a bad row
            values[name] = math.nan
    values["key"] = line if values["key"] is None else str(values["key"])
    values["group"] = values["caption"] if values["group"] is None else values["group"]
    for name in (*_TEXT, "key", "group"):
        if spelling.fault_of_text(values[name].replace("\0", "")):  # a null character makes a bad row
            raise UserError(f"{where}: {name} = {values[name]!r}: has half a character; write it whole")
    return values
