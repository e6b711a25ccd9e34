"""Reads NumPy's array files (.npy) of any origin; a fault is an error of one line that names the file."""

from pathlib import Path
from tokenize import TokenError

import numpy as np

from dspo_jax.errors import UserError

# What NumPy raises for a damaged header, which it reads as Python, beside the errors of files.
_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    OverflowError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TokenError,
)


def open_array(path: Path, fix: str, where: str | None = None) -> np.ndarray:
    """Opens an array without reading its numbers, so that a header that lies costs no memory.

    Args:
      path: the file. Arrays of Python objects, which are pickles, are not read.
      fix: what mends a damaged file; the end of every message.
      where: what a message begins with; the path unless it is given.

    Returns:
      The array, mapped: its numbers are read from the disk as they are looked at.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it is cut short, or holds something else.
    """
    where = where or str(path)
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no such file, or not a regular one; {fix}")
    try:
        with np.errstate(all="ignore"):  # an overflow in the product of the sides
            array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except _ERRORS as error:
        reason = " ".join(f"{error!s:.100}".split())
        raise UserError(f"{where}: not a whole .npy file of numbers ({reason}); {fix}") from error
    return array
