"""DDPO on Stable Diffusion 1.5: aesthetic score, LoRA of rank 4.

    python -m dspo_jax.train --config configs/sd15_ddpo.py --workdir runs/sd15_ddpo \
        --config.model=MODEL_DIR --config.stream.prompts='("PROMPTS.txt",)' \
        --config.rewards.prompts='("HELD_OUT.txt",)'

Black et al. 2023 as in ddpo-pytorch's config for eight A100: 256 images a round in two updates, 200 rounds,
50 steps of DDIM with eta 1, guidance 5 in drawing and in training, learning rate 3e-4, gradients clipped at
1, the last 32 rewards of a prompt once it has 16; 45 names of animals as prompts. That is about four hours
for 100 rounds on eight A100, by the release's README. The JAX original trains every parameter with 1e-5. Not
run at this size by this project: no hours and no result to report.
"""

from ml_collections import ConfigDict

from configs import online


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = online.common_recipe("trajectories", 4)
    config.rewards.train = "aesthetic"
    config.rewards.validation = ("pickscore", "hpsv2.1")
    config.stream.images = 1
    config.stream.updates = 2
    config.batch_size = 128
    config.accumulation = 400
    config.steps = 400
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 1e-4
    return config
