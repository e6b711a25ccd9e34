"""Diffusion-DPO on SDXL's own images: the best of four against the worst, by PickScore.

    python -m dspo_jax.train --config configs/sdxl_online_dpo.py --workdir runs/sdxl_online_dpo \
        --config.model=MODEL_DIR --config.stream.prompts='("PROMPTS.txt",)' \
        --config.rewards.prompts='("HELD_OUT.txt",)'

This project's choice, as `sd15_online_dpo.py`, with SDXL's beta and batch of diffusers' LoRA trainer. Not
run at this size by this project: no hours and no result to report. As it stands for one device; on 8:
--config.accumulation=1.
"""

from ml_collections import ConfigDict

from configs import sd15_online_dpo


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = sd15_online_dpo.get_config()
    config.objective.beta = 10000.0
    config.remat = "blocks"
    config.stream.batch_size = 8
    config.batch_size = 8
    config.accumulation = 8
    return config
