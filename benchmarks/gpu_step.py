"""The step of a run, compiled for an NVIDIA GPU that is not here.

    python -m benchmarks.gpu_step --config configs/sd15_dspo.py --published sd15 --topology h100 --pairs 2

Needs `jax[cuda12]` and no GPU, and many minutes for a full-size model. Prints the memory of the program, its
attention kernels and what its instructions read and write; no time, which nobody knows without a GPU.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from benchmarks import absent_gpu
from dspo_jax import cli
from dspo_jax.monitoring.devices import in_units
from dspo_jax.parallel.mesh import make_mesh, replicated
from dspo_jax.pipelines import published
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.training.costs import abstract_batch
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_adapters, make_state, make_task
from dspo_jax.training.step import compile_step


def lower_step(config: ConfigDict, pipe: Pipeline, size: int, mesh: Mesh) -> jax.stages.Lowered:
    """Returns the step that `train` compiles, lowered for CUDA; within `absent_gpu.as_if_here`.

    Args:
      config: of the run.
      pipe: the model, whose weights are not read.
      size: side of the images in pixels.
      mesh: devices of `absent_gpu.find_devices`.
    """
    task = make_task(parse(config), pipe)
    state, reference = make_state(task, mesh, make_adapters(parse(config), pipe), abstract=True)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    batch = abstract_batch(task, 2, (size, size), config.batch_size, mesh)
    return absent_gpu.lower(compile_step(state), state, reference, batch, key)


def main(argv: Sequence[str]) -> None:
    """Prints what the compiled step needs and holds."""
    del argv
    values, config = flags.FLAGS, flags.FLAGS.config
    device = absent_gpu.find_devices(values.topology)[0]
    pipe = published.architecture(values.published)
    if values.pairs:
        config.batch_size, config.accumulation = values.pairs, 1
    with absent_gpu.as_if_here(device):
        lowered = lower_step(config, pipe, pipe.image_side, make_mesh({}, [device]))
    start = time.perf_counter()
    program = absent_gpu.compile_lowered(lowered)
    memory: Any = program.memory_analysis()
    pairs = f"{config.batch_size} pairs in {config.accumulation} part(s)"
    print(f"{config.objective.name} of {values.published}, {pairs}, one {device.device_kind}")
    print(
        f"arguments {in_units(memory.argument_size_in_bytes)}, temporaries "
        f"{in_units(memory.temp_size_in_bytes)}; compiled in {time.perf_counter() - start:.0f} s"
    )
    found = absent_gpu.traffic(program.as_text() or "")
    print(f"{sum(size for _, size in found.values()) / 1e9:.1f} GB by instructions outside of loops:")
    for kind, (count, size) in sorted(found.items(), key=lambda item: -item[1][1]):
        print(f"  {kind:<40}{count:>6}{size / 1e9:>8.2f} GB")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/sd15_dspo.py", "The run.")
    flags.DEFINE_enum("published", "sd15", published.MODELS, "The model, without weights.")
    flags.DEFINE_string("topology", "h100", "The card: h100 or a100.")
    flags.DEFINE_integer(
        "pairs", None, "In a batch that is not split (default: the recipe's).", lower_bound=1
    )
    cli.run(main)
