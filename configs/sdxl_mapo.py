"""MaPO on SDXL; no reference is held or run.

    python -m dspo_jax.train --config configs/sdxl_mapo.py --workdir runs/sdxl_mapo \
        --config.model=MODEL_DIR --config.data.path=DATA_DIR

The released example, `:released`: learning rate 1e-5, constant, no warm-up, 16 pairs a step, no caption
dropped. It has 8-bit Adam; this is AdamW in 32 bits. Not run at this size by this project: no hours and no
result to report.
"""

from ml_collections import ConfigDict

from configs import pick_a_pic


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe."""
    config = pick_a_pic.sdxl(variant, printed=False)
    config.objective.name = "mapo"
    config.batch_size = 16
    config.caption_dropout = 0.0
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 0
    config.checkpoint.max_to_keep = 3  # of 31 GB each, with AdamW's moments
    return config
