"""Locks that keep an output to one command at a time, and end with their process, however it ends.

The kernel holds the lock (flock, through filelock), so that nothing has to be cleared away after SIGKILL or a
power failure. Every command takes its output by `claim` or `reserve` before it loads a model.
"""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import filelock
from absl import logging

from dspo_jax import interrupts
from dspo_jax.errors import UserError

_NAME = ".lock"
# Another share of the same work looks for a moment whether this lock is free.
_SECONDS_TO_WAIT = 1.0
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

# Lock file -> the process that made it; a forked child inherits the entry, not the file. None: not locked.
_held: dict[Path, int | None] = {}


@contextmanager
def claim(folder: Path, share: tuple[int, int] | None = None) -> Iterator[None]:
    """Makes a folder if need be, and keeps other processes from claiming it; a process may claim it twice.

    A folder that is made here and left empty is gone afterwards. Where the file system has no locks a warning
    says so; where the folder cannot be written to, nothing is locked, and the first write says that.

    Args:
      folder: the folder that is written to.
      share: (i, n): the i-th of n processes that share the folder, each with a number of its own.

    Raises:
      UserError: another process has it; the message says which, on which host, since when.
      OSError: the folder cannot be made, or the lock in it belongs to another user.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: exists and is not a folder; choose another")
    name = _NAME if share is None else f"{_NAME}-{share[0]}-of-{share[1]}"
    with _hold(folder / name, folder):
        for other in folder.glob(f"{_NAME}*"):
            if other.name != name and not (share and other.name.endswith(f"-of-{share[1]}")):
                with _hold(other, folder):
                    pass
        yield


@contextmanager
def reserve(path: Path) -> Iterator[None]:
    """Like `claim`, for a file or folder that must not exist before it is whole: the lock lies beside it."""
    if not path.name:
        raise UserError(f"{str(path)!r} is no name for a new file or folder; give one")
    with _hold(path.with_name(f".{path.name}{_NAME}"), path):
        yield


def is_empty(folder: Path) -> bool:
    """Returns whether nothing lies in a folder but locks, or there is no such folder."""
    return not folder.is_dir() or all(is_lock(file) for file in folder.iterdir())


def is_lock(file: Path) -> bool:
    """Returns whether a file in a folder locks that folder."""
    return file.name.startswith(_NAME)


@contextmanager
def _hold(file: Path, output: Path) -> Iterator[None]:
    key = file.resolve()
    if key in _held:
        yield
        return
    made = [parent for parent in file.absolute().parents if not parent.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = _acquire(file, output)
        try:
            _held[key] = None if lock is None else os.getpid()
            yield
        finally:
            if lock is not None:
                with suppress(OSError):  # what stays is not locked
                    file.unlink()
            _held.pop(key, None)
            if lock is not None:
                lock.release()
    finally:
        with suppress(OSError):  # the first that is not empty
            for parent in made:
                parent.rmdir()


def _acquire(file: Path, output: Path) -> filelock.BaseFileLock | None:
    """Returns the lock, or None where there can be none."""
    lock = filelock.FileLock(file, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=_SECONDS_TO_WAIT)
    except filelock.Timeout as error:
        raise UserError(
            f"{output}: in use by {_read_holder(file)}; let it end, or end it, or choose another name"
        ) from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            logging.warning(
                "%s: on a file system without locks (%s): start no other command on it while this one runs",
                output,
                error.strerror,
            )
            return None
        if not os.access(file.parent, os.W_OK):
            return None
        raise OSError(f"{file}: cannot be locked: {error.strerror or error}") from error
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    try:
        file.write_text(
            f"process {os.getpid()} ({Path(sys.argv[0]).stem}) on {socket.gethostname()} since {since}\n",
            encoding="utf-8",
        )
    except BaseException:  # Ctrl-C too
        with suppress(OSError):
            file.unlink()
        lock.release()
        raise
    return lock


def _remove_held() -> None:
    for file, owner in list(_held.items()):
        if owner == os.getpid():
            with suppress(OSError):
                file.unlink()


interrupts.before_end(_remove_held)


def _read_holder(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace")[:200].strip() or "another process"
    return "another process"
