"""Programs of a run and around it, ready to be compiled for devices that need not be here."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.parallel.mesh import batch_sharding, replicated
from dspo_jax.parallel.rules import bytes_per_device
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.planning import absent_gpu
from dspo_jax.sampling.image_sampler import ImageSampler
from dspo_jax.sampling.rendering import Drawing
from dspo_jax.training.costs import abstract_batch
from dspo_jax.training.describe import held
from dspo_jax.training.make_task import make_task
from dspo_jax.training.settings import Settings
from dspo_jax.training.start import make_adapters, make_state
from dspo_jax.training.step import abstract_key, compile_step

# What a call of each works on.
UNITS = {"step": "pairs", "judge": "pairs", "sample": "images", "encode": "images", "decode": "images"}


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and shapes of its arguments, on the devices of a mesh.

    Attributes:
      function: jitted.
      arguments: shapes, with their shardings.
      fixed_bytes: of a device's memory, whatever the batch.
      open_trips: how often the loop runs whose length is known only when it does, see `task.Passes`.
    """

    function: Any
    arguments: tuple[Any, ...]
    fixed_bytes: int
    open_trips: int = 1

    def lower(self, absent: Any = None) -> jax.stages.Lowered:
        """Traces and lowers the program; `absent` is a GPU of `absent_gpu.find_devices` among its devices."""
        if absent is None:
            return self.function.lower(*self.arguments)
        with absent_gpu.as_if_here(absent):
            return absent_gpu.lower(self.function, *self.arguments)


def step(settings: Settings, pipe: Pipeline, size: tuple[int, int], count: int, mesh: Mesh) -> Program:
    """Returns the training step on `count` pairs.

    Args:
      settings: of the run.
      pipe: the model, whose weights are not read.
      size: height and width of the images in pixels.
      count: pairs or images, see `UNITS`, of all devices together.
      mesh: the devices, which may be absent.
    """
    task = make_task(settings, pipe)
    state, reference = make_state(task, mesh, make_adapters(settings, pipe), abstract=True)
    batch = abstract_batch(task, settings.images_per_row, size, count, mesh)
    fixed = sum(map(bytes_per_device, held(state, reference).values()))
    arguments, trips = (state, reference, batch, abstract_key(mesh)), task.loss.passes(2).open_trips
    return Program(compile_step(state), arguments, fixed, trips)


def judge(settings: Settings, pipe: Pipeline, size: tuple[int, int], count: int, mesh: Mesh) -> Program:
    """Returns one network pass over held-out pairs, as the validation makes them; arguments as of `step`."""
    dtype, split = settings.compute_dtype, batch_sharding(mesh)
    params = _abstract_params(pipe, pipe.components, mesh, dtype)
    conditioning = {
        name: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=split)
        for name, leaf in pipe.conditioning_shapes(2).items()
    }
    noisy = jax.ShapeDtypeStruct((count, 2, *_latents(pipe, size)), jnp.float32, sharding=split)
    levels = jax.ShapeDtypeStruct((count, 2), pipe.schedule.level_dtype, sharding=split)

    def predict(params: Any, noisy: Any, levels: Any, conditioning: Any) -> Any:
        return pipe.predict_pairs(params, noisy.astype(dtype), levels, conditioning)

    arguments = (params, noisy, levels, conditioning)
    return Program(jax.jit(on_mesh(predict, mesh)), arguments, bytes_per_device(params))


def sample(settings: Settings, pipe: Pipeline, size: tuple[int, int], count: int, mesh: Mesh) -> Program:
    """Returns the drawing of `count` latents, with the defaults of `dspo_jax.sample`; see `step`."""
    sampler = ImageSampler(pipe, Drawing(), compute_dtype=settings.compute_dtype, mesh=mesh)
    params, split = (
        _abstract_params(pipe, pipe.components, mesh, settings.compute_dtype),
        batch_sharding(mesh),
    )
    tokens = jax.ShapeDtypeStruct((count, *pipe.empty_tokens.shape), jnp.int32, sharding=split)
    noise = jax.ShapeDtypeStruct((count, *_latents(pipe, size)), jnp.float32, sharding=split)
    number = jax.ShapeDtypeStruct((count,), jnp.uint32, sharding=split)
    return Program(sampler.program, (params, tokens, noise, number, number, None), bytes_per_device(params))


def encode(settings: Settings, pipe: Pipeline, size: tuple[int, int], count: int, mesh: Mesh) -> Program:
    """Returns the VAE encoder on `count` images, in float32 as `dspo_jax.encode` by default; see `step`."""
    del settings
    params = _abstract_params(pipe, ("vae",), mesh, "float32")
    images = jax.ShapeDtypeStruct((count, *size, 3), jnp.uint8, sharding=batch_sharding(mesh))

    def moments(params: Any, images: jax.Array) -> jax.Array:
        return pipe.encode_moments(params, images.astype(jnp.float32) / 127.5 - 1.0)

    return Program(jax.jit(on_mesh(moments, mesh)), (params, images), bytes_per_device(params))


def decode(settings: Settings, pipe: Pipeline, size: tuple[int, int], count: int, mesh: Mesh) -> Program:
    """Returns the VAE's decoder on `count` latents, in float32 as samples are decoded; see `step`."""
    del settings
    params = _abstract_params(pipe, ("vae",), mesh, "float32")
    latents = jax.ShapeDtypeStruct((count, *_latents(pipe, size)), jnp.float32, sharding=batch_sharding(mesh))
    return Program(jax.jit(on_mesh(pipe.decode, mesh)), (params, latents), bytes_per_device(params))


PARTS: dict[str, Callable[[Settings, Pipeline, tuple[int, int], int, Mesh], Program]] = {
    "step": step,
    "sample": sample,
    "encode": encode,
    "judge": judge,
    "decode": decode,
}


def _latents(pipe: Pipeline, size: tuple[int, int]) -> tuple[int, int, int]:
    height, width = (side // pipe.vae_scale_factor for side in size)
    return height, width, pipe.latent_channels


def _abstract_params(pipe: Pipeline, names: Any, mesh: Mesh, dtype: str) -> Any:
    """Returns shapes of networks in a dtype, whole on every device."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=replicated(mesh)),
        {name: pipe.networks[name].abstract_params() for name in names},
    )
