"""Time and memory of a training step on devices that need not be here."""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies

from dspo_jax.data.datasets import bucket_size, count_examples, read_datasets
from dspo_jax.errors import UserError
from dspo_jax.json_files import JsonObject
from dspo_jax.kernels import flash
from dspo_jax.monitoring.devices import Chip, find_chip, in_units, peak_flops
from dspo_jax.monitoring.gpus import FRACTION_VARIABLE, Gpu, gpu_of_kind, memory_fraction
from dspo_jax.parallel.mesh import check_batch_size
from dspo_jax.pipelines.conditioning import NO_TOKEN
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.pipelines.stable_diffusion_3 import T5
from dspo_jax.planning import absent_gpu, compilation, roofline
from dspo_jax.planning.parts import PARTS, UNITS
from dspo_jax.planning.works import COMMUNICATION, Work
from dspo_jax.training.costs import flops_per_example
from dspo_jax.training.make_task import make_task
from dspo_jax.training.settings import DataSettings, Settings
from dspo_jax.training.start import check_heads, mesh_of

# Share of a chip's peak that an attention kernel is taken to reach, on its padded products.
KERNEL_EFFICIENCY = 0.5
# Assumptions: what a process holds outside of that, CUDA's context and the libraries' handles and code, and
# NCCL's buffers where there are several GPUs.
_CONTEXT, _NCCL = 2**30, 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory, time and communication of a program, for each device unless said otherwise; None is unknown.

    Attributes:
      topology: as asked for, or "present".
      device_kind: JAX's name of the device.
      devices: number of devices.
      mesh: size by axis.
      pairs_per_device: in a step; of other parts what `parts.UNITS` says, in one call.
      unit: what these are.
      argument_bytes, temporary_bytes: None where the program was too large to be compiled.
      peak_bytes: the two, and what is neither; of a program that is too large as much as its compiler had
        counted.
      hbm_bytes: usable memory of the device, for a GPU by assumptions.
      device_bytes: all memory of a GPU.
      fits: whether peak_bytes is less than hbm_bytes.
      flops: of the model in a step (`costs.flops_per_example`), without what is computed twice.
      bytes_accessed: of the device's memory, as the compiler counts them.
      compiler_seconds: the compiler's own estimate of a step.
      loop_seconds: what loops add to it that run more than once.
      kernel_seconds: what attention kernels add, at `KERNEL_EFFICIENCY`.
      collective_seconds: sending what the collectives send over all links; not part of the estimate.
      exposed_seconds: of it, on a TPU, what is sent while nothing else is done.
      estimated_seconds: the sum of the three before.
      pairs_per_second_per_device: by that estimate.
      mfu: model FLOPs utilisation by that estimate; of a GPU against the peak of the arithmetic, bfloat16 or
        TF32, that most of the program is in.
      collectives: see `program_text.collectives`.
      kernels: {name: {"count", "flops"}}, padding included.
      compile_seconds: of this machine.
      largest_pairs_per_device: that should fit, by how much memory these pairs take beside the state.
      part: one of `parts.PARTS`.
      roofline: of a GPU's instructions by kind: {kind: {"count", "bytes", "flops", "seconds"}}.
      longest: instructions that take most of a GPU's time: `works.Work` with "seconds" of all `times`.
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
    exposed_seconds: float | None = None
    estimated_seconds: float | None = None
    pairs_per_second_per_device: float | None = None
    mfu: float | None = None
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    kernels: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    compile_seconds: float | None = None
    largest_pairs_per_device: int | None = None
    unit: str = "pairs"
    device_bytes: int | None = None
    part: str = "step"
    roofline: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    longest: list[dict[str, object]] = dataclasses.field(default_factory=list)


def find_devices(topology: str | None) -> Sequence[jax.Device]:
    """Returns the devices of a topology such as "v5p:4x4x4" or "h100:8", or those that are here.

    Raises:
      UserError: no such topology, or its compiler is not installed.
    """
    if topology is None:
        return jax.devices()
    if absent_gpu.is_gpu(topology):
        return absent_gpu.find_devices(topology)
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
            "v5p:2x2x1 or v6e:4x4, for GPUs like h100:8, and the TPU's compiler comes with: pip install "
            "'dspo_jax[plan]'"
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


def assume_stored_states(settings: Settings, pipe: Pipeline) -> Pipeline:
    """Returns the model as a run on encoded data has it: T5's states stored, which is what `encode` does."""
    if T5 not in pipe.networks or settings.train_text_encoder or settings.stream.kind != "dataset":
        return pipe
    shape = (int((pipe.empty_tokens[-1] != NO_TOKEN).sum()), pipe.networks[T5].settings["d_model"])
    return dataclasses.replace(pipe, stored_states={"": np.zeros(shape, np.float16)})


def plan(
    settings: Settings,
    pipe: Pipeline,
    devices: Sequence[jax.Device],
    *,
    size: tuple[int, int],
    topology: str | None = None,
    facts: JsonObject | None = None,
    part: str = "step",
) -> Plan:
    """Compiles the step of a run, or what is done around it, for some devices and says what it takes.

    Args:
      settings: of the run; the devices share its batch.
      pipe: the model, whose weights are not read.
      devices: from `find_devices`.
      size: height and width of the images in pixels.
      topology: what the devices are called.
      facts: of its compilation, where they are known; by default the step is compiled.
      part: one of `parts.PARTS`.

    Raises:
      UserError: settings that do not fit the model, or a batch that the mesh cannot split.
    """
    mesh, device = mesh_of(settings, devices), devices[0]
    check_heads(pipe, mesh)
    pairs, accumulation = settings.batch_size // len(devices), settings.accumulation if part == "step" else 1
    task = make_task(settings, pipe)
    rows = settings.batch_size * (task.loss.rows if part == "step" else 1)
    check_batch_size(rows // accumulation, mesh, "--pairs_per_device * devices / config.accumulation")
    program = PARTS[part](settings, pipe, size, settings.batch_size, mesh)
    flops = flops_per_example(task, settings.images_per_row, size) if part == "step" else None
    known = {
        "topology": topology or "present",
        "part": part,
        "unit": settings.stream.unit if part == "step" else UNITS[part],
        "device_kind": device.device_kind,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "pairs_per_device": pairs,
        "flops": None if flops is None else flops * pairs,
    }
    if facts is None:
        absent = device if topology is not None and absent_gpu.is_gpu(topology) else None
        facts = compilation.kept_facts(program.lower(absent), device, topology, program.open_trips)
    gpu = gpu_of_kind(device.device_kind)
    if gpu is not None and "works" in facts:
        each = absent_gpu.parse_topology(topology)[2] if topology else jax.local_device_count()
        judged = _judge_gpu(facts, gpu, len(devices), each, pairs, known["flops"])
    else:
        judged = _judge(facts, device, pairs, known["flops"])
    found = Plan(**(known | judged))
    # Not all that is held is held at the peak of a GPU's program, whose temporaries are taken to grow whole.
    fixed = program.fixed_bytes if gpu is None else found.argument_bytes or program.fixed_bytes
    if part == "step" and task.loss.rows > 1:
        return found  # its memory follows from the rows of a part, not from the images
    largest = largest_that_fits(found.hbm_bytes, found.peak_bytes, fixed, pairs, accumulation)
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
    sent = exposed = 0
    for kind, each in facts["collectives"].items():
        factor = 2 if kind == "all-reduce" else 1  # a ring sends its bytes twice, and all others' once
        sent += factor * each["bytes"]
        exposed += factor * (each["bytes"] - each["asynchronous"])
    return found | {
        "loop_seconds": loop_seconds,
        "kernels": kernels,
        "kernel_seconds": kernel_seconds,
        "collective_seconds": sent / chip.links,
        "exposed_seconds": exposed / chip.links,
        "estimated_seconds": estimate,
        "pairs_per_second_per_device": pairs / estimate,
        "mfu": None if flops is None else flops / estimate / peak_rate,
    }


def _judge_gpu(
    facts: JsonObject, gpu: Gpu, devices: int, devices_of_host: int, pairs: int, flops: float | None
) -> JsonObject:
    """Computes the fields of a `Plan` for a GPU from the facts of its compilation."""
    works = [Work(**work | {"group": tuple(work["group"])}) for work in facts["works"]]
    kinds = roofline.by_kind(works, gpu, devices_of_host)
    collective = kinds.get(COMMUNICATION, {}).get("seconds", 0.0)
    estimate = sum(entry["seconds"] for entry in kinds.values()) - collective
    if flops is None:
        flops = sum(entry["flops"] for entry in kinds.values())
    # JAX keeps what it takes for itself; the rest must hold what is not JAX's.
    outside = _CONTEXT + (_NCCL if devices > 1 else 0)
    usable = int(min(gpu.memory * memory_fraction(), gpu.memory - outside))
    found = {name: facts[name] for name in facts.keys() & {field.name for field in dataclasses.fields(Plan)}}
    return found | {
        "hbm_bytes": usable,
        "device_bytes": int(gpu.memory),
        "fits": facts["peak_bytes"] <= usable,
        "flops": flops,
        "roofline": kinds,
        "longest": roofline.longest(works, gpu, devices_of_host),
        "collective_seconds": collective,
        "estimated_seconds": estimate,
        "pairs_per_second_per_device": pairs / estimate,
        "mfu": flops / estimate / gpu.peak(roofline.main_dtype(works)),
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
    unit, call = found.unit, "step" if found.part == "step" else "call"
    yield f"{found.pairs_per_device} {unit} on each, {found.pairs_per_device * found.devices} a {call}"
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
    if found.device_bytes is not None:
        yield (
            f"  of {in_units(found.device_bytes)} JAX takes {memory_fraction():.0%} ({FRACTION_VARIABLE}; "
            "launch/gpu.sh sets 0.9); "
            f"{in_units(_CONTEXT)} for CUDA and its libraries, and as much for NCCL where there are several "
            "GPUs, are assumptions"
        )
    if found.largest_pairs_per_device is not None:
        yield f"about {found.largest_pairs_per_device} {unit} should fit on each: ask for them to be sure"
    if found.flops is not None:
        of_what = "of the model in a step" if found.part == "step" else "of the program in a call"
        yield f"{found.flops / 1e12:.4g} TFLOP {of_what} on each device"
    if found.bytes_accessed is not None:
        yield f"{found.bytes_accessed / 1e9:.4g} GB of memory traffic"
    for kind, each in found.collectives.items():
        beside = f", {in_units(each['asynchronous'])} of them while something else is computed"
        yield f"{kind}: {each['count']} with {in_units(each['bytes'])} of results{beside}"
    for name, kernel in found.kernels.items():
        yield f"{name}: {kernel['count']:.0f} with {kernel['flops'] / 1e12:.4g} TFLOP, padding included"
    if found.roofline and found.estimated_seconds:
        yield from _describe_roofline(found, unit, call)
    elif found.estimated_seconds is not None:
        yield (
            f"estimate: {found.estimated_seconds:.4g} s a step = {found.compiler_seconds:.4g} s by the "
            f"compiler + {found.loop_seconds:.3g} s for loops + {found.kernel_seconds:.3g} s for kernels at "
            f"{KERNEL_EFFICIENCY:.0%} of the peak; collectives take {found.collective_seconds:.3g} s, "
            f"{found.exposed_seconds:.3g} s of it beside no computation"
        )
        mfu = "" if found.mfu is None else f", MFU {found.mfu:.1%}"
        yield f"{found.pairs_per_second_per_device:.4g} {unit}/s on each device{mfu}"


def _describe_roofline(found: Plan, unit: str, call: str) -> Iterator[str]:
    """Time of a GPU's instructions by kind, and what follows from it."""
    yield (f"{'roofline of each instruction':<30}{'count':>7}{'GB':>9}{'TFLOP':>9}{'ms':>9}   share")
    estimate = found.estimated_seconds or 1.0
    for kind, entry in found.roofline.items():
        hidden = kind == COMMUNICATION
        share = "not in the sum" if hidden else f"{entry['seconds'] / estimate:6.1%}"
        yield (
            f"  {kind:<28}{entry['count']:>7.0f}{entry['bytes'] / 1e9:>9.1f}{entry['flops'] / 1e12:>9.2f}"
            f"{entry['seconds'] * 1e3:>9.1f}   {share}"
        )
    mfu = "" if found.mfu is None else f", MFU {found.mfu:.1%}"
    yield (
        f"estimate: {estimate:.4g} s a {call}, {found.pairs_per_second_per_device:.4g} {unit}/s on each "
        f"device{mfu}; one instruction after another, each at the share of the peak that its library reaches"
    )
    if found.collective_seconds:
        slowest = estimate + found.collective_seconds
        yield (
            f"with the {found.collective_seconds:.3g} s of collectives, if nothing hid them: "
            f"{found.pairs_per_device / slowest:.4g} {unit}/s on each device"
        )


def explain(found: Plan) -> Iterator[str]:
    """The instructions that take most of a GPU's time, with the line of this package that they come from."""
    for work in found.longest:
        flops = f"{work['flops'] / 1e9:9.1f} GFLOP" if work["flops"] else " " * 15  # type: ignore[operator]
        yield (
            f"{work['seconds'] * 1e3:8.2f} ms {work['times']:>5} x {work['what']!s:<36}"  # type: ignore[operator]
            f"{work['bytes'] / 1e6:9.1f} MB{flops}  {work['source']}"  # type: ignore[operator]
        )
