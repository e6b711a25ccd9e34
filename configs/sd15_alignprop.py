"""AlignProp on Stable Diffusion 1.5: HPS v2.1 through a random number of the last steps, with LoRA.

    python -m dspo_jax.train --config configs/sd15_alignprop.py --workdir runs/sd15_alignprop \
        --config.model=MODEL_DIR --config.stream.prompts='("PROMPTS.txt",)' \
        --config.rewards.prompts='("HELD_OUT.txt",)'

Prabhudesai et al. 2023 in their release of October 2024: DDIM with eta 1, guidance 5, learning rate 1e-3,
weight decay 1e-4, gradients clipped at 1, batches of 128, 20 to 25 updates. That release draws the number of
steps from a normal distribution around 42 by default; here it is uniform, as printed. Not run at this size
by this project: no hours and no result to report. As it stands for 1, 2 or 4 devices; on 8:
--config.accumulation=16.
"""

from ml_collections import ConfigDict

from configs import online


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = online.common_recipe("prompts", 4)
    config.rewards.train = "hpsv2.1"
    config.rewards.validation = ("pickscore", "aesthetic")
    config.reward_gradient.name = "alignprop"
    config.batch_size = 128
    config.accumulation = 32
    config.steps = 25
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 1e-4
    config.checkpoint.every = 5
    config.validation.every = 5
    config.samples.every = 5
    return config
