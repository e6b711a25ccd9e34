"""Diffusion-DPO on the emoji model's own images, which then compress better: minutes on a laptop CPU.

python -m dspo_jax.train --config configs/emoji_online_dpo.py --workdir runs/emoji_online_dpo
"""

from ml_collections import ConfigDict

from configs import emoji_draft


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = emoji_draft.get_config()
    config.stream.kind = "own_pairs"
    config.stream.images = 4
    config.stream.updates = 2
    config.stream.batch_size = 32
    config.rewards.train = "compressibility"
    config.rewards.validation = ("colourfulness",)
    config.objective.name = "diffusion_dpo"
    config.objective.beta = 2000.0
    config.batch_size = 16
    config.steps = 100
    config.log_every = 2
    config.checkpoint.every = 50
    config.validation.every = 50
    config.samples.every = 50
    config.optimizer.learning_rate = 1e-4
    return config
