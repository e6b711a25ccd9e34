"""Attention of Stable Diffusion's sizes, forward and backward: the plain backend and the device's kernel.

    python -m benchmarks.attention                              # timed on the device that is here
    python -m benchmarks.attention --topology=v5p:2x2x1         # compiled for one that is not; needs libtpu

8 images in bfloat16; queries, keys and values as linear layers leave them, [B, T, heads * size], as is the
output. Of a kernel the compiler counts neither arithmetic nor time: what its products take at the peak rate,
padded to the matrix unit, is a column of its own, and less than it takes.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import SingleDeviceSharding

from dspo_jax import cli, compiling, plan
from dspo_jax.models import flash
from dspo_jax.models.attention import plain_attention
from dspo_jax.throughput import find_chip, peak_flops

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
KERNELS = {"gpu": flash.cudnn_attention, "tpu": flash.splash_attention}


def forward_and_backward(attend: Callable[..., jax.Array], heads: int) -> Callable[..., Any]:
    """(queries, keys, values, gradient of the output), each [B, T, heads * size] -> output and gradients."""

    def forward(*arrays: jax.Array) -> jax.Array:
        out = attend(*(array.reshape(*array.shape[:2], heads, -1) for array in arrays))
        return out.reshape(*out.shape[:2], -1)

    def both(query: jax.Array, key: jax.Array, value: jax.Array, gradient: jax.Array) -> Any:
        out, backward = jax.vjp(forward, query, key, value)
        return out, backward(gradient)

    return both


def compile_for(device: Any, attend: Callable[..., jax.Array], case: tuple[int, ...], images: int) -> Any:
    """The program, compiled for a device."""
    queries, keys, heads, size = case
    arrays = [
        jax.ShapeDtypeStruct(
            (images, length, heads * size), jnp.bfloat16, sharding=SingleDeviceSharding(device)
        )
        for length in (queries, keys, keys, queries)
    ]
    return jax.jit(forward_and_backward(attend, heads)).lower(*arrays).compile()


def milliseconds(program: Any, device: Any, runs: int) -> float:
    """Of a run, the mean of several."""
    shapes = jax.tree.leaves(program.in_avals)
    arrays = [
        jax.device_put(jax.random.normal(jax.random.key(i), shape.shape, shape.dtype), device)
        for i, shape in enumerate(shapes)
    ]
    jax.block_until_ready(program(*arrays))
    start = time.perf_counter()
    for _ in range(runs):
        result = program(*arrays)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / runs * 1e3


def promise(program: Any) -> str:
    """What the TPU's compiler says of a program."""
    costs = program.cost_analysis()
    seconds = compiling.expected_seconds(costs, program.as_text()) or math.nan
    return f"{costs['bytes accessed'] / 1e9:6.2f} GB, {seconds * 1e3:7.3f} ms by the compiler"


def kernel_milliseconds(device: Any, case: tuple[int, ...], images: int) -> float:
    """What the products of the TPU's kernel take at the peak rate, forward and backward."""
    queries, keys, heads, size = case
    tiling = flash.Tiling.of(queries, keys, size)
    operands = [(images, heads, tiling.queries, size), (images, heads, tiling.keys, size)]
    chip, peak = find_chip(device), peak_flops(device)
    if chip is None or peak is None:
        raise ValueError(f"--topology: nothing is known of a {device.device_kind}")
    names = ("splash_mha_fwd", "splash_mha_dkv")
    return 1e3 * sum(flash.kernel_flops(name, operands, chip.lanes) for name in names) / peak


def main(argv: Sequence[str]) -> None:
    """Prints a line for each case and backend."""
    del argv
    values = flags.FLAGS
    device = plan.find_devices(values.topology)[0]
    print(f"one {device.device_kind}, {values.images} images, jax {jax.__version__}")
    backends: dict[str, Callable[..., jax.Array]] = {"plain": plain_attention}
    if device.platform in KERNELS:
        backends["kernel"] = KERNELS[device.platform]
    for name, case in CASES.items():
        if values.only not in name:
            continue
        for backend, attend in backends.items():
            program = compile_for(device, attend, case, values.images)
            temporaries = program.memory_analysis().temp_size_in_bytes
            line = f"{name:<18}{backend:<7}temporaries {temporaries / 1e6:6.0f} MB, "
            if values.topology is None:
                line += f"{milliseconds(program, device, values.runs):8.3f} ms"
            else:
                line += promise(program)
                if backend == "kernel":
                    line += f" + {kernel_milliseconds(device, case, values.images):.3f} ms of products"
            print(line, flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, "A TPU that need not be here, e.g. v5e:2x2, v5p:2x2x1 or v6e:2x2.")
    flags.DEFINE_integer("images", 8, "In the batch.", lower_bound=1)
    flags.DEFINE_integer("runs", 20, "That are timed.", lower_bound=1)
    flags.DEFINE_string("only", "", "Cases whose name holds this.")
    cli.run(main)
