"""Advantages and weights of images from their rewards, on the host and in float64.

A reward that is not finite marks an image that could not be scored: it is left out of every statistic, its
advantage or weight is 0, and the mask of advantages says so. All functions want the rewards of all processes,
in one order, so that the result does not depend on how many processes there are. The cut at +-5 deviations
(+-10 in the JAX original of DDPO) is part of the losses: `advantage_clip` in `policy_gradient`.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64

from dspo_jax import spelling
from dspo_jax.errors import UserError

GROUP_DEVIATIONS = ("group", "global")
KEY = "config.advantages"


class Advantages(NamedTuple):
    """Advantages of N images, or labels of N pairs.

    Attributes:
      values: [N], 0 where the mask is False.
      mask: [N], whether the reward is finite; the image is trained on only there.
    """

    values: Float32[np.ndarray, " n"]
    mask: Bool[np.ndarray, " n"]


class PromptStatistics:
    """Mean and deviation of the last rewards of each prompt (Black et al. 2023; ddpo-pytorch's tracker).

    A = (r - mean) / (std + 1e-6) over the prompt's last `buffer_size` rewards, those of this round included.
    While there are fewer than `min_count`, mean and std are those of the whole round, which favours prompts
    of high reward. It suits up to some hundred prompts. The release saves it in no checkpoint; `get_state` is
    for that.

    Attributes:
      buffer_size: rewards that are kept of a prompt; the release has 16 or 32.
      min_count: rewards of a prompt from which on its own statistics are taken; the release has 16.
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16) -> None:
        """Starts with no rewards.

        Raises:
          UserError: a buffer that cannot hold `min_count` rewards, or a `min_count` below 2.
        """
        _check_sizes(buffer_size, min_count)
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._rewards: dict[str, deque[float]] = {}

    def update(
        self, prompts: Sequence[str], rewards: Float[np.ndarray, " n"], *, normalise: bool = True
    ) -> Advantages:
        """Adds the rewards of a round, and returns its advantages.

        Args:
          prompts: of each image.
          rewards: [N], of the round's images.
          normalise: whether to divide by the deviation.
        """
        values, mask = _start(rewards)
        if len(prompts) != len(values):
            raise ValueError(f"{len(prompts)} prompts and {len(values)} rewards; there must be one of each")
        for prompt, reward in zip(prompts, values, strict=True):
            if math.isfinite(reward):
                self._rewards.setdefault(prompt, deque(maxlen=self.buffer_size)).append(float(reward))
        advantages = np.zeros_like(values)
        of_image = np.array(prompts, object)
        for prompt in dict.fromkeys(prompts):
            own = mask & (of_image == prompt)
            known = np.array(self._rewards.get(prompt, ()))
            over = known if len(known) >= self.min_count else values[mask]
            advantages[own] = _compare(values[own], over, 1e-6, normalise)
        return Advantages(advantages.astype(np.float32), mask)

    def get_state(self) -> dict[str, list[float]]:
        """Returns the kept rewards of each prompt, oldest first, in types of JSON."""
        return {prompt: list(rewards) for prompt, rewards in self._rewards.items()}

    def set_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Goes on from a state of `get_state`; a smaller buffer keeps the newest rewards."""
        self._rewards = {prompt: deque(rewards, maxlen=self.buffer_size) for prompt, rewards in state.items()}


def batch_advantages(rewards: Float[np.ndarray, " n"], *, normalise: bool = True) -> Advantages:
    """Returns (r - mean) / (std + 1e-8) over a round's [N] rewards (ddpo-pytorch without its tracker).

    Args:
      rewards: [N].
      normalise: whether to divide by the deviation.
    """
    values, mask = _start(rewards)
    advantages = np.zeros_like(values)
    advantages[mask] = _compare(values[mask], values[mask], 1e-8, normalise)
    return Advantages(advantages.astype(np.float32), mask)


def group_advantages(
    rewards: Float[np.ndarray, " n"], group_size: int, *, deviation: str = "group", normalise: bool = True
) -> Advantages:
    """Returns (r - mean of the group) / (std + 1e-4), a group being the images of one prompt.

    Args:
      rewards: [G * group_size], the images of a prompt side by side.
      group_size: images of a prompt in a round, 2 or more; Flow-GRPO has 24.
      deviation: std of the "group" (GRPO, Shao et al. 2024), or the "global" one of the round (Flow-GRPO).
      normalise: whether to divide by it.

    Returns:
      The advantages; 0 in a group without two different rewards, which Flow-GRPO leaves out of the loss.

    Raises:
      UserError: a group of one image, or an unknown deviation.
      ValueError: the rewards are no whole groups.
    """
    check_group_size(group_size)
    if deviation not in GROUP_DEVIATIONS:
        raise UserError(spelling.unknown(f"{KEY}.deviation", str(deviation), GROUP_DEVIATIONS))
    values, mask = _start(rewards)
    if len(values) % group_size:
        raise ValueError(f"{len(values)} rewards are no whole groups of {group_size}")
    advantages = np.zeros_like(values)
    for start in range(0, len(values), group_size):
        own = start + np.flatnonzero(mask[start : start + group_size])
        # The mean of equal numbers may differ from them by rounding, which a small std would magnify.
        if len(own) and np.ptp(values[own]) > 0:
            over = values[own] if deviation == "group" else values[mask]
            scale = over.std() + 1e-4 if normalise else 1.0
            advantages[own] = (values[own] - values[own].mean()) / scale
    return Advantages(advantages.astype(np.float32), mask)


def pair_preferences(rewards: Float[np.ndarray, "n 2"]) -> Advantages:
    """Returns which image of each pair has the higher reward: 1 the first, -1 the second, 0 for a tie.

    Args:
      rewards: [N, 2]. A pair of which one reward is not finite is left out.
    """
    values = np.asarray(rewards, np.float64)
    mask = np.all(np.isfinite(values), axis=1)
    labels = np.zeros(len(values), np.float32)
    labels[mask] = np.sign(values[mask, 0] - values[mask, 1])
    return Advantages(labels, mask)


def softmax_weights(
    rewards: Float[np.ndarray, " n"], group_size: int, beta: float
) -> Float64[np.ndarray, " n"]:
    """Returns softmax(beta r) x N over groups of N images (Black et al. 2023's RWR; `make_weights` of ddpo).

    Their mean over the round is 1. Groups count alike: those of which no image has a reward give their share
    to the others.

    Args:
      rewards: [G * group_size], the images of a group side by side; one of them at least is finite.
      group_size: N, the images of a prompt, or all of the round.
      beta: inverse temperature.
    """
    values, mask = (array.reshape(-1, group_size) for array in _start(rewards))
    usable = values[mask.any(1)]
    logits = beta * np.where(np.isfinite(usable), usable, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    found = np.zeros_like(values)
    found[mask.any(1)] = weights / weights.sum(1, keepdims=True) * (values.size / len(usable))
    return found.reshape(-1)


def check_group_size(group_size: int) -> None:
    """Refuses a group that has no spread.

    Raises:
      UserError: a group of fewer than 2 images.
    """
    if group_size < 2:
        raise UserError(
            f"config.stream.images = {group_size}: the advantage is measured within the images of a prompt, "
            "so there must be at least 2 of each"
        )


def rounds_to_fill(
    buffer_size: int, min_count: int, *, prompts: int, images_per_round: int, rounds: int
) -> int:
    """Returns the rounds until a prompt has `min_count` rewards on average, and its own statistics begin.

    Args:
      buffer_size, min_count: of `PromptStatistics`.
      prompts: number of different prompts.
      images_per_round: over all processes.
      rounds: of the whole run.

    Raises:
      UserError: a buffer that cannot hold `min_count` rewards, a `min_count` below 2, or one that the prompts
        do not reach within the run.
    """
    _check_sizes(buffer_size, min_count)
    needed = math.ceil(min_count * prompts / images_per_round)
    if needed > rounds:
        seen = rounds * images_per_round / prompts
        raise UserError(
            f"{KEY}.min_count = {min_count}: {prompts} prompts at {images_per_round} images a round reach it "
            f"after {needed} rounds, the run has {rounds} and each prompt about {seen:.3g} images; take "
            "fewer prompts, or config.advantages.of = 'group' or 'round'"
        )
    return needed


def _check_sizes(buffer_size: int, min_count: int) -> None:
    if min_count < 2:
        raise UserError(f"{KEY}.min_count = {min_count}: must be at least 2, as one reward has no deviation")
    if buffer_size < min_count:
        raise UserError(
            f"{KEY}.buffer_size = {buffer_size}: never holds {KEY}.min_count = {min_count} rewards; it must "
            "be at least that"
        )


def _start(
    rewards: Float[np.ndarray, " n"],
) -> tuple[Float64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Returns the rewards in float64, and which of them are finite."""
    values = np.asarray(rewards, np.float64)
    return values, np.isfinite(values)


def _compare(
    values: Float64[np.ndarray, " k"], over: Float64[np.ndarray, " m"], epsilon: float, normalise: bool
) -> Float64[np.ndarray, " k"]:
    """Returns values less the mean of others, in units of their deviation if asked; nothing of nothing."""
    if not len(values):
        return values
    return (values - over.mean()) / (over.std() + epsilon if normalise else 1.0)
