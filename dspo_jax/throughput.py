"""How fast a run is and what it takes: its clock, FLOPs, the devices' peaks, memory, traces."""

import dataclasses
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

# Peak bfloat16 FLOP/s without sparsity of one JAX device, by a regular expression that its whole
# `device_kind` must match: a variant that is not listed (NVL, a MIG slice) is another device. NVIDIA's data
# sheets print the number with sparsity where noted, which is twice that without.
PEAK_FLOPS = {
    # H100 Tensor Core GPU data sheet: SXM 1,979 TFLOPS with sparsity
    r"(NVIDIA )?H100 80GB HBM3": 989e12,
    # H100 Tensor Core GPU data sheet (2023): PCIe 1,513 TFLOPS with sparsity
    r"(NVIDIA )?H100 PCIe": 756e12,
    # H200 Tensor Core GPU data sheet: SXM 1,979 TFLOPS with sparsity
    r"(NVIDIA )?H200": 989e12,
    # A100 Tensor Core GPU data sheet: 312 TFLOPS, all variants
    r"(NVIDIA )?A100([- ](SXM4|PCIE|PCIe))?[- ](40|80)GB( PCIe)?": 312e12,
    # L4 Tensor Core GPU data sheet: 242 TFLOPS with sparsity
    r"(NVIDIA )?L4": 121e12,
    # L40S data sheet: 362.05 TFLOPS
    r"(NVIDIA )?L40S": 362e12,
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


def peak_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 FLOP/s of a device; None for one that is not in `PEAK_FLOPS`."""
    for kind, peak in PEAK_FLOPS.items():
        if re.fullmatch(kind, device.device_kind):
            return peak
    return None


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU, which is one JAX device.

    Attributes:
      hbm: bytes that a program can use: what the compiler names when one is too large.
      bandwidth: of that memory, bytes/s.
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


def find_chip(device: Any) -> Chip | None:
    """What is known of a TPU; None for other devices."""
    return next((chip for kind, chip in CHIPS.items() if re.fullmatch(kind, device.device_kind)), None)


def count_flops(f: Callable[..., Any], *abstract_args: Any) -> float | None:
    """FLOPs of one call of `f`, counted in the program before XLA optimizes or partitions it.

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
    """The most memory that was in use at a time since the process started, in GiB.

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
    """The most memory that the process ever held, in GiB; JAX's devices are not asked for."""
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Clock:
    """Pairs per second of training alone, over restarts: no compilation, evaluation or checkpoints.

    Attributes:
      seconds: training seconds so far.
      pairs: pairs seen in those seconds.
      data_wait: share of the last finished lap's time that the host waited for data. Faster data saves at
        most that: the device may have been busy with earlier steps meanwhile.
    """

    def __init__(self, seconds: float = 0.0, pairs: int = 0, now: Callable[[], float] = time.perf_counter):
        """Starts with what `state()` gave before a restart.

        Args:
          seconds: training seconds so far.
          pairs: pairs seen in those seconds.
          now: a clock in seconds.
        """
        self.seconds = seconds
        self.pairs = pairs
        self.data_wait = 0.0
        self._now = now
        self._last: float | None = None
        self._lap_start = (seconds, pairs)
        self._waited = 0.0  # since the last tick
        self._lap_waited = 0.0

    def tick(self, pairs: int) -> None:
        """Counts one finished step of `pairs` pairs; the first only starts the clock: it compiled."""
        now = self._now()
        if self._last is not None:
            self.seconds += now - self._last
            self.pairs += pairs
            self._lap_waited += self._waited
        self._last = now
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Notes the time spent inside, which is training time, as waiting for data."""
        start = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time spent inside."""
        start = self._now()
        try:
            yield
        finally:
            if self._last is not None:
                self._last += self._now() - start

    def lap(self) -> float:
        """Ends a lap: pairs per second since the previous call (0 when no time was counted)."""
        seconds, pairs = self.seconds - self._lap_start[0], self.pairs - self._lap_start[1]
        self.data_wait = self._lap_waited / seconds if seconds > 0 else 0.0
        self._lap_start, self._lap_waited = (self.seconds, self.pairs), 0.0
        return pairs / seconds if seconds > 0 else 0.0

    def mean(self) -> float:
        """Pairs per second over the whole run, restarts included (0 when no time was counted)."""
        return self.pairs / self.seconds if self.seconds > 0 else 0.0

    def state(self) -> dict[str, Any]:
        """What `Clock(**state)` needs to go on after a restart; JSON types."""
        return {"seconds": self.seconds, "pairs": self.pairs}


class Profiler:
    """Writes a trace of a few steps, for TensorBoard's profile plugin or xprof.

    Use it as a context manager around the loop, so that a window which the run's end cuts short is written.
    """

    def __init__(self, folder: str | Path, first: int, steps: int, clock: Clock):
        """Sets the window.

        Args:
          folder: gets the trace.
          first: the first step to trace.
          steps: how many; 0 for none.
          clock: leaves out the time that starting and writing take.
        """
        self._folder, self._clock = str(folder), clock
        self._first, self._end = first, first + steps
        self._tracing = False

    def before(self, step: int, state: Any) -> None:
        """Opens the window before its first step and closes it before the step that follows its last.

        Args:
          step: the step that is about to start.
          state: what the previous one returned. It is waited for, at these two steps only, so that the trace
            holds whole steps.
        """
        if step == self._first < self._end:
            jax.block_until_ready(state)
            with self._clock.paused():
                jax.profiler.start_trace(self._folder)
            self._tracing = True
        elif step == self._end and self._tracing:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        self._tracing = False
        with self._clock.paused():
            jax.profiler.stop_trace()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tracing:
            self._stop()
