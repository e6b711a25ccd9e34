"""DDPO on the shipped emoji model, by how well its images compress: the machinery in small, on a laptop CPU.

python -m dspo_jax.train --config configs/emoji_ddpo.py --workdir runs/emoji_ddpo

It has not been shown to learn: after 30 updates 56 % [47, 65] of 120 held-out images compressed better.
"""

from ml_collections import ConfigDict

from configs import emoji_draft


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = emoji_draft.get_config()
    config.stream.kind = "trajectories"
    config.stream.num_inference_steps = 8
    config.stream.eta = 1.0
    config.stream.images = 4
    config.stream.updates = 2
    config.stream.batch_size = 32
    config.rewards.train = "compressibility"
    config.rewards.validation = ("colourfulness",)
    config.policy_gradient.name = "ddpo"
    config.advantages.of = "group"
    config.batch_size = 16
    config.accumulation = 8
    config.steps = 60
    config.log_every = 2
    config.checkpoint.every = 20
    config.validation.every = 20
    config.samples.every = 60
    config.optimizer.learning_rate = 3e-4
    return config
