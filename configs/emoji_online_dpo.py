"""Diffusion-DPO on the emoji model's own images, which then compress better: minutes on a laptop CPU.

python -m dspo_jax.train --config configs/emoji_online_dpo.py --workdir runs/emoji_online_dpo

99 % of 120 held-out images then compress better than the base's (docs/measurements.md).
"""

from ml_collections import ConfigDict

from configs import emoji_draft


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = emoji_draft.get_config()
    config.stream.kind = "own_pairs"
    config.stream.num_inference_steps = 10
    config.stream.images = 4
    config.stream.updates = 4
    config.stream.batch_size = 32
    config.rewards.train = "compressibility"
    config.rewards.validation = ("colourfulness",)
    config.objective.name = "diffusion_dpo"
    config.objective.beta = 2000.0
    config.batch_size = 16
    config.steps = 40
    config.log_every = 2
    config.checkpoint.every = 20
    config.validation.every = 20
    config.samples.every = 20
    config.optimizer.learning_rate = 1e-4
    return config
