"""Trajectories of the model in training, drawn with the parameters that are trained, and their images."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Float32, Int32, Integer, Key, UInt8, UInt32

from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.models.model import Params
from dspo_jax.parallel.mesh import BATCH_SPEC, batch_sharding, replicated
from dspo_jax.parallel.rules import gather, place
from dspo_jax.samplers.transitions import log_probability
from dspo_jax.sampling.decoding import PIXELS_AT_ONCE, to_pixels
from dspo_jax.sampling.guidance import GuidedDenoiser
from dspo_jax.sampling.rendering import Drawing
from dspo_jax.training.step import split_batch
from dspo_jax.training.task import Batch, Task, policy_params

Array = jax.Array | np.ndarray


class Decoded(NamedTuple):
    """Images of a batch, split over the devices as the latents are, and what is measured of them.

    Attributes:
      images: a picture that is not finite is all black.
      finite: whether all latents and pixels of a picture are finite.
      saturated: share of a picture's numbers that lie outside [0, 1] before they are clamped.
      distances: sum over pairs of finite images of one prompt of their distance, the root of the mean squared
        difference of pixels in [0, 1].
      pairs: number of these pairs.
    """

    images: UInt8[jax.Array, "B H W 3"]
    finite: Bool[jax.Array, " B"]
    saturated: Float32[jax.Array, " B"]
    distances: Float32[jax.Array, ""]
    pairs: Float32[jax.Array, ""]


class Rollout:
    """Draws latents, with every state on the way or without; a compiled program over the training's mesh."""

    def __init__(
        self, task: Task, drawing: Drawing, size: tuple[int, int], mesh: Mesh, *, keeps_path: bool = True
    ):
        """Prepares the programs; no weights are read before the first image is decoded.

        Args:
          task: pipeline and precision are read.
          drawing: how images are drawn.
          size: (height, width) of the latents.
          mesh: the devices, which split a batch.
          keeps_path: whether all states are returned, or the final latents alone.

        Raises:
          UserError: a sampler that does not do what the model's scheduler config asks for.
        """
        self._pipe, self._mesh = task.pipe, mesh
        denoiser = GuidedDenoiser(task.pipe, drawing, task.precision.compute_dtype)
        self.sampler = drawing.make_sampler(task.pipe)
        shape = (*size, task.pipe.latent_channels)
        sampler = self.sampler

        def noise(
            key: Key[jax.Array, ""], of: UInt32[jax.Array, " N"], number: jax.Array | int
        ) -> Float[jax.Array, "N h w C"]:
            def one(index: jax.Array, number: jax.Array) -> jax.Array:
                of_image = jax.random.fold_in(key, index)
                return jax.random.normal(jax.random.fold_in(of_image, number), shape)

            return jax.vmap(one)(of, jnp.broadcast_to(jnp.asarray(number), of.shape))

        def draw(
            params: Params,
            reference: Params,
            tokens: Integer[jax.Array, "B E S"],
            index: UInt32[jax.Array, " B"],
            start: UInt32[jax.Array, " B"],
            key: Key[jax.Array, ""],
        ) -> Float32[jax.Array, "states B h w C"]:
            policy = gather(policy_params(task, params, reference))
            conditioning = denoiser.encode(policy, tokens, size)

            begin = (
                lambda x, t: denoiser.predict(policy, x, t, conditioning),
                sampler.start(noise(key, start, 0)),
                lambda i: noise(key, index, i + 1),
            )
            return sampler.rollout(*begin).latents if keeps_path else sampler.run(*begin)[None]

        def judge(
            index: UInt32[jax.Array, " N"], calls: Int32[jax.Array, "N n"], key: Key[jax.Array, ""]
        ) -> Float32[jax.Array, "N n"]:
            def of_call(call: jax.Array) -> jax.Array:
                deviation = jnp.take(jnp.asarray(sampler.step_noise), call)
                drawn = deviation.reshape(-1, 1, 1, 1) * noise(key, index, call + 1)
                return log_probability(drawn, jnp.zeros_like(drawn), deviation)

            return jax.lax.map(of_call, calls.T).T

        self._draw = jax.jit(
            on_mesh(draw, mesh),
            out_shardings=NamedSharding(mesh, PartitionSpec(None, *BATCH_SPEC)),
        )
        self._judge = jax.jit(on_mesh(judge, mesh), out_shardings=replicated(mesh))

    def __call__(
        self,
        params: Params,
        reference: Params,
        tokens: Integer[Array, "B E S"],
        index: UInt32[Array, " B"],
        key: Key[jax.Array, ""],
        start: UInt32[Array, " B"] | None = None,
    ) -> Float32[jax.Array, "states B h w C"]:
        """Draws the n + 1 states x_0, noise, to x_n, latents of the image; split over the devices along B.

        Without the path these are [1, B, h, w, C], x_n alone.

        Args:
          params: trained parameters by component, as they are split.
          reference: the frozen parameters.
          tokens: of the prompts [B, E, S].
          index: [B], unique over the run. The noise follows from (key, index, step) alone.
          key: of all rollouts of the run.
          start: [B], what x_0 follows from in place of the index, for images that share it.
        """
        return self._draw(params, reference, tokens, index, index if start is None else start, key)

    def log_probability(
        self, index: UInt32[Array, " N"], calls: Int32[Array, "N n"], key: Key[jax.Array, ""]
    ) -> Float32[jax.Array, "N n"]:
        """Computes log-probabilities of steps as they were drawn: from their noise, without the network.

        Args:
          index, key: of the images, as when they were drawn.
          calls: [N, n], steps of each image that add noise.
        """
        return self._judge(index, calls, key)

    @property
    def program(self) -> jax.stages.Wrapped:
        """The jitted program: parameters, reference, tokens, index, start, key -> states."""
        return self._draw

    @functools.cached_property
    def _vae(self) -> Params:
        params = {"vae": self._pipe.read_params("vae", "float32")}
        return place(params, jax.tree.map(lambda _: replicated(self._mesh), params))

    @functools.cached_property
    def _decode(self) -> Any:
        pipe, mesh = self._pipe, self._mesh

        def decode(
            vae: Params, latents: Float[jax.Array, "B h w C"], prompt: UInt32[jax.Array, " B"], reach: int
        ) -> Decoded:
            pixels = latents.shape[1] * latents.shape[2] * pipe.vae_scale_factor**2
            of_device = len(latents) // (mesh.shape["data"] * mesh.shape["fsdp"])
            most = max(1, PIXELS_AT_ONCE // pixels)
            parts = next(n for n in range(1, of_device + 1) if of_device % n == 0 and of_device // n <= most)

            def one(part: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
                images = pipe.decode(vae, part["latents"])
                outside = (jnp.abs(images) > 1).mean((1, 2, 3), dtype=jnp.float32)
                return *to_pixels(part["latents"], images), outside

            found = jax.lax.map(one, split_batch({"latents": latents}, parts))
            images, finite, saturated = (
                jnp.moveaxis(leaf, 0, 1).reshape(len(latents), *leaf.shape[2:]) for leaf in found
            )
            distances, pairs = _measure_distances(images, finite, prompt, reach)
            return Decoded(images, finite, saturated, distances, pairs)

        split, whole = batch_sharding(mesh), replicated(mesh)
        return jax.jit(
            on_mesh(decode, mesh),
            static_argnums=3,
            out_shardings=Decoded(split, split, split, whole, whole),  # type: ignore[arg-type]
        )

    def decode(
        self, latents: Float[jax.Array, "B h w C"], prompt: UInt32[jax.Array, " B"], reach: int
    ) -> Decoded:
        """Decodes latents on all devices, in parts that their memory holds.

        Args:
          latents: [B, h, w, C] in UNet units, split over the devices.
          prompt: [B], a number for the images of one prompt, which stand side by side.
          reach: images of a prompt.
        """
        return self._decode(self._vae, latents, prompt, reach)


def make_rollout_key(seed: int, mesh: Mesh) -> Key[jax.Array, ""]:
    """Returns the key of all rollouts of a run, on every device."""
    # No example of a loss, whose randomness follows from the run's key and its index, has one as large.
    return jax.jit(
        lambda: jax.random.fold_in(jax.random.key(seed), np.uint32(2**32 - 1)),
        out_shardings=replicated(mesh),
    )()


def _measure_distances(
    images: UInt8[jax.Array, "B H W 3"],
    finite: Bool[jax.Array, " B"],
    prompt: UInt32[jax.Array, " B"],
    reach: int,
) -> tuple[Float32[jax.Array, ""], Float32[jax.Array, ""]]:
    """Returns `Decoded.distances` and `Decoded.pairs`."""
    pixels, place_in_batch = images.astype(jnp.float32) / 255, jnp.arange(len(images))

    def at_shift(shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        other, of_other, usable = (jnp.roll(array, -shift, axis=0) for array in (pixels, prompt, finite))
        pair = (prompt == of_other) & finite & usable & (place_in_batch + shift < len(images))
        distance = jnp.sqrt(jnp.square(pixels - other).mean((1, 2, 3)))
        return jnp.where(pair, distance, 0.0).sum(), pair.sum(dtype=jnp.float32)

    shifts = jnp.arange(1, min(reach, len(images)))
    if not len(shifts):
        return jnp.zeros(()), jnp.zeros(())
    distances, pairs = jax.lax.map(at_shift, shifts)
    return distances.sum(), pairs.sum()
