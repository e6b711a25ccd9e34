"""Memory, batches and FLOPs of a run, from its compiled step and without its weights."""

import math
import time
from collections.abc import Iterator

from ml_collections import ConfigDict

from dspo_jax.data.datasets import bucket_size
from dspo_jax.monitoring.devices import in_units, memory_of, peak_bytes
from dspo_jax.training.costs import abstract_batch, mean_flops_per_example
from dspo_jax.training.describe import describe_run
from dspo_jax.training.settings import Settings
from dspo_jax.training.start import make_state, prepare
from dspo_jax.training.step import lower_step


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
    images = experiment.datasets[0].manifest["images_per_example"]
    batch = abstract_batch(task, images, largest, settings.batch_size, mesh)
    yield from describe_run(experiment, state, reference)
    yield from (f"batch: {name} {leaf.dtype}{list(leaf.shape)}" for name, leaf in batch.items())
    flops = mean_flops_per_example(task, experiment.datasets, settings.data)
    if flops is not None:
        yield f"{flops / 1e12:.4g} TFLOP a pair, {flops * settings.batch_size / 1e12:.4g} a step"
    limit = memory_of(mesh.local_devices[0])
    if limit is not None:
        yield f"a device has {in_units(limit)}"
    yield "compiling the step, which tells the rest; for a full-size model that takes minutes"
    before = time.perf_counter()
    memory = lower_step(state, reference, batch, mesh).compile().memory_analysis()
    yield f"the step compiles in {time.perf_counter() - before:.0f} s"
    if memory is not None:
        needed = peak_bytes(memory)
        yield (
            f"on each device: arguments {in_units(memory.argument_size_in_bytes)}, temporaries "
            f"{in_units(memory.temp_size_in_bytes)}; at the peak {in_units(needed)}"
        )
        if limit is not None and needed < limit:
            yield f"fits into the {in_units(limit)} of a device"
        elif limit is not None:
            yield (
                f"does not fit into the {in_units(limit)} of a device: raise config.accumulation (now "
                f"{settings.accumulation}, up to {settings.batch_size}), set --config.remat=blocks, or train "
                "adapters with --config.lora.rank=8"
            )
    yield "no step was made, nothing was written"
