"""Weights published as `torch.save` files: torch's own safe loader reads them, once, to convert them.

The only place that imports torch, and only when such a file is given.
"""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dspo_jax.errors import UserError
from dspo_jax.weights.tensors import DTYPES, Tensor, open_file

if TYPE_CHECKING:
    import torch

_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}
# The errors that torch's readers of damaged files end with.
_DAMAGE = (
    RuntimeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    LookupError,
    ValueError,
    AssertionError,
    AttributeError,
    MemoryError,
    OverflowError,
    TypeError,
)


def open_weights(path: Path) -> dict[str, Tensor]:
    """Opens the tensors of a safetensors file, or of a state dict by `torch.save` (.pt, .pth, .bin).

    A state dict may lie under "state_dict" or "model". It is loaded with `weights_only=True`, which builds
    tensors and plain containers and runs nothing else that a pickle may ask for.

    Raises:
      FileNotFoundError: no such file.
      UserError: not such a file, one that asks for more than tensors, or torch is not installed.
    """
    if path.suffix == ".safetensors":
        return open_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: reading a torch file needs torch; pip install torch") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _DAMAGE as error:
        reason = _find_reason(error)
        raise UserError(f"{path}: no file of tensors alone, as torch.save writes it ({reason})") from error
    state = content
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a state dict of tensors")

    opened = {}
    for key, tensor in state.items():
        name = str(key).removeprefix("module.")
        fault = _find_fault(tensor.detach())
        if fault:
            raise UserError(f"{path}: tensor {name!r} {fault}; save float32, float16 or bfloat16 arrays")
        opened[name] = _open(tensor.detach())
    return opened


def _find_reason(error: Exception) -> str:
    """Shortens torch's error to one line, without its advice to load the file in ways that run code."""
    said = str(error)
    lines = (said.partition("WeightsUnpickler error: ")[2] or said).strip().splitlines()
    return "".join(filter(str.isprintable, lines[0])) if lines else type(error).__name__


def _dtype(tensor: "torch.Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _find_fault(tensor: "torch.Tensor") -> str | None:
    """Explains why a tensor cannot be read as an array; None if it can."""
    if tensor.device.type != "cpu":
        return f"has no values (device {tensor.device})"
    if tensor.is_nested or str(tensor.layout) != "torch.strided" or tensor.is_neg():
        return f"is stored as {tensor.layout}{' (nested)' if tensor.is_nested else ''} and not as an array"
    if _dtype(tensor) not in _DTYPES:
        return f"is stored as {_dtype(tensor)}, which is not supported"
    nbytes = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > nbytes:
        return f"has shape {tuple(tensor.shape)}, of which the file holds {nbytes} bytes"
    return None


def _open(tensor: "torch.Tensor") -> Tensor:
    dtype = _DTYPES[_dtype(tensor)]

    def read() -> np.ndarray:
        if _dtype(tensor) == "bfloat16":  # which NumPy does not know
            import torch

            return tensor.view(torch.int16).numpy().view(dtype)
        return tensor.numpy()

    return Tensor(tuple(tensor.shape), dtype, read)
