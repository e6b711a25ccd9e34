"""Latents to pixels on all devices of a process; large images in overlapping tiles.

A picture of which a latent or a pixel is not finite (NaN or infinite numbers) is black as a whole, and
`Decoder` says which are. A command that keeps its pictures refuses them (`refuse_non_finite`): a black one
must not be scored or trained on. What only shows them, the grids of a training run or a look at data, goes
on with a warning (`warn_of_non_finite`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Float32, UInt8

from dspo_jax.errors import UserError
from dspo_jax.models.model import Model, Params
from dspo_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.sampling.image_sampler import ImageRequest
from dspo_jax.weights.components import read_model, read_params

_OVERLAP = 0.25  # share of a tile's side, as in diffusers' tiled VAE
# On a device: a decoder takes more memory for an image than the UNet for its latents.
PIXELS_AT_ONCE = 1024 * 1024


class Decoder:
    """Decodes batches with a model's VAE, or with a small one in its place; compiled once for a shape."""

    def __init__(
        self, pipe: Pipeline, mesh: Mesh | None = None, *, tile: int = 0, preview: str | Path | None = None
    ):
        """Reads the weights.

        Args:
          pipe: gives the VAE.
          mesh: of devices of this process; its `data` axis splits a batch. None is one device.
          tile: images with a longer side than so many pixels are decoded in tiles of that side, a quarter of
            which overlaps, in less memory and with faint differences; 0 never.
          preview: the folder of an AutoencoderTiny (TAESD) of this model's latents, which decodes faster and
            with less detail.

        Raises:
          UserError: `tile` is no multiple of the pixels per latent, or `preview` is no AutoencoderTiny for
            these latents.
          FileNotFoundError: no such folder.
        """
        scale = pipe.vae_scale_factor
        if tile % scale:
            raise UserError(f"--vae_tile={tile}: must be a multiple of {scale}")
        if preview is None:
            params = pipe.read_params("vae", "float32")
        else:
            vae, params = _read_preview(Path(preview), pipe)
            pipe = dataclasses.replace(pipe, networks={**pipe.networks, "vae": vae})
        mesh = mesh or make_mesh({"data": 1}, jax.local_devices()[:1])
        whole, self._split = replicated(mesh), batch_sharding(mesh)
        self._scale, self._num_devices = scale, mesh.size
        self._params = jax.device_put({"vae": params}, whole)

        def decode(
            params: Mapping[str, Params], latents: Float[jax.Array, "B h w C"]
        ) -> tuple[UInt8[jax.Array, "B H W 3"], Bool[jax.Array, " B"]]:
            if tile and max(latents.shape[1:3]) * scale > tile:
                images = decode_in_tiles(partial(pipe.decode, params), latents, tile // scale, scale)
            else:
                images = pipe.decode(params, latents)
            return to_pixels(latents, images)

        self._decode = jax.jit(decode, in_shardings=(whole, self._split), out_shardings=self._split)

    def __call__(
        self, latents: Float[np.ndarray | jax.Array, "B h w C"]
    ) -> tuple[UInt8[np.ndarray, "B H W 3"], Bool[np.ndarray, " B"]]:
        """Decodes latents [B, h, w, C] in UNet units.

        Returns:
          Images [B, H, W, 3] uint8, a picture that is not finite all black; and [B] bool, whether all latents
          and pixels of a picture are finite.
        """
        latents = np.asarray(latents)
        pixels = latents.shape[1] * latents.shape[2] * self._scale**2
        part = self._num_devices * max(1, PIXELS_AT_ONCE // pixels)
        part = min(part, len(latents) + -len(latents) % self._num_devices)
        images, finite = [], []
        for start in range(0, len(latents), part):
            some = latents[start : start + part]
            padded = np.concatenate([some, np.zeros((part - len(some), *some.shape[1:]), some.dtype)])
            decoded = jax.device_get(self._decode(self._params, jax.device_put(padded, self._split)))
            images.append(decoded[0][: len(some)])
            finite.append(decoded[1][: len(some)])
        return np.concatenate(images), np.concatenate(finite)


def to_pixels(
    latents: Float[jax.Array, "B h w C"], images: Float[jax.Array, "B H W 3"]
) -> tuple[UInt8[jax.Array, "B H W 3"], Bool[jax.Array, " B"]]:
    """Rounds decoded images to pixels; one that is not finite becomes black.

    Args:
      latents: in UNet units. They are checked too: a tiny VAE squashes infinite ones into pixels.
      images: decoded, about [-1, 1].

    Returns:
      Images [B, H, W, 3] uint8; and [B] bool, whether all latents and pixels of a picture are finite.
    """
    finite = jnp.isfinite(latents).all((1, 2, 3)) & jnp.isfinite(images).all((1, 2, 3))
    images = jnp.where(finite[:, None, None, None], images, -1.0)
    return jnp.round(jnp.clip(images * 127.5 + 127.5, 0, 255)).astype(jnp.uint8), finite


def refuse_non_finite(
    model: object, requests: Sequence[ImageRequest], finite: Bool[np.ndarray, " B"]
) -> None:
    """Refuses pictures that are not finite, before they are saved as black ones.

    Args:
      model: its text is what the error calls the model.
      requests: [B] what was drawn.
      finite: [B] from `Decoder`.

    Raises:
      UserError: by the model and the first such picture.
    """
    if not finite.all():
        request = requests[int(finite.argmin())]
        raise UserError(
            f"{model}: the picture of {request.prompt!r} with seed {request.seed} is not finite (NaN or "
            "infinite numbers): the weights are damaged, or of a training run that diverged; take an earlier "
            "checkpoint, or fetch the model again"
        )


def warn_of_non_finite(what: str, captions: Sequence[str], finite: Bool[np.ndarray, " B"]) -> None:
    """Warns of pictures that are black because they are not finite.

    Args:
      what: the pictures are of.
      captions: [B] of the pictures.
      finite: [B] from `Decoder`.
    """
    black = np.flatnonzero(~finite)
    if len(black):
        logging.warning(
            "%s: %d of %d pictures are black, as they are not finite (NaN or infinite numbers); first %r",
            what,
            len(black),
            len(finite),
            captions[black[0]],
        )


def decode_in_tiles(
    decode: Callable[[jax.Array], jax.Array], latents: Float[jax.Array, "B h w C"], tile: int, scale: int
) -> Float[jax.Array, "B H W 3"]:
    """Decodes tiles one after another and blends them linearly where they overlap.

    Args:
      decode: [B, t, t, C] -> [B, scale t, scale t, 3]; traced once for the shape of a tile.
      latents: [B, h, w, C].
      tile: side of a tile in latents; a side of the image that is shorter is one tile.
      scale: pixels per latent.

    Returns:
      [B, scale h, scale w, 3].
    """
    sides = [min(tile, side) for side in latents.shape[1:3]]
    starts = [_tile_starts(whole, side) for whole, side in zip(latents.shape[1:3], sides, strict=True)]
    corners = [(top, left) for top in starts[0] for left in starts[1]]
    tiles = jnp.stack([latents[:, top : top + sides[0], left : left + sides[1]] for top, left in corners])
    decoded = jax.lax.map(decode, tiles)
    ramps = [_ramp(side * scale, round(side * scale * _OVERLAP)) for side in sides]
    weight = (ramps[0][:, None] * ramps[1])[:, :, None]
    height, width = (side * scale for side in latents.shape[1:3])
    total = jnp.zeros((latents.shape[0], height, width, decoded.shape[-1]))
    weights = np.zeros((height, width, 1))
    for (top, left), image in zip(corners, decoded, strict=True):
        window = (
            slice(top * scale, (top + sides[0]) * scale),
            slice(left * scale, (left + sides[1]) * scale),
        )
        total = total.at[:, *window].add(image * weight[None])
        weights[window] += weight
    return total / weights.astype(np.float32)[None]


def _tile_starts(whole: int, side: int) -> list[int]:
    """Spreads the starts of tiles evenly: the last ends at the end, and all overlap by the share."""
    step = max(1, round(side * (1 - _OVERLAP)))
    count = 1 + -(-(whole - side) // step)
    return np.linspace(0, whole - side, count).round().astype(int).tolist()


def _ramp(length: int, overlap: int) -> Float32[np.ndarray, " length"]:
    """[length] float32: rises over the overlap at the start, falls at the end; nowhere zero."""
    from_edge = np.minimum(np.arange(length), np.arange(length)[::-1])
    return np.minimum(1.0, (from_edge + 1) / (overlap + 1)).astype(np.float32)


def _read_preview(folder: Path, pipe: Pipeline) -> tuple[Model, Params]:
    """Returns the small VAE of a folder, and its parameters."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"--preview_vae={folder}: no config.json there; give an AutoencoderTiny's folder"
        )
    vae = read_model(folder)
    ours = {"latent_channels": pipe.latent_channels, "vae_scale_factor": pipe.vae_scale_factor}
    theirs = {key: vae.settings.get(key) for key in ours}
    if vae.class_name != "AutoencoderTiny" or theirs != ours:
        raise UserError(
            f"--preview_vae={folder}: {vae.class_name} with {theirs}; must be an AutoencoderTiny with {ours}"
        )
    return vae, read_params(folder, vae, "float32")
