"""CLIP score: how well an image fits its prompt, by a CLIP as it was published."""

from pathlib import Path

import jax

from dspo_jax.models.model import Params
from dspo_jax.rewards import clip_folder
from dspo_jax.rewards.device_pixels import CLIP
from dspo_jax.rewards.network import RewardNetwork


def load(folder: Path, *, name: str) -> RewardNetwork:
    """Loads CLIP score: 100 times the cosine of image and prompt; negative where they point apart.

    CLIPScore as Hessel et al. 2021 (arXiv:2104.08718) define it puts negative cosines at zero and has the
    factor 2.5. The released scripts do neither: Diffusion-DPO's and ImageReward's report the cosine itself.
    Here nothing is clamped either. Diffusion-DPO's script scores with ViT-H/14 behind the transform of HPS
    (preprocess.py), which for square images is nearly the same as CLIP's own, used here.

    Raises:
      FileNotFoundError, UserError: as `clip_folder.open_reward` and `clip_folder.read_tokenizer`.
    """
    clip, params = clip_folder.open_reward(folder, name)

    def network(params: Params, pixels: jax.Array, tokens: jax.Array) -> jax.Array:
        return 100 * clip.cosine(params, pixels, tokens)

    return clip.make(network, params, CLIP)
