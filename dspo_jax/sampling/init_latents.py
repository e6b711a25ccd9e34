"""Noise to start from, in a .npy file."""

from pathlib import Path
from tokenize import TokenError

import numpy as np
from jaxtyping import Float

from dspo_jax.errors import UserError

# Errors of NumPy on a damaged header, beside those of files.
_NPY_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    OverflowError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TokenError,
)


def map_latents(path: str) -> Float[np.ndarray, "prompts h w C"]:
    """Opens the file of `--init_latents` without reading its numbers, so that a lying header costs no memory.

    Returns:
      Floats [prompts, h, w, C], mapped.

    Raises:
      FileNotFoundError: no such file.
      UserError: not a whole .npy file of four axes of floats.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--init_latents={path}: no such file, or not a regular one")
    try:
        with np.errstate(all="ignore"):  # an overflow in the product of the sides
            latents = np.lib.format.open_memmap(path, mode="r")
    except _NPY_ERRORS as error:
        raise UserError(
            f"--init_latents={path}: not a whole .npy file of numbers ({error!s:.100})"
        ) from error
    if latents.ndim != 4 or not np.issubdtype(latents.dtype, np.floating):
        raise UserError(
            f"--init_latents={path}: {latents.dtype}{list(latents.shape)}; must be floats [prompts, h, w, C]"
        )
    return latents
