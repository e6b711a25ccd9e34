"""Pairs of the model's own images, the best and the worst of a prompt, for a preference objective."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float16, Float32, Int32

from dspo_jax.errors import UserError
from dspo_jax.models.model import Params
from dspo_jax.parallel.mesh import batch_sharding, batch_share, check_batch_size, shard_batch
from dspo_jax.rewards.reward import Score
from dspo_jax.training.round_stream import RoundStream
from dspo_jax.training.rounds import Round, Rounds
from dspo_jax.training.settings import Settings
from dspo_jax.training.task import Batch, Task


class PairStream(RoundStream):
    """Pairs of rounds of images; batches are those of `PreferenceLoss`.

    A round is `batch_size` x `stream.updates` prompts with `stream.images` images each.
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
        stream = settings.stream
        check_pairs(settings, mesh)
        count = settings.batch_size * stream.updates * stream.images
        rounds = Rounds(settings, task, reference, prompts, score, mesh, count=count, keeps_path=False)
        self._pipe, self._mesh, self._batch_size = task.pipe, mesh, settings.batch_size
        self._chosen: Int32[np.ndarray, "pairs 2"] = np.zeros((0, 2), np.int32)
        self._take = jax.jit(_take_moments, out_shardings=batch_sharding(mesh))
        super().__init__(rounds, stream.updates)

    def _begin(self, params: Params, drawn: Round) -> dict[str, float]:
        """Chooses the pairs."""
        del params
        self._chosen, replaced = choose_pairs(drawn.rewards.reshape(-1, self._rounds.images))
        better, worse = drawn.rewards[self._chosen].T
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
        better, worse = drawn.rewards[chosen].T
        tokens = self._pipe.tokenize([drawn.prompts[number] for number in chosen[:, 0]])
        inputs = jax.device_get(self._pipe.prompt_batch(tokens, self._pipe.image_size))
        per_image = {name: np.repeat(inputs[name], 2, axis=1) for name in self._pipe.image_inputs}
        index = drawn.position.prompts + first + np.arange(size)
        columns = shard_batch(
            {
                **inputs,
                **per_image,
                "preference": np.where(better > worse, 1.0, 0.5).astype(np.float32),
                "loser_won": np.zeros(size, bool),
                "index": index.astype(np.uint32),
                "chosen": chosen,
            },
            self._mesh,
        )
        return columns | {"moments": self._take(tuple(drawn.states), columns.pop("chosen"))}


def _take_moments(
    chunks: tuple[Float32[jax.Array, "1 N h w C"], ...], chosen: Int32[jax.Array, "B 2"]
) -> Float16[jax.Array, "B 2 h w moments"]:
    """Returns chosen latents of a round as means, with deviations of 0, in the dtype of encoded pairs."""
    latents = jnp.concatenate(chunks, axis=1)[0][chosen].astype(jnp.float16)
    return jnp.concatenate([latents, jnp.zeros_like(latents)], axis=-1)


def choose_pairs(
    rewards: Float32[np.ndarray, "prompts images"],
) -> tuple[Int32[np.ndarray, "prompts 2"], int]:
    """Chooses the best and the worst image of each prompt.

    Args:
      rewards: NaN where an image has none; at least half of them are finite.

    Returns:
      Places [prompts, 2] in the flattened rewards; where a prompt has fewer than two rewards, the pair of the
      next one that has. And the number of prompts whose pair was replaced.

    Raises:
      UserError: no prompt has two rewards.
    """
    prompts, images = rewards.shape
    missing = ~np.isfinite(rewards)
    usable = np.flatnonzero((~missing).sum(1) >= 2)
    if not len(usable):
        raise UserError(
            f"config.rewards.train: gives a reward to no two of the {images} images of any prompt of a "
            "round, of which a pair could be made; look at what it gives for the images of this model, or "
            "set config.stream.images to more"
        )
    best = np.where(missing, -np.inf, rewards).argmax(1)
    worst = images - 1 - np.where(missing, np.inf, rewards)[:, ::-1].argmin(1)  # another one in a tie
    pairs = np.stack([best, worst], axis=1) + np.arange(prompts)[:, None] * images
    source = usable[np.searchsorted(usable, np.arange(prompts)) % len(usable)]
    return pairs[source].astype(np.int32), prompts - len(usable)


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
