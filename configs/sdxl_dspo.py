"""DSPO on SDXL and Pick-a-Pic v2, as in Table 2 of the paper: the loss of Eq. 47.

    python -m dspo_jax.train --config configs/sdxl_dspo.py --workdir runs/sdxl_dspo \
        --config.model=MODEL_DIR --config.data.path=DATA_DIR

`:released` (the default) is the launcher: beta = 5000 with the switch of loss that the paper does not
mention; the authors searched beta in 1000 to 5000 and took the checkpoint of step 600 or 700. `:paper` is Eq.
47 alone, with the printed learning rate and noise of each image's own (Eq. 14); no beta is printed. Not run
at this size by this project: no hours and no result to report.
"""

from ml_collections import ConfigDict

from configs import pick_a_pic


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe."""
    config = pick_a_pic.sdxl(variant)
    config.objective.name = "dspo_sdxl"
    config.objective.beta = 5000.0
    config.objective.released_switch = variant != "paper"
    return config
