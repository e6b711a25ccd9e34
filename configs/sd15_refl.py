"""ReFL on Stable Diffusion 1.5: ImageReward of the image that a late step expects, every parameter trained.

    python -m dspo_jax.train --config configs/sd15_refl.py --workdir runs/sd15_refl \
        --config.model=MODEL_DIR --config.stream.prompts='("PROMPTS.txt",)' \
        --config.rewards.prompts='("HELD_OUT.txt",)'

Xu et al. 2023 (ImageReward) as released: 40 steps without guidance, one of the last ten drawn for each
update, loss 1e-3 max(0, 2 - reward), learning rate 1e-5, batches of 64. The pretraining loss that the paper
prints is not in the release, and not here. Not run at this size by this project: no hours and no result to
report.
"""

from ml_collections import ConfigDict

from configs import online


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = online.common_recipe("prompts", 0)
    config.stream.num_inference_steps = 40
    config.stream.eta = 0.0
    config.stream.guidance_scale = 1.0
    config.rewards.train = "imagereward"
    config.rewards.validation = ("pickscore", "hpsv2.1")
    config.reward_gradient.name = "refl"
    config.batch_size = 64
    config.accumulation = 8
    config.steps = 500
    config.optimizer.learning_rate = 1e-5
    return config
