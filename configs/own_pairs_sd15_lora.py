"""Diffusion-DPO on your own pairs: Stable Diffusion 1.5, adapters of rank 8, one GPU of 12 GB.

    python -m dspo_jax.train --config configs/own_pairs_sd15_lora.py --workdir runs/own_pairs_sd15_lora \
        --config.model=MODEL_DIR --config.data.path=DATA_DIR
    python -m dspo_jax.convert export --run=runs/own_pairs_sd15_lora --out=lora.safetensors --lora=diffusers \
        --step=best

Objective, rank, batch and learning rate are those of the script that diffusers ships for this model
(examples/research_projects/diffusion_dpo/train_diffusion_dpo.py and the command in its README), whose
--beta_dpo=2500 is beta = 5000 here. The length follows from the number of pairs: `epochs` passes over them.
Held-out pairs are judged every 25 steps, and the checkpoint that they find best is kept: the last line of
`train` says which, and `convert export --step=best` takes it. Compiled for a GPU, the step takes 8.0 GiB
(docs/measurements.md). Not run at this size by this project: no hours and no result to report.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    config.objective.name = "diffusion_dpo"
    config.objective.beta = 5000.0
    config.lora.rank = 8
    config.epochs = 10.0
    config.batch_size = 32
    config.accumulation = 8
    config.compute_dtype = "bfloat16"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 0
    config.log_every = 5
    config.checkpoint.every = 25
    config.validation.every = 25
    config.samples.every = 50
    return config
