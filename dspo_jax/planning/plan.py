"""Time and memory of a training step on devices that need not be here."""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
from jax.experimental import topologies

from dspo_jax.data.datasets import bucket_size, count_examples, read_datasets
from dspo_jax.errors import UserError
from dspo_jax.json_files import JsonObject
from dspo_jax.kernels import flash
from dspo_jax.monitoring.devices import Chip, find_chip, in_units, peak_flops
from dspo_jax.parallel.mesh import check_batch_size
from dspo_jax.parallel.rules import bytes_per_device
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.planning import compilation
from dspo_jax.training.costs import abstract_batch, flops_per_example
from dspo_jax.training.describe import held
from dspo_jax.training.settings import DataSettings, Settings
from dspo_jax.training.start import make_adapters, make_state, make_task, mesh_of
from dspo_jax.training.step import lower_step

# Share of a chip's peak that an attention kernel is taken to reach, on its padded products.
KERNEL_EFFICIENCY = 0.5


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory, time and communication of a step, for each device unless said otherwise; None is unknown.

    Attributes:
      topology: as asked for, or "present".
      device_kind: JAX's name of the device.
      devices: number of devices.
      mesh: size by axis.
      pairs_per_device: in a step.
      argument_bytes, temporary_bytes: None where the program was too large to be compiled.
      peak_bytes: the two, and what is neither; of a program that is too large as much as its compiler had
        counted.
      hbm_bytes: usable memory of the device.
      fits: whether peak_bytes is less than hbm_bytes.
      flops: of the model in a step (`costs.flops_per_example`), without what is computed twice.
      bytes_accessed: of the device's memory, as the compiler counts them.
      compiler_seconds: the compiler's own estimate of a step.
      loop_seconds: what loops add to it that run more than once.
      kernel_seconds: what attention kernels add, at `KERNEL_EFFICIENCY`.
      collective_seconds: sending what the collectives send over all links, if nothing of it were hidden; not
        part of the estimate.
      estimated_seconds: the sum of the three before.
      pairs_per_second_per_device: by that estimate.
      mfu: model FLOPs utilisation by that estimate.
      collectives: {kind: {"count", "bytes"}}.
      kernels: {name: {"count", "flops"}}, padding included.
      compile_seconds: of this machine.
      largest_pairs_per_device: that should fit, by how much memory these pairs take beside the state.
    """

    topology: str
    device_kind: str
    devices: int
    mesh: dict[str, int]
    pairs_per_device: int
    fits: bool | None
    peak_bytes: int
    hbm_bytes: int | None
    argument_bytes: int | None = None
    temporary_bytes: int | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    compiler_seconds: float | None = None
    loop_seconds: float | None = None
    kernel_seconds: float | None = None
    collective_seconds: float | None = None
    estimated_seconds: float | None = None
    pairs_per_second_per_device: float | None = None
    mfu: float | None = None
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    kernels: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    compile_seconds: float | None = None
    largest_pairs_per_device: int | None = None


def find_devices(topology: str | None) -> Sequence[jax.Device]:
    """Returns the devices of a TPU topology such as "v5p:4x4x4", or those that are here.

    Raises:
      UserError: no such topology, or the TPU's compiler is not installed.
    """
    if topology is None:
        return jax.devices()
    # Or it looks for a metadata server, narrates that there is none, and locks out every other process.
    for name, value in (
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TPU_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")  # the devices that are here are not used
    try:
        devices: Sequence[jax.Device] = topologies.get_topology_desc(topology, "tpu").devices
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--topology={topology}: cannot be compiled for ({reason}); a topology is written like v5e:2x4, "
            "v5p:2x2x1 or v6e:4x4, and the TPU's compiler comes with: pip install 'dspo_jax[plan]'"
        ) from error
    if find_chip(devices[0]) is None:
        raise UserError(
            f"--topology={topology}: nothing is known here of a {devices[0].device_kind}'s memory; use v5e, "
            "v5p or v6e"
        )
    return devices


def image_size(data: DataSettings, pipe: Pipeline, resolution: int | None) -> tuple[int, int]:
    """Chooses height and width of the images in pixels: as asked for, the data's largest, or the model's.

    The data need not be here: then it is the model's.
    """
    if resolution is not None:
        return resolution, resolution
    if data.path and all(Path(path.strip()).exists() for path in data.path.split(",")):
        datasets = read_datasets(data.path, verify=False)
        buckets = count_examples(datasets, data.split, "config.data.split")
        return bucket_size(max(buckets, key=lambda bucket: math.prod(bucket_size(bucket))))
    return pipe.image_size


def plan(
    settings: Settings,
    pipe: Pipeline,
    devices: Sequence[jax.Device],
    *,
    size: tuple[int, int],
    topology: str | None = None,
    facts: JsonObject | None = None,
) -> Plan:
    """Compiles the step of a run for some devices and says what it takes.

    Args:
      settings: of the run; the devices share its batch.
      pipe: the model, whose weights are not read.
      devices: from `find_devices`.
      size: height and width of the images in pixels.
      topology: what the devices are called.
      facts: of its compilation, where they are known; by default the step is compiled.

    Raises:
      UserError: settings that do not fit the model, or a batch that the mesh cannot split.
    """
    task, adapters = make_task(settings, pipe), make_adapters(settings, pipe)
    mesh = mesh_of(settings, devices)
    part, pairs = settings.batch_size // settings.accumulation, settings.batch_size // len(devices)
    check_batch_size(part, mesh, "--pairs_per_device * devices / config.accumulation")
    state, reference = make_state(task, mesh, adapters, abstract=True)
    batch = abstract_batch(task, 2, size, settings.batch_size, mesh)
    flops = flops_per_example(task, 2, size)
    known = {
        "topology": topology or "present",
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "pairs_per_device": pairs,
        "flops": None if flops is None else flops * pairs,
    }
    if facts is None:
        facts = compilation.kept_facts(lower_step(state, reference, batch, mesh), devices[0], topology)
    found = Plan(**(known | _judge(facts, devices[0], pairs, known["flops"])))
    fixed = sum(map(bytes_per_device, held(state, reference).values()))
    largest = largest_that_fits(found.hbm_bytes, found.peak_bytes, fixed, pairs, settings.accumulation)
    return dataclasses.replace(found, largest_pairs_per_device=largest)


def _judge(facts: JsonObject, device: jax.Device, pairs: int, flops: float | None) -> JsonObject:
    """Computes the fields of a `Plan` for one device from the facts of its compilation."""
    chip, peak_rate = find_chip(device), peak_flops(device.device_kind)
    hbm = facts["hbm_bytes"]
    if hbm is None:
        hbm = int(chip.hbm) if chip else (device.memory_stats() or {}).get("bytes_limit")
    found = {name: facts[name] for name in facts.keys() & {field.name for field in dataclasses.fields(Plan)}}
    found |= {"hbm_bytes": hbm, "fits": None if hbm is None else facts["peak_bytes"] <= hbm}
    # Other compilers than the TPU's do not know what they compile for, and a program too large has no cost.
    if chip is None or peak_rate is None or facts.get("compiler_seconds") is None:
        return found | {"compiler_seconds": None}
    loop_seconds = facts["compiler_seconds"] * (facts["loop_factor"] - 1)
    kernels, kernel_seconds = _cost_of_kernels(facts["kernel_calls"], chip, peak_rate)
    estimate = facts["compiler_seconds"] + loop_seconds + kernel_seconds
    # A ring sends an all-reduce's bytes twice, and all others' once.
    sent = sum(
        each["bytes"] * (2 if kind == "all-reduce" else 1) for kind, each in facts["collectives"].items()
    )
    return found | {
        "loop_seconds": loop_seconds,
        "kernels": kernels,
        "kernel_seconds": kernel_seconds,
        "collective_seconds": sent / chip.links,
        "estimated_seconds": estimate,
        "pairs_per_second_per_device": pairs / estimate,
        "mfu": None if flops is None else flops / estimate / peak_rate,
    }


def _cost_of_kernels(
    calls: Iterable[tuple[str, Sequence[Sequence[int]], int, int]], chip: Chip, peak_rate: float
) -> tuple[dict[str, dict[str, float]], float]:
    """Returns the padded FLOPs of the attention kernels by name, and the seconds of all."""
    found: dict[str, dict[str, float]] = {}
    seconds = 0.0
    for name, operands, size, times in calls:
        name = name.split(".")[0]
        flops = flash.kernel_flops(name, operands, chip.lanes)
        seconds += times * max(flops / (KERNEL_EFFICIENCY * peak_rate), size / chip.bandwidth)
        entry = found.setdefault(name, {"count": 0, "flops": 0.0})
        entry["count"] += times
        entry["flops"] += times * flops
    return found, seconds


def largest_that_fits(hbm: int | None, peak: int, fixed: int, pairs: int, step: int) -> int | None:
    """Pairs on a device, a multiple of `step`, if all memory but `fixed` grows with them.

    None where the device's memory is not known, or a program was too large before all of it was counted.
    """
    if hbm is None or peak <= fixed:
        return None
    return max(0, int((hbm - fixed) / ((peak - fixed) / pairs))) // step * step


def describe_plan(found: Plan) -> Iterator[str]:
    """The plan in lines."""
    axes = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    yield f"{found.devices} {found.device_kind} device(s) ({found.topology}), mesh {axes}"
    yield f"{found.pairs_per_device} pairs on each, {found.pairs_per_device * found.devices} a step"
    if found.argument_bytes is not None and found.temporary_bytes is not None:
        yield (
            f"arguments {in_units(found.argument_bytes)}, temporaries {in_units(found.temporary_bytes)}; "
            + (
                "compiled until the memory was known, without that of its own code"
                if found.compile_seconds is None
                else f"compiled in {found.compile_seconds:.0f} s"
            )
        )
    limit = "" if found.hbm_bytes is None else f" of {in_units(found.hbm_bytes)}"
    verdict = {True: ": fits", False: ": does not fit", None: ""}[found.fits]
    yield f"peak {in_units(found.peak_bytes)}{limit} on each device{verdict}"
    if found.largest_pairs_per_device is not None:
        yield f"about {found.largest_pairs_per_device} pairs should fit on each: ask for them to be sure"
    if found.flops is not None:
        yield f"{found.flops / 1e12:.4g} TFLOP of the model in a step on each device"
    if found.bytes_accessed is not None:
        yield f"{found.bytes_accessed / 1e9:.4g} GB of memory traffic"
    for kind, each in found.collectives.items():
        yield f"{kind}: {each['count']} with {in_units(each['bytes'])} of results"
    for name, kernel in found.kernels.items():
        yield f"{name}: {kernel['count']:.0f} with {kernel['flops'] / 1e12:.4g} TFLOP, padding included"
    if found.estimated_seconds is not None:
        yield (
            f"estimate: {found.estimated_seconds:.4g} s a step = {found.compiler_seconds:.4g} s by the "
            f"compiler + {found.loop_seconds:.3g} s for loops + {found.kernel_seconds:.3g} s for kernels at "
            f"{KERNEL_EFFICIENCY:.0%} of the peak; collectives, if nothing hid them: "
            f"{found.collective_seconds:.3g} s"
        )
        mfu = "" if found.mfu is None else f", MFU {found.mfu:.1%}"
        yield f"{found.pairs_per_second_per_device:.4g} pairs/s on each device{mfu}"
