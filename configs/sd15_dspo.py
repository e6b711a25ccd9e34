"""DSPO on Stable Diffusion 1.5 and Pick-a-Pic v2, as in Table 1 of the paper.

    python -m dspo_jax.train --config configs/sd15_dspo.py --workdir runs/sd15_dspo \
        --config.model=MODEL_DIR --config.data.path=DATA_DIR

`:released` (the default) is the launcher: mean over a latent, lambda = 0.001, pairs share timestep and noise.
The authors searched lambda in 0.001, 0.01, 0.05 and took the checkpoint of step 500, 1000 or 1500. `:paper`
is the print: sum over a latent, noise of each image's own (Eq. 14), learning rate 2.048e-8. Either is
numerically SFT on the winners (docs/objectives.md says why, and what to set instead). Not run at this size by
this project: no hours and no result to report.
"""

from ml_collections import ConfigDict

from configs import pick_a_pic


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe."""
    config = pick_a_pic.sd15(variant)
    config.objective.name = "dspo"
    config.objective.lam = 0.001
    if variant == "paper":
        config.objective.reduction = "sum"
    return config
