"""SPIN-Diffusion on Stable Diffusion 1.5: winners of Pick-a-Pic v2 against the reference's own images.

    python -m dspo_jax.train --config configs/sd15_spin.py --workdir runs/sd15_spin \
        --config.model=MODEL_DIR --config.data.path=DATA_DIR

Self-play of Yuan et al. 2024: Diffusion-DPO on pairs of an image of the data and one that the model of the
iteration before draws for its caption; no reward and no loser of the data is read. Their model cards: three
iterations of 500 steps, 2048 pairs a step, AdamW, 2e-5, 200 steps of warm-up, linear. Theirs are three runs,
each of which starts the rate anew; here one warm-up and one fall to 0 span them. They do not state beta_t:
5000 is Diffusion-DPO's. How images are drawn, 50 steps of DDIM with guidance 7.5, is this project's choice. A
step draws 2048 images, which takes most of its time. Not run at this size by this project: no hours and no
result to report. As it stands for 32 devices, 16 pairs on each at a time; on 8: --config.accumulation=16.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    config.stream.kind = "self_play"
    config.stream.batch_size = 32
    config.stream.eta = 0.0
    config.stream.guidance_scale = 7.5
    config.reference.every = 500
    config.objective.name = "diffusion_dpo"
    config.objective.beta = 5000.0
    config.compute_dtype = "bfloat16"
    config.accumulation = 4
    config.steps = 1500
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 200
    return config
