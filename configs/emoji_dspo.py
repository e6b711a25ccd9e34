"""DSPO on the emoji pairs from the shipped base model: minutes on a laptop CPU.

python -m dspo_jax.train --config configs/emoji_dspo.py --workdir runs/emoji
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    config.model = "examples/emoji/model"
    config.data.path = "runs/emoji_pairs"
    config.objective.name = "dspo"
    # Far from the published 0.001, with which DSPO is numerically SFT on the winners; but s G stays well
    # below 1, where the policy cancels out of what is matched.
    config.objective.reward_scale = 2000.0
    config.objective.score_weight = 0.5
    config.batch_size = 32
    config.steps = 100
    config.log_every = 5
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 10
    config.checkpoint.every = 50
    config.validation.every = 100
    config.validation.draws = 3
    config.samples.prompts = ("smileys & emotion", "food & drink", "smiling face with sunglasses")
    config.samples.guidance_scale = 4.0
    return config
