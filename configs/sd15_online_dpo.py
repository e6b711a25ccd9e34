"""Diffusion-DPO on Stable Diffusion 1.5's own images: the best of four against the worst, by PickScore.

    python -m dspo_jax.train --config configs/sd15_online_dpo.py --workdir runs/sd15_online_dpo \
        --config.model=MODEL_DIR --config.stream.prompts='("PROMPTS.txt",)' \
        --config.rewards.prompts='("HELD_OUT.txt",)'

This project's choice: the loop without people (`examples/emoji/closed_loop.py`) as one run, in which every
update sees images of the model as it is. Beta, learning rate and rank are those of diffusers' LoRA trainer
of Diffusion-DPO. Any objective trains so: `--config.objective.name=dspo`; with `sft` it is RAFT, the best of
four imitated. Not run at this size by this project: no hours and no result to report. As it stands for 1, 2
or 4 devices; on 8: --config.accumulation=2.
"""

from ml_collections import ConfigDict

from configs import online


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = online.common_recipe("own_pairs", 8)
    config.rewards.train = "pickscore"
    config.rewards.validation = ("hpsv2.1", "aesthetic")
    config.stream.eta = 0.0
    config.stream.guidance_scale = 7.5
    config.objective.name = "diffusion_dpo"
    config.objective.beta = 5000.0
    config.batch_size = 16
    config.accumulation = 4
    config.steps = 1000
    config.optimizer.learning_rate = 1e-5
    return config
