"""Emu-style fine-tuning of SDXL: on the best images of a dataset alone, and not for long.

    python -m dspo_jax.train --config configs/sdxl_emu.py --workdir runs/sdxl_emu \
        --config.model=MODEL_DIR --config.data.path=DATA_DIR

The data are those of configs/encode/pickapic_emu_sdxl.py. Diffusion-DPO's supplement (S1.1) tunes SDXL on
them with the hyperparameters of Emu (Dai et al. 2023, arXiv:2309.15807), which it does not repeat: 64 images
an update, noise offset 0.1, at most 15,000 updates with an early stop. These three are second-hand. This
project's choice: Adafactor as in the other recipes for SDXL, learning rate 1e-6, the stop after 3 validations
without a smaller error on `validation_unique`, 20 % of the captions dropped.

S1.1 reports that both selections do better than fine-tuning on all winners, and win less than 45 % of
PartiPrompts against Diffusion-DPO. Not run at this size by this project: no hours and no result to report.
As it stands for 8, 16 or 32 devices; on one: --config.accumulation=8.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    config.objective.name = "sft"
    config.steps = 15_000
    config.batch_size = 64
    config.noise_offset = 0.1
    config.compute_dtype = "bfloat16"
    config.optimizer.name = "adafactor"
    config.optimizer.factored_axes = "released"
    config.optimizer.learning_rate = 1e-6
    config.optimizer.warmup_steps = 200
    config.validation.split = "validation_unique"
    config.validation.patience = 3
    return config
