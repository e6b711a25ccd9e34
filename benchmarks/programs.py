"""Shared by the benchmarks of single layers: a program compiled for a device, timed there or estimated."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import SingleDeviceSharding

from dspo_jax.planning import absent_gpu, compilation
from dspo_jax.planning.plan import find_devices
from dspo_jax.planning.roofline import seconds
from dspo_jax.planning.works import read_works


def define_flags(images: int) -> None:
    """Defines the flags for the device and the timing."""
    flags.DEFINE_string("topology", None, "A TPU or GPU that need not be here, e.g. v5p:2x2x1 or h100.")
    flags.DEFINE_integer("images", images, "In the batch.", lower_bound=1)
    flags.DEFINE_integer("runs", 20, "That are timed.", lower_bound=1)
    flags.DEFINE_string("only", "", "Cases whose name holds this.")


@contextlib.contextmanager
def chosen_device() -> Iterator[Any]:
    """Gives the device of --topology; programs are to be traced and compiled within."""
    topology = flags.FLAGS.topology
    device = find_devices(topology)[0]
    absent = absent_gpu.is_gpu(topology or "")
    with absent_gpu.as_if_here(device) if absent else contextlib.nullcontext():
        yield device


def forward_and_backward(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(gradient of the output, arguments...) -> output and gradients."""

    def both(gradient: jax.Array, *arguments: Any) -> Any:
        out, backward = jax.vjp(function, *arguments)
        return out, backward(gradient)

    return both


def compile_for(device: Any, function: Callable[..., Any], arguments: Any) -> Any:
    """Compiles a function for a device that need not be here; only shapes and dtypes are read."""
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), arguments
    )
    if absent_gpu.is_gpu(flags.FLAGS.topology or ""):
        return absent_gpu.compile_lowered(absent_gpu.lower(jax.jit(function), *placed))
    return jax.jit(function).lower(*placed).compile()


def describe_program(program: Any, device: Any) -> str:
    """Describes a program's temporaries and time, measured or, for an absent device, estimated."""
    line = f"temporaries {program.memory_analysis().temp_size_in_bytes / 1e6:6.0f} MB, "
    if flags.FLAGS.topology is None:
        return line + f"{_milliseconds(program, device):8.3f} ms"
    if absent_gpu.is_gpu(flags.FLAGS.topology):
        gpu, *_ = absent_gpu.parse_topology(flags.FLAGS.topology)
        works = read_works(program.as_text())
        moved = sum(work.times * work.bytes for work in works)
        expected = sum(work.times * seconds(work, gpu, 1) for work in works)
        return line + f"{moved / 1e9:6.2f} GB, {expected * 1e3:7.3f} ms by the roofline"
    costs = program.cost_analysis()
    expected = compilation.expected_seconds(costs, program.as_text()) or math.nan
    return line + f"{costs['bytes accessed'] / 1e9:6.2f} GB, {expected * 1e3:7.3f} ms by the compiler"


def _milliseconds(program: Any, device: Any) -> float:
    """Times a run, as the mean of several."""
    shapes, structure = jax.tree.flatten(program.in_avals)
    values = [
        jax.device_put(
            jax.random.normal(jax.random.key(i), shape.shape, jnp.float32).astype(shape.dtype), device
        )
        for i, shape in enumerate(shapes)
    ]
    arguments, named = jax.tree.unflatten(structure, values)
    jax.block_until_ready(program(*arguments, **named))
    start = time.perf_counter()
    for _ in range(flags.FLAGS.runs):
        result = program(*arguments, **named)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / flags.FLAGS.runs * 1e3
