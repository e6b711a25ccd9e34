"""Writes files and folders that appear when they are whole: under a hidden name, and then renamed.

What a killed process leaves under such a name is taken up, or removed, by the next one that writes there.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dspo_jax import locks
from dspo_jax.errors import UserError


class NotWritten(OSError):
    """A file that could not be written; the message names it."""


@contextmanager
def name_write_errors(path: Path) -> Iterator[None]:
    """Says which file could not be written, in plain words where the disk is full."""
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotWritten(f"{path}: not written: no space left on the disk") from error
        raise NotWritten(f"{path}: not written: {error.strerror or error}") from error


@contextmanager
def whole(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A hidden path to write a file to; when all went well it becomes `path`, in place of what was there.

    The hidden path ends in `.partial`: writers that choose a format by the suffix must be told it. The folder
    is made if need be; a pipe, terminal or other device is written to as it is.

    Args:
      path: the file.
      shared: whether several processes may write it at once; the last one that ends wins.

    Raises:
      NotWritten: names the file.
    """
    if path.parent == Path("/dev") or (path.exists() and not path.is_file()):
        with name_write_errors(path):
            yield path
        return
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{f'{uuid.uuid4().hex}.' if shared else ''}partial")
    with name_write_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Writes a text file, whole and on the disk when this returns; see `whole`."""
    with whole(path, shared=shared) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if partial != path:
            os.fsync(file.fileno())


def write_json(path: Path, value: object, *, sort_keys: bool = False, shared: bool = False) -> None:
    """Writes a value as indented JSON; see `write_text`."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n", shared=shared)


def refuse_existing(out: Path) -> None:
    """Raises UserError where `out` is taken."""
    if out.exists():
        raise UserError(f"--out={out}: exists already; choose another name or delete it")


@contextmanager
def appear(out: Path) -> Iterator[Path]:
    """A hidden path beside `out` to write a new file or folder to; it gets its name when all went well.

    Raises:
      UserError: `out` exists, or another process is writing it.
    """
    with locks.reserve(out):
        refuse_existing(out)
        partial = out.with_name(f".{out.name}.partial")
        _remove(partial)  # leftover of a killed run
        try:
            yield partial
            with name_write_errors(out):
                _sync(partial)
                partial.rename(out)
        finally:
            _remove(partial)


def _sync(path: Path) -> None:
    """Returns when a file, or every file of a folder, is on the disk."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_or_copy(file: Path, target: Path) -> None:
    """Brings a file elsewhere: as a hard link on the same disk, or else as a copy."""
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copy2(file, target)


def parse_named(text: str) -> tuple[str, str]:
    """Parses a command's `DIR` or `NAME=DIR` to (name, folder); without a name it is the folder's own."""
    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return Path(text).name or Path(text).resolve().name, text
    return name, path


def sha256(*paths: Path) -> str:
    """Returns the SHA-256 sum of the contents of files, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
