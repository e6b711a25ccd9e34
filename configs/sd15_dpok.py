"""DPOK on Stable Diffusion 1.5: ImageReward with a divergence from the model at the start, LoRA of rank 4.

    python -m dspo_jax.train --config configs/sd15_dpok.py --workdir runs/sd15_dpok \
        --config.model=MODEL_DIR --config.stream.prompts='("PROMPTS.txt",)' \
        --config.rewards.prompts='("HELD_OUT.txt",)'

Fan et al. 2023, as released but for the buffer of transitions and the network that estimates the reward, in
whose place stands the mean of a prompt's images: guidance 7.5, alpha 10, beta 0.01, clip 1e-4, learning rate
1e-5, gradients clipped at 0.1, five updates a round. Not run at this size by this project: no hours and no
result to report.
"""

from ml_collections import ConfigDict

from configs import online


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = online.common_recipe("trajectories", 4)
    config.rewards.train = "imagereward"
    config.rewards.validation = ("pickscore", "aesthetic")
    config.policy_gradient.name = "dpok"
    config.policy_gradient.kl = "prediction"
    config.advantages.of = "group"
    config.stream.images = 4
    config.stream.updates = 5
    config.stream.guidance_scale = 7.5
    config.batch_size = 16
    config.accumulation = 100
    config.steps = 5000
    config.optimizer.learning_rate = 1e-5
    config.optimizer.weight_decay = 0.0
    config.optimizer.max_grad_norm = 0.1
    return config
