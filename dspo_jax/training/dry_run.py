"""Memory, batches and FLOPs of a run, from its compiled step and without its weights."""

import math
import time

from absl import logging
from ml_collections import ConfigDict

from dspo_jax.data.datasets import bucket_size
from dspo_jax.monitoring.devices import in_units, peak_bytes
from dspo_jax.training.costs import abstract_batch, mean_flops_per_example
from dspo_jax.training.describe import describe_run
from dspo_jax.training.settings import Settings
from dspo_jax.training.start import make_state, prepare
from dspo_jax.training.step import lower_step


def dry_run(config: ConfigDict | Settings) -> str:
    """Reports devices, memory and FLOPs of a run without training; reads no weights and writes nothing.

    Args:
      config: as for `start.prepare`.

    Raises:
      UserError, OSError: what would stop the run.
    """
    experiment = prepare(config)
    settings, task, mesh = experiment.settings, experiment.task, experiment.mesh
    state, reference = make_state(task, mesh, experiment.adapters, abstract=True)
    largest = max(map(bucket_size, experiment.count_examples()), key=math.prod)
    images = experiment.datasets[0].manifest["images_per_example"]
    batch = abstract_batch(task, images, largest, settings.batch_size, mesh)
    lines = list(describe_run(experiment, state, reference))
    lines += [f"batch: {name} {leaf.dtype}{list(leaf.shape)}" for name, leaf in batch.items()]
    flops = mean_flops_per_example(task, experiment.datasets, settings.data)
    if flops is not None:
        lines.append(f"{flops / 1e12:.4g} TFLOP a pair, {flops * settings.batch_size / 1e12:.4g} a step")
    logging.info("compiling the step; for a full-size model that takes minutes")
    before = time.perf_counter()
    memory = lower_step(state, reference, batch, mesh).compile().memory_analysis()
    lines.append(f"the step compiles in {time.perf_counter() - before:.0f} s")
    if memory is not None:
        needed = peak_bytes(memory)
        lines.append(
            f"on each device: arguments {in_units(memory.argument_size_in_bytes)}, temporaries "
            f"{in_units(memory.temp_size_in_bytes)}; at the peak {in_units(needed)}"
        )
        limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
        if limit is not None:
            verdict = "fits" if needed < limit else "does not fit"
            lines.append(f"{verdict} into the {in_units(limit)} of a device")
    lines.append("no step was made, nothing was written")
    return "\n".join(lines)
