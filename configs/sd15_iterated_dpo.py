"""Iterated Diffusion-DPO on Stable Diffusion 1.5's own images, by PickScore, with a reference that follows.

    python -m dspo_jax.train --config configs/sd15_iterated_dpo.py --workdir runs/sd15_iterated_dpo \
        --config.model=MODEL_DIR --config.stream.prompts='("PROMPTS.txt",)' \
        --config.rewards.prompts='("HELD_OUT.txt",)'

This project's choice: four iterations of 250 updates of `sd15_online_dpo.py`, and after each the reference
becomes the policy. So the pull of beta is to the start of the iteration, and the model goes further; nothing
holds it to the start of the run. Checkpoints hold the reference too. Not run at this size by this project: no
hours and no result to report. As it stands for 1, 2 or 4 devices; on 8: --config.accumulation=2.
"""

from ml_collections import ConfigDict

from configs import sd15_online_dpo


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = sd15_online_dpo.get_config()
    config.reference.every = 250
    return config
