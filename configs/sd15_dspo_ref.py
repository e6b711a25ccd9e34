"""DSPO with the reference's score as the target, on Stable Diffusion 1.5: the ablation DSPO-ref of Table 6.

    python -m dspo_jax.train --config configs/sd15_dspo_ref.py --workdir runs/sd15_dspo_ref \
        --config.model=MODEL_DIR --config.data.path=DATA_DIR

Variants as in sd15_dspo.py. A run that starts at the reference has no gradient and stays there, but for
weight decay and rounding (docs/objectives.md). To get anywhere, start from other weights than the
reference's. Not run at this size by this project: no hours and no result to report.
"""

from ml_collections import ConfigDict

from configs import pick_a_pic


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe."""
    config = pick_a_pic.sd15(variant)
    config.objective.name = "dspo_ref"
    config.objective.lam = 0.001
    if variant == "paper":
        config.objective.reduction = "sum"
    return config
