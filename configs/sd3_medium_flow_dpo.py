"""Flow-DPO on Stable Diffusion 3 medium: Diffusion-DPO of the velocity, adapters of rank 32.

    python -m dspo_jax.train --config configs/sd3_medium_flow_dpo.py --workdir runs/sd3_medium_flow_dpo \
        --config.model=MODEL_DIR --config.data.path=DATA_DIR

As sd35_medium_flow_dpo.py, with the same variants `:lora` and `:full`: the released code bases have settings
for Stable Diffusion 3.5 alone. This model has one attention in a block, and no norms of queries and keys.
PNAPO's paper trains it with beta 5000 without the half of Diffusion-DPO, which is 10,000 here, at 1e-6.
Not run at this size by this project: no hours and no result to report.
"""

from ml_collections import ConfigDict

from configs import sd35_medium_flow_dpo


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe, as of sd35_medium_flow_dpo.py."""
    return sd35_medium_flow_dpo.get_config(variant)
