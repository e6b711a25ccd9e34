"""Diffusion-DPO on your own pairs: every parameter of Stable Diffusion 1.5's UNet, one GPU of 24 GB.

    python -m dspo_jax.train --config configs/own_pairs_sd15.py --workdir runs/own_pairs_sd15 \
        --config.model=MODEL_DIR --config.data.path=DATA_DIR
    python -m dspo_jax.convert export --run=runs/own_pairs_sd15 --step=best --out=MODEL_OUT

Beta is that of the released launcher of Diffusion-DPO. The learning rate, 1e-6, is this project's choice: the
launcher's 1e-8 for each pair would be 6.4e-7. A few hundred pairs are far less than what the launcher was
made for, so the checkpoint that the held-out pairs find best matters (`--step=best`). The length follows from
the number of pairs: `epochs` passes over them.

Compiled for a GPU, the step takes 17.2 GiB (docs/measurements.md), with two pairs at a time and blocks
computed again in the backward pass. A card of 24 GB has that with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 in the
environment, as launch/gpu.sh sets it; --config.optimizer.moment_dtype=bfloat16 saves 1.6 GiB. Not run at this
size by this project: no hours and no result to report.
"""

from ml_collections import ConfigDict

from configs import own_pairs_sd15_lora


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = own_pairs_sd15_lora.get_config()
    config.lora.rank = 0
    config.batch_size = 64
    config.accumulation = 32
    config.remat = "blocks"
    config.optimizer.learning_rate = 1e-6
    return config
