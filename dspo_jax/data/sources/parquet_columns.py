"""Columns of parquet files: the types that a source accepts in each, and the one type that it makes of them.

pandas, polars, datasets and pyarrow write the same thing in different types: text as a category, a label as a
decimal, a flag as 0 and 1, an image as bytes, as a path or as a struct of both.
"""

import dataclasses
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from dspo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Column:
    """A column that a source reads.

    Attributes:
      name: as in the file.
      kind: a key of `KINDS`.
      fix: what to do about a file without the column, for the message; None where it is optional. An optional
        column of kind "name" whose type does not fit is passed over with a warning.
    """

    name: str
    kind: str
    fix: str | None = None


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of content.

    Attributes:
      fits: whether a type may hold it; of a dictionary (pandas' category) the type of its values is asked.
      words: the types in words, for messages.
      convert: an array of such a type -> the one type that sources read.
    """

    fits: Callable[[pa.DataType], bool]
    words: str
    convert: Callable[[pa.ChunkedArray], pa.ChunkedArray] = lambda array: array


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_number(kind: pa.DataType) -> bool:
    return (
        pa.types.is_floating(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_boolean(kind)
    )


def _is_name(kind: pa.DataType) -> bool:
    return _is_text(kind) or _is_number(kind) or pa.types.is_temporal(kind)


def _is_image(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return _is_bytes(kind) or _is_text(kind)
    parts = {field.name: field.type for field in kind if not pa.types.is_null(field.type)}
    kinds = {"bytes": _is_bytes, "path": _is_text}
    fits = [fits(parts[name]) for name, fits in kinds.items() if name in parts]
    return bool(fits) and all(fits)


def _to_name(array: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_floating(array.type):
        return _to_float(array)
    whole = pa.types.is_integer(array.type) or pa.types.is_boolean(array.type)
    return array if whole else array.cast(pa.large_string())


def _to_float(array: pa.ChunkedArray) -> pa.ChunkedArray:
    return array.cast(pa.float64(), safe=False)  # whole numbers above 2**53 are rounded


KINDS = {
    # Large, as the offsets of plain strings end at 2 GiB.
    "text": Kind(_is_text, "text", lambda array: array.cast(pa.large_string())),
    "number": Kind(_is_number, "numbers", _to_float),
    "flag": Kind(_is_number, "true and false", lambda array: pc.not_equal(_to_float(array), 0.0)),
    "name": Kind(_is_name, "names: text, numbers or times", _to_name),
    "image": Kind(_is_image, "images, as bytes, as paths or as the hub's struct of bytes and path"),
}


def choose_columns(path: str, schema: pa.Schema, columns: Mapping[str, Column]) -> dict[str, Column]:
    """Chooses the columns that a file has.

    Raises:
      UserError: one that is needed is missing, or one holds something else; the message names file, column
        and type.
    """
    chosen = {}
    for key, column in columns.items():
        count = schema.names.count(column.name)
        if count > 1:
            raise UserError(f"{path}: {count} columns are called {column.name!r}; rename all but one")
        if not count:
            if column.fix is not None:
                found = ", ".join(schema.names)
                raise UserError(f"{path}: no column {column.name!r} (found: {found}); {column.fix}")
            continue
        stored = schema.field(column.name).type
        kind = KINDS[column.kind]
        if kind.fits(stored.value_type if pa.types.is_dictionary(stored) else stored):
            chosen[key] = column
        elif column.fix is None and (pa.types.is_null(stored) or column.kind == "name"):
            if not pa.types.is_null(stored):
                logging.warning(
                    "%s: column %r is passed over: %s hold no %s", path, column.name, stored, kind.words
                )
        else:
            raise UserError(f"{path}: column {column.name!r} is of type {stored}, but must hold {kind.words}")
    return chosen


def convert(path: str, array: pa.ChunkedArray, column: Column) -> pa.ChunkedArray:
    """Converts values to the type of a column's kind: large strings, float64 or bool.

    Raises:
      UserError: text that is not UTF-8, by its row.
    """
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if _is_text(array.type):
        _check_utf8(path, array, column.name)
    return KINDS[column.kind].convert(array)


def _check_utf8(path: str, array: pa.ChunkedArray, name: str) -> None:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        for row, value in enumerate(array.cast(pa.large_binary())):
            try:
                (value.as_py() or b"").decode()
            except UnicodeDecodeError as problem:
                raise UserError(
                    f"{path}: row {row}: column {name!r} is not UTF-8 ({problem}); write the file anew"
                ) from error
        raise
