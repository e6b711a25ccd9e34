"""T5's states of the captions of a dataset, as files beside its shards: computed once, read in training.

`captions/keys.npy` [N, 32] uint8 has the SHA-256 sums of (length, caption) in ascending order, N distinct
captions, the empty one among them. `captions/states-00000-of-00012.npy` and so on hold their states in the
same order, [n, L, F] float16, padding included, as the denoiser attends to it.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float16

from dspo_jax.array_files import open_array
from dspo_jax.errors import UserError
from dspo_jax.files import sha256, whole
from dspo_jax.json_files import JsonObject

FOLDER = "captions"
"""The folder within a dataset's that holds the files."""
_KEYS = "keys.npy"
_ROWS = 256  # of a file: half a gigabyte of T5-XXL at 256 tokens, and what is lost when a process is killed
_REMAKE = "delete the dataset's folder and run dspo_jax.encode again"


class CaptionFiles:
    """Files of states that are being made, by any number of processes; each appears when it is whole."""

    def __init__(self, out: Path, captions: Iterable[str], length: int):
        """Divides captions into files.

        Args:
          out: the dataset's folder.
          captions: all of the dataset's; the empty one is added.
          length: tokens of a caption that T5 reads.
        """
        self._folder = out / FOLDER
        keys = {_key(caption, length): caption for caption in {"", *captions}}
        self._keys = sorted(keys)
        self.captions = [keys[key] for key in self._keys]
        self._count = -(-len(self.captions) // _ROWS)

    def of_file(self, number: int) -> list[str]:
        """Returns the captions of a file."""
        return self.captions[number * _ROWS : (number + 1) * _ROWS]

    def missing(self) -> list[int]:
        """Lists the numbers of the files that no process has written."""
        return [number for number in range(self._count) if not self._file(number).is_file()]

    def write(self, number: int, states: Float16[np.ndarray, "n L F"]) -> None:
        """Writes a file of states, in the order of `of_file`."""
        _save(self._file(number), states)

    def finish(self) -> JsonObject:
        """Writes the keys; returns what the manifest says of the files, all of which must be there."""
        keys = self._folder / _KEYS
        _save(keys, np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, 32))
        files = [keys, *map(self._file, range(self._count))]
        return {
            "count": len(self.captions),
            "files": [
                {"file": f"{FOLDER}/{file.name}", "bytes": file.stat().st_size, "sha256": sha256(file)}
                for file in files
            ],
        }

    def _file(self, number: int) -> Path:
        return self._folder / f"states-{number:05d}-of-{self._count:05d}.npy"


class CaptionTable:
    """The states of a finished dataset, read from the disk row by row."""

    def __init__(self, folder: Path, length: int):
        """Opens the files.

        Args:
          folder: of the dataset.
          length: tokens of a caption, as the manifest says.

        Raises:
          FileNotFoundError, UserError: a file is missing or damaged.
        """
        self.folder, self._length = folder / FOLDER, length
        file = self.folder / _KEYS
        keys = open_array(file, _REMAKE)
        if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != 32 or not len(keys):
            raise UserError(f"{file}: damaged (no sums of SHA-256); {_REMAKE}")
        self._keys = np.array(keys).view("S32")[:, 0]
        if (self._keys[1:] <= self._keys[:-1]).any():
            raise UserError(f"{file}: damaged (sums of SHA-256 out of order); {_REMAKE}")
        count, width = -(-len(self._keys) // _ROWS), None
        self._files = [self.folder / f"states-{number:05d}-of-{count:05d}.npy" for number in range(count)]
        for number, path in enumerate(self._files):
            states = open_array(path, _REMAKE)
            width = width or states.shape[-1:]
            expected = (min(_ROWS, len(keys) - number * _ROWS), length, *width)
            if states.dtype != np.float16 or states.shape != expected:
                raise UserError(
                    f"{path}: damaged ({states.dtype} {states.shape} in place of float16 {expected}, as "
                    f"{_KEYS} and the manifest say); {_REMAKE}"
                )

    def find(self, caption: str) -> Float16[np.ndarray, "L F"] | None:
        """Returns the states of a caption, or None where they are not stored.

        Raises:
          UserError: they are not finite, as `encode` never writes them.
        """
        key = np.frombuffer(_key(caption, self._length), "S32")[0]
        row = int(np.searchsorted(self._keys, key))
        if row == len(self._keys) or self._keys[row] != key:
            return None
        # Opened for each row: a process may not keep as many files open as a large dataset has.
        file = self._files[row // _ROWS]
        states = np.array(open_array(file, _REMAKE)[row % _ROWS])
        if not np.isfinite(states).all():
            raise UserError(
                f"{file}: damaged (states of the caption {caption!r:.200} are not finite); {_REMAKE}"
            )
        return states

    def read(self, captions: Sequence[str]) -> Float16[np.ndarray, "N L F"]:
        """Reads the states of captions.

        Raises:
          UserError: one has none.
        """
        return read_states([self], captions)


def read_states(tables: Sequence[CaptionTable], captions: Sequence[str]) -> Float16[np.ndarray, "N L F"]:
    """Reads the states of captions, each from a table that has them.

    Raises:
      UserError: none has.
    """
    rows = []
    for caption in captions:
        found = (states for table in tables if (states := table.find(caption)) is not None)
        states = next(found, None)
        if states is None:
            raise UserError(f"{tables[0].folder}: no states of the caption {caption!r:.200}; {_REMAKE}")
        rows.append(states)
    return np.stack(rows)


def _key(caption: str, length: int) -> bytes:
    return hashlib.sha256(f"{length}\0{caption}".encode()).digest()


def _save(path: Path, array: np.ndarray) -> None:
    with whole(path, shared=True) as partial, partial.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
