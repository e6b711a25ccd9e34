"""Pairs of the model's own images: the best and the worst of a prompt, all two by two, or all in a list."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float16, Float32, Int32

from dspo_jax.errors import UserError
from dspo_jax.models.model import Params
from dspo_jax.parallel.mesh import batch_sharding, batch_share, check_batch_size, shard_batch
from dspo_jax.pipelines.conditioning_inputs import prompt_batch
from dspo_jax.rewards.reward import Score
from dspo_jax.training.round_stream import RoundStream
from dspo_jax.training.rounds import Round, Rounds
from dspo_jax.training.settings import Settings
from dspo_jax.training.task import Batch, Task


class PairStream(RoundStream):
    """Pairs or lists of rounds of images; batches are those of `PreferenceLoss`.

    A round is `batch_size` x `stream.updates` rows. Each is the best and the worst of `stream.images` images
    of a prompt. For an objective that takes lists it is all of them, best first, with the rewards as scores
    if there are more than two; for one that weighs images every image is used, two by two in the order of
    reward.
    """

    def __init__(
        self,
        settings: Settings,
        task: Task,
        reference: Params,
        prompts: Sequence[str],
        score: Score,
        mesh: Mesh,
    ):
        """Prepares the programs.

        Args:
          settings: of the run.
          task: pipeline and precision are read.
          reference: the frozen parameters, on the devices.
          prompts: to draw.
          score: gives the rewards, and NaN for an image that it cannot score.
          mesh: the devices.

        Raises:
          UserError: settings that do not go together, by key.
        """
        check_pairs(settings, mesh)
        count = settings.round_images
        rounds = Rounds(settings, task, reference, prompts, score, mesh, count=count, keeps_path=False)
        self._pipe, self._mesh, self._batch_size = task.pipe, mesh, settings.batch_size
        self._objective, self._drawn_per_row = settings.objective, settings.drawn_per_example
        self._images_per_row = settings.images_per_row
        self._chosen: Int32[np.ndarray, "rows P"] = np.zeros((0, self._images_per_row), np.int32)
        self._weights: Float32[np.ndarray, " N"] | None = None
        self._take = jax.jit(_take_moments, out_shardings=batch_sharding(mesh))
        super().__init__(rounds, settings.stream.updates)

    def _begin(self, params: Params, drawn: Round) -> dict[str, float]:
        """Chooses the pairs or lists, and weighs the images where they are weighed."""
        del params
        of_prompts = drawn.rewards.reshape(-1, self._rounds.images)
        if self._objective.needs_weight:
            self._chosen = pair_all(of_prompts)
            weights = self._objective.weigh(drawn.rewards, self._rounds.images)
            self._weights = weights.astype(np.float32)
            if (drawn.rewards[np.isfinite(drawn.rewards)] == np.nanmax(drawn.rewards)).all():
                self._warn_of_ties(drawn)
            return {"effective_images": float(weights.sum() ** 2 / np.square(weights).sum())}
        self._chosen, replaced = choose_images(of_prompts, self._images_per_row)
        better, worse = drawn.rewards[self._chosen[:, [0, -1]]].T
        if (better == worse).all():
            self._warn_of_ties(drawn)
        return {
            "replaced_pairs": float(replaced),
            "reward_gap": float((better - worse).mean()),
            "ties": float((better == worse).mean()),
        }

    def _make_batch(self, drawn: Round, update: int) -> Batch:
        """See `RoundStream._make_batch`."""
        share, shares = batch_share(self._mesh)
        size = self._batch_size // shares
        first = update * self._batch_size + share * size
        chosen = self._chosen[first : first + size]
        rewards = drawn.rewards[chosen]
        preference = (
            np.where(rewards[:, 0] > rewards[:, 1], 1.0, 0.5) if rewards.shape[1] == 2 else np.ones(size)
        )
        scored = rewards.shape[1] > 2 or self._objective.needs_scores
        tokens = self._pipe.tokenize([drawn.prompts[number] for number in chosen[:, 0]])
        inputs = jax.device_get(prompt_batch(self._pipe, tokens, self._pipe.image_size))
        per_image = {
            name: np.repeat(inputs[name], chosen.shape[1], axis=1) for name in self._pipe.image_inputs
        }
        index = drawn.position.images // self._drawn_per_row + first + np.arange(size)
        columns = shard_batch(
            {
                **inputs,
                **per_image,
                "preference": preference.astype(np.float32),
                "loser_won": np.zeros(size, bool),
                "index": index.astype(np.uint32),
                "chosen": chosen,
                **({} if self._weights is None else {"weight": self._weights[chosen]}),
                **({"scores": rewards} if scored else {}),
            },
            self._mesh,
        )
        return columns | {"moments": self._take(tuple(drawn.states), columns.pop("chosen"))}


def _take_moments(
    chunks: tuple[Float32[jax.Array, "1 N h w C"], ...], chosen: Int32[jax.Array, "B P"]
) -> Float16[jax.Array, "B P h w moments"]:
    """Returns chosen latents of a round as means, with deviations of 0, in the dtype of encoded images."""
    latents = jnp.concatenate(chunks, axis=1)[0][chosen].astype(jnp.float16)
    latents = jnp.where(jnp.isfinite(latents), latents, 0)  # of images that weigh nothing
    return jnp.concatenate([latents, jnp.zeros_like(latents)], axis=-1)


def choose_images(
    rewards: Float32[np.ndarray, "prompts images"], count: int
) -> tuple[Int32[np.ndarray, "prompts P"], int]:
    """Chooses the best and the worst image of each prompt, or all images of it, best first.

    Args:
      rewards: NaN where an image has none; at least half of them are finite.
      count: 2, or the number of images.

    Returns:
      Places [prompts, count] in the flattened rewards, equal ones in the order drawn; where a prompt has
      fewer rewards than `count`, those of the next one that has. And the number of prompts replaced so.

    Raises:
      UserError: no prompt has so many rewards.
    """
    prompts, images = rewards.shape
    finite = np.isfinite(rewards)
    usable = np.flatnonzero(finite.sum(1) >= count)
    if not len(usable):
        found = (
            f"no two of the {images} images of any prompt of a round, of which a pair could be made"
            if count == 2
            else f"all {images} images of no prompt of a round, and a list needs all"
        )
        raise UserError(
            f"config.rewards.train: gives a reward to {found}; look at what it gives for the images of this "
            f"model, or set config.stream.images to {'more' if count == 2 else 'fewer'}"
        )
    ranked = np.argsort(np.where(finite, -rewards, np.inf), axis=1, kind="stable")
    if count < images:
        last = finite.sum(1, keepdims=True) - 1
        ranked = np.concatenate([ranked[:, :1], np.take_along_axis(ranked, last, axis=1)], axis=1)
    places = ranked + np.arange(prompts)[:, None] * images
    source = usable[np.searchsorted(usable, np.arange(prompts)) % len(usable)]
    return places[source].astype(np.int32), prompts - len(usable)


def pair_all(rewards: Float32[np.ndarray, "prompts images"]) -> Int32[np.ndarray, "pairs 2"]:
    """Pairs all images of each prompt in the order of reward, those without a reward last.

    Args:
      rewards: of an even number of images; NaN where an image has none.

    Returns:
      Places in the flattened rewards, the better image of a pair first; each place once.
    """
    prompts, images = rewards.shape
    order = np.argsort(np.where(np.isfinite(rewards), -rewards, np.inf), axis=1, kind="stable")
    return (order + np.arange(prompts)[:, None] * images).reshape(-1, 2).astype(np.int32)


def check_pairs(settings: Settings, mesh: Mesh) -> None:
    """Refuses settings with which no pairs can be made, before any weights are read.

    Raises:
      UserError: by key.
    """
    check_batch_size(settings.batch_size, mesh)
    if settings.stream.images < 2:
        raise UserError(
            f"config.stream.images = {settings.stream.images}: the best and the worst image of a prompt make "
            "a pair; there must be at least 2"
        )
    if settings.objective.needs_weight and settings.stream.images % 2:
        raise UserError(
            f"config.stream.images = {settings.stream.images}: {settings.objective.name!r} takes all images "
            "of a prompt two by two; there must be an even number"
        )
