"""DRaFT-1 on Stable Diffusion 1.5: the gradient of HPS v2.1 through the last of 50 steps, with LoRA.

    python -m dspo_jax.train --config configs/sd15_draft.py --workdir runs/sd15_draft \
        --config.model=MODEL_DIR --config.stream.prompts='("PROMPTS.txt",)' \
        --config.rewards.prompts='("HELD_OUT.txt",)'

Clark et al. 2024 released no code. Their smaller setting, as read second-hand: LoRA of rank 8, AdamW with
weight decay 0.1, learning rate 4e-4, batches of 4, 2,000 updates, DDIM without noise, guidance 7.5. K = 1 is
what they find best for the compute; `--config.reward_gradient.name=draft_lv` draws each result again, for
less variance. Not run at this size by this project: no hours and no result to report. As it stands for 1, 2
or 4 devices; on 8: --config.batch_size=8.
"""

from ml_collections import ConfigDict

from configs import online


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = online.common_recipe("prompts", 8)
    config.stream.eta = 0.0
    config.stream.guidance_scale = 7.5
    config.rewards.train = "hpsv2.1"
    config.rewards.validation = ("pickscore", "aesthetic")
    config.reward_gradient.name = "draft_k"
    config.batch_size = 4
    config.steps = 2000
    config.optimizer.learning_rate = 4e-4
    config.optimizer.weight_decay = 0.1
    return config
