"""Noise to start from, in a .npy file."""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from dspo_jax.array_files import open_array
from dspo_jax.errors import UserError


def map_latents(path: str) -> Float[np.ndarray, "prompts h w C"]:
    """Opens the file of `--init_latents` without reading its numbers.

    Returns:
      Floats [prompts, h, w, C], mapped.

    Raises:
      FileNotFoundError: no such file.
      UserError: not a whole .npy file of four axes of floats.
    """
    latents = open_array(Path(path), "write it with numpy.save", f"--init_latents={path}")
    if latents.ndim != 4 or not np.issubdtype(latents.dtype, np.floating):
        raise UserError(
            f"--init_latents={path}: {latents.dtype}{list(latents.shape)}; must be floats [prompts, h, w, C]"
        )
    return latents
