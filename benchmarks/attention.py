"""Attention of Stable Diffusion's sizes, forward and backward: the plain backend and the device's kernel.

    python -m benchmarks.attention                              # timed on the device that is here
    python -m benchmarks.attention --topology=v5p:2x2x1         # compiled for one that is not; needs libtpu
    python -m benchmarks.attention --topology=h100              # the same; needs dspo_jax[plan-gpu]

8 images in bfloat16; queries, keys and values as linear layers leave them, [B, T, heads * size], as is the
output. Of a TPU's kernel the compiler counts neither arithmetic nor time: what its products take at the
peak rate, padded to the matrix unit, is a column of its own, and less than it takes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import programs
from dspo_jax import cli
from dspo_jax.errors import UserError
from dspo_jax.kernels import flash
from dspo_jax.kernels.attention import choose, plain_attention
from dspo_jax.kernels.device_kind import device_kind_of
from dspo_jax.monitoring.devices import find_chip, peak_flops

# queries, keys, heads, size of a head
CASES = {
    "SD1.5 64x64": (4096, 4096, 8, 40),
    "SD1.5 64x64, text": (4096, 77, 8, 40),
    "SD1.5 32x32": (1024, 1024, 8, 80),
    "SD1.5 32x32, text": (1024, 77, 8, 80),
    "SD1.5 16x16": (256, 256, 8, 160),
    "SDXL 64x64": (4096, 4096, 10, 64),
    "SDXL 64x64, text": (4096, 77, 10, 64),
    "SDXL 32x32": (1024, 1024, 20, 64),
}
KERNELS = {"gpu": ("cudnn", flash.cudnn_attention), "tpu": ("flash", flash.splash_attention)}


def without_heads(attend: Callable[..., jax.Array], heads: int) -> Callable[..., jax.Array]:
    """Wraps `attend` for queries, keys and values [B, T, heads * size], with an output of that shape."""

    def forward(*arrays: jax.Array) -> jax.Array:
        out = attend(*(array.reshape(*array.shape[:2], heads, -1) for array in arrays))
        return out.reshape(*out.shape[:2], -1)

    return forward


def backends_of(device: Any, case: tuple[int, ...], images: int) -> dict[str, Callable[..., jax.Array]]:
    """Returns the plain backend, and the device's kernel if it has one that takes such heads."""
    backends: dict[str, Callable[..., jax.Array]] = {"plain": plain_attention}
    if device.platform in KERNELS:
        queries, keys, heads, size = case
        name, kernel = KERNELS[device.platform]
        shape = (images, queries, heads, size)
        if choose(device_kind_of(device), shape, keys, jnp.bfloat16, wanted=name) == name:
            backends["kernel"] = kernel
    return backends


def kernel_milliseconds(device: Any, case: tuple[int, ...], images: int) -> float:
    """Returns the time of the products of the TPU's kernel at the peak rate, forward and backward."""
    queries, keys, heads, size = case
    tiling = flash.Tiling.of(queries, keys, size)
    operands = [(images, heads, size, tiling.queries), (images, heads, size, tiling.keys)]
    chip, peak = find_chip(device), peak_flops(device.device_kind)
    if chip is None or peak is None:
        raise UserError(f"--topology: nothing is known of a {device.device_kind}")
    names = ("splash_mha_fwd", "splash_mha_dkv")
    return 1e3 * sum(flash.kernel_flops(name, operands, chip.lanes) for name in names) / peak


def measure(device: Any) -> None:
    """Prints a line for each case and backend."""
    values = flags.FLAGS
    print(f"one {device.device_kind}, {values.images} images, jax {jax.__version__}")
    for name, case in CASES.items():
        if values.only not in name:
            continue
        queries, keys, heads, size = case
        arrays = [
            jax.ShapeDtypeStruct((values.images, length, heads * size), jnp.bfloat16)
            for length in (queries, queries, keys, keys)  # the gradient of the output is the first
        ]
        for backend, attend in backends_of(device, case, values.images).items():
            function = programs.forward_and_backward(without_heads(attend, heads))
            program = programs.compile_for(device, function, arrays)
            line = f"{name:<18}{backend:<7}{programs.describe_program(program, device)}"
            if values.topology is not None and (device.platform, backend) == ("tpu", "kernel"):
                line += f" + {kernel_milliseconds(device, case, values.images):.3f} ms of products"
            print(line, flush=True)


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    with programs.chosen_device() as device:
        measure(device)


if __name__ == "__main__":
    programs.define_flags(images=8)
    cli.run(main)
