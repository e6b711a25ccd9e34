"""Grids of images during training: the same prompts and noise, drawn at the start and later."""

import functools
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from dspo_jax.data import loader
from dspo_jax.data.datasets import Dataset
from dspo_jax.errors import UserError
from dspo_jax.files import whole
from dspo_jax.images.contact_sheet import contact_sheet, enlargement
from dspo_jax.models.model import Params
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.rewards.reward import Reward, describe_error
from dspo_jax.sampling.decoding import Decoder, warn_of_non_finite
from dspo_jax.sampling.image_sampler import ImageRequest, ImageSampler, initial_noise
from dspo_jax.sampling.rendering import Drawing
from dspo_jax.training.watch_settings import SampleSettings

# Images in one call; few, as most of the memory is taken by training.
_IMAGES_PER_DEVICE = 4


def first_captions(datasets: Sequence[Dataset], split: str, count: int = 4) -> list[str]:
    """Returns the captions of the first `count` examples of a split, for a run that names no prompts.

    Args:
      datasets: from `read_datasets`.
      split: of the datasets.
      count: fewer come where the split, or its first bucket, has fewer.

    Raises:
      UserError: the split does not exist or is empty.
    """
    with closing(loader.eval_batches(datasets, batch_size=count, split=split)) as batches:
        return next(batches)["caption"]


class SampleGrids:
    """Draws a model before and while it is trained, and writes contact sheets of both.

    Every process of a run must call it alike, as they compute together; the first one writes.
    """

    def __init__(
        self,
        pipe: Pipeline,
        params: Params,
        mesh: Mesh,
        workdir: str | Path,
        settings: SampleSettings,
        *,
        prompts: Sequence[str],
        compute_dtype: str,
        rewards: Sequence[Reward] = (),
    ):
        """Draws the images to compare with.

        Args:
          pipe: the model's architectures; of its weights only the VAE's are read.
          params: UNet and text encoders at the start of the run, in the compute dtype, on the mesh.
          mesh: the devices.
          workdir: of the run.
          settings: `seeds`, the columns under either heading; `num_inference_steps` and `guidance_scale`.
          prompts: rows: those of the settings, or what stands in for them.
          compute_dtype: of the networks.
          rewards: score each image, which stands below it; "-" where one fails or gives no number.

        Raises:
          UserError: no prompt.
        """
        if not prompts:
            raise UserError(f"config.samples.prompts = {prompts}: needs at least one")
        self._pipe, self._folder = pipe, Path(workdir) / "samples"
        self._prompts, self._seeds = prompts, settings.seeds
        requests = [
            ImageRequest(prompt, i, seed) for i, prompt in enumerate(prompts) for seed in settings.seeds
        ]
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch_size = ways * min(_IMAGES_PER_DEVICE, -(-len(requests) // ways))
        self._count = len(requests)
        requests += [requests[-1]] * (-len(requests) % self._batch_size)
        self._requests = requests
        self._noise = np.asarray(initial_noise(requests, (*pipe.latent_size, pipe.latent_channels)))
        drawing = Drawing(steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale)
        self._sampler = ImageSampler(pipe, drawing, compute_dtype=compute_dtype, mesh=mesh)
        self._rewards = rewards
        self._base = self._draw(params, "the base")

    def write(self, step: int, params: Params) -> Path | None:
        """Writes workdir/samples/step_000500.png or the like: the base's images, and those of `params`.

        Returns:
          The picture's path; None in other processes than the first.
        """
        images = self._draw(params, f"step {step}")
        if not images:
            return None
        columns = len(self._seeds)
        beside = [
            self._base[i * columns :][:columns] + images[i * columns :][:columns]
            for i in range(len(self._prompts))
        ]
        rows = [
            (prompt, [image for image, _ in row]) for prompt, row in zip(self._prompts, beside, strict=True)
        ]
        captions = [[lines for _, lines in row] for row in beside]
        headings = [("base", columns), (f"step {step}", columns)]
        labels = [f"seed {seed}" for seed in self._seeds] * 2
        scale = enlargement(*images[0][0].shape[:2])
        sheet = contact_sheet(rows, headings, scale, labels, captions)
        picture = self._folder / f"step_{step:06d}.png"
        with whole(picture) as partial:
            sheet.save(partial, format="PNG")
        return picture

    @functools.cached_property
    def _decoder(self) -> Decoder:
        """Only the first process has one."""
        return Decoder(self._pipe)

    def _draw(self, params: Params, name: str) -> list[tuple[np.ndarray, list[str]]]:
        """Returns (image [H, W, 3] uint8, its rewards in words) for each prompt and seed.

        Other processes than the first return none.

        Warns of those that are not finite, which are black: the training goes on.
        """
        latents = np.concatenate(
            [
                self._sampler.sample_latents(self._requests[part], self._noise[part], params=params)
                for part in (
                    slice(start, start + self._batch_size)
                    for start in range(0, len(self._requests), self._batch_size)
                )
            ]
        )[: self._count]
        if jax.process_index() != 0:
            return []
        # One at a time: a decoder takes more memory for an image than the UNet for its latents.
        decoded = [self._decoder(image[None]) for image in latents]
        prompts = [request.prompt for request in self._requests[: self._count]]
        warn_of_non_finite(f"samples of {name}", prompts, np.concatenate([finite for _, finite in decoded]))
        images = [images[0] for images, _ in decoded]
        scores = {reward.name: _score(reward, images, prompts, name) for reward in self._rewards}
        lines = [
            [
                f"{key} {values[i]:.4g}" if finite[0] and np.isfinite(values[i]) else f"{key} -"
                for key, values in scores.items()
            ]
            for i, (_, finite) in enumerate(decoded)
        ]
        return list(zip(images, lines, strict=True))


def _score(reward: Reward, images: Sequence[np.ndarray], prompts: Sequence[str], name: str) -> np.ndarray:
    """Scores images; NaN where the reward fails, which is a warning, as a grid only informs."""
    try:
        return reward.score_or_nan(images, prompts)
    except Exception as error:  # the user's own code may raise anything; other processes do not score
        logging.warning(
            "samples of %s: reward %s failed, and is left out: %s", name, reward.name, describe_error(error)
        )
        return np.full(len(images), np.nan)
