"""DSPO on Stable Diffusion 1.5 with LoRA: adapters of rank 8 on the UNet's attention projections.

    python -m dspo_jax.train --config configs/sd15_dspo_lora.py --workdir runs/sd15_dspo_lora \
        --config.model=MODEL_DIR --config.data.path=DATA_DIR
    python -m dspo_jax.convert export --run=runs/sd15_dspo_lora --out=adapters.safetensors --lora=diffusers

DSPO's Table 6 has DSPO-LoRA, of which the paper prints no setting. Rank, layers, learning rate, batch and
length are those of the LoRA trainer of Diffusion-DPO in diffusers (examples/research_projects/diffusion_dpo).
The objective is DSPO with a preference term that matters, as docs/objectives.md advises; with the published
lambda it is SFT. Not run at this size by this project: no hours and no result to report.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    config.objective.name = "dspo"
    config.objective.reward_scale = 2000.0
    config.objective.score_weight = 0.5
    config.lora.rank = 8
    config.batch_size = 32
    config.accumulation = 2
    config.steps = 10_000
    config.compute_dtype = "bfloat16"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 0
    config.checkpoint.every = 1000
    config.validation.every = 1000
    return config
