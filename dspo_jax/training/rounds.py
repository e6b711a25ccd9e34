"""Rounds of images of the model in training: drawn, decoded and scored."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float32, Int32, Integer, UInt8, UInt32

from dspo_jax.errors import UserError
from dspo_jax.models.model import Params
from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import batch_share, check_batch_size, read_share, shard_batch
from dspo_jax.parallel.processes import gather_shares
from dspo_jax.rewards.reward import Score
from dspo_jax.training.prompt_stream import EndlessOrder
from dspo_jax.training.rollouts import Decoded, Rollout, make_rollout_key
from dspo_jax.training.settings import Settings
from dspo_jax.training.task import Task


@dataclasses.dataclass(frozen=True)
class Position:
    """Place in a run, before a round.

    Attributes:
      round: rounds that are finished.
      prompts: places of the order of prompts that they took.
      images: images that they drew; the index of the next one.
    """

    round: int = 0
    prompts: int = 0
    images: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """Images of a round, those of a prompt side by side.

    Attributes:
      position: before the round.
      states: in chunks of images, each [n+1, B, h, w, C] float32, or the last state alone [1, B, h, w, C].
      prompts: [N], of each image.
      rewards: [N], of all processes; NaN for an image that is not finite or that the reward could not score.
      metrics: `reward`, mean; `reward_std`; `unusable_images`, without a reward; `saturated`, see `Decoded`;
        `diversity`, mean distance of images of a prompt that were drawn in one chunk, where there are any;
        `reward_queries`, images scored since the run began.
    """

    position: Position
    states: Sequence[Float32[jax.Array, "_ B h w C"]]
    prompts: Sequence[str]
    rewards: Float32[np.ndarray, " N"]
    metrics: dict[str, float]

    def next_position(self, images: int) -> Position:
        """Returns the place behind the round, of `images` images of each prompt."""
        before, count = self.position, len(self.prompts)
        return Position(before.round + 1, before.prompts + count // images, before.images + count)


class Rounds:
    """Draws and scores rounds of images; a round is a function of parameters, seed and position."""

    def __init__(
        self,
        settings: Settings,
        task: Task,
        reference: Params,
        prompts: Sequence[str],
        score: Score,
        mesh: Mesh,
        *,
        count: int,
        shares_start: bool = False,
        keeps_path: bool = True,
    ):
        """Prepares the programs.

        Args:
          settings: seed and `stream` are read.
          task: pipeline and precision are read.
          reference: the frozen parameters, on the devices.
          prompts: to draw, in an endless shuffled order.
          score: gives the rewards, and NaN for an image that it cannot score.
          mesh: the devices.
          count: N, images of a round, over all processes.
          shares_start: whether images 2k and 2k+1 start from the same noise.
          keeps_path: whether a round keeps all states of an image, or its final latents alone.

        Raises:
          UserError: numbers of images that do not go together, by key; a sampler that does not fit the model.
        """
        self.images = settings.stream.images
        self._chunk = check_round_sizes(settings, mesh, count)
        self._prompts, self._order = prompts, EndlessOrder(len(prompts), settings.seed)
        drawing, size = settings.stream.drawing, task.pipe.latent_size
        self.rollout = Rollout(task, drawing, size, mesh, keeps_path=keeps_path)
        self._pipe, self._reference, self._score, self._mesh = task.pipe, reference, score, mesh
        self._count, self._shares_start = count, shares_start
        self._key = make_rollout_key(settings.seed, mesh)

    def draw(self, params: Params, position: Position) -> Round:
        """Draws, decodes and scores a round.

        While the images of a chunk are scored, the devices draw the next one.

        Args:
          params: trained parameters by component.
          position: of the round.

        Raises:
          UserError: more than half of the images have no reward.
        """
        places = position.prompts + np.arange(self._count // self.images)
        numbers = np.repeat(self._order.at(places), self.images)
        prompts = [self._prompts[number] for number in numbers]
        states, scored, measured = [], [], []
        waiting: tuple[Decoded, int] | None = None
        for start in range(0, self._count, self._chunk):
            path, decoded = self._launch(params, position, prompts, start)
            states.append(path)
            measured.append((decoded.distances, decoded.pairs))
            if waiting:
                scored.append(self._score_chunk(*waiting, prompts))
            waiting = decoded, start
        if waiting:
            scored.append(self._score_chunk(*waiting, prompts))
        rewards, finite, saturated = np.concatenate(scored).T
        _check_usable(rewards, finite, position.round)
        usable = rewards[np.isfinite(rewards)].astype(np.float64)
        metrics = {
            "reward": float(usable.mean()),
            "reward_std": float(usable.std()),
            "unusable_images": float(self._count - len(usable)),
            "saturated": float(saturated[finite > 0].mean()),
            "reward_queries": float(position.images + self._count),
        }
        distances, pairs = np.sum(jax.device_get(measured), axis=0).tolist()
        if pairs:
            metrics["diversity"] = distances / pairs
        return Round(position, states, prompts, rewards, metrics)

    def log_probability(
        self, index: UInt32[np.ndarray, " N"], calls: Int32[np.ndarray, "N n"]
    ) -> Float32[np.ndarray, "N n"]:
        """Returns log-probabilities of steps as they were drawn, see `Rollout.log_probability`."""
        return np.asarray(jax.device_get(self.rollout.log_probability(index, calls, self._key)))

    def _launch(
        self, params: Params, position: Position, prompts: Sequence[str], start: int
    ) -> tuple[jax.Array, Decoded]:
        """Dispatches drawing and decoding of a chunk of a round, and waits for nothing."""
        own = start + self._own_part()
        image = position.images + own
        inputs = {
            "tokens": self._pipe.tokenize([prompts[number] for number in own]),
            "index": image.astype(np.uint32),
            "start": (image - own % 2 if self._shares_start else image).astype(np.uint32),
            "prompt": (position.prompts + own // self.images).astype(np.uint32),
        }
        batch = shard_batch(inputs, self._mesh)
        states = self.rollout(
            params, self._reference, batch["tokens"], batch["index"], self._key, batch["start"]
        )
        return states, self.rollout.decode(states[-1], batch["prompt"], self.images)

    def _score_chunk(
        self, decoded: Decoded, start: int, prompts: Sequence[str]
    ) -> Float32[np.ndarray, "B 3"]:
        """Returns reward, whether it is finite, and saturated share of each image of a chunk."""
        images, finite, saturated = (read_share(array) for array in decoded[:3])
        rewards = np.full(len(images), np.nan, np.float32)
        good = np.flatnonzero(finite)
        error: Exception | None = None
        try:
            if len(good):
                rewards[good] = self._score_images(images[good], start + self._own_part()[good], prompts)
        except Exception as caught:  # the other processes, which would wait for this one, are told first
            error = caught
        processes.refuse_failure_elsewhere(error, "config.rewards.train")
        own_values = np.stack([rewards, finite.astype(np.float32), saturated], axis=1)
        return gather_shares(own_values, self._mesh)

    def _score_images(
        self, images: UInt8[np.ndarray, "N H W 3"], places: Integer[np.ndarray, " N"], prompts: Sequence[str]
    ) -> Float[np.ndarray, " N"]:
        scores = np.asarray(self._score(list(images), [prompts[place] for place in places]))
        if scores.shape != (len(images),):
            raise UserError(
                f"config.rewards.train: gave scores of shape {list(scores.shape)} for {len(images)} images; "
                f"it must give [{len(images)}]"
            )
        return scores

    def _own_part(self) -> Integer[np.ndarray, " b"]:
        """Returns the places in a chunk of the images that this process scores."""
        share, shares = batch_share(self._mesh)
        size = self._chunk // shares
        return share * size + np.arange(size)


def check_round_sizes(settings: Settings, mesh: Mesh, count: int) -> int:
    """Returns how many images of a round are drawn at a time.

    Args:
      settings: `stream` is read.
      mesh: the devices.
      count: images of a round, over all processes.

    Raises:
      UserError: numbers of images that do not go together, by key.
    """
    stream = settings.stream
    if count % stream.images:
        raise UserError(
            f"config.stream.images = {stream.images}: must divide the {count} images of a round, "
            f"config.batch_size x config.stream.updates = {settings.batch_size} x {stream.updates}"
        )
    return check_chunk(settings, mesh, count)


def check_chunk(settings: Settings, mesh: Mesh, count: int) -> int:
    """Returns how many of the images of a round are drawn at a time.

    Args:
      settings: `stream` is read.
      mesh: the devices.
      count: images of a round, over all processes.

    Raises:
      UserError: a number of images that does not divide those of the round.
    """
    stream = settings.stream
    check_batch_size(stream.batch_size, mesh, "config.stream.batch_size")
    chunk = min(stream.batch_size, count)
    if count % chunk:
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        fitting = [n for n in range(ways, count + 1, ways) if count % n == 0]
        raise UserError(
            f"config.stream.batch_size = {stream.batch_size}: must divide the {count} images of a round; "
            f"one of {fitting}"
        )
    return chunk


def _check_usable(rewards: Float[np.ndarray, " N"], finite: Float[np.ndarray, " N"], number: int) -> None:
    """Refuses a round of which more than half of the images have no reward."""
    bad = int(np.sum(~np.isfinite(rewards)))
    if bad <= len(rewards) / 2:
        return
    black = int(np.sum(finite == 0))
    raise UserError(
        f"round {number}: {bad} of {len(rewards)} images have no reward, {black} of them as they are not "
        "finite (NaN or infinite numbers): "
        + (
            "training has diverged; lower config.optimizer.learning_rate and go on from an earlier checkpoint"
            if black > bad / 2
            else "look at what config.rewards.train gives for the images of this model"
        )
    )
