"""NVIDIA GPUs that are not here, as devices to compile for; needs JAX's CUDA plugin (`jax[cuda12]`), no GPU.

Such a program is not the one that a GPU would run to the last instruction: nothing can be timed, so that XLA
takes the first form of each product, and cuBLAS's in place of Triton's. What it holds of attention kernels,
copies and arrays in memory is the same.
"""

import collections
import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.planning.program_text import array_bytes, entry_instructions

# The numbers of XLA's own descriptions, github.com/openxla/xla, xla/backends/gpu/target_config/specs/
# h100_sxm.txtpb and a100_sxm_40.txtpb, with the versions of CUDA 12.9 and cuDNN 9.10.
_CARD = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
  driver_version: "12.9.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0" name: "{name}" {numbers}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
"""
_CARDS = {
    "h100": (
        "NVIDIA H100 80GB HBM3",
        "cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 "
        "memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072 "
        "shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448",
    ),
    "a100": (
        "NVIDIA A100-SXM4-40GB",
        "cuda_compute_capability { major: 8 } core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41 "
        "memory_bandwidth: 1555200000000 l2_cache_size: 41943040 device_memory_size: 42331013120 "
        "shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912",
    ),
}
_WITHOUT_TIMING: dict[str, Any] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}

# Instructions that move nothing.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
_OPERAND = re.compile(r"%([\w.-]+)")
_WORKSPACE = re.compile(r"\b[su]8\[\d*\]")
_CUSTOM = re.compile(r'custom_call_target="([^"]*)"')


def find_devices(card: str, count: int = 1) -> Sequence[Any]:
    """Makes descriptions of one host's GPUs, `h100` or `a100`.

    Raises:
      UserError: another card, or the CUDA plugin is not installed.
    """
    if card not in _CARDS:
        raise UserError(spelling.unknown("--topology", card, tuple(_CARDS)))
    name, numbers = _CARDS[card]
    config = _CARD.format(name=name, numbers=numbers)
    jax.config.update("jax_platforms", "cpu")  # or JAX insists on a driver
    try:
        devices: Sequence[Any] = topologies.get_topology_desc(
            card, "cuda", target_config=config, topology=f"1x1x{count}"
        ).devices
    except (NotImplementedError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--topology={card}: cannot be compiled for ({reason}); it needs: pip install 'jax[cuda12]'"
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


def traffic(text: str) -> dict[str, tuple[int, int]]:
    """Returns the instructions of a compiled program by kind: (count, bytes that they read and write).

    A fusion is called by what it does, as XLA named it, a custom call by its target. Only the entry
    computation counts, so that a loop's body does not; workspaces of libraries do not count either.
    """
    found: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    sizes: dict[str, int] = {}
    for instruction in entry_instructions(text):
        type_ = _WORKSPACE.sub("", instruction.type)
        sizes[instruction.name] = array_bytes(type_)
        if instruction.op in _FREE:
            continue
        kind = instruction.op
        if kind == "fusion":
            kind = re.sub(r"[.\d]+$", "", instruction.name)
        elif custom := _CUSTOM.search(instruction.rest):
            kind = custom[1]
        operands = _OPERAND.findall(instruction.rest.split(")")[0])
        count, moved = found[kind]
        found[kind] = (count + 1, moved + sizes[instruction.name] + sum(sizes[name] for name in operands))
    return dict(found)
