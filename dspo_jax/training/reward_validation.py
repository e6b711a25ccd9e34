"""Rewards on held-out prompts while a run trains on the model's own images, beside those at its start."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.models.model import Params
from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import replicated
from dspo_jax.pipelines.conditioning_inputs import prompt_batch
from dspo_jax.rewards.reward import Reward
from dspo_jax.sampling.decoding import Decoder
from dspo_jax.sampling.image_sampler import ImageRequest, ImageSampler, initial_noise
from dspo_jax.training.own_images import OwnImages
from dspo_jax.training.settings import Settings
from dspo_jax.training.task import Task, cast, of_components, policy_params
from dspo_jax.training.validation_scalars import binomial_interval

# Shares of the way from image to noise at which predictions are compared with the reference's.
_LEVELS = (0.2, 0.5, 0.8)
_SEED = 2_000_000  # no image of training, labelling or evaluation has these seeds by default


class _Drawn(NamedTuple):
    latents: np.ndarray  # [N, h, w, C]
    images: np.ndarray  # [N, H, W, 3] uint8
    rewards: np.ndarray  # [rewards, N]; NaN where a reward gives none


class RewardValidator:
    """Draws held-out prompts and scores the images as they would be saved.

    Every process must call it alike.
    """

    def __init__(
        self, task: Task, own: OwnImages, settings: Settings, mesh: Mesh, params: Params, reference: Params
    ):
        """Draws and scores the images of the model at the start.

        Args:
          task: pipeline and precision.
          own: prompts and rewards.
          settings: drawing, and how many images of a prompt.
          mesh: the devices.
          params: trained parameters at the start, on the mesh.
          reference: the frozen parameters.
        """
        self._task, self._own, self._mesh = task, own, mesh
        self._count = settings.rewards.images
        pipe, drawing = task.pipe, settings.stream.drawing
        self._sampler = ImageSampler(pipe, drawing, compute_dtype=task.precision.compute_dtype, mesh=mesh)
        requests = [
            ImageRequest(prompt, number, _SEED + seed)
            for number, prompt in enumerate(own.held_out)
            for seed in range(self._count)
        ]
        self._prompts, self._number = [request.prompt for request in requests], len(requests)
        self._batch_size = settings.stream.batch_size
        self._requests = requests + [requests[-1]] * (-len(requests) % self._batch_size)
        self._noise = np.asarray(initial_noise(self._requests, (*pipe.latent_size, pipe.latent_channels)))
        self._decoder: Decoder | None = None
        self._drift = jax.jit(on_mesh(self._measure_drift, mesh), out_shardings=replicated(mesh))
        self._frozen = of_components(task, reference)
        self._base = self._draw(policy_params(task, params, reference))

    def __call__(self, policy: Params, reference: Params | None) -> dict[str, float]:
        """Returns scalars of the policy's images.

        `reward_NAME`, the mean; `win_rate_NAME` with `_low` and `_high`, the share of images that score
        higher than those of the model at the start with the same noise (ties one half; Wilson's 95 %
        interval); `diversity`, the mean distance of two images of a prompt, root mean square over pixels from
        0 to 1; `saturated`, the share of values that are 0 or 255; `unusable`, images without a finite
        reward; `prediction_drift`, the mean squared difference from the frozen model's predictions at three
        noise levels, where that is held in memory; `score`, by which checkpoints are compared: the first
        reward that is not trained by, or else the trained one.

        Args:
          policy: parameters in the compute dtype.
          reference: not used; the drift is from the parameters that the constructor was given.
        """
        del reference
        drawn, base = self._draw(policy), self._base
        found: dict[str, float] = {"unusable": float(np.isnan(drawn.rewards).any(0).sum())}
        for reward, scores, before in zip(self._own.watched, drawn.rewards, base.rewards, strict=True):
            known = ~(np.isnan(scores) | np.isnan(before))
            if not known.any():
                if processes.is_first():
                    logging.warning("reward %s: gave no finite score to any held-out image", reward.name)
                continue
            wins = float((scores > before)[known].sum() + (scores == before)[known].sum() / 2)
            low, high = binomial_interval(wins, int(known.sum()))
            found |= {
                f"reward_{reward.name}": float(scores[~np.isnan(scores)].mean()),
                f"win_rate_{reward.name}": wins / int(known.sum()),
                f"win_rate_{reward.name}_low": low,
                f"win_rate_{reward.name}_high": high,
            }
        found["saturated"] = _saturated(drawn.images)
        if self._count > 1:
            found["diversity"] = _diversity(drawn.images, self._count)
        if self._task.pipe.denoiser in self._frozen:
            part = slice(0, self._batch_size)
            tokens = self._task.pipe.tokenize([request.prompt for request in self._requests[part]])
            found["prediction_drift"] = float(
                self._drift(
                    policy, cast(self._task, self._frozen), tokens, drawn.latents[part], self._noise[part]
                )
            )
        found["score"] = self._score(drawn.rewards)
        return found

    def _score(self, rewards: np.ndarray) -> float:
        """Returns the mean of what checkpoints are compared by; NaN where most images have no reward."""
        trained = len(self._own.weights)
        each = rewards[trained] if len(rewards) > trained else np.asarray(self._own.weights) @ rewards
        known = each[~np.isnan(each)]
        return float(known.mean()) if 2 * len(known) >= len(each) else float("nan")

    def _draw(self, params: Params) -> _Drawn:
        parts = range(0, len(self._requests), self._batch_size)
        latents, images, rewards = [], [], []
        for start in parts:
            part = slice(start, start + self._batch_size)
            drawn = np.asarray(
                self._sampler.sample_latents(self._requests[part], self._noise[part], params=params)
            )
            if self._decoder is None:
                self._decoder = Decoder(self._task.pipe)
            pictures, finite = self._decoder(drawn)
            prompts = [request.prompt for request in self._requests[part]]
            scores = [self._score_pictures(each, pictures, prompts) for each in self._own.watched]
            latents.append(drawn)
            images.append(pictures)
            rewards.append(np.where(finite & np.isfinite(scores), scores, np.nan))
        scored = np.concatenate(rewards, axis=1)[:, : self._number]
        if jax.process_count() > 1:  # accelerators of different processes may round differently
            scored = np.asarray(multihost_utils.broadcast_one_to_all(scored))
        return _Drawn(np.concatenate(latents), np.concatenate(images)[: self._number], scored)

    def _score_pictures(self, reward: Reward, pictures: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        error: Exception | None = None
        scores = np.zeros(len(pictures))
        try:
            scores = reward.score_or_nan(list(pictures), prompts)
        except Exception as caught:  # the other processes, which would wait for this one, are told first
            error = caught
        processes.refuse_failure_elsewhere(error, f"reward {reward.name}, on held-out images")
        return scores

    def _measure_drift(
        self, policy: Params, reference: Params, tokens: jax.Array, latents: jax.Array, noise: jax.Array
    ) -> jax.Array:
        pipe, size = self._task.pipe, latents.shape[1:3]
        pixels = (size[0] * pipe.vae_scale_factor, size[1] * pipe.vae_scale_factor)
        batch = prompt_batch(pipe, tokens, pixels)
        differences = []
        for level in _LEVELS:
            t = jnp.full(len(latents), pipe.schedule.level_between(level, 1))
            noisy = pipe.schedule.add_noise(latents, noise, t).astype(self._task.precision.compute_dtype)
            times = pipe.schedule.network_time(t)
            predictions = [
                pipe.predict(params, noisy, times, pipe.encode_conditioning(params, batch)).astype(
                    jnp.float32
                )
                for params in (policy, reference)
            ]
            differences.append(jnp.square(predictions[0] - predictions[1]).mean())
        return jnp.stack(differences).mean()


def _diversity(images: np.ndarray, count: int) -> float:
    """Mean distance of two images of a prompt."""
    groups = images.reshape(-1, count, *images.shape[1:]).astype(np.float32) / 255
    distances = [
        np.sqrt(np.square(groups[:, i] - groups[:, j]).mean((1, 2, 3)))
        for i in range(count)
        for j in range(i)
    ]
    return float(np.mean(distances))


def _saturated(images: np.ndarray) -> float:
    return float(np.isin(images, (0, 255)).mean())
