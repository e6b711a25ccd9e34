"""Weights published as `torch.save` files: torch's own safe loader reads them, once, to convert them.

The only place that imports torch, and only when such a file is given.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dspo_jax.tensors import Tensor, open_file


def open_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a state dict that `torch.save` wrote (.pt, .pth, .bin).

    A state dict may lie under "state_dict". It is loaded with `weights_only=True`, which builds tensors and
    plain containers and runs nothing else that a pickle may ask for.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a file, one that asks for more than tensors, or torch is not installed.
    """
    if path.suffix == ".safetensors":
        return open_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"{path}: reading a torch file needs torch; pip install torch") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: no file of tensors alone, as torch.save writes it ({reason})") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds a {type(state).__name__}, not a state dict of tensors")

    def opened(tensor: Any) -> Tensor:
        bfloat16 = tensor.dtype == torch.bfloat16
        dtype = np.dtype(jnp.bfloat16) if bfloat16 else tensor.new_empty(0).numpy().dtype

        def read() -> np.ndarray:
            return tensor.view(torch.int16).numpy().view(dtype) if bfloat16 else tensor.numpy()

        return Tensor(tuple(tensor.shape), dtype, read)

    return {str(name).removeprefix("module."): opened(tensor.detach()) for name, tensor in state.items()}
