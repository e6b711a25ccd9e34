"""Devices: peak FLOP/s, memory and bandwidth; FLOPs and memory of programs."""

import dataclasses
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dspo_jax.monitoring.gpus import gpu_of_kind

# Peak bfloat16 FLOP/s without sparsity of one JAX device, by a regular expression that its whole
# `device_kind` must match: a variant that is not listed (NVL, a MIG slice) is another device. NVIDIA's are in
# `gpus.GPUS`.
PEAK_FLOPS = {
    # H100 Tensor Core GPU data sheet (2023): PCIe 1,513 TFLOPS with sparsity
    r"(NVIDIA )?H100 PCIe": 756e12,
    # cloud.google.com/tpu/docs/v3: 123 TFLOPS a chip, which is two JAX devices
    r"TPU v3": 61.5e12,
    # cloud.google.com/tpu/docs/v4: 275 TFLOPS
    r"TPU v4": 275e12,
    # cloud.google.com/tpu/docs/v5e: 197 TFLOPS
    r"TPU v5( lite|e)": 197e12,
    # cloud.google.com/tpu/docs/v5p: 459 TFLOPS
    r"TPU v5p?": 459e12,
    # cloud.google.com/tpu/docs/v6e: 918 TFLOPS
    r"TPU v6( lite|e)": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak bfloat16 FLOP/s of a kind of device; None for one that is in neither table."""
    if gpu := gpu_of_kind(device_kind):
        return gpu.bfloat16
    return next((peak for kind, peak in PEAK_FLOPS.items() if re.fullmatch(kind, device_kind)), None)


def time_product(side: int = 2048) -> float:
    """Multiplies two float32 matrices on the first device; returns FLOP/s, the best of three."""
    square = jnp.ones((side, side), jnp.float32)
    multiply = jax.jit(jnp.matmul).lower(square, square).compile()
    times = []
    for _ in range(3):
        before = time.perf_counter()
        multiply(square, square).block_until_ready()
        times.append(time.perf_counter() - before)
    return 2 * side**3 / min(times)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU, which is one JAX device.

    Attributes:
      hbm: usable bytes of memory, as the TPU compiler reports them for a program that is too large.
      bandwidth: of the memory, bytes/s.
      links: of all links to other chips together, in one direction, bytes/s.
      lanes: side of the matrix unit, to which a kernel's products are padded.
    """

    hbm: float
    bandwidth: float
    links: float
    lanes: int


# By a regular expression that the whole `device_kind` must match. Bandwidths: cloud.google.com/tpu/docs, the
# page of each version, which gives v5e and v6e's links for both directions (400 and 800 GB/s).
CHIPS = {
    r"TPU v5( lite|e)": Chip(15.75 * 2**30, 819e9, 200e9, 128),
    r"TPU v5p?": Chip(95.74 * 2**30, 2765e9, 600e9, 128),
    r"TPU v6( lite|e)": Chip(31.25 * 2**30, 1638e9, 400e9, 256),
}


def find_chip(device: jax.Device) -> Chip | None:
    """Looks a TPU up in the table of chips; None for other devices."""
    return next((chip for kind, chip in CHIPS.items() if re.fullmatch(kind, device.device_kind)), None)


def count_flops(f: Callable[..., object], *abstract_args: PyTree) -> float | None:
    """Returns FLOPs of one call of `f`, counted in the program before XLA optimizes or partitions it.

    So they are those of all devices together, and those of the model: nothing that a compiler adds. What the
    program itself computes twice (`jax.checkpoint`) counts twice. A multiplication and an addition are two;
    of a convolution only what falls inside the image counts. The body of a scan or a loop counts once,
    however often it runs: lower one part of an accumulated batch, and multiply. Custom calls (cuDNN, Pallas)
    count nothing.

    Args:
      f: what `jax.jit` takes; it may close over NumPy arrays, not over arrays on a device.
      *abstract_args: pytrees of arrays or `jax.ShapeDtypeStruct`; nothing is computed.

    Returns:
      The count, or None where there is no backend that has a cost analysis.
    """
    # GPU and TPU plugins analyse no uncompiled program; the CPU, which JAX always brings along, does.
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return None
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), abstract_args)
    with jax.default_device(cpu):
        costs = jax.jit(f).lower(*shapes).cost_analysis()
    return costs["flops"] if costs else None


def memory_peaks() -> dict[str, float]:
    """Returns the most memory that was in use at a time since the process started, in GiB.

    `device_memory_peak_gib` is that of the fullest local device, and absent where the backend does not count
    it (CPU); `host_memory_peak_gib` is the process's.
    """
    peaks = {}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    in_use = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    if in_use:
        peaks["device_memory_peak_gib"] = max(in_use) / 2**30
    peaks["host_memory_peak_gib"] = host_memory_peak()
    return peaks


def host_memory_peak() -> float:
    """Returns the most memory that the process ever held, in GiB; JAX's devices are not asked for."""
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_bytes(memory: Any) -> int:
    """Returns the bytes of a device's memory that a program needs, by its `memory_analysis`."""
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    own = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return memory.argument_size_in_bytes + results + own


def memory_of(device: jax.Device) -> int | None:
    """Returns the bytes that a device may hold, or None where it does not say.

    The devices of a CPU share the machine's memory.
    """
    if device.platform == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total // len(jax.local_devices(backend="cpu"))
    return (device.memory_stats() or {}).get("bytes_limit")


def has_bfloat16(device: jax.Device) -> bool:
    """Tells whether a device computes in bfloat16 itself; NVIDIA's do from compute capability 8 on."""
    capability = getattr(device, "compute_capability", "8.0")
    return device.platform != "gpu" or float(capability) >= 8


def in_units(size: int) -> str:
    """Returns bytes as people read them."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    step = min(max(size.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{short(size / 2 ** (10 * step))} {units[step]}"


def short(number: float) -> str:
    """Returns a number with three digits, or with all before the point where these are more."""
    return f"{number:,.0f}" if number >= 999.5 else f"{number:.3g}"
