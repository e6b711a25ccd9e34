"""Prompts and rewards of a run that trains on the model's own images."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from dspo_jax.errors import UserError
from dspo_jax.models.model import Params
from dspo_jax.rewards.differentiable import DIVISORS, DifferentiableReward, load_differentiable, read_sum
from dspo_jax.rewards.registry import load_reward
from dspo_jax.rewards.reward import Reward, describe_error
from dspo_jax.sampling.prompts import read_prompts
from dspo_jax.training.settings import Settings
from dspo_jax.training.stream_settings import RewardSettings


@dataclasses.dataclass(frozen=True, eq=False)
class OwnImages:
    """Prompts and rewards of a run.

    Attributes:
      prompts: to train on.
      held_out: prompts that rewards are watched on.
      trained: the reward to train by, as a function of pixels; None where its scores suffice.
      watched: rewards of images as they are saved: the parts of the trained one, then those that are not
        trained by.
      weights: [T], of the first T of them in the trained reward.
    """

    prompts: Sequence[str]
    held_out: Sequence[str]
    trained: DifferentiableReward | None
    watched: Sequence[Reward]
    weights: Sequence[float]

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """Scores [N] of N images [H, W, 3] uint8 by the trained reward; NaN where a reward gives none."""
        total = np.zeros(len(images))
        for reward, weight in zip(self.watched, self.weights, strict=False):
            total += weight * reward.score_or_nan(images, prompts)
        return total

    def with_weights(self, params: Params) -> "OwnImages":
        """Returns the same, where the reward that is trained by its gradient scores files by given weights.

        Args:
          params: like those of `trained`, on the mesh of the run; what it splits is on each device a second
            time, whole.
        """
        assert self.trained is not None
        others = self.watched[len(self.weights) :]
        return dataclasses.replace(self, watched=[*self.trained.of_files(params), *others])

    def pins(self) -> dict[str, str]:
        """Tells prompts and rewards apart that a run trains by, by the key that names them.

        And those that the score of a validation is of, by which checkpoints of the run are compared.
        """
        trained, others = self.watched[: len(self.weights)], self.watched[len(self.weights) :]
        pins = {"stream.prompts": _pin(self.prompts), "rewards.train": _versions(trained)}
        if self.held_out:
            scored = _versions(others[:1] or trained)
            pins |= {"rewards.prompts": _pin(self.held_out), "rewards.validation": f"scores by {scored}"}
        return pins


def _pin(prompts: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    return f"{len(prompts)} prompts with the SHA-256 {digest}"


def _versions(rewards: Sequence[Reward]) -> str:
    return "; ".join(f"{reward.name} {reward.version}" for reward in rewards)


def open_own_images(settings: Settings, size: tuple[int, int]) -> OwnImages:
    """Reads the prompts and rewards of a run whose `config.stream.kind` is not "dataset".

    Functions of the user's score two images of noise.

    Args:
      settings: of the run.
      size: (height, width) of the images in pixels.

    Raises:
      UserError, FileNotFoundError: by key: no prompts, an unknown reward, one without the gradient that is
        asked for, weights that are missing, a function that fails.
    """
    stream, rewards = settings.stream, settings.rewards
    if not rewards.train:
        raise UserError(
            f"config.rewards.train is not set: config.stream.kind = {stream.kind!r} trains by a reward, e.g. "
            "--config.rewards.train=pickscore"
        )
    prompts = read_all("config.stream.prompts", stream.prompts)
    held_out = read_all("config.rewards.prompts", rewards.prompts) if rewards.prompts else []
    if settings.validation.every and not held_out:
        raise UserError(
            "config.rewards.prompts is not set: rewards are watched on prompts that are not trained on; name "
            "a file of some, or watch none with --config.validation.every=0"
        )
    with _of_key("config.rewards.train", rewards.train):
        trained = load_differentiable(rewards.train, rewards.folder) if stream.kind == "prompts" else None
        parts = read_sum(rewards.train)
    # As in `combine`, each reward of a sum counts in its own unit.
    weights = [weight / DIVISORS.get(name, 1.0) for name, weight in parts]
    if rewards.train == parts[0][0]:  # no sum
        weights = [1.0]
    names = [] if trained else [name for name, _ in parts]
    watched = list(trained.of_files(trained.params)) if trained else []
    for name in [*names, *_not_trained(rewards)]:
        key, value = ("train", rewards.train) if name in names else ("validation", list(rewards.validation))
        with _of_key(f"config.rewards.{key}", value):
            watched.append(load_reward(name, rewards.folder))
        if ":" in name:
            _try(name, watched[-1], size, [*prompts, *prompts][:2])
    return OwnImages(prompts, held_out, trained, watched, weights)


@contextmanager
def _of_key(key: str, value: object) -> Iterator[None]:
    """Puts the key of the config before what is refused within."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key} = {value!r}: {error}") from error
    except UserError as error:
        raise UserError(f"{key} = {value!r}: {error}") from error


def _try(name: str, reward: Reward, size: tuple[int, int], prompts: Sequence[str]) -> None:
    """Scores two images of noise by a user's function, before a run depends on it.

    Raises:
      UserError: it fails, or gives something else than two numbers.
    """
    noise = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    try:
        dataclasses.replace(reward, name=name).score_or_nan(list(noise), prompts)
    except UserError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise UserError(
            f"reward {name}: failed for two images of noise, uint8{list(noise.shape[1:])}, and two prompts: "
            f"{describe_error(error)}; it must be a function (images, prompts) -> scores"
        ) from error


def _not_trained(rewards: RewardSettings) -> Sequence[str]:
    trained = {name for name, _ in read_sum(rewards.train)}
    for name in rewards.validation:
        if name in trained:
            raise UserError(
                f"config.rewards.validation = {list(rewards.validation)}: {name} is trained by, and says "
                "nothing of what is gained; name others"
            )
        if rewards.validation.count(name) > 1:
            raise UserError(
                f"config.rewards.validation = {list(rewards.validation)}: {name} stands twice; name it once"
            )
    return rewards.validation


def read_all(key: str, texts: Sequence[str]) -> list[str]:
    """Returns the texts of prompts and of files of prompts, in their order.

    Raises:
      UserError, FileNotFoundError: none is given, or a file cannot be read.
    """
    found: list[str] = []
    for text in texts:
        try:
            found += [prompt.text for prompt in read_prompts(text, image_columns=(), option=None)]
        except (UserError, FileNotFoundError) as error:
            raise UserError(f"{key} = {text!r}: {error}") from error
    if not found:
        raise UserError(f"{key} is not set: name prompts, or a file of them")
    return found
