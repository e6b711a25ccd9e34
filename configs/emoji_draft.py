"""DRaFT-1 on the shipped emoji model, which makes its images more colourful: minutes on a laptop CPU.

python -m dspo_jax.train --config configs/emoji_draft.py --workdir runs/emoji_draft

With --config.steps=20 all of 120 held-out images are more colourful than the base's; after 100 they show
little else (docs/measurements.md).
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    config.model = "examples/emoji/model"
    config.stream.kind = "prompts"
    config.stream.prompts = ("examples/emoji/train_prompts.txt",)
    config.stream.num_inference_steps = 20
    config.stream.eta = 0.0
    config.stream.guidance_scale = 4.0
    config.stream.batch_size = 16
    config.rewards.train = "colourfulness"
    config.rewards.validation = ("compressibility",)
    config.rewards.prompts = ("examples/emoji/prompts.txt",)
    config.reward_gradient.name = "draft_k"
    config.reward_gradient.k = 1.0
    config.batch_size = 8
    config.steps = 30
    config.log_every = 5
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 5
    config.checkpoint.every = 10
    config.validation.every = 10
    config.samples.every = 10
    config.samples.prompts = ("smileys & emotion", "food & drink", "smiling face with sunglasses")
    config.samples.guidance_scale = 4.0
    return config
