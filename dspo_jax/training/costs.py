"""Shapes of a training batch, and the FLOPs of a step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dspo_jax.data.datasets import bucket_size, mixing_weights, read_datasets
from dspo_jax.models.model import Params
from dspo_jax.monitoring.devices import count_flops
from dspo_jax.parallel.mesh import batch_sharding, replicated
from dspo_jax.training.step import TrainState, compile_step
from dspo_jax.training.task import Task


def abstract_batch(
    task: Task, path: str, bucket: str, batch_size: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a training batch, with their sharding.

    Args:
      task: what is computed.
      path: as `config.data.path`.
      bucket: the size of its images, "HEIGHTxWIDTH".
      batch_size: over all devices.
      mesh: the devices.
    """
    images = read_datasets(path)[0].manifest["images_per_example"]
    return batch_shapes(task, images, bucket_size(bucket), batch_size, mesh)


def batch_shapes(
    task: Task, images: int, size: tuple[int, int], batch_size: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of examples of so many images of `size`, (height, width) in pixels."""
    height, width = (side // task.pipe.vae_scale_factor for side in size)
    encoders = len(task.pipe.text_encoders)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "moments": ((images, height, width, 2 * task.pipe.latent_channels), jnp.float16),
        "tokens": ((encoders, task.pipe.empty_tokens.shape[-1]), jnp.int32),
        "micro_conditioning": ((images, 6), jnp.int32),
        "preference": ((), jnp.float32),
        "loser_won": ((), jnp.bool_),
        "index": ((), jnp.uint32),
    }
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=batch_sharding(mesh))
        for name, (shape, dtype) in shapes.items()
    }


def lower_step(
    state: TrainState, reference: Params, batch: Mapping[str, Any], mesh: Mesh
) -> jax.stages.Lowered:
    """The step of a run, traced and ready to be compiled for the devices of the mesh.

    Args:
      state, reference: from `start.make_state`, abstract.
      batch: from `abstract_batch` or `batch_shapes`.
      mesh: the devices.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    return compile_step(state).lower(state, reference, batch, key)


def flops_per_pair(task: Task, batch: Mapping[str, Any]) -> float | None:
    """FLOPs of the model for a pair: forward and backward of the policy, forward of the reference.

    The backward pass of a network counts as two forward passes, or as one where adapters alone are trained
    and kernels get no gradients. What rematerialisation computes again does not count, nor the optimizer.
    None where nothing can be counted.

    Args:
      task: what is computed.
      batch: arrays or shapes; the number of examples does not matter.
    """
    pipe, objective = task.pipe, task.objective
    dtype = jnp.dtype(task.compute_dtype)

    def shape(size: tuple[int, ...], dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype)

    params = {
        name: jax.tree.map(lambda leaf: shape(leaf.shape), pipe.networks[name].abstract_params())
        for name in ("unet", *pipe.text_encoders)
    }
    tokens = shape((1, *batch["tokens"].shape[1:]), jnp.int32)
    text = jax.eval_shape(pipe.encode_text, params, tokens)
    stored = batch["moments"].shape[1]
    inputs = (shape((1, *batch["moments"].shape[2:4], pipe.latent_channels)), shape((1,), jnp.int32), text)
    unet = count_flops(pipe.predict, params, *inputs, shape((1, 6), jnp.int32))
    encoders = count_flops(pipe.encode_text, params, tokens)
    if unet is None or encoders is None:
        return None
    images = stored if objective.images == "all" else 1
    with_gradient = 1 if objective.detaches_loser else images
    references = 1 if objective.needs_reference else 0
    backward = 1 if task.adapters else 2
    trained_encoders = backward if task.train_text_encoder else 0
    return unet * (images * (1 + references) + backward * with_gradient) + encoders * (
        1 + references + trained_encoders
    )


def mean_flops_per_pair(config: ConfigDict, task: Task, mesh: Mesh) -> float | None:
    """`flops_per_pair` of what a run draws: the mean over its image sizes, where it has several."""
    data = config.data
    rows = mixing_weights(read_datasets(data.path), data.split, data.weights)
    total, drawn = 0.0, sum(map(sum, rows.values()))
    for bucket, row in rows.items():
        flops = flops_per_pair(task, abstract_batch(task, data.path, bucket, config.batch_size, mesh))
        if flops is None:
            return None
        total += flops * sum(row) / drawn
    return total
