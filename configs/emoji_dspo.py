"""DSPO on the emoji pairs from the shipped base model: minutes on a laptop CPU.

python -m dspo_jax.train --config configs/emoji_dspo.py --workdir runs/emoji
"""

from ml_collections import ConfigDict

from configs import emoji_diffusion_dpo


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = emoji_diffusion_dpo.get_config()
    config.objective.name = "dspo"
    config.objective.beta = None
    # Far from the published 0.001, with which DSPO is numerically SFT on the winners; but s G stays well
    # below 1, where the policy cancels out of what is matched.
    config.objective.reward_scale = 2000.0
    config.objective.score_weight = 0.5
    return config
