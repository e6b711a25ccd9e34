"""NVIDIA GPUs by the names that people type: memory, bandwidths and peaks, and what XLA compiles for."""

import dataclasses
import os
import re
from collections.abc import Mapping

from dspo_jax import spelling
from dspo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, which is one JAX device.

    Attributes:
      kind: JAX's `device_kind`.
      capability: CUDA's compute capability.
      memory: bytes; where no report of a device was found, a data sheet's GB of 10^9 bytes, which is about
        what the driver leaves of as many GiB: GeForce cards report 5 to 7 % more, an A10 2 % less.
      bandwidth: of the memory, bytes/s.
      bfloat16, tf32: FLOP/s of dense products with float32 sums.
      link: to the other GPUs of its host, in one direction, bytes/s; NVLink, or PCIe where there is none (an
        RTX 3090's bridge for two cards is left out).
      cores: streaming multiprocessors.
      lanes: float32 units of each.
      clock: boost, Hz.
      l2: bytes of the second cache.
      network: of each GPU to other hosts, in one direction, bytes/s; an assumption but for the DGX systems.
      products: share of the peaks that products of large matrices reach, see `_PRODUCTS`.
      source: of the numbers.
      pattern: a regular expression of every `device_kind` that has these numbers, beside `kind`.
    """

    kind: str
    capability: tuple[int, int]
    memory: float
    bandwidth: float
    bfloat16: float
    tf32: float
    link: float
    cores: int
    lanes: int
    clock: float
    l2: int
    source: str
    network: float = 12.5e9
    products: float = 0.80
    pattern: str = ""

    def peak(self, dtype: str) -> float:
        """Returns FLOP/s of products in "bfloat16", "tf32" or "float32"."""
        return {"bfloat16": self.bfloat16, "tf32": self.tf32, "float32": self.float32}[dtype]

    @property
    def float32(self) -> float:
        """FLOP/s without tensor cores: a multiplication and an addition of each lane in each cycle."""
        return 2 * self.cores * self.lanes * self.clock


# One direction: half of what NVIDIA prints for NVLink and PCIe x16, which is of both.
_NVLINK3, _NVLINK4, _NVLINK5 = 300e9, 450e9, 900e9
_PCIE4, _PCIE5 = 32e9, 64e9
_MIB = 2**20
FRACTION_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_XLA = "XLA's target_config/specs/"
_GA102 = "NVIDIA GA102 GPU Architecture whitepaper V2"
_ADA = "NVIDIA Ada GPU Architecture whitepaper V2"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper"
# Shares of the bfloat16 peak in products. A100 271.2 of 312, H100 794.5 of 989, B200 1,745 of 2,250 TFLOP/s
# (github.com/stas00/ml-engineering, "Maximum Achievable Matmul FLOPS", August 2026). The others are owners'
# reports (github.com/zzc0721/torch-performance-test-data, issues 78 to 200): RTX 4090 164.8 of 165.2, RTX
# 3060 25.5 of 25.5, RTX 5090 179 to 240 of 209.5, RTX PRO 6000 368 of 503.8, and an L4, held to 72 W, 57
# to 71 of 121. A card that is not named takes the number of the nearest: that of an A10, held to 150 W, is an
# assumption, too.
_PRODUCTS = {"a100": 0.87, "b200": 0.78, "geforce": 1.0, "rtx50": 0.85, "rtx6000pro": 0.73, "low power": 0.59}
# In the order of the fields. A GeForce does 512 FLOP a cycle and multiprocessor in bfloat16, sums in float32,
# half of what it does with float16 sums; the whitepapers print the products. TF32 is half of bfloat16. Data
# sheets that print a number with sparsity print twice that without.
GPUS: Mapping[str, Gpu] = {
    "a10": Gpu(
        *("NVIDIA A10", (8, 6), 24e9, 600e9, 125e12, 62.5e12, _PCIE4, 72, 128, 1.695e9, 6 * _MIB),
        "A10 Tensor Core GPU data sheet; multiprocessors, clock and cache as CUDA reports them",
        products=_PRODUCTS["low power"],
    ),
    "a100-40": Gpu(
        *("NVIDIA A100-SXM4-40GB", (8, 0), 42_331_013_120, 1555.2e9, 312e12, 156e12, _NVLINK3),
        *(108, 64, 1.41e9, 40 * _MIB, f"A100 Tensor Core GPU data sheet; {_XLA}a100_sxm_40.txtpb"),
        products=_PRODUCTS["a100"],
        network=25e9,  # DGX A100: eight ports of 200 Gbit/s for eight GPUs
        pattern=r"A100([- ](SXM4|PCIE|PCIe))?[- ]40GB( PCIe)?",
    ),
    "a100-80": Gpu(
        *("NVIDIA A100-SXM4-80GB", (8, 0), 85_100_068_864, 2039.04e9, 312e12, 156e12, _NVLINK3),
        *(108, 64, 1.41e9, 40 * _MIB, f"A100 Tensor Core GPU data sheet; {_XLA}a100_sxm_80.txtpb"),
        products=_PRODUCTS["a100"],
        network=25e9,
        pattern=r"A100([- ](SXM4|PCIE|PCIe))?[- ]80GB( PCIe)?",
    ),
    "b200": Gpu(
        *("NVIDIA B200", (10, 0), 191_514_411_008, 7672.32e9, 2250e12, 1125e12, _NVLINK5),
        *(148, 128, 1.965e9, 132_644_864, f"HGX B200 data sheet: 4.5 PFLOPS with sparsity; {_XLA}b200.txtpb"),
        products=_PRODUCTS["b200"],
        network=50e9,  # DGX B200: eight ports of 400 Gbit/s for eight GPUs
    ),
    "h100": Gpu(
        *("NVIDIA H100 80GB HBM3", (9, 0), 84_942_979_072, 3352.32e9, 989e12, 494.5e12, _NVLINK4),
        *(132, 128, 1.98e9, 50 * _MIB),
        f"H100 Tensor Core GPU data sheet: SXM 1,979 TFLOPS with sparsity; {_XLA}h100_sxm.txtpb",
        network=50e9,  # DGX H100: eight ports of 400 Gbit/s for eight GPUs
    ),
    "h200": Gpu(
        *("NVIDIA H200", (9, 0), 151_397_597_184, 4800e9, 989e12, 494.5e12, _NVLINK4),
        *(132, 128, 1.98e9, 50 * _MIB),
        f"H200 Tensor Core GPU data sheet: SXM 1,979 TFLOPS with sparsity; {_XLA}h200.txtpb",
        network=50e9,
    ),
    "l4": Gpu(
        *("NVIDIA L4", (8, 9), 24e9, 300e9, 121e12, 60.5e12, _PCIE4, 58, 128, 2.04e9, 48 * _MIB),
        "L4 Tensor Core GPU data sheet: 242 TFLOPS with sparsity; the rest as CUDA reports it",
        products=_PRODUCTS["low power"],
    ),
    "l40s": Gpu(
        *("NVIDIA L40S", (8, 9), 48e9, 864e9, 362e12, 183e12, _PCIE4, 142, 128, 2.52e9, 96 * _MIB),
        "L40S data sheet: 362.05 and 183 TFLOPS; the rest as CUDA reports it",
    ),
    "rtx3060": Gpu(
        *(
            "NVIDIA GeForce RTX 3060",
            (8, 6),
            12e9,
            360e9,
            25.5e12,
            12.7e12,
            _PCIE4,
            28,
            128,
            1.777e9,
            2_359_296,  # as CUDA reports; the die has 3 MiB
        ),
        "GeForce RTX 3060 specifications (12 GB); peaks by multiprocessors and clock as in " + _GA102,
        products=_PRODUCTS["geforce"],
    ),
    "rtx3090": Gpu(
        *("NVIDIA GeForce RTX 3090", (8, 6), 24e9, 936e9, 71e12, 35.6e12, _PCIE4, 82, 128, 1.695e9, 6 * _MIB),
        _GA102 + ", appendix A: 71 TFLOPS, 142 with sparsity",
        products=_PRODUCTS["geforce"],
    ),
    "rtx4070": Gpu(
        *(
            "NVIDIA GeForce RTX 4070",
            (8, 9),
            12e9,
            504e9,
            58.3e12,
            29.1e12,
            _PCIE4,
            46,
            128,
            2.475e9,
            36 * _MIB,
        ),
        "GeForce RTX 4070 specifications; peaks by multiprocessors and clock as in " + _ADA,
        products=_PRODUCTS["geforce"],
    ),
    "rtx4080": Gpu(
        *("NVIDIA GeForce RTX 4080", (8, 9), 16e9, 716.8e9, 97.5e12, 48.7e12, _PCIE4),
        *(76, 128, 2.505e9, 64 * _MIB, _ADA),
        products=_PRODUCTS["geforce"],
    ),
    "rtx4090": Gpu(
        *("NVIDIA GeForce RTX 4090", (8, 9), 24e9, 1008e9, 165.2e12, 82.6e12, _PCIE4),
        *(128, 128, 2.52e9, 72 * _MIB, _ADA + ": 165.2 TFLOPS, 330.4 with sparsity"),
        products=_PRODUCTS["geforce"],
    ),
    "rtx5080": Gpu(
        *("NVIDIA GeForce RTX 5080", (12, 0), 16e9, 960e9, 112.6e12, 56.3e12, _PCIE5),
        *(84, 128, 2.617e9, 64 * _MIB, _BLACKWELL),
        products=_PRODUCTS["rtx50"],
    ),
    "rtx5090": Gpu(
        *("NVIDIA GeForce RTX 5090", (12, 0), 32e9, 1792e9, 209.5e12, 104.8e12, _PCIE5),
        *(170, 128, 2.407e9, 96 * _MIB, _BLACKWELL + ": 419 TFLOPS with sparsity"),
        products=_PRODUCTS["rtx50"],
    ),
    # A professional card's multiprocessor does 1,024 FLOP a cycle, whatever the sums.
    "rtx6000pro": Gpu(
        *("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", (12, 0), 102.6e9, 1792e9, 503.8e12, 251.9e12),
        *(_PCIE5, 188, 128, 2.617e9, 128 * _MIB),
        f"NVIDIA RTX Blackwell PRO GPU Architecture whitepaper; {_XLA}rtx6000pro.txtpb; memory by nvidia-smi",
        products=_PRODUCTS["rtx6000pro"],
    ),
}

# Cards that people have and that this project does not train on, with the reason.
_BEFORE_AMPERE = (
    "no bfloat16 arithmetic and no fused attention of cuDNN, which begin with compute capability 8.0"
)
REFUSED = {
    **dict.fromkeys(("p100", "gtx1080"), f"Pascal has {_BEFORE_AMPERE}"),
    "v100": f"Volta has {_BEFORE_AMPERE}",
    **dict.fromkeys(("t4", "rtx2060", "rtx2070", "rtx2080"), f"Turing has {_BEFORE_AMPERE}"),
}


def find_gpu(key: str, name: str) -> Gpu:
    """Looks a GPU up by its name in `GPUS`.

    Args:
      key: what was being named, for the refusal, e.g. "--gpu".
      name: e.g. "h100".

    Raises:
      UserError: a GPU that cannot be trained on, with the reason, or an unknown name.
    """
    if name in REFUSED:
        raise UserError(
            f"{key} = {name!r}: cannot be used: {REFUSED[name]} (allowed: {', '.join(sorted(GPUS))})"
        )
    if name not in GPUS:
        raise UserError(spelling.unknown(key, name, GPUS))
    return GPUS[name]


def gpu_of_kind(device_kind: str) -> Gpu | None:
    """Returns the GPU that JAX calls so; None for one that is not in `GPUS`, a variant of one among them."""
    for gpu in GPUS.values():
        pattern = gpu.pattern or re.escape(gpu.kind.removeprefix("NVIDIA "))
        if re.fullmatch(f"(NVIDIA )?({pattern})", device_kind):
            return gpu
    return None


def memory_fraction() -> float:
    """Returns the share of a GPU's memory that JAX takes, as the environment says or by default.

    Source: docs.jax.dev/en/latest/gpu_memory_allocation.html.
    """
    return float(os.environ.get(FRACTION_VARIABLE, 0.75))
