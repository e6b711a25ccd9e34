"""Time of a program on an NVIDIA GPU by what its instructions move and compute: a roofline of each.

An instruction takes as long as its bytes need at the memory's bandwidth or its FLOPs at the peak of its
dtype, whichever is longer, each at a share that has been measured on such hardware (`Efficiency`).
Instructions run one after another, and none finds its operands in a cache.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping

from dspo_jax.monitoring.gpus import Gpu
from dspo_jax.planning.works import ATTENTION, COMMUNICATION, CONVOLUTIONS, KINDS, Work

_AMPERE = {64: (0.50, 0.50), 128: (0.73, 0.63), 256: (0.73, 0.63)}
_GEFORCE = {64: (0.95, 0.76), 128: (0.95, 0.76), 256: (0.95, 0.76)}
_HOPPER = {64: (0.41, 0.42), 128: (0.62, 0.50), 256: (0.59, 0.50)}


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Shares of a GPU's peaks that its libraries reach, with large arrays.

    Attributes:
      memory: of the bandwidth. 921 of 1,008 GB/s on an RTX 4090 held to 248 W
        (github.com/krrishnarraj/clpeak/issues/106); taken for all GPUs.
      attention: of the peak, by the compute capability and the width of the heads, forward and backward; no
        more than products reach (`Gpu.products`). cuDNN on an H100 with 4,096 positions and no mask: 64 wide
        408 and 417, 128 wide 609 and 499, 256 wide 581 TFLOP/s forward (FlashAttention-3, arXiv:2407.08608,
        figures 5 and 6); 256 wide backward is an assumption. FlashAttention-2 on an A100: 50 to 73 % forward,
        up to 63 % backward (arXiv:2307.08691), and cuDNN is assumed to do as well. FlashAttention on an RTX
        4090 with 2,048 positions: 156 to 169 forward and 125 backward of 165 TFLOP/s (apache/tvm,
        flash_perf.md). Assumptions: a B200 does as an H100, all of capability 8.6, 8.9 and 12.0 as an RTX
        4090, and a head between two widths takes the time of the wider one.
      convolutions: of the peak; 0.6 is an assumption, as no measurement was found.
      link: of the links between GPUs. NCCL sends 360 to 370 of 450 GB/s between H100s
        (github.com/NVIDIA/nccl-tests/issues/212 and 326); taken for all, which is too much for GeForce cards
        that cannot reach each other's memory.
      launch: seconds that an instruction takes at least; an assumption.
    """

    memory: float = 0.91
    attention: Mapping[tuple[int, int], Mapping[int, tuple[float, float]]] = dataclasses.field(
        default_factory=lambda: {
            (8, 0): _AMPERE,
            **dict.fromkeys(((8, 6), (8, 9), (12, 0)), _GEFORCE),
            **dict.fromkeys(((9, 0), (10, 0)), _HOPPER),
        }
    )
    convolutions: float = 0.6
    link: float = 0.81
    launch: float = 3e-6


EFFICIENCY = Efficiency()


def seconds(work: Work, gpu: Gpu, devices_of_host: int, efficiency: Efficiency = EFFICIENCY) -> float:
    """Returns the time of an instruction, once.

    Args:
      work: what it does.
      gpu: on which.
      devices_of_host: GPUs that `gpu.link` connects; a collective of others goes over `gpu.network`.
      efficiency: shares of the peaks.
    """
    if work.kind == COMMUNICATION:
        # Rings that go over several hosts leave each by the network ports of all its devices in the group.
        hosts = collections.Counter(number // devices_of_host for number in work.group)
        link = gpu.link if len(hosts) == 1 else min(gpu.link, max(hosts.values()) * gpu.network)
        return max(work.bytes / (efficiency.link * link), efficiency.launch)
    peak = gpu.peak(work.dtype)
    flops = work.flops
    if work.kind == ATTENTION:
        shares = efficiency.attention[gpu.capability]
        width = min((width for width in shares if width >= work.head), default=max(shares))
        flops = flops * max(width, work.head) // max(work.head, 1)
        share = min(shares[width][work.backward], gpu.products)
    elif work.kind == CONVOLUTIONS:
        share = min(efficiency.convolutions, gpu.products)
    else:
        share = gpu.products
    return max(work.bytes / (efficiency.memory * gpu.bandwidth), flops / (share * peak), efficiency.launch)


def by_kind(works: Iterable[Work], gpu: Gpu, devices_of_host: int) -> dict[str, dict[str, float]]:
    """Sums a program by kind: {kind: {"count", "bytes", "flops", "seconds"}}, in the order of `KINDS`."""
    found = {kind: {"count": 0, "bytes": 0, "flops": 0, "seconds": 0.0} for kind in KINDS}
    for work in works:
        entry = found[work.kind]
        entry["count"] += work.times
        entry["bytes"] += work.times * work.bytes
        entry["flops"] += work.times * work.flops
        entry["seconds"] += work.times * seconds(work, gpu, devices_of_host)
    return {kind: entry for kind, entry in found.items() if entry["count"]}


def main_dtype(works: Iterable[Work]) -> str:
    """Returns the arithmetic of most of a program's FLOPs."""
    found: collections.Counter[str] = collections.Counter()
    for work in works:
        found[work.dtype] += work.times * work.flops
    return max(found, key=lambda dtype: found[dtype], default="bfloat16")


def longest(
    works: Iterable[Work], gpu: Gpu, devices_of_host: int, count: int = 20
) -> list[dict[str, object]]:
    """Returns the works that take longest, like ones together, with their "seconds" in all."""
    timed = [(work.times * seconds(work, gpu, devices_of_host), work) for work in works]
    timed.sort(key=lambda pair: -pair[0])
    return [dataclasses.asdict(work) | {"seconds": time} for time, work in timed[:count]]
