"""Parquet files of pairs for tests: image number 2i is the first of row i, 2i + 1 the second."""

import contextlib
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.dirfs import DirFileSystem
from image_files import numbered_image


def write(path: Path, columns: dict, row_group_size: int = 1000) -> Path:
    """Writes columns to a file, in row groups of a size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def pick_a_pic(labels: list, captions: list | None = None, first: int = 0, **columns) -> dict:
    """Columns of Pick-a-Pic; images count on from number 2 * `first`. None leaves a column out."""
    n = range(first, first + len(labels))
    built = {
        "caption": captions or [f"caption {i}" for i in n],
        "jpg_0": [numbered_image(2 * i) for i in n],
        "jpg_1": [numbered_image(2 * i + 1) for i in n],
        "label_0": pa.array(labels, pa.float64()),
        "label_1": pa.array([None if label is None else 1 - label for label in labels], pa.float64()),
        "has_label": [True] * len(labels),
        "image_0_uid": [f"uid {2 * i}" for i in n],
        "image_1_uid": [f"uid {2 * i + 1}" for i in n],
        "model_0": ["sdxl"] * len(labels),
        "model_1": ["sd21"] * len(labels),
        "ranking_id": list(n),
        **columns,
    }
    return {name: column for name, column in built.items() if column is not None}


def pairs(n: int, first: int = 0, **columns) -> dict:
    """Columns of the `parquet` source under their default names, without `preference` and `key`."""
    numbers = range(first, first + n)
    built = {
        "caption": [f"caption {i}" for i in numbers],
        "winner": [numbered_image(2 * i) for i in numbers],
        "loser": [numbered_image(2 * i + 1) for i in numbers],
        **columns,
    }
    return {name: column for name, column in built.items() if column is not None}


def destroy_images(path: Path, columns: tuple[str, ...], spare: tuple[int, ...] = ()) -> None:
    """Overwrites what a file holds of some columns, but for some row groups, so that reading it must fail."""
    metadata = pq.read_metadata(path)
    data = bytearray(path.read_bytes())
    for group in set(range(metadata.num_row_groups)) - set(spare):
        for i in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(i)
            if chunk.path_in_schema.split(".")[0] in columns:
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)


class Hub(DirFileSystem):
    """Stands in for the hub's file system: a folder; notes how many bytes are read of which file."""

    def __init__(self, root: Path):
        super().__init__(str(root), fsspec.filesystem("file"))
        self.bytes_read: dict[str, int] = {}

    def find(self, path):
        if not (Path(self.path) / path).is_dir():
            raise FileNotFoundError(f"{path}\n(repository not found)")
        return super().find(path)

    @contextlib.contextmanager
    def open(self, path, mode="rb", **options):
        assert (mode, options) == ("rb", {"cache_type": "none"})
        with open(f"{self.path}/{path}", "rb") as file:
            read = file.read

            class Counting:
                closed = False

                def __getattr__(_, name):
                    return getattr(file, name)

                def read(_, size=-1):
                    data = read(size)
                    self.bytes_read[path] = self.bytes_read.get(path, 0) + len(data)
                    return data

            yield Counting()
