"""Shapes of a training batch, and the FLOPs of a step."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from dspo_jax.data.datasets import Dataset, bucket_size, mixing_weights
from dspo_jax.monitoring.devices import count_flops
from dspo_jax.parallel.mesh import batch_sharding
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.sampling.rendering import Drawing
from dspo_jax.training.settings import DataSettings
from dspo_jax.training.task import Task


def abstract_batch(
    task: Task, images: int, size: tuple[int, int], batch_size: int, mesh: Mesh
) -> dict[str, Any]:
    """Returns shapes of a training batch, with their sharding.

    Args:
      task: with the loss, which names the arrays of a batch.
      images: of an example.
      size: (height, width) of the images in pixels.
      batch_size: examples over all devices.
      mesh: the devices.
    """
    rows = batch_size * task.loss.rows
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape), leaf.dtype, sharding=batch_sharding(mesh)),
        task.loss.input_shapes(task.pipe, images, size),
    )


def flops_per_example(task: Task, images: int, size: tuple[int, int]) -> float | None:
    """Counts the model's FLOPs for an example: policy forward and backward, reference forward.

    The backward pass of a network counts as two forward passes, or as one where adapters alone are trained
    and kernels get no gradients. What rematerialisation computes again does not count, nor the optimizer.

    Args:
      task: with the loss, which counts the passes.
      images: of an example.
      size: (height, width) of the images in pixels.

    Returns:
      FLOPs, or None where the backend cannot count them.
    """
    counted = _flops_of_pass(task.pipe, task.precision.compute_dtype, size)
    if counted is None:
        return None
    denoiser, encoders = counted
    passes = task.loss.passes(images)
    backward = 2 if task.adapters is None else 1
    encoded = passes.encoded + (backward * passes.encoded_backward if task.train_text_encoder else 0)
    each = denoiser * (passes.policy + passes.reference + backward * passes.backward) + encoders * encoded
    return task.loss.rows * each


def flops_per_drawing(task: Task, drawing: Drawing) -> float | None:
    """Counts the FLOPs of an image's latents, of the model's own size; decoding is not among them.

    Args:
      task: the model in its compute dtype.
      drawing: how images are drawn.

    Returns:
      FLOPs, or None where the backend cannot count them.
    """
    counted = _flops_of_pass(task.pipe, task.precision.compute_dtype, task.pipe.image_size)
    if counted is None:
        return None
    denoiser, encoders = counted
    return (2 if drawing.guidance_scale > 1 else 1) * (drawing.steps * denoiser + encoders)


@functools.lru_cache(maxsize=8)  # traced for the first lines of a run, and for its metrics
def _flops_of_pass(pipe: Pipeline, dtype: str, size: tuple[int, int]) -> tuple[float, float] | None:
    """Counts the FLOPs of a pass of the denoiser and of the text encoders, for one image."""
    params, batch, latents, timesteps, conditioning = _abstract_call(pipe, dtype, 1, size)
    denoiser = count_flops(pipe.predict, params, latents, timesteps, conditioning)
    encoders = count_flops(pipe.encode_conditioning, params, batch)
    return None if denoiser is None or encoders is None else (denoiser, encoders)


def _abstract_call(
    pipe: Pipeline, dtype: str, images: int, size: tuple[int, int]
) -> tuple[PyTree, PyTree, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, PyTree]:
    """Returns shapes for the denoiser: parameters, the batch's text, latents, timesteps, conditioning."""
    params = {
        name: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), pipe.networks[name].abstract_params()
        )
        for name in pipe.components
    }
    batch = {
        name: jax.ShapeDtypeStruct((images, *leaf.shape), leaf.dtype)
        for name, leaf in pipe.conditioning_shapes(1).items()
    }
    conditioning = jax.eval_shape(pipe.encode_conditioning, params, batch)
    height, width = (side // pipe.vae_scale_factor for side in size)
    latents = jax.ShapeDtypeStruct((images, height, width, pipe.latent_channels), dtype)
    timesteps = jax.ShapeDtypeStruct((images,), pipe.schedule.level_dtype)
    return params, batch, latents, timesteps, conditioning


def least_activations(pipe: Pipeline, dtype: str, size: tuple[int, int]) -> int:
    """Returns bytes that the backward pass keeps of a pair at the least: what is given to each block.

    With `config.remat = "blocks"` nothing else is kept, though parts are computed again.

    Args:
      pipe: the model.
      dtype: that it computes in.
      size: (height, width) of the images in pixels.
    """

    def kept(images: int) -> int:
        params, _, *arrays = _abstract_call(pipe, dtype, images, size)

        def backward(
            params: PyTree, latents: jax.Array, timesteps: jax.Array, conditioning: PyTree
        ) -> PyTree:
            def forward(params: PyTree) -> jax.Array:
                return pipe.predict(params, latents, timesteps, conditioning, remat="blocks")

            return jax.vjp(forward, params)[1]

        residuals = jax.eval_shape(backward, params, *arrays)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    return kept(4) - kept(2)  # of two images: the parameters, which are kept too, are in both


def mean_flops_per_example(
    task: Task, datasets: Sequence[Dataset], data: DataSettings, images: int
) -> float | None:
    """Returns mean of `flops_per_example` over the image sizes that a run reads; its own without datasets."""
    if not datasets:
        return flops_per_example(task, images, task.pipe.image_size)
    rows = mixing_weights(datasets, data.split, data.weights)
    total, drawn = 0.0, sum(map(sum, rows.values()))
    for bucket, row in rows.items():
        flops = flops_per_example(task, images, bucket_size(bucket))
        if flops is None:
            return None
        total += flops * sum(row) / drawn
    return total
