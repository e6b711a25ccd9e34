"""torch modules as oracles: random weights, the way they are read here, and the measure of agreement."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from safetensors.numpy import load_file

from dspo_jax.models.model import Model, Params
from dspo_jax.weights.component_files import weights_file
from dspo_jax.weights.components import read_model, read_params, write_params

torch.set_num_threads(1)  # the tests run in several processes


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws every parameter anew: kernels by fan-in, norm weights around one, biases around zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(noise / 5 + (0 if name.endswith("bias") else 1))
    return module.eval()


def save(module: Any, folder: Path) -> tuple[Model, Params]:
    """Saves `module` as its library does and reads it as this project does."""
    module.save_pretrained(folder)
    model = read_model(folder)
    return model, read_params(folder, model)


def compile_fast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` for a program that runs once: compiling without optimisation takes half the time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def to_nchw(array: np.ndarray) -> torch.Tensor:
    """[B, h, w, C] -> torch's [B, C, h, w]."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def to_nhwc(tensor: torch.Tensor) -> np.ndarray:
    """torch's [B, C, h, w] -> [B, h, w, C]."""
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def assert_close(
    ours: Any, theirs: np.ndarray, tolerance: float, name: str = "output", floor: float = 0.0
) -> None:
    """The largest error is at most `tolerance` of the largest magnitude of `theirs` (or of `floor`)."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape, name
    scale = max(np.abs(theirs).max(), floor)
    error = np.abs(ours - theirs).max() / scale
    assert error <= tolerance, f"{name}: error {error:.2e} of its scale {scale:.2e}"


def assert_gradients_close(
    module: torch.nn.Module, model: Model, gradients: Mapping[str, Any], folder: Path, tolerance: float = 1e-3
) -> None:
    """Compares the gradient of every parameter of `module`, under torch's names and in torch's layout.

    The project's own writer puts `gradients` there, so that no second table of names and layouts is needed. A
    gradient that vanishes identically (the bias of attention's keys) is rounding noise: errors below 1e-6
    of the largest gradient of all are not counted.
    """
    theirs = {name: parameter.grad.numpy() for name, parameter in module.named_parameters()}
    buffers = model.make_buffers()
    write_params(folder / "gradients", model, jax.device_get(gradients), like=folder, buffers=buffers)
    ours = load_file(weights_file(folder / "gradients", model.class_name))
    for name in buffers:
        del ours[name]
    assert set(ours) == set(theirs)
    floor = 1e-3 * max(np.abs(gradient).max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, tolerance, name, floor)
