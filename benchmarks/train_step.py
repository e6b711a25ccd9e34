"""Pairs a second of the training step alone, of any recipe, on a synthetic batch.

    python -m benchmarks.train_step --config configs/emoji_diffusion_dpo.py
    python -m benchmarks.train_step --config configs/sd15_dspo.py --published sd15 --config.batch_size 16

The step is the one that `dspo_jax.train` compiles, on the mesh of the recipe; data is not read: the batch is
on the devices before. `--published` takes the architecture of a published model with random weights, made on
the devices.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks import measuring
from dspo_jax import cli
from dspo_jax.models.model import Params
from dspo_jax.monitoring.devices import memory_peaks, peak_flops
from dspo_jax.parallel.mesh import check_batch_size, replicated, shard_batch, use_cpu_cores
from dspo_jax.pipelines import published
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.training.costs import abstract_batch, flops_per_example
from dspo_jax.training.make_task import make_task
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_adapters, make_state, mesh_of
from dspo_jax.training.step import TrainState, compile_step, init_state
from dspo_jax.training.task import Task


def random_state(task: Task, mesh: Mesh, adapters: Params) -> tuple[TrainState, Params]:
    """Makes the state as `start.make_state` does, with random weights that never were on the host."""
    state, reference = make_state(task, mesh, adapters, abstract=True)

    @partial(jax.jit, static_argnums=1)
    def draw(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        """Kernels by their fan-in, so that nothing overflows."""
        values = jax.random.normal(key, leaf.shape) * math.prod(leaf.shape[:-1]) ** -0.5
        return jax.lax.with_sharding_constraint(values.astype(leaf.dtype), leaf.sharding)

    def fill(tree: Params) -> Params:
        leaves, structure = jax.tree.flatten(tree)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        return jax.tree.unflatten(structure, map(draw, keys, leaves))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    start = jax.jit(partial(init_state, task), donate_argnums=0, out_shardings=shardings)
    return start(fill(state.params)), fill(reference)


def make_batch(task: Task, resolution: int, batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Returns random latents, with captions of random tokens."""
    draw = np.random.default_rng(0)
    shapes = abstract_batch(task, 2, (resolution, resolution), batch_size, mesh)
    values: dict[str, np.ndarray] = {
        "moments": np.abs(draw.standard_normal(shapes["moments"].shape, np.float32)),
        "tokens": draw.integers(0, task.pipe.empty_tokens.max(), shapes["tokens"].shape),
        "micro_conditioning": np.tile(
            [resolution, resolution, 0, 0, resolution, resolution], (batch_size, 2, 1)
        ),
        "preference": np.ones(batch_size),
        "loser_won": np.zeros(batch_size, bool),
        "index": np.arange(batch_size),
    }
    return shard_batch({name: value.astype(shapes[name].dtype) for name, value in values.items()}, mesh)


def prepare(config: ConfigDict) -> tuple[str, Mesh, TrainState, Params, dict[str, jax.Array], jax.Array]:
    """Prepares a step: its description, mesh, state, reference, batch and the run's key."""
    values = flags.FLAGS
    use_cpu_cores(config.batch_size // max(1, config.accumulation))
    measuring.check_model(config)
    pipe: Pipeline = (
        published.architecture(values.published) if values.published else load_pipeline(config.model)
    )
    settings = parse(config)
    task, adapters, mesh = make_task(settings, pipe), make_adapters(settings, pipe), mesh_of(settings)
    check_batch_size(config.batch_size // config.accumulation, mesh)
    resolution = values.resolution or pipe.image_side
    print(
        f"{measuring.describe_recipe(config, resolution)}; "
        f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s)",
        flush=True,
    )

    state, reference = (random_state if values.published else make_state)(task, mesh, adapters)
    batch = make_batch(task, resolution, config.batch_size, mesh)
    key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=replicated(mesh))()
    return measuring.describe_recipe(config, resolution), mesh, state, reference, batch, key


def main(argv: Sequence[str]) -> None:
    """Measures."""
    del argv
    values, config = flags.FLAGS, flags.FLAGS.config
    what, mesh, state, reference, batch, key = prepare(config)
    task, device = state.task, mesh.devices.flat[0]
    started = time.perf_counter()
    step = compile_step(state).lower(state, reference, batch, key).compile()
    compiled = time.perf_counter() - started
    memory: Any = step.memory_analysis()

    def update() -> jax.Array:
        nonlocal state
        state, metrics = step(state, reference, batch, key)
        return metrics["loss"]

    seconds = measuring.time_steps(update, jax.block_until_ready, values.steps)
    side = values.resolution or task.pipe.image_side
    flops, peak = flops_per_example(task, 2, (side, side)), peak_flops(device.device_kind)
    rate = None if flops is None else flops * config.batch_size / np.median(seconds) / mesh.size
    peaks = memory_peaks()
    result = measuring.make_result(
        what,
        "dspo_jax",
        pairs=config.batch_size,
        seconds=seconds,
        device=f"{mesh.size} x {device.device_kind}",
        devices=mesh.size,
        platform=device.platform,
        compile_seconds=compiled,
        tflop_per_pair=flops and flops / 1e12,
        tflops_per_device=rate and rate / 1e12,
        mfu=rate / peak if rate and peak and task.precision.compute_dtype == "bfloat16" else None,
        peak_memory_gib=peaks.get("device_memory_peak_gib", peaks["host_memory_peak_gib"]),
        argument_gib=memory and memory.argument_size_in_bytes / 2**30,
        temporary_gib=memory and memory.temp_size_in_bytes / 2**30,
    )
    measuring.report(result, values.json)


if __name__ == "__main__":
    measuring.define_flags()
    cli.run(main)
