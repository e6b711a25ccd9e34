"""D3PO on Stable Diffusion 1.5: of two images from one noise the one with the higher score, step by step.

    python -m dspo_jax.train --config configs/sd15_d3po.py --workdir runs/sd15_d3po \
        --config.model=MODEL_DIR --config.stream.prompts='("PROMPTS.txt",)' \
        --config.rewards.prompts='("HELD_OUT.txt",)'

Yang et al. 2023 as released: 20 steps of DDIM with eta 1, guidance 5 in training too, beta 0.1, ratios of
probabilities clipped to 0.9 .. 1.1, learning rate 3e-5, LoRA. With that clip the loss stays near 0.693. Not
run at this size by this project: no hours and no result to report.
"""

from ml_collections import ConfigDict

from configs import online


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = online.common_recipe("trajectories", 4)
    config.rewards.train = "aesthetic"
    config.rewards.validation = ("pickscore", "hpsv2.1")
    config.policy_gradient.name = "d3po"
    config.stream.num_inference_steps = 20
    config.stream.images = 2
    config.batch_size = 16
    config.accumulation = 20
    config.steps = 1000
    config.optimizer.learning_rate = 3e-5
    config.optimizer.weight_decay = 1e-4
    return config
