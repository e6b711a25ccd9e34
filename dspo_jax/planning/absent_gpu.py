"""NVIDIA GPUs that are not here, as devices to compile for; needs JAX's CUDA plugin, no GPU and no CUDA.

`pip install 'dspo_jax[plan-gpu]'` brings the plugin, which holds XLA's compiler for GPUs and ptxas. Such a
program is not the one that a GPU would run to the last instruction: nothing can be timed, so that XLA takes
the first form of each product, and cuBLAS's in place of Triton's. What it holds of attention kernels, copies
and arrays in memory is the same.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from dspo_jax.errors import UserError
from dspo_jax.monitoring.gpus import GPUS, REFUSED, Gpu, find_gpu

# As XLA's own descriptions in github.com/openxla/xla, xla/backends/gpu/target_config/specs/, with the
# versions of CUDA 12.9 and cuDNN 9.10.
_CARD = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_block}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {gpu.cores} fpus_per_core: {gpu.lanes} clock_rate_ghz: {clock}
  memory_bandwidth: {gpu.bandwidth:.0f} l2_cache_size: {gpu.l2} device_memory_size: {gpu.memory:.0f}
  driver_version: "12.9.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0" name: "{gpu.kind}"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{gpu.kind}"
"""
# By capability: threads of a multiprocessor, its shared memory, and how much a block may ask for; CUDA
# C++ Programming Guide, table of technical specifications.
_SHARED = {
    (8, 0): (2048, 167_936, 166_912),
    (8, 6): (1536, 102_400, 101_376),
    (8, 9): (1536, 102_400, 101_376),
    (9, 0): (2048, 233_472, 232_448),
    (10, 0): (2048, 233_472, 232_448),
    (12, 0): (1536, 131_072, 101_376),
}
_WITHOUT_TIMING: dict[str, Any] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def is_gpu(topology: str) -> bool:
    """Tells whether a topology is of NVIDIA GPUs, those that are refused among them."""
    return topology.split(":")[0] in (*GPUS, *REFUSED)


def parse_topology(topology: str) -> tuple[Gpu, int, int]:
    """Reads a topology such as "h100", "h100:8" or "h100:2x8".

    Returns:
      The GPU, the number of hosts, and how many GPUs each has.

    Raises:
      UserError: a GPU that is unknown or cannot be trained on, or numbers that are not written so.
    """
    name, _, numbers = topology.partition(":")
    gpu = find_gpu("--topology", name)
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", numbers or "1")
    if found is None:
        raise UserError(
            f"--topology={topology}: after the colon stands the number of GPUs, as in {name}:8, or hosts and "
            f"the GPUs of each, as in {name}:2x8"
        )
    return gpu, int(found[1] or 1), int(found[2])


def find_devices(topology: str) -> Sequence[Any]:
    """Makes descriptions of the GPUs of a topology, see `parse_topology`.

    Raises:
      UserError: see `parse_topology`, or the CUDA plugin is not installed.
    """
    gpu, hosts, each = parse_topology(topology)
    major, minor = gpu.capability
    threads, shared, shared_block = _SHARED[gpu.capability]
    config = _CARD.format(
        gpu=gpu,
        major=major,
        minor=minor,
        clock=gpu.clock / 1e9,
        threads=threads,
        shared=shared,
        shared_block=shared_block,
    )
    jax.config.update("jax_platforms", "cpu")  # or JAX insists on a driver
    try:
        devices: Sequence[Any] = topologies.get_topology_desc(
            gpu.kind, "cuda", target_config=config, topology=f"1x{hosts}x{each}"
        ).devices
    except (NotImplementedError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--topology={topology}: cannot be compiled for ({reason}); the compiler for NVIDIA GPUs comes "
            "with: pip install 'dspo_jax[plan-gpu]'"
        ) from error
    return devices


@contextlib.contextmanager
def as_if_here(device: Any) -> Iterator[None]:
    """Answers questions about the GPU that is here, while a program is traced, with facts about `device`.

    `device_kind.device_kind_of` and JAX's attention ask for the capability, and JAX for cuDNN's version too.
    """

    def at_least(capability: str) -> bool:
        wanted, there = ([int(part) for part in text.split(".")] for text in (capability, told))
        return there >= wanted

    told = device.compute_capability
    with (
        mock.patch.object(jax, "local_devices", return_value=[device]),
        mock.patch.object(cudnn, "check_compute_capability", at_least),
        mock.patch.object(cudnn, "is_cuda_compute_capability_equal", lambda capability: capability == told),
        mock.patch.object(cudnn, "check_cudnn_version", return_value=91000),
    ):
        yield


def lower(function: Any, *arguments: Any) -> jax.stages.Lowered:
    """Returns a jitted function, traced and lowered for CUDA; within `as_if_here`."""
    return function.trace(*arguments).lower(lowering_platforms=("cuda",))


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Returns the program of `lower`, whose arguments name a device of `find_devices` in their sharding."""
    return lowered.compile(compiler_options=_WITHOUT_TIMING)
