"""RAFT on Stable Diffusion 1.5: the best of eight images of a prompt is imitated, by ImageReward.

    python -m dspo_jax.train --config configs/sd15_raft.py --workdir runs/sd15_raft \
        --config.model=MODEL_DIR --config.stream.prompts='("PROMPTS.txt",)' \
        --config.rewards.prompts='("HELD_OUT.txt",)'

Reward-ranked fine-tuning (Dong et al. 2023): in every round the model draws K images of each prompt, and is
fine-tuned on the best of them. The loop is the paper's. The numbers are this project's choice, with the rate
of its LoRA recipes: K = 8, 64 prompts a round in four updates. Not run at this size by this project: no hours
and no result to report. As it stands for 1, 2, 4 or 8 devices.
"""

from ml_collections import ConfigDict

from configs import online


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = online.common_recipe("own_pairs", 8)
    config.rewards.train = "imagereward"
    config.rewards.validation = ("pickscore", "aesthetic")
    config.stream.images = 8
    config.stream.updates = 4
    config.stream.eta = 0.0
    config.stream.guidance_scale = 7.5
    config.objective.name = "sft"
    config.batch_size = 16
    config.accumulation = 2
    config.steps = 1000
    config.checkpoint.every = 100
    config.validation.every = 100
    config.samples.every = 100
    config.optimizer.learning_rate = 1e-5
    return config
