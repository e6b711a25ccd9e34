"""HPS v2, the Human Preference Score, in its two published versions, whose scores do not compare."""

import html
from pathlib import Path

from dspo_jax.rewards import clip_folder
from dspo_jax.rewards.device_pixels import HPS
from dspo_jax.rewards.network import RewardNetwork

_QUOTES = str.maketrans("\u02bc\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "'" * 5 + '"' * 4)


def load(folder: Path, *, name: str) -> RewardNetwork:
    """Loads HPS v2: the cosine of image and prompt, with no factor and no clamp.

    Source: Wu et al. 2023 (arXiv:2306.09341), and `score` of the package hpsv2 1.2.0. The package's benchmark
    command prints 100 times as much.

    Raises:
      FileNotFoundError, UserError: as `clip_folder.open_reward` and `clip_folder.read_tokenizer`.
    """
    clip, params = clip_folder.open_reward(folder, name)
    return clip.make(clip.cosine, params, HPS, clean_prompt)


def clean_prompt(prompt: str) -> str:
    """Straightens a prompt's quotes and reads HTML's entities, as the package does before its tokenizer.

    There, ftfy repairs more, such as broken encodings, ligatures and full-width letters. None of the 2,198
    prompts of PartiPrompts and of ImageReward's two lists needs that; 15 have the quotes.
    """
    return html.unescape(html.unescape(prompt.translate(_QUOTES)))
