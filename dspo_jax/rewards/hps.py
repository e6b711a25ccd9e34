"""HPS v2, the Human Preference Score, in its two published versions, whose scores do not compare."""

import functools
from pathlib import Path

from dspo_jax.rewards import clip_folder
from dspo_jax.rewards.preprocess import hps_pixels
from dspo_jax.rewards.registry import Reward, register_loader


def load(folder: Path, batch_size: int, *, name: str) -> Reward:
    """The cosine of image and prompt, with no factor and no clamp.

    Source: Wu et al. 2023 (arXiv:2306.09341), and `score` of the package hpsv2 1.2.0. The package's benchmark
    command prints 100 times as much.

    Raises:
      FileNotFoundError, ValueError: as `clip_folder.open_reward` and `clip_folder.read_tokenizer`.
    """
    clip = clip_folder.open_reward(folder, name)
    return clip.make(clip.cosine, hps_pixels, batch_size)


for _name in ("hpsv2.0", "hpsv2.1"):
    register_loader(_name)(functools.partial(load, name=_name))
