"""Image files named by data: where they may lie, and which kind and size of file is read."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from PIL import PngImagePlugin

from dspo_jax.errors import UserError
from dspo_jax.hub_cache import find_repository

MAX_FILE_BYTES = 256 * 1024 * 1024
"""Larger files are not read: as many bytes as the pixel limit has pixels of four bytes, uncompressed."""

# Pillow gives up on a PNG with a text or a colour profile of more than 1 MB, though its pixels are whole
# (prompts and workflows are kept there). Its limit for all texts of a file, 64 MiB, holds for each as well.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


SOURCE_ALLOWS_OUTSIDE = "--config.source.allow_outside=True"
"""The key of the sources that allows images outside their folder, as their messages name it."""


class BadRow(UserError):
    """A row that cannot be encoded. `reason` is a short phrase under which such rows are counted."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type["BadRow"], tuple[str, str]]:
        return BadRow, (self.reason, self.detail)  # so that a process can hand it to another


def read_image_file(path: Path) -> bytes:
    """Reads the file of an image: a regular file, of at most `MAX_FILE_BYTES`.

    Raises:
      BadRow: "missing image file", "not a regular file" or "image file over the size limit".
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise BadRow("missing image file", f"{path} is a folder")
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            raise BadRow("not a regular file", f"{path} is {kind}")
        with path.open("rb") as file:
            # Some files, as those of /proc, hold more than they say.
            data = b"" if status.st_size > MAX_FILE_BYTES else file.read(MAX_FILE_BYTES + 1)
    except BadRow:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise BadRow("missing image file", str(error)) from error
    if max(status.st_size, len(data)) > MAX_FILE_BYTES:
        raise BadRow("image file over the size limit", f"{path} is larger than {MAX_FILE_BYTES:,} bytes")
    return data


class ImagePaths:
    """Paths of images that a file of data names, which must stay within one folder unless the user says so.

    What counts is where a path leads in the end, so that `..`, absolute paths and symbolic links are fine as
    long as they stay inside. The links of a snapshot in the hub's cache lead to its `blobs`, which is inside.
    """

    def __init__(self, root: Path, option: str, allow_outside: bool):
        """Takes the folder, the option that allows paths out of it, and whether that is set."""
        self._root, self._option, self._allow_outside = root, option, allow_outside
        self._real = os.path.realpath(root)
        cached = find_repository(Path(self._real))
        self._inside = (self._real, *([str(cached / "blobs")] if cached else []))

    def find(self, name: str, folder: Path | None = None) -> Path:
        """Returns the path of an image.

        Args:
          name: the path as the data give it.
          folder: the folder that the name is relative to; None is the root.

        Raises:
          UserError: it leads out of the root.
        """
        path = (self._root if folder is None else folder) / name
        if self._allow_outside or "\0" in name:  # no file has such a name
            return path
        real = os.path.realpath(path)
        if not any(real == inside or real.startswith(os.path.join(inside, "")) for inside in self._inside):
            raise UserError(
                f"{path}: leads out of {self._root}, to {real}; move the image there, or set {self._option} "
                "if you trust these data"
            )
        return path

    def check(self, names: Iterable[str]) -> None:
        """Refuses names that leave the root; looks at the disk only for absolute ones and those with `..`.

        Raises:
          UserError: one leads out of the root.
        """
        for name in names:
            if os.path.isabs(name) or ".." in Path(name).parts:
                self.find(name)
