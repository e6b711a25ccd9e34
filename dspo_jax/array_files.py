"""Reads NumPy's array files (.npy) of any origin; a fault is an error of one line that names the file."""

import textwrap
import tokenize
from pathlib import Path

import numpy as np

from dspo_jax.errors import UserError


def open_array(path: Path, fix: str) -> np.ndarray:
    """Opens an array, whose numbers are read from the disk as they are looked at.

    Args:
      path: the file. Arrays of Python objects, which are pickles, are not read.
      fix: what mends a damaged file; the end of every message.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it is cut short, or holds something else.
    """
    try:
        array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; {fix}") from error
    # NumPy reads the header as Python, and leaves the errors of that as they are.
    except (OSError, ValueError, EOFError, OverflowError, SyntaxError, tokenize.TokenError) as error:
        reason = textwrap.shorten(str(error), 150, placeholder=" ...")
        raise UserError(f"{path}: damaged ({reason}); {fix}") from error
    return array
