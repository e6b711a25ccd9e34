"""PickScore: the preference of people between two images for a prompt."""

from pathlib import Path

import jax
import jax.numpy as jnp

from dspo_jax.models.model import Params
from dspo_jax.rewards import clip_folder
from dspo_jax.rewards.device_pixels import CLIP
from dspo_jax.rewards.network import RewardNetwork


def load(folder: Path) -> RewardNetwork:
    """Loads PickScore: exp(logit_scale) times the cosine of image and prompt.

    Source: Kirstain et al. 2023 (arXiv:2305.01569), section 4, and its released code. Diffusion-DPO's script
    leaves the factor out, which is the same for every image.

    Raises:
      FileNotFoundError, UserError: as `clip_folder.open_reward` and `clip_folder.read_tokenizer`.
    """
    clip, params = clip_folder.open_reward(folder, "pickscore")

    def network(params: Params, pixels: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.exp(params["logit_scale"]) * clip.cosine(params, pixels, tokens)

    return clip.make(network, params, CLIP)
