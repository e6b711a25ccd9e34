"""Diffusion-DPO on your own pairs: SDXL, adapters of rank 8, one GPU of 16 GB.

    python -m dspo_jax.train --config configs/own_pairs_sdxl_lora.py --workdir runs/own_pairs_sdxl_lora \
        --config.model=MODEL_DIR --config.data.path=DATA_DIR
    python -m dspo_jax.convert export --run=runs/own_pairs_sdxl_lora --out=lora.safetensors --lora=diffusers \
        --step=best

As own_pairs_sd15_lora.py, with batch and beta of the script that diffusers ships for SDXL
(examples/research_projects/diffusion_dpo/train_diffusion_dpo_sdxl.py), whose --beta_dpo=5000 is beta = 10000
here. One pair is worked on at a time, and blocks are computed again in the backward pass, to save memory:
compiled for a GPU, the step takes 7.5 GiB (docs/measurements.md). Not run at this size by this project: no
hours and no result to report.
"""

from ml_collections import ConfigDict

from configs import own_pairs_sd15_lora


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = own_pairs_sd15_lora.get_config()
    config.objective.beta = 10_000.0
    config.batch_size = 16
    config.accumulation = 16
    config.remat = "blocks"
    config.validation.batch_size = 8
    return config
