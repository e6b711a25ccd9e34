"""Diffusion-DPO on SDXL and Pick-a-Pic v2.

    python -m dspo_jax.train --config configs/sdxl_diffusion_dpo.py --workdir runs/sdxl_diffusion_dpo \
        --config.model=MODEL_DIR --config.data.path=DATA_DIR

`:released` (the default) is the launcher: beta = 5000. `:paper` is section 5.1 of the paper: beta = 5000,
learning rate 2.048e-8 times 2000 / beta, linear warm-up over a quarter of the run; and noise of each image's
own, as the supplement prints it (S2). Not run at this size by this project: no hours and no result to report.
"""

from ml_collections import ConfigDict

from configs import pick_a_pic


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe."""
    config = pick_a_pic.sdxl(variant)
    config.objective.name = "diffusion_dpo"
    config.objective.beta = 5000.0
    if variant == "paper":
        config.optimizer.learning_rate = 2.048e-8 * 2000 / 5000
        config.optimizer.warmup_steps = 500
    return config
