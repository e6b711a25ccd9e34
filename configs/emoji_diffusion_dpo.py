"""Diffusion-DPO on pairs for the shipped emoji model: minutes on a laptop CPU.

python -m dspo_jax.train --config configs/emoji_diffusion_dpo.py --workdir runs/emoji_diffusion_dpo

Trained on `data.path`, pairs that dspo_jax.encode wrote for the model: those of `configs/encode/emoji.py`
(`make demo`), or of the model's own images (`examples/emoji/closed_loop.py`).
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    config.model = "examples/emoji/model"
    config.data.path = "runs/emoji_pairs"
    config.objective.name = "diffusion_dpo"
    # Below the published 5000: a run is 100 updates here, not 2000. At 500 the pictures get speckled.
    config.objective.beta = 2000.0
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
