"""Estimates memory, FLOPs and time of a run without its weights: from shapes, or from its compiled step."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dspo_jax.data.datasets import bucket_size
from dspo_jax.models.model import Params
from dspo_jax.monitoring.devices import in_units, memory_of, peak_bytes, peak_flops, short, time_product
from dspo_jax.monitoring.gpus import FRACTION_VARIABLE, find_gpu, memory_fraction
from dspo_jax.parallel.mesh import batch_sharding
from dspo_jax.parallel.rules import bytes_per_device
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.training.costs import (
    abstract_batch,
    flops_per_example,
    least_activations,
    mean_flops_per_example,
)
from dspo_jax.training.describe import (
    describe_host_bytes,
    describe_run,
    held,
    kept_state_bytes,
    list_bytes,
    warnings,
)
from dspo_jax.training.make_task import make_task
from dspo_jax.training.moving_reference import moving_part
from dspo_jax.training.rollouts import Rollout
from dspo_jax.training.rounds import check_round_sizes
from dspo_jax.training.settings import Settings
from dspo_jax.training.start import Experiment, make_adapters, make_state, mesh_of, prepare
from dspo_jax.training.step import TrainState, abstract_key, lower_step

# Share of a device's peak that a run is taken to reach: a guess, as none was timed on these devices.
_EFFICIENCY = 1 / 3
_SMALLER = (
    "train adapters with --config.lora.rank=8, or share the state with several devices: --config.mesh.fsdp=N"
)


def estimate(
    settings: Settings, pipe: Pipeline, pairs: int | None = None, gpu: str | None = None
) -> Iterator[str]:
    """Yields what a run would hold and compute on one device, a line each; nothing is compiled.

    Args:
      settings: of the run; model and data may be unset.
      pipe: the model, whose weights are not read.
      pairs: examples to train on; by default the run is as long as `config.steps`.
      gpu: a name in `gpus.GPUS`; by default the first device that is here.

    Raises:
      UserError: an unknown GPU, or settings that do not fit the model or each other.
    """
    card = None if gpu is None else find_gpu("--gpu", gpu)
    if settings.data.path and pairs is None:
        yield "config.data.path is not read here: say with --pairs how many there are"
    if settings.reference.model:
        yield "config.reference.model is not read here: all of its weights are taken to be others"
    if pairs is not None:
        settings = settings.for_examples(pairs)
    task = make_task(settings, pipe)
    state, reference = make_state(
        task, mesh_of(settings, jax.devices()[:1]), make_adapters(settings, pipe), abstract=True
    )
    side, part = pipe.image_side, max(1, settings.batch_size * task.loss.rows // settings.accumulation)
    unit = settings.stream.unit
    of_step = " denoising steps" if task.loss.rows > 1 else ""
    yield (
        f"{settings.method} of {pipe.path}, {side}x{side} pixels: {settings.batch_size} {unit} a step, "
        f"{part}{of_step} at a time"
    )
    if settings.epochs is None:
        drawn = settings.steps * settings.batch_size
        epochs = f", {short(drawn / pairs)} epochs of {pairs:,} pairs" if pairs else ""
        yield f"{settings.steps:,} steps{epochs}"
    if pairs is not None:
        yield from warnings(settings, pairs)
    parts = held(state, reference)
    listed, needed = list_bytes(parts)
    yield f"whatever the batch: {listed}; together {in_units(needed)}"
    yield from describe_host_bytes(parts)
    if card:
        kind, memory = card.kind, card.memory
        share = memory_fraction()
        yield f"JAX takes {share:.0%} of a GPU's memory ({FRACTION_VARIABLE}; launch/gpu.sh sets 0.9)"
        usable: int | None = int(memory * share)
    else:
        kind, usable = jax.devices()[0].device_kind, memory_of(jax.devices()[0])
    if usable is not None:
        each = least_activations(pipe, settings.compute_dtype, pipe.image_size) if needed < usable else 0
        yield _describe_room(kind, usable, needed, part, each)
    yield _describe_checkpoints(settings, state, reference)
    flops = flops_per_example(task, settings.images_per_row, (side, side))
    if flops is not None:
        yield from _describe_time(settings, flops, kind)


def dry_run(config: ConfigDict | Settings) -> Iterator[str]:
    """Yields devices, memory and FLOPs of a run, a line each; reads no weights and writes nothing.

    What is known before the step is compiled comes first.

    Args:
      config: as for `start.prepare`.

    Raises:
      UserError, OSError: what would stop the run.
    """
    experiment = prepare(config)
    settings, task, mesh = experiment.settings, experiment.task, experiment.mesh
    state, reference = make_state(task, mesh, experiment.adapters, abstract=True)
    largest = max(map(bucket_size, experiment.count_examples()), key=math.prod)
    images = experiment.images_per_example
    batch = abstract_batch(task, images, largest, settings.batch_size, mesh)
    yield from describe_run(experiment, state, reference)
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        yield f"batch: {name} {leaf.dtype}{list(leaf.shape)}"
    yield _describe_checkpoints(settings, state, reference)
    device = mesh.local_devices[0]
    flops = mean_flops_per_example(task, experiment.datasets, settings.data, images)
    if flops is not None:
        yield from _describe_time(settings, flops, device.device_kind, mesh.size)
    limit = memory_of(device)
    if limit is not None:
        yield f"a device has {in_units(limit)}"
    rounds = settings.stream.kind in ("trajectories", "own_pairs")
    what = "the step and the drawing of images, which tell" if rounds else "the step, which tells"
    yield f"compiling {what} the rest; for a full-size model that takes minutes"
    kept = kept_state_bytes(settings, task.pipe, mesh) if rounds else 0
    peaks: dict[str, int] = {}
    step = partial(lower_step, state, reference, batch, mesh)
    yield from _describe_program("the step", step, kept, peaks)
    if rounds:
        parts = held(state, reference)
        beside = sum(
            bytes_per_device(parts[name]) for name in ("optimizer", "moving average") if name in parts
        )
        draw = partial(_lower_drawing, experiment, state, reference)
        yield from _describe_program("drawing", draw, kept + beside, peaks)
    if limit is not None and peaks:
        highest = max(peaks, key=lambda name: peaks[name])
        if peaks[highest] < limit:
            yield f"fits into the {in_units(limit)} of a device"
        elif highest == "drawing":
            yield (
                f"drawing does not fit into the {in_units(limit)} of a device: lower "
                f"config.stream.batch_size (now {settings.stream.batch_size})"
            )
        else:
            yield (
                f"does not fit into the {in_units(limit)} of a device: raise config.accumulation (now "
                f"{settings.accumulation}, up to {settings.batch_size * task.loss.rows}), set "
                "--config.remat=blocks, or train adapters with --config.lora.rank=8"
            )
    yield "no step was made, nothing was written"


def _lower_drawing(experiment: Experiment, state: TrainState, reference: Params) -> jax.stages.Lowered:
    """Traces the program that draws a part of a round, without decoding."""
    settings, task, mesh = experiment.settings, experiment.task, experiment.mesh
    split, images = batch_sharding(mesh), check_round_sizes(settings, mesh, settings.round_images)
    keeps_path = settings.stream.kind == "trajectories"
    rollout = Rollout(task, settings.stream.drawing, task.pipe.latent_size, mesh, keeps_path=keeps_path)
    tokens = jax.ShapeDtypeStruct((images, *task.pipe.empty_tokens.shape), jnp.int32, sharding=split)
    index = jax.ShapeDtypeStruct((images,), jnp.uint32, sharding=split)
    return rollout.program.lower(state.params, reference, tokens, index, index, abstract_key(mesh))


def _describe_program(
    name: str, lower: Callable[[], jax.stages.Lowered], beside: int, peaks: dict[str, int]
) -> Iterator[str]:
    """Compiles a program; tells its memory, and notes what is needed at its peak.

    Args:
      name: of the program.
      lower: traces it.
      beside: bytes of a device that are held at the time and are not the program's.
      peaks: takes the bytes of a device, by name.
    """
    before = time.perf_counter()
    memory = lower().compile().memory_analysis()
    yield f"{name} compiles in {time.perf_counter() - before:.0f} s"
    if memory is None:
        return
    peaks[name] = peak_bytes(memory) + beside
    others = f", {in_units(beside)} of it held beside the program" if beside else ""
    yield (
        f"on each device: arguments {in_units(memory.argument_size_in_bytes)}, temporaries "
        f"{in_units(memory.temp_size_in_bytes)}; at the peak {in_units(peaks[name])}{others}"
    )


def _describe_room(kind: str, usable: int, needed: int, part: int, each: int) -> str:
    """Says whether the arrays of a run fit, and how much memory is left for the pairs worked on at a time."""
    if needed >= usable:
        return f"does not fit into the {in_units(usable)} of {kind}: {_SMALLER}"
    left = f"{kind}: {in_units(usable)}, which leaves {in_units(usable - needed)} for the activations of"
    least = f"{part} pair(s), which take {in_units(part * each)} at the very least"
    if part * each > usable - needed:
        return f"does not fit: {left} {least}; {'raise config.accumulation' if part > 1 else _SMALLER}"
    return f"{left} {least}; `python -m dspo_jax.plan` compiles the step, and knows how much"


def _describe_checkpoints(settings: Settings, state: TrainState, reference: Params) -> str:
    """Disk of the checkpoints that a run keeps."""
    moving = moving_part(reference, state.params) if settings.reference.every else {}
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves([state.arrays(), moving]))
    has_best = settings.validation.every > 0 and settings.validations_compare
    number = settings.checkpoint.max_to_keep + has_best
    return f"checkpoints: {number} of {in_units(size)}, {in_units(number * size)} of disk"


def _describe_time(settings: Settings, flops: float, kind: str, devices: int = 1) -> Iterator[str]:
    """FLOPs of an example, and the time of all steps, by a device's peak or by a product that is timed."""
    per_step = flops * settings.batch_size
    one = "an image" if settings.stream.unit == "images" else "a pair"
    yield f"{short(flops / 1e12)} TFLOP {one}, {short(per_step / 1e12)} a step"
    peak = peak_flops(kind) if settings.compute_dtype == "bfloat16" else None
    if peak is not None:
        rate = devices * peak * _EFFICIENCY
        how = f"at a third, which is a guess, of the {peak / 1e12:.4g} TFLOP/s of {kind}"
    elif kind == "cpu":
        rate = time_product()
        how = f"at the {short(rate / 1e9)} GFLOP/s that a product of matrices reaches on this CPU now"
    else:
        return
    seconds = per_step / rate
    whole = f", the run {_duration(settings.steps * seconds)}" if settings.epochs is None else ""
    yield f"{short(seconds)} s a step{whole}, {how}; what reads data, validates and draws comes on top"


def _duration(seconds: float) -> str:
    """Returns a time as people say it, in seconds, minutes, hours or days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{short(seconds / size)} {unit}"
    return f"{short(seconds)} s"
