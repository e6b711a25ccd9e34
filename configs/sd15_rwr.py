"""Reward-weighted regression on Stable Diffusion 1.5's own images: aesthetic score, every parameter.

    python -m dspo_jax.train --config configs/sd15_rwr.py --workdir runs/sd15_rwr \
        --config.model=MODEL_DIR --config.stream.prompts='("PROMPTS.txt",)' \
        --config.rewards.prompts='("HELD_OUT.txt",)'

RWR of Black et al. 2023, DDPO's baseline, as in jannerm/ddpo's config for the aesthetic score: weights
softmax(0.2 x reward) over the images of each prompt, 10,240 images a round by 50 steps of DDIM with eta 1 and
guidance 5, AdamW with rate 1e-5 and weight decay 1e-4, gradients clipped at 1, names of animals as prompts.
Three things differ. The release goes through a round's images five times, this recipe once: it draws 1,024
in a round, of 50 rounds, and so trains on newer ones. It guides the prediction that is trained, this project
does not: captions are dropped in a fifth of the rows, as guidance needs it. It has a batch of 4 images for
each device; this has 64, which is this project's choice. Not run at this size by this project: no hours and
no result to report. As it stands for 1, 2, 4 or 8 devices.
"""

from ml_collections import ConfigDict

from configs import online


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = online.common_recipe("own_pairs", 0)
    config.rewards.train = "aesthetic"
    config.rewards.validation = ("pickscore", "hpsv2.1")
    config.stream.images = 16
    config.stream.updates = 16
    config.objective.name = "rwr"
    config.objective.softmax_over = "prompt"
    config.share_timesteps = False
    config.share_noise = False
    # Of pairs: 64 images.
    config.batch_size = 32
    config.accumulation = 4
    config.steps = 800
    config.checkpoint.every = 80
    config.validation.every = 80
    config.samples.every = 80
    config.optimizer.learning_rate = 1e-5
    config.optimizer.weight_decay = 1e-4
    return config
