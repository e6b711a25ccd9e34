"""Parquet files as rows, in a folder or in a dataset repository of the hub: found, indexed, streamed.

Nothing is downloaded as a whole. An index reads the footers and the columns it asks for; a range of rows
reads the row groups that hold them, a few megabytes at a time.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from dspo_jax.data.sources.pairs import Row
from dspo_jax.data.sources.parquet_columns import Column, choose_columns, convert
from dspo_jax.data.sources.selection import sort_splits
from dspo_jax.errors import UserError
from dspo_jax.hub_cache import is_hub_id
from dspo_jax.images.image_files import SOURCE_ALLOWS_OUTSIDE, ImagePaths

# The hub's names, "train-00000-of-00645.parquet", and people's own: "val.parquet", "test_2.parquet".
_SPLIT = re.compile(r"(?:^|[-.])((?:train|validation|valid|val|dev|test)(?:_unique)?)(?=$|[-_.\d])")
# Files whose footers and light columns are read at the same time: on the hub each is a few requests.
_FILES_AT_ONCE = 16
# Bytes of a column that are read at a time where rows are streamed, and rows that are decoded at a time, so
# that no more than a few pages of a huge row group, as pandas writes it, are in memory.
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
    """Returns the parquet files of a path by split, in the order of their names.

    The split is told by the beginning of a file's name or the name of a folder it is in; other files are
    `train`. The key of a file is its name without suffix, with the folders before it if two of a split have
    the same name.

    Args:
      path: a file, a folder (searched with its subfolders), or the id of a dataset repository on the hub,
        `owner/name` or `owner/name@revision`.

    Raises:
      FileNotFoundError: there is no such path, or no parquet file in it.
      OSError: the hub did not answer.
    """
    root = Path(path)
    on_hub = is_hub_id(path)
    if on_hub:
        locations = {name: f"datasets/{path}/{name}" for name in _list_hub(path)}
    elif root.is_dir():
        locations = {file.relative_to(root).as_posix(): str(file) for file in root.rglob("*.parquet")}
    elif root.is_file():
        locations = {root.name: path}
    else:
        raise FileNotFoundError(
            f"config.source.path = {path!r}: no such file or folder, nor the id of a dataset (OWNER/NAME or "
            "OWNER/NAME@REVISION)"
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
    """Returns the files of a split; of a `validation` that was held out, those of `train`."""
    files = find_files(path)
    return files[split if split in files else "train"]


def image_paths(path: str, allow_outside: bool) -> ImagePaths:
    """Returns the check of image paths in a source's files: inside its folder, or anywhere where allowed."""
    root = Path(path)
    return ImagePaths(root if root.is_dir() else root.parent, SOURCE_ALLOWS_OUTSIDE, allow_outside)


def _list_hub(repository: str) -> list[str]:
    """Returns names of the parquet files of a dataset repository."""
    import huggingface_hub  # slow to import, and needed for the hub only
    from huggingface_hub.errors import HTTPError  # raised where there is no connection; not an OSError

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
def _open(file: ParquetFile, *, pre_buffer: bool, buffer_size: int = 0) -> Iterator[pq.ParquetFile]:
    """Opens a file; what pyarrow and the hub raise while it is open names it."""
    errors: tuple[type[Exception], ...] = (pa.ArrowException, OSError)
    with contextlib.ExitStack() as stack:
        source: str | IO[bytes] = file.location
        try:
            if file.on_hub:
                import huggingface_hub
                from huggingface_hub.errors import HTTPError

                errors = (*errors, HTTPError)
                # pyarrow knows what it needs: reading ahead would fetch images that nobody asked for.
                remote = huggingface_hub.HfFileSystem().open(file.location, "rb", cache_type="none")
                source = stack.enter_context(remote)
            yield stack.enter_context(pq.ParquetFile(source, pre_buffer=pre_buffer, buffer_size=buffer_size))
        except errors as error:
            fix = "" if file.on_hub else "; fetch it again"
            raise OSError(
                f"{file.location}: cannot be read as parquet ({_first_line(error)}){fix}"
            ) from error


def read_index(files: Sequence[ParquetFile], columns: Mapping[str, Column]) -> pa.Table:
    """Reads the light columns of all files: those that hold no images.

    Args:
      files: of one split.
      columns: what the files should have, by the name it gets in the index; all of it is checked.

    Returns:
      A table of the light columns (null in the rows of a file that lacks it, absent where all do; in the
      types of `parquet_columns.convert`) and `file` and `row` [int32], the number of the file and of the row
      in it.

    Raises:
      UserError: a column is missing or holds something else; the message names the file and what it has.
      OSError: a file is damaged.
    """

    def read(number: int) -> pa.Table:
        with _open(files[number], pre_buffer=True) as parquet:
            found = choose_columns(files[number].location, parquet.schema_arrow, columns)
            light = {name: column for name, column in found.items() if column.kind != "image"}
            table = parquet.read([column.name for column in light.values()], use_threads=False)
            num_rows = parquet.metadata.num_rows
        arrays: dict[str, pa.Array] = {
            name: convert(files[number].location, table[column.name], column)
            for name, column in light.items()
        }
        arrays["file"] = pa.array(np.full(num_rows, number, np.int32))
        arrays["row"] = pa.array(np.arange(num_rows, dtype=np.int32))
        return pa.table(arrays)

    logging.info("reading the index of %d parquet files, without their images", len(files))
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        tables = list(pool.map(read, range(len(files))))
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        for name, column in columns.items():
            kinds = {
                table[name].type: file.location
                for table, file in zip(tables, files, strict=True)
                if name in table.column_names
            }
            if len(kinds) > 1:
                found = ", ".join(f"{kind} in {location}" for kind, location in kinds.items())
                raise UserError(f"column {column.name!r}: {found}; write it in one type") from error
        raise


def read_rows(
    files: Sequence[ParquetFile], index: pa.Table, columns: Mapping[str, Column], paths: ImagePaths
) -> Iterator[tuple[str, Row]]:
    """Yields rows one by one, reading only the row groups that hold them.

    Args:
      files: as given to `read_index`.
      index: `file` and `row` of the rows, in the order of the files.
      columns: what to read of each row, where its file has it, by the name it gets.
      paths: where images may lie that are given as paths, relative to the folder of their file.

    Yields:
      The row's key, "{key of the file}/{row number}", and its values by those names (images: bytes or paths).

    Raises:
      UserError: an image of a row lies where it may not.
    """
    file_of, rows = index["file"].to_numpy(), index["row"].to_numpy()
    for number in np.unique(file_of):
        file, wanted = files[number], rows[file_of == number]
        with _open(file, buffer_size=_BUFFER_BYTES, pre_buffer=False) as parquet:
            found = choose_columns(file.location, parquet.schema_arrow, columns)
            names = list(dict.fromkeys(column.name for column in found.values()))
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            starts = np.cumsum([0, *sizes])
            group_of = np.searchsorted(starts, wanted, side="right") - 1
            for group in np.unique(group_of):
                first = starts[group]
                batches = parquet.iter_batches(
                    _ROWS_AT_ONCE, row_groups=[int(group)], columns=names, use_threads=False
                )
                of_group = wanted[group_of == group]
                for batch in batches:
                    inside = of_group[(of_group >= first) & (of_group < first + batch.num_rows)]
                    for row, values in zip(
                        inside, batch.take(pa.array(inside - first)).to_pylist(), strict=True
                    ):
                        yield (
                            f"{file.key}/{row}",
                            {
                                name: _image(file, row, values[column.name], paths)
                                if column.kind == "image"
                                else values[column.name]
                                for name, column in found.items()
                            },
                        )
                    first += batch.num_rows
                    if first > of_group[-1]:
                        break


def _image(file: ParquetFile, row: int, value: Any, paths: ImagePaths) -> bytes | Path:
    """Returns an image's bytes, or its path where there are none, or b"" (a bad row) where there is neither.

    Raises:
      UserError: a path of a file on the hub, or one that leads out of the folder.
    """
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
    if isinstance(data, str):
        data, name = None, data
    if data or not name:
        return data or b""
    if file.on_hub:
        raise UserError(
            f"{file.location}: row {row}: the image is a file of its own, {name!r}, which is not read from "
            "the hub; download the repository, and give its folder as config.source.path"
        )
    return paths.find(name, Path(file.location).parent)
