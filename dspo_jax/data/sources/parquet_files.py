"""Parquet files as rows, in a folder or in a dataset repository of the hub: found, indexed, streamed.

Nothing is downloaded as a whole. An index reads the footers and the columns it asks for; a range of rows
reads the row groups that hold them, a few megabytes at a time.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from dspo_jax.data.sources.selection import sort_splits

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# As the hub names files, "train-00000-of-00645.parquet", and as people do: "val.parquet", "test_2.parquet".
_SPLIT = re.compile(r"(?:^|[-.])((?:train|validation|valid|val|dev|test)(?:_unique)?)(?=$|[-_.\d])")
# Of files whose footers and light columns are read at the same time: on the hub each is a few requests.
_FILES_AT_ONCE = 16
# What is read of a column at a time where rows are streamed, and rows that are decoded at a time: so that of
# a huge row group, as pandas writes it, no more than a few pages are in memory.
_BUFFER_BYTES = 4 * 2**20
_ROWS_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class ParquetFile:
    """One file: where it is, and the prefix of its rows' keys."""

    location: str
    on_hub: bool
    key: str


@functools.cache
def find_files(path: str) -> Mapping[str, tuple[ParquetFile, ...]]:
    """The parquet files of a path by split, in the order of their names.

    The split is told by the beginning of a file's name or the name of a folder it is in; other files are
    `train`. The key of a file is its name without suffix, with the folders before it if two of a split have
    the same name.

    Args:
      path: a file, a folder (searched with its subfolders), or the id of a dataset repository on the hub.

    Raises:
      FileNotFoundError: there is no such path, or no parquet file in it.
      OSError: the hub did not answer.
    """
    root = Path(path)
    on_hub = not root.exists() and _HUB_ID.fullmatch(path) is not None
    if on_hub:
        locations = {name: f"datasets/{path}/{name}" for name in _list_hub(path)}
    elif root.is_dir():
        locations = {file.relative_to(root).as_posix(): str(file) for file in root.rglob("*.parquet")}
    elif root.is_file():
        locations = {root.name: path}
    else:
        raise FileNotFoundError(
            f"config.source.path = {path!r}: no such file or folder, nor the id of a dataset (OWNER/NAME)"
        )
    if not locations:
        raise FileNotFoundError(f"config.source.path = {path!r}: no .parquet file in it or its subfolders")
    names: dict[str, list[str]] = {}
    for name in sorted(locations):
        names.setdefault(_split_of(name), []).append(name)
    files = {}
    for split in sort_splits(list(names)):
        keys = [PurePosixPath(name).stem for name in names[split]]
        if len(set(keys)) < len(keys):
            keys = [name.removesuffix(".parquet") for name in names[split]]
        files[split] = tuple(
            ParquetFile(locations[name], on_hub, key) for name, key in zip(names[split], keys, strict=True)
        )
    return files


def _split_of(name: str) -> str:
    path = PurePosixPath(name)
    for part in (path.stem, *(parent.name for parent in path.parents)):
        if match := _SPLIT.search(part.lower()):
            return re.sub("^(valid|val|dev)$", "validation", match[1])
    return "train"


def files_of(path: str, split: str) -> tuple[ParquetFile, ...]:
    """The files of a split; of a `validation` that was held out, those of `train`."""
    files = find_files(path)
    return files[split if split in files else "train"]


def _list_hub(repository: str) -> list[str]:
    """Names of the parquet files of a dataset repository."""
    import huggingface_hub  # slow to import, and needed for the hub only
    from huggingface_hub.errors import HTTPError  # of no connection, which is not an OSError

    root = f"datasets/{repository}"
    try:
        found = huggingface_hub.HfFileSystem().find(root)
    except (OSError, HTTPError) as error:
        raise OSError(
            f"config.source.path = {repository!r}: no such file or folder, and the hub gave no dataset of "
            f"this name ({type(error).__name__}: {_first_line(error)})"
        ) from error
    return [name.removeprefix(f"{root}/") for name in found if name.endswith(".parquet")]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _open(file: ParquetFile, **options: Any) -> Iterator[pq.ParquetFile]:
    """Opens a file; what pyarrow and the hub raise while it is open names it."""
    errors: tuple[type[Exception], ...] = (pa.ArrowException, OSError)
    with contextlib.ExitStack() as stack:
        source: Any = file.location
        try:
            if file.on_hub:
                import huggingface_hub
                from huggingface_hub.errors import HTTPError

                errors = (*errors, HTTPError)
                # pyarrow knows what it needs: reading ahead would fetch images that nobody asked for.
                remote = huggingface_hub.HfFileSystem().open(file.location, "rb", cache_type="none")
                source = stack.enter_context(remote)
            yield stack.enter_context(pq.ParquetFile(source, **options))
        except errors as error:
            fix = "" if file.on_hub else "; fetch it again"
            raise OSError(
                f"{file.location}: cannot be read as parquet ({_first_line(error)}){fix}"
            ) from error


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: its name, what it holds, and what to do in a file without it (None: nothing)."""

    name: str
    kind: str
    fix: str | None = None


_KINDS = {
    "text": (lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind), "text"),
    "number": (lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind), "numbers"),
    "image": (
        lambda kind: _is_binary(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0),
        "images, as bytes or as the hub's struct of bytes and path",
    ),
    "any": (lambda kind: True, ""),
}


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _check_columns(path: str, schema: pa.Schema, columns: Iterable[Column]) -> None:
    for column in columns:
        if column.name in schema.names:
            fits, wanted = _KINDS[column.kind]
            kind = schema.field(column.name).type
            if not fits(kind) and not (column.fix is None and pa.types.is_null(kind)):
                raise ValueError(f"{path}: column {column.name!r} is of type {kind}, but must hold {wanted}")
        elif column.fix is not None:
            found = ", ".join(schema.names)
            raise ValueError(f"{path}: no column {column.name!r} (found: {found}); {column.fix}")


def read_index(files: Sequence[ParquetFile], columns: Mapping[str, Column]) -> pa.Table:
    """Reads the light columns of all files: those that hold no images.

    Args:
      files: of one split.
      columns: what the files should have, by the name it gets in the index; all of it is checked.

    Returns:
      A table of the light columns (null in the rows of a file that lacks it, absent where all do; text as
      large strings) and `file` and `row` [int32], the number of the file and of the row in it.

    Raises:
      ValueError: a column is missing or holds something else; the message names the file and what it has.
      OSError: a file is damaged.
    """

    def read(number: int) -> pa.Table:
        with _open(files[number], pre_buffer=True) as parquet:
            schema = parquet.schema_arrow
            _check_columns(files[number].location, schema, columns.values())
            light = {
                name: column.name
                for name, column in columns.items()
                if column.kind != "image"
                and column.name in schema.names
                and not pa.types.is_null(schema.field(column.name).type)
            }
            table = parquet.read(list(light.values()), use_threads=False)
            num_rows = parquet.metadata.num_rows
        arrays = {name: table[column] for name, column in light.items()}
        for name, array in arrays.items():
            if pa.types.is_string(array.type):  # its 32-bit offsets end at 2 GiB
                arrays[name] = array.cast(pa.large_string())
        arrays["file"] = pa.array(np.full(num_rows, number, np.int32))
        arrays["row"] = pa.array(np.arange(num_rows, dtype=np.int32))
        return pa.table(arrays)

    logging.info("reading the index of %d parquet files, without their images", len(files))
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        tables = list(pool.map(read, range(len(files))))
    return pa.concat_tables(tables, promote_options="permissive")


def read_rows(
    files: Sequence[ParquetFile], index: pa.Table, columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields rows one by one, reading only the row groups that hold them.

    Args:
      files: as given to `read_index`.
      index: `file` and `row` of the rows, in the order of the files.
      columns: what to read of each row, where its file has it.

    Yields:
      The row's key, "{key of the file}/{row number}", and its values by column.
    """
    file_of, rows = index["file"].to_numpy(), index["row"].to_numpy()
    for number in np.unique(file_of):
        file, wanted = files[number], rows[file_of == number]
        with _open(file, buffer_size=_BUFFER_BYTES, pre_buffer=False) as parquet:
            found = [name for name in columns if name in parquet.schema_arrow.names]
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            starts = np.cumsum([0, *sizes])
            group_of = np.searchsorted(starts, wanted, side="right") - 1
            for group in np.unique(group_of):
                first = starts[group]
                batches = parquet.iter_batches(
                    _ROWS_AT_ONCE, row_groups=[int(group)], columns=found, use_threads=False
                )
                of_group = wanted[group_of == group]
                for batch in batches:
                    inside = of_group[(of_group >= first) & (of_group < first + batch.num_rows)]
                    for row, values in zip(
                        inside, batch.take(pa.array(inside - first)).to_pylist(), strict=True
                    ):
                        yield f"{file.key}/{row}", values
                    first += batch.num_rows
                    if first > of_group[-1]:
                        break


def image_bytes(value: bytes | Mapping[str, bytes | None] | None) -> bytes:
    """The bytes of an image, plain or in the hub's struct; where there are none, b"" (a bad row)."""
    return (value["bytes"] if isinstance(value, Mapping) else value) or b""
